"""A toy set of images, and a tiny model for it."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import ViTConfig, ViTImageProcessor, ViTModel

BRIGHT = {
    "left": np.s_[:, :12], "right": np.s_[:, 12:], "top": np.s_[:10],
}  # fmt: skip
"""Which part of an image is bright, by class."""


def save_images(folder: Path, count: int) -> Path:
    """Images of 24 x 20 noisy pixels, in folders of their classes."""
    rng = np.random.default_rng(0)
    for number in range(count):
        name = list(BRIGHT)[number % len(BRIGHT)]
        pixels = rng.integers(0, 80, (20, 24, 3)).astype(np.uint8)
        pixels[BRIGHT[name]] += 150
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name / f"{number:03}.png")
    return folder


def save_vit(folder: Path) -> Path:
    """A random ViT without a head, of 16 patches, with its image processor."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        image_size=16, patch_size=4, initializer_range=0.2,
    )  # fmt: skip
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder
