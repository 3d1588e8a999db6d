"""What a resumed run finds otherwise than it left it: places, records, steps, states."""

import json
import shutil
from pathlib import Path

import pytest

from tests.helpers import ROOT, losses, quick_config
from trainer.checkpoint import store
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.export.export import export_run
from trainer.records.jsonl import read_metrics
from trainer.run.run import run


def config(tmp, *more):
    return quick_config(
        tmp, "run.steps=2", "checkpoint.every=1", "method.kind=pissa", "method.rank=2",
        "method.targets=[q_proj]", "data.eval=null", "log.progress=plain", *more,
    )  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def undrawn():
    yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("finished")
    run(config(tmp), World())
    return tmp


@pytest.fixture
def saved(finished, tmp_path):
    """A copy of that run, and its folder."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path, tmp_path / "runs/quickstart"


@pytest.mark.parametrize("stray", [b"\xff\x00{", b"\n\n\n", b'{"step": 3, "lo', b"\0" * 5000])
def test_a_broken_tail_is_dropped_and_said(stray, saved, capsys):
    tmp, folder = saved
    file = folder / "metrics.jsonl"
    before = file.read_bytes()
    file.write_bytes(before + stray)
    assert len(read_metrics(file)) == 2
    run(config(tmp), World())
    assert f"dropped   {file}: {len(stray)} bytes" in capsys.readouterr().out
    assert file.read_bytes() == before


def test_a_broken_tail_of_decisions_is_dropped_and_said(tmp_path, capsys):
    lelora = [
        "method.kind=lelora", "method.ranks=[0, 2]", "method.policy.validation_samples=4",
    ]  # fmt: skip
    run(config(tmp_path, *lelora), World())
    file = tmp_path / "runs/quickstart/allocation.jsonl"
    before = file.read_bytes()
    file.write_bytes(before + b"\xff\xfe\xfd")
    run(config(tmp_path, *lelora), World())
    assert f"dropped   {file}: 3 bytes" in capsys.readouterr().out
    assert [json.loads(line) for line in file.read_bytes().splitlines()] == [
        json.loads(line) for line in before.splitlines()
    ]


@pytest.mark.parametrize("stray", [b"\xff\n", b"[]\n"])
def test_damage_elsewhere_is_refused(stray, saved):
    tmp, folder = saved
    file = folder / "metrics.jsonl"
    first, *rest = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([first, stray, *rest]))
    with pytest.raises(UserError, match=r"metrics\.jsonl line 2: no JSON object"):
        run(config(tmp), World())


def test_fewer_steps_than_were_made_are_refused(saved):
    tmp, folder = saved
    before = {path: path.stat().st_mtime_ns for path in (folder / "adapter").iterdir()}
    with pytest.raises(
        UserError, match=r"run\.steps: 1 steps given, but .*02 has made 2; accepted"
    ):
        run(config(tmp, "run.steps=1"), World())
    with pytest.raises(UserError, match=r"run\.epochs: 1 steps given, but .*02 has made 2"):
        run(config(tmp, "run.steps=null", "run.epochs=0.125"), World())
    assert {path: path.stat().st_mtime_ns for path in (folder / "adapter").iterdir()} == before


def test_checkpoints_on_another_disk(saved):
    """checkpoints/ is a link."""
    tmp, folder = saved
    (folder / "checkpoints").rename(tmp / "large-disk")
    (folder / "checkpoints").symlink_to(tmp / "large-disk")
    run(config(tmp, "run.steps=3"), World())
    assert len(losses(folder)) == 3
    assert store.newest(tmp / "large-disk").name == "step-00000003"
    export_run(folder, tmp / "out", World())
    export_run(folder / "checkpoints/step-00000003", tmp / "again", World())


def test_a_run_folder_under_another_path(saved):
    tmp, _ = saved
    (tmp / "runs").rename(tmp / "moved")
    run(config(tmp, "run.steps=3", f"run.dir={tmp}/moved"), World())
    assert len(losses(tmp / "moved/quickstart")) == 3


def test_the_same_data_under_another_path(saved):
    tmp, folder = saved
    shutil.copy(ROOT / "configs/quickstart/train.jsonl", tmp / "moved.jsonl")
    run(config(tmp, "run.steps=3", f"data.train={tmp}/moved.jsonl"), World())
    assert len(losses(folder)) == 3


def test_the_same_tokens_of_other_records_are_the_same_data(saved):
    """And other tokens of the same number of records are not."""
    tmp, folder = saved
    rows = [json.loads(line) for line in (ROOT / "configs/quickstart/train.jsonl").open()]
    texts = [{"q": f"{row['question']}\n", "a": row["answer"]} for row in rows]
    named = [f"data.train={tmp}/texts.json", "data.prompt=q", "data.completion=a"]
    (tmp / "texts.json").write_text(json.dumps(texts))
    run(config(tmp, "run.steps=3", *named), World())
    assert len(losses(folder)) == 3
    texts[0]["a"] += "."
    (tmp / "texts.json").write_text(json.dumps(texts))
    with pytest.raises(UserError, match=r"data\.train: .*does not hold the records"):
        run(config(tmp, "run.steps=4", *named), World())


def test_a_key_that_came_later_is_taken_at_its_default(saved):
    """In the recorded configuration and in the key of the cache."""
    tmp, folder = saved
    checkpoint = folder / "checkpoints/step-00000002"
    then = json.loads((checkpoint / "state.json").read_text())["config"]
    for section, key in (("data", "on_bad_record"), ("data", "shuffle"), ("method", "alpha")):
        del then[section][key]
    rewritten(checkpoint, config=then)
    run(config(tmp, "run.steps=3"), World())
    assert len(losses(folder)) == 3
    shutil.rmtree(folder / "checkpoints/step-00000003")
    with pytest.raises(UserError, match=r"data\.shuffle: False given, but .* made with True"):
        run(config(tmp, "run.steps=3", "data.shuffle=false"), World())


def rewritten(checkpoint: Path, **changes) -> None:
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps({**state, **changes}))
    (checkpoint / "manifest.json").unlink()
    store.write_manifest(checkpoint)


@pytest.mark.parametrize(
    "changes", [{"progress": {"step": 1}}, {"step": 1}, {"step": 1, "progress": {"step": 1}}]
)
def test_a_state_of_another_step_than_its_folder_is_refused(changes, saved):
    tmp, folder = saved
    rewritten(folder / "checkpoints/step-00000002", **changes)
    with pytest.raises(UserError, match=r"progress\.step: .* in step-00000002"):
        run(config(tmp, "run.steps=3"), World())
    assert len(store.complete(folder / "checkpoints")) == 2


def test_a_password_in_a_url_is_not_echoed():
    text = str(UserError("model.id: https://user:s3cret@host.example/model?x=a@b is nothing"))
    assert "s3cret" not in text and "user" not in text and "host.example/model?x=a@b" in text
