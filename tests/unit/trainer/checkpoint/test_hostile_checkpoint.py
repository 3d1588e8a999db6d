"""Checkpoints that were damaged, or made by someone who means harm and knows the checksums."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from tests.helpers import quick_config
from tests.hostile import VALUES, attempt, damaged, fuzz, hostile_json, json_bytes, retyped
from trainer.checkpoint import store
from trainer.checkpoint.compatibility import changes, check_options
from trainer.checkpoint.state import read_initial_adapters, restore
from trainer.distributed.world import World
from trainer.errors import BadCheckpoint, UserError
from trainer.export.export import saved_adapters, saved_config, saved_heads
from trainer.files import INITIAL
from trainer.loading.initial_adapters import load_initial_adapters
from trainer.records.progress import Progress
from trainer.run.run import run
from trainer.session import open_session
from trainer.training.loop import make_loader

LELORA = ["method.kind=lelora", "method.rank=2", "method.ranks=[0, 2]", "method.policy.validation_samples=4"]  # fmt: skip
METHODS = {
    "lora": ["method.rank=2"],
    "weightlora_plus": [
        "method.kind=weightlora_plus", "method.rank=2", "method.keep=10", "method.warmup_steps=1",
    ],
    "lelora": LELORA,
    "lalora": ["method.kind=lalora", "method.rank=4"],
    "adalora": ["method.kind=adalora", "method.rank=2"],
}  # fmt: skip


class Saved:
    """A run of one method: its checkpoint, and a session into which it can be loaded."""

    def __init__(self, folder: Path, kind: str):
        self.folder = folder
        self.config = quick_config(folder, "run.steps=2", "run.name=good", *METHODS[kind])
        run(self.config, World())
        self.good = self.config.run_folder / "checkpoints/step-00000002"
        self.state = json.loads((self.good / "state.json").read_text())
        self.tensors = store.read_tensors(self.good)
        self.initial = None
        if self.state["initial"]:
            self.initial = (self.config.run_folder / INITIAL).read_bytes()
        initial_adapters = read_initial_adapters(self.good, self.state)
        self.session = open_session(self.config, World(), initial_adapters)
        self.loader = make_loader(self.session, World())

    def write(self, state: Any, tensors: bytes) -> Path:
        """A checkpoint whose manifest agrees with its files."""
        bad = self.config.run_folder / "bad/step-00000002"
        shutil.rmtree(bad, ignore_errors=True)
        bad.mkdir(parents=True)
        (bad / "state.json").write_bytes(state if isinstance(state, bytes) else json_bytes(state))
        (bad / "shard-0.safetensors").write_bytes(tensors)
        store.write_manifest(bad)
        return bad

    def resume(self, bad: Path) -> Progress:
        """As a run does it, and an export."""
        found, state, _ = store.find(str(bad), self.folder, store.verify)
        assert found is not None and state is not None
        check_options(self.config, found, state)
        read_initial_adapters(found, state)
        changes(state, self.config)
        progress = restore(self.session, self.loader, found, state)
        next(iter(self.loader))
        stored = store.read_tensors(found)
        with store.refuse_mismatch(found):
            saved_adapters(saved_config(state), stored), saved_heads(stored)
        return progress


@pytest.fixture(scope="module", params=list(METHODS))
def saved(tmp_path_factory, request):
    return Saved(tmp_path_factory.mktemp("saved"), request.param)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return Saved(tmp_path_factory.mktemp("plain"), "lora")


def test_what_is_not_damaged_is_taken(saved):
    bad = saved.write(saved.state, save(saved.tensors))
    assert attempt(saved.folder, lambda: saved.resume(bad)) == Progress(step=2, evaluated=2)


# --- files


@fuzz()
@given(data=st.data())
def test_damaged_files(plain, data):
    """Without the checksums: whatever became of a file is seen before it is read."""
    bad = plain.write(plain.state, save(plain.tensors))
    file = data.draw(st.sampled_from(sorted(bad.iterdir())))
    before = file.read_bytes()
    manifest = file.name == "manifest.json"
    content = data.draw(hostile_json(json.loads(before)) if manifest else damaged(before))
    file.write_bytes(content)
    outcome = attempt(plain.folder, lambda: store.verify(bad))
    if not manifest and content != before:
        assert isinstance(outcome, BadCheckpoint)


@fuzz()
@given(content=hostile_json({"format": 1, "step": 2, "progress": {"step": 2}}))
def test_state_that_is_none(plain, content):
    bad = plain.write(content, save({}))
    assert isinstance(attempt(plain.folder, lambda: store.verify(bad)), BadCheckpoint)


@fuzz()
@given(data=st.data())
def test_state_of_other_values(plain, data):
    bad = plain.write(data.draw(retyped(plain.state)), save(plain.tensors))
    attempt(plain.folder, lambda: plain.resume(bad))


@fuzz()
@given(data=st.data())
def test_damaged_tensors_with_good_checksums(plain, data):
    bad = plain.write(plain.state, data.draw(damaged(save(plain.tensors))))
    attempt(plain.folder, lambda: plain.resume(bad))


DTYPES = [torch.float64, torch.int64, torch.bool, torch.uint8, torch.bfloat16, torch.complex64]


@st.composite
def other_tensors(draw: st.DrawFn, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors gone, renamed, of another shape or dtype, or of other values."""
    tensors = dict(tensors)
    groups = sorted({name.split("/")[0] for name in tensors})
    for _ in range(draw(st.integers(1, 3))):
        group = draw(st.sampled_from(groups))  # the few of a method as often as the many adapters
        names = sorted(name for name in tensors if name.startswith(f"{group}/"))
        if not names:
            continue
        name = draw(st.sampled_from(names))
        tensor = tensors[name]
        match draw(st.integers(0, 7)):
            case 0:
                del tensors[name]
            case 1:
                other = draw(
                    st.sampled_from(
                        [
                            "adapter/A",
                            "adapter/x/A",
                            f"{name}/B",
                            "../../x",
                            "head/x",
                            "",
                            "adapter/a/b/c/A",
                        ]
                    )
                )
                tensors[other] = tensors.pop(name)
            case 2:
                shape = draw(st.sampled_from([(), (0,), (1,), (0, 5), (3, 5), (1, 1, 1)]))
                tensors[name] = torch.zeros(shape, dtype=tensor.dtype)
            case 3:
                tensors[name] = tensor.flatten().clone()
            case 4:
                tensors[name] = torch.stack([tensor, tensor])
            case 5:
                tensors[name] = tensor.to(draw(st.sampled_from(DTYPES)))
            case 6:
                value = draw(st.sampled_from([-1, 0, 127, float("nan"), float("inf")]))
                if tensor.is_floating_point() or abs(value) < 128:
                    tensors[name] = torch.full(tensor.shape, value).to(tensor.dtype)
            case 7:
                tensors[f"{group}/{draw(st.sampled_from(['x', 'y/A', '0/1/2']))}"] = tensor.clone()
    return tensors  # fmt: skip


@fuzz(usual=40, many=1000)
@given(data=st.data())
def test_other_tensors(saved, data):
    bad = saved.write(saved.state, save(data.draw(other_tensors(saved.tensors))))
    attempt(saved.folder, lambda: saved.resume(bad))


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    return Saved(tmp_path_factory.mktemp("split"), "lelora")


@fuzz(usual=40)
@given(data=st.data())
def test_initial_tensors(split, data):
    file = split.folder / INITIAL
    file.write_bytes(split.initial)
    if data.draw(st.booleans()):
        file.write_bytes(data.draw(damaged(split.initial)))
    else:
        held = {f"adapter/{name}": tensor for name, tensor in load_file(file).items()}
        changed = data.draw(other_tensors(held))
        save_file({name.removeprefix("adapter/"): tensor for name, tensor in changed.items()}, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    attempt(split.folder, lambda: load_initial_adapters(file, digest))


# --- names


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "sub/secret", "..", "", "\0"])
def test_files_outside_of_the_checkpoint(plain, name):
    bad = plain.write(plain.state, save(plain.tensors))
    (bad / "sub").mkdir()
    for secret in (bad.parent / "secret", bad / "sub/secret"):
        secret.write_text("secret")
    manifest = json.loads((bad / "manifest.json").read_text())
    manifest[name] = [6, hashlib.sha256(b"secret").hexdigest()]
    (bad / "manifest.json").write_text(json.dumps(manifest))
    outcome = attempt(plain.folder, lambda: store.verify(bad))
    assert isinstance(outcome, BadCheckpoint) and "is missing" in str(outcome)


@pytest.mark.parametrize("name", ["state.json", "shard-0.safetensors"])
def test_links_out_of_the_checkpoint(plain, name):
    bad = plain.write(plain.state, save(plain.tensors))
    (bad / name).rename(plain.folder / name)
    (bad / name).symlink_to(plain.folder / name)
    assert isinstance(attempt(plain.folder, lambda: store.verify(bad)), BadCheckpoint)


def test_files_that_the_manifest_does_not_name(plain):
    bad = plain.write(plain.state, save(plain.tensors))
    (bad / "more.safetensors").write_bytes(save({"adapter/x/A": torch.ones(1)}))
    outcome = attempt(plain.folder, lambda: store.verify(bad))
    assert "more.safetensors is not in its manifest.json" in str(outcome)
    (bad / "manifest.json").write_text("{}")
    outcome = attempt(plain.folder, lambda: store.verify(bad))
    assert "is not in its manifest.json" in str(outcome)


def test_folders_that_only_look_like_checkpoints(plain):
    checkpoints = plain.config.run_folder / "checkpoints"
    for name in ("step-best", "step-00000009-copy"):
        shutil.copytree(plain.good, checkpoints / name, dirs_exist_ok=True)
    assert store.newest(checkpoints) == plain.good
    assert store.clear_the_way(checkpoints, 2, "auto") == []


def test_a_checkpoint_named_from_where_it_lies(split, monkeypatch):
    """Its run's initial tensors are two folders above, wherever the path begins."""
    monkeypatch.chdir(split.good.parent)
    assert read_initial_adapters(Path(split.good.name), split.state)


@pytest.mark.parametrize(
    "value", [v for v in VALUES if v not in (0, 3, False)], ids=lambda v: ascii(v)[:20]
)
def test_position_that_the_data_do_not_have(plain, value):
    """An offset beyond the last sequence would be looked for without end."""
    state = {**plain.state, "loader": {"epoch": 0, "offset": value}}
    bad = plain.write(state, save(plain.tensors))
    assert isinstance(attempt(plain.folder, lambda: plain.resume(bad)), UserError)
