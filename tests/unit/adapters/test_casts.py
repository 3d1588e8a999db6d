"""Casts of all adapters at once: the same bits as layer by layer, and only while they hold."""

import pytest
import torch

from adapters.casts import Casts
from tests.helpers import quick_config
from trainer.distributed.world import World
from trainer.session import open_session


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    changes = ["run.verify=off", "data.eval=null", "model.dtype=bfloat16"]
    opened = open_session(quick_config(tmp_path_factory.mktemp("casts"), *changes), World())
    for adapter in opened.method.adapters.values():
        torch.nn.init.normal_(adapter.B, std=0.1)
    return opened


def gradients(session) -> torch.Tensor:
    session.optimizer.zero_grad()
    batch = session.task.collate([[session.train_data[i]] for i in range(2)])
    session.task.loss(session.model, batch)[0].backward()
    return session.optimizer.gradients.clone()


def test_gradients_are_the_same_to_the_bit(session):
    expected = gradients(session)
    with session.casts.fresh():
        adapter = next(iter(session.method.adapters.values()))
        A, _, B = adapter.cast(torch.bfloat16)
        assert A.data_ptr() == adapter.cast(torch.bfloat16)[0].data_ptr()
        assert torch.equal(A, adapter.A.bfloat16()) and torch.equal(B, adapter.B.bfloat16())
        assert torch.equal(adapter.cast(torch.float32)[0], adapter.A)
        assert torch.equal(gradients(session), expected)


def test_values_that_change_are_cast_anew(session):
    adapter = next(iter(session.method.adapters.values()))
    with session.casts.fresh():
        before = adapter.cast(torch.bfloat16)[0].clone()
    adapter.A.data.add_(1.0)
    for _ in range(2):
        assert torch.equal(adapter.cast(torch.bfloat16)[0], adapter.A.bfloat16())
        with session.casts.fresh():
            assert torch.equal(adapter.cast(torch.bfloat16)[0], adapter.A.bfloat16())
            assert not torch.equal(adapter.cast(torch.bfloat16)[0], before)
        session.optimizer.rebind_parameters(session.trainables())  # to another buffer
        adapter.A.data.mul_(0.5)


def test_memory_of_old_casts_is_free_before_new_ones_and_a_lack_of_it_is_got_over(
    session, monkeypatch
):
    adapters = list(session.method.adapters.values())
    with session.casts.fresh():
        pass
    session.optimizer.rebind_parameters(session.trainables())

    def without_memory(*_, **__):
        assert all(adapter.held is None for adapter in adapters)
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr("adapters.casts.torch.empty_like", without_memory)
        with session.casts.fresh():
            pass
    with session.casts.fresh():
        for adapter in adapters:
            A, _, B = adapter.cast(torch.bfloat16)
            assert adapter.held is not None and A.data_ptr() == adapter.held[1].data_ptr()
            assert torch.equal(A, adapter.A.bfloat16()) and torch.equal(B, adapter.B.bfloat16())


def test_without_adapters_nothing_is_cast(session, monkeypatch):
    monkeypatch.setattr("adapters.casts.torch.empty_like", None)
    with Casts(session.optimizer, {}, torch.bfloat16).fresh():
        pass
