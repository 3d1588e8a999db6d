"""LeLoRA's allocation, fixed after a number of draws; what is removed then, and what stays."""

import numpy as np
import pytest
import torch

from adapters.methods.lelora.reinforce import Reinforce
from tests.helpers import quick_config
from tests.unit.adapters.methods.harness import Bench, array, bits, check_resume
from tests.unit.adapters.methods.lelora.banks import SHAPES
from trainer.distributed.world import World
from trainer.errors import RunFailed
from trainer.run.run import run


def bench_of(coordinates="delta", draws=3, begin=True, **policy):
    options = {
        "ranks": [0, 2, 4], "coordinates": coordinates,
        "policy": {"freeze_after": draws, **policy},
    }  # fmt: skip
    return Bench("lelora", options, shapes=SHAPES, begin=begin, learning_rate=5e-3)


def rows_of(bench):
    """Bits of A, B and their moments and counts, by unit and role."""
    moments = bench.optimizer.state_dict()
    return {
        (name, role): [bits(t) for t in (getattr(a, role), *moments[f"{name}.{role}"].values())]
        for name, a in bench.adapters.items()
        for role in ("A", "B")
    }


@pytest.mark.parametrize("every", [1, 2])
def test_idle_components_of_delta_are_removed(every):
    bench = bench_of(every=every, budget=1.5)
    bench.run(3 * every)
    before = rows_of(bench)
    squares = {
        name: (array(a.g) * np.linalg.norm(array(a.A), axis=1) * np.linalg.norm(array(a.B), axis=1))
        ** 2
        for name, a in bench.adapters.items()
    }
    decision = bench.decide()
    locations = ["primary", "medium", "minor"]
    kept, lost = 0, 0.0
    for unit in bench.units:
        r, s = decision.ranks[unit.name], decision.locations[unit.name]
        start = 4 * locations.index(s) + (4 - r if s == "minor" else 0)
        rows = slice(start, start + r)
        lost += squares[unit.name].sum() - squares[unit.name][rows].sum()
        if r == 0:
            assert unit.name not in bench.adapters
            assert bench.adapted_layers[unit.name].adapter is None
            continue
        kept += r * (unit.in_features + unit.out_features)
        for role in ("A", "B"):
            now = rows_of(bench)[unit.name, role]
            for old, new in zip(before[unit.name, role], now, strict=True):
                assert torch.equal(old[rows], new)
    sizes = sum(unit.in_features + unit.out_features for unit in bench.units)
    assert 0 < kept <= 1.5 * sizes
    assert kept == bench.optimizer.numel == bench.method.adapters.active_parameters()
    share = np.sqrt(lost / sum(part.sum() for part in squares.values()))
    assert bench.method.scalars()["removed_change"] == pytest.approx(share, rel=1e-4)
    bench.backward()
    bench.update()
    bench.run(3)
    assert bench.decisions[-3:] == [None] * 3
    assert bench.method.scalars()["touched_parameters"] == kept
    assert bench.method.decider_state() == {} and "before" not in bench.method.state_dict()


@pytest.mark.parametrize("coordinates", ["singular", "balanced"])
def test_a_part_of_w_stays(coordinates):
    bench = bench_of(coordinates)
    bench.run(6)
    masks = {name: adapter.mask.clone() for name, adapter in bench.adapters.items()}
    values = {name: bits(adapter.B) for name, adapter in bench.adapters.items()}
    bench.run(3)
    assert [decision is None for decision in bench.decisions] == [False] * 4 + [True] * 5
    for name, adapter in bench.adapters.items():
        assert adapter.rank == 12 and torch.equal(adapter.mask, masks[name])
        assert torch.equal(bits(adapter.B)[~adapter.mask], values[name][~adapter.mask])
        assert not adapter.mask.any() or not torch.equal(bits(adapter.B), values[name])


def test_the_last_decision_is_the_most_probable_one(monkeypatch):
    shown = []
    probabilities = Reinforce.probabilities
    monkeypatch.setattr(
        Reinforce, "probabilities",
        lambda self, features: shown.append(probabilities(self, features)) or shown[-1],
    )  # fmt: skip
    free, bound = bench_of(), bench_of(budget=2.0)
    for bench in (free, bound):
        shown.clear()
        bench.run(4)
        p_r, p_s, logs = (p.double().numpy() for p in shown[-1])
        assert len(shown) == 4
        ranks = np.array(list(bench.decisions[3].ranks.values()))
        places = [["primary", "medium", "minor"][i] for i in p_s.argmax(1)]
        assert list(bench.decisions[3].locations.values()) == places
        if bench is free:
            assert ranks.tolist() == (2 * p_r.argmax(1)).tolist()
            continue
        sizes = np.array([u.in_features + u.out_features for u in bench.units])
        every = np.stack(np.meshgrid(*[range(3)] * 4, indexing="ij"), -1).reshape(-1, 4)
        spent = (2 * every * sizes).sum(1)
        own = (spent[(2 * every == ranks).all(1)])[0]
        assert own <= 2 * sizes.sum()
        likely = logs[np.arange(4), every].sum(1)
        found = likely[(2 * every == ranks).all(1)][0]
        # the likeliest of those that spend as much
        assert found >= likely[spent == own].max() - 1e-4


@pytest.mark.parametrize("mode", ["uniform", "frozen"])
def test_random_ranks_may_be_fixed_from_the_beginning(mode):
    first, second = (bench_of(draws=0, mode=mode, budget=2.0) for _ in range(2))
    for bench in (first, second):
        bench.run(3)
        assert [decision is None for decision in bench.decisions] == [False, True, True]
    assert first.decisions == second.decisions
    with pytest.raises(ValueError, match=r"freeze_after: 0 given .*accepted: 1 or more"):
        bench_of(draws=0)


@pytest.mark.parametrize("coordinates", ["delta", "singular"])
@pytest.mark.parametrize("before", [2, 3, 5])
def test_resume(coordinates, before):
    check_resume(lambda begin: bench_of(coordinates, budget=1.5, begin=begin), before, 4)


def test_an_allocation_of_no_components_is_refused_by_its_key(tmp_path):
    config = quick_config(
        tmp_path, "run.steps=3", "data.eval=null", "method.kind=lelora", "method.ranks=[0, 2]",
        "method.rank=2", "method.coordinates=delta", "method.policy.mode=uniform",
        "method.policy.rank_weights=[1, 0]", "method.policy.freeze_after=1",
    )  # fmt: skip
    with pytest.raises(
        RunFailed, match=r"step 1: .*freeze_after .*; accepted: method\.ranks without"
    ):
        run(config, World())
