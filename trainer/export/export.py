"""Export of a run or checkpoint as a PEFT folder or a full model."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from adapters.factors import Part, parts_by_unit
from adapters.gated import GatedAdapter
from adapters.layers.expert_modules import swapped_stacks
from adapters.methods.registry import METHODS
from adapters.peft_export import NothingToExport, export_adapter
from adapters.unit import stem
from adapters.units import expert_counts, fan_in_fan_out
from trainer.checkpoint.saved import Saved, read_saved
from trainer.config.config import Config, on_engine, parse_config, with_overrides
from trainer.config.engines import AUTO
from trainer.distributed.world import World
from trainer.errors import UserError, reason, refuse_mismatch
from trainer.export.added_tokens import trained_tokens
from trainer.export.baselines import refuse_layout, write_peft_checkpoint
from trainer.export.card import training_of, write_adapter_card, write_model_card
from trainer.export.expert_layouts import chosen_layouts
from trainer.export.gguf_folder import inner_folder, write_gguf
from trainer.export.gguf_folder import refuse as refuse_gguf
from trainer.export.merge import Merger, refuse_tied_targets, write_shards
from trainer.export.tokenizer import save_tokenizer_of
from trainer.files import new_folder
from trainer.model.backbone import BuiltModel
from trainer.model.blocks import configure_compiler
from trainer.model.build import build
from trainer.model.hub import load_tokenizer, resolve_folder
from trainer.model.image_processor import load_processor
from trainer.model.peft_names import PeftKeys, former_experts, modules_to_save
from trainer.tasks.base import Task
from trainer.tasks.registry import TASKS
from trainer.training.evaluation import evaluate_saved


def export_run(
    source: Path,
    out: Path,
    world: World,
    *,
    what: str = "adapter",
    base: str = "trained",
    measure: bool = True,
    rank: int | None = None,
    same_rank: bool = False,
    experts: str | None = None,
    dtype: str = "auto",
    overrides: Sequence[str] = (),
) -> str:
    """Write `what` (`adapter`, `merged`, `backbone`, or a `gguf` or `gguf-adapter` of the first
    two) of a run or checkpoint to `out`.

    `base`: take a quantised backbone's matrices as `trained` (dequantised) or from the `original`
    files. `rank`: compress the adapter to it. `same_rank`: pad all
    its matrices to one rank. `experts`: their layout in the adapter, `per_expert` or
    `stacked`; None: the first where the model has it. `dtype`: of a model; auto: that of its
    pretrained files. Returns remarks, a line each: the held-out
    loss without quantisation (where the backbone was quantised and `measure` is on), the error of
    the compression, and which checkpoint was exported. Raises UserError.
    """
    if rank is not None and rank < 1:
        raise UserError(f"--rank: {rank} given; accepted: 1 or more")
    if what.endswith("adapter") and dtype != "auto":
        raise UserError(f"--dtype: {dtype} given for an adapter; accepted: auto, which is float32")
    if dtype == "q8_0" and what != "gguf":
        raise UserError(f"--dtype: q8_0 given for --what {what}; accepted: with gguf alone")
    if out.exists():
        raise UserError(f"{out}: exists already; accepted: a folder that does not")
    saved = read_saved(source)
    trained = saved_config(saved.state)
    config = with_overrides(trained, overrides)
    if config.model.id != trained.model.id:
        saved.state.pop("hub_id", None)
    saved.state["config"] = config.model_dump(mode="json")
    if what in ("merged", "backbone", "gguf"):
        _refuse_merging(config, with_adapter=what != "backbone")
    if what.startswith("gguf"):
        refuse_gguf(saved, config, adapter=what == "gguf-adapter")
    note = ""
    if config.model.quantization != "none" and measure:
        note = cost_of_dequantising(config, world, saved)
    with written_folder(out) as partial:
        if what == "adapter":
            error = write_adapter(
                saved, partial, note, rank=rank, same_rank=same_rank, experts=experts
            )
            if rank is not None:
                note = f"{note}\nCompressed to rank {rank}: relative error {error:.2%}.".strip()
        elif what == "gguf-adapter":
            with inner_folder(partial) as folder:
                write_adapter(saved, folder, note, rank=rank)
                write_gguf(folder, partial, training_of(saved, config, note), dtype=None)
        else:
            gguf = what == "gguf"
            with inner_folder(partial) if gguf else nullcontext(partial) as folder:
                write_model(
                    saved, folder, with_adapter=what != "backbone",
                    dequantised=base == "trained", device=world.device, note=note,
                    dtype="float32" if dtype == "q8_0" else dtype,
                )  # fmt: skip
                if gguf:
                    write_gguf(folder, partial, training_of(saved, config, note), dtype=dtype)
    remarks = [f"damaged   {remark}" for remark in saved.remarks]
    return "\n".join([*remarks, *filter(None, [note]), f"{saved.title}, {saved.checkpoint}"])


@contextmanager
def written_folder(folder: Path, failure: type[UserError] = UserError) -> Iterator[Path]:
    """`new_folder`; raises `failure`, naming the folder, where the system refuses to write."""
    try:
        with new_folder(folder) as partial:
            yield partial
    except (OSError, SafetensorError) as error:
        raise failure(f"{folder}: cannot be written ({reason(error)})") from error


def saved_config(state: Mapping[str, Any]) -> Config:
    """The configuration that a checkpoint was made with."""
    return parse_config(state["config"])


def saved_adapters(config: Config, tensors: Mapping[str, Tensor]) -> dict[str, GatedAdapter]:
    """Adapters by unit name from a checkpoint's tensors, with their inference gates."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("adapter/"):
            _, unit, role = name.split("/")
            parts.setdefault(unit, {})[role] = tensor
    method = METHODS[config.method.kind]
    return {
        unit: GatedAdapter(p["A"], method.inference_gates(config.method, p["g"]), p["B"])
        for unit, p in parts.items()
    }


def saved_initial(saved: Saved) -> dict[str, GatedAdapter]:
    """Initial adapters by unit name; empty without spectral initialisation."""
    initial_adapters = saved.initial_adapters or {}
    return {name: initial.adapter for name, initial in initial_adapters.items()}


def saved_parts(config: Config, saved: Saved) -> dict[str, list[Part]]:
    """All that a checkpoint's run, and the stages before it, learned, by unit."""
    return parts_by_unit(
        saved_adapters(config, saved.tensors), saved_initial(saved), saved.frozen,
        splits_weight=METHODS[config.method.kind].splits_weight,
    )  # fmt: skip


def saved_heads(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Parameters by name of the modules trained in full, by module path."""
    heads: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("head/"):
            _, path, parameter = name.split("/")
            heads.setdefault(path, {})[parameter.removeprefix("inner.")] = tensor
    return heads


def saved_magnitudes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """DoRA's m by unit."""
    ending = ".magnitude"
    return {
        name.removeprefix("trained/").removesuffix(ending): tensor
        for name, tensor in tensors.items()
        if name.startswith("trained/") and name.endswith(ending)
    }


def saved_backbone(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Parameters by name of all modules of a backbone that trained, by path."""
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("trained/"):
            path, _, parameter = name.removeprefix("trained/").rpartition(".")
            modules.setdefault(path, {})[parameter] = tensor
    return modules


def saved_rows(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rows of added tokens by path of their table."""
    return {n.removeprefix("rows/"): t for n, t in tensors.items() if n.startswith("rows/")}


def cost_of_dequantising(config: Config, world: World, saved: Saved) -> str:
    """Remark on the held-out loss of the adapter on the quantised and the unquantised backbone."""
    if config.data.eval is None:
        return (
            f"Trained on the {config.model.quantization} backbone. The loss on the unquantised "
            "one was not measured: the run has no data.eval."
        )
    config = on_engine(with_overrides(config, ["generation.records=0"]), AUTO["one process"])
    plain = config.model.model_copy(update={"quantization": "none"})
    losses = [
        evaluate_saved(config.model_copy(update={"model": model}), world, saved)["eval_loss"]
        for model in (config.model, plain)
    ]
    return (
        f"Trained on the {config.model.quantization} backbone: held-out loss {losses[0]:.4f} there "
        f"(and on its dequantised copy), {losses[1]:.4f} on the unquantised backbone "
        f"({losses[1] - losses[0]:+.4f})."
    )


def write_adapter(
    saved: Saved,
    out: Path,
    note: str = "",
    *,
    rank: int | None = None,
    same_rank: bool = False,
    experts: str | None = None,
) -> float:
    """Write a PEFT folder from a checkpoint, without loading the backbone's weights. Returns the
    relative error of compressing the adapter to `rank` (0 without it). `same_rank`,
    `experts`: as in `export_run`."""
    config, tensors, state = saved_config(saved.state), saved.tensors, saved.state
    if state.get("best") is not None:
        note = f"{note}\n\nThis is {saved.title}.".strip()
    with refuse_mismatch(saved.checkpoint):
        heads, adapters = saved_heads(tensors), saved_adapters(config, tensors)
        training = training_of(saved, config, note)
        adapted = list(saved_parts(config, saved))
    if config.method.scales_rows:
        refuse_layout(config, rank=rank, same_rank=same_rank, experts=experts)
    if config.method.trains == "backbone":
        raise UserError(
            f"--what: adapter given for a run of method.kind={config.method.kind}, which has none; "
            "accepted: merged, or backbone"
        )
    if config.method.trains == "modules":
        refuse_layout(config, rank=rank, same_rank=same_rank, experts=experts)
        layout, _ = _built(config, state, torch.device("cpu"))
        write_peft_checkpoint(out, layout, tensors, heads, training)
        save_tokenizer_of(config, state, out)
        return 0.0
    built = _layout_of(config, state, adapted)
    model = None if built is None else built.model
    tokens = None
    if config.model.added_tokens and built is not None:
        tokens = trained_tokens(built, saved_rows(tensors), load_tokenizer(config.model))
    try:
        exported = export_adapter(
            out,
            adapters,
            experts={} if model is None else expert_counts(model),
            layouts={} if model is None else chosen_layouts(model, experts),
            former_experts=() if model is None else former_experts(model),
            key=str if model is None else PeftKeys(model),
            modules_to_save=None if model is None else modules_to_save(model, heads),
            swapped=set() if model is None else swapped_stacks(model),
            fan_in_fan_out=built is not None
            and fan_in_fan_out(built.adapted_layers[name] for name in adapted),
            initial=saved_initial(saved),
            frozen=saved.frozen,
            splits_weight=METHODS[config.method.kind].splits_weight,
            rank=rank,
            same_rank=same_rank,
            base_model=config.model.id,
            revision=config.model.revision,
            task_type=training.task.peft_task_type,
            heads=heads,
            tokens=tokens,
            magnitudes=saved_magnitudes(tensors),
        )
    except NothingToExport as nothing:
        accepted = "accepted: a checkpoint with some"
        raise UserError(f"{saved.checkpoint}: {nothing}; {accepted}") from nothing
    save_tokenizer_of(config, state, out)
    write_adapter_card(
        out, training, ranks=exported.ranks, notes=exported.notes, tokens=tokens is not None,
        resize=None if tokens is None else tokens.resize,
    )  # fmt: skip
    return exported.error


def _layout_of(
    config: Config, state: Mapping[str, Any], adapted: Sequence[str]
) -> BuiltModel | None:
    """The model without its weights, which tells how PEFT sees the adapted matrices. None, as if it
    had no experts, where it is no longer available and no expert has an adapter, no token rows."""
    try:
        return _built(config, state, torch.device("cpu"))[0]
    except UserError:
        if config.model.added_tokens or any(stem(name) != name for name in adapted):
            raise
        return None


def _built(
    config: Config, state: Mapping[str, Any], device: torch.device
) -> tuple[BuiltModel, Task]:
    """The model, without its weights, and the task of a checkpoint."""
    task = TASKS[config.task.kind](config.task, load_processor(config))
    task.load_labels_state(state["labels"])
    return build(config, task, device, state.get("unreached", [])), task


def _refuse_merging(config: Config, *, with_adapter: bool) -> None:
    """Raises UserError for a run of which no whole model can be written."""
    if config.method.trains == "modules" and with_adapter:
        raise UserError(
            "--what: merged given for a run of method.kind=peft; accepted: adapter, which PEFT's "
            "merge_and_unload merges"
        )
    if config.model.weights == "random":
        raise UserError("model.weights: random has no files to merge into; accepted: pretrained")


def write_model(
    saved: Saved,
    out: Path,
    *,
    with_adapter: bool,
    dequantised: bool,
    device: torch.device,
    note: str = "",
    dtype: str = "auto",
) -> None:
    """Write a model folder for `from_pretrained`, with one tensor (or stack) in memory at a time.

    `with_adapter`: W + ΔW in adapted layers. `dequantised`: W quantised and dequantised, as in
    training; else W of the pretrained files. `note`: for its card; `dtype`: as in `export_run`.
    Raises UserError where a merge is not possible.
    """
    config, tensors, state = saved_config(saved.state), saved.tensors, saved.state
    _refuse_merging(config, with_adapter=with_adapter)
    backbone, _ = _built(config, state, device)
    with refuse_mismatch(saved.checkpoint):
        heads = saved_heads(tensors)
        if config.method.trains == "backbone" and with_adapter:
            heads = saved_backbone(tensors)
        rows = saved_rows(tensors) if with_adapter else {}
        initial = saved_initial(saved)
        parts = saved_parts(config, saved) if with_adapter else {}
    refuse_tied_targets(backbone, parts)
    if device.type == "cuda":  # weight formats compile kernels
        configure_compiler()
    out.mkdir(parents=True, exist_ok=True)
    folder = resolve_folder(config.model.id, config.model.revision)
    merger = Merger(
        backbone, folder, parts, initial, heads, rows,
        saved_magnitudes(tensors) if with_adapter else {},
        dequantised=dequantised, device=device,
        dtype=None if dtype == "auto" else getattr(torch, dtype),
    )  # fmt: skip
    write_shards(merger.tensors(), out)
    backbone.model.config.dtype = merger.dtype
    backbone.model.config.save_pretrained(out)
    save_tokenizer_of(config, state, out)
    quantised = config.model.quantization != "none"
    held = "dequantised, as in training" if dequantised else "those of the unquantised model"
    write_model_card(
        out, training_of(saved, config, note), what="merged" if with_adapter else "backbone",
        notes=[f"Its matrices are {held}."] if quantised else [],
    )  # fmt: skip
