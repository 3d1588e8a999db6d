"""Masked AdamW with its update split over ranks, which are threads here: the same to the last bit."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapters.optimizer import MaskedAdamW, Share, Trainable
from adapters.trainable import Kept

SIZES = [2, 3, 7, 17]  # the last one: some ranks have nothing to update
SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-2, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1,
}  # fmt: skip


def on_ranks(size: int, work: Callable[[Share], Any]) -> list[Any]:
    """What `work` returns on each rank. A gather that not all ranks join fails the test."""
    flats: list[Tensor] = [torch.empty(0)] * size
    meet = threading.Barrier(size)

    def rank(index: int) -> Any:
        def gather(flat: Tensor) -> None:
            flats[index] = flat.view(size, -1)[index].clone()
            meet.wait(20)
            flat.copy_(torch.cat(flats))
            meet.wait(20)

        return work(Share(index, size, gather))

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(rank, range(size)))


class Adapters:
    """Tensors with all that a method may ask for; they come, go and grow. The same on every rank."""

    def __init__(self, share: Share, **settings: Any):
        self.random = torch.Generator().manual_seed(0)
        self.tokens = nn.Parameter(torch.zeros(2))
        self.kept: Kept | None = None
        self.tensors = {name: self.new(5, 13) for name in "abc"} | {"head": self.new(41)}
        self.masks = {name: torch.ones(5, dtype=torch.bool) for name in "abc"}
        self.optimizer = MaskedAdamW(self.trainables(), share=share, **(SETTINGS | settings))

    def new(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape, generator=self.random))

    def trainables(self) -> list[Trainable]:
        special: dict[str, dict[str, Any]] = {
            "a": {"learning_rate_ratio": 16.0},
            "b": {"decay_ratio": 0.25, "token_counter": (self.tokens, 0)},
            "c": {"token_counter": (self.tokens, 1), "kept": self.kept},
        }
        mine = [
            Trainable(name, tensor, self.masks.get(name), **special.get(name, {}))
            for name, tensor in self.tensors.items()
        ]
        return [*mine, Trainable("tokens", self.tokens, observed=True)]

    def update(self, steps: int, *, masked: bool = True) -> None:
        for _ in range(steps):
            for tensor in self.tensors.values():
                assert tensor.grad is not None
                tensor.grad.copy_(torch.randn(tensor.shape, generator=self.random))
            assert self.tokens.grad is not None
            self.tokens.grad.fill_(1.0)
            if masked:
                self.tokens.grad.copy_(torch.rand(2, generator=self.random) > 0.3)
                for mask in self.masks.values():
                    mask.copy_(torch.rand(len(mask), generator=self.random) > 0.4)
            self.optimizer.clip(1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def restructure(self) -> None:
        """One tensor goes, one comes, one grows and is halved, its moments with it."""
        del self.tensors["a"], self.masks["a"]
        self.tensors["new"], self.tensors["c"] = self.new(3, 50), self.new(8, 13)
        self.masks["c"] = torch.ones(8, dtype=torch.bool)
        self.kept = Kept(torch.arange(5), 0.5, added=3)
        self.optimizer.rebind_parameters(self.trainables())

    def state(self) -> dict[str, Tensor]:
        """Copies of everything: values, moments and counts, and sums over rows."""
        moments = self.optimizer.state_dict()
        return {
            **{f"{n}/value": t.detach().clone() for n, t in self.tensors.items()},
            **{f"{n}/{k}": t.clone() for n, state in moments.items() for k, t in state.items()},
            "sums": self.optimizer.row_sums(self.optimizer.values.abs()),
        }


def life(share: Share, **settings: Any) -> list[dict[str, Tensor]]:
    """Everything that an optimizer goes through, and its state on the way."""
    adapters, states = Adapters(share, **settings), []
    adapters.update(3, masked=False)
    states.append(adapters.state())
    adapters.update(3)
    states.append(adapters.state())
    adapters.restructure()
    states.append(adapters.state())
    adapters.update(4)
    states.append(adapters.state())
    return states


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name].view(torch.int32), tensor.view(torch.int32)), name


@pytest.mark.parametrize("no_bias_correction", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_every_rank_ends_up_as_one_alone(size, no_bias_correction):
    expected = life(Share(), no_bias_correction=no_bias_correction)
    before, after = expected[1], expected[2]
    assert before["b/exp_avg"].abs().sum() > 0  # moments were there to carry over
    assert torch.equal(after["c/exp_avg"][:5], before["c/exp_avg"] / 0.5)
    assert torch.equal(after["c/exp_avg_sq"][:5], before["c/exp_avg_sq"] / 0.25)
    assert torch.equal(after["c/step"], torch.cat([before["c/step"], torch.zeros(3)]))
    for states in on_ranks(size, lambda share: life(share, no_bias_correction=no_bias_correction)):
        for found, wanted in zip(states, expected, strict=True):
            assert_same(found, wanted)


@pytest.mark.parametrize("size", SIZES)
def test_split_it_is_torch_adamw(size):
    shapes = [(4, 10), (4,), (3, 7), (5, 1)]
    random = torch.Generator().manual_seed(1)
    start = [torch.randn(shape, generator=random) for shape in shapes]
    gradients = [[torch.randn(s, generator=random) for s in shapes] for _ in range(12)]
    theirs = [nn.Parameter(tensor.clone()) for tensor in start]
    reference = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1)
    for of_step in gradients:
        for tensor, gradient in zip(theirs, of_step, strict=True):
            tensor.grad = gradient.clone()
        reference.step()

    def train(share: Share) -> list[nn.Parameter]:
        ours = [nn.Parameter(tensor.clone()) for tensor in start]
        named = [Trainable(str(i), tensor) for i, tensor in enumerate(ours)]
        optimizer = MaskedAdamW(named, share=share, **SETTINGS)
        for of_step in gradients:
            for tensor, gradient in zip(ours, of_step, strict=True):
                tensor.grad.copy_(gradient)
            optimizer.step()
        return ours

    for ours in on_ranks(size, train):
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.allclose(mine, other, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_a_rank_holds_its_part_of_the_moments(size):
    def held(share: Share) -> tuple[int, int, int]:
        optimizer = Adapters(share).optimizer
        moments = optimizer.exp_avg, optimizer.exp_avg_sq
        for moment in moments:  # the memory behind it, too
            assert moment.untyped_storage().nbytes() == moment.nbytes
        return len(moments[0]), len(moments[1]), len(optimizer.values)

    parts = on_ranks(size, held)
    whole = parts[0][2]
    assert whole == len(Adapters(Share()).optimizer.values)
    assert sum(first for first, _, _ in parts) == sum(second for _, second, _ in parts) == whole
    assert max(first for first, _, _ in parts) <= whole / size + 16


@pytest.mark.parametrize(("source", "target"), [(1, 3), (3, 1), (3, 2), (2, 7)])
def test_a_state_goes_on_under_any_split(source, target):
    def whole(share: Share) -> tuple[dict, dict]:
        adapters = Adapters(share)
        adapters.update(4)
        moments = adapters.optimizer.state_dict()
        return adapters.state(), {
            n: {k: t.clone() for k, t in s.items()} for n, s in moments.items()
        }

    def resumed(share: Share) -> dict[str, Tensor]:
        adapters = Adapters(share)
        adapters.update(4)  # to have the generator where it was
        for name, tensor in adapters.tensors.items():
            tensor.data.copy_(values[f"{name}/value"])
        adapters.optimizer.exp_avg.fill_(torch.nan)
        adapters.optimizer.load_state_dict(moments)
        adapters.update(3)
        return adapters.state()

    values, moments = on_ranks(source, whole)[0]
    alone = Adapters(Share())
    alone.update(7)
    for state in on_ranks(target, resumed):
        assert_same(state, alone.state())


def test_before_the_first_step_no_rank_waits_for_another():
    """A checkpoint is put back by each rank on its own: one that fails keeps none waiting."""

    def missing(flat: Tensor) -> None:
        raise AssertionError("waits for the other ranks")

    adapters = Adapters(Share(1, 3, missing))
    state = adapters.optimizer.state_dict()
    assert {part: tuple(t.shape) for part, t in state["a"].items()} == {
        "exp_avg": (5, 13), "exp_avg_sq": (5, 13), "step": (5,),
    }  # fmt: skip
    assert not any(tensor.any() for parts in state.values() for tensor in parts.values())
    adapters.restructure()
    adapters.optimizer.load_state_dict(adapters.optimizer.state_dict())
