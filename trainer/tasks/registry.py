"""The tasks by name; the one place that lists them.

`TASKS[kind]` is the task, `OPTIONS[kind]` the class of its keys, imported without torch for the
tasks here. A task whose file holds its `Options` too needs its class alone.
"""

from typing import TYPE_CHECKING

from adapters.registry import Registry

if TYPE_CHECKING:
    from trainer.tasks.base import Task
    from trainer.tasks.options import TaskOptions

TASKS: "Registry[Task, TaskOptions]" = Registry(
    __package__,
    {
        "causal_lm": (".causal_lm:CausalLM", ".options:CausalLMOptions"),
        "sequence_classification": (
            ".sequence_classification:SequenceClassification",
            ".options:SequenceClassificationOptions",
        ),
    },
)

OPTIONS = TASKS.options

DEFAULT = "causal_lm"
"""The task of a configuration that names none."""
