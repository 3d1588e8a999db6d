"""What a run leaves at its end: the adapter, the loss curve, README.md."""

from pathlib import Path

import torch

from adapters.layers.expert_modules import swapped_stacks
from adapters.methods.peft import Peft
from adapters.peft_export import NothingToExport, export_adapter
from adapters.units import expert_counts, fan_in_fan_out
from trainer.checkpoint.saved import read_saved
from trainer.config.config import Config
from trainer.data.templates import set_template
from trainer.device_memory import peak_gib
from trainer.errors import RunFailed
from trainer.export.added_tokens import trained_tokens
from trainer.export.baselines import write_peft
from trainer.export.expert_layouts import chosen_layouts
from trainer.export.export import write_model, written_folder
from trainer.export.tokenizer import save_tokenizer
from trainer.files import ADAPTER, FIGURES, METRICS, MODEL
from trainer.model.peft_names import PeftKeys, former_experts, modules_to_save
from trainer.records.jsonl import read_metrics
from trainer.report.loss_curve import draw_loss
from trainer.session import Session

_CPU = torch.device("cpu")
_RESULT = {
    "adapters": "| `adapter/` | a LoRA that `peft.PeftModel.from_pretrained` loads |",
    "modules": "| `adapter/` | PEFT's adapter, which `peft.PeftModel.from_pretrained` loads |",
    "backbone": "| `model/` | the trained model, for `from_pretrained` |",
}


def finish(session: Session, folder: Path, steps: int, fault: str | None = None) -> None:
    """Export the adapter, draw the loss, write README.md, also where the run ends with a `fault`.
    Rank 0 only: adapters are replicated."""
    full = session.config.method.trains == "backbone"
    adapter = folder / (MODEL if full else ADAPTER)
    try:
        with written_folder(adapter, RunFailed) as unfinished:
            if full:
                note, where = _export_model(session, folder, unfinished), str(adapter)
            else:
                note, where = _export(session, unfinished), str(adapter)
            template = set_template(session.tokenizer, session.config.data)
            if full or template is not None or session.backbone.added is not None:
                save_tokenizer(session.tokenizer, template, unfinished)
    except NothingToExport as error:
        note, where = "", f"none: {error}"
    figure = draw_loss([folder], folder / FIGURES / "loss")
    lines = read_metrics(folder / METRICS)
    losses = [line["loss"] for line in lines if line.get("loss") is not None]
    scores: dict = next((line for line in reversed(lines) if "eval_loss" in line), {})
    word = "done" if fault is None else "failed"
    summary = f"{word:<10}{steps} steps"
    if losses:
        summary += f", loss {losses[0]:.4f} -> {losses[-1]:.4f}"
    for name, value in scores.items():
        if name != "step" and value is not None:
            summary += f", {name} {value:.4g}"
    summary += f", peak {peak_gib(session.world.device):.2f} GiB"
    (folder / "README.md").write_text(
        _readme(session.config, summary.removeprefix("done").strip(), note), encoding="utf-8"
    )
    if session.config.log.progress != "none":
        print(f"{summary}\n{adapter.name:<10}{where}\nfigure    {figure}", flush=True)


def _export_model(session: Session, run: Path, folder: Path) -> str:
    """The whole model, from the last checkpoint: no rank holds it."""
    if session.config.model.weights == "random":
        raise NothingToExport("model.weights=random has no files to take the rest from")
    write_model(read_saved(run), folder, with_adapter=True, dequantised=False, device=_CPU)
    return ""


def _export(session: Session, folder: Path) -> str:
    config = session.config
    heads = {
        path: {
            name.removeprefix("inner."): parameter.detach()
            for name, parameter in head.named_parameters()
        }
        for path, head in session.backbone.heads.items()
    }
    rows = {path: one.values.detach() for path, one in session.backbone.token_rows.items()}
    note = ""
    if config.model.quantization != "none":
        note = (
            f"Trained on the {config.model.quantization} backbone, whose matrices differ from the "
            f"unquantised ones by {session.backbone.quantization_error:.2%} (Frobenius). `python "
            "launch/export.py RUN OUT` measures the effect on held-out data."
        )
    if isinstance(session.method, Peft):
        labels = session.task.labels_state()
        write_peft(folder, *session.method.exported(), config, heads, labels)
        return note
    with session.method.inference():
        export_adapter(
            folder,
            session.method.adapters,
            initial={
                name: initial.adapter for name, initial in (session.initial_adapters or {}).items()
            },
            frozen=session.frozen,
            splits_weight=session.method.splits_weight,
            base_model=config.model.id,
            revision=config.model.revision,
            task_type=session.task.peft_task_type,
            model_class=session.task.auto_class.__name__,
            heads=heads,
            labels=session.task.head_outputs(session.task.labels_state()),
            experts=expert_counts(session.model),
            swapped=swapped_stacks(session.model),
            fan_in_fan_out=fan_in_fan_out(
                session.backbone.adapted_layers[name]
                for name in [*session.method.adapters, *session.frozen]
            ),
            layouts=chosen_layouts(session.backbone.model),
            former_experts=former_experts(session.backbone.model),
            key=PeftKeys(session.backbone.model),
            modules_to_save=modules_to_save(session.backbone.model, heads),
            note=note,
            tokens=trained_tokens(session.backbone, rows, session.tokenizer),
            magnitudes={
                name: adapter.magnitude.m
                for name, adapter in session.method.adapters.items()
                if adapter.magnitude is not None
            },
        )
    return note


def _readme(config: Config, summary: str, note: str) -> str:
    return f"""# {config.run.name}

{config.method.kind} on `{config.model.id}` ({config.model.quantization}): {summary}.

| | |
|---|---|
| `config.yaml` | the resolved configuration |
| `units.json` | the adapted matrices |
| `allocation.jsonl` | the decisions of an adaptive method |
| `initial.safetensors` | initial adapters (LeLoRA, PiSSA, MiLoRA); checkpoints need it |
| `metrics.jsonl` | one object per logged step or evaluation |
| `heartbeat.json` | state of the run, for `rankcast watch` and monitoring |
| `tensorboard/` | the metrics, for `tensorboard --logdir` |
| `checkpoints/` | resumable on any engine and number of ranks |
{_RESULT[config.method.trains]}
| `figures/` | the loss curve |

![loss](figures/loss.png)

{note}
"""
