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
    reads_images: ClassVar[bool] = False
    """Records are images, which the model's image processor prepares, not texts."""
    data_formats: ClassVar[tuple[str, ...]]
    """The values of `data.format` that it accepts. With a single one, `auto` means it; else
    `auto` looks at the columns."""

    kind: str
    """Name of the task."""


class CausalLMOptions(TaskOptions):
    """Options of `task.kind: causal_lm`."""

    data_formats = ("prompt_completion", "alpaca", "messages", "text")

    kind: Literal["causal_lm"] = "causal_lm"
    """Name of the task."""
    loss_on: Literal["completion", "all"] = "completion"
    """Learn the completion (assistant turns) only, or the prompt too."""


class ImageClassificationOptions(TaskOptions):
    """Options of `task.kind: image_classification`."""

    needs_labels = True
    supports_packing = False
    reads_images = True
    data_formats = ("images",)

    kind: Literal["image_classification"] = "image_classification"
    """Name of the task."""


class MultipleChoiceOptions(TaskOptions):
    """Options of `task.kind: multiple_choice`."""

    data_formats = ("multiple_choice", "commonsense")
    whole_records = True

    kind: Literal["multiple_choice"] = "multiple_choice"
    """Name of the task."""


class QuestionAnsweringOptions(TaskOptions):
    """Options of `task.kind: question_answering`."""

    supports_packing = False
    data_formats = ("question_answering",)

    kind: Literal["question_answering"] = "question_answering"
    """Name of the task."""
    stride: int = Field(128, ge=0)
    """Tokens of a long context that a window shares with the one before."""
    max_answer_length: int = Field(30, gt=0)
    """Tokens of a predicted answer, at most."""
    no_answer: bool = False
    """Questions may have no answer, as in SQuAD 2.0, whose script's scores are logged; without it
    such questions are bad records."""
    null_threshold: float = 0.0
    """With `no_answer`: none is predicted where its score is larger than the best answer's by more
    than this."""


class SequenceClassificationOptions(TaskOptions):
    """Options of `task.kind: sequence_classification`."""

    needs_labels = True
    supports_packing = False
    data_formats = ("classification",)

    kind: Literal["sequence_classification"] = "sequence_classification"
    """Name of the task."""
    problem: Literal["classification", "regression"] = "classification"
    """Labels are names, or numbers to be predicted."""
