"""rankcast push says what it uploads, asks, and uploads that: against a hub that only notes calls."""

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch import push as command
from trainer.errors import UserError
from trainer.export.push import push


class Hub:
    """In place of HfApi."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.error = error

    def create_repo(self, repo: str, **options: Any) -> None:
        self.calls.append((repo, options))
        if self.error is not None:
            raise self.error

    def create_commit(self, repo: str, operations: Any, **options: Any) -> Any:
        self.calls.append((repo, {"operations": operations, **options}))
        return SimpleNamespace(commit_url="https://hub/commit/1")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run that has ended."""
    run = tmp_path / "run"
    (run / "adapter/additional").mkdir(parents=True)
    (run / "checkpoints").mkdir()
    for name, size in (("README.md", 10), ("adapter_model.safetensors", 3000), (".hidden", 1),
                       ("additional/a.jinja", 5)):  # fmt: skip
        (run / "adapter" / name).write_bytes(b"x" * size)
    (run / "config.yaml").touch()
    (run / "checkpoints/model.safetensors").touch()
    return run


def test_what_is_said_is_what_is_uploaded(folder: Path) -> None:
    said: list[str] = []
    hub = Hub()
    address = push(
        folder, "me/mine", private=True, token="t", api=hub,
        confirm=lambda text: bool(said.append(text)) or True,
    )  # fmt: skip
    assert address == "https://hub/commit/1"
    (created, options), (repo, upload) = hub.calls
    assert (created, repo) == ("me/mine", "me/mine")
    assert options == {"private": True, "exist_ok": True}
    files = ["README.md", "adapter_model.safetensors", "additional/a.jinja"]
    assert [one.path_in_repo for one in upload["operations"]] == files
    sent = [one.path_or_fileobj for one in upload["operations"]]
    assert sent == [str(folder / "adapter" / name) for name in files]
    first, *lines = said[0].splitlines()
    assert "me/mine (private if it is new): 3 files, 2.94kB" in first
    assert [line.split()[-1] for line in lines] == files
    assert "2.93kB" in lines[1]


@pytest.mark.parametrize("base, known, expected", [
    ("/home/me/models/base", "", "base"), ("./base", "", "base"),
    ("models/base", "", "base"),  # a relative folder: else the card would have it
    ("/cache/base", "base_model: owner/base\n", "owner/base"),
    ("owner/base", "base_model: owner/base\n", None),
])  # fmt: skip
def test_no_path_of_this_machine_is_uploaded(
    base: str, known: str, expected: str | None, folder: Path
) -> None:
    adapter = folder / "adapter"
    (adapter / "README.md").write_text(f"---\n{known}tags: [lora]\n---\nOf `{base}`.\n")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    said: list[str] = []
    hub = Hub()
    push(
        folder, "a/b", private=True, token="t", api=hub,
        confirm=lambda text: bool(said.append(text)) or True,
    )  # fmt: skip
    sent = {one.path_in_repo: one for one in hub.calls[1][1]["operations"]}
    with sent["adapter_config.json"].as_file() as file:
        assert json.load(file)["base_model_name_or_path"] == (expected or base)
    with sent["README.md"].as_file() as file:
        assert f"Of `{expected or base}`." in file.read().decode()
    line = f"the base model is named {expected} there, in place of {base}"
    assert (line in said[0]) == (expected is not None)


def test_nothing_without_consent(folder: Path) -> None:
    hub = Hub()
    assert push(folder, "a/b", private=False, token="t", api=hub, confirm=lambda _: False) == ""
    assert hub.calls == []


def test_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pushed(
        source: Path = folder, repo: str = "a/b", token: str | None = "t", **more: Any
    ) -> None:
        push(source, repo, private=True, token=token, confirm=lambda _: True, **more)

    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UserError, match="no token of the hub; accepted: one in HF_TOKEN"):
        pushed(token=None, api=Hub())
    for repo in ("alone", "a b/c"):
        with pytest.raises(UserError, match=r"REPO: .*; accepted: owner/name"):
            pushed(repo=repo, api=Hub())
    with pytest.raises(UserError, match="nothing to push in it; accepted: a run that has ended"):
        pushed(source=tmp_path, api=Hub())
    for error in (OSError, RuntimeError):  # a refused connection is no OSError of the HTTP library
        with pytest.raises(UserError, match="REPO: a/b: no network"):
            pushed(api=Hub(error("no network")))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE: .* accepted: unset, to upload"):
        pushed()


@pytest.mark.parametrize(("answer", "uploads"), [("y\n", True), ("\n", False)])
def test_command(
    answer: str, uploads: bool, folder: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda token: hub)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "t")
    monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
    with pytest.raises(UserError, match="--yes: not given, and no terminal to ask on"):
        command.main([str(folder), "a/b"])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert command.main([str(folder), "a/b"]) == 0
    assert bool(hub.calls) == uploads
    last = "https://hub/commit/1" if uploads else "nothing was uploaded"
    assert capsys.readouterr().out.splitlines()[-1].endswith(last)
