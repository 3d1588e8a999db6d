"""The control of an allocation: the same one from the first step, and permuted."""

import json
from collections import Counter

import pytest

from adapters.decision import Decision
from trainer.comparison.allocation import Replayed, last_decision, permuted
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


def test_the_last_decision_of_a_run_becomes_a_record_of_one(tmp_path):
    first, last = Decision(ranks={"u0": 1, "u3": 2}), Decision(ranks={"u0": 2, "u3": 5})
    lines = [
        {"step": step, "method": "lelora", "digest": one.digest(), **one.to_plain()}
        for step, one in ((0, first), (4, last))
    ]
    (tmp_path / "allocation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    units = [{"name": n, "out_features": 8, "in_features": 4} for n in ("u0", "u3")]
    (tmp_path / "units.json").write_text(json.dumps(units))
    for seed in (None, 1):
        target = tmp_path / f"{seed}.jsonl"
        Replayed(tmp_path, seed, target).write()
        (line,) = map(json.loads, target.read_text().splitlines())
        written = Decision.from_plain(line)
        assert (line["step"], line["method"], line["digest"]) == (0, "lelora", written.digest())
        assert sorted(written.ranks.values()) == [2, 5]
        assert seed is not None or written.ranks == last.ranks
    with pytest.raises(UserError, match="none: no such folder"):
        last_decision(tmp_path / "none")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="no decision was recorded"):
        last_decision(tmp_path / "none")
