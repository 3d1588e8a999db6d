"""The keys under `task:`, and what a task declares to the configuration; imports no torch."""

from typing import ClassVar, Literal

from pydantic import Field

from adapters.options import Section


class TaskOptions(Section):
    """The keys that every task accepts, and what it declares about its data."""

    needs_labels: ClassVar[bool] = False
    """Records have labels, which the task receives (`learn_labels`) before anything is encoded."""
    supports_packing: ClassVar[bool] = True
    """Several records may share a sequence (`data.packing`)."""
    whole_records: ClassVar[bool] = False
    """A record is used with all of its examples or not at all."""
    source_apart: ClassVar[bool] = False
    """What an example does not learn is a row of its own, an encoder's."""
    data_formats: ClassVar[tuple[str, ...]]
    """The values of `data.format` that it accepts. With a single one, `auto` means it; else
    `auto` looks at the columns."""

    kind: str
    """Name of the task."""

    def limits(self, max_length: int) -> dict[str, int]:
        """The most tokens of each of an example's rows, by the key that limits them."""
        return {"data.max_length": max_length}


class CausalLMOptions(TaskOptions):
    """Options of `task.kind: causal_lm`."""

    data_formats = ("prompt_completion", "alpaca", "messages", "text")

    kind: Literal["causal_lm"] = "causal_lm"
    """Name of the task."""
    loss_on: Literal["completion", "all"] = "completion"
    """Learn the completion (assistant turns) only, or the prompt too."""


class MultipleChoiceOptions(TaskOptions):
    """Options of `task.kind: multiple_choice`."""

    data_formats = ("multiple_choice", "commonsense")
    whole_records = True

    kind: Literal["multiple_choice"] = "multiple_choice"
    """Name of the task."""


class SequenceClassificationOptions(TaskOptions):
    """Options of `task.kind: sequence_classification`."""

    needs_labels = True
    supports_packing = False
    data_formats = ("classification",)

    kind: Literal["sequence_classification"] = "sequence_classification"
    """Name of the task."""
    problem: Literal["classification", "regression"] = "classification"
    """Labels are names, or numbers to be predicted."""


class SequenceToSequenceOptions(TaskOptions):
    """Options of `task.kind: sequence_to_sequence`."""

    supports_packing = False
    source_apart = True
    data_formats = ("prompt_completion",)

    kind: Literal["sequence_to_sequence"] = "sequence_to_sequence"
    """Name of the task."""
    max_target_length: int = Field(128, gt=0)
    """Maximum length of a completion in tokens, its end token included. `data.max_length` is that
    of a prompt."""

    def limits(self, max_length: int) -> dict[str, int]:
        # The decoder's row has a token before the target.
        return {
            "data.max_length": max_length,
            "task.max_target_length": self.max_target_length + 1,
        }
