"""Checks of one architecture against transformers' own model and PEFT's LoRA.

    python -m tests.architectures NAME PART FOLDER

Every check is a function of a `Case`, a tiny model of that architecture with records of its own,
and raises `Wrong` where the project's numbers are not the reference's. `run_checks` makes them into
outcomes: ok, refused (a UserError: one line), wrong, or crashed (any other error). The campaign
(`tests/campaigns/architectures.py`) runs them for all architectures, `make test` for a sample.
"""

import json
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import peft
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adapters.unit import stem
from adapters.units import expert_counts
from tests.helpers import losses, quick_config
from tests.tiny_models import CAUSAL, PARTS, save_tiny
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
LOSS = 1e-5
"""Largest |difference| of losses over max(1, loss), in float32."""
GRADIENT = 1e-3
"""Largest ‖difference‖ / ‖reference‖ of one matrix' gradient."""
SIGNS_ABOVE = 1e-4
"""Signs are compared where |gradient| is above this share of the matrix' largest."""
RANKS = 1e-4
"""Largest relative difference of a step's loss between two ranks and one process."""
ENGINES = {"fsdp2": "fsdp2", "ZeRO-3": "deepspeed"}
PACKED_ERROR = {"nf4": (0.03, 0.2), "int8": (0.001, 0.03)}
"""Bounds of ‖W − Ŵ‖ / ‖W‖: that the matrices are quantised, and well."""

TEXTS = [  # 8 to 24 tokens each
    ("The cat", " sat on the mat."), ("Two birds were", " seen at noon."),
    ("A red apple fell", " from the old tree."), ("She has 3 coins", " and 4 eggs."),
    ("How many are", " there now?"), ("It rained all", " day long, again."),
    ("Mia and Sara have", " 12 flowers."), ("Nobody knew", " why he had left."),
]  # fmt: skip


class Wrong(AssertionError):
    """The project's result is not the reference's."""


@dataclass
class Case:
    """A tiny model in `folder`/model and its records."""

    name: str
    part: str
    folder: Path
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.model.exists():
            save_tiny(self.model, self.name, self.part)
            causal = [{"prompt": prompt, "completion": rest} for prompt, rest in TEXTS]
            labelled = [{"text": p + r, "label": i % 2} for i, (p, r) in enumerate(TEXTS)]
            rows = causal if self.part == CAUSAL else labelled
            self.records.write_text("".join(json.dumps(row) + "\n" for row in rows))

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def records(self) -> Path:
        return self.folder / "records.jsonl"

    def config(self, name: str, *changes: str) -> Config:
        """A run of 3 steps of 4 records, without evaluation."""
        task = "causal_lm" if self.part == CAUSAL else "sequence_classification"
        return quick_config(
            self.folder, f"run.name={name}", f"model.id={self.model}", "model.dtype=float32",
            f"task.kind={task}", f"data.train={self.records}", "data.eval=null",
            "data.prompt='{prompt}'", "data.completion=completion", "data.max_length=64",
            "data.batch_size=4", "data.micro_batch_size=2", f"run.steps={STEPS}",
            "method.rank=4", "method.alpha=8", "method.targets=all-linear",
            "optim.learning_rate=1e-2", "optim.warmup_ratio=0", *changes,
        )  # fmt: skip

    def trained(self) -> Config:
        """The unquantised run that several checks look at; trained when it is first needed."""
        config = self.config("trained")
        if not (config.run_folder / "adapter").exists():
            _run(config)
        return config

    def plain(self, folder: Path | None = None) -> PreTrainedModel:
        """transformers' own model."""
        auto = PARTS[self.part][1]
        return auto.from_pretrained(folder or self.model, dtype=torch.float32).eval()


def check_train(case: Case) -> None:
    """Three steps, finite losses, and no adapter of a dense layer whose B is still zero."""
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
    if dead:
        raise Wrong(f"{len(dead)} adapters do nothing, such as {dead[0]}")


def check_loss(case: Case) -> None:
    """The loss before the first step is transformers' own, on every record alone."""
    session = _opened(case.config("loss"))
    ours, model = _loss(session), case.plain()
    _copy_heads(session, model)
    _same("loss", ours, _reference(case, model, _examples(session)))


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
    _backward(session)
    wrapped = _with_peft(model, dense)
    for stack in stacks:
        model.get_parameter(stack).requires_grad_(True)
    examples = _examples(session)
    total = sum(example.weight for example in examples)
    for example in examples:
        (_record_loss(case, model, example) / total).backward()
    for name, adapter in dense.items():
        layer: Any = wrapped.base_model.model.get_submodule(name)
        _same_gradient(f"{name}.A", adapter.A.grad, layer.lora_A["default"].weight.grad)
        _same_gradient(f"{name}.B", adapter.B.grad, layer.lora_B["default"].weight.grad, True)
    for name, adapter in adapters.items():
        if name in dense:
            continue
        whole = model.get_parameter(stem(name)).grad[int(name.rpartition(".")[2])]
        G = whole if whole.shape == (adapter.B.shape[1], adapter.A.shape[1]) else whole.T
        expected = adapter.g.detach()[:, None] * (adapter.A.detach() @ G.T)
        _same_gradient(f"{name}.B", adapter.B.grad, expected)


def check_export(case: Case) -> None:
    """The exported adapter gives the trained loss in PEFT."""
    config = case.trained()
    ours, before = _trained_loss(config), case.plain()
    model = peft.PeftModel.from_pretrained(case.plain(), config.run_folder / "adapter").eval()
    examples = _examples(_opened(config))
    _same("loss in PEFT", ours, _reference(case, model, examples))
    if abs(ours - _reference(case, before, examples)) <= 10 * LOSS:
        raise Wrong("training changed nothing")


def check_merged(case: Case) -> None:
    """transformers' own model of the merged folder gives the trained loss."""
    config = case.trained()
    out = case.folder / "merged"
    export_run(config.run_folder, out, World(), what="merged", measure=False)
    _same(
        "loss of the merged model", _trained_loss(config),
        _reference(case, case.plain(out), _examples(_opened(config))),
    )  # fmt: skip


def check_nf4(case: Case) -> None:
    """On nf4: the trained loss is that of the plain model with the dequantised weights in PEFT."""
    _check_format(case, "nf4")


def check_int8(case: Case) -> None:
    """The same on int8."""
    _check_format(case, "int8")


def check_packing(case: Case) -> None:
    """Records packed into one row give the sum of their losses, or packing is refused."""
    session, model = _opened(case.config("packing", "data.packing=true")), case.plain()
    examples = _examples(session)
    half = len(examples) // 2
    with torch.no_grad():
        batch = session.task.collate([examples[:half], examples[half:]])
        found = float(session.task.loss(session.model, batch)[0]) / batch.weight
    _same("packed loss", found, _reference(case, model, examples))


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
        refused = failed[0]["error"] in ("UserError", "FailedElsewhere")
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
    ours = _trained_loss(config)
    session = _opened(config)
    low, high = PACKED_ERROR[weight_format]
    if not low <= session.backbone.quantization_error <= high:
        raise Wrong(f"‖W − Ŵ‖ / ‖W‖ is {session.backbone.quantization_error:.4f}")
    out = case.folder / f"{weight_format}-backbone"
    export_run(config.run_folder, out, World(), what="backbone", measure=False)
    model = peft.PeftModel.from_pretrained(case.plain(out), config.run_folder / "adapter")
    _same("loss", ours, _reference(case, model.eval(), _examples(session)))


# --- both sides -----------------------------------------------------------------------------------


def _run(config: Config) -> None:
    with patch("trainer.run.run.draw_loss"):
        run(config, World())


def _opened(config: Config) -> Session:
    session = open_session(config, World())
    session.model.eval()
    return session


def _examples(session: Session) -> list[Example]:
    return [session.train_data[index] for index in range(len(session.train_data))]


def _loss(session: Session) -> float:
    """The mean loss of all records in one batch, by the project."""
    batch = session.task.collate([[example] for example in _examples(session)])
    with torch.no_grad():
        return float(session.task.loss(session.model, batch)[0]) / batch.weight


def _backward(session: Session) -> None:
    batch = session.task.collate([[example] for example in _examples(session)])
    (session.task.loss(session.model, batch)[0] / batch.weight).backward()


def _trained_loss(config: Config) -> float:
    session = _opened(config)
    newest = store.newest(config.run_folder / "checkpoints")
    load_trained(session, newest, store.read_tensors(newest))
    session.model.eval()
    return _loss(session)


def _reference(case: Case, model: nn.Module, examples: list[Example]) -> float:
    """The mean loss by transformers, of one record after the other."""
    with torch.no_grad():
        total = sum(float(_record_loss(case, model, example)) for example in examples)
    return total / sum(example.weight for example in examples)


def _record_loss(case: Case, model: nn.Module, example: Example) -> Tensor:
    """The summed loss of one record, by transformers' own `loss`."""
    ids = torch.tensor([example.input_ids])
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if case.part == CAUSAL:
        learned = torch.tensor([example.loss_mask]).bool()
        inputs |= {"labels": torch.where(learned, ids, -100), "use_cache": False}
    else:
        inputs["labels"] = torch.tensor([int(example.label)])
        if example.token_type_ids:
            inputs["token_type_ids"] = torch.tensor([example.token_type_ids])
    return model(**inputs).loss * example.weight


def _copy_heads(session: Session, model: nn.Module) -> None:
    """New heads are drawn by the run's seed: the reference gets the same."""
    for path, head in session.backbone.heads.items():
        values = {k.removeprefix("inner."): v for k, v in head.state_dict().items()}
        model.get_submodule(path).load_state_dict(values)


def _with_peft(model: PreTrainedModel, adapters: dict[str, Any]) -> peft.PeftModel:
    """PEFT's LoRA on the same layers, with the same A, B and scale."""
    first = next(iter(adapters.values()))
    scale = float(first.g[0]) * first.rank
    config = peft.LoraConfig(
        r=first.rank, lora_alpha=scale, target_modules=list(adapters), lora_dropout=0.0
    )
    wrapped = peft.get_peft_model(model, config).eval()
    for name, adapter in adapters.items():
        layer: Any = wrapped.base_model.model.get_submodule(name)
        layer.lora_A["default"].weight.data.copy_(adapter.A.detach())
        layer.lora_B["default"].weight.data.copy_(adapter.B.detach().T)
    return wrapped


def _same(what: str, ours: float, reference: float) -> None:
    if not abs(ours - reference) <= LOSS * max(1.0, abs(reference)):
        raise Wrong(f"{what} {ours:.7f}, reference {reference:.7f}")


def _same_gradient(
    name: str, ours: Tensor | None, reference: Tensor | None, transposed: bool = False
) -> None:
    if ours is None or reference is None:
        raise Wrong(f"{name}: no gradient" + (" in PEFT" if ours is not None else ""))
    reference = reference.T if transposed else reference
    large = reference.abs() > SIGNS_ABOVE * reference.abs().max()
    agree = (ours.sign() == reference.sign())[large]
    error = float((ours - reference).norm() / reference.norm().clamp_min(1e-12))
    if not bool(agree.all()) or not error <= GRADIENT:
        share = float(agree.float().mean()) if agree.numel() else 1.0
        raise Wrong(f"gradient of {name}: {share:.1%} of the signs, relative error {error:.1e}")


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
