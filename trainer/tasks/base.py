"""Interface of a task: encoding and collating records, the loss, the head and the metrics.

A task is one file; loader and loop use this interface only.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from inspect import signature
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from trainer.tasks.documents import Documents
from trainer.tasks.options import TaskOptions

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

IGNORED = -100
"""Target of a position without loss, as in torch's cross entropy."""

Switch = bool | Literal["auto"]


@dataclass
class Record:
    """A record, independent of its data format.

    `segments`: (text, whether it is learned) pairs. `label`: raw label of a classification record,
    whose texts are the segments.
    """

    segments: list[tuple[str, bool]]
    label: str | float | None = None
    answers: Sequence[tuple[str, int]] = ()
    """(text, its first character in the context) of each answer to a question."""
    image: bytes = b""
    """An encoded image, in place of segments."""
    add_bos: Switch = "auto"
    add_eos: Switch = "auto"
    """Whether begin and end tokens are added; auto: as the tokenizer does it, and an end token
    always. A chat template has its own."""


@dataclass
class Example:
    """A tokenised record. `weight`: number of its terms in the summed loss."""

    input_ids: Sequence[int]
    loss_mask: Sequence[int] = ()
    token_type_ids: Sequence[int] = ()
    label: float = 0.0
    weight: int = 1
    truncated: bool = False
    reference: str = ""
    """What its prediction is compared with, where a label does not say it; the task's own text."""
    image: bytes = b""
    """An encoded image; `input_ids` then only say how many tokens the model makes of it."""


class TooLong(str):
    """Why a record gives no example: nothing that is learned is within `data.max_length`."""


@dataclass
class Batch:
    """One micro-batch. Positions and records without loss have target -100 (NaN in regression)."""

    inputs: dict[str, Tensor]
    targets: Tensor
    weight: int
    """Number of terms of the summed loss: learned tokens, or records."""
    tokens: int
    """Number of tokens without padding."""
    records: list[int] = field(default_factory=list)
    """Indices of the records in their data set."""
    sequences: list[int] = field(default_factory=list)
    """Number of records of each sequence, as a loader cuts them."""
    weights: list[int] = field(default_factory=list)
    """Terms of the summed loss of each example, where the task gives the loss of each."""
    documents: Documents | None = None
    """Where rows hold several records: which token belongs to which."""
    learned: tuple[Tensor, Tensor] | None = None
    """(rows, positions before) of the targets with a loss, where they are tokens: known beforehand,
    a GPU need not be waited for to count them."""

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """With `function` applied to every tensor."""
        inputs = {name: function(tensor) for name, tensor in self.inputs.items()}
        documents = None if self.documents is None else self.documents.map(function)
        learned = None
        if self.learned is not None:
            learned = (function(self.learned[0]), function(self.learned[1]))
        return replace(
            self,
            inputs=inputs,
            targets=function(self.targets),
            documents=documents,
            learned=learned,
        )  # fmt: skip

    def to(self, device: torch.device) -> "Batch":
        return self.map(lambda tensor: tensor.to(device))


class Task(ABC):
    """A task on one backbone and tokenizer."""

    Options: ClassVar[type[TaskOptions]]
    auto_class: ClassVar[Any]
    """The transformers auto class that builds the model."""
    peft_task_type: ClassVar[str | None] = None
    """PEFT's `task_type` in the exported adapter; None where PEFT has none."""
    pipeline_tag: ClassVar[str | None] = None
    """The hub's name of the task, in model cards; None where it has none."""

    def __init__(self, options: Any, tokenizer: "PreTrainedTokenizerBase"):
        self.options = options
        self.tokenizer = tokenizer
        candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
        self.pad_token_id: int = next((token for token in candidates if token is not None), 0)

    def learn_labels(self, labels: Sequence[str | float]) -> None:  # noqa: B027
        """Receive the training labels, once, before anything is encoded."""

    def labels_state(self) -> dict[str, list[str]]:
        """Result of `learn_labels`, saved in checkpoints."""
        return {}

    def load_labels_state(self, state: dict[str, list[str]]) -> None:  # noqa: B027
        """Inverse of `labels_state`, in place of `learn_labels`."""

    def remarks(self) -> list[str]:
        """Lines on what `learn_labels` found, for the terminal."""
        return []

    @classmethod
    def head_outputs(cls, labels_state: Mapping[str, list[str]]) -> int | None:
        """Outputs of the new head, which whoever loads the backbone has to give as `num_labels`;
        None without a new head."""
        return None

    def configure(self, config: "PretrainedConfig") -> None:  # noqa: B027
        """Set the task's fields of the model's configuration (number of labels, padding token)."""

    def check_model(self, model: "PreTrainedModel") -> None:  # noqa: B027
        """Raises UserError where the model, built on the meta device, cannot serve the task."""

    @classmethod
    def reads_documents(cls, model: "PreTrainedModel") -> bool:
        """Whether the records of a row have results of their own, of a task whose records may lie
        end to end."""
        return True

    def trained_modules(self, model: nn.Module) -> list[str]:
        """Paths of modules trained in full in addition to the adapters (a new head)."""
        return []

    @abstractmethod
    def encode(
        self, records: Sequence[Record], max_length: int
    ) -> Sequence[Example | list[Example] | str]:
        """For each record an example, truncated to `max_length` (`truncated` says so), or a list
        of several; or, as a string (`TooLong` where that is it), the reason why the record cannot
        be used."""

    @abstractmethod
    def collate(
        self, sequences: Sequence[Sequence[Example]], *, empty: bool = False, width: int = 0
    ) -> Batch:
        """One micro-batch; a sequence is one example, or several packed. `empty`: without loss;
        `width`: length of the rows, at least."""

    def parts(self, example: Example) -> dict[str, Sequence[int]]:
        """The tokens of each row that the model gets of an example alone, by the input's name; that
        in which `Batch.targets` lie is the last."""
        return {"input_ids": example.input_ids}

    def made_up(self, *rows: Sequence[int]) -> Example:
        """An example whose rows have these tokens, of which as many as can be are learned; a single
        one stands for all its rows."""
        (ids,) = rows
        typed = "token_type_ids" in self.tokenizer.model_input_names
        mask = [0, *[1] * (len(ids) - 1)]
        return Example(ids, mask, [0] * len(ids) if typed else (), weight=len(ids) - 1)

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """(summed loss in float32, predictions for `metrics` where the task has any)."""

    def scored(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """`loss` in an evaluation, and the summed loss of each example where the task knows it."""
        return *self.loss(model, batch), None

    def prompt_of(self, example: Example) -> tuple[list[int], list[int]]:
        """(what precedes the first learned token, the learned tokens that follow), of a task that
        generates text."""
        raise NotImplementedError

    def prompt_of_text(self, text: str, add_bos: Switch) -> list[int]:
        """A text to continue as tokens, of a task that generates text."""
        raise NotImplementedError

    def shape(self, batch: Batch) -> tuple[int, int]:
        """(rows, tokens) of a micro-batch's hidden states."""
        rows, tokens = batch.inputs["input_ids"].shape
        return rows, tokens

    def logits(self, output: Any) -> Tensor:
        """What the loss is made of in the model's output, (rows, …)."""
        return output.logits

    def scores_of_loss(self, loss: float) -> dict[str, float]:
        """Scores computed from the mean loss alone."""
        return {}

    def metrics(
        self, predictions: Sequence[Any], labels: Sequence[Any], records: Sequence[int]
    ) -> dict[str, float]:
        """Scores over the whole evaluation set, in the order of its examples; `labels`: the label
        of each, or its `reference`; `records`: the record of each."""
        return {}

    def answers(
        self, predictions: Sequence[Any], labels: Sequence[Any], records: Sequence[int]
    ) -> list[dict[str, Any]]:
        """What was answered to each record, given what `metrics` is given: its `id` (number in the
        set, from 0), `answer`, the right `label`, and `score`, as plain data."""
        return []


def new_heads(model: nn.Module) -> list[str]:
    """Paths of the modules beside the backbone, as a task with a head of its own has them."""
    return [
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix and any(True for _ in child.parameters())
    ]


@contextmanager
def without_cache(model: Any) -> Iterator[dict[str, bool]]:
    """Context in which the model fills no KV cache, to which a recomputed block, or one in a graph,
    would append again; yields what to hand it. By its configuration too: not all heads take
    `use_cache`, or hand it on to their decoder."""
    takes = "use_cache" in signature(type(model).forward).parameters
    config = model.config.get_text_config()
    fills = getattr(config, "use_cache", None)
    if fills:
        config.use_cache = False
    try:
        yield {"use_cache": False} if takes else {}
    finally:
        if fills:
            config.use_cache = fills


def pad(values: Sequence[int], width: int, filler: int) -> list[int]:
    """`values` padded on the right to `width`."""
    return [*values, *[filler] * (width - len(values))]
