"""Upload an exported folder to a model repository of the hub, after saying what is uploaded."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm
from yaml import YAMLError

from trainer.config.yaml import parse_json
from trainer.errors import UserError, first_line
from trainer.export.card import CARD
from trainer.files import ADAPTER, CONFIG, MODEL

_ADAPTER_CONFIG = "adapter_config.json"
_BASE = "base_model_name_or_path"
_TOLD = (_ADAPTER_CONFIG, CARD, "Modelfile")
"""Files that name the base model."""
_WHOLE = ("*.safetensors", "*.gguf")
"""What marks a folder as one that holds weights."""


def find_folder(source: Path) -> Path:
    """What a run exported at its end, or `source` itself where that is an exported folder. Raises
    UserError."""
    folders = [source / name for name in (ADAPTER, MODEL)] if (source / CONFIG).is_file() else []
    for folder in folders or [source]:
        if (folder / CARD).is_file() and any(next(folder.glob(w), None) for w in _WHOLE):
            return folder
    raise UserError(
        f"{source}: nothing to push in it; accepted: a run that has ended, or a folder that "
        "rankcast export wrote"
    )


def files_of(folder: Path) -> list[Path]:
    """All that is uploaded of a folder, in order."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return [file for file in found if not file.name.startswith(".")]


def local_base(folder: Path) -> tuple[str, str] | None:
    """(path of the base model on this machine, what it is called in its place) for a folder whose
    adapter_config.json has a path: its id on the hub, where the card has it, else its folder's
    name. None where nothing is to be replaced."""
    from huggingface_hub import ModelCard

    try:
        path = parse_json((folder / _ADAPTER_CONFIG).read_text(encoding="utf-8"))[_BASE]
        known = ModelCard.load(folder / CARD, ignore_metadata_errors=True).data.base_model
    except (OSError, ValueError, KeyError, TypeError, YAMLError):
        return None
    name = known if isinstance(known, str) else Path(str(path)).absolute().name
    return None if path in (None, name) else (str(path), name)


def _content(file: Path, base: tuple[str, str] | None) -> Path | bytes:
    """What is uploaded of a file: itself, or its text with the base model's name for its path."""
    if base is None or file.name not in _TOLD:
        return file
    path, name = base
    text = file.read_text(encoding="utf-8")
    if file.name == _ADAPTER_CONFIG:
        return (json.dumps({**parse_json(text), _BASE: name}, indent=2) + "\n").encode()
    return text.replace(path, name).encode() if "/" in path else file


def described(
    folder: Path, files: list[Path], repo: str, *, private: bool,
    base: tuple[str, str] | None = None,
) -> str:  # fmt: skip
    """What an upload will do, a line for each file."""
    sizes = [file.stat().st_size for file in files]
    lines = [
        f"{tqdm.format_sizeof(size, 'B', 1024):>8}  {file.relative_to(folder)}"
        for file, size in zip(files, sizes, strict=True)
    ]
    whole = f"{len(files)} files, {tqdm.format_sizeof(sum(sizes), 'B', 1024)}"
    visible = "private" if private else "public"
    if base is not None:
        lines.append(f"the base model is named {base[1]} there, in place of {base[0]}")
    return "\n".join([f"{folder} -> {repo} ({visible} if it is new): {whole}", *lines])


def push(
    source: Path,
    repo: str,
    *,
    private: bool,
    confirm: Callable[[str], bool],
    token: str | None = None,
    api: Any = None,
) -> str:
    """Upload what `source` exported to `repo` (`owner/name`), if `confirm` agrees to the
    description of it. `token`: of the hub; None: the one that `hf auth login` or HF_TOKEN set.
    `api`: in place of huggingface_hub's HfApi. Returns the address of the commit, "" without one.
    Raises UserError."""
    from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except ValueError as error:
        raise UserError(f"REPO: {repo}: {first_line(error)}; accepted: owner/name") from error
    if "/" not in repo:
        raise UserError(f"REPO: {repo}: no owner; accepted: owner/name")
    folder = find_folder(source)
    files = files_of(folder)
    token = token or get_token()
    if token is None:
        raise UserError(
            "no token of the hub; accepted: one in HF_TOKEN, or from `hf auth login`, with the "
            "right to write"
        )
    if constants.HF_HUB_OFFLINE and api is None:
        raise UserError(
            f"HF_HUB_OFFLINE: {os.environ.get('HF_HUB_OFFLINE')} given; accepted: unset, to upload"
        )
    base = local_base(folder)
    if not confirm(described(folder, files, repo, private=private, base=base)):
        return ""
    operations = [
        CommitOperationAdd(str(file.relative_to(folder)), _content(file, base)) for file in files
    ]
    api = api or HfApi(token=token)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.create_commit(
            repo, operations, commit_message=f"Upload {folder.name} by rankcast"
        )
    except Exception as error:  # the hub client raises many types, also those of its HTTP library
        raise UserError(f"REPO: {repo}: {first_line(error)}") from error
    return str(commit.commit_url)
