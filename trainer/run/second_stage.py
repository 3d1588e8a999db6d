"""A second stage: a run that starts from what `model.adapter` holds, a PEFT folder or a run.

The same method with the same ranks goes on: A, g and B, and what the method has decided, are as
they were; the optimizer and the step are new. A folder does not say what was decided, so only plain
LoRA goes on from one. For any other method the adapters become frozen ones beside those that it
trains: W, quantised or not, stays as it was. If they began as a part of W, that part stays out,
unless the new method takes out its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapters.factors import lora_factors, parts_by_unit, stacked
from adapters.gated import GatedAdapter
from adapters.methods.base import InitialAdapter
from adapters.methods.registry import METHODS
from trainer.checkpoint.compatibility import is_another_backbone
from trainer.checkpoint.saved import Saved, is_saved, read_on_all
from trainer.checkpoint.state import load_learned
from trainer.config.config import Config
from trainer.config.validation import local
from trainer.distributed.world import World
from trainer.errors import UserError, refuse_mismatch
from trainer.export.export import (
    saved_adapters,
    saved_config,
    saved_heads,
    saved_initial,
    saved_rows,
)
from trainer.export.peft_folder import PeftFolder, is_adapter, read_peft_folder
from trainer.model.backbone import BuiltModel, class_name
from trainer.session import LoadedModel

_HOW_IT_TRAINS = ("dropout", "dropout_on", "replay", "b_learning_rate_ratio")
"""Keys of a method that do not change what its adapters are."""
_TAKEN_OVER = ("adapter/", "frozen/", "head/", "rows/")
_MADE_ANEW = ("optimizer/", "method/", "decider/", "random/")
"""Groups of a checkpoint's tensors, if its method does not go on."""


@dataclass(frozen=True)
class _Earlier:
    """What the earlier stage learned, on this model's matrices."""

    trained: Mapping[str, GatedAdapter]
    """By unit, with inference gates."""
    heads: Mapping[str, Mapping[str, Tensor]]
    """Parameters by name of modules trained in full, by path."""
    kind: str
    """Its method, for the log."""
    frozen: Mapping[str, GatedAdapter] = field(default_factory=dict)
    """Of the stages before it."""
    initial: Mapping[str, GatedAdapter] = field(default_factory=dict)
    """What was taken out of W."""
    splits_weight: bool = False
    """Whether its own method took `initial` out."""


class SecondStage:
    """What a new run starts from; it opens its session with `initial_adapters` and `frozen`, then
    calls `begin`."""

    def __init__(self, config: Config, world: World):
        """Read the folder or run. Raises UserError. Collective."""
        assert config.model.adapter is not None
        self.config = config
        self.path = Path(config.model.adapter)
        self._method = METHODS[config.method.kind]
        self._saved: Saved | None = None
        self._folder: PeftFolder | None = None
        self._taken_over: Mapping[str, GatedAdapter] = {}
        self._heads: Mapping[str, Mapping[str, Tensor]] = {}
        self.line = ""
        """How it is taken over, for the log; once `frozen` was called."""
        with world.all_or_none() as kinds:
            kinds.append(_kind_of(self.path))
        self._refuse_differing(kinds, world)
        if kinds[0] == "run":
            self._saved = read_on_all(self.path, world)
        else:
            with world.all_or_none() as digests:
                self._folder = read_peft_folder(self.path)
                digests.append(self._folder.digest)
            self._refuse_differing(digests, world)

    @property
    def initial_adapters(self) -> Mapping[str, InitialAdapter] | None:
        """What is already taken out of W, and stays so."""
        if self._saved is None or (self._method.splits_weight and not self._resumes_method):
            return None
        return self._saved.initial_adapters

    @property
    def goes_on(self) -> bool:
        """Whether A, g and B are those of the earlier stage; once `frozen` was called."""
        return self._resumes_method or bool(self._taken_over)

    @property
    def _resumes_method(self) -> bool:
        """Whether it goes on with all that the method of a run has decided."""
        if self._saved is None or _is_plain(self.config.method.kind):
            return False
        then = _essence(saved_config(self._saved.state))
        return then == _essence(self.config)

    def frozen(self, built: BuiltModel) -> Mapping[str, GatedAdapter]:
        """The adapters to freeze beside the new ones, by unit of a model without weights. Raises
        UserError naming what the model does not take."""
        with refuse_mismatch(self.path):
            earlier = self._earlier(built)
        self._check(built, earlier)
        self._heads = earlier.heads
        count = f"{earlier.kind}, {_ranks(earlier.trained)}"
        if self._resumes_method:
            self.line = f"goes on with {self.path} ({count})"
            return earlier.frozen
        ranks = {name: adapter.rank for name, adapter in earlier.trained.items()}
        plain = _is_plain(self.config.method.kind) and _is_plain(earlier.kind)
        if plain and ranks == {unit.name: self.config.method.rank for unit in built.units}:
            self._taken_over = earlier.trained
            self.line = f"goes on with {self.path} ({count})"
            return earlier.frozen
        self.line = f"{self.path} ({count}) stays, frozen, beside the new {self.config.method.kind}"
        return self._all_frozen(earlier)

    def begin(self, session: LoadedModel) -> list[str]:
        """Bring what is taken over into the new session. Returns lines for the log. Raises
        UserError where it was made on another backbone, or for other labels."""
        saved = self._saved
        if saved is not None:
            if is_another_backbone(session, saved.state):
                made_on = saved.state["config"].get("model", {}).get("id")
                raise self._refuse(
                    f"was trained on another backbone ({made_on})",
                    f"an adapter of {self.config.model.id}",
                )
            labels = session.task.labels_state()
            if self._heads and saved.state["labels"] not in ({}, labels):
                raise self._refuse("was trained for other labels", "the same labels in the data")
            for path, rows in saved_rows(saved.tensors).items():
                session.backbone.token_rows[path].values.data.copy_(rows)
        if saved is not None and self._resumes_method:
            load_learned(session, saved.checkpoint, saved.tensors)
        for name, adapter in self._taken_over.items():
            _copy(adapter, session.method.adapters[name])
        for path, head in self._heads.items():
            parameters = _parameters(session.backbone.heads[path])
            for name, value in head.items():
                parameters[name].data.copy_(value)
        base = None if self._folder is None else self._folder.base
        notes = []
        if base is not None and Path(base).name != Path(self.config.model.id).name:
            notes.append(f"note      model.adapter: {self.path} names {base} as its base model")
        heads = f", with {', '.join(self._heads)}" if self._heads else ""
        return [*notes, f"adapter   {self.line}{heads}"]

    def _earlier(self, built: BuiltModel) -> _Earlier:
        saved, folder = self._saved, self._folder
        if saved is None:
            assert folder is not None
            heads: dict[str, dict[str, Tensor]] = {}
            for name, value in folder.heads.items():
                path, _, parameter = name.rpartition(".")
                heads.setdefault(path, {})[parameter] = value
            return _Earlier(folder.adapters(built.model), heads, "lora")
        config = saved_config(saved.state)
        known = (*_TAKEN_OVER, *_MADE_ANEW)
        others = [name for name in saved.tensors if not name.startswith(known)]
        if others and not self._resumes_method:
            raise self._refuse(
                f"{others[0]} was trained beside its adapters", "an adapter without it"
            )
        return _Earlier(
            trained=saved_adapters(config, saved.tensors),
            heads=saved_heads(saved.tensors),
            kind=config.method.kind,
            frozen=saved.frozen,
            initial=saved_initial(saved),
            splits_weight=METHODS[config.method.kind].splits_weight,
        )

    def _check(self, built: BuiltModel, earlier: _Earlier) -> None:
        """Raises UserError naming what this model does not take."""
        if self._saved is not None:
            then = saved_config(self._saved.state).model.added_tokens
            if then != self.config.model.added_tokens and (then or self._resumes_method):
                raise self._refuse(
                    f"was trained with model.added_tokens: {then}",
                    f"the same in place of {self.config.model.added_tokens}",
                )
        model, layers = class_name(built.model), built.adapted_layers
        for name, adapter in [*earlier.trained.items(), *earlier.frozen.items()]:
            layer = layers.get(name)
            if layer is None:
                raise self._refuse(
                    f"{name} is no matrix of {model} that takes an adapter here",
                    "an adapter of this model (method.include_head=true for one of its head)",
                )
            shape = adapter.B.shape[1], adapter.A.shape[1]
            if shape != (layer.out_features, layer.in_features):
                raise self._refuse(
                    f"{name} is for a matrix of {shape[0]} x {shape[1]}, which has "
                    f"{layer.out_features} x {layer.in_features} in {model}",
                    "an adapter of this model",
                )
        for path, head in earlier.heads.items():
            held = dict(built.heads[path].named_parameters()) if path in built.heads else {}
            for name, value in head.items():
                if name not in held or held[name].shape != value.shape:
                    raise self._refuse(
                        f"{path}.{name} {tuple(value.shape)} was trained in full, which this run "
                        f"does not do with such a module",
                        "the task and, for routers, the method.train_router of that stage",
                    )

    def _all_frozen(self, earlier: _Earlier) -> dict[str, GatedAdapter]:
        """All that was learned so far, as one frozen adapter a unit."""
        if earlier.initial and self._method.splits_weight:  # which takes its part out of W itself
            parts = parts_by_unit(
                earlier.trained, earlier.initial, earlier.frozen,
                splits_weight=earlier.splits_weight,
            )  # fmt: skip
            factors = {
                name: stacked([lora_factors(part.adapter, part.initial) for part in of_unit])
                for name, of_unit in parts.items()
            }
            return {
                name: GatedAdapter(A, torch.ones(len(A)), B.T)
                for name, (A, B) in factors.items()
                if len(A)
            }
        # The first components are those that began as a part of W (`lora_factors`).
        order = [earlier.frozen, earlier.trained]
        found: dict[str, list[GatedAdapter]] = {}
        for held in reversed(order) if earlier.splits_weight else order:
            for name, adapter in held.items():
                found.setdefault(name, []).append(adapter)
        joined = {
            name: GatedAdapter(*(
                torch.cat([getattr(adapter, role).detach() for adapter in adapters])
                for role in ("A", "g", "B")
            ))
            for name, adapters in found.items()
        }  # fmt: skip
        return {  # of what began as a part of W, which stays out, even nothing is a change
            name: adapter
            for name, adapter in joined.items()
            if name in earlier.initial or bool((adapter.g != 0).any())
        }

    def _refuse_differing(self, found: Sequence[str], world: World) -> None:
        """Raises UserError where the ranks have not found the same. Collective."""
        with world.all_or_none():
            if len(set(found)) > 1:
                raise self._refuse("not the same for every rank", "the same on every host")

    def _refuse(self, what: str, accepted: str) -> UserError:
        return UserError(f"model.adapter: {self.path}: {what}; accepted: {accepted}")


def _kind_of(path: Path) -> str:
    """`folder` or `run`. Raises UserError for anything else."""
    if local(path, "model.adapter") is not None:
        if is_adapter(path):
            return "folder"
        if is_saved(path):
            return "run"
    raise UserError(
        f"model.adapter: {path}: no adapter_config.json, and no checkpoint; accepted: an adapter's "
        "folder, runs/NAME with a checkpoint, or runs/NAME/checkpoints/step-00000100"
    )


def _parameters(head: nn.Module) -> dict[str, nn.Parameter]:
    """Of a `TrainedModule`, by their names in the module that it wraps."""
    return {name.removeprefix("inner."): p for name, p in head.named_parameters()}


def _is_plain(kind: str) -> bool:
    """Whether a method's adapters are plain LoRAs, about which nothing is decided."""
    return not (METHODS[kind].decides or METHODS[kind].splits_weight)


def _essence(config: Config) -> dict[str, Any]:
    """The keys of a method that make its adapters what they are."""
    return config.method.model_dump(mode="json", exclude=set(_HOW_IT_TRAINS))


def _ranks(adapters: Mapping[str, GatedAdapter]) -> str:
    ranks = sorted({adapter.rank for adapter in adapters.values()})
    span = f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else f"{ranks[0] if ranks else 0}"
    return f"{len(adapters)} matrices of rank {span}"


@torch.no_grad()
def _copy(earlier: GatedAdapter, adapter: GatedAdapter) -> None:
    """Bring a plain LoRA into another of the same rank, whose gates stay: ΔW is the same."""
    ratio = (earlier.g.detach() / adapter.g.detach().cpu()).unsqueeze(1)
    adapter.A.data.copy_(earlier.A.detach())
    adapter.B.data.copy_(earlier.B.detach() * ratio)
