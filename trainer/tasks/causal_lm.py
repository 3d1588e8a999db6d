"""Next-token prediction, with the loss on the completion only (or on all tokens)."""

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from trainer.errors import UserError
from trainer.tasks.base import IGNORED, Batch, Example, Record, Switch, Task, TooLong
from trainer.tasks.causality import attends_ahead
from trainer.tasks.chunked_cross_entropy import loss_head, loss_inside
from trainer.tasks.documents import Documents
from trainer.tasks.options import CausalLMOptions, TaskOptions
from trainer.tasks.text_rows import output_of
from trainer.tasks.tokenisation import special_tokens, surrounded, tokenise

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CausalLM(Task):
    """Fine-tune a decoder on text."""

    Options: ClassVar[type[TaskOptions]] = CausalLMOptions
    auto_class: ClassVar[Any] = AutoModelForCausalLM
    peft_task_type = "CAUSAL_LM"
    pipeline_tag = "text-generation"

    @property
    def learns_all(self) -> bool:
        """Whether prompts are learned too."""
        return self.options.loss_on == "all"

    def check_model(self, model: "PreTrainedModel") -> None:
        if attends_ahead(model):
            raise UserError(
                f"task.kind: {self.options.kind} given, but {type(model).__name__} is built as an "
                "encoder, which attends to the tokens to predict; accepted: a decoder, or another "
                "task.kind"
            )

    def encode(self, records: Sequence[Record], max_length: int) -> list[Example | str]:
        tokenised = tokenise(self.tokenizer, [record.segments for record in records], max_length)
        special = functools.cache(functools.partial(special_tokens, self.tokenizer))
        return [
            self._encode(record, *tokens, *special(record.add_bos, record.add_eos), max_length)
            for record, tokens in zip(records, tokenised, strict=True)
        ]

    def _encode(
        self, record: Record, ids: list[int], learned: list[int], before: list[int],
        after: list[int], max_length: int,
    ) -> Example | str:  # fmt: skip
        if self.learns_all:
            learned = [1] * len(ids)
        # Of a long text there is the beginning only; whether or not an end token is added.
        is_behind = len(ids) > max_length and _has_completion(record)
        is_empty = not any(learned)
        ids, learned = surrounded(ids, learned, before, after)
        if self.learns_all:
            learned = [1] * len(ids)
        if learned:
            learned[0] = 0  # the first token is not predicted
        if (is_empty or not any(learned)) and not is_behind:
            return "no token to learn: the completion is empty"
        truncated = len(ids) > max_length
        ids, learned = ids[:max_length], learned[:max_length]
        weight = sum(learned)
        if weight == 0:
            return TooLong(
                f"the prompt alone fills data.max_length ({max_length} tokens); "
                "data.truncate=prompt cuts its beginning"
            )
        return Example(ids, learned, weight=weight, truncated=truncated)

    def collate(
        self, sequences: Sequence[Sequence[Example]], *, empty: bool = False, width: int = 0
    ) -> Batch:
        examples = [example for packed in sequences for example in packed]
        tokens = sum(len(example.input_ids) for example in examples)
        longest = max(len(example.input_ids) for example in examples)
        width = max(width, *(sum(len(e.input_ids) for e in packed) for packed in sequences))
        ids = np.full((len(sequences), width), self.pad_token_id)
        targets = np.full(ids.shape, IGNORED)
        # Positions restart at 0 in every document. Padding is further documents, none longer than
        # the longest: some models scale all positions by the largest.
        positions = np.empty_like(ids)
        for row, packed in enumerate(sequences):
            end = 0
            for example in packed:
                start, end = end, end + len(example.input_ids)
                ids[row, start:end] = example.input_ids
                positions[row, start:end] = np.arange(end - start)
                learned = np.asarray(example.loss_mask, bool)
                targets[row, start:end][learned] = ids[row, start:end][learned]
            positions[row, end:] = np.arange(width - end) % longest
        if empty:
            targets[:] = IGNORED
        inputs, documents = {"input_ids": torch.from_numpy(ids)}, None
        if len(examples) > len(sequences):
            # Unpacked rows need no mask: padding is on the right, and a causal model does not
            # attend to it.
            inputs["position_ids"] = torch.from_numpy(positions)
            documents = Documents.of(inputs["position_ids"])
        weight = sum(example.weight for example in examples)
        figures = (0, 0) if empty else (weight, tokens)
        rows, before = (targets[:, 1:] != IGNORED).nonzero()
        return Batch(
            inputs, torch.from_numpy(targets), *figures, documents=documents,
            learned=(torch.from_numpy(rows), torch.from_numpy(before)),
            weights=[0 if empty else example.weight for example in examples],
        )  # fmt: skip

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
        return self.token_losses(model, batch).sum(), None

    def scored(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None, Tensor | None]:
        losses = self.token_losses(model, batch)
        each = torch.stack([part.sum() for part in losses.split(batch.weights)])
        return losses.sum(), None, each

    def token_losses(self, model: nn.Module, batch: Batch, right: Tensor | None = None) -> Tensor:
        """Cross entropy in float32 of each learned token, in order of rows and positions; `right`
        is filled with whether each is the most likely one."""
        targets = batch.targets[:, 1:]
        learned = targets != IGNORED if batch.learned is None else batch.learned
        head = loss_head(model)
        if head is not None:
            with loss_inside(model, head, learned, targets[learned], right):
                return output_of(model, batch, use_cache=False).logits
        logits = output_of(model, batch, use_cache=False).logits[:, :-1]
        # Selected before the cast: float32 logits only where there is a loss.
        logits = logits[learned].float()
        if right is not None:
            right.copy_(logits.argmax(-1) == targets[learned])
        return F.cross_entropy(logits, targets[learned], reduction="none")

    def prompt_of(self, example: Example) -> tuple[list[int], list[int]]:
        mask = [*example.loss_mask, 0]
        start = mask.index(1)
        end = mask.index(0, start)
        return list(example.input_ids[:start]), list(example.input_ids[start:end])

    def prompt_of_text(self, text: str, add_bos: Switch) -> list[int]:
        ((ids, _),) = tokenise(self.tokenizer, [[(text, False)]])
        before, _ = special_tokens(self.tokenizer, add_bos, False)
        return ids if ids[: len(before)] == before else [*before, *ids]

    def scores_of_loss(self, loss: float) -> dict[str, float]:
        return {"perplexity": math.exp(min(loss, 700.0))}


def _has_completion(record: Record) -> bool:
    return any(is_learned and part for part, is_learned in record.segments)
