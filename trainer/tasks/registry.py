"""Registry of tasks by name, the only list of them.

`TASKS[kind]` is the task, `OPTIONS[kind]` the class of its keys, which imports no torch for the
tasks here. A task that defines its `Options` in its own file is registered by its class alone.
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
        "image_classification": (
            ".image_classification:ImageClassification",
            ".options:ImageClassificationOptions",
        ),
        "multiple_choice": (".multiple_choice:MultipleChoice", ".options:MultipleChoiceOptions"),
        "question_answering": (
            ".question_answering:QuestionAnswering",
            ".options:QuestionAnsweringOptions",
        ),
        "sequence_classification": (
            ".sequence_classification:SequenceClassification",
            ".options:SequenceClassificationOptions",
        ),
        "sequence_to_sequence": (
            ".sequence_to_sequence:SequenceToSequence",
            ".options:SequenceToSequenceOptions",
        ),
    },
)

OPTIONS = TASKS.options

DEFAULT = "causal_lm"
"""The task of a configuration that names none."""
