"""Steps prepared ahead: the same ones, positions of those taken, errors, no thread left."""

import json
import threading

import pytest
import torch

from tests.unit.trainer.data.test_loader import content, dataset, loader, steps
from trainer.data.prefetch import Prefetcher
from trainer.errors import UserError
from trainer.tasks.causal_lm import CausalLM, CausalLMOptions

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def task(tokenizer) -> CausalLM:
    return CausalLM(CausalLMOptions(), tokenizer)


@pytest.fixture(scope="module")
def data():
    return dataset([3 + 7 * n % 30 for n in range(53)])


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "prefetch" in thread.name]


def test_the_loaders_own_steps_and_positions(data, task) -> None:
    alone = loader(data, task, packing=True)
    with Prefetcher(loader(data, task, packing=True), CPU, 12) as ahead:
        assert ahead.state_dict() == alone.state_dict()
        for _ in range(12):
            assert content(ahead.next_step()) == content(alone.next_step())
            assert ahead.state_dict() == alone.state_dict()  # not that of the step prepared since
        assert threads()
    assert not threads()


def test_resume_from_the_step_taken(data, task) -> None:
    expected = [content(step) for step in steps(loader(data, task), 9)]
    with Prefetcher(loader(data, task), CPU, 9) as first:
        for _ in range(4):
            first.next_step()
        state = json.loads(json.dumps(first.state_dict()))
    resumed = loader(data, task)
    resumed.load_state_dict(state)
    with Prefetcher(resumed, CPU, 5) as second:
        assert [content(second.next_step()) for _ in range(5)] == expected[4:]


def test_another_size_discards_what_was_prepared(data, task) -> None:
    alone = loader(data, task)
    with Prefetcher(loader(data, task), CPU, 9) as ahead:
        for size in (3, 3, 5, 5, 2):
            ahead.micro_batch_size = alone.micro_batch_size = size
            assert ahead.micro_batch_size == size
            assert content(ahead.next_step()) == content(alone.next_step())


def test_nothing_is_prepared_beyond_the_run(data, task) -> None:
    of = loader(data, task)
    with Prefetcher(of, CPU, 2) as ahead:
        ahead.next_step(), ahead.next_step()
    assert of.state_dict() == ahead.state_dict()


def test_an_error_of_the_thread_is_raised_by_its_step(data, task, monkeypatch) -> None:
    class Broken(CausalLM):
        calls = 0

        def collate(self, *given, **keys):
            self.calls += 1
            if self.calls > 4:  # in the second step
                raise UserError("data.train: damaged; accepted: another")
            return super().collate(*given, **keys)

    broken = Broken(task.options, task.tokenizer)
    with Prefetcher(loader(data, broken), CPU, 9) as ahead:
        position = (ahead.next_step(), ahead.state_dict())[1]
        with pytest.raises(UserError, match=r"^data\.train: damaged; accepted: another$"):
            ahead.next_step()
        assert ahead.state_dict() == position
    assert not threads()
