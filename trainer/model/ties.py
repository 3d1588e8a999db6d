"""Output heads that transformers' class ties to the embedding while the files hold another matrix.

Configurations of T5's family say that the two are tied whatever config.json says, since most of its
models are. Those of T5 v1.1 (Flan-T5, mT5) are not; transformers sees that when it loads the files.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers.configuration_utils import PretrainedConfig
    from transformers.modeling_utils import PreTrainedModel


def untie_head(model: "PreTrainedModel", folder: Path) -> None:
    """Give the output head of `model`, on meta, a matrix of its own where the class of its
    configuration always ties it, but the files in `folder` hold another one than the embedding."""
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight or not _always_ties(model.config):
        return
    names = {id(module): f"{path}.weight" for path, module in model.named_modules()}
    of_head, of_embedding = (_stored(folder, names[id(module)]) for module in (head, embedding))
    if of_head is None or of_embedding is None or torch.equal(of_head, of_embedding):
        return
    head.weight = nn.Parameter(torch.empty_like(head.weight), head.weight.requires_grad)


def _always_ties(config: "PretrainedConfig") -> bool:
    try:
        made: Any = type(config)
        return bool(made(tie_word_embeddings=False).tie_word_embeddings)
    except Exception:  # a class that cannot be made of defaults is no T5's
        return False


def _stored(folder: Path, name: str) -> Tensor | None:
    """A tensor of the files by its name in them; None where there is none, or files that the loader
    will refuse."""
    whole = folder / "model.safetensors"
    try:
        for file in [whole] if whole.exists() else sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                if name in opened.keys():  # noqa: SIM118 (no mapping)
                    return opened.get_tensor(name)
    except (SafetensorError, OSError):
        pass
    return None
