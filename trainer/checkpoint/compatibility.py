"""Whether a checkpoint can resume a configuration: keys that must agree, keys that may change."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.config.config import Config
from trainer.data.cache import former_key
from trainer.errors import BadCheckpoint
from trainer.session import Session

_MUST_AGREE = {
    "model": ("quantization", "adapter", "added_tokens"),
    "task": None,
    "method": None,
    "data": (
        "format",
        "message_fields",
        "roles",
        "as_chat",
        "system",
        "chat_template",
        "template_arguments",
        "max_length",
        "packing",
        "shuffle",
        "batch_size",
        "micro_batch_size",
        "micro_batch_tokens",
        "micro_batches_multiple_of",
        "leave_out",
    ),
    "run": ("seed",),
}
"""Keys that must be equal for a resumed run to be the same run (None: the entire section)."""

_MAY_CHANGE = {
    "model": ("dtype", "attention"),
    "data": ("padding_free", "row_lengths"),
    "optim": None,
    "run": ("steps", "epochs"),
}
"""Keys that a user may change on purpose; a change is logged."""

_EVALUATION = {
    "data": ("eval", "eval_split", "eval_records"),
    "run": ("eval_every", "eval_at_start"),
}
"""Keys that change what a run reports."""


def check_options(config: Config, checkpoint: Path, state: dict[str, Any]) -> None:
    """Raises BadCheckpoint, naming the key, where `config` differs in a key that must agree."""
    now = config.model_dump(mode="json")
    for key, old, new in _differences(state["config"], now, _MUST_AGREE):
        raise BadCheckpoint(
            f"{key}: {new!r} given, but {checkpoint} was made with {old!r}; "
            "accepted: the same, or another run.name for a new run"
        )


def check_same_run(session: Session, checkpoint: Path, state: dict[str, Any]) -> None:
    """Raises BadCheckpoint where backbone or training data differ from the checkpoint's."""
    if state["backbone"] != session.backbone.digest:
        raise BadCheckpoint(
            f"{checkpoint}: was made on another backbone "
            f"({state['config'].get('model', {}).get('id')}), or its weights or config.json have "
            f"changed since; accepted: a checkpoint of {session.config.model.id}"
        )
    weights = session.backbone.weights
    for name, digest in state.get("weights", {}).items():
        if weights.get(name, digest) != digest:
            raise BadCheckpoint(
                f"model.id: {session.config.model.id}: the values of {name} have changed since "
                f"{checkpoint} was made; accepted: the same weights, or another run.name for a "
                "new run"
            )
    data = session.config.data
    then = state["config"].get("data", {}).get("train")
    former = former_key(
        str(then), data.train, data.train_split, data.train_records, data, session.task
    )
    if state["data"] not in (session.train_data.key, former):
        raise BadCheckpoint(
            f"data.train: {session.config.data.train} does not hold the records (or not the same "
            f"tokens of them) that {checkpoint} was made with; accepted: the same, or another "
            "run.name for a new run"
        )


def changes(state: dict[str, Any], now: dict[str, Any], *, evaluation: bool = False) -> list[str]:
    """Changed keys of a resumed run, as `key old -> new`; `evaluation`: also those of what it
    evaluates."""
    tables = (_MAY_CHANGE, _EVALUATION) if evaluation else (_MAY_CHANGE,)
    return [
        f"{key} {old!r} -> {new!r}"
        for table in tables
        for key, old, new in _differences(state["config"], now, table)
    ]


def _differences(
    then: dict[str, Any], now: dict[str, Any], table: Mapping[str, tuple[str, ...] | None]
) -> Iterator[tuple[str, Any, Any]]:
    for section, keys in table.items():
        made = then.get(section, {})
        for key in keys or sorted({*now[section], *made}, key=lambda k: (k != "kind", k)):
            old, new = made.get(key), now[section].get(key)
            if old != new:
                yield f"{section}.{key}", old, new
