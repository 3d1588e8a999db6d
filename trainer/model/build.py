"""Build a model on the meta device and replace its linear layers by adapted layers."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from adapters.layers.experts import AdaptedExperts
from adapters.methods.options import MethodOptions
from adapters.methods.registry import METHODS
from adapters.units import linear_names, make_units, select_targets
from trainer.config.config import Config
from trainer.config.dtype import compute_dtype
from trainer.config.sections import ModelOptions
from trainer.errors import UserError, first_line
from trainer.model.attention import OURS, choose_attention
from trainer.model.backbone import BuiltModel, set_module
from trainer.model.hub import load_model_config, resolve_folder
from trainer.model.matrices import install_adapted_layers, refuse_tied
from trainer.model.mixture import check_experts, gates, left_alone, routers
from trainer.model.packing import check_packing
from trainer.tasks.base import Task

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase


def build(config: Config, task: Task, device: torch.device) -> BuiltModel:
    """The model on the meta device, without weights. Raises UserError where model, task and method
    do not fit together."""
    options = config.model
    folder = resolve_folder(options.id, options.revision, with_weights=False)
    model_config = load_model_config(folder, options)
    task.configure(model_config)
    dtype = compute_dtype(options, device)
    try:
        with torch.device("meta"):
            model = task.auto_class.from_config(
                model_config,
                dtype=dtype,
                # Always given: config.json may name code on the hub here, or in `auto_map`.
                attn_implementation=None if options.attention in OURS else options.attention,
                trust_remote_code=False,
            )
    except Exception as error:  # a model's constructor raises whatever its shapes lead to
        raise UserError(
            f"model.id: {folder} with model.attention={options.attention}: {first_line(error)}"
        ) from error
    model.requires_grad_(False)
    model.eval()
    if config.data.packing:
        check_packing(model)
    attention = choose_attention(
        model, options.attention, packing=config.data.packing, device=device, dtype=dtype
    )
    if attention.name is not None:
        model.set_attn_implementation(attention.name)
    for path, module in list(model.named_modules()):
        if AdaptedExperts.fits(module):
            set_module(model, path, AdaptedExperts(module))
    check_experts(model, dtype)
    _check_vocabulary(task.tokenizer, model, options)
    trained = task.trained_modules(model)
    if config.method.train_router:
        trained += routers(model)
    head = _output_head(model)
    beside_experts = [path for path, _, _ in gates(model)]
    targets = _targets(model, config.method, head, [*trained, *beside_experts])
    adapted_layers = install_adapted_layers(
        model, options.quantization, targets, [*head, *trained, *beside_experts]
    )
    heads = {path: model.get_submodule(path) for path in trained}
    alone = left_alone(model) if config.method.targets == "all-linear" else []
    units = make_units(model, targets)
    return BuiltModel(model, dtype, units, adapted_layers, heads, attention.reason, alone)


def _targets(
    model: nn.Module, method: MethodOptions, head: list[str], trained: list[str]
) -> list[str]:
    """Paths of the linear layers that take adapters. Raises UserError naming those that cannot."""
    excluded = trained if method.include_head else [*head, *trained]
    try:
        targets = select_targets(linear_names(model, excluded), method.targets)
    except ValueError as error:
        raise UserError(str(error)) from error
    if not targets:
        raise UserError(
            f"method.targets: {method.targets!r} picks no linear layer of {type(model).__name__}; "
            "accepted: a model whose projections are nn.Linear, and at least one of them"
        )
    try:
        method.check_units(make_units(model, targets))
    except ValueError as error:
        raise UserError(str(error)) from error
    if METHODS[method.kind].splits_weight:
        refuse_tied(model, method, targets)
    return targets


def _output_head(model: "PreTrainedModel") -> list[str]:
    head = model.get_output_embeddings()
    return [path for path, module in model.named_modules() if head is not None and module is head]


def _check_vocabulary(
    tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel", options: ModelOptions
) -> None:
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    size = embedding.num_embeddings
    if len(tokenizer) > size:
        raise UserError(
            f"model.tokenizer: {options.tokenizer or options.id} has {len(tokenizer)} tokens; "
            f"accepted: at most {size}, the size of the model's embedding"
        )
