"""Build a model on the meta device and replace its linear layers by adapted layers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from adapters.layers.expert_modules import AdaptedExperts
from adapters.layers.linear import AdaptedLinear
from adapters.methods.baseline_options import FullOptions
from adapters.units import is_conv1d, is_linear, linear_names, make_units
from trainer.config.config import Config
from trainer.config.dtype import compute_dtype
from trainer.data.rows import Rows
from trainer.errors import UserError, first_line
from trainer.model.added_tokens import AddedTokens, check_vocabulary, token_tables
from trainer.model.attention import OURS, register_attention
from trainer.model.backbone import BuiltModel, LeftAlone, set_module
from trainer.model.hub import load_model_config, resolve_folder
from trainer.model.matrices import install_adapted_layers, refuse_shared_blocks
from trainer.model.meta import keep_float32, on_meta
from trainer.model.mixture import check_experts, gates, left_alone, routers
from trainer.model.packing import check_packing, choose_rows
from trainer.model.peft_names import lost_by_peft
from trainer.model.reach import find_unreached, summarised
from trainer.model.targets import Targets, choose_targets, output_head, within_blocks
from trainer.model.ties import untie_head
from trainer.model.unfreeze import refuse_fixed, unfreeze
from trainer.model.weight_reads import layers_read
from trainer.tasks.base import Task

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel


def build(
    config: Config, task: Task, device: torch.device, unreached: Sequence[str] | None = None
) -> BuiltModel:
    """The model on the meta device, without weights. `unreached`: layers whose output does not
    reach the loss, as a checkpoint's run found them; else they are looked for. Raises UserError
    where model, task and method do not fit together."""
    method = config.method
    dtype = compute_dtype(config.model, device)
    # What trains is held in float32, whatever an engine computes in.
    held = torch.float32 if method.trains == "backbone" else dtype
    model, initial, added = _unmodified(config, task, held)
    task.check_model(model)
    tensors = model.state_dict()
    if isinstance(method, FullOptions):
        refuse_fixed(model, method)
    model.requires_grad_(False)
    model.eval()
    read = layers_read(model)
    tables = () if added is None else token_tables(model, added, read)
    rows, attention = _set_attention(model, config, device, dtype)
    if method.trains == "backbone":
        refuse_shared_blocks(model, method)
    if method.trains == "adapters":
        _unify_layers(model, read)
    check_experts(model, dtype)
    check_vocabulary(task.tokenizer, model, config.model)
    choice = _choose(model, config, task, read, unreached)
    units = make_units(model, choice.targets.chosen)
    adapted_layers = {}
    if method.trains == "adapters":
        adapted_layers = install_adapted_layers(
            model, config.model.quantization, choice.targets.chosen, choice.unquantized, choice.read
        )
        for name in choice.targets.chosen if method.scales_rows else ():
            adapted_layers[name].layer.scales_rows = True
    keep_float32(model, held)
    heads = {path: model.get_submodule(path) for path in choice.trained}
    if isinstance(method, FullOptions):
        unfreeze(model, method, heads)
    return BuiltModel(
        model=model,
        dtype=dtype,
        units=units,
        adapted_layers=adapted_layers,
        heads=heads,
        attention=attention,
        rows=rows,
        left_alone=choice.left_alone,
        unreached=choice.unreached,
        tensors=tensors,
        initial=initial,
        added=added,
        tables=tables,
    )


def _set_attention(
    model: "PreTrainedModel", config: Config, device: torch.device, dtype: torch.dtype
) -> tuple[Rows, str]:
    """(how records lie in rows, which attention serves them and why). Raises UserError where the
    model cannot have several records in a row and is to."""
    if config.data.packing:
        check_packing(model)
    elif config.packs_rows:
        check_packing(model, "task.train_on: distribution")
    register_attention()
    rows, attention = choose_rows(model, config, device, dtype)
    if attention.name is not None:
        model.set_attn_implementation(attention.name)
    return rows, attention.reason


def _unify_layers(model: nn.Module, read: set[str]) -> None:
    """Experts of every layout become `AdaptedExperts`, GPT-2's transposed layers `AdaptedLinear`.
    `read`: layers whose weights the model reads itself, which stay what they are."""
    for path, module in list(model.named_modules()):
        if AdaptedExperts.fits(module):
            set_module(model, path, AdaptedExperts(module))
        elif is_conv1d(module) and path not in read:
            set_module(model, path, AdaptedLinear(module, "none", transposed=True))


@dataclass(frozen=True)
class _Choice:
    """Which layers get adapters, and what becomes of the others (paths)."""

    targets: Targets
    trained: list[str]
    """Heads and routers, which train whole."""
    unquantized: list[str]
    read: set[str]
    """Layers whose weights the model reads itself, without those that train or are gates."""
    unreached: Sequence[str]
    left_alone: list[LeftAlone]


def _choose(
    model: "PreTrainedModel",
    config: Config,
    task: Task,
    read: set[str],
    unreached: Sequence[str] | None,
) -> _Choice:
    method = config.method
    trained = task.trained_modules(model)
    if method.train_router:
        trained += routers(model)
    beside_experts = [path for path, _, _ in gates(model)]
    unquantized = [*output_head(model), *trained, *beside_experts]
    read = read - {*trained, *beside_experts}
    excluded = [*trained, *beside_experts] if method.include_head else unquantized
    names = linear_names(model, [*excluded, *read])
    if unreached is None:
        unreached = sorted(find_unreached(model, task, names, config.data.max_length))
    lost = lost_by_peft(model, names)
    targets = Targets([], [], [], [])
    if method.trains != "backbone":
        targets = choose_targets(model, method, excluded, read, unreached, lost)
    alone = _left_alone(
        model, targets, read, beside_experts,
        everything=method.targets == "all-linear" and method.trains != "backbone",
    )  # fmt: skip
    if targets.unreached:
        paths = tuple(summarised(names, targets.unreached))
        alone.append(LeftAlone(paths, "their output does not reach the loss of a text"))
    return _Choice(targets, trained, unquantized, read, unreached, alone)


def _unmodified(
    config: Config, task: Task, dtype: torch.dtype
) -> tuple["PreTrainedModel", dict[str, torch.Tensor], AddedTokens | None]:
    """transformers' model on meta, the initial values of its small special parameters, and the
    tokens for which its tables were resized."""
    options = config.model
    folder = resolve_folder(options.id, options.revision, with_weights=False)
    model_config = load_model_config(folder, options)
    task.configure(model_config)
    added = AddedTokens.of(options, task.tokenizer, model_config)
    if added is not None:
        added.resize(model_config)
    try:
        with on_meta(config.run.seed) as initial_values:
            model = task.auto_class.from_config(
                model_config,
                dtype=dtype,
                # Always given: config.json may name code on the hub here, or in `auto_map`.
                attn_implementation=None if options.attention in OURS else options.attention,
                trust_remote_code=False,
            )
            if options.weights == "pretrained":
                untie_head(model, folder)
            return model, initial_values(model), added
    except Exception as error:  # a model's constructor raises whatever its shapes lead to
        if str(error).startswith("Unrecognized configuration class"):
            raise UserError(
                f"task.kind: {config.task.kind} given, but transformers has no "
                f"{task.auto_class.__name__.removeprefix('Auto')} of {model_config.model_type} "
                f"(model.id {options.id}); accepted: another task.kind, or another model"
            ) from error
        raise UserError(
            f"model.id: {folder} with model.attention={options.attention}: {first_line(error)}"
        ) from error


def _left_alone(
    model: nn.Module, targets: Targets, read: set[str], gates: list[str], *, everything: bool
) -> list[LeftAlone]:
    """What gets no adapter (where `everything` was to get one) or keeps its own forward."""
    linear = [p for p, m in model.named_modules() if isinstance(m, nn.Linear) and p not in read]
    others = [p for p in linear if not is_linear(model.get_submodule(p))]
    kinds = [
        ("the model reads its weight itself, which stays unquantised", sorted(read)),
        ("a forward pass of its own, and unquantised", [p for p in others if p not in gates]),
    ]
    if everything:
        kinds += [
            ("smaller than the rank", targets.too_small),
            ("PEFT would take their adapters for those of other modules", targets.lost),
            ("a router or gate of experts", [p for p in gates if p in linear]),
            ("unsupported layout of experts", left_alone(model)),
        ]
    return [
        LeftAlone(tuple(within_blocks(model, paths)), reason) for reason, paths in kinds if paths
    ]
