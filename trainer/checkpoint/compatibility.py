"""Whether a checkpoint can resume a configuration: keys that must agree, keys that may change."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from adapters.options import Section
from trainer.config.config import Config
from trainer.errors import BadCheckpoint
from trainer.session import LoadedModel, Session

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
        "eval",
    ),
    "run": ("seed", "keep_best"),
}
"""Keys that must be equal for a resumed run to be the same run (None: the entire section)."""

_SCORED = (
    "records", "scores", "pattern", "max_new_tokens", "temperature", "top_p", "top_k", "stop",
)  # fmt: skip
"""Keys of `generation` that must be equal too where `run.keep_best` is a score of answers: others'
would be compared with the best so far."""

_MAY_CHANGE = {
    "model": ("dtype", "attention"),
    "data": ("padding_free", "row_lengths"),
    "optim": None,
    "run": ("steps", "epochs"),
}
"""Keys that a user may change on purpose; a change is logged."""

_EVALUATION = {
    "data": ("eval", "eval_split", "eval_records"),
    "run": ("eval_every", "eval_at_start", "patience"),
    "generation": None,
}
"""Keys that change what a run reports."""


def check_options(config: Config, checkpoint: Path, state: dict[str, Any]) -> None:
    """Raises BadCheckpoint, naming the key, where `config` differs in a key that must agree."""
    must_agree: dict[str, tuple[str, ...] | None] = {**_MUST_AGREE}
    if config.run.keep_best is not None and config.run.keep_best in _generated(config):
        must_agree["generation"] = _SCORED
    for key, old, new in _differences(state["config"], config, must_agree):
        if key == "data.eval" and not {type(old), type(new)} & {int, float}:
            continue  # another file takes nothing from the training records
        raise BadCheckpoint(
            f"{key}: {new!r} given, but {checkpoint} was made with {old!r}; "
            "accepted: the same, or another run.name for a new run"
        )


def _generated(config: Config) -> set[str]:
    """The scores of generated answers among the metrics of a configuration."""
    return {
        name for name in config.metrics
        if any(name.endswith(f"_{score}") for score in config.generation.metrics)
    }  # fmt: skip


def is_another_backbone(session: LoadedModel, state: Mapping[str, Any]) -> bool:
    """Whether config.json or weights differ from those that a checkpoint was made on."""
    return state["backbone"] != session.backbone.digest or bool(_changed_weights(session, state))


def _changed_weights(session: LoadedModel, state: Mapping[str, Any]) -> list[str]:
    """Tensors of the backbone that are not what they were at a checkpoint."""
    now = session.backbone.weights
    then: Mapping[str, str] = state.get("weights", {})
    return [name for name, digest in then.items() if now.get(name, digest) != digest]


def check_same_run(session: Session, checkpoint: Path, state: dict[str, Any]) -> None:
    """Raises BadCheckpoint where backbone or training data differ from the checkpoint's. (Earlier
    checkpoints hold the data's key in the cache instead of its digest.)"""
    if state["backbone"] != session.backbone.digest:
        raise BadCheckpoint(
            f"{checkpoint}: was made on another backbone "
            f"({state['config'].get('model', {}).get('id')}), or its weights or config.json have "
            f"changed since; accepted: a checkpoint of {session.config.model.id}"
        )
    if changed := _changed_weights(session, state):
        raise BadCheckpoint(
            f"model.id: {session.config.model.id}: the values of {changed[0]} have changed since "
            f"{checkpoint} was made; accepted: the same weights, or another run.name for a new run"
        )
    data = session.config.data
    if state["data"] not in (session.train_data.digest, session.train_data.key):
        raise BadCheckpoint(
            f"{data.train_name} does not hold the records (or not the same tokens of them, or in "
            f"other shares) that {checkpoint} was made with; accepted: the same, or another "
            "run.name for a new run"
        )
    best = state.get("best")
    if best is not None and best["data"] != session.evaluation_digest():
        raise BadCheckpoint(
            f"data.eval: does not hold the records by which {checkpoint} knows step "
            f"{best['step']} as the best (run.keep_best); accepted: the same, or another run.name "
            "for a new run"
        )


def changes(state: dict[str, Any], config: Config, *, evaluation: bool = False) -> list[str]:
    """Changed keys of a resumed run, as `key old -> new`; `evaluation`: also those of what it
    evaluates."""
    tables = (_MAY_CHANGE, _EVALUATION) if evaluation else (_MAY_CHANGE,)
    return [
        f"{key} {old!r} -> {new!r}"
        for table in tables
        for key, old, new in _differences(state["config"], config, table)
    ]


def _differences(
    then: dict[str, Any], config: Config, table: Mapping[str, tuple[str, ...] | None]
) -> Iterator[tuple[str, Any, Any]]:
    now = config.model_dump(mode="json")
    for section, keys in table.items():
        made = _completed(then.get(section, {}), getattr(config, section))
        for key in keys or sorted({*now[section], *made}, key=lambda k: (k != "kind", k)):
            old, new = made.get(key), now[section].get(key)
            is_newer = key not in made and not new  # than the checkpoint, and not used
            if old != new and not is_newer:
                yield f"{section}.{key}", old, new


def _completed(made: dict[str, Any], section: Section) -> dict[str, Any]:
    """A recorded section with the defaults of keys that came later; unchanged where it is another
    one (of another method, say)."""
    try:
        return type(section).model_validate_json(json.dumps(made)).model_dump(mode="json")
    except ValidationError:
        return made
