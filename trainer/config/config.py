"""The configuration: one YAML file, typed and strict, with dotted overrides.

    python launch/train.py --config run.yaml optim.learning_rate=1e-3 method.rank=16

An unknown key, a wrong type or an invalid combination raises a `UserError` of one line that names
the key, the value given and the values accepted.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import SerializeAsAny, model_validator

from adapters.methods.options import MethodOptions
from adapters.methods.registry import DEFAULT as DEFAULT_METHOD
from adapters.methods.registry import METHODS
from adapters.methods.registry import OPTIONS as METHOD_OPTIONS
from adapters.options import Section
from trainer.config.aliases import note_renamed, rename_keys, rename_overrides
from trainer.config.data_options import DataOptions
from trainer.config.engines import ENGINES, engines_that_train
from trainer.config.generation_options import GenerationOptions
from trainer.config.sections import (
    CheckpointOptions,
    EngineOptions,
    LogOptions,
    ModelOptions,
    OptimOptions,
    RunOptions,
)
from trainer.config.validation import names_of, one_of, unknown_key, validate
from trainer.config.yaml import dump_yaml, parse_yaml
from trainer.errors import UserError
from trainer.tasks.options import Direction, TaskOptions
from trainer.tasks.registry import DEFAULT as DEFAULT_TASK
from trainer.tasks.registry import OPTIONS as TASK_OPTIONS


class Config(Section):
    """The configuration of a run."""

    run: RunOptions
    model: ModelOptions
    task: SerializeAsAny[TaskOptions]
    data: DataOptions
    method: SerializeAsAny[MethodOptions]
    optim: OptimOptions
    generation: GenerationOptions
    engine: EngineOptions
    log: LogOptions
    checkpoint: CheckpointOptions

    @model_validator(mode="after")
    def _check(self) -> "Config":
        if self.run.steps is not None and self.run.epochs is not None:
            raise ValueError("run.epochs: given together with run.steps; accepted: one of them")
        warmup, steps = self.optim.warmup_steps, self.run.steps
        if warmup is not None and steps is not None and warmup > steps:
            raise ValueError(
                f"optim.warmup_steps: {warmup} given; accepted: at most run.steps ({steps})"
            )
        if steps is not None:
            self.method.check_steps(steps)
        if self.method.replay is not None and not METHODS[self.method.kind].decides:
            raise ValueError(
                f"method.replay: {self.method.replay} given, but {self.method.kind} decides "
                "nothing; accepted: null"
            )
        if self.method.trains != "adapters":
            self._check_without_adapters()
        if self.model.adapter is not None and self.method.scales_rows:
            raise ValueError(
                f"model.adapter: given with method.kind={self.method.kind}, which scales all of "
                "W + ΔW; accepted: null"
            )
        if self.model.added_tokens and self.method.include_head:
            raise ValueError(
                "method.include_head: true given with model.added_tokens, whose rows of the head "
                "are trained in full; accepted: false"
            )
        self._check_rows()
        self._check_formats()
        if self.run.eval_every and self.data.eval is None:
            raise ValueError(
                f"run.eval_every: {self.run.eval_every} given without data.eval; accepted: 0"
            )
        if self.run.eval_at_start and self.data.eval is None:
            raise ValueError("run.eval_at_start: true given without data.eval; accepted: false")
        self._check_generation()
        self._check_best()
        return self

    def _check_rows(self) -> None:
        """Raises ValueError where sequences cannot have the rows that are asked for."""
        flash = self.model.attention == "flash_attention_2"
        padded = self.data.padding_free is False and self.data.micro_batch_size != 1
        if self.data.packing and flash and padded:
            raise ValueError(
                "data.padding_free: false given with data.packing and "
                "model.attention=flash_attention_2; accepted: auto, or data.micro_batch_size=1 "
                "(flash attention keeps packed documents apart in a single row only)"
            )
        if self.data.packing and not self.task.supports_packing:
            raise ValueError(
                f"data.packing: true given with task.kind={self.task.kind}; accepted: false"
            )
        if self.data.packing and self.task.records_together:
            raise ValueError(
                "data.packing: true given with task.train_on=distribution, whose choices have a "
                "row of their own; accepted: false"
            )
        if self.data.padding_free is True and not self.task.lies_end_to_end:
            raise ValueError(
                f"data.padding_free: true given with task.kind={self.task.kind}; accepted: false"
            )
        if self.data.row_lengths not in ("auto", 0) and self.task.source_apart:
            raise ValueError(
                f"data.row_lengths: {self.data.row_lengths} given with task.kind={self.task.kind}; "
                "accepted: auto or 0"
            )
        tokens, limits = self.data.micro_batch_tokens, self.task.limits(self.data.max_length)
        if tokens is not None and tokens < sum(limits.values()):
            raise ValueError(
                f"data.micro_batch_tokens: {tokens} given; accepted: at least "
                f"{sum(limits.values())}, an example of {' and '.join(limits)}"
            )

    def _check_formats(self) -> None:
        """Raises ValueError for formats, and what is done to their records, that are not the
        task's."""
        for index, own in enumerate([self.data, *(self.data.mixture or [])]):
            if own.format not in ("auto", *self.task.data_formats):
                key = f"data.mixture.{index - 1}" if index else "data"
                raise ValueError(
                    f"{key}.format: {own.format} given with task.kind={self.task.kind}; "
                    f"accepted: auto, {', '.join(self.task.data_formats)}"
                )
        if "text" not in self.task.data_formats:
            for key, value in (("on_long_record", "split"), ("truncate", "prompt")):
                if getattr(self.data, key) == value:
                    raise ValueError(
                        f"data.{key}: {value} given with task.kind={self.task.kind}; accepted: "
                        f"{DataOptions.model_fields[key].default}"
                    )

    def _check_generation(self) -> None:
        records = self.generation.records
        if records and self.data.eval is None:
            raise ValueError(f"generation.records: {records} given without data.eval; accepted: 0")
        if records and not self.task.generates:
            raise ValueError(
                f"generation.records: {records} given with task.kind={self.task.kind}, which "
                "generates no text; accepted: 0"
            )
        if records and getattr(self.task, "loss_on", None) == "all":
            raise ValueError(
                f"generation.records: {records} given with task.loss_on=all, where no prompt is "
                "told from its completion; accepted: 0, or task.loss_on=completion"
            )

    def _check_best(self) -> None:
        metric, patience = self.run.keep_best, self.run.patience
        if patience is not None and metric is None:
            raise ValueError(
                f"run.patience: {patience} given without run.keep_best; accepted: with it, one of "
                f"{', '.join(self.metrics)}"
            )
        if metric is None:
            return
        if not self.run.eval_every:
            raise ValueError(
                f"run.keep_best: {metric} given without data.eval and run.eval_every, so that "
                "there would be one evaluation; accepted: null"
            )
        one_of("run.keep_best", metric, self.metrics)

    @property
    def packs_rows(self) -> bool:
        """Whether a row may hold several documents, apart from those that lie end to end."""
        return self.data.packing or self.task.records_together

    @property
    def metrics(self) -> dict[str, Direction]:
        """The scores of an evaluation by which it may be judged, by their names in metrics.jsonl,
        and whether the least or the largest is the best."""
        sets = [name for name in self.data.eval_names if name]
        directions = {**self.task.metrics(), **self.generation.metrics}
        return {
            f"eval_{prefix}{name}": direction
            for prefix in ("", *(f"{name}_" for name in sets))
            for name, direction in directions.items()
        }

    def _check_without_adapters(self) -> None:
        """Raises ValueError for what only the adapters here can do."""
        method, kind = self.method, self.engine.kind
        for key, given, accepted in (
            ("model.quantization", self.model.quantization, "none"),
            ("model.added_tokens", self.model.added_tokens, None),
            ("model.adapter", self.model.adapter, None),
        ):
            if given != accepted:
                raise ValueError(
                    f"{key}: {given} given with method.kind={method.kind}; accepted: "
                    f"{accepted or 'null'}"
                )
        if method.trains == "backbone" and self.engine.unsharded_blocks not in ("auto", 0):
            raise ValueError(
                f"engine.unsharded_blocks: {self.engine.unsharded_blocks} given with "
                f"method.kind={method.kind}; accepted: auto or 0"
            )
        if kind != "auto" and method.trains not in ENGINES[kind].trains:
            raise ValueError(
                f"engine.kind: {kind} given with method.kind={method.kind}; accepted: auto, "
                f"{engines_that_train(method.trains)}"
            )

    @property
    def run_folder(self) -> Path:
        return Path(self.run.dir) / self.run.name

    def to_yaml(self) -> str:
        """The resolved configuration as YAML; `load_config` reads it back unchanged."""
        return dump_yaml(self.model_dump())


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read `path`, apply `section.key=value` overrides in order (the last wins) and validate.
    Raises UserError."""
    return parse_config(overridden(read_config(path), overrides, Path(path).stem))


def read_config(path: str | Path) -> dict[str, Any]:
    """The sections of a YAML file, as they stand there. Raises UserError."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}; accepted: a YAML file") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"--config {path}: not UTF-8 at byte {error.start}; accepted: a YAML file"
        ) from error
    raw = parse_yaml(text, f"--config {path}")
    if not isinstance(raw, dict):
        given = "an empty file" if raw is None else type(raw).__name__
        raise UserError(f"--config {path}: {given}; accepted: the sections {names_of(Config)}")
    return raw


def overridden(
    raw: Mapping[str, Any], overrides: Sequence[str] = (), name: str = ""
) -> dict[str, Any]:
    """Sections with overrides and the present names of keys, for `parse_config`; `name`: of the
    run, unless it is given. `raw` is left as it is. Raises UserError."""
    own = copy.deepcopy(dict(raw))
    found = rename_keys(own)
    _apply_overrides(own, overrides)
    note_renamed(found)
    run = own.get("run")
    if run is None or (isinstance(run, dict) and not run.get("name")):
        own["run"] = {**(run or {}), "name": name}
    return own


def with_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """`config` with `section.key=value` overrides applied and validated. Raises UserError."""
    raw = config.model_dump(mode="json")
    _apply_overrides(raw, overrides)
    return parse_config(raw)


def on_engine(config: Config, kind: str) -> Config:
    """`config` on another engine: the keys of `engine:` that only some engines take get their
    defaults, since they were given for the engine that was recorded."""
    raw = config.model_dump(mode="json")
    for key in {option for entry in ENGINES.values() for option in entry.options}:
        raw["engine"][key] = EngineOptions.model_fields[key].default
    raw["engine"]["kind"] = kind
    return parse_config(raw)


def parse_config(raw: Mapping[str, Any]) -> Config:
    """Validate a nested dictionary. Raises UserError with the first error."""
    for key in raw:
        if key not in Config.model_fields:
            raise UserError(unknown_key(str(key), [], Config))
    sections: dict[str, Any] = {}
    for name, field in Config.model_fields.items():
        value = raw.get(name)
        value = {} if value is None else value
        if not isinstance(value, Mapping):
            raise UserError(f"{name}: {value!r} given; accepted: a section of keys")
        sections[name] = validate(name, value, _section_type(name, field.annotation, value))
    return validate("", sections, Config)


def _section_type(name: str, annotation: Any, value: Mapping[str, Any]) -> type[Section]:
    """The class of a section; those of `method` and `task` depend on `kind`."""
    if name == "method":
        kind = value.get("kind", DEFAULT_METHOD)
        return METHOD_OPTIONS[one_of("method.kind", kind, METHOD_OPTIONS)]
    if name == "task":
        kind = value.get("kind", DEFAULT_TASK)
        return TASK_OPTIONS[one_of("task.kind", kind, TASK_OPTIONS)]
    return annotation


def _apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> None:
    overrides, found = rename_overrides(overrides)
    for override in overrides:
        _apply_override(raw, override)
    note_renamed(found)


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    path = key.split(".")
    if not equals or len(path) < 2 or not all(path):
        raise UserError(
            f"override {override!r}: not understood; accepted: section.key=value, "
            f"with a section of {names_of(Config)}"
        )
    section = raw
    for part in path[:-1]:
        inner = section.get(part)
        if inner is None:
            inner = section[part] = {}
        if not isinstance(inner, dict):
            raise UserError(
                f"override {override!r}: {part} is not a section; accepted: section.key=value"
            )
        section = inner
    section[path[-1]] = _value(key, text)


def _value(key: str, text: str) -> Any:
    """The value of an override. Raises UserError."""
    try:
        return parse_yaml(text, f"override {f'{key}={text}'!r}")
    except UserError as error:
        if "{" not in text or text.startswith(('"', "'")):
            raise
        raise UserError(
            f"{error}; a template needs quotes inside those of the shell: {key}='\"{text}\"'"
        ) from error
