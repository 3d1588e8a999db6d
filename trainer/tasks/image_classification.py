"""Classify images by a new head, which is trained in full.

An example is an encoded image; the model's own processor makes pixels of it when a micro-batch is
put together. `input_ids` only say how many tokens the model makes of it.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, PretrainedConfig

from trainer.tasks.base import IGNORED, Batch, Example, Record
from trainer.tasks.options import ImageClassificationOptions
from trainer.tasks.sequence_classification import SequenceClassification


class ImageClassification(SequenceClassification):
    """Labels, head and scores are those of classified texts."""

    Options = ImageClassificationOptions
    auto_class = AutoModelForImageClassification
    peft_task_type = None
    tokenizer: Any  # an ImageProcessor

    @property
    def is_regression(self) -> bool:
        return False

    def configure(self, config: PretrainedConfig) -> None:
        config.problem_type = "single_label_classification"
        config.id2label = dict(enumerate(self.labels))
        config.label2id = {name: index for index, name in enumerate(self.labels)}

    def encode(self, records: Sequence[Record], max_length: int) -> list[Example | str]:
        return [self._encode(record, max_length) for record in records]

    def _encode(self, record: Record, max_length: int) -> Example | str:
        try:
            label = self._label(record.label)
        except ValueError as error:
            return str(error)
        return Example([0] * self.tokenizer.tokens, label=label, image=record.image)

    def collate(
        self, sequences: Sequence[Sequence[Example]], *, empty: bool = False, width: int = 0
    ) -> Batch:
        examples = [packed[0] for packed in sequences]
        pixels = self.tokenizer([example.image for example in examples])
        targets = [IGNORED if empty else int(example.label) for example in examples]
        weight = 0 if empty else len(examples)
        return Batch(
            {"pixel_values": pixels}, torch.tensor(targets), weight, weight * self.tokenizer.tokens
        )

    def shape(self, batch: Batch) -> tuple[int, int]:
        return len(batch.targets), self.tokenizer.tokens

    def scored(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return *self.loss(model, batch), None

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = model(**batch.inputs).logits.float()
        loss = F.cross_entropy(logits, batch.targets, reduction="sum", ignore_index=IGNORED)
        return loss, logits.detach().argmax(-1)
