"""Extractive question answering: where in its context the answer to a question begins and ends.

A context that is too long is read in windows (Devlin et al., 2019): a record gives one example per
window, each with the whole question. A new head gives every token two scores, of being the first
and the last of the answer. The target of a window without the answer is its *null* token: the
classification token, or an end token where the tokenizer has none. `loss_mask` marks the target.

The answer to a question is the best span, by the sum of its two scores, over all of its windows.
With `task.no_answer` there is none where the null tokens' score, the least over the windows, is
larger by `task.null_threshold`.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForQuestionAnswering, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from trainer.errors import UserError
from trainer.tasks.base import (
    IGNORED,
    Batch,
    Example,
    Record,
    Task,
    TooLong,
    new_heads,
    without_cache,
)
from trainer.tasks.causality import attends_ahead
from trainer.tasks.options import QuestionAnsweringOptions
from trainer.tasks.squad_scores import squad_scores
from trainer.tasks.text_rows import ENCODERS, output_of, text_rows

Span = tuple[int, int]


@dataclass
class Windows(Batch):
    """A micro-batch of windows; places of tokens are counted from the start of their window."""

    contexts: Tensor = field(default_factory=lambda: torch.empty(0, 2, dtype=torch.long))
    """(windows, 2): the first token of the context and the one after its last."""
    nulls: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    """(windows): the token that stands for no answer."""

    def map(self, function: Callable[[Tensor], Tensor]) -> "Windows":
        mapped = super().map(function)
        assert isinstance(mapped, Windows)
        return replace(mapped, contexts=function(self.contexts), nulls=function(self.nulls))


class QuestionAnswering(Task):
    """The span of the context that answers a question, by a new head."""

    Options = QuestionAnsweringOptions
    auto_class = AutoModelForQuestionAnswering
    peft_task_type = None  # PEFT's class for QUESTION_ANS (0.21) would drop token_type_ids
    pipeline_tag = "question-answering"

    def __init__(self, options: Any, tokenizer: Any):
        super().__init__(options, tokenizer)
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"task.kind: question_answering given with {type(tokenizer).__name__}, which does "
                "not say where its tokens are in a text; accepted: a model with a fast tokenizer"
            )

    @classmethod
    def head_outputs(cls, labels_state: Any) -> int:
        return 2

    def configure(self, config: PretrainedConfig) -> None:
        config.num_labels = 2

    def check_model(self, model: Any) -> None:
        if not isinstance(getattr(model, "qa_outputs", None), nn.Linear):
            raise UserError(
                f"task.kind: question_answering given, but {type(model).__name__} does not score "
                "tokens by a layer qa_outputs; accepted: a model that does"
            )

    @classmethod
    def reads_documents(cls, model: Any) -> bool:
        """Of decoders, and of the encoders that were tried: the head scores every position."""
        kind = model.config.model_type
        if model.config.is_encoder_decoder:
            return False
        decodes = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not attends_ahead(model)
        return decodes or kind in ENCODERS

    def trained_modules(self, model: nn.Module) -> list[str]:
        return new_heads(model)

    def encode(
        self, records: Sequence[Record], max_length: int
    ) -> list[Example | list[Example] | str]:
        """The windows of each record; `reference` holds the text, its answers, and where in it the
        window's tokens are."""
        if not records:  # the tokenizer refuses an empty list
            return []
        # Where the tokenizer puts nothing between two texts, a line ends.
        between = "" if self.tokenizer.sep_token is not None else "\n"
        questions = [record.segments[0][0].strip() + between for record in records]
        contexts = [record.segments[1][0] for record in records]
        found = self.tokenizer(
            questions, contexts, return_offsets_mapping=True, return_attention_mask=False,
            verbose=False,
        )  # fmt: skip
        encoded: list[Example | list[Example] | str] = []
        for index, record in enumerate(records):
            if not record.answers and not self.options.no_answer:
                encoded.append("no answer; accepted: one, or task.no_answer=true")
                continue
            places = [at for at, text in enumerate(found.sequence_ids(index)) if text == 1]
            if not places:
                encoded.append("context: no text")
                continue
            row = {key: found[key][index] for key in found}
            encoded.append(self._windows(record, row, (places[0], places[-1] + 1), max_length))
        return encoded

    def _windows(
        self, record: Record, row: dict[str, list], context: Span, max_length: int
    ) -> list[Example] | str:
        """`context`: its tokens in the tokenised `row`."""
        ids, offsets = row["input_ids"], row["offset_mapping"]
        types = row.get("token_type_ids") or [0] * len(ids)
        first, end = context
        before, after, types_after = ids[:first], ids[end:], types[end:]
        null = self._null(before, after)
        if null is None:
            after, types_after = [*after, self._end()], [*types_after, types[end - 1]]
            null = -1
        room = max_length - len(before) - len(after)
        if room <= self.options.stride and room < end - first:
            return TooLong(
                f"beside the question there is room for {max(room, 0)} tokens of the context, and "
                f"windows share {self.options.stride} (task.stride); accepted: shorter questions, "
                f"or a higher data.max_length ({max_length})"
            )
        windows = []
        for start, stop in _spans(first, end, room, self.options.stride):
            part = [*before, *ids[start:stop], *after]
            spans = offsets[start:stop]
            marked = [0] * len(part)
            target = _answer(record.answers, spans)
            if target is None:
                marked[null] = 1
            else:
                marked[first + target[0] : first + target[1]] = [1] * (target[1] - target[0])
            reference = {
                "context": record.segments[1][0], "answers": [text for text, _ in record.answers],
                "spans": spans, "first": first, "null": null % len(part),
            }  # fmt: skip
            windows.append(
                Example(
                    part,
                    loss_mask=marked,
                    token_type_ids=[*types[:first], *types[start:stop], *types_after]
                    if "token_type_ids" in row
                    else (),
                    reference=json.dumps(reference, ensure_ascii=False, separators=(",", ":")),
                )
            )
        return windows

    def _null(self, before: list[int], after: list[int]) -> int | None:
        """The place of the classification token in a window, from its end where negative."""
        token = self.tokenizer.cls_token_id
        if token is None:
            return None
        if token in before:
            return before.index(token)
        return after.index(token) - len(after) if token in after else None

    def _end(self) -> int:
        """The token that stands for no answer where there is none for classification: an end, from
        which a decoder sees everything."""
        end = self.tokenizer.eos_token_id
        return self.pad_token_id if end is None else end

    def collate(
        self, sequences: Sequence[Sequence[Example]], *, empty: bool = False, width: int = 0
    ) -> Windows:
        """Rows of one window each, or a single row of several."""
        examples = [example for packed in sequences for example in packed]
        lengths = [len(example.input_ids) for example in examples]
        inputs, documents = text_rows(sequences, width, self.pad_token_id)
        targets = [
            (IGNORED, IGNORED) if empty else _marked(example.loss_mask) for example in examples
        ]
        contexts, nulls = [], []
        for example, length in zip(examples, lengths, strict=True):
            known = json.loads(example.reference) if example.reference else None
            first, count = (known["first"], len(known["spans"])) if known else (0, length)
            contexts.append((first, first + count))
            nulls.append(known["null"] if known else 0)
        weight, tokens = (0, 0) if empty else (len(examples), sum(lengths))
        return Windows(
            inputs, torch.tensor(targets), weight, tokens, documents=documents,
            contexts=torch.tensor(contexts), nulls=torch.tensor(nulls),
        )  # fmt: skip

    def logits(self, output: Any) -> Tensor:
        return torch.stack([output.start_logits, output.end_logits], -1)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """(Σ ½ (H(first) + H(last)) over windows, (windows, 4): first and last token of the best
        span, its score, the null token's)"""
        assert isinstance(batch, Windows)
        scores = self._token_scores(model, batch)
        # The tokens are the classes.
        loss = F.cross_entropy(scores, batch.targets, reduction="sum", ignore_index=IGNORED) / 2
        return loss, self._best(scores.detach(), batch)

    def _token_scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """(windows, tokens, 2) in float32, from the start of each window; −inf behind its end."""
        with without_cache(model) as arguments:
            output, documents = output_of(model, batch, **arguments), batch.documents
        scores = self.logits(output).float()
        if documents is None:
            behind = batch.inputs["attention_mask"] == 0
        else:
            ends = documents.boundaries[: len(batch.targets) + 1].long().unsqueeze(1)
            places = ends[:-1] + torch.arange(documents.longest, device=ends.device)
            behind = places >= ends[1:]
            scores = scores[0, places.clamp(max=scores.shape[1] - 1)]
        return scores.masked_fill(behind[..., None], -torch.inf)

    def _best(self, scores: Tensor, batch: Windows) -> Tensor:
        """The best span of each window, of first + last token's score, among those in the context
        that are not too long; and the null token's score."""
        rows, width, _ = scores.shape
        places = torch.arange(width, device=scores.device)
        outside = (places < batch.contexts[:, :1]) | (places >= batch.contexts[:, 1:])
        inside = scores.masked_fill(outside[..., None], -torch.inf)
        length = min(self.options.max_answer_length, width)
        last = F.pad(inside[..., 1], (0, length - 1), value=-torch.inf).unfold(1, length, 1)
        best, at = (inside[..., 0, None] + last).flatten(1).max(1)
        first = at // length
        row = torch.arange(rows, device=scores.device)
        null = scores[row, batch.nulls].sum(-1)
        return torch.stack([first.to(best), (first + at % length).to(best), best, null], 1)

    def metrics(
        self, predictions: Sequence[Any], labels: Sequence[str], records: Sequence[int]
    ) -> dict[str, float]:
        """Exact match and F1 of the records' answers, in percent (`squad_scores.py`)."""
        found = list(self._found(predictions, labels, records))
        return self._scores([text for _, text, _ in found], [given for *_, given in found])

    def answers(
        self, predictions: Sequence[Any], labels: Sequence[str], records: Sequence[int]
    ) -> list[dict[str, Any]]:
        """Texts, all that are right as the label, and F1 in percent as the score."""
        return [
            {
                "id": record, "answer": text, "label": given,
                "score": self._scores([text], [given])["f1"],
            }
            for record, text, given in self._found(predictions, labels, records)
        ]  # fmt: skip

    def _found(
        self, predictions: Sequence[Any], labels: Sequence[str], records: Sequence[int]
    ) -> Iterator[tuple[int, str, list[str]]]:
        """(record, its predicted answer, those that are right)"""
        windows = zip(records, predictions, map(json.loads, labels), strict=True)
        for record, of_record in groupby(windows, key=lambda window: window[0]):
            found = [(prediction, window) for _, prediction, window in of_record]
            yield record, self.answer(found), found[0][1]["answers"]

    def _scores(self, texts: list[str], answers: list[list[str]]) -> dict[str, float]:
        return squad_scores(texts, answers, no_answer=self.options.no_answer)

    def answer(self, windows: Sequence[tuple[Sequence[float], dict[str, Any]]]) -> str:
        """The answer by the (prediction, reference) of a record's windows; "" is none."""
        (first, last, best, _), window = max(windows, key=lambda found: found[0][2])
        null = min(prediction[3] for prediction, _ in windows)
        if self.options.no_answer and null - best > self.options.null_threshold:
            return ""
        spans, shift = window["spans"], window["first"]
        start, end = spans[int(first) - shift][0], spans[int(last) - shift][1]
        return window["context"][start:end].strip()


def _spans(first: int, end: int, room: int, stride: int) -> Iterator[Span]:
    """The windows of `room` tokens of a context, of which each shares `stride` with the next."""
    while True:
        yield first, min(first + room, end)
        if first + room >= end:
            return
        first += room - stride


def _answer(answers: Iterable[tuple[str, int]], spans: Sequence[Span]) -> Span | None:
    """The window's tokens that hold the first answer: [from, to); None where it is not within."""
    for text, start in answers:
        # Tokens may leave out the spaces around them.
        end = start + len(text.rstrip())
        start += len(text) - len(text.lstrip())
        if start < spans[0][0] or end > spans[-1][1]:
            return None
        inside = [at for at, (a, b) in enumerate(spans) if a < end and b > start]
        return (inside[0], inside[-1] + 1) if inside else None
    return None


def _marked(mask: Sequence[int]) -> Span:
    """The first and the last token that `loss_mask` marks; none in a made-up window of one."""
    at = [index for index, learned in enumerate(mask) if learned]
    return (at[0], at[-1]) if at else (IGNORED, IGNORED)
