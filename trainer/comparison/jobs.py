"""The runs of a comparison: their configurations, and the keys by which results are found again."""

import ast
import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import to_json

import trainer
from trainer.comparison.allocation import Replayed
from trainer.comparison.plan import LORA, Comparison
from trainer.config.config import Config, load_config

Result = dict[str, Any]
"""A line of results.jsonl: what identifies the run, and its summary or its `error`."""

_LEFT_OUT = {
    "run": {"dir", "name", "verify", "resume"},
    "data": {"cache", "workers"},
    "engine": {"compile_cache", "timeout"},
    "log": True,
    "checkpoint": True,
}
"""Keys that change no score."""
_PATHS = {
    ("model", "id"): 1, ("model", "tokenizer"): 1, ("data", "train"): 2, ("data", "eval"): 2,
    ("method", "match"): 1, ("method", "replay"): 2,
}  # fmt: skip
"""Keys of paths, by the number of names that count: models and data may lie anywhere."""
_WRITTEN: dict[bool | str, str] = {
    False: "last.jsonl", True: "permuted.jsonl", "any": "random.jsonl"
}  # fmt: skip
"""Files of allocations to be replayed, in the folder of the run that made them, by `permuted`."""
_COMPUTING = ("adapters", "trainer")
_SHOWING = ("trainer/comparison", "trainer/report")
"""Packages on which a run's scores do not depend."""


@dataclass(frozen=True)
class Job:
    """A run to be made."""

    method: str
    learning_rate: float
    seed: int
    selects: bool
    """Whether it searches for the learning rate."""

    def result(self, config: str, code: str) -> Result:
        """What identifies the run in results.jsonl."""
        return {
            "method": self.method, "learning_rate": self.learning_rate, "seed": self.seed,
            "selects": self.selects, "config": config, "code": code,
        }  # fmt: skip


class Jobs:
    """The configuration of each job of a comparison."""

    def __init__(self, comparison: Comparison, folder: Path):
        """`folder`: of the comparison's runs."""
        self.comparison, self._folder = comparison, folder
        self._made: dict[Job, tuple[str, Config]] = {}
        plain = load_config(comparison.base, comparison.located(comparison.overrides)).method
        self._alpha_ratio = plain.alpha / plain.rank

    def digest(self, job: Job) -> str:
        """Of the configuration, without paths and what changes no score: results can be moved."""
        return self._make(job)[0]

    def config(self, job: Job) -> Config:
        return self._make(job)[1]

    def knows(self, method: str) -> bool:
        """Whether it is an arm of the file, or of LoRA's curve."""
        return method in self.comparison.methods or (
            LORA in self.comparison.methods and method.startswith(lora_arm(""))
        )

    def replayed(self, job: Job) -> Replayed | None:
        """The allocation that the job's arm replays."""
        arm = self.comparison.methods.get(job.method)
        if arm is None or arm.replays is None:
            return None
        run = self.config(Job(arm.replays, job.learning_rate, job.seed, False)).run_folder
        return Replayed(run, arm.permuted, job.seed, run / _WRITTEN[arm.permuted])

    def rank_of(self, method: str) -> int:
        """`method.rank` of an arm."""
        return self.config(Job(method, self.comparison.learning_rates[0], 0, False)).method.rank

    def _make(self, job: Job) -> tuple[str, Config]:
        if job not in self._made:
            comparison = self.comparison
            overrides = [
                *comparison.overrides, *self.of_method(job.method),
                *(comparison.selection if job.selects else []), f"run.seed={job.seed}",
                f"optim.learning_rate={job.learning_rate!r}", f"run.dir={self._folder}",
                "run.resume=never", "log.record_losses=true",
            ]  # fmt: skip
            if (replayed := self.replayed(job)) is not None:
                overrides.append(f"method.replay={replayed.target}")
            located = comparison.located(overrides)
            located = [one.replace("{runs}", str(self._folder)) for one in located]
            config = load_config(comparison.base, located)
            digest = _digest(config)
            part = "select" if job.selects else "seed"
            slug = "".join(c if c.isalnum() or c in "-_." else "-" for c in job.method)
            name = f"{slug}-{job.learning_rate:g}-{part}{job.seed}-{digest[:6]}"
            self._made[job] = digest, load_config(comparison.base, [*located, f"run.name={name}"])
        return self._made[job]

    def of_method(self, method: str) -> list[str]:
        """Overrides of an arm of the file, or of LoRA with another rank."""
        if method in self.comparison.methods:
            return self.comparison.overrides_of(method)
        rank = int(method.removeprefix(lora_arm("")))
        alpha = f"method.alpha={rank * self._alpha_ratio!r}"
        return [*self.comparison.overrides_of(LORA), f"method.rank={rank}", alpha]


def lora_arm(rank: int | str) -> str:
    """Name of the arm that is LoRA with this rank."""
    return f"{LORA} r={rank}"


def _digest(config: Config) -> str:
    values = config.model_dump(mode="json", exclude=_LEFT_OUT)  # type: ignore[arg-type]
    for (section, key), names in _PATHS.items():
        if key in values[section]:
            values[section][key] = _without_place(values[section][key], names)
    return hashlib.sha256(to_json(values)).hexdigest()[:16]


def _without_place(value: Any, names: int) -> Any:
    """Paths by their last names."""
    if isinstance(value, str):
        return "/".join(Path(value).parts[-names:])
    if isinstance(value, list):
        return [_without_place(one, names) for one in value]
    if isinstance(value, dict):
        return {name: _without_place(one, names) for name, one in value.items()}
    return value


@functools.cache
def code_version() -> str:
    """Digest of the code that a run's scores depend on, without comments, docstrings and layout:
    the same from a checkout, an archive without history or an installed package."""
    root = Path(trainer.__file__).parents[1]
    digest = hashlib.sha256()
    for package in _COMPUTING:
        for file in sorted((root / package).rglob("*.py")):
            name = file.relative_to(root).as_posix()
            if not name.startswith(_SHOWING):
                digest.update(f"{name}\n{_code(file)}\n".encode())
    return digest.hexdigest()[:12]


def _code(file: Path) -> str:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [one for one in body if not _is_text(one)]  # type: ignore[attr-defined]
    return ast.dump(tree)


def _is_text(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
