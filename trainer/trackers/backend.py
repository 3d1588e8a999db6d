"""One tracker behind accelerate's interface, with what that interface leaves to each: where a run
is kept, its identity when it is resumed, texts, tables and figures.

Imported only where a run has a tracker: accelerate is not needed otherwise.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate import tracking

from trainer.config.config import Config
from trainer.config.trackers import TRACKERS
from trainer.files import BOARD
from trainer.records.answers import answers_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class _Logger(logging.LoggerAdapter):
    """In place of accelerate's, which asks for a `PartialState`: that would set torch's threads,
    and with them the order of sums."""

    def warning_once(self, *_: Any) -> None: ...


tracking.logger = _Logger(logging.getLogger("accelerate.tracking"))


class Backend:
    """A tracker's run. Its methods may raise whatever the tracker's library raises."""

    def __init__(self, config: Config, folder: Path, start: int, identity: str | None):
        """`start`: step at which the run begins or resumes. `identity`: of the tracker's run that
        is resumed."""
        self.config, self.folder, self.start = config, folder, start
        self.is_new = identity is None
        kind = tracking.LOGGER_TYPE_TO_CLASS[self.name]
        place = (str(folder),) if kind.requires_logging_directory else ()
        self._tracker: Any = kind(self.project, *place, **self.options(identity))
        self._tracker.main_process_only = False  # only rank 0 has any
        self._tracker.start()

    name = ""

    @property
    def project(self) -> str:
        """What accelerate calls the project, the experiment or the run."""
        return self.config.log.project

    def options(self, identity: str | None) -> dict[str, Any]:
        """Arguments of accelerate's class."""
        return {}

    @property
    def identity(self) -> str | None:
        """By which a resumed run finds this one; None: it begins another."""
        return None

    def configure(self, options: Mapping[str, Any]) -> None:
        """Store the configuration: values by `section.key`."""
        self._tracker.store_init_configuration(dict(options))

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._tracker.log(dict(values), step=step)

    def answers(self, answers: Sequence[Mapping[str, Any]], step: int) -> None:
        """Generated answers as a table, where the tracker has any."""

    def figure(self, name: str, figure: "Figure", step: int) -> None:
        """A figure, where it was tried: the trackers' interfaces differ."""

    def generated(self, answers: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
        """(columns, rows) of the generated answers that are shown."""
        shown = [answer for answer in answers if "prompt" in answer][: self.config.generation.shown]
        columns = list(shown[0]) if shown else []
        return columns, [[answer.get(name) for name in columns] for answer in shown]

    def finish(self, *, ended: bool) -> None:
        """`ended`: the run has made its steps; else it failed, or will be resumed."""
        self._tracker.finish()


class TensorBoard(Backend):
    """In the run folder."""

    name = "tensorboard"

    @property
    def project(self) -> str:
        return BOARD

    def options(self, identity: str | None) -> dict[str, Any]:
        return {"purge_step": self.start + 1}

    def configure(self, options: Mapping[str, Any]) -> None:
        if self.start == 0:
            self._tracker.log({"config": f"```yaml\n{self.config.to_yaml()}\n```"})

    def answers(self, answers: Sequence[Mapping[str, Any]], step: int) -> None:
        if table := answers_table(answers, self.config.generation.shown):
            self._tracker.log({"eval/answers": table}, step=step)

    def figure(self, name: str, figure: "Figure", step: int) -> None:
        self._tracker.tracker.add_figure(name, figure, step)


class WandB(Backend):
    """Its files are in the run folder, unless WANDB_DIR says otherwise."""

    name = "wandb"

    def options(self, identity: str | None) -> dict[str, Any]:
        place = {} if "WANDB_DIR" in os.environ else {"dir": str(self.folder)}
        again = {} if identity is None else {"id": identity, "resume": "allow"}
        # Its capture of the terminal would write the progress bar line by line.
        return {"name": self.config.run.name, "settings": {"console": "off"}, **place, **again}

    @property
    def identity(self) -> str | None:
        return self._tracker.tracker.id

    def answers(self, answers: Sequence[Mapping[str, Any]], step: int) -> None:
        columns, rows = self.generated(answers)
        if rows:
            self._tracker.log_table("eval/answers", columns=columns, data=rows, step=step)

    def figure(self, name: str, figure: "Figure", step: int) -> None:
        self._tracker.log_images({name: [_pixels(figure)]}, step=step)

    def finish(self, *, ended: bool) -> None:
        self._tracker.tracker.finish(exit_code=0 if ended else 1)


class MLflow(Backend):
    """Where MLFLOW_TRACKING_URI says."""

    name = "mlflow"

    def options(self, identity: str | None) -> dict[str, Any]:
        return {"run_name": self.config.run.name, "run_id": identity}

    @property
    def identity(self) -> str | None:
        return self._tracker.tracker.info.run_id

    def answers(self, answers: Sequence[Mapping[str, Any]], step: int) -> None:
        import mlflow

        if table := answers_table(answers, self.config.generation.shown):
            mlflow.log_text(table, f"answers/step-{step:08d}.md")

    def figure(self, name: str, figure: "Figure", step: int) -> None:
        self._tracker.log_figure(figure, f"{name}.png")

    def finish(self, *, ended: bool) -> None:
        import mlflow

        mlflow.end_run("FINISHED" if ended else "FAILED")


class Trackio(Backend):
    """Where TRACKIO_DIR says; it knows a run by its name."""

    name = "trackio"

    def options(self, identity: str | None) -> dict[str, Any]:
        again = "never" if identity is None else "allow"
        return {"name": self.config.run.name, "resume": again, "embed": False}

    @property
    def identity(self) -> str | None:
        return self.config.run.name

    def answers(self, answers: Sequence[Mapping[str, Any]], step: int) -> None:
        import trackio

        columns, rows = self.generated(answers)
        if rows:
            self._tracker.log({"eval/answers": trackio.Table(columns=columns, data=rows)}, step)

    def figure(self, name: str, figure: "Figure", step: int) -> None:
        import trackio

        self._tracker.log({name: trackio.Image(_pixels(figure))}, step=step)


class SwanLab(Backend):
    """In the run folder."""

    name = "swanlab"

    def options(self, identity: str | None) -> dict[str, Any]:
        return {"experiment_name": self.config.run.name, "logdir": str(self.folder / "swanlab")}

    def answers(self, answers: Sequence[Mapping[str, Any]], step: int) -> None:
        import swanlab

        if table := answers_table(answers, self.config.generation.shown):
            self._tracker.log({"eval/answers": swanlab.Text(table)}, step=step)

    def figure(self, name: str, figure: "Figure", step: int) -> None:
        self._tracker.log_images({name: [_pixels(figure)]}, step=step)


class Comet(Backend):
    """Where COMET_OFFLINE_DIRECTORY says, without a server (COMET_START_ONLINE=0)."""

    name = "comet_ml"

    def options(self, identity: str | None) -> dict[str, Any]:
        from comet_ml import ExperimentConfig

        # Its summary would fill the terminal with the whole configuration.
        made = ExperimentConfig(name=self.config.run.name, display_summary_level=0)
        return {"experiment_config": made}

    def answers(self, answers: Sequence[Mapping[str, Any]], step: int) -> None:
        if table := answers_table(answers, self.config.generation.shown):
            self._tracker.tracker.log_text(table, step=step)

    def figure(self, name: str, figure: "Figure", step: int) -> None:
        self._tracker.tracker.log_image(_pixels(figure), name=name, step=step)


class Aim(Backend):
    """In the run folder."""

    name = "aim"

    @property
    def project(self) -> str:
        return self.config.run.name

    def options(self, identity: str | None) -> dict[str, Any]:
        return {"experiment": self.config.log.project}


class ClearML(Backend):
    """Without a server (CLEARML_OFFLINE_MODE=1) in its cache."""

    name = "clearml"

    def options(self, identity: str | None) -> dict[str, Any]:
        # It would take up the arguments of the command and whatever the libraries write.
        quiet = {"auto_connect_arg_parser": False, "auto_connect_frameworks": False}
        return {"task_name": self.config.run.name, "reuse_last_task_id": False, **quiet}

    def log(self, values: Mapping[str, float], step: int) -> None:
        """`train/loss` and `eval/eval_loss` as the series `train` and `eval` of one plot `loss`."""
        named = {_series(name): value for name, value in values.items()}
        self._tracker.log(named, step=step)

    def answers(self, answers: Sequence[Mapping[str, Any]], step: int) -> None:
        columns, rows = self.generated(answers)
        if rows:
            self._tracker.log_table("eval_answers", columns=columns, data=rows, step=step)

    def figure(self, name: str, figure: "Figure", step: int) -> None:
        self._tracker.log_images({name: _pixels(figure)}, step=step)


class DVCLive(Backend):
    """In the run folder."""

    name = "dvclive"

    def options(self, identity: str | None) -> dict[str, Any]:
        folder = self.folder / "dvclive"
        files = {"dir": str(folder), "dvcyaml": str(folder / "dvc.yaml"), "save_dvc_exp": False}
        return {**files, "resume": identity is not None}

    @property
    def identity(self) -> str | None:
        return "dvclive"

    def figure(self, name: str, figure: "Figure", step: int) -> None:
        self._tracker.tracker.step = step
        self._tracker.tracker.log_image(f"{name}.png", _pixels(figure))


def _series(name: str) -> str:
    """`train_loss` of `train/loss`, `eval_loss` of `eval/eval_loss`; other names as they are."""
    group, _, key = name.partition("/")
    return f"{group}_{key.removeprefix('eval_')}" if group in ("train", "eval") else name


def _pixels(figure: "Figure") -> np.ndarray:
    """A figure as (height, width, 3) bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes a second to import

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])


BACKENDS: dict[str, type[Backend]] = {
    kind.name: kind
    for kind in (TensorBoard, WandB, MLflow, Trackio, SwanLab, Comet, Aim, ClearML, DVCLive)
}


def backend(name: str) -> type[Backend]:
    """The class of a name in `log.trackers`."""
    return BACKENDS[TRACKERS[name]]
