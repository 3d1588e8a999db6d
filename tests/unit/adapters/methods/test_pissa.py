"""PiSSA and MiLoRA against torch.linalg.svd and, for PiSSA, against PEFT."""

import numpy as np
import peft
import pytest
import torch
from torch import nn

from tests.unit.adapters.methods.harness import AdamW, Bench, array, assert_near, bits, twins

SHAPES = [(12, 10), (8, 14), (9, 9), (16, 6)]
RANK = 3

each_kind = pytest.mark.parametrize("kind", ["pissa", "milora"])


def part(W, kind, rank=RANK):
    """U_r diag(S_r) V_rᵀ of the largest or smallest r, and S_r."""
    U, S, Vh = torch.linalg.svd(torch.from_numpy(W), full_matrices=False)
    taken = slice(0, rank) if kind == "pissa" else slice(len(S) - rank, len(S))
    return ((U[:, taken] * S[taken]) @ Vh[taken]).numpy(), S[taken].numpy()


@each_kind
def test_start_is_a_part_of_the_svd(kind):
    bench = Bench(kind, {"rank": RANK}, shapes=SHAPES)
    for unit in bench.units:
        adapter, W = bench.adapters[unit.name], bench.W[unit.name]
        product, S = part(W, kind)
        A, B = array(adapter.A), array(adapter.B)
        np.testing.assert_allclose(B.T @ A, product, atol=1e-6)
        np.testing.assert_allclose(
            array(bench.adapted_layers[unit.name].weight), W - product, atol=1e-6
        )
        # √Σ on both sides
        np.testing.assert_allclose(A @ A.T, np.diag(S), atol=1e-6)
        np.testing.assert_allclose(B @ B.T, np.diag(S), atol=1e-6)
        assert adapter.g.tolist() == [1.0] * RANK and adapter.mask.all()
        assert not adapter.g.requires_grad


@each_kind
def test_layer_equals_w_at_start_and_alpha_has_no_effect(kind):
    for alpha in (1.0, 64.0):
        bench = Bench(kind, {"rank": RANK, "alpha": alpha}, shapes=SHAPES)
        for unit in bench.units:
            expected = bench.x[unit.name] @ bench.W[unit.name].T
            np.testing.assert_allclose(array(bench.output(unit.name)), expected, atol=2e-5)


def test_pissa_is_peft_s():
    """Same residual, same A·B: factors may differ in sign and PEFT's carry its α/r."""
    torch.manual_seed(5)
    bench = Bench("pissa", {"rank": RANK, "alpha": 16.0}, shapes=SHAPES)
    for unit in bench.units:
        base = nn.Sequential(nn.Linear(unit.in_features, unit.out_features, bias=False))
        base[0].weight.data = torch.from_numpy(bench.W[unit.name]).float()
        config = peft.LoraConfig(
            r=RANK, lora_alpha=16, target_modules=["0"], init_lora_weights="pissa"
        )
        layer = peft.get_peft_model(base, config).base_model.model[0]
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        adapter = bench.adapters[unit.name]
        ours = adapter.B.T @ torch.diag(adapter.g) @ adapter.A
        theirs = layer.scaling["default"] * B @ A
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        residual = bench.adapted_layers[unit.name].weight
        torch.testing.assert_close(residual, layer.base_layer.weight, rtol=1e-4, atol=1e-5)


def test_milora_keeps_the_largest_singular_values_frozen():
    bench = Bench("milora", {"rank": RANK}, shapes=SHAPES)
    for unit in bench.units:
        S = np.linalg.svd(bench.W[unit.name], compute_uv=False)
        left = np.linalg.svd(array(bench.adapted_layers[unit.name].weight), compute_uv=False)
        expected = np.concatenate([S[: len(S) - RANK], np.zeros(RANK)])
        np.testing.assert_allclose(left, expected, atol=1e-6)


@each_kind
def test_training_is_numpy_s(kind):
    bench = Bench(kind, {"rank": RANK}, shapes=SHAPES, weight_decay=0.1, learning_rate=3e-3)
    frozen = {name: bits(host.weight) for name, host in bench.adapted_layers.items()}
    references, optimizer = twins(bench), AdamW(3e-3, weight_decay=0.1, to_start=True)
    for _ in range(8):
        bench.step()
        for twin in references:
            gradients = twin.gradients()
            for role in "AB":
                optimizer.update((twin.name, role), getattr(twin, role), gradients[role])
    for index, twin in enumerate(references):
        adapter = bench.adapter(index)
        assert_near(adapter.A, twin.A)
        assert_near(adapter.B, twin.B)
        assert adapter.g.tolist() == [1.0] * RANK
        assert torch.equal(bits(bench.adapted_layers[twin.name].weight), frozen[twin.name])


@each_kind
@pytest.mark.parametrize("where", ["hidden", "input"])
def test_dropout_spares_the_part_of_w(kind, where):
    """Only what was learned on top of the initial bank is dropped: at the start nothing is."""
    bench = Bench(kind, {"rank": RANK, "dropout": 0.5, "dropout_on": where}, shapes=SHAPES)
    for host in bench.adapted_layers.values():
        host.train()
    bench.method.adapters.set_dropout_seed(0, 0)
    for unit in bench.units:
        expected = bench.x[unit.name] @ bench.W[unit.name].T
        np.testing.assert_allclose(array(bench.output(unit.name)), expected, atol=5e-5)
    bench.run(2)  # then it is
    bench.method.adapters.set_dropout_seed(2, 0)
    for unit in bench.units:
        host = bench.adapted_layers[unit.name].train()
        dropped = array(bench.output(unit.name))
        whole = array(bench.output(unit.name) if host.eval() else None)
        assert np.abs(dropped - whole).max() > 1e-3


@each_kind
def test_nothing_is_decided(kind):
    bench = Bench(kind, {"rank": RANK}, shapes=SHAPES)
    assert not bench.method.decides and not any(bench.method.due(step) for step in range(20))
    assert bench.method.adapters.active_parameters() == bench.optimizer.numel
