"""What a task must provide: how records become inputs, the loss, the head and the metrics.

A task is one file. The loader and the loop know only what stands here.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from trainer.tasks.options import TaskOptions

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

IGNORED = -100
"""Target of a position that has no loss, as in torch's cross entropy."""


@dataclass
class Record:
    """A record in the one form that all data formats are brought to.

    `segments` are pieces of text with whether they are learned; `label` is the raw label of a
    classification record, whose texts are the segments.
    """

    segments: list[tuple[str, bool]]
    label: str | float | None = None
    special_tokens: bool = True
    """Whether the tokenizer's own begin and end tokens are added (a chat template has its own)."""


@dataclass
class Example:
    """A tokenised record. `weight` is how many terms it adds to the summed loss."""

    input_ids: Sequence[int]
    loss_mask: Sequence[int] = ()
    token_type_ids: Sequence[int] = ()
    label: float = 0.0
    weight: int = 1
    truncated: bool = False


@dataclass
class Batch:
    """One micro-batch on the device. A position or record that carries no loss has target -100."""

    inputs: dict[str, Tensor]
    targets: Tensor
    weight: int
    """Terms of the summed loss: label tokens, or records."""
    tokens: int
    """Tokens that are not padding."""
    records: list[int] = field(default_factory=list)
    """Indices of the records in their data set."""

    def to(self, device: torch.device) -> "Batch":
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        targets = self.targets.to(device)
        return Batch(inputs, targets, self.weight, self.tokens, self.records)


class Task(ABC):
    """A task on one backbone and tokenizer."""

    Options: ClassVar[type[TaskOptions]]
    auto_class: ClassVar[Any]
    """The transformers class that builds the model."""
    peft_task_type: ClassVar[str | None] = None
    """What PEFT calls such a task, in the exported adapter; None where it knows none."""

    def __init__(self, options: Any, tokenizer: "PreTrainedTokenizerBase"):
        self.options = options
        self.tokenizer = tokenizer
        candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
        self.pad_token_id: int = next((token for token in candidates if token is not None), 0)

    def learn_labels(self, labels: Sequence[str | float]) -> None:  # noqa: B027
        """See the training set's labels, once, before anything is encoded."""

    def labels_state(self) -> dict[str, Any]:
        """What `learn_labels` found, as plain data; part of the run's record."""
        return {}

    def load_labels_state(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Inverse of `labels_state`, in place of `learn_labels`."""

    def configure(self, config: "PretrainedConfig") -> None:  # noqa: B027
        """Fill the model's configuration in (number of labels, padding token)."""

    def trained_modules(self, model: nn.Module) -> list[str]:
        """Paths of modules that train whole beside the adapters (a new head)."""
        return []

    @abstractmethod
    def encode(self, records: Sequence[Record], max_length: int) -> list[Example | str]:
        """Per record an example, cut to `max_length` and marked so where it was longer; or, as a
        string, the reason why the record cannot be used."""

    @abstractmethod
    def collate(self, sequences: Sequence[Sequence[Example]], *, empty: bool = False) -> Batch:
        """One micro-batch; each sequence is one example, or several packed. `empty`: no loss."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """(summed loss in float32, predictions for `metrics` where the task has any)."""

    def scores_of_loss(self, loss: float) -> dict[str, float]:
        """Scores that follow from the mean loss alone."""
        return {}

    def metrics(self, predictions: Sequence[Any], labels: Sequence[float]) -> dict[str, float]:
        """Scores over the whole evaluation set, in record order."""
        return {}


def pad(values: Sequence[int], width: int, filler: int) -> list[int]:
    """`values` filled on the right to `width`."""
    return [*values, *[filler] * (width - len(values))]
