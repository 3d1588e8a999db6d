"""Tensors in the files that the model does not take.

What transformers drops with a warning is refused where it belongs to something that the model has:
a bias that config.json does not mention, a norm, a further layer. What belongs to a part that the
model lacks (another head, a vision tower) is left out and named.
"""

import re
from collections.abc import Iterable

from adapters.units import transformer_blocks
from trainer.errors import UserError
from trainer.loading.source import Source

_COMPUTED = r"(inv_freq|position_ids|masked_bias|(cos|sin)_cached|(^|\.)version)$"
"""Names of buffers that models compute themselves and older versions of them stored; fairseq's
version."""
_FURTHER_LAYERS = r"nextn|mtp"
"""In names of config.json: numbers of layers that predict further tokens. They are stored as layers
after the last one, and models here lack them."""


def left_out(source: Source) -> str | None:
    """A line on the tensors that are left out since the model lacks their part, or None. Raises
    UserError where the files hold a tensor of a part that the model has, or further layers."""
    files, model = source.files, source.model
    if files is None:
        return None
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    patterns = [re.compile(pattern) for pattern in (_COMPUTED, *ignored)]
    buffers = {name for name, _ in model.named_buffers()}
    left = {
        key: name
        for key, name in files.unused.items()
        if not (name in buffers or any(p.search(name) for p in patterns) or _is_mask(source, key))
    }
    parts = _Parts(source)
    refused = [key for key, name in left.items() if not parts.lacks(key, name, left)]
    kind = type(model).__name__
    if refused:
        raise UserError(
            f"model.id: {files.folder}: holds {len(refused)} tensor(s) that {kind} does not have, "
            f"such as {refused[0]}; accepted: what config.json makes, and other heads or towers"
        )
    if not left:
        return None
    return (
        f"model.id: {len(left)} tensor(s) of parts that {kind} does not have are left out, such as "
        f"{next(iter(left))}"
    )


def _is_mask(source: Source, key: str) -> bool:
    """Whether it is a causal mask (1, 1, n, n), or a count or index: none is a weight."""
    assert source.files is not None
    stored = source.files.stored(key)
    square = len(stored.shape) == 4 and stored.shape[:2] == (1, 1)
    return stored.kind in ("BOOL", "I64") or square


class _Parts:
    """The modules of the model, by the names of its tensors before its layers were replaced."""

    def __init__(self, source: Source):
        self._source = source
        self._blocks = {path for path, _ in transformer_blocks(source.model)}
        self._lists = {path.rpartition(".")[0] for path in self._blocks}
        modules = (name.rpartition(".")[0] for name in source.backbone.tensors)
        self._modules = {prefix for path in modules for prefix in _prefixes(path)}
        config = source.model.config.get_text_config()
        self._further = sum(
            value
            for name, value in config.to_dict().items()
            if re.search(_FURTHER_LAYERS, name) and type(value) is int
        )

    def lacks(self, key: str, name: str, others: dict[str, str]) -> bool:
        """Whether the model lacks the whole part that the stored `key`, by transformers `name`,
        belongs to. A norm is no such part where the model has what it is in: `others`, all names
        left, tell whether a module holds nothing but vectors."""
        prefix = self._source.model.base_model_prefix
        if self._deepest(bare := f"{prefix}.{name}").startswith(f"{prefix}."):
            name = bare  # files of the model without its head
        if not self._blocks.isdisjoint(_prefixes(name)):
            return False
        inside = self._deepest(name)
        part, *rest = name.removeprefix(f"{inside}." if inside else "").split(".")
        if part.isdecimal():
            return inside in self._lists and self._is_further(inside, int(part))
        if not inside:
            return True
        if not rest:
            return False
        path = f"{inside}.{part}."
        siblings = {k: n.removeprefix(path) for k, n in others.items() if n.startswith(path)}
        return any("." in n or self._dimensions(k) > 1 for k, n in siblings.items())

    def _deepest(self, name: str) -> str:
        """The innermost of the model's modules that the name is in."""
        return next((path for path in _prefixes(name) if path in self._modules), "")

    def _is_further(self, path: str, index: int) -> bool:
        count = sum(block.startswith(f"{path}.") for block in self._blocks)
        return count <= index < count + self._further

    def _dimensions(self, key: str) -> int:
        assert self._source.files is not None
        return len(self._source.files.stored(key).shape)


def _prefixes(path: str) -> Iterable[str]:
    """The path and those of all modules that it is in: a.b.c, a.b, a."""
    while path:
        yield path
        path = path.rpartition(".")[0]
