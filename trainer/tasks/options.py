"""The keys under `task:`, and what a task declares to the configuration; imports no torch."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from adapters.options import Section

Direction = Literal["min", "max"]
"""Whether the least or the largest value of a metric is the best."""


class TaskOptions(Section):
    """The keys that every task accepts, and what it declares about its data."""

    needs_labels: ClassVar[bool] = False
    """Records have labels, which the task receives (`learn_labels`) before anything is encoded."""
    supports_packing: ClassVar[bool] = True
    """Several records may share a sequence (`data.packing`)."""
    lies_end_to_end: ClassVar[bool] = True
    """The records of a micro-batch may share a row (`data.padding_free`), if the model allows."""
    whole_records: ClassVar[bool] = False
    """A record is used with all of its examples or not at all."""
    source_apart: ClassVar[bool] = False
    """What an example does not learn is a row of its own, an encoder's."""
    generates: ClassVar[bool] = False
    """Its model generates text (`generation`)."""
    knows_losses: ClassVar[bool] = False
    """Its evaluations know the loss of each record (`log.record_losses`)."""
    reads_images: ClassVar[bool] = False
    """Records are images, which the model's image processor prepares, not texts."""
    data_formats: ClassVar[tuple[str, ...]]
    """The values of `data.format` that it accepts. With a single one, `auto` means it; else
    `auto` looks at the columns."""

    kind: str
    """Name of the task."""

    @property
    def records_together(self) -> bool:
        """The examples of a record are learned as one, in a row of their own."""
        return False

    def limits(self, max_length: int) -> dict[str, int]:
        """The most tokens of each of an example's rows, by the key that limits them."""
        return {"data.max_length": max_length}

    def metrics(self) -> Mapping[str, Direction]:
        """The scores by which an evaluation may be judged (`run.keep_best`), without `eval_`."""
        return {"loss": "min"}


class CausalLMOptions(TaskOptions):
    """Options of `task.kind: causal_lm`."""

    generates = True
    knows_losses = True
    data_formats = ("prompt_completion", "alpaca", "messages", "text")

    kind: Literal["causal_lm"] = "causal_lm"
    """Name of the task."""
    loss_on: Literal["completion", "all"] = "completion"
    """Learn the completion (assistant turns) only, or the prompt too."""

    def metrics(self) -> Mapping[str, Direction]:
        return {"loss": "min", "perplexity": "min"}


class ImageClassificationOptions(TaskOptions):
    """Options of `task.kind: image_classification`."""

    needs_labels = True
    supports_packing = False
    lies_end_to_end = False
    reads_images = True
    data_formats = ("images",)

    kind: Literal["image_classification"] = "image_classification"
    """Name of the task."""

    def metrics(self) -> Mapping[str, Direction]:
        return {"loss": "min", "accuracy": "max", "f1": "max", "matthews": "max"}


class MultipleChoiceOptions(TaskOptions):
    """Options of `task.kind: multiple_choice`."""

    data_formats = ("multiple_choice", "commonsense")
    whole_records = True

    kind: Literal["multiple_choice"] = "multiple_choice"
    """Name of the task."""
    train_on: Literal["answer", "distribution"] = "answer"
    """What is learned. answer: the tokens of the right choice; distribution: which choice is right,
    by the cross entropy of a softmax over the log-likelihoods of all of them."""
    likelihood: Literal["sum", "per_byte"] = "sum"
    """With `train_on: distribution`: log-likelihoods as they are, or per byte of the choice, as
    `accuracy_norm` compares them."""

    @property
    def records_together(self) -> bool:
        return self.train_on == "distribution"

    @model_validator(mode="after")
    def _check(self) -> "MultipleChoiceOptions":
        if self.train_on == "answer" and self.likelihood != "sum":
            raise ValueError(
                f"task.likelihood: {self.likelihood} given with task.train_on=answer; accepted: sum"
            )
        return self

    def metrics(self) -> Mapping[str, Direction]:
        return {"loss": "min", "perplexity": "min", "accuracy": "max", "accuracy_norm": "max"}


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

    def metrics(self) -> Mapping[str, Direction]:
        return {"loss": "min", "exact_match": "max", "f1": "max"}

    @model_validator(mode="after")
    def _check(self) -> "QuestionAnsweringOptions":
        if self.null_threshold and not self.no_answer:
            raise ValueError(
                f"task.null_threshold: {self.null_threshold} given with task.no_answer=false; "
                "accepted: 0.0"
            )
        return self


class SequenceClassificationOptions(TaskOptions):
    """Options of `task.kind: sequence_classification`."""

    needs_labels = True
    supports_packing = False
    knows_losses = True
    data_formats = ("classification",)

    kind: Literal["sequence_classification"] = "sequence_classification"
    """Name of the task."""
    problem: Literal["classification", "regression"] = "classification"
    """Labels are names, or numbers to be predicted."""

    def metrics(self) -> Mapping[str, Direction]:
        if self.problem == "regression":
            return {"loss": "min", "pearson": "max", "spearman": "max"}
        return {"loss": "min", "accuracy": "max", "f1": "max", "matthews": "max"}


class SequenceToSequenceOptions(TaskOptions):
    """Options of `task.kind: sequence_to_sequence`."""

    supports_packing = False
    lies_end_to_end = False
    generates = True
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

    def metrics(self) -> Mapping[str, Direction]:
        return {"loss": "min", "perplexity": "min", "token_accuracy": "max"}
