"""Choose one of several texts by their likelihood: train on the right one, score all of them.

A record gives one example per choice, the question with the choice as its completion. The right
choice is learned: its tokens, or (`task.train_on: distribution`) that it is the right one,

    loss = −log softmax(ℓ)_right,   ℓ_c = log p(choice c | question), as it is or per byte

with the choices of a question as the documents of one row. In an evaluation a choice's score is ℓ,
as it is (`accuracy`) or per byte of the choice (`accuracy_norm`), which does not favour short
choices: `acc` and `acc_norm` of EleutherAI's harness.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from trainer.tasks.base import Batch, Example, Record, TooLong
from trainer.tasks.causal_lm import CausalLM
from trainer.tasks.options import MultipleChoiceOptions


@dataclass
class Choices(Batch):
    """A micro-batch of choices, in order of rows and positions."""

    tokens_of: list[int] = field(default_factory=list)
    """Learned tokens of each choice."""
    right: list[bool] = field(default_factory=list)
    """Whether each is the right one."""
    bytes_of: list[float] = field(default_factory=list)
    """Length of each choice's text."""


class MultipleChoice(CausalLM):
    """Fine-tune a decoder to give the right choice the highest likelihood."""

    Options = MultipleChoiceOptions
    learns_all = False

    def encode(self, records: Sequence[Record], max_length: int) -> list[Example | str]:
        """Each record is one choice; its label is whether it is the right one. A choice that does
        not fit loses the beginning of its question."""
        plain = [replace(record, add_eos=record.add_eos is True) for record in records]
        encoded = super().encode(plain, sys.maxsize)
        return [
            found if isinstance(found, str) else self._choice(found, record, max_length)
            for found, record in zip(encoded, records, strict=True)
        ]

    def _choice(self, example: Example, record: Record, max_length: int) -> Example | str:
        cut = len(example.input_ids) - max_length
        if cut > 0:
            if example.weight >= max_length:
                return TooLong(f"a choice alone fills data.max_length ({max_length} tokens)")
            ids, learned = example.input_ids[cut:], example.loss_mask[cut:]
            example = replace(example, input_ids=ids, loss_mask=learned, truncated=True)
        length = sum(len(text.strip().encode()) for text, learned in record.segments if learned)
        weight = example.weight if record.label else 0
        if self.options.train_on == "distribution":
            weight = min(weight, 1)
        return replace(example, label=float(length), weight=weight)

    def collate(
        self, sequences: Sequence[Sequence[Example]], *, empty: bool = False, width: int = 0
    ) -> Choices:
        batch = super().collate(sequences, empty=empty, width=width)
        examples = [example for packed in sequences for example in packed]
        tokens = [0 if empty else sum(example.loss_mask) for example in examples]
        return Choices(
            **vars(batch), tokens_of=tokens, right=[e.weight > 0 for e in examples],
            bytes_of=[example.label for example in examples],
        )  # fmt: skip

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """(loss of the right choices, (choices, 2): log-likelihood and whether it is the right
        one)"""
        assert isinstance(batch, Choices)
        losses = torch.stack([
            part.sum() for part in self.token_losses(model, batch).split(batch.tokens_of)
        ])  # fmt: skip
        right = torch.tensor(batch.right, device=losses.device)
        found = torch.stack([-losses.detach(), right.to(losses.dtype)], -1)
        if self.options.train_on == "answer" or not batch.sequences:  # not of a loader: a probe
            return losses[right].sum(), found
        return self._of_distribution(losses, right, batch), found

    def _of_distribution(self, losses: Tensor, right: Tensor, batch: Choices) -> Tensor:
        """Sum over the questions of −log softmax(ℓ)_right; 0 for an empty batch."""
        if not batch.weight:
            return losses.sum()
        scores = -losses
        if self.options.likelihood == "per_byte":
            scores = scores / scores.new_tensor(batch.bytes_of)
        questions = scores.split(batch.sequences)
        return torch.stack([one.logsumexp(0) for one in questions]).sum() - scores[right].sum()

    def scored(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None, None]:
        return *self.loss(model, batch), None

    def metrics(
        self, predictions: Sequence[Any], labels: Sequence[float], records: Sequence[int]
    ) -> dict[str, float]:
        """`accuracy`, `accuracy_norm`, and half the width of their 95 % intervals (normal
        approximation)."""
        questions = [choices for _, choices in _questions(predictions, labels, records)]
        number = len(questions)
        found = {
            name: sum(max(q, key=itemgetter(column))[2] for q in questions) / number
            for name, column in (("accuracy", 0), ("accuracy_norm", 1))
        }
        intervals = {
            f"{name}_interval": 1.96 * math.sqrt(share * (1 - share) / number)
            for name, share in found.items()
        }
        return found | intervals

    def answers(
        self, predictions: Sequence[Any], labels: Sequence[float], records: Sequence[int]
    ) -> list[dict[str, Any]]:
        """Numbers of choices, 1 or 0 as the score (as `accuracy` counts), and the log-likelihood of
        every choice."""
        found = []
        for record, choices in _questions(predictions, labels, records):
            likelihoods = [likelihood for likelihood, _, _ in choices]
            answer = likelihoods.index(max(likelihoods))
            label = [is_right for _, _, is_right in choices].index(1.0)
            found.append({
                "id": record, "answer": answer, "label": label, "score": float(answer == label),
                "log_likelihoods": likelihoods,
            })  # fmt: skip
        return found


def _questions(
    predictions: Sequence[Any], labels: Sequence[float], records: Sequence[int]
) -> Iterator[tuple[int, list[tuple[float, float, float]]]]:
    """(record, (log-likelihood, the same per byte, whether it is right) of each of its choices)"""
    rows = zip(records, predictions, labels, strict=True)
    for record, choices in groupby(rows, key=itemgetter(0)):
        yield record, [(score, score / length, right) for _, (score, right), length in choices]
