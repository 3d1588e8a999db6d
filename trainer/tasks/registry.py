"""The tasks by name; the one place that lists them.

`OPTIONS[kind]` is the class of a task's keys, imported without torch for the tasks here;
`TASKS[kind]` is the task.
"""

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from trainer.tasks.options import TaskOptions

if TYPE_CHECKING:
    from trainer.tasks.base import Task

T = TypeVar("T")


@dataclass(frozen=True)
class TaskEntry:
    """Where a task's class and its options are."""

    task: str
    """`module:Class`."""
    options: str = ""
    """`module:Class` of its options, where that can be imported without torch; else they are the
    class's own `Options`."""


_TASKS = {
    "causal_lm": TaskEntry(
        "trainer.tasks.causal_lm:CausalLM", "trainer.tasks.options:CausalLMOptions"
    ),
    "sequence_classification": TaskEntry(
        "trainer.tasks.sequence_classification:SequenceClassification",
        "trainer.tasks.options:SequenceClassificationOptions",
    ),
}


class _Lazy(Mapping[str, T], Generic[T]):
    """Classes by the name of their task, imported when they are asked for."""

    def __init__(self, options: bool):
        self._options = options

    def __getitem__(self, kind: str) -> T:
        entry = _TASKS[kind]
        if not self._options:
            return _imported(entry.task)
        return _imported(entry.options) if entry.options else _imported(entry.task).Options

    def __iter__(self) -> Iterator[str]:
        return iter(_TASKS)

    def __len__(self) -> int:
        return len(_TASKS)

    def __contains__(self, kind: object) -> bool:  # Mapping's own would import
        return kind in _TASKS


def _imported(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


OPTIONS: Mapping[str, type[TaskOptions]] = _Lazy(options=True)
TASKS: Mapping[str, type["Task"]] = _Lazy(options=False)
