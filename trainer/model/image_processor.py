"""The image processor of a model, in the place that a tokenizer has in the other tasks."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainer.config.config import Config
from trainer.config.sections import ModelOptions
from trainer.errors import UserError, first_line
from trainer.model.hub import load_model_config, load_tokenizer, resolve_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_processor(config: Config) -> "PreTrainedTokenizerBase | Any":
    """The tokenizer, or for a task on images an `ImageProcessor`. Raises UserError."""
    if config.task.reads_images:
        return ImageProcessor(config.model)
    return load_tokenizer(config.model)


class ImageProcessor:
    """transformers' image processor of a model. To whoever asks for tokens it is a tokenizer
    without any."""

    pad_token_id = eos_token_id = bos_token_id = unk_token_id = sep_token_id = None
    chat_template = None
    model_input_names = ("pixel_values",)
    all_special_ids: tuple[int, ...] = ()
    added_tokens_decoder: dict[int, Any] = {}

    def __init__(self, options: ModelOptions):
        """Raises UserError where the model's folder has none."""
        folder = resolve_folder(options.id, options.revision, with_weights=False)
        for key in ("tokenizer", "added_tokens"):
            if getattr(options, key):
                raise UserError(
                    f"model.{key}: {getattr(options, key)} given, but images have no tokens; "
                    "accepted: null"
                )
        patch = getattr(load_model_config(folder, options), "patch_size", None)
        from transformers import AutoImageProcessor

        try:
            self._processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
            with_size, other = self._pixels([_blank()]), self._pixels([_blank(96)])
        except Exception as error:  # transformers raises many types on bad files
            raise UserError(
                f"model.id: {folder}: no usable image processor ({first_line(error)}); accepted: a "
                "model of images with preprocessor_config.json"
            ) from error
        if other.shape != with_size.shape:
            raise UserError(
                f"model.id: {folder}: its image processor makes images of several sizes "
                f"({tuple(with_size.shape[2:])}, {tuple(other.shape[2:])}); accepted: one that "
                "crops or resizes all to one size"
            )
        self.shape: tuple[int, ...] = tuple(with_size.shape[1:])
        """(channels, height, width) of what the model is given."""
        _, height, width = self.shape
        # One more stands for the whole image.
        self.tokens = (height // patch) * (width // patch) + 1 if isinstance(patch, int) else 1
        """Patches of an image, and the token for the whole, where the model has such."""

    def __call__(self, images: Sequence[bytes]) -> Tensor:
        """Pixel values (images, channels, height, width) of encoded images, turned as cameras note
        it in them; zeros for b""."""
        opened = [_opened(data) if data else _blank() for data in images]
        pixels = self._pixels(opened)
        for index, data in enumerate(images):
            if not data:
                pixels[index] = 0
        return pixels

    def _pixels(self, images: Sequence[Any]) -> Tensor:
        return torch.as_tensor(self._processor(images=images, return_tensors="pt")["pixel_values"])

    def save_pretrained(self, folder: Path) -> None:
        self._processor.save_pretrained(folder)

    def get_vocab(self) -> dict[str, int]:
        return {}

    def __len__(self) -> int:
        return 0

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return ""


def _blank(width: int = 64) -> Any:
    from PIL import Image

    return Image.new("RGB", (width, 64))


def _opened(data: bytes) -> Any:
    """As transformers' and `datasets`' own readers open it."""
    from PIL import Image, ImageOps

    return ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
