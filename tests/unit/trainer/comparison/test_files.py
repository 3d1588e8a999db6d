"""The files in benchmarks/ are comparisons whose every arm is a configuration."""

import pytest

from tests.helpers import ROOT
from trainer.comparison.jobs import Job, Jobs
from trainer.comparison.plan import read_comparison

FILES = [file for file in sorted((ROOT / "benchmarks").glob("*.yaml")) if file.stem != "smollm2"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_arm_is_a_configuration(file, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    comparison = read_comparison(file)
    jobs = Jobs(comparison, tmp_path)
    configs = [jobs.config(Job(arm, 1e-3, 3, True)) for arm in comparison.methods]
    assert all(c.run.seed == 3 and c.data.eval == "left_out" for c in configs)
    assert len({jobs.digest(Job(arm, 1e-3, 3, True)) for arm in comparison.methods}) == len(configs)
