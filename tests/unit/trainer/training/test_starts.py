"""Data-driven starts of a model: against NumPy on what its layers see, and against PEFT's EVA."""

from collections import defaultdict

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import EvaConfig
from peft.tuners.lora.eva import get_eva_state_dict
from transformers import AutoModelForCausalLM

from adapters.gated import GatedAdapter
from tests.helpers import TINY, quick_config
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.run.data_start import _key
from trainer.session import open_session
from trainer.training.loop import make_loader
from trainer.training.starts import find_starts

BATCHES = 3


def open_with(tmp_path, *overrides):
    given = [
        f"method.start_options.batches={BATCHES}", "method.rank=4", "data.micro_batch_size=8",
        *overrides,
    ]  # fmt: skip
    return open_session(quick_config(tmp_path, *given), World())


def batches(session):
    """What the model's tokens are in the batches, by micro-batch."""
    loader = make_loader(session, World())
    steps = [loader.next_step() for _ in range(BATCHES)]
    return [(batch, step.weight) for step in steps for _, batch in step.micro_batches]


def plain_model():
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    return model.eval()


def seen(session) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """x and dy of every unit in transformers' own model, of all tokens."""
    model, rows = plain_model(), defaultdict(list)
    for unit in session.method.units:

        def note(module, args, output, name=unit.name):
            x = args[0].detach().flatten(0, -2)
            output.register_hook(lambda dy: rows[name].append((x, dy.flatten(0, -2))))

        model.get_submodule(unit.name).register_forward_hook(note)  # fmt: skip
    for batch, weight in batches(session):
        loss, _ = session.task.loss(model, batch)
        (loss / weight).backward()
    return {
        name: tuple(torch.cat(part).double().numpy() for part in zip(*pairs, strict=True))
        for name, pairs in rows.items()
    }


def angles(A: torch.Tensor, V: np.ndarray) -> np.ndarray:
    """Cosines of the principal angles between the spans of rows."""
    return np.linalg.svd(A.double().numpy() @ V.T, compute_uv=False)


@pytest.mark.parametrize("center", [True, False])
def test_activations_give_the_principal_directions_of_the_inputs(tmp_path, center):
    session = open_with(
        tmp_path, "method.start=activation", "method.start_options.passes=6",
        f"method.start_options.center={center}",
    )  # fmt: skip
    starts = find_starts(session)
    for name, (x, dy) in seen(session).items():
        x = x[dy.any(1)]
        rows = x - x.mean(0) if center else x
        _, S, V = np.linalg.svd(rows, full_matrices=False)
        start = starts[name]
        np.testing.assert_allclose(start.worth, S[:4] ** 2 / (rows**2).sum(), rtol=1e-2)
        assert angles(start.A, V[:6])[:3].min() > 0.98  # of values near each other, too
        captured = np.linalg.norm(rows @ start.A.double().numpy().T) ** 2
        assert captured == pytest.approx((S[:4] ** 2).sum(), rel=3e-3)


def test_gradients_give_the_right_singular_vectors_of_the_gradient(tmp_path):
    session = open_with(tmp_path, "method.start=gradient", "method.start_options.passes=6")
    starts = find_starts(session)
    for name, (x, dy) in seen(session).items():
        G = dy.T @ x
        S = np.linalg.svd(G, compute_uv=False)
        start = starts[name]
        np.testing.assert_allclose(start.worth, S[:4], rtol=1e-2)
        captured = np.linalg.norm(G @ start.A.double().numpy().T) ** 2
        assert captured == pytest.approx((S[:4] ** 2).sum(), rel=3e-3)
    assert not session.optimizer.gradients.any(), "what training begins with"


def test_directions_and_ranks_are_those_of_peft_eva(tmp_path):
    session = open_with(
        tmp_path, "method.start=activation", "method.start_options.passes=6",
        "method.start_options.ranks=redistributed", "method.start_options.count=components",
        "data.packing=false", "data.padding_free=false",
    )  # fmt: skip
    starts = find_starts(session)
    given = [dict(batch.inputs) | {"use_cache": False} for batch, _ in batches(session)]
    targets = [unit.name for unit in session.method.units]
    config = LoraConfig(
        r=4, target_modules=targets, init_lora_weights="eva",
        eva_config=EvaConfig(rho=2.0, use_label_mask=False, tau=0.999),
    )  # fmt: skip
    model = get_peft_model(plain_model(), config, low_cpu_mem_usage=True)
    theirs = get_eva_state_dict(model, given, config, show_progress_bar=False)
    theirs = {name.removeprefix("base_model.model."): A for name, A in theirs.items()}
    session.method.adopt(starts)
    ours = {name: adapter.rank for name, adapter in session.method.adapters.items()}
    rows, last = seen(session), max(unit.layer for unit in session.method.units)
    # In the last block EVA takes tokens that do not reach the loss, too.
    for unit in (unit for unit in session.method.units if unit.layer < last):
        A, own = theirs[unit.name], starts[unit.name].A
        assert abs(len(A) - ours.get(unit.name, 0)) <= 1
        assert angles(own, A.double().numpy())[0] > 0.99  # that of the two spans which is nearest
        # Its incremental SVD cuts the spectrum after every batch, and so misses some variance.
        x, dy = rows[unit.name]
        x = x[dy.any(1)] - x[dy.any(1)].mean(0)
        found, expected = (
            np.linalg.norm(x @ of.double().numpy().T) ** 2 for of in (own[: len(A)], A)
        )
        assert expected * 0.9999 < found < expected * 1.7
    assert sum(len(A) for A in theirs.values()) == sum(ours.values()) == 4 * len(targets)


def test_a_stored_start_belongs_to_what_the_earlier_stage_learned(tmp_path):
    session = open_with(tmp_path, "method.start=activation")
    without, layer = _key(session), session.backbone.adapted_layers[session.method.units[0].name]
    A, g, B = torch.ones(2, layer.in_features), torch.ones(2), torch.ones(2, layer.out_features)
    layer.frozen = GatedAdapter(A, g, B)
    keys = [without, _key(session)]
    layer.frozen.B.data[0, 0] = 2.0
    assert len({*keys, _key(session)}) == 3 and _key(session) == _key(session)


def test_a_unit_with_too_few_tokens_is_refused(tmp_path):
    session = open_with(
        tmp_path, "method.start=activation", "method.start_options.batches=1", "method.rank=64",
        "data.batch_size=1", "data.micro_batch_size=1",
    )  # fmt: skip
    with pytest.raises(UserError, match="tokens that reach the loss come through"):
        find_starts(session)


def test_of_one_batch_and_equal_tokens_spans_and_ranks_are_those_of_peft_eva(tmp_path):
    """Of one batch its incremental SVD cuts nothing."""
    session = open_with(
        tmp_path, "method.start=activation", "method.start_options.passes=8",
        "method.start_options.ranks=redistributed", "method.start_options.count=components",
        "method.start_options.batches=1", "data.batch_size=8", "data.packing=false",
        "data.padding_free=false", r"method.targets=.*layers\.[012]\..*_proj",
    )  # fmt: skip
    starts = find_starts(session)
    batch, _ = batches(session)[0]
    ids, targets = batch.inputs["input_ids"], [unit.name for unit in session.method.units]
    config = LoraConfig(
        r=4, target_modules=targets, init_lora_weights="eva",
        eva_config=EvaConfig(rho=2.0, use_label_mask=False, tau=0.99999),
    )  # fmt: skip
    model = get_peft_model(plain_model(), config, low_cpu_mem_usage=True)
    # EVA would take the last token of every record too, which reaches no loss.
    reached = seen(session)[targets[0]][1][: ids.numel()].any(1)
    mask = torch.from_numpy(reached).view_as(ids).long()
    given = [dict(batch.inputs) | {"use_cache": False, "attention_mask": mask}]
    theirs = get_eva_state_dict(model, given, config, show_progress_bar=False)
    session.method.adopt(starts)
    assert len(targets) == 21 and mask.sum() > 100
    for name, adapter in session.method.adapters.items():
        A = theirs[f"base_model.model.{name}"].double().numpy()
        assert len(A) == adapter.rank, name
        assert angles(starts[name].A[: len(A)], A).min() > 0.999, name  # the spans are equal
