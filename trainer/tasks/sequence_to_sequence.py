"""An encoder reads the source, a decoder learns the target (T5, BART): summaries, translations.

What a record does not learn is its source, what it learns its target. An example holds the tokens
of both, one behind the other; its loss mask says where the target begins. The decoder's row is the
model's start token and the target, so that its loss is that of a causal model.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from inspect import signature
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM

from trainer.errors import UserError, first_line
from trainer.tasks.base import IGNORED, Batch, Example, Record, Switch, TooLong, pad
from trainer.tasks.causal_lm import CausalLM
from trainer.tasks.options import SequenceToSequenceOptions
from trainer.tasks.tokenisation import affixes, special_tokens, surrounded, tokenise

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_ANY = 2**31  # tokens: no limit
SOURCE, TARGET = "input_ids", "decoder_input_ids"
"""The model's inputs."""


@dataclass
class Pairs(Batch):
    """A micro-batch of sources and targets."""

    counts: list[int] = field(default_factory=list)
    """Learned tokens of each target."""


class SequenceToSequence(CausalLM):
    """Fine-tune an encoder-decoder on pairs of texts; each target token is learned from those
    before it (teacher forcing)."""

    Options = SequenceToSequenceOptions
    auto_class: ClassVar[Any] = AutoModelForSeq2SeqLM
    peft_task_type = "SEQ_2_SEQ_LM"
    start: int | None = None
    """The token before every target, the model's."""

    def configure(self, config: "PretrainedConfig") -> None:
        if not config.is_encoder_decoder:
            raise UserError(
                f"task.kind: sequence_to_sequence given, but {config.model_type} has no encoder "
                "beside a decoder; accepted: an encoder-decoder, or another task.kind"
            )
        if config.model_type == "prophetnet":
            raise UserError(
                "task.kind: sequence_to_sequence given, but what prophetnet predicts also depends "
                "on how long its target's row is; accepted: another encoder-decoder"
            )
        for key in ("encoder_layerdrop", "decoder_layerdrop"):
            if getattr(config, key, None):  # all ranks gather the same blocks
                setattr(config, key, 0.0)

    def check_model(self, model: "PreTrainedModel") -> None:
        name = type(model).__name__
        taken = signature(type(model).forward).parameters
        if not {SOURCE, "attention_mask", TARGET} <= taken.keys():
            raise UserError(
                f"task.kind: sequence_to_sequence given, but {name} does not take the tokens of a "
                "source and a target; accepted: an encoder-decoder for text"
            )
        try:
            self.start = self._start(model)
        except ValueError as error:
            raise UserError(
                f"model.id: {name}: no token to start a target with ({first_line(error)}); "
                "accepted: a config.json with decoder_start_token_id"
            ) from error

    def _start(self, model: Any) -> int:
        """What the model itself puts before labels. Raises ValueError."""
        shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        if shift is None:
            start = getattr(model.config, "decoder_start_token_id", None)
            if start is None:
                raise ValueError("decoder_start_token_id is null")
            return start
        labels = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
        shifted = shift(labels)
        first, second = shifted[:, 0].tolist()
        if not torch.equal(shifted[:, 1:], labels[:, :-1]):
            raise ValueError("it does not shift its labels by one")
        if first == second:
            return first
        after = self._around_targets("auto", "auto")[1]  # mBART: the language, which is last there
        if [first, second] != labels[:, -1].tolist() or not after:
            raise ValueError("it depends on the labels")
        return after[-1]

    # --- encoding

    def encode(self, records: Sequence[Record], max_length: int) -> list[Example | str]:
        parted = [_parted(record) for record in records]
        pairs = [found for found in parted if not isinstance(found, str)]
        around_source = affixes(self.tokenizer)
        around_targets = cache(self._around_targets)
        limit = self.options.max_target_length
        sources = iter(self._tokens([source for source, _ in pairs], max_length))
        with _as_targets(self.tokenizer):
            targets = iter(self._tokens([target for _, target in pairs], limit))
        return [
            found
            if isinstance(found, str)
            else self._example(
                surrounded(next(sources), [], *around_source)[0],
                surrounded(next(targets), [], *around_targets(record.add_bos, record.add_eos))[0],
                len(around_source[1]),
                max_length,
            )
            for record, found in zip(records, parted, strict=True)
        ]

    def _tokens(self, texts: Sequence[str], first: int) -> list[list[int]]:
        """Token ids without special ones, of a long text its beginning (`tokenise`)."""
        return [ids for ids, _ in tokenise(self.tokenizer, [[(t, True)] for t in texts], first)]

    def _around_targets(self, add_bos: Any, add_eos: Any) -> tuple[list[int], list[int]]:
        with _as_targets(self.tokenizer):
            return special_tokens(self.tokenizer, add_bos, add_eos)

    def _example(
        self, source: list[int], target: list[int], after: int, max_length: int
    ) -> Example | str:
        """A source that is cut keeps the `after` special tokens behind it, as the encoder knows
        it; a target that is cut has no end to learn."""
        limit = self.options.max_target_length
        if after >= max_length:
            return TooLong(f"special tokens alone fill data.max_length ({max_length} tokens)")
        truncated = len(source) > max_length or len(target) > limit
        if len(source) > max_length:
            source = source[: max_length - after] + source[len(source) - after :]
        target = target[:limit]
        mask = [0] * len(source) + [1] * len(target)
        return Example(source + target, mask, weight=len(target), truncated=truncated)

    def prompt_of_text(self, text: str, add_bos: Switch) -> list[int]:
        (ids,) = self._tokens([text], _ANY)
        return surrounded(ids, [], *affixes(self.tokenizer))[0]

    # --- batches

    def parts(self, example: Example) -> dict[str, Sequence[int]]:
        assert self.start is not None, "no model yet"
        ids, begin = list(example.input_ids), len(example.input_ids) - sum(example.loss_mask)
        return {SOURCE: ids[:begin], TARGET: [self.start, *ids[begin:]]}

    def made_up(self, *rows: Sequence[int]) -> Example:
        source, (_, *target) = rows[0], rows[-1]
        ids, mask = [*source, *target], [0] * len(source) + [1] * len(target)
        return Example(ids, mask, weight=len(target))

    def collate(
        self, sequences: Sequence[Sequence[Example]], *, empty: bool = False, width: int = 0
    ) -> Batch:
        """Sources and targets are each padded to the longest; rows have no common `width`."""
        parts = [self.parts(packed[0]) for packed in sequences]
        inputs = {}
        for name in (SOURCE, TARGET):
            rows = [part[name] for part in parts]
            longest = max(map(len, rows))
            inputs[name] = torch.tensor([pad(row, longest, self.pad_token_id) for row in rows])
        # Padding is on the right, and a decoder does not attend to it.
        inputs["attention_mask"] = _lengths_mask([len(part[SOURCE]) for part in parts])
        learned = _lengths_mask([len(part[TARGET]) for part in parts]).bool()
        learned[:, 0] = False
        targets = inputs[TARGET].masked_fill(~learned | empty, IGNORED)
        tokens = sum(len(row) for part in parts for row in part.values()) - len(parts)
        counts = [0 if empty else len(part[TARGET]) - 1 for part in parts]
        of_row, before = (targets[:, 1:] != IGNORED).nonzero(as_tuple=True)
        return Pairs(
            inputs, targets, sum(counts), 0 if empty else tokens, learned=(of_row, before),
            counts=counts,
        )  # fmt: skip

    def shape(self, batch: Batch) -> tuple[int, int]:
        """Of the decoder's, in which the targets lie."""
        rows, tokens = batch.inputs[TARGET].shape
        return rows, tokens

    # --- loss

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Without gradients also (rows, 2): the tokens that would be right with the target given,
        and all learned ones."""
        if torch.is_grad_enabled():
            return super().loss(model, batch)
        assert isinstance(batch, Pairs)
        right = torch.zeros(batch.weight, dtype=torch.bool, device=batch.targets.device)
        loss = self.token_losses(model, batch, right).sum()
        by_row = torch.stack([part.sum() for part in right.split(batch.counts)])
        return loss, torch.stack([by_row, by_row.new_tensor(batch.counts)], -1)

    def scored(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None, None]:
        return *self.loss(model, batch), None

    def metrics(
        self, predictions: Sequence[Any], labels: Sequence[float], records: Sequence[int]
    ) -> dict[str, float]:
        """`token_accuracy`, of all target tokens."""
        right, count = (sum(column) for column in zip(*predictions, strict=True))
        return {"token_accuracy": right / count}

    def answers(
        self, predictions: Sequence[Any], labels: Sequence[Any], records: Sequence[int]
    ) -> list[dict[str, Any]]:
        """How many target tokens are right, of how many; their share is the score."""
        return [
            {"id": record, "answer": right, "label": count, "score": right / count}
            for record, (right, count) in zip(records, predictions, strict=True)
        ]


def _parted(record: Record) -> tuple[str, str] | str:
    """(source, target) of a record, or why it has none."""
    begins = next((i for i, (_, learned) in enumerate(record.segments) if learned), None)
    if begins is None or not all(learned for _, learned in record.segments[begins:]):
        return "several learned texts, or none; accepted: a prompt and its completion"
    source, target = (
        "".join(text for text, _ in part)
        for part in (record.segments[:begins], record.segments[begins:])
    )
    if not source:
        return "no token to read: the prompt is empty"
    return (source, target) if target else "no token to learn: the completion is empty"


@contextmanager
def _as_targets(tokenizer: Any) -> Iterator[None]:
    """Within this context a tokenizer of several languages reads texts as targets."""
    if not hasattr(tokenizer, "_switch_to_target_mode"):
        yield
        return
    before, tokenizer._in_target_context_manager = tokenizer._in_target_context_manager, True
    tokenizer._switch_to_target_mode()
    try:
        yield
    finally:
        tokenizer._in_target_context_manager = before
        tokenizer._switch_to_input_mode()


def _lengths_mask(lengths: Sequence[int]) -> Tensor:
    """(rows, longest): 1 at a row's tokens."""
    return (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)).long()
