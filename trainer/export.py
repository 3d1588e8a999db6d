"""From a run or a checkpoint to something that others load: a PEFT folder, or a whole model."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from adapters.experts import StackedLinear
from adapters.export import export_adapter, merged
from adapters.gated import GatedAdapter
from adapters.linear import AdaptedLinear
from adapters.registry import METHODS
from adapters.units import expert_counts, stem
from trainer import architecture, checkpoint_files
from trainer.architecture import Backbone
from trainer.checkpoint import read_starts
from trainer.config import Config, parse_config, with_overrides
from trainer.distributed import World
from trainer.errors import UserError
from trainer.evaluation import evaluate_saved
from trainer.layout import Layout
from trainer.pretrained import PretrainedFiles
from trainer.tasks import TASKS
from trainer.tasks.base import Task

_SHARD_BYTES = 4 * 2**30


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
        return path, checkpoint_files.verify(path)
    checkpoint, state, _ = checkpoint_files.find("auto", path / "checkpoints")
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
    starts = read_starts(checkpoint, state) or {}
    return {name: start.adapter for name, start in starts.items()}


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
    engine = config.engine.model_copy(update={"kind": "single", "config": None})
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
    config, tensors = saved_config(state), checkpoint_files.read_tensors(checkpoint)
    heads, adapters = saved_heads(tensors), saved_adapters(config, tensors)
    experts = None
    if any(stem(name) != name for name in adapters):
        experts = expert_counts(_built(config, state, torch.device("cpu"))[0].model)
    return export_adapter(
        out,
        adapters,
        experts=experts,
        initial=saved_initial(checkpoint, state),
        rank=rank,
        base_model=config.model.id,
        revision=config.model.revision,
        task=config.task.kind,
        heads=heads,
        labels=len(state["labels"].get("labels", ())) or 1,
        note=note,
    )


def _built(config: Config, state: Mapping[str, Any], device: torch.device) -> tuple[Backbone, Task]:
    """The model without its weights, and the task, of a checkpoint."""
    tokenizer = architecture.load_tokenizer(config.model)
    task = TASKS[config.task.kind](config.task, tokenizer)
    task.load_labels_state(state["labels"])
    return architecture.build(config, task, device), task


def write_model(
    checkpoint: Path,
    state: Mapping[str, Any],
    out: Path,
    *,
    with_adapter: bool,
    dequantised: bool,
    device: torch.device,
) -> None:
    """A model folder that `from_pretrained` loads, one tensor in memory at a time.

    `with_adapter`: every host's W + ΔW. `dequantised`: W as the adapter was trained on it,
    through quantisation and back; else W as it is in the pretrained files.
    """
    config, tensors = saved_config(state), checkpoint_files.read_tensors(checkpoint)
    if config.model.weights == "random":
        raise UserError("model.weights: random has no files to merge into; accepted: pretrained")
    backbone, task = _built(config, state, device)
    adapters = saved_adapters(config, tensors) if with_adapter else {}
    initial = saved_initial(checkpoint, state)
    _refuse_tied_targets(backbone, adapters)
    out.mkdir(parents=True, exist_ok=True)
    parameters = _final_parameters(
        config, backbone, task, adapters, initial, saved_heads(tensors), dequantised, device
    )
    _write_shards(parameters, out)
    backbone.model.config.save_pretrained(out)
    task.tokenizer.save_pretrained(out)
    generation = architecture.resolve_folder(config.model.id, config.model.revision)
    if (generation / "generation_config.json").is_file():
        shutil.copy(generation / "generation_config.json", out)


def _final_parameters(
    config: Config,
    backbone: Backbone,
    task: Task,
    adapters: Mapping[str, GatedAdapter],
    initial: Mapping[str, GatedAdapter],
    heads: Mapping[str, Mapping[str, Tensor]],
    dequantised: bool,
    device: torch.device,
) -> Iterator[tuple[str, Tensor]]:
    """(name, value on the CPU) of every parameter of the model to be written."""
    model, dtype = backbone.model, backbone.dtype
    layout = Layout(model.config)
    folder = architecture.resolve_folder(config.model.id, config.model.revision)
    files, prefix = PretrainedFiles(folder, layout), model.base_model_prefix
    trained = {f"{path}.{name}": t for path, head in heads.items() for name, t in head.items()}
    for name, parameter in model.named_parameters():
        if name in trained:
            key = files.find(name, prefix)
            yield (key if key in layout.names(name) else name), trained[name].to(dtype)
            continue
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        if isinstance(owner, StackedLinear):
            matrices = [
                (f"{path}.{expert}", files.read_expert(path, expert, prefix, owner.shape))
                for expert in range(owner.experts)
            ]
        else:
            key = files.check([name], prefix, tuple(parameter.shape))
            matrices = [(path, files.read(key))]
        value = torch.stack([matrix.to(device, dtype) for _, matrix in matrices])
        starts = [initial.get(unit) for unit, _ in matrices]
        if isinstance(owner, AdaptedLinear | StackedLinear) and attribute == "weight":
            if dequantised:
                value = _as_trained(owner, value, starts)
            for index, (unit, _) in enumerate(matrices):
                if unit in adapters:
                    value[index] = merged(value[index], adapters[unit], starts[index])
        value = value.cpu()
        if not isinstance(owner, StackedLinear):
            yield (key if key in layout.names(name) else name), value[0].contiguous()
            continue
        keys = [files.check_expert(path, e, prefix, owner.shape) for e in range(owner.experts)]
        if keys[0] == keys[-1]:  # the files hold the whole stack
            yield keys[0][0], value.contiguous()
            continue
        for names, matrix in zip(keys, value, strict=True):
            for part, rows in zip(names, matrix.chunk(len(names)), strict=True):
                yield _under(prefix, part), rows.contiguous()
    for name, buffer in model.named_buffers():
        key = files.find(name, prefix)  # None for what is computed, and not kept in files
        if key is not None:
            value = files.read(key)
            assert value.shape == buffer.shape
            yield (key if key in layout.names(name) else name), value.contiguous()


def _under(prefix: str, key: str) -> str:
    """A key as a whole model has it; a bare backbone's files leave the first part out."""
    return key if key.startswith(f"{prefix}.") else f"{prefix}.{key}"


def _as_trained(
    host: AdaptedLinear | StackedLinear, weight: Tensor, initial: Sequence[GatedAdapter | None]
) -> Tensor:
    """W (matrices, out, in) as the adapters saw it: without the parts that the method took out
    through the weight format and back, and those parts."""
    dtype = weight.dtype
    taken = [0 if start is None else start.delta().to(weight.device) for start in initial]
    kept = torch.stack([(w.float() - t).to(dtype) for w, t in zip(weight, taken, strict=True)])
    packed = host.pack(kept if isinstance(host, StackedLinear) else kept[0], dtype)
    host.weight = torch.nn.Parameter(packed, requires_grad=False)
    kept = host.dequantised(dtype).view_as(weight)
    host.weight = torch.nn.Parameter(kept.to("meta"), requires_grad=False)
    return torch.stack([(w.float() + t).to(dtype) for w, t in zip(kept, taken, strict=True)])


def _write_shards(parameters: Iterator[tuple[str, Tensor]], out: Path) -> None:
    """Safetensors files of at most 4 GiB, with transformers' index."""
    shard: dict[str, Tensor] = {}
    weight_map: dict[str, str] = {}
    size = total = 0

    def flush() -> None:
        file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, out / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, value in parameters:
        nbytes = value.numel() * value.element_size()
        if shard and size + nbytes > _SHARD_BYTES:
            flush()
            size = 0
        shard[name], size, total = value, size + nbytes, total + nbytes
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _refuse_tied_targets(backbone: Backbone, adapters: Mapping[str, GatedAdapter]) -> None:
    """A shared matrix cannot take one user's update: the other would get it too."""
    embedding = backbone.model.get_input_embeddings().weight
    for path, host in backbone.hosts.items():
        if path in adapters and host.weight is embedding:
            raise UserError(
                f"{path} shares its matrix with the input embedding, so its adapter cannot be "
                "merged; accepted: export the adapter alone"
            )
