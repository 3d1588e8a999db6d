"""Metrics of a run: metrics.jsonl, TensorBoard, and progress on the terminal."""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from trainer.config.config import Config
from trainer.files import BOARD, METRICS
from trainer.records.answers import answers_table
from trainer.records.heartbeat import Heartbeat
from trainer.records.jsonl import keep_lines
from trainer.records.progress import Progress

_BOARD_POINTS = 10_000
"""TensorBoard draws a thousand points of a curve; more of them only make its files grow."""


class MetricsWriter:
    """Rank 0's metrics of a run; a resumed run appends to the same files."""

    def __init__(
        self, config: Config, folder: Path, steps: int, progress: Progress, heartbeat: Heartbeat
    ):
        self.file, start = folder / METRICS, progress.step
        self.remark = keep_lines(self.file, lambda line: start > 0 and _belongs(line, progress))
        self._stream = self.file.open("a", encoding="utf-8")
        self._board = None
        if config.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._spacing = steps / _BOARD_POINTS
            self._board_from = 0.0  # the first step to draw next
            self._board = SummaryWriter(str(folder / BOARD), purge_step=start + 1)
            if start == 0:
                self._board.add_text("config", f"```yaml\n{config.to_yaml()}\n```")
        self._answers = config.generation.shown
        self.heartbeat = heartbeat
        heartbeat.set_state("starting", step=start, steps=steps)
        self._steps, self._plain_after = steps, start
        self._bar: tqdm | None = None
        self._shown = config.log.shown
        if self._shown == "bar":
            self._bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True)

    def write(self, values: dict[str, Any]) -> None:
        """Write a logged step or an evaluation as one line."""
        finite = {k: None if _is_nan(v) else v for k, v in values.items()}
        self._stream.write(json.dumps(finite) + "\n")
        self._stream.flush()
        evaluated = "eval_loss" in values
        if self._board is not None and (evaluated or values["step"] >= self._board_from):
            if not evaluated:
                self._board_from = values["step"] + self._spacing
            for name, value in finite.items():
                if name != "step" and isinstance(value, int | float):
                    group = "eval/" if evaluated else "train/"
                    tag = name if "/" in name else group + name  # method/… names its own group
                    self._board.add_scalar(tag, value, values["step"])
        self.heartbeat.beat(**finite)
        self._show(values)

    def write_answers(self, step: int, answers: Sequence[Mapping[str, Any]]) -> None:
        """Show the first generated answers in TensorBoard."""
        table = answers_table(answers, self._answers)
        if self._board is not None and table:
            self._board.add_text("eval/answers", table, step)

    def advance(self, step: int, loss: float, *, skipped: bool) -> None:
        """Report a finished step."""
        if skipped:
            self.log_line(f"step {step}: loss or gradient not finite, step skipped")
        self.heartbeat.beat(step=step, loss=None if _is_nan(loss) else loss)
        if self._bar is not None:
            with suppress(OSError):
                self._bar.update(1)

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
        self._stream.close()
        if self._board is not None:
            self._board.close()
        if self._bar is not None:
            with suppress(OSError):
                self._bar.close()

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
        elif self._bar is not None:
            with suppress(OSError):
                self._bar.set_postfix_str(f"loss {values['loss']:.4f}")
        elif step > self._plain_after:  # about twenty lines per run
            self._plain_after = step - 1 + max(1, self._steps // 20)
            self.log_line(
                f"step {step}/{self._steps}  loss {values['loss']:.4f}  "
                f"lr {values['learning_rate']:.2e}  grad {values['grad_norm']:.3f}  "
                f"{values['tokens_per_second']:.0f} tokens/s  {values['peak_memory_gib']:.2f} GiB"
            )


def _belongs(line: dict[str, Any], progress: Progress) -> bool:
    """Whether a line was logged up to `progress`; later steps are repeated after a resume."""
    return line["step"] <= (progress.evaluated if "eval_loss" in line else progress.step)


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
