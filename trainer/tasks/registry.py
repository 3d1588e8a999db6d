"""The tasks by name; the one place that lists them."""

from trainer.tasks.base import Task
from trainer.tasks.causal_lm import CausalLM
from trainer.tasks.sequence_classification import SequenceClassification

TASKS: dict[str, type[Task]] = {
    "causal_lm": CausalLM,
    "sequence_classification": SequenceClassification,
}
