"""Mapping from a model's tensors to the keys in published checkpoint files.

Names in files differ from the model's: parts were renamed, experts are one tensor each on disk and
one stack in memory, projections are fused. transformers has a table of these conversions for every
model; here its own functions rename the keys of the files, and its own operations convert.
"""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from trainer.errors import UserError, first_line
from trainer.loading import mxfp4

if TYPE_CHECKING:
    from transformers.core_model_loading import WeightConverter
    from transformers.modeling_utils import PreTrainedModel


@dataclass(eq=False)
class Conversion:
    """Tensors on disk from which transformers makes one or several of the model's."""

    target: str
    """The first tensor that comes out."""
    converter: "WeightConverter"
    parts: dict[str, list[str]] = field(default_factory=dict)
    """Keys on disk, in order, by the pattern that they match."""

    @property
    def keys(self) -> list[str]:
        """The keys on disk."""
        return [key for keys in self.parts.values() for key in keys]

    @property
    def operations(self) -> str:
        return ", ".join(type(operation).__name__ for operation in self.converter.operations)

    @property
    def experts(self) -> list[list[str]] | None:
        """Keys by matrix and expert, where the matrices are concatenated by rows into an expert and
        the experts stacked; else None."""
        steps = [
            (type(step).__name__, getattr(step, "dim", None)) for step in self.converter.operations
        ]
        patterns = self.converter.source_patterns
        stacked = steps == [("MergeModulelist", 0)] and len(patterns) == 1
        if stacked or steps == [("MergeModulelist", 0), ("Concatenate", 1)]:
            return [self.parts.get(pattern, []) for pattern in patterns]
        return None


@dataclass(frozen=True)
class Converted:
    """A tensor of the model that is made from others in the files."""

    name: str
    conversion: Conversion


Key = str | Converted
"""Where the files hold a tensor of the model: under a key, or to be converted."""


@dataclass(frozen=True)
class Index:
    """Where files hold what."""

    found: dict[str, Key]
    """By name of the model's tensor."""
    unused: dict[str, str] = field(default_factory=dict)
    """Keys that are no tensor of the model, with the name that transformers gives them."""
    copies: list[tuple[str, Key, Key]] = field(default_factory=list)
    """Tensors of the model that the files hold twice: name, where it is read, where else it is."""


class KeyMapping:
    """Maps the keys on disk to the tensors of a model; without one, each key is a tensor's name.

    `tensors`: the model's tensors by name as transformers builds it, before its layers are
    replaced.
    """

    def __init__(
        self,
        model: "PreTrainedModel | None" = None,
        tensors: Mapping[str, Tensor] | None = None,
    ):
        self._model, self._tensors = model, dict(tensors or {})

    def name(self, name: str) -> str:
        """transformers' name of a parameter: a stack of experts is a module of ours."""
        stack = name.removesuffix(".weight")
        return stack if stack in self._tensors else name

    def index(self, keys: Iterable[str]) -> Index:
        """Where the files with these keys hold the model's tensors."""
        if self._model is None:
            return Index({key: key for key in keys})
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        transforms = get_model_conversion_mapping(self._model)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        converter_of = {p: c for c in converters for p in c.source_patterns}
        prefix = self._model.base_model_prefix
        index = Index({})
        conversions: dict[str, Conversion] = {}
        for key in sorted(keys, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, self._tensors)
            if name not in self._tensors and key in self._tensors:
                name, pattern = key, None
            if pattern is None:
                # A name of the model's own is not overwritten by an alias.
                self._add(index, name, key, preferred=name == key)
                if not self._takes(name):
                    index.unused[key] = name
                continue
            converter = converter_of[pattern]
            conversion = conversions.setdefault(name, Conversion(name, converter))
            conversion.parts.setdefault(pattern, []).append(key)
            first, *others = converter.target_patterns
            targets = [name, *(name.replace(first, other) for other in others)]
            for target in targets:
                self._add(index, target, Converted(target, conversion), preferred=True)
            if not any(self._takes(target) for target in targets):
                index.unused[key] = name
        return index

    def _takes(self, name: str) -> bool:
        packed = (name.removesuffix(ending) for ending in (mxfp4.BLOCKS, mxfp4.SCALES))
        return name in self._tensors or any(stack in self._tensors for stack in packed)

    def _add(self, index: Index, name: str, key: Key, *, preferred: bool) -> None:
        known = index.found.get(name)
        if known is None or preferred:
            index.found[name] = key
        same = (
            isinstance(known, Converted)
            and isinstance(key, Converted)
            and (known.conversion is key.conversion)
        )
        if known is not None and not same and name in self._tensors:
            other = known if preferred else key
            index.copies.append((name, index.found[name], other))

    def convert(self, conversion: Conversion, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's tensors by name, from those on disk by key; on meta too. Raises UserError
        where transformers' operations do not apply."""
        assert self._model is not None
        converter = deepcopy(conversion.converter)
        for pattern, keys in conversion.parts.items():
            for key in keys:
                converter.add_tensor(conversion.target, key, pattern, parts[key])  # type: ignore[arg-type]
        # The model whose layers are replaced has other parameters than the operations expect.
        original = SimpleNamespace(
            get_parameter=self._tensors.__getitem__,
            get_parameter_or_buffer=self._tensors.__getitem__,
            config=self._model.config,
            state_dict=lambda: self._tensors,
        )
        try:
            made: dict[str, Any] = converter.convert(
                conversion.target,
                model=original,  # type: ignore[arg-type]
                config=self._model.config,
            )
        except Exception as error:  # an operation of transformers on tensors that do not fit
            raise UserError(
                f"model.id: {conversion.target} cannot be made from {next(iter(parts))} by "
                f"{conversion.operations} of transformers: {first_line(error)}; accepted: tensors "
                f"of the shapes that config.json makes"
            ) from error
        return {
            name: value[0] if isinstance(value, list) else value for name, value in made.items()
        }
