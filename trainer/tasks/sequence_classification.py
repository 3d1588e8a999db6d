"""Classify one text or a pair, or predict a number for it; the new head is trained in full."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PretrainedConfig

from trainer.errors import UserError
from trainer.tasks.base import (
    IGNORED,
    Batch,
    Example,
    Record,
    Task,
    new_heads,
    without_cache,
)
from trainer.tasks.causality import attends_ahead
from trainer.tasks.long_texts import beginning, bounded, truncated_pair
from trainer.tasks.options import SequenceClassificationOptions, TaskOptions
from trainer.tasks.text_rows import ENCODERS, output_of, text_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHOWN = 10
"""Labels that are printed, at most."""


class SequenceClassification(Task):
    """Classification or regression of one or two texts, by a new head."""

    Options: ClassVar[type[TaskOptions]] = SequenceClassificationOptions
    auto_class: ClassVar[Any] = AutoModelForSequenceClassification
    peft_task_type: ClassVar[str | None] = "SEQ_CLS"
    pipeline_tag: ClassVar[str | None] = "text-classification"
    labels: list[str] = []
    labels_are_unique = False
    """Every label was that of one training record."""

    @property
    def is_regression(self) -> bool:
        return self.options.problem == "regression"

    def learn_labels(self, labels: Sequence[str | float]) -> None:
        if self.is_regression:
            return
        names = {str(label) for label in labels}
        self.labels = sorted(names, key=_sort_key)
        self.labels_are_unique = len(names) == len(labels) > 2
        if len(self.labels) < 2:
            raise UserError(
                f"data.label: one label only in the training data ({', '.join(self.labels)}); "
                "accepted: two or more, or task.problem=regression"
            )

    def remarks(self) -> list[str]:
        shown = [repr(name) for name in self.labels[:SHOWN]]
        rest = ["…"] if len(self.labels) > SHOWN else []
        line = f"{len(self.labels)} labels: {', '.join(shown + rest)}"
        if self.labels_are_unique and hasattr(self.options, "problem"):
            line += ", each of one record (numbers to predict: task.problem=regression)"
        return [line] if shown else []

    def labels_state(self) -> dict[str, list[str]]:
        return {} if self.is_regression else {"labels": self.labels}

    def load_labels_state(self, state: dict[str, list[str]]) -> None:
        self.labels = state.get("labels", [])

    @classmethod
    def head_outputs(cls, labels_state: Mapping[str, list[str]]) -> int:
        return len(labels_state.get("labels", ())) or 1  # regression

    def configure(self, config: PretrainedConfig) -> None:
        config.problem_type = "regression" if self.is_regression else "single_label_classification"
        if self.is_regression:
            config.num_labels = 1
        else:
            config.id2label = dict(enumerate(self.labels))
            config.label2id = {name: index for index, name in enumerate(self.labels)}
        text = config.get_text_config()  # of a multimodal model, else the configuration itself
        if getattr(text, "pad_token_id", None) is None:
            text.pad_token_id = self.pad_token_id
        self.pad_token_id = text.pad_token_id  # by which the model finds the last token

    @classmethod
    def reads_documents(cls, model: "PreTrainedModel") -> bool:
        """Where the head is a `score` of every position, of which the model takes the last one's
        (decoders), or reads the first position of what its encoder returns."""
        if attends_ahead(model):
            return model.config.model_type in ENCODERS
        return isinstance(getattr(model, "score", None), nn.Linear)

    def trained_modules(self, model: nn.Module) -> list[str]:
        return new_heads(model)

    def encode(self, records: Sequence[Record], max_length: int) -> list[Example | str]:
        return [self._encode(record, max_length) for record in records]

    def _encode(self, record: Record, max_length: int) -> Example | str:
        texts = [text for text, _ in record.segments]
        try:
            label = self._label(record.label)
        except ValueError as error:
            return str(error)
        if self.tokenizer.sep_token is None:  # separated by a newline
            texts = ["\n".join(texts)]
        if len(texts) == 1:
            texts = [beginning(self.tokenizer, texts[0], max_length)]
        else:  # which of a pair is cut first depends on both lengths
            texts = [bounded(self.tokenizer, text, max_length) for text in texts]
        encoded = self.tokenizer(*texts)
        ids, types = encoded["input_ids"], encoded.get("token_type_ids", ())
        truncated = len(ids) > max_length
        if truncated and len(texts) == 2 and all(texts) and self.tokenizer.is_fast:
            found = truncated_pair(self.tokenizer, texts[0], texts[1], max_length)
            ids, types = found.ids, found.type_ids if types else ()
        elif truncated:
            encoded = self.tokenizer(*texts, truncation="longest_first", max_length=max_length)
            ids, types = encoded["input_ids"], encoded.get("token_type_ids", ())
        if not ids:
            return "no text"
        return Example(ids, token_type_ids=types, label=label, truncated=truncated)

    def _label(self, raw: str | float | None) -> float:
        if self.is_regression:
            try:
                value = float(raw)  # type: ignore[arg-type]
            except (TypeError, ValueError):
                value = float("nan")
            if value != value or value in (float("inf"), float("-inf")):
                raise ValueError(f"label {raw!r}: no number")
            return value
        if str(raw) not in self.labels:
            raise ValueError(f"label {raw!r}: not in the training data ({', '.join(self.labels)})")
        return float(self.labels.index(str(raw)))

    def collate(
        self, sequences: Sequence[Sequence[Example]], *, empty: bool = False, width: int = 0
    ) -> Batch:
        """Rows of one example each, or a single row of several."""
        examples = [example for packed in sequences for example in packed]
        inputs, documents = text_rows(sequences, width, self.pad_token_id)
        labels = [example.label for example in examples]
        if self.is_regression:
            targets = torch.tensor([float("nan")] * len(labels) if empty else labels)
        else:
            targets = torch.tensor([IGNORED if empty else int(label) for label in labels])
        tokens = 0 if empty else sum(len(example.input_ids) for example in examples)
        weights = [int(not empty)] * len(examples)
        return Batch(
            inputs, targets, sum(weights), tokens, weights=weights, documents=documents
        )  # fmt: skip

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = _logits(model, batch)
        if self.is_regression:
            predicted = logits.squeeze(-1)
            error = torch.where(batch.targets.isnan(), 0.0, predicted - batch.targets)
            return error.square().sum(), predicted.detach()
        loss = F.cross_entropy(logits, batch.targets, reduction="sum", ignore_index=IGNORED)
        return loss, logits.detach().argmax(-1)

    def scored(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None, Tensor | None]:
        logits = _logits(model, batch)
        if self.is_regression:
            predicted = logits.squeeze(-1)
            error = torch.where(batch.targets.isnan(), 0.0, predicted - batch.targets)
            return error.square().sum(), predicted, error.square()
        each = F.cross_entropy(logits, batch.targets, reduction="none", ignore_index=IGNORED)
        return each.sum(), logits.argmax(-1), each

    def metrics(
        self, predictions: Sequence[Any], labels: Sequence[float], records: Sequence[int] = ()
    ) -> dict[str, float]:
        """Accuracy, F1 (of label 1 where there are two, else macro), Matthews; or correlations."""
        if self.is_regression:
            from scipy import stats  # takes a second to import

            constant = len(set(predictions)) < 2 or len(set(labels)) < 2
            nan = float("nan")  # a constant has no correlation
            return {
                "pearson": nan if constant else float(stats.pearsonr(predictions, labels)[0]),
                "spearman": nan if constant else float(stats.spearmanr(predictions, labels)[0]),
            }
        from sklearn import metrics as scores  # takes two seconds to import

        truth, guess = [int(label) for label in labels], [int(p) for p in predictions]
        average = "binary" if len(self.labels) == 2 else "macro"
        return {
            "accuracy": float(scores.accuracy_score(truth, guess)),
            "f1": float(scores.f1_score(truth, guess, average=average, zero_division=0)),
            "matthews": float(scores.matthews_corrcoef(truth, guess)),
        }

    def answers(
        self, predictions: Sequence[Any], labels: Sequence[float], records: Sequence[int]
    ) -> list[dict[str, Any]]:
        """Names of labels and 1 or 0 as the score; or numbers, and the squared error."""
        rows = zip(records, predictions, labels, strict=True)
        if self.is_regression:
            return [
                {"id": record, "answer": guess, "label": label, "score": (guess - label) ** 2}
                for record, guess, label in rows
            ]
        return [
            {
                "id": record, "answer": self.labels[int(guess)],
                "label": self.labels[int(label)], "score": float(guess == label),
            }
            for record, guess, label in rows
        ]  # fmt: skip


def _logits(model: Any, batch: Batch) -> Tensor:
    """(records, labels) in float32."""
    if batch.documents is None:
        with without_cache(model) as arguments:
            return output_of(model, batch, **arguments).logits.float()
    ends = batch.documents.boundaries[: len(batch.targets) + 1].long()
    scored = hasattr(model, "score")
    reads = _scores_at(model, ends[1:] - 1) if scored else _reads_at(model, ends[:-1])
    with reads, without_cache(model) as arguments:
        return output_of(model, batch, **arguments).logits.float()


@contextmanager
def _scores_at(model: Any, positions: Tensor) -> Iterator[None]:
    """Within this context the model's logits are those of these positions of its only row. The
    model is called as a whole, since engines gather weights by what they hook there."""
    scores: list[Tensor] = []

    def keep(head: nn.Module, inputs: Any, output: Tensor) -> None:
        scores.append(output[0, positions])

    def exchange(model: nn.Module, inputs: Any, output: Any) -> None:
        output.logits = scores.pop()

    handles = [
        model.score.register_forward_hook(keep),
        model.register_forward_hook(exchange, prepend=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _reads_at(model: Any, positions: Tensor) -> Iterator[None]:
    """Within this context what reads the first position of an encoder's rows reads these positions
    of its only row: the pooler, or what follows the encoder."""

    def begin(hidden: Tensor) -> Tensor:
        return hidden[0, positions].unsqueeze(1)  # rows of one position each

    def exchange(encoder: nn.Module, inputs: Any, output: Any) -> None:
        output.last_hidden_state = begin(output.last_hidden_state)

    encoder = model.base_model
    handles = [encoder.register_forward_hook(exchange)]
    if (pooler := getattr(encoder, "pooler", None)) is not None:
        handles += [pooler.register_forward_pre_hook(lambda _, inputs: (begin(inputs[0]),))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _sort_key(name: str) -> tuple[bool, int, str]:
    """Integers by value, then all other names; a total order."""
    is_integer = re.fullmatch(r"-?[0-9]{1,18}", name) is not None
    return not is_integer, int(name) if is_integer else 0, name
