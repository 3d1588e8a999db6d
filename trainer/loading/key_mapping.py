"""Mapping from a model's parameter names to the keys in published checkpoint files.

transformers renames and merges some parameters when it loads (Mixtral's experts are one tensor each
on disk, one stack in memory). This is its conversion table, applied in reverse.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers.configuration_utils import PretrainedConfig

_PATTERN = frozenset("^$()[]|+?{}")  # marks a regular expression, not a name


class KeyMapping:
    """Maps parameter names to keys on disk, for one model type."""

    def __init__(self, config: "PretrainedConfig | None" = None):
        self._renamed: list[tuple[str, str]] = []
        self._stacks: dict[str, list[str]] = {}
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        conversions = get_checkpoint_conversion_mapping(config.model_type) if config else None
        for conversion in conversions or []:
            sources = [source.replace("\\.", ".") for source in conversion.source_patterns]
            targets = [target.replace("\\.", ".") for target in conversion.target_patterns]
            if len(targets) != 1 or _PATTERN & set("".join([*sources, *targets])):
                continue
            steps = [type(step).__name__ for step in getattr(conversion, "operations", [])]
            if not steps and len(sources) == 1:
                self._renamed.append((sources[0], targets[0]))
            elif steps == ["MergeModulelist"] or steps == ["MergeModulelist", "Concatenate"]:
                self._stacks[targets[0]] = sources

    def names(self, name: str) -> list[str]:
        """The possible keys of a parameter."""
        names = [name]
        for source, target in reversed(self._renamed):
            names += [known.replace(target, source) for known in names if target in known]
        return names

    def expert_parts(self, stack: str, expert: int) -> list[list[str]]:
        """The possible keys of each matrix that is concatenated by rows into one expert of `stack`;
        empty where the files hold the stack itself."""
        for target, sources in self._stacks.items():
            if stack.endswith(target):
                start = stack.removesuffix(target)
                return [self.names(start + source.replace("*", str(expert))) for source in sources]
        return []
