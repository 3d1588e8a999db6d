"""Activations on the host: the same gradients, and nothing of them on the device meanwhile."""

import gc
import weakref

import pytest
import torch

from tests.helpers import sample
from tests.unit.trainer.model.test_blocks import FOUR_BLOCKS, gradients, opened
from trainer import device_memory
from trainer.device_memory import GIB
from trainer.errors import RunFailed
from trainer.memory import planner
from trainer.memory.planner import Needs
from trainer.model import activation_offload
from trainer.model.activation_offload import HostMemory

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch):
    monkeypatch.setattr(activation_offload, "_LEAST", 2**12)


PLACES = [(2, 2), (0, 2), (1, 1), (3, 1)]


@pytest.mark.parametrize(
    "case",
    sample(
        [(*places, compiled) for places in PLACES for compiled in (False, True)],
        *[(*places, False) for places in PLACES],
        (2, 2, True),
    ),
)
def test_gradients_are_those_of_blocks_that_keep_everything(tmp_path, monkeypatch, case):
    saved, offloaded, compiled = case
    monkeypatch.setattr("trainer.model.blocks.BACKEND", "aot_eager")
    torch._dynamo.reset()
    session = opened(tmp_path, *FOUR_BLOCKS, f"engine.compile={str(compiled).lower()}")
    blocks = session.backbone.blocks
    expected = gradients(session)
    blocks.keep(saved, offloaded, 2**24)
    assert (blocks.saved, blocks.offloaded) == (saved, offloaded)
    for _ in range(2):  # places are used again
        assert torch.equal(gradients(session), expected)
    blocks.keep(4)
    assert torch.equal(gradients(session), expected) and not blocks.host.busy


def used_in_forward(session) -> int:
    batch = planner.largest_batch(
        session.task, session.config.data, session.backbone.rows, [64] * 2, 2
    )
    loss, _ = session.task.loss(session.model, batch)
    used = session.backbone.blocks.host.used
    loss.backward()
    assert session.backbone.blocks.host.used == 0  # the first block is none of the moved ones
    return used


def test_what_finds_no_place_stays_where_it_is(tmp_path):
    session = opened(tmp_path, *FOUR_BLOCKS)
    blocks = session.backbone.blocks
    expected = gradients(session)
    blocks.keep(2, 1, 2**24)
    one = used_in_forward(session)
    blocks.keep(2, 2, 2**24)
    assert used_in_forward(session) == 2 * one
    blocks.keep(2, 2, one // 2)
    assert 0 < used_in_forward(session) <= one
    assert torch.equal(gradients(session), expected)


def saved_by(host: HostMemory, block: int, x: torch.Tensor, held: set[int] = frozenset()):
    """A block that saves exp(x): its output, and a reference that tells whether that still lives."""
    with host.saving(block, held):
        y = x.exp()
        z = y * y  # saves y twice more
    return z, weakref.ref(y)


def test_a_tensor_travels_once_and_leaves_no_copy_behind():
    host = HostMemory(CPU)
    host.reserve([1], 2**20)
    x = torch.randn(64, 64, requires_grad=True)
    z, y = saved_by(host, 1, x)
    assert host.used == 64 * 64 * 4
    host.settle()
    gc.collect()
    assert y() is None
    z.sum().backward()
    torch.testing.assert_close(x.grad, 2 * (2 * x.detach()).exp())


def test_a_block_that_runs_twice_is_refused():
    host = HostMemory(CPU)
    host.reserve([1], 2**20)
    x = torch.randn(64, 64, requires_grad=True)
    saved_by(host, 1, x)
    with pytest.raises(RunFailed, match=r"engine.activation_offload: block 1 runs twice"):
        saved_by(host, 1, x)
    host.reserve([1], None)  # what was saved is forgotten
    saved_by(host, 1, x)


def test_only_blocks_that_have_gradients_move(tmp_path):
    layers = ["model.weights=random", "model.overrides.num_hidden_layers=6"]
    session = opened(tmp_path, *layers, r"method.targets=model.layers.[2345].*proj")
    blocks = session.backbone.blocks
    assert list(blocks.offloadable) == [3, 4]
    expected = gradients(session)
    blocks.keep(4, 2, 2**24)
    assert used_in_forward(session) > 0  # and nothing afterwards
    assert torch.equal(gradients(session), expected)


@pytest.mark.parametrize("shape", ["transposed", "strided", "offset"])
def test_strides_survive(shape):
    host, base = HostMemory(CPU), torch.randn(80, 96)
    host.reserve([1], 2**20)
    saved = {"transposed": base.T, "strided": base[:, ::2], "offset": base[16:]}[shape]
    weight = torch.randn(saved.shape, requires_grad=True)
    with host.saving(1, set()):
        product = (weight * saved).sum()
    assert (host.used > 0) == (shape != "strided")
    product.backward()
    assert torch.equal(weight.grad, saved)


def test_what_others_hold_and_what_is_small_stays():
    host = HostMemory(CPU)
    host.reserve([1], 2**20)
    mask = torch.randn(64, 64)
    x = torch.randn(64, 64, requires_grad=True)
    with host.saving(1, {mask.untyped_storage().data_ptr()}):
        (x * mask).sum().backward()
    assert host.used == 0
    host.reserve([1], None)
    small = torch.randn(4, requires_grad=True)
    saved_by(host, 1, small)
    assert host.used == 0


def test_blocks_are_fetched_one_ahead():
    host = HostMemory(CPU)
    host.reserve([1, 3, 5], 2**20)
    x = torch.randn(64, 64, requires_grad=True)
    for block in (1, 3, 5):
        saved_by(host, block, x)
    assert host.used == 3 * 64 * 64 * 4
    host.before_backward(6)
    assert [bool(host._saved[block].arrived) for block in (1, 3, 5)] == [False, False, True]
    host.before_backward(5)
    assert [bool(host._saved[block].arrived) for block in (1, 3, 5)] == [False, True, True]
    host.before_backward(2)  # 3 and 5 are done with
    assert list(host._saved) == [1] and host._saved[1].arrived


def test_places_are_kept_where_they_fit():
    host = HostMemory(CPU)
    host.reserve([1, 3], 1000)
    first = {id(place) for place in host._buffers.values()}
    host.reserve([1, 2, 3], None)
    assert first < {id(place) for place in host._buffers.values()}
    host.reserve([2], 1000)
    assert {id(place) for place in host._buffers.values()} < first
    host.reserve([2], 2000)
    assert [len(place) for place in host._buffers.values()] == [2000]


def test_no_more_is_planned_than_fits_and_as_little_is_computed_again():
    """Against every plan there is."""
    blocks = 12
    for forward, backward, freed, most, budget in [
        (50, 60, 2, 5, 100), (60, 50, 2, 12, 100), (50, 57, 0, 3, 80), (50, 90, 3, 12, 95),
        (10, 20, 1, 0, 60), (50, 60, 2, 12, 1000), (200, 60, 2, 12, 100), (60, 70, 1, 5, 71),
        (60, 61, 1, 8, 62),
    ]:  # fmt: skip
        needs = Needs(forward, backward, 7, freed, most)
        offloaded = needs.offloaded(blocks, budget)
        saved = needs.saved(blocks, offloaded, budget)
        plans = [
            (n + m, -m)
            for m in range(min(most, blocks) + 1)
            for n in range(blocks - m + 1)
            if needs.peak(n, m) <= budget
        ]
        if not plans:
            assert saved == -1
            continue
        assert needs.peak(saved, offloaded) <= budget
        assert (saved + offloaded, -offloaded) == max(plans)


def test_windows_are_this_process_s_own_memory_and_no_one_else_s(monkeypatch):
    """A GPU of 100 GiB: 20 in tensors (25 reserved), 30 in windows, 5 of others."""
    gpu = torch.device("cuda")
    monkeypatch.setattr(device_memory, "_outside", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (40 * GIB, 100 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 25 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 20 * GIB)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 22 * GIB)
    device_memory.count_outside(30 * GIB)
    assert device_memory.allowance(gpu, 0.9) == 85 * GIB
    assert device_memory.held_bytes(gpu) == 50 * GIB and device_memory.peak_bytes(gpu) == 52 * GIB
    assert device_memory.peak_gib(gpu) == 52
    device_memory.count_outside(-30 * GIB)
    assert device_memory.allowance(gpu, 0.9) == 55 * GIB
