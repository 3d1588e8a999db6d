"""What is run next, from made-up results: rates until the best is interior, then seeds, then LoRA of
as many parameters; and the table of it."""

import math

import pytest

from tests.helpers import QUICKSTART
from trainer.comparison.figure import draw
from trainer.comparison.jobs import Jobs, code_version
from trainer.comparison.plan import Comparison
from trainer.comparison.schedule import Schedule
from trainer.comparison.table import markdown, rows

BEST = {"lora": 4e-3, "half": 1e-3, "twin": 4e-3, "lora r=1": 8e-3, "lora r=5": 8e-3}
TRAINED = {"lora": 800, "lora r=1": 100, "half": 450, "twin": 808, "lora r=5": 500}
LOSS = {"lora": 1.0, "lora r=1": 1.4, "half": 0.9, "twin": 1.0, "lora r=5": 1.1, "same": 1.3}


def comparison(**changes):
    keys = {
        "base": str(QUICKSTART), "overrides": ["method.rank=8", "method.alpha=16"],
        "learning_rates": [2e-3, 4e-3], "selection": ["data.leave_out=8", "data.eval=left_out"],
        "seeds": [0, 1, 2], "lora_ranks": [1, 8],
        "methods": {
            "lora": [], "half": ["method.kind=weightlora"], "twin": ["method.dropout=0.1"],
            "same": {"like": "half", "overrides": ["method.keep=2"], "rate_of": "half",
                     "against": "half"},
        },
    }  # fmt: skip
    return Comparison.model_validate(keys | changes)


def outcome(job, schedule, loss=None):
    """A result such that BEST is the best rate, and the scores are LOSS."""
    identity = job.result(schedule.jobs.digest(job), "c0de") | {"run": "r"}
    if job.learning_rate > 1.5e-2:
        return identity | {"error": "Diverged: x", "diverged": True}
    if job.selects:
        off = abs(math.log2(job.learning_rate / BEST[job.method]))
        return identity | {"eval_loss": 2 + off + (job.seed == 100)}
    trained, loss = TRAINED.get(job.method, 400), loss or LOSS[job.method]
    losses = [loss + 0.1 * math.sin(n) + 0.001 * job.seed * math.sin(n + loss) for n in range(40)]
    return identity | {
        "eval_loss": sum(losses) / 40, "mean_active_parameters": trained - 1,
        "active_parameters": trained, "touched_parameters": trained, "exported_parameters": trained,
        "other_parameters": 0, "step_seconds": 0.01, "peak_memory_gib": 0.5, "device": "CPU",
        "records": {"id": list(range(40)), "loss": losses, "weight": [1] * 40},
    }  # fmt: skip


def run_all(schedule, made=outcome):
    """Jobs in their order."""
    done = []
    while job := next(schedule.wanted(), None):
        schedule.add(made(job, schedule))
        done.append(job)
        assert len(done) < 200
    return done


@pytest.fixture
def schedule(tmp_path):
    return Schedule(Jobs(comparison(), tmp_path), "c0de")


def test_each_arm_is_searched_and_run_once(schedule):
    done = run_all(schedule)
    assert len(set(done)) == len(done)
    for arm, best in BEST.items():
        found = schedule.rates(arm)
        assert found.best == best and not found.is_edge
        tried = {j.learning_rate for j in done if j.method == arm and j.selects}
        assert tried == {2e-3, 4e-3, best / 2, best, best * 2}
        assert {j.seed for j in done if j.method == arm and j.selects} == {100, 101}
        finals = [j for j in done if j.method == arm and not j.selects]
        assert [(j.seed, j.learning_rate) for j in finals] == [(s, best) for s in (0, 1, 2)]
    order = list(dict.fromkeys(job.method for job in done))
    assert order == ["lora", "half", "lora r=5", "twin", "same", "lora r=1"]
    ablation = [j for j in done if j.method == "same"]
    assert {j.learning_rate for j in ablation} == {1e-3} and not any(j.selects for j in ablation)


def test_each_method_is_compared_with_lora_of_as_many_parameters(schedule):
    run_all(schedule)
    assert schedule.arms() == ["lora", "half", "twin", "same", "lora r=1", "lora r=5"]
    assert schedule.reference("half") == "lora r=5"  # 450, of 100 a rank
    assert schedule.reference("twin") == "lora"  # 808 are, but for 1 %, 800
    assert schedule.reference("same") == "half" and schedule.reference("lora r=1") is None
    config = schedule.jobs.config(schedule.final_jobs("lora r=5")[0])
    assert (config.method.rank, config.method.alpha) == (5, 10)


def test_the_table_says_who_wins(schedule, tmp_path):
    run_all(schedule)
    found = {row.arm: row for row in rows(schedule)}
    assert rows(schedule)[0].arm == "half"
    verdicts = {arm: row.verdict(True) for arm, row in found.items()}
    assert verdicts == {
        "half": "wins", "twin": "ties", "same": "loses", "lora": "", "lora r=1": "", "lora r=5": ""
    }  # fmt: skip
    assert found["half"].difference.estimate == pytest.approx(-0.2, abs=0.01)
    assert found["half"].verdict(False) == "loses"
    text = markdown(schedule, rows(schedule))
    line = next(line for line in text.splitlines() if line.startswith("| half |"))
    assert "| lora r=5 | wins |" in line and "| 0.001 |" in line and "3 of 3" in line
    assert "code c0de" in text
    draw(schedule, rows(schedule), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_runs_that_fail_are_no_minimum_and_win_nothing(schedule):
    def made(job, schedule):
        result = outcome(job, schedule)
        if job.method == "half" and (job.seed == 2 or (job.selects and job.learning_rate == 1e-3)):
            kept = {k: result[k] for k in ("method", "learning_rate", "seed", "config", "code")}
            return kept | {"error": "Diverged: NaN", "diverged": True}
        return result

    run_all(schedule, made)
    assert schedule.rates("half").best == 2e-3  # 1e-3 would be best, and diverges
    row = next(row for row in rows(schedule) if row.arm == "half")
    assert row.failed == 1 and row.verdict(True) == "1 of 3 failed"


def test_an_unfinished_comparison_has_a_table(schedule):
    assert "none" in markdown(schedule, rows(schedule))
    for _ in range(20):
        schedule.add(outcome(next(schedule.wanted()), schedule))
    assert "| lora |" in markdown(schedule, rows(schedule))


def test_one_seed_has_no_spread_and_no_interval_and_comes_last(schedule, tmp_path):
    partial = Schedule(schedule.jobs, "c0de")
    for job in run_all(schedule):
        if job.method != "same" or job.seed == 0:
            partial.add(schedule.result(job))
    last = rows(partial)[-1]  # though LoRA of r = 1 is worse
    assert last.arm == "same" and last.spread is None and last.difference is None
    assert last.verdict(True) == "incomplete"
    line = next(s for s in markdown(partial, rows(partial)).splitlines() if s.startswith("| same"))
    assert "±" not in line and "[" not in line and "1 of 3" in line
    draw(partial, rows(partial), tmp_path / "figure.png")


def test_results_of_other_code_count_only_where_asked(tmp_path):
    for code, count in (("other", 0), ("c0de", 1), (None, 1)):
        schedule = Schedule(Jobs(comparison(), tmp_path), code)
        schedule.add(outcome(next(schedule.wanted()), schedule))
        assert len(schedule.results) == count


def test_results_are_found_wherever_files_lie(tmp_path):
    def digest(*overrides):
        given = comparison(overrides=["method.rank=8", *overrides])
        jobs = Jobs(given, tmp_path)
        return jobs.digest(next(Schedule(jobs, None).wanted()))

    here = digest("data.train=/here/set/train.jsonl", "log.every=3")
    assert here == digest("data.train=/there/set/train.jsonl", "data.cache=/tmp/c")
    assert here != digest("data.train=/here/other/train.jsonl")
    assert here != digest("data.train=/here/set/train.jsonl", "run.steps=7")


def test_the_code_has_a_version():
    assert len(code_version()) == 12 and code_version() == code_version()


def test_an_arm_that_reads_anothers_runs_waits_for_them(tmp_path):
    arms = {
        "first": ["method.kind=weightlora"],
        "reader": {
            "overrides": ["method.kind=rlora", "method.match={runs}/first-*-seed{seed}-*"],
            "rate_of": "first", "after": "first",
        },
    }  # fmt: skip
    schedule = Schedule(Jobs(comparison(methods=arms, learning_rates=[1e-3]), tmp_path), None)
    job = schedule.final_jobs("reader")[0]
    assert schedule.jobs.config(job).method.match == f"{tmp_path}/first-*-seed{{seed}}-*"
    elsewhere = Jobs(schedule.jobs.comparison, tmp_path / "other")
    assert elsewhere.digest(job) == schedule.jobs.digest(job)
    for seed in range(3):
        assert {one.method for one in schedule.wanted()} == {"first"}
        one = next(schedule.wanted())
        assert one.seed == seed
        schedule.add(outcome(one, schedule, loss=1.0))
    assert {one.method for one in schedule.wanted()} == {"reader"}


def test_a_rate_of_which_one_run_diverged_and_another_failed_diverges(schedule):
    def made(job, schedule):
        result = outcome(job, schedule)
        if job.method != "half" or job.learning_rate != 1e-3:
            return result
        kept = {k: result[k] for k in ("method", "learning_rate", "seed", "config", "code")}
        error = kept | {"error": "OSError: no space left"}
        return error if job.seed == 101 else error | {"diverged": True}

    run_all(schedule, made)
    assert not schedule.rates("half").is_edge
