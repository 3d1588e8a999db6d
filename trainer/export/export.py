"""From a run or a checkpoint to something that others load: a PEFT folder, or a whole model."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.gated import GatedAdapter
from adapters.methods.registry import METHODS
from adapters.peft_export import export_adapter
from adapters.units import expert_counts, stem
from trainer.checkpoint import store
from trainer.checkpoint.state import read_initial_adapters
from trainer.config.config import Config, parse_config, with_overrides
from trainer.config.engines import AUTO
from trainer.distributed.world import World
from trainer.errors import UserError, refuse_mismatch
from trainer.export.merge import Merger, refuse_tied_targets, write_shards
from trainer.files import CHECKPOINTS
from trainer.model.backbone import BuiltModel
from trainer.model.build import build
from trainer.model.hub import load_tokenizer, resolve_folder
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
    overrides: Sequence[str] = (),
) -> str:
    """Write `what` (`adapter`, `merged` or `backbone`) of a run or checkpoint to `out`.

    `base`: whether a quantised backbone's matrices are written as `trained`, dequantised, or as in
    the `original` files. `rank`: compress the adapter to it. Returns remarks: what the adapter
    loses without quantisation ("" where the backbone was not quantised, or `measure` is off) and
    by compression.
    """
    if rank is not None and rank < 1:
        raise UserError(f"--rank: {rank} given; accepted: 1 or more")
    if out.exists():
        raise UserError(f"{out}: exists already; accepted: a folder that does not")
    checkpoint, state = locate(source)
    config = with_overrides(saved_config(state), overrides)
    state["config"] = config.model_dump(mode="json")
    note = ""
    if config.model.quantization != "none" and measure:
        note = cost_of_dequantising(config, world, checkpoint)
    if what == "adapter":
        error = write_adapter(checkpoint, state, out, note, rank)
        if rank is not None:
            note = f"{note}\nCompressed to rank {rank}: relative error {error:.2%}.".strip()
    else:
        write_model(
            checkpoint, state, out,
            with_adapter=what == "merged", dequantised=base == "trained", device=world.device,
        )  # fmt: skip
    return note


def locate(path: Path) -> tuple[Path, dict[str, Any]]:
    """(checkpoint, its state) for a run folder (its newest) or a checkpoint folder, verified."""
    if (path / "manifest.json").is_file():
        return path, store.verify(path)
    checkpoint, state, _ = store.find("auto", path / CHECKPOINTS)
    if checkpoint is None:
        raise UserError(
            f"{path}: neither a run folder with a checkpoint nor a checkpoint; accepted: "
            "runs/NAME or runs/NAME/checkpoints/step-00000100"
        )
    return checkpoint, state


def saved_config(state: Mapping[str, Any]) -> Config:
    """The configuration that a checkpoint was made with."""
    return parse_config(state["config"])


def saved_adapters(config: Config, tensors: Mapping[str, Tensor]) -> dict[str, GatedAdapter]:
    """Adapters by unit name from a checkpoint's tensors, with the gates that they are used with."""
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


def saved_initial(checkpoint: Path, state: Mapping[str, Any]) -> dict[str, GatedAdapter]:
    """The parts of W that adapters started as; empty where the method takes none."""
    initial_adapters = read_initial_adapters(checkpoint, state) or {}
    return {name: initial.adapter for name, initial in initial_adapters.items()}


def saved_heads(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Whole trained modules by their path in the model, each its parameters by name."""
    heads: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("head/"):
            _, path, parameter = name.split("/")
            heads.setdefault(path, {})[parameter.removeprefix("inner.")] = tensor
    return heads


def cost_of_dequantising(config: Config, world: World, checkpoint: Path) -> str:
    """What the adapter loses on the unquantised backbone, measured on the evaluation data."""
    if config.data.eval is None:
        return (
            f"Trained on the {config.model.quantization} backbone. What the adapter loses on the "
            "unquantised one was not measured: the run has no data.eval."
        )
    engine = config.engine.model_copy(update={"kind": AUTO["one process"], "config": None})
    plain = config.model.model_copy(update={"quantization": "none"})
    losses = [
        evaluate_saved(
            config.model_copy(update={"model": model, "engine": engine}), world, checkpoint
        )["eval_loss"]
        for model in (config.model, plain)
    ]
    return (
        f"Trained on the {config.model.quantization} backbone: held-out loss {losses[0]:.4f} there "
        f"(and on its dequantised copy), {losses[1]:.4f} on the unquantised backbone "
        f"({losses[1] - losses[0]:+.4f})."
    )


def write_adapter(
    checkpoint: Path,
    state: Mapping[str, Any],
    out: Path,
    note: str = "",
    rank: int | None = None,
) -> float:
    """A PEFT folder from a checkpoint; of the backbone no weights are needed. Returns what
    compressing the adapter to `rank` loses (relative, 0 without it)."""
    config, tensors = saved_config(state), store.read_tensors(checkpoint)
    task = TASKS[config.task.kind]
    with refuse_mismatch(checkpoint):
        heads, adapters = saved_heads(tensors), saved_adapters(config, tensors)
    return export_adapter(
        out,
        adapters,
        experts=_experts(config, state, adapters),
        initial=saved_initial(checkpoint, state),
        rank=rank,
        base_model=config.model.id,
        revision=config.model.revision,
        task_type=task.peft_task_type,
        model_class=task.auto_class.__name__,
        heads=heads,
        labels=(len(state["labels"].get("labels", ())) or 1) if heads else None,
        note=note,
    )


def _experts(
    config: Config, state: Mapping[str, Any], adapters: Mapping[str, GatedAdapter]
) -> dict[str, int]:
    """How many experts every stack of the model has; where no stack has adapters, a model that
    is not here any more is taken for one without."""
    try:
        return expert_counts(_built(config, state, torch.device("cpu"))[0].model)
    except UserError:
        if any(stem(name) != name for name in adapters):
            raise
        return {}


def _built(
    config: Config, state: Mapping[str, Any], device: torch.device
) -> tuple[BuiltModel, Task]:
    """The model without its weights, and the task, of a checkpoint."""
    tokenizer = load_tokenizer(config.model)
    task = TASKS[config.task.kind](config.task, tokenizer)
    task.load_labels_state(state["labels"])
    return build(config, task, device), task


def write_model(
    checkpoint: Path,
    state: Mapping[str, Any],
    out: Path,
    *,
    with_adapter: bool,
    dequantised: bool,
    device: torch.device,
) -> None:
    """A model folder that `from_pretrained` loads, one tensor (or stack) in memory at a time.

    `with_adapter`: every adapted layer's W + ΔW. `dequantised`: W as the adapter was trained on it,
    through quantisation and back; else W as it is in the pretrained files.
    """
    config, tensors = saved_config(state), store.read_tensors(checkpoint)
    if config.model.weights == "random":
        raise UserError("model.weights: random has no files to merge into; accepted: pretrained")
    backbone, task = _built(config, state, device)
    with refuse_mismatch(checkpoint):
        heads = saved_heads(tensors)
        adapters = saved_adapters(config, tensors) if with_adapter else {}
    initial = saved_initial(checkpoint, state)
    refuse_tied_targets(backbone, adapters)
    out.mkdir(parents=True, exist_ok=True)
    folder = resolve_folder(config.model.id, config.model.revision)
    merger = Merger(
        backbone, folder, adapters, initial, heads,
        dequantised=dequantised, device=device,
    )  # fmt: skip
    write_shards(merger.tensors(), out)
    backbone.model.config.save_pretrained(out)
    task.tokenizer.save_pretrained(out)
    if (folder / "generation_config.json").is_file():
        shutil.copy(folder / "generation_config.json", out)
