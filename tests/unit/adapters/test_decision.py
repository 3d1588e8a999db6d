"""Decisions: what tells two of them apart, the record of them, and records of former runs."""

import json
import subprocess
import sys

import pytest

from adapters.decision import Decision
from adapters.methods.registry import METHODS
from tests.unit.adapters.methods.harness import Bench
from trainer.decisions.log import record
from trainer.decisions.replay import Replay, former_digest
from trainer.errors import UserError

WHOLE = Decision(
    ranks={"a": 2, "b": 0}, locations={"a": "minor", "b": "primary"}, survivors=["a"],
    scores={"omega": {"a": 1.25, "b": 0.0}, "budget": 3.5}, extra={"kept": {"a": [0, 3]}, "final": True},
)  # fmt: skip


def test_plain_data_and_back():
    again = json.loads(json.dumps(WHOLE.to_plain()))
    assert Decision.from_plain(again) == WHOLE
    assert Decision.from_plain(Decision().to_plain()) == Decision()
    assert Decision.from_plain({"step": 3, "method": "x", "digest": "y", **again}) == WHOLE


@pytest.mark.parametrize(
    "other",
    [
        {"ranks": {"a": 2, "b": 1}}, {"ranks": {"a": 2}}, {"locations": {"a": "minor", "b": "minor"}},
        {"survivors": []}, {"survivors": None}, {"scores": {"omega": {"a": 1.25, "b": 0.1}, "budget": 3.5}},
        {"scores": {"omega": {"a": 1.25}, "budget": 3.5}}, {"scores": {"budget": 3.5}},
        {"extra": {"kept": {"a": [0, 2]}, "final": True}}, {"extra": {"kept": {"a": [0, 3]}, "final": False}},
        {"extra": {"kept": {"a": [0, 3]}, "final": True, "mine": 1}}, {"extra": {}},
    ],
    ids=str,
)  # fmt: skip
def test_whatever_was_decided_otherwise_shows_in_the_digest(other):
    fields = {f: getattr(WHOLE, f) for f in ("ranks", "locations", "survivors", "scores", "extra")}
    assert Decision(**{**fields, **other}).digest() != WHOLE.digest()
    assert Decision(**fields).digest() == WHOLE.digest()


def test_digits_of_scores_do_not_show_in_the_digest():
    scores = {"omega": {"a": 1.2500001, "b": 0.0}, "budget": 3.4999999}
    other = Decision(WHOLE.ranks, WHOLE.locations, WHOLE.survivors, scores, WHOLE.extra)
    assert other != WHOLE and other.digest() == WHOLE.digest()


@pytest.mark.parametrize("field", ["scores", "extra"])
@pytest.mark.parametrize("key", ["step", "digest", "ranks", "scores", "summary"])
def test_a_key_of_the_record_is_refused(field, key):
    with pytest.raises(ValueError, match=f"{key!r}; accepted: keys that are not in use"):
        Decision(**{field: {key: 1.0}})


@pytest.mark.parametrize(
    "line", [{"scores": "x"}, {"scores": ["x"]}, {"scores": ["x"], "x": "high"}, {"scores": ["x"], "x": {"a": None}}],
)  # fmt: skip
def test_scores_are_numbers(line):
    with pytest.raises(ValueError, match="accepted"):
        Decision.from_plain(line)


FORMER = {
    "lelora": {"rank": 2, "ranks": [0, 2], "policy": {"mode": "uniform"}},
    "lalora": {},
    "adalora": {"rank": 4, "tinit": 0, "tfinal": 1, "delta_t": 1},
    "weightlora_plus": {"rank": 4, "warmup_steps": 2, "keep": 2},
}


@pytest.mark.parametrize("kind", list(FORMER))
def test_records_of_former_runs_are_replayed(kind, tmp_path):
    """Their lines have neither a list of scores nor a summary, and another digest."""
    bench = Bench(kind, FORMER[kind], steps=4)
    bench.run(4)
    lines = []
    for step, decision in enumerate(bench.decisions):
        if decision is not None:
            line = record(step, bench.method, decision)
            del line["scores"], line["summary"]
            lines.append({**line, "digest": former_digest(line)})
    file = tmp_path / "allocation.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    fresh = Bench(kind, FORMER[kind], begin=False, steps=4)
    replay = Replay(file, fresh.method, 0, 4)
    assert [replay.decide(line["step"]) for line in lines] == [d for d in bench.decisions if d]

    name = next(iter(lines[-1]["ranks"]))
    lines[-1]["ranks"] = {**lines[-1]["ranks"], name: lines[-1]["ranks"][name] + 1}
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match="damaged, its digest differs"):
        Replay(file, fresh.method, 0, 4)


def test_options_of_methods_and_records_need_no_torch():
    code = (
        "import sys; from adapters.methods.registry import METHODS, OPTIONS; import trainer.report.watch;"
        "import trainer.report.allocation_history; print([OPTIONS[name].__name__ for name in METHODS],"
        "[m for m in ('torch', 'scipy', 'bitsandbytes', 'matplotlib') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = [METHODS[name].Options.__name__ for name in METHODS]
    assert out.stdout.strip() == f"{names} []"
