"""DyLoRA: gates and masks of every b, its draws, and what is left at inference."""

import numpy as np
import pytest
import torch

from adapters.decision import Decision
from tests.unit.adapters.methods.harness import (
    AdamW,
    Bench,
    array,
    assert_near,
    bits,
    check_resume,
    twins,
)

RANK, ALPHA = 6, 9.0


def bench_of(seed=0, begin=True, **options):
    return Bench(
        "dylora", {"rank": RANK, "alpha": ALPHA, **options}, seed=seed, weight_decay=0.1,
        learning_rate=3e-3, begin=begin,
    )  # fmt: skip


@pytest.mark.parametrize("only_bth", [False, True])
@pytest.mark.parametrize("b", range(1, RANK + 1))
def test_gates_masks_and_forward(b, only_bth):
    bench = bench_of(only_bth=only_bth)
    rng = np.random.default_rng(b)
    for adapter in bench.adapters.values():
        adapter.B.data.copy_(torch.from_numpy(rng.normal(size=tuple(adapter.B.shape))))
    assert bench.method.apply(Decision(ranks={"all": b})) is False
    for unit in bench.units:
        adapter = bench.adapters[unit.name]
        assert adapter.g.tolist() == pytest.approx([ALPHA / b] * b + [0.0] * (RANK - b))
        trained = [j == b - 1 if only_bth else j < b for j in range(RANK)]
        assert adapter.mask.tolist() == trained
        A, B = array(adapter.A)[:b], array(adapter.B)[:b]
        W = array(bench.adapted_layers[unit.name].weight) + ALPHA / b * B.T @ A
        expected = bench.x[unit.name] @ W.T
        np.testing.assert_allclose(array(bench.output(unit.name)), expected, rtol=1e-4, atol=1e-4)


def test_b_is_uniform_and_depends_on_seed_and_step_only():
    method = bench_of().method
    drawn = [method.decide(step).ranks for step in range(6000)]
    assert all(set(ranks) == {"all"} for ranks in drawn)
    values = np.array([ranks["all"] for ranks in drawn])
    counts = np.bincount(values, minlength=RANK + 1)
    assert counts[0] == 0 and len(counts) == RANK + 1
    assert ((counts[1:] - 1000) ** 2 / 1000).sum() < 20.5  # 5 degrees of freedom, 99.9 %
    pairs = np.bincount((values[1:] - 1) * RANK + values[:-1] - 1, minlength=RANK**2)
    expected = 5999 / RANK**2
    assert ((pairs - expected) ** 2 / expected).sum() < 66.6  # 35 degrees of freedom, 99.9 %
    again = bench_of().method
    backwards = [again.decide(step).ranks["all"] for step in reversed(range(200))][::-1]
    assert backwards == values[:200].tolist()
    assert all(method.due(step) for step in range(20))


def test_another_seed_draws_another_b():
    first, other = (bench_of(seed=seed).method for seed in (0, 1))
    same = sum(first.decide(step) == other.decide(step) for step in range(600))
    assert same < 160  # 100 expected


@pytest.mark.parametrize("only_bth", [False, True])
def test_training_is_numpy_s(only_bth):
    bench = bench_of(only_bth=only_bth)
    references, optimizer = twins(bench), AdamW(3e-3, weight_decay=0.1)
    for _ in range(15):
        before = {
            (n, role): (bits(getattr(a, role)), bits(moments(bench, n, role)))
            for n, a in bench.adapters.items()
            for role in "AB"
        }
        b = bench.step().ranks["all"]
        index = np.arange(RANK)
        active = index == b - 1 if only_bth else index < b
        for twin in references:
            twin.g = np.where(index < b, ALPHA / b, 0.0)
            gradients = twin.gradients()
            for role in "AB":
                optimizer.update((twin.name, role), getattr(twin, role), gradients[role], active)
        still = torch.from_numpy(~active)
        for (name, role), (values, state) in before.items():
            assert torch.equal(bits(getattr(bench.adapters[name], role))[still], values[still])
            assert torch.equal(bits(moments(bench, name, role))[still], state[still])
    for index, twin in enumerate(references):
        assert_near(bench.adapter(index).A, twin.A)
        assert_near(bench.adapter(index).B, twin.B)


def moments(bench, name, role):
    state = bench.optimizer.state_dict()[f"{name}.{role}"]
    return torch.cat([state["exp_avg"], state["exp_avg_sq"], state["step"][:, None]], dim=1)


@pytest.mark.parametrize("export_rank", [None, 2, RANK])
def test_inference_uses_the_export_rank(export_rank):
    options = {} if export_rank is None else {"export_rank": export_rank}
    bench = bench_of(**options)
    bench.run(5)
    rank = export_rank or RANK
    expected = [ALPHA / rank] * rank + [0.0] * (RANK - rank)
    held = [bits(adapter.g) for adapter in bench.adapters.values()]
    with pytest.raises(KeyError), bench.method.inference():
        for unit in bench.units:
            adapter = bench.adapters[unit.name]
            assert adapter.g.tolist() == pytest.approx(expected)
            A, B = array(adapter.A)[:rank], array(adapter.B)[:rank]
            W = array(bench.adapted_layers[unit.name].weight) + ALPHA / rank * B.T @ A
            y = array(bench.output(unit.name))
            np.testing.assert_allclose(y, bench.x[unit.name] @ W.T, rtol=1e-4, atol=1e-4)
        raise KeyError  # what fails inside leaves the gates as they were, too
    for gates, adapter in zip(held, bench.adapters.values(), strict=True):
        assert torch.equal(bits(adapter.g), gates)
    for adapter in bench.adapters.values():
        exported = type(bench.method).inference_gates(bench.options, adapter.g.detach())
        assert exported.tolist() == pytest.approx(expected)


def test_an_export_rank_above_the_rank_is_refused():
    with pytest.raises(ValueError, match=r"method.export_rank: 7 given; accepted: at most"):
        bench_of(export_rank=7)


@pytest.mark.parametrize("only_bth", [False, True])
def test_resume(only_bth):
    check_resume(lambda begin: bench_of(begin=begin, only_bth=only_bth), 7, 6)
