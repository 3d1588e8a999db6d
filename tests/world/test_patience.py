"""Ranks that wait for one that tokenises: longer than `engine.timeout`, and not a moment after it
has failed or died."""

import signal
from pathlib import Path

from tests.helpers import QUICKSTART, ROOT, python, thorough
from tests.world.cases import ok, run_cases
from trainer.distributed.failures import FailedElsewhere
from trainer.errors import EXIT_FAILED, UserError

SLOW = ROOT / "tests/world/slow_start.py"


def arguments(tmp: Path, *more: str) -> list[str]:
    return [
        "--config", str(QUICKSTART), "--dry-run", f"run.dir={tmp}/runs", f"data.cache={tmp}/cache",
        "data.train_records=32", "data.eval=null", "run.eval_every=0", "run.eval_at_start=false",
        "data.workers=1", *more,
    ]  # fmt: skip


def test_a_stage_of_all_ranks(tmp_path: Path) -> None:
    """On a group whose collectives end after 5 seconds."""
    cases = {how: ("patience", how) for how in ("fails", "fails in the wait", "long")}
    results = run_cases(tmp_path / "cases", cases)
    assert ok(results["long"]) == [["worked", "waited"]] * 2
    for how in ("fails", "fails in the wait"):
        errors = [result["error"] for result in results[how]]
        failing = 0 if how == "fails" else 1
        assert errors[failing] == UserError.__name__
        assert errors[1 - failing] == FailedElsewhere.__name__


def test_the_user_of_a_chat_may_think(tmp_path: Path) -> None:
    """Longer than collectives may last."""
    results = run_cases(tmp_path / "cases", {"asked": ("asked", 6)})
    assert ok(results["asked"]) == [["Hello", None]] * 2


def test_a_rank_that_dies_ends_the_wait(tmp_path: Path) -> None:
    code, _, err = python(SLOW, "die", *arguments(tmp_path, "engine.timeout=120"), processes=2)
    assert code in (EXIT_FAILED, -signal.SIGKILL)
    assert "error: [rank 1] lost rank 0" in err and "no end" not in err


@thorough
def test_a_start_that_outlasts_the_timeout(tmp_path: Path) -> None:
    code, out, err = python(SLOW, "25", *arguments(tmp_path, "engine.timeout=20"), processes=2)
    assert code == 0, err
    assert "32 of 32 records" in out and out.count("chunk") == 1
