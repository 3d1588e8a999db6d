"""LoRA, rsLoRA and LoRA+ against NumPy, torch.optim.AdamW and PEFT."""

import numpy as np
import peft
import pytest
import torch
from torch import nn

from tests.unit.adapters.methods.harness import AdamW, Bench, assert_near, bits, twins

OPTIONS = {"rank": 4, "alpha": 6.0}


@pytest.mark.parametrize("stabilised", [False, True])
def test_start(stabilised):
    bench = Bench("lora", {"rank": 4, "alpha": 6.0, "rank_stabilized": stabilised})
    for unit in bench.units:
        adapter = bench.adapters[unit.name]
        bound = 1 / unit.in_features**0.5  # Kaiming-uniform(√5): √(6 / (1 + 5)) / √in
        assert 0.8 * bound < adapter.A.abs().max() <= bound
        assert abs(adapter.A.mean()) < 0.2 * bound
        assert not adapter.B.any() and adapter.mask.all()
        expected = 6.0 / 2 if stabilised else 6.0 / 4
        assert adapter.g.tolist() == [expected] * 4
        assert not adapter.g.requires_grad
        assert torch.equal(bench.output(unit.name), nn_output(bench, unit.name))


def nn_output(bench, name):
    return torch.from_numpy(bench.x[name]).float() @ bench.adapted_layers[name].weight.T


def test_scale_is_peft_s():
    for stabilised in (False, True):
        config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], use_rslora=stabilised)
        wrapped = peft.get_peft_model(nn.Sequential(nn.Linear(10, 12)), config)
        bench = Bench("lora", {**OPTIONS, "rank_stabilized": stabilised})
        scale = wrapped.base_model.model[0].scaling["default"]
        assert bench.adapter(0).g.tolist() == pytest.approx([scale] * 4)


def test_units_and_seeds_draw_apart_and_the_global_state_is_left_alone():
    before = torch.get_rng_state()
    benches = [Bench("lora", OPTIONS, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    first, again, other = benches
    for index in range(4):
        assert torch.equal(bits(first.adapter(index).A), bits(again.adapter(index).A))
        assert not torch.equal(first.adapter(index).A, other.adapter(index).A)
    assert not torch.equal(first.adapter(0).A, first.adapter(2).A)


@pytest.mark.parametrize("ratio", [1.0, 8.0])
@pytest.mark.parametrize("stabilised", [False, True])
def test_training_is_numpy_s(stabilised, ratio):
    options = {**OPTIONS, "rank_stabilized": stabilised, "b_learning_rate_ratio": ratio}
    bench = Bench("lora", options, weight_decay=0.1, learning_rate=3e-3)
    references = twins(bench)
    optimizer = AdamW(3e-3, weight_decay=0.1)
    for _ in range(8):
        assert bench.step() is None
        for twin in references:
            gradients = twin.gradients()
            optimizer.update((twin.name, "A"), twin.A, gradients["A"])
            optimizer.update((twin.name, "B"), twin.B, gradients["B"], ratio=ratio)
    for index, twin in enumerate(references):
        assert_near(bench.adapter(index).A, twin.A)
        assert_near(bench.adapter(index).B, twin.B)
        assert_near(bench.output(twin.name), twin.output())
        scale = 6.0 / 2 if stabilised else 6.0 / 4
        assert bench.adapter(index).g.tolist() == [scale] * 4


def test_gradients_are_clipped_over_all_units_together():
    bench = Bench("lora", OPTIONS, max_norm=0.05, learning_rate=1e-2)
    references = twins(bench)
    optimizer = AdamW(1e-2)
    for _ in range(4):
        bench.step()
        found = [twin.gradients() for twin in references]
        norm = np.sqrt(sum((g[role] ** 2).sum() for g in found for role in "AB"))
        assert norm > 0.05
        for twin, gradients in zip(references, found, strict=True):
            for role in "AB":
                scaled = gradients[role] * 0.05 / norm
                optimizer.update((twin.name, role), getattr(twin, role), scaled)
    for index, twin in enumerate(references):
        assert_near(bench.adapter(index).B, twin.B)


def test_lora_plus_is_two_groups_of_torch_s_adamw():
    """The ratio multiplies the group's learning rate, so decoupled weight decay as well."""
    options = {**OPTIONS, "b_learning_rate_ratio": 16.0}
    bench = Bench("lora", options, weight_decay=0.2, learning_rate=2e-3, betas=(0.8, 0.95))
    A = [nn.Parameter(a.A.detach().clone()) for a in bench.adapters.values()]
    B = [nn.Parameter(a.B.detach().clone()) for a in bench.adapters.values()]
    reference = torch.optim.AdamW(
        [{"params": A, "lr": 2e-3}, {"params": B, "lr": 16 * 2e-3}],
        betas=(0.8, 0.95), weight_decay=0.2,
    )  # fmt: skip
    for _ in range(12):
        bench.step()
        loss = torch.zeros(())
        for unit, a, b in zip(bench.units, A, B, strict=True):
            x = torch.from_numpy(bench.x[unit.name]).float()
            y = x @ (bench.adapted_layers[unit.name].weight + 1.5 * b.T @ a).T
            error = y - torch.from_numpy(bench.t[unit.name]).float()
            loss = loss + 0.5 * error.square().sum(1).mean()
        reference.zero_grad()
        loss.backward()
        reference.step()
    for adapter, a, b in zip(bench.adapters.values(), A, B, strict=True):
        torch.testing.assert_close(adapter.A, a, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(adapter.B, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where", ["hidden", "input"])
def test_dropout_masks_depend_on_seed_step_micro_batch_and_unit(where):
    bench = Bench("lora", {**OPTIONS, "dropout": 0.5, "dropout_on": where}, shapes=[(12, 10)] * 2)
    first, second = bench.adapters.values()
    for adapter in (first, second):  # two alike
        adapter.A.data.copy_(first.A.data)
        adapter.B.data.fill_(0.5)
    for host in bench.adapted_layers.values():
        host.weight.data.zero_()
        host.train()
    x = torch.from_numpy(bench.x["layers.0.k0"]).float()

    def outputs(seed, step, micro_batch):
        bench.method.adapters.seed = seed
        bench.method.adapters.set_dropout_seed(step, micro_batch)
        return [host(x).detach() for host in bench.adapted_layers.values()]

    base = outputs(0, 3, 1)
    again = outputs(0, 3, 1)
    assert all(torch.equal(a, b) for a, b in zip(base, again, strict=True))
    assert not torch.equal(*base)
    for key in ((0, 3, 2), (0, 4, 1), (0, 3 + 2**16, 1), (1, 3, 1)):
        assert not torch.equal(base[0], outputs(*key)[0]), key


def test_nothing_is_decided_and_everything_counts():
    bench = Bench("lora", OPTIONS)
    assert not bench.method.decides and not any(bench.method.due(step) for step in range(50))
    expected = sum(4 * (unit.out_features + unit.in_features) for unit in bench.units)
    assert bench.method.adapters.active_parameters() == bench.optimizer.numel == expected
    assert [t.name for t in bench.method.adapters.trainables()] == [
        f"{unit.name}.{role}" for unit in bench.units for role in "AB"
    ]


def test_a_rank_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"method.rank: 9 given; accepted: at most 8.*layers.0.k1"):
        Bench("lora", {"rank": 9})
