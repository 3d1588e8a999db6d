"""AdaLoRA here against PEFT's, trained by PEFT's own loop, on one job.

    python -m benchmarks.adalora configs/quickstart.yaml run.steps=120

Both start from the same A and B, see the same batches and have the same budget, schedule and
penalty. PEFT scores components by clipped gradients and updated weights, and cuts a step later. The
last column is PEFT's model and allocator with both as they are here.
"""

import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from adapters.methods.adalora import AdaLoRA
from trainer.config.config import Config, load_config
from trainer.data.loader import cut, packed_records
from trainer.data.micro_batches import assign_micro_batches
from trainer.distributed.world import World
from trainer.session import Session, open_session
from trainer.tasks.base import Batch
from trainer.training.evaluation import evaluate
from trainer.training.loop import make_loader
from trainer.training.lr_schedule import learning_rate
from trainer.training.step import Training, train_step
from trainer.training.validation import make_validate

EVERY = 20
OURS = (
    "method.kind=adalora", "model.quantization=none", "model.dtype=float32", "engine.kind=single",
    "data.micro_batch_size=null", "data.micro_batch_tokens=1000000", "log.progress=none",
)  # fmt: skip
"""One micro-batch a step: PEFT adds its penalty to the loss of each."""


def ours(config: Config) -> tuple[list[float], float, dict[str, int]]:
    """(training losses, held-out loss, rank by unit)."""
    session = open_session(config, World())
    steps = config.run.steps or 0
    session.method.set_horizon(steps, lambda step: 1.0)
    training = Training(session, make_loader(session, World()), steps, make_validate(session))
    losses = [train_step(training, step).update.loss for step in range(steps)]
    ranks = {name: int((a.g != 0).sum()) for name, a in session.method.adapters.items()}
    return losses, evaluate(session)["eval_loss"], ranks


def by_peft(config: Config, *, as_here: bool = False) -> tuple[list[float], float, dict[str, int]]:
    """The same by `AdaLoraModel`; `as_here`: scored before clipping and update, and cut before the
    step that is a multiple of `delta_t` rather than after it."""
    session = open_session(config, World())
    model, steps, optim = _wrapped(config, session), config.run.steps or 0, config.optim
    trained = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(
        trained, betas=(optim.betas[0], optim.betas[1]), eps=optim.eps,
        weight_decay=optim.weight_decay,
    )  # fmt: skip
    loader, losses = make_loader(session, World()), []
    tuner: Any = model.base_model
    score = tuner.rankallocator.update_ipt
    if as_here:
        tuner.rankallocator.update_ipt = lambda _: None
    for step in range(steps):
        _, batch = loader.next_step().micro_batches[0]
        loss = _loss(model, batch)
        loss.backward()
        losses.append(float(loss.detach()) - _penalty(model))
        if as_here:
            score(tuner.model)
        torch.nn.utils.clip_grad_norm_(trained, optim.max_grad_norm or float("inf"))
        adamw.param_groups[0]["lr"] = learning_rate(optim, step, steps)
        adamw.step()
        tuner.update_and_allocate(step + as_here)
        adamw.zero_grad()
    model.eval()
    weights, sums = 0.0, 0.0
    with torch.no_grad():
        for batch in _held_out(session):
            loss = float(_loss(model, batch)) - _penalty(model)
            weights, sums = weights + batch.weight, sums + loss * batch.weight
    ranks = {
        name.removeprefix("base_model.model."): int((module.lora_E["default"] != 0).sum())
        for name, module in model.named_modules()
        if hasattr(module, "lora_E") and "default" in module.lora_E
    }
    return losses, sums / weights, ranks


def _wrapped(config: Config, session: Session) -> PeftModel:
    """PEFT's model, which starts as the session's."""
    method = session.method
    assert isinstance(method, AdaLoRA)
    options: Any = method.options
    first, last = options.schedule(config.run.steps)
    made = AdaLoraConfig(
        init_r=options.components, target_r=options.rank, total_step=config.run.steps,
        lora_alpha=options.alpha / options.rank * options.components,  # type: ignore[arg-type]
        tinit=first, tfinal=(config.run.steps or 0) - last, deltaT=options.delta_t,
        beta1=options.beta1, beta2=options.beta2, orth_reg_weight=options.orthogonality,
        target_modules=list(method.adapters),
        task_type="CAUSAL_LM",  # else PEFT leaves its penalty out
    )  # fmt: skip
    plain = AutoModelForCausalLM.from_pretrained(config.model.id, dtype=torch.float32)
    model = get_peft_model(plain, made)
    for name, adapter in method.adapters.items():
        layer: Any = model.base_model.model.get_submodule(name)
        layer.lora_A["default"].data.copy_(adapter.A.detach())
        layer.lora_B["default"].data.copy_(adapter.B.detach().T)
    assert isinstance(model, PeftModel)
    return model.train()


def _loss(model: PeftModel, batch: Batch) -> Tensor:
    """Loss with PEFT's penalty."""
    return model(**batch.inputs, labels=batch.targets, use_cache=False).loss


@torch.no_grad()
def _penalty(model: PeftModel) -> float:
    matrices = [
        p if "lora_A" in name else p.T
        for name, p in model.named_parameters()
        if "lora_A" in name or "lora_B" in name
    ]
    weight = model.peft_config["default"].orth_reg_weight  # type: ignore[attr-defined]
    found = [torch.linalg.matrix_norm(m @ m.T - torch.eye(len(m))) for m in matrices]
    return weight * float(torch.stack(found).mean())


def _held_out(session: Session) -> Iterator[Batch]:
    data, records = session.held_out()
    options, rows = session.config.data, session.backbone.rows
    micro = cut(packed_records(np.asarray(records), data, options), data, options, 8, rows)
    for _, batch in assign_micro_batches(micro, data, session.task, rows, 0, 1):
        yield batch


def main(argv: list[str]) -> None:
    path, *overrides = argv
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(path, [*OURS, f"run.dir={folder}", *overrides])
        runs = [ours(config), by_peft(config), by_peft(config, as_here=True)]
    print("step     ours     PEFT  PEFT, as here")
    steps = len(runs[0][0])
    for step in range(0, steps, EVERY):
        means = [np.mean(losses[step : step + EVERY]) for losses, _, _ in runs]
        print(f"{step + 1:>4} {means[0]:>8.4f} {means[1]:>8.4f} {means[2]:>8.4f}")
    print(f"held {runs[0][1]:>8.4f} {runs[1][1]:>8.4f} {runs[2][1]:>8.4f}")
    own = np.array(list(runs[0][2].values()))
    for name, (_, _, ranks) in zip(("PEFT", "PEFT, as here"), runs[1:], strict=True):
        other = np.array([ranks[unit] for unit in runs[0][2]])
        print(
            f"ranks beside {name}: {own.sum()} and {other.sum()} components over {len(own)} "
            f"matrices, correlation {np.corrcoef(own, other)[0, 1]:.3f}, "
            f"{int((own == other).sum())} equal"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
