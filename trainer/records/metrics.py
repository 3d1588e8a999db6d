"""Metrics of a run: metrics.jsonl, predictions.jsonl, and progress on the terminal."""

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

from adapters.decision import Decision
from trainer.config.config import Config
from trainer.files import LOSSES, METRICS, PREDICTIONS
from trainer.records import phases
from trainer.records.bars import tqdm
from trainer.records.callbacks import Callback, Evaluated, StepRecord
from trainer.records.heartbeat import Heartbeat
from trainer.records.jsonl import keep_lines, write_objects
from trainer.records.progress import Progress


class MetricsWriter(Callback):
    """Rank 0's metrics of a run; a resumed run appends to the same files."""

    def __init__(
        self, config: Config, folder: Path, steps: int, progress: Progress, heartbeat: Heartbeat
    ):
        self.file, start = folder / METRICS, progress.step
        self.remark = keep_lines(self.file, lambda line: start > 0 and _belongs(line, progress))
        self._stream = self.file.open("a", encoding="utf-8")
        self._heartbeat = heartbeat
        heartbeat.set_state("starting", step=start, steps=steps)
        self._steps, self._plain_after = steps, start
        self._decisions, self._evaluated = 0, ""
        self._bar: Any = None
        self._shown = config.log.shown
        if self._shown == "bar":
            self._bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True)
            phases.tell_beside(self._bar.write)

    def write(self, values: dict[str, Any]) -> None:
        """Write a logged step or an evaluation as one line."""
        finite = finite_or_null(values)
        self._stream.write(json.dumps(finite) + "\n")
        self._stream.flush()
        self._heartbeat.beat(**finite)
        self._show(values)

    def on_step(self, step: StepRecord) -> None:
        if step.skipped:
            self.log_line(f"step {step.step}: loss or gradient not finite, step skipped")
        self._heartbeat.beat(step=step.step, loss=None if _is_nan(step.loss) else step.loss)
        if self._bar is not None:
            with suppress(OSError):
                self._bar.update(1)
        if step.logged is not None:
            self.write(dict(step.logged))

    def on_decision(self, step: int, decision: Decision) -> None:
        self._decisions += 1

    def on_eval(self, evaluation: Evaluated) -> None:
        self.write(dict(evaluation.values))
        for name, lines in ((PREDICTIONS, evaluation.answers), (LOSSES, evaluation.losses)):
            if evaluation.is_kept and lines:
                objects = ({"step": evaluation.step, **line} for line in lines)
                write_objects(self.file.with_name(name), objects)

    def set_state(self, state: str) -> None:
        """Enter a phase other than training steps; the bar ends with them."""
        self._heartbeat.set_state(state)
        if state == "finishing":
            self._close_bar()

    def started(self, seconds: dict[str, float]) -> None:
        """Tell the phases of the start, once the first step is done."""
        self._heartbeat.add(start_seconds={name: round(s, 3) for name, s in seconds.items()})
        self.log_line(f"started   {phases.described(seconds)}")

    def log_line(self, line: str) -> None:
        """Print a line on the terminal, above the progress bar."""
        if self._shown == "none":
            return
        with suppress(OSError):  # a closed terminal does not end the run
            if self._bar is not None:
                self._bar.write(line)
            else:
                print(line, flush=True)

    def close(self) -> None:
        self._close_bar()
        self._stream.close()

    def _close_bar(self) -> None:
        if self._bar is not None:
            with suppress(OSError):
                self._bar.close()
            self._bar = None

    def _show(self, values: dict[str, Any]) -> None:
        step = values["step"]
        evaluated = {k: v for k, v in values.items() if k.startswith("eval_")}
        if evaluated:
            figures = "  ".join(f"{name} {value:.4g}" for name, value in evaluated.items())
            seconds, peak = values["evaluation_seconds"], values["evaluation_peak_memory_gib"]
            best = "  best so far" * (values.get("best_step") == step)
            self.log_line(
                f"step {step}/{self._steps}  {figures}  ({seconds:.1f} s, {peak:.2f} GiB){best}"
            )
            self._evaluated = f", eval {next(iter(evaluated.values())):.4g}"
        elif self._bar is not None:
            decided = f", {self._decisions} decisions" if self._decisions else ""
            with suppress(OSError):
                self._bar.set_postfix_str(
                    f"loss {values['loss']:.4f}{self._evaluated}, lr "
                    f"{values['learning_rate']:.2e}, {speed(values)}, "
                    f"{values['peak_memory_gib']:.2f} GiB{decided}"
                )
        elif step > self._plain_after:  # about twenty lines per run
            self._plain_after = step - 1 + max(1, self._steps // 20)
            self.log_line(
                f"step {step}/{self._steps}  loss {values['loss']:.4f}  "
                f"lr {values['learning_rate']:.2e}  grad {values['grad_norm']:.3f}  "
                f"{speed(values)}  {values['peak_memory_gib']:.2f} GiB"
            )


def speed(values: dict[str, Any]) -> str:
    """That of a logged step in words, with its model FLOPs utilisation where that is known."""
    share = f" ({values['mfu']:.0%} MFU)" if "mfu" in values else ""
    return f"{values['tokens_per_second']:,.0f} tokens/s{share}"


def finite_or_null(values: dict[str, Any]) -> dict[str, Any]:
    """The values as metrics.jsonl holds them: None in place of what is not finite."""
    return {name: None if _is_nan(value) else value for name, value in values.items()}


def _belongs(line: dict[str, Any], progress: Progress) -> bool:
    """Whether a line was logged up to `progress`; later steps are repeated after a resume."""
    return line["step"] <= (progress.evaluated if "eval_loss" in line else progress.step)


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
