"""The control of an allocation: the same one from the first step, and permuted."""

import json
from collections import Counter

import pytest

from adapters.decision import Decision
from trainer.comparison import allocation
from trainer.comparison.allocation import Replayed, last_decision, permuted, shuffled
from trainer.errors import UserError

SHAPES = {f"u{n}": ((8, 4), (4, 8), (8, 8))[n % 3] for n in range(60)}


def decision():
    banks = ("primary", "medium", "minor")
    return Decision(
        ranks={name: int(name[1:]) % 7 for name in SHAPES},
        locations={name: banks[int(name[1:]) % 5 % 3] for name in SHAPES},
    )


def by_shape(given):
    return Counter((SHAPES[n], given.ranks[n], given.locations[n]) for n in SHAPES)


def test_a_permutation_keeps_the_histogram_of_each_shape():
    given = decision()
    drawn = [permuted(given, SHAPES, seed) for seed in range(3)]
    for one in drawn:
        assert by_shape(one) == by_shape(given) and list(one.ranks) == list(given.ranks)
        assert sum(one.ranks[n] != given.ranks[n] for n in SHAPES) > 30
    assert len({one.digest() for one in drawn}) == 3
    assert permuted(given, SHAPES, 1).digest() == drawn[1].digest()


def test_every_permutation_of_three_is_as_likely():
    names = ["a", "b", "c"]
    given = Decision(ranks=dict(zip(names, (1, 2, 4), strict=True)))
    drawn = Counter(
        tuple(permuted(given, dict.fromkeys(names, (4, 4)), seed).ranks.values())
        for seed in range(1200)
    )
    assert len(drawn) == 6
    # χ² with 5 degrees of freedom: above 20.5 in one of 1000
    assert sum((count - 200) ** 2 / 200 for count in drawn.values()) < 20.5


def parameters(given, shapes):
    return sum(rank * sum(shapes[name]) for name, rank in given.ranks.items())


def pairs(given):
    return Counter((given.ranks[name], given.locations[name]) for name in given.ranks)


def aligned():
    """(shapes, decision) with the largest ranks on the largest matrices: far from random."""
    shapes = {f"u{n}": (8 + n, 4) for n in range(60)}
    ranks = {name: n // 6 for n, name in enumerate(shapes)}
    return shapes, Decision(ranks=ranks, locations={n: f"x{r % 2}" for n, r in ranks.items()})


@pytest.mark.parametrize(
    ("shapes", "given", "tries"), [(SHAPES, decision(), 10_000), (*aligned(), 1_000)]
)
def test_ranks_of_all_units_keep_their_histogram_and_the_parameters(
    monkeypatch, shapes, given, tries
):
    monkeypatch.setattr(allocation, "_TRIES", tries)
    drawn = [shuffled(given, shapes, seed) for seed in range(4)]
    for one in drawn:
        assert pairs(one) == pairs(given) and list(one.ranks) == list(given.ranks)
        assert abs(parameters(one, shapes) / parameters(given, shapes) - 1) <= 0.01
        assert sum(one.ranks[n] != given.ranks[n] for n in shapes) > 20
    assert len({one.digest() for one in drawn}) == 4
    assert shuffled(given, shapes, 1).digest() == drawn[1].digest()
    if shapes is SHAPES:  # not the ranks of each shape, as `permuted`
        assert all(by_shape(one) != by_shape(given) for one in drawn)


def test_every_permutation_that_is_near_enough_is_as_likely():
    """2 + 1 parameters more than 1 % apart, of four units in two shapes: 2! 2! of 4! are left."""
    shapes = {"a": (2, 2), "b": (2, 2), "c": (4, 4), "d": (4, 4)}
    given = Decision(ranks={"a": 1, "b": 2, "c": 4, "d": 8}, locations=dict.fromkeys(shapes, "x"))
    drawn = Counter(tuple(shuffled(given, shapes, s).ranks.values()) for s in range(800))
    assert set(drawn) == {(1, 2, 4, 8), (2, 1, 4, 8), (1, 2, 8, 4), (2, 1, 8, 4)}
    # χ² with 3 degrees of freedom: above 16.3 in one of 1000
    assert sum((count - 200) ** 2 / 200 for count in drawn.values()) < 16.3


def test_where_no_permutation_is_near_enough_it_is_said(monkeypatch):
    monkeypatch.setattr(allocation, "_TRIES", 1)
    shapes = {f"u{n}": (2**n, 2**n) for n in range(12)}
    given = Decision(ranks={f"u{n}": n for n in range(12)}, locations=dict.fromkeys(shapes, "x"))
    with pytest.raises(UserError, match=r"permuted: any given, .* 12 matrices .* accepted: true"):
        shuffled(given, shapes, 0)


def test_the_last_decision_of_a_run_becomes_a_record_of_one(tmp_path):
    first, last = Decision(ranks={"u0": 1, "u3": 2}), Decision(ranks={"u0": 2, "u3": 5})
    lines = [
        {"step": step, "method": "lelora", "digest": one.digest(), **one.to_plain()}
        for step, one in ((0, first), (4, last))
    ]
    (tmp_path / "allocation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    units = [{"name": n, "out_features": 8, "in_features": 4} for n in ("u0", "u3")]
    (tmp_path / "units.json").write_text(json.dumps(units))
    for exchange in (False, True, "any"):
        target = tmp_path / f"{exchange}.jsonl"
        Replayed(tmp_path, exchange, 1, target).write()
        (line,) = map(json.loads, target.read_text().splitlines())
        written = Decision.from_plain(line)
        assert (line["step"], line["method"], line["digest"]) == (0, "lelora", written.digest())
        assert sorted(written.ranks.values()) == [2, 5]
        assert exchange or written.ranks == last.ranks
    with pytest.raises(UserError, match="none: no such folder"):
        last_decision(tmp_path / "none")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="no decision was recorded"):
        last_decision(tmp_path / "none")


@pytest.mark.parametrize("decided", [
    Decision(ranks={"0": 2, "1": 3}),  # La-LoRA: of blocks
    Decision(ranks={"u0": 4}, survivors=["u0"]),
    Decision(ranks={"u0": 1, "u3": 2}, extra={"kept": [0, 3, 5]}),
])  # fmt: skip
@pytest.mark.parametrize("exchange", [True, "any"])
def test_only_ranks_of_matrices_are_permuted(decided, exchange, tmp_path):
    line = {"step": 1, "method": "other", "digest": decided.digest(), **decided.to_plain()}
    (tmp_path / "allocation.jsonl").write_text(json.dumps(line) + "\n")
    units = [{"name": n, "out_features": 8, "in_features": 4} for n in ("u0", "u3")]
    (tmp_path / "units.json").write_text(json.dumps(units))
    target = tmp_path / "written.jsonl"
    given = "true" if exchange is True else "'any'"
    with pytest.raises(
        UserError, match=f"permuted: {given} given of .*=other decides otherwise; acc"
    ):
        Replayed(tmp_path, exchange, 0, target).write()
    Replayed(tmp_path, False, 0, target).write()
    assert json.loads(target.read_text())["digest"] == decided.digest()
