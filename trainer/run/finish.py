"""What a run leaves at its end: the adapter, the loss curve, README.md."""

from collections.abc import Sequence
from pathlib import Path

import torch

from adapters.layers.expert_modules import swapped_stacks
from adapters.methods.peft import Peft
from adapters.peft_export import NothingToExport, export_adapter
from adapters.units import expert_counts, fan_in_fan_out
from trainer.checkpoint.saved import read_saved
from trainer.checkpoint.store import of_step
from trainer.config.config import Config
from trainer.data.templates import set_template
from trainer.device_memory import peak_gib
from trainer.errors import RunFailed, UserError
from trainer.export.added_tokens import trained_tokens
from trainer.export.baselines import write_peft
from trainer.export.card import Training, scores_in, write_adapter_card
from trainer.export.expert_layouts import chosen_layouts
from trainer.export.export import write_adapter, write_model, written_folder
from trainer.export.tokenizer import copy_generation_config, save_tokenizer
from trainer.files import ADAPTER, CHECKPOINTS, FIGURES, METRICS, MODEL, PREDICTIONS, README
from trainer.model.hub import hub_id
from trainer.model.peft_names import PeftKeys, former_experts, modules_to_save
from trainer.records.answers import answers_table
from trainer.records.heartbeat import read_heartbeat
from trainer.records.jsonl import final_scores, read_metrics
from trainer.records.phases import described
from trainer.records.progress import Progress
from trainer.report.loss_curve import draw_loss
from trainer.session import Session

_CPU = torch.device("cpu")
_RESULT = {
    "adapters": "| `adapter/` | a LoRA that `peft.PeftModel.from_pretrained` loads",
    "modules": "| `adapter/` | PEFT's adapter, which `peft.PeftModel.from_pretrained` loads",
    "backbone": "| `model/` | the trained model, for `from_pretrained`",
}


def finish(
    session: Session, folder: Path, progress: Progress, fault: str | None = None
) -> list[str]:
    """Export the adapter (of the best checkpoint, where the run keeps it), draw the loss, write
    README.md, also where the run ends with a `fault`. Rank 0 only: adapters are replicated. Returns
    lines for the terminal."""
    full = session.config.method.trains == "backbone"
    result, best, note = folder / (MODEL if full else ADAPTER), progress.best, _note(session)
    try:
        with written_folder(result, RunFailed) as unfinished:
            step = progress.step if best is None else best.step
            if full:  # no rank holds it
                _export_model(session, folder, None if best is None else step, unfinished)
            elif step != progress.step:
                write_adapter(read_saved(of_step(folder / CHECKPOINTS, step)), unfinished, note)
            else:
                about = "" if best is None else f"\n\nThis is {best}."
                training = _training(session, folder, step, f"{note}{about}".strip())
                _export(session, unfinished, training)
            where = str(result)
            template = set_template(session.tokenizer, session.config.data)
            save_tokenizer(session.tokenizer, template, unfinished)
            copy_generation_config(session.config, unfinished)
    except NothingToExport as error:
        where = f"none: {error}"
    figure = draw_loss([folder], folder / FIGURES / "loss")
    figures, failed = _more_figures(folder)
    lines = read_metrics(folder / METRICS)
    losses = [line["loss"] for line in lines if line.get("loss") is not None]
    word = "done" if fault is None else "failed"
    summary = f"{word:<10}{progress.step} steps"
    if losses:
        summary += f", loss {losses[0]:.4f} -> {losses[-1]:.4f}"
    for name, value in final_scores(lines).items():
        if name.startswith("eval_") and value is not None:
            summary += f", {name} {value:.4g}"
    summary += f", peak {peak_gib(session.world.device):.2f} GiB"
    if started := read_heartbeat(folder).get("start_seconds"):
        note = f"{note}\n\nThe last start: {described(started)} (seconds).".strip()
    answers = answers_table(read_metrics(folder / PREDICTIONS), session.config.generation.shown)
    if answers:
        note = f"{note}\n\n## Answers to held-out records\n\n{answers}".strip()
    exported = f"step {progress.step}" if best is None else str(best)
    if best is None and (metric := session.config.run.keep_best) is not None:
        exported += f", since {metric} was finite in no evaluation: run.keep_best had no effect"
    shown = [figure, *figures]
    readme = _readme(session.config, summary.removeprefix("done").strip(), exported, note, shown)
    (folder / README).write_text(readme, encoding="utf-8")
    said = [summary, f"{result.name:<10}{where} ({exported})", f"figure    {figure}"]
    return [*said, f"note      other figures were not drawn: {failed}"] if failed else said


def _more_figures(folder: Path) -> tuple[list[Path], str]:
    """(the figures but for the loss, why there are none): a record that cannot be read must not
    fail a run that has trained."""
    from trainer.report.report import draw_run  # late: matplotlib

    try:
        return draw_run(folder), ""
    except UserError as error:
        return [], str(error)


def _export_model(session: Session, run: Path, step: int | None, folder: Path) -> None:
    """Of the checkpoint of `step`; None: of the newest one."""
    if session.config.model.weights == "random":
        raise NothingToExport("model.weights=random has no files to take the rest from")
    saved = read_saved(run if step is None else of_step(run / CHECKPOINTS, step))
    write_model(saved, folder, with_adapter=True, dequantised=False, device=_CPU)


def _note(session: Session) -> str:
    quantization = session.config.model.quantization
    if quantization == "none":
        return ""
    return (
        f"Trained on the {quantization} backbone, whose matrices differ from the unquantised ones "
        f"by {session.backbone.quantization_error:.2%} (Frobenius). `python launch/export.py RUN "
        "OUT` measures the effect on held-out data."
    )


def _training(session: Session, folder: Path, step: int, note: str) -> Training:
    found = final_scores(read_metrics(folder / METRICS))
    return Training(
        session.config, step, scores_in(found), found.get("step", step),
        session.task.labels_state(), note, hub_id(session.config.model),
    )  # fmt: skip


def _export(session: Session, folder: Path, training: Training) -> None:
    config = session.config
    heads = {
        path: {
            name.removeprefix("inner."): parameter.detach()
            for name, parameter in head.named_parameters()
        }
        for path, head in session.backbone.heads.items()
    }
    rows = {path: one.values.detach() for path, one in session.backbone.token_rows.items()}
    if isinstance(session.method, Peft):
        write_peft(folder, *session.method.exported(), heads, training)
        return
    tokens = trained_tokens(session.backbone, rows, session.tokenizer)
    with session.method.inference():
        exported = export_adapter(
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
            heads=heads,
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
            tokens=tokens,
            magnitudes={
                name: adapter.magnitude.m
                for name, adapter in session.method.adapters.items()
                if adapter.magnitude is not None
            },
        )
    write_adapter_card(
        folder, training, ranks=exported.ranks, notes=exported.notes, tokens=tokens is not None,
        resize=None if tokens is None else tokens.resize,
    )  # fmt: skip


def _readme(config: Config, summary: str, exported: str, note: str, figures: Sequence[Path]) -> str:
    pictures = "\n\n".join(f"![{one.stem}]({FIGURES}/{one.name})" for one in figures)
    return f"""# {config.run.name}

{config.method.kind} on `{config.model.id}` ({config.model.quantization}): {summary}.

| | |
|---|---|
| `config.yaml` | the resolved configuration |
| `units.json` | the adapted matrices |
| `allocation.jsonl` | the decisions of an adaptive method |
| `initial.safetensors` | initial adapters (LeLoRA, PiSSA, MiLoRA); checkpoints need it |
| `metrics.jsonl` | one object per logged step or evaluation |
| `predictions.jsonl` | the answers to records of the evaluation, where the task has answers |
| `heartbeat.json` | state of the run, for `rankcast watch` and monitoring |
| `tensorboard/` | the metrics, for `tensorboard --logdir` |
| `checkpoints/` | resumable on any engine and number of ranks |
{_RESULT[config.method.trains]}: {exported} |
| `figures/` | the figures below, as PNG and SVG |

`rankcast report RUN --html FILE` makes one page of figures, samples, metrics and configuration.

{pictures}

{note}
"""
