"""Checks of one architecture against transformers' own model and PEFT's LoRA.

    python -m tests.architectures NAME PART FOLDER

Every check is a function of a `Case`, a tiny model of that architecture with records of its own,
and raises `Wrong` where the project's numbers are not the reference's. `run_checks` makes them into
outcomes: ok, refused (a UserError: one line), wrong, or crashed (any other error). The campaign
(`tests/campaigns/architectures.py`) runs them for all architectures, `make test` for a sample.
"""

import contextlib
import io
import json
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adapters.unit import stem
from adapters.units import expert_counts
from tests.helpers import TASK_OF, lean_runs, losses, quick_config
from tests.references import (
    LOSS,
    Wrong,
    check_gradients,
    check_same,
    reference_loss,
    summed_loss,
    with_peft,
)
from tests.tiny_models import CAUSAL, CLASSIFICATION, PARTS, save_tiny
from trainer.checkpoint import store
from trainer.checkpoint.state import load_trained
from trainer.config.config import Config
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.export.export import export_run
from trainer.run.run import run
from trainer.session import Session, open_session
from trainer.tasks.base import Example

STEPS = 3
PADDING = "data.micro_batch_size: 2 given, but padding changes the results"
RANKS = 1e-4
"""Largest relative difference of a step's loss between two ranks and one process."""
ENGINES = {"fsdp2": "fsdp2", "ZeRO-3": "deepspeed"}
REFUSALS = [kind.__name__ for kind in (UserError, *UserError.__subclasses__())]
PACKED_ERROR = {"nf4": (0.03, 0.2), "int8": (0.001, 0.03)}
"""Bounds of ‖W − Ŵ‖ / ‖W‖: that the matrices are quantised, and well."""

TEXTS = [  # 8 to 24 tokens each
    ("The cat", " sat on the mat."), ("Two birds were", " seen at noon."),
    ("A red apple fell", " from the old tree."), ("She has 3 coins", " and 4 eggs."),
    ("How many are", " there now?"), ("It rained all", " day long, again."),
    ("Mia and Sara have", " 12 flowers."), ("Nobody knew", " why he had left."),
]  # fmt: skip


@dataclass
class Case:
    """A tiny model in `folder`/model and its records."""

    name: str
    part: str
    folder: Path
    said: str = ""
    """What that run printed."""
    _trained: tuple[float, list[Example]] | None = None

    def __post_init__(self) -> None:
        if not self.model.exists():
            save_tiny(self.model, self.name, self.part)
            causal = [{"prompt": prompt, "completion": rest} for prompt, rest in TEXTS]
            labelled = [{"text": p + r, "label": i % 2} for i, (p, r) in enumerate(TEXTS)]
            rows = labelled if self.part == CLASSIFICATION else causal
            self.records.write_text("".join(json.dumps(row) + "\n" for row in rows))

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def one_by_one(self) -> Path:
        """There where a micro-batch of 2 records was refused, since padding changes results."""
        return self.folder / "one-by-one"

    @property
    def records(self) -> Path:
        return self.folder / "records.jsonl"

    def config(self, name: str, *changes: str) -> Config:
        """A run of 3 steps of 4 records, without evaluation."""
        return quick_config(
            self.folder, f"run.name={name}", f"model.id={self.model}", "model.dtype=float32",
            f"task.kind={TASK_OF[self.part]}", f"data.train={self.records}", "data.eval=null",
            "data.prompt='{prompt}'", "data.completion=completion", "data.max_length=64",
            "data.batch_size=4",
            f"data.micro_batch_size={1 if self.one_by_one.exists() else 2}", f"run.steps={STEPS}",
            "method.rank=4", "method.alpha=8", "method.targets=all-linear",
            "optim.learning_rate=1e-2", "optim.warmup_ratio=0", "run.verify=auto", "log.progress=plain",
            *changes,
        )  # fmt: skip

    def trained(self) -> Config:
        """The unquantised run that several checks look at; trained when it is first needed."""
        config = self.config("trained")
        if not (config.run_folder / "adapter").exists():
            try:
                self.said = _run(config)
            except UserError as refusal:
                if self.one_by_one.exists() or not str(refusal).startswith(PADDING):
                    raise
                self.one_by_one.touch()
                return self.trained()
        return config

    def trained_loss(self) -> tuple[float, list[Example]]:
        """The mean loss of that run's checkpoint, and its records."""
        if self._trained is None:
            session = _restored(self.trained())
            self._trained = _loss(session), _examples(session)
        return self._trained

    def plain(self, folder: Path | None = None) -> PreTrainedModel:
        """transformers' own model."""
        auto = PARTS[self.part][1]
        return auto.from_pretrained(folder or self.model, dtype=torch.float32).eval()


def check_train(case: Case) -> None:
    """Three steps, finite losses, and no adapter of a dense layer whose B is still zero, unless the
    run says so."""
    config = case.trained()
    found = losses(config.run_folder)
    if len(found) != STEPS or not all(map(_finite, found)):
        raise Wrong(f"losses {found}")
    tensors = store.read_tensors(store.newest(config.run_folder / "checkpoints"))
    dead = [
        name.split("/")[1]
        for name, B in tensors.items()
        if name.startswith("adapter/") and name.endswith("/B") and not B.any()
    ]
    stacks = {stem(unit) for unit in dead if stem(unit) != unit}  # an expert may get no token
    dead = [unit for unit in dead if stem(unit) not in stacks]
    if dead and "adapters without effect" not in case.said:
        raise Wrong(f"{len(dead)} adapters do nothing, such as {dead[0]}")


def check_loss(case: Case) -> None:
    """The loss before the first step is that of transformers' own model on every record alone; and
    what is trained to predict a token does not see it."""
    session = _opened(case.config("loss"))
    ours, model = _loss(session), case.plain()
    _copy_heads(session, model)
    examples = _examples(session)
    check_same("loss", ours, reference_loss(case.part, model, examples))
    if case.part == CAUSAL:
        ids = torch.tensor([examples[0].input_ids])
        changed = torch.cat([ids[:, :-1], ids[:, -1:] - 1], 1)
        with torch.no_grad():
            before, after = (model(input_ids=i, use_cache=False).logits for i in (ids, changed))
        if not torch.allclose(before[:, :-1], after[:, :-1], atol=1e-4):
            raise Wrong("the model sees the tokens that it is to predict, and was not refused")


def check_signs(case: Case) -> None:
    """The adapters' first gradients are those of PEFT's LoRA with the same A and B.

    Those of experts, whose layout PEFT treats otherwise, are compared with what transformers' own
    gradient of their stack gives: dB = g ∘ A (dL/dW)ᵀ, at B = 0.
    """
    session, model = _opened(case.config("signs")), case.plain()
    _copy_heads(session, model)
    stacks = expert_counts(session.model)
    adapters = session.method.adapters
    dense = {name: a for name, a in adapters.items() if stem(name) not in stacks}
    generator = torch.Generator().manual_seed(1)
    for adapter in dense.values():
        adapter.B.data.copy_(torch.randn(adapter.B.shape, generator=generator) * 0.02)
    session.optimizer.zero_grad()
    _mean_loss(session, [[example] for example in _examples(session)]).backward()
    wrapped = with_peft(model, dense)
    for stack in stacks:
        model.get_parameter(stack).requires_grad_(True)
    examples = _examples(session)
    (summed_loss(case.part, model, examples) / sum(e.weight for e in examples)).backward()
    found: dict[str, tuple[Tensor | None, Tensor | None]] = {}
    for name, adapter in dense.items():
        layer: Any = wrapped.base_model.model.get_submodule(name)
        A, B = layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad
        found[f"{name}.A"] = adapter.A.grad, A
        found[f"{name}.B"] = adapter.B.grad, None if B is None else B.T
    for name, adapter in adapters.items():
        if name in dense:
            continue
        whole = model.get_parameter(stem(name)).grad[int(name.rpartition(".")[2])]
        G = whole if whole.shape == (adapter.B.shape[1], adapter.A.shape[1]) else whole.T
        expected = adapter.g.detach()[:, None] * (adapter.A.detach() @ G.T)
        found[f"{name}.B"] = adapter.B.grad, expected
    check_gradients(found)


def check_export(case: Case) -> None:
    """The exported adapter gives the trained loss in PEFT."""
    ours, examples = case.trained_loss()
    plain = case.plain()
    before = reference_loss(case.part, plain, examples)
    model = peft.PeftModel.from_pretrained(plain, case.trained().run_folder / "adapter").eval()
    check_same("loss in PEFT", ours, reference_loss(case.part, model, examples))
    if abs(ours - before) <= 10 * LOSS:
        raise Wrong("training changed nothing")


def check_merged(case: Case) -> None:
    """transformers' own model of the merged folder gives the trained loss."""
    ours, examples = case.trained_loss()
    out = case.folder / "merged"
    export_run(case.trained().run_folder, out, World(), what="merged", measure=False)
    check_same(
        "loss of the merged model", ours, reference_loss(case.part, case.plain(out), examples)
    )


def check_nf4(case: Case) -> None:
    """On nf4: the trained loss is that of the plain model with the dequantised weights in PEFT."""
    _check_format(case, "nf4")


def check_int8(case: Case) -> None:
    """The same on int8."""
    _check_format(case, "int8")


def check_packing(case: Case) -> None:
    """Records packed into one row give the sum of their losses, or a run is refused."""
    config = case.config("packing", "data.packing=true")
    _run(config)
    session, model = _opened(config), case.plain()
    examples = _examples(session)
    half = len(examples) // 2
    with torch.no_grad():
        found = float(_mean_loss(session, [examples[:half], examples[half:]]))
    check_same("packed loss", found, reference_loss(case.part, model, examples))


CHECKS: dict[str, Callable[[Case], None]] = {
    "train": check_train, "loss": check_loss, "signs": check_signs, "nf4": check_nf4,
    "int8": check_int8, "export": check_export, "merged": check_merged, "packing": check_packing,
}  # fmt: skip


def ranks_outcome(case: Case, engine: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """The outcome of a run of two ranks, from what each of them returned (tests/world/worker.py):
    the losses of every step are those of one process."""
    failed = [result for result in results if "error" in result]
    failed.sort(key=lambda result: result["error"] == "FailedElsewhere")
    status, message = "ok", ""
    if failed:
        refused = failed[0]["error"] in REFUSALS
        status, message = "refused" if refused else "crashed", failed[0]["message"]
        message = message if refused else f"{failed[0]['error']}: {message}"
    else:
        alone, spread = (losses(case.config(n).run_folder) for n in ("trained", engine))
        if len(spread) != STEPS or any(
            not abs(a - b) <= RANKS * a for a, b in zip(alone, spread, strict=True)
        ):
            status, message = "wrong", f"losses {spread}, of one process {alone}"
    return _outcome(status, message, max(result.get("seconds", 0.0) for result in results))


def _check_format(case: Case, weight_format: str) -> None:
    config = case.config(weight_format, f"model.quantization={weight_format}")
    _run(config)
    session = _restored(config)
    low, high = PACKED_ERROR[weight_format]
    if not low <= session.backbone.quantization_error <= high:
        raise Wrong(f"‖W − Ŵ‖ / ‖W‖ is {session.backbone.quantization_error:.4f}")
    out = case.folder / f"{weight_format}-backbone"
    export_run(config.run_folder, out, World(), what="backbone", measure=False)
    model = peft.PeftModel.from_pretrained(case.plain(out), config.run_folder / "adapter")
    check_same("loss", _loss(session), reference_loss(case.part, model.eval(), _examples(session)))


# --- both sides -----------------------------------------------------------------------------------


def _run(config: Config) -> str:
    """What the run printed."""
    with (
        lean_runs(),
        contextlib.redirect_stdout(io.StringIO()) as said,
        contextlib.redirect_stderr(said),
    ):
        run(config, World())
    return said.getvalue()


def _opened(config: Config) -> Session:
    session = open_session(config, World())
    session.model.eval()
    return session


def _examples(session: Session) -> list[Example]:
    return [session.train_data[index] for index in range(len(session.train_data))]


def _loss(session: Session) -> float:
    """The mean loss of all records by the project, without gradients."""
    with torch.no_grad():
        return float(_mean_loss(session, [[example] for example in _examples(session)]))


def _mean_loss(session: Session, rows: list[list[Example]]) -> Tensor:
    """By the project, of all rows in one batch; one by one where the run does not pad."""
    padded = session.config.data.micro_batch_size > 1
    batches = [session.task.collate(part) for part in ([rows] if padded else [[r] for r in rows])]
    losses = [session.task.loss(session.model, batch)[0] for batch in batches]
    return torch.stack(losses).sum() / sum(batch.weight for batch in batches)


def _restored(config: Config) -> Session:
    """The run's last checkpoint."""
    session = _opened(config)
    newest = store.newest(config.run_folder / "checkpoints")
    load_trained(session, newest, store.read_tensors(newest))
    session.model.eval()
    return session


def _copy_heads(session: Session, model: nn.Module) -> None:
    """New heads are drawn by the run's seed: the reference gets the same."""
    for path, head in session.backbone.heads.items():
        values = {k.removeprefix("inner."): v for k, v in head.state_dict().items()}
        model.get_submodule(path).load_state_dict(values)


def _finite(value: float | None) -> bool:
    return value is not None and value == value and abs(value) < float("inf")


# --- outcomes -------------------------------------------------------------------------------------


def outcome(check: Callable[[], None]) -> dict[str, Any]:
    """{"status": ok, refused, wrong or crashed, "message", "seconds"} of a call."""
    started = time.perf_counter()
    try:
        check()
        status, message = "ok", ""
    except UserError as error:
        status, message = "refused", str(error)
    except Wrong as error:
        status, message = "wrong", str(error)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        status, message = "crashed", f"{type(error).__name__}: {error} ({where})"
    return _outcome(status, message, time.perf_counter() - started)


def _outcome(status: str, message: str, seconds: float) -> dict[str, Any]:
    message = " ".join(message.split())[:600]
    return {"status": status, "message": message, "seconds": round(seconds, 2)}


def run_checks(case: Case, names: list[str] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(check, outcome) one after the other; none after a training that was refused."""
    for name in names or CHECKS:
        result = outcome(lambda check=CHECKS[name]: check(case))
        if name == "train" and result["status"] == "ok" and case.one_by_one.exists():
            result["message"] = "with data.micro_batch_size=1, since padding changes results"
        yield name, result
        if name == "train" and result["status"] == "refused":
            return


def main(name: str, part: str, folder: str) -> None:
    """Outcomes as JSON lines in FOLDER/outcomes.jsonl, each written as soon as it is there."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    file = Path(folder) / "outcomes.jsonl"
    for check, result in run_checks(Case(name, part, Path(folder))):
        with file.open("a") as out:
            out.write(json.dumps({"check": check, **result}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
