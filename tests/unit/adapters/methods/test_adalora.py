"""AdaLoRA against a NumPy AdaLoRA, finite differences, and PEFT's rank allocator."""

import numpy as np
import peft
import pytest
import torch
from peft.tuners.adalora.layer import RankAllocator
from torch import nn

from benchmarks.adalora import OURS, by_peft, ours
from tests.unit.adapters.methods.harness import (
    AdamW,
    Bench,
    array,
    assert_near,
    bits,
    check_resume,
    twins,
)
from trainer.config.config import load_config

OPTIONS = {
    "rank": 3, "initial_rank": 5, "alpha": 6.0, "tinit": 3, "tfinal": 6, "delta_t": 4,
}  # fmt: skip
STEPS, SCALE = 30, 2.0
FIRST, LAST = 3, 24


def bench_of(begin=True, seed=0, steps=STEPS, learning_rate=1e-2, weight_decay=0.0, **options):
    return Bench(
        "adalora", {**OPTIONS, **options}, steps=steps, begin=begin, seed=seed,
        learning_rate=learning_rate, weight_decay=weight_decay,
    )  # fmt: skip


def budget(step, units=4, rank=3, initial=5, first=FIRST, last=LAST):
    """Zhang et al. 2023, eq. 12."""
    if step <= first:
        return units * initial
    if step >= last:
        return units * rank
    left = 1 - (step - first) / (last - first)
    return int(units * rank + (units * initial - units * rank) * left**3)


def penalty_gradient(M, weight, form, matrices):
    """Of weight · ‖M Mᵀ − I‖² (paper), or of the mean over matrices of ‖M Mᵀ − I‖ (authors)."""
    excess = M @ M.T - np.eye(len(M))
    if form == "squared":
        return weight * 4 * excess @ M
    return weight * 2 * excess @ M / np.sqrt((excess**2).sum()) / matrices


class Reference:
    """AdaLoRA on λ itself: ΔW = (α/r) Bᵀ Λ A."""

    def __init__(self, bench, form, orthogonality, learning_rate=1e-2, weight_decay=0.0):
        self.twins, self.form, self.weight = twins(bench), form, orthogonality
        self.adamw = AdamW(learning_rate, weight_decay=weight_decay)
        self.lambdas = [twin.g / SCALE for twin in self.twins]
        self.sensitivity, self.uncertainty = {}, {}
        self.frozen = [np.zeros(5, bool) for _ in self.twins]
        self.scores = None

    def decide(self, step):
        """Kept components, by score; ties cannot happen."""
        scores = np.stack(self.scores)
        order = np.argsort(-scores.ravel(), kind="stable")
        kept = np.zeros(scores.size, bool)
        kept[order[: budget(step)]] = True
        kept = kept.reshape(scores.shape)
        for lambdas, row in zip(self.lambdas, kept, strict=True):
            lambdas[~row] = 0
        if step == LAST:
            self.frozen = [~row for row in kept]
        return kept

    def step(self, beta1=0.85, beta2=0.85):
        self.scores = []
        for index, twin in enumerate(self.twins):
            twin.g = SCALE * self.lambdas[index]
            gradients = twin.gradients()
            gradients["g"] *= SCALE  # with respect to λ
            for role in "AB":
                gradients[role] = gradients[role] + penalty_gradient(
                    getattr(twin, role), self.weight, self.form, 2 * len(self.twins)
                )
            values = {"A": twin.A, "g": self.lambdas[index], "B": twin.B}
            s = {}
            for role, value in values.items():
                key = (index, role)
                importance = np.abs(value * gradients[role])
                mean = beta1 * self.sensitivity.get(key, 0.0) + (1 - beta1) * importance
                spread = beta2 * self.uncertainty.get(key, 0.0)
                spread = spread + (1 - beta2) * np.abs(importance - mean)
                self.sensitivity[key], self.uncertainty[key] = mean, spread
                s[role] = mean * spread
            self.scores.append(s["A"].mean(1) + s["g"] + s["B"].mean(1))
            for role, value in values.items():
                self.adamw.update((index, role), value, gradients[role], ~self.frozen[index])


def test_start():
    bench = Bench("adalora", {"rank": 4}, shapes=[(200, 300)] * 2)
    for adapter in bench.adapters.values():
        assert adapter.rank == 6  # 1.5 · rank
        for matrix in (adapter.A, adapter.B):
            assert matrix.std().item() == pytest.approx(0.02, rel=0.1)
            assert abs(matrix.mean()) < 0.002
        assert not adapter.g.any() and adapter.mask.all() and adapter.g.requires_grad
    assert not torch.equal(bench.adapter(0).A, bench.adapter(1).A)


@pytest.mark.parametrize("form", ["norm", "squared"])
def test_whole_runs_are_numpy_s(form):
    bench = bench_of(penalty=form)
    reference = Reference(bench, form, 0.1)
    pruned = []
    for step in range(STEPS):
        due = step == LAST or (FIRST < step < LAST and step % 4 == 0)
        assert bench.method.due(step) == due
        decision = bench.step()
        if due:
            kept = reference.decide(step)
            for unit, row in zip(bench.units, kept, strict=True):
                assert decision.extra["kept"][unit.name] == np.flatnonzero(row).tolist()
                assert decision.ranks[unit.name] == row.sum()
            pruned.append(20 - kept.sum())
            assert bench.method.scalars()["budget"] == kept.sum() == budget(step)
        reference.step()
    assert pruned == sorted(pruned) and len(set(pruned)) >= 4 and pruned[-1] == 8
    for index, twin in enumerate(reference.twins):
        adapter = bench.adapter(index)
        assert_near(adapter.A, twin.A, 5e-3)
        assert_near(adapter.B, twin.B, 5e-3)
        assert_near(adapter.g, SCALE * reference.lambdas[index], 5e-3)


def test_weight_decay_acts_on_lambda_as_on_lambda():
    """g is λ α/r; its step moves λ as a step on λ itself would, weight decay included."""
    bench = bench_of(weight_decay=0.5, learning_rate=2e-2, orthogonality=0.0, tinit=20, tfinal=5)
    reference = Reference(bench, "norm", 0.0, 2e-2, weight_decay=0.5)
    for _ in range(15):
        bench.step()
        reference.step()
    for index, lambdas in enumerate(reference.lambdas):
        assert_near(bench.adapter(index).g, SCALE * lambdas, 5e-3)


@pytest.mark.parametrize("form", ["norm", "squared"])
def test_penalty_gradient_by_finite_differences(form):
    bench = bench_of(penalty=form, orthogonality=0.3)
    rng = np.random.default_rng(0)
    for adapter in bench.adapters.values():
        for matrix in (adapter.A, adapter.B):  # away from 0, where excess is −I
            matrix.data.add_(torch.from_numpy(rng.normal(size=tuple(matrix.shape)) * 0.3))
    matrices = [array(m) for a in bench.adapters.values() for m in (a.A, a.B)]

    def penalty():
        norms = [np.sqrt(((M @ M.T - np.eye(len(M))) ** 2).sum()) for M in matrices]
        return 0.3 * (np.mean(norms) if form == "norm" else np.sum(np.square(norms)))

    bench.backward()  # λ = 0: A and B have no gradient but the penalty's
    bench.method.observe(0, bench.optimizer)
    found = [array(m.grad) for a in bench.adapters.values() for m in (a.A, a.B)]
    for M, gradient in zip(matrices, found, strict=True):
        for index in np.ndindex(M.shape):
            kept = M[index]
            M[index] = kept + 1e-5
            above = penalty()
            M[index] = kept - 1e-5
            below = penalty()
            M[index] = kept
            assert gradient[index] == pytest.approx((above - below) / 2e-5, rel=1e-3, abs=1e-4)


def test_without_a_penalty_gradients_are_the_loss_s():
    bench = bench_of(orthogonality=0.0)
    bench.backward()
    before = bench.optimizer.gradients.clone()
    bench.method.observe(0, bench.optimizer)
    assert torch.equal(bench.optimizer.gradients, before)


def test_penalty_drives_to_orthogonality():
    for form, weight in (("norm", 1.0), ("squared", 0.1)):
        bench = bench_of(penalty=form, orthogonality=weight, learning_rate=3e-2, steps=1000)
        for _ in range(80):
            bench.backward()
            bench.update()
        for adapter in bench.adapters.values():
            A = array(adapter.A)
            assert np.abs(A @ A.T - np.eye(5)).max() < 0.25


@pytest.mark.parametrize(("steps", "first", "final"), [(100, 10, 30), (57, 0, 9), (40, 20, 5)])
def test_budget_is_peft_s(steps, first, final):
    bench = bench_of(steps=steps, tinit=first, tfinal=final)
    config = peft.AdaLoraConfig(
        target_r=3, init_r=5, tinit=first, tfinal=final, deltaT=4, total_step=steps,
        target_modules=["x"],
    )  # fmt: skip
    allocator = RankAllocator.__new__(RankAllocator)
    allocator.peft_config, allocator.init_bgt, allocator.target_bgt = config, 20, 12
    for step in range(steps):
        expected, masks = allocator.budget_schedule(step)
        assert bench.method.budget(step) == expected == budget(step, 4, 3, 5, first, steps - final)
        if first < step < steps - final:
            assert bench.method.due(step) == masks


def test_default_schedule_is_a_tenth_and_three_tenths():
    bench = Bench("adalora", {"rank": 4}, steps=200)
    due = [step for step in range(200) if bench.method.due(step)]
    assert due == [*range(30, 140, 10), 140]
    assert bench.method.budget(20) == 24 and bench.method.budget(21) < 24
    assert bench.method.budget(139) >= 16 and bench.method.budget(140) == 16


class PeftLike(nn.Module):
    """Parameters named and laid out as PEFT's AdaLoRA has them: A (R, in), E (R, 1), B (out, R)."""

    def __init__(self, bench):
        super().__init__()
        for index, adapter in enumerate(bench.adapters.values()):
            layer = nn.Module()
            for role, tensor in (("A", adapter.A), ("E", adapter.g[:, None]), ("B", adapter.B.T)):
                holder = nn.ParameterDict({"default": nn.Parameter(tensor.detach().clone())})
                layer.add_module(f"lora_{role}", holder)
            self.add_module(f"u{index}", layer)

    def follow(self, bench):
        """Today's values (λ for E) and gradients."""
        for index, adapter in enumerate(bench.adapters.values()):
            layer = getattr(self, f"u{index}")
            for role, value, gradient in (
                ("A", adapter.A, adapter.A.grad),
                ("E", adapter.g[:, None] / SCALE, adapter.g.grad[:, None] * SCALE),
                ("B", adapter.B.T, adapter.B.grad.T),
            ):
                parameter = getattr(layer, f"lora_{role}")["default"]
                parameter.data = value.detach().clone()
                parameter.grad = gradient.detach().clone()


def test_pruning_is_peft_s():
    bench = bench_of(tinit=1, delta_t=2)
    config = peft.AdaLoraConfig(
        target_r=3, init_r=5, tinit=1, tfinal=6, deltaT=2, beta1=0.85, beta2=0.85,
        total_step=STEPS, target_modules=["x"],
    )  # fmt: skip
    theirs = PeftLike(bench)
    allocator = RankAllocator(theirs, config, "default")
    for step in range(LAST):
        decision = bench.decide()
        if decision is not None and bench.method.budget(step) < 20:
            pattern = allocator.mask_to_budget(theirs, bench.method.budget(step))
            for index, unit in enumerate(bench.units):
                expected = np.flatnonzero(pattern[f"u{index}.lora_E.default"]).tolist()
                assert decision.extra["kept"][unit.name] == expected
        bench.backward()
        bench.update(between=lambda: (theirs.follow(bench), allocator.update_ipt(theirs)))
    assert sum(decision is not None for decision in bench.decisions) >= 10


def test_pruned_lambda_is_zero_and_may_grow_again():
    bench = bench_of(tinit=1, delta_t=4)
    returned = 0
    for step in range(20):
        decision = bench.decide()
        if decision is not None:
            for unit in bench.units:
                adapter = bench.adapters[unit.name]
                pruned = [j for j in range(5) if j not in decision.extra["kept"][unit.name]]
                assert not adapter.g[pruned].any() and adapter.mask.all()
                assert adapter.g[decision.extra["kept"][unit.name]].all()
        bench.backward()
        bench.update()
        if decision is not None:
            for unit in bench.units:
                adapter = bench.adapters[unit.name]
                pruned = [j for j in range(5) if j not in decision.extra["kept"][unit.name]]
                returned += int((adapter.g[pruned] != 0).sum())
    assert returned > 0


def test_final_phase_keeps_the_choice():
    """What was pruned stays out: no bit of it moves, moments neither, weight decay or not."""
    bench = bench_of(weight_decay=0.3)
    bench.run(LAST)
    decision = bench.decide()
    assert decision.extra["final"] and sum(decision.ranks.values()) == 12
    out = {
        unit.name: [j for j in range(5) if j not in decision.extra["kept"][unit.name]]
        for unit in bench.units
    }
    assert sum(map(len, out.values())) == 8

    def state():
        found = {}
        for name, rows in out.items():
            for role in ("A", "g", "B"):
                moments = bench.optimizer.state_dict()[f"{name}.{role}"]
                tensors = [getattr(bench.adapters[name], role), *moments.values()]
                found[name, role] = [bits(tensor[rows]) for tensor in tensors]
        return found

    before = state()
    moved = {name: bits(adapter.A) for name, adapter in bench.adapters.items()}
    for _ in range(6):
        bench.backward()
        bench.update()
        if bench.at < STEPS:
            assert bench.decide() is None
    after = state()
    for key, tensors in before.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, after[key], strict=True)), key
    for name, adapter in bench.adapters.items():
        kept = decision.extra["kept"][name]
        assert not adapter.g[out[name]].any()
        assert not kept or not torch.equal(bits(adapter.A)[kept], moved[name][kept])


@pytest.mark.parametrize("spread", [10, 30])
def test_scores_are_compared_by_their_own_size(spread):
    """Units with small gradients rank their components by them, whatever another unit's are."""
    bench = bench_of(tinit=0, delta_t=1, orthogonality=0.0, tfinal=0, steps=6)
    for name in list(bench.x)[1:]:  # gradients go with the square
        bench.x[name] /= spread
        bench.t[name] /= spread
    reference = Reference(bench, "norm", 0.0)
    for _ in range(6):
        bench.backward()
        bench.update()
        reference.step()
    scores = np.stack(reference.scores)
    kept = np.zeros(20, bool)
    kept[np.argsort(-scores.ravel(), kind="stable")[:12]] = True
    chosen = bench.method.decide(6).extra["kept"]
    for unit, row in zip(bench.units, kept.reshape(4, 5), strict=True):
        assert chosen[unit.name] == np.flatnonzero(row).tolist()


@pytest.mark.parametrize("count", [1, 5, 11, 19, 20])
def test_of_equal_scores_the_first_are_kept(count):
    bench = bench_of()
    method = bench.method
    rng = np.random.default_rng(count)
    scores = rng.integers(0, 3, (len(method.units), method.options.components)) / 4.0
    scores[1, 2] = np.nan  # after all others, as when sorting
    method._scores = torch.from_numpy(scores)
    method.budget = lambda step: count
    order = np.argsort(-scores.ravel(), kind="stable")[:count]
    expected = [sorted(i % 5 for i in order if i // 5 == unit) for unit in range(len(scores))]
    assert list(method.decide(4).extra["kept"].values()) == expected


def test_a_skipped_step_teaches_nothing():
    bench, never = bench_of(), bench_of()
    for number in range(6):
        if number == 3:
            bench.backward()
            bench.update(skip=True)
            bench.at -= 1
        bench.step()
        never.step()
    for name, tensor in never.method.state_dict().items():
        assert torch.equal(bench.method.state_dict()[name], tensor), name


def test_a_decision_may_follow_a_skipped_step():
    """Its scores are those of the steps before, be it the first decision or a later one."""
    bench = bench_of()
    reference = Reference(bench, "norm", 0.1)
    for step in range(12):
        skipped = step in (3, 7)  # decisions are made before steps 4 and 8
        decision = bench.step(skip=skipped)
        if decision is not None:
            kept = reference.decide(step)
            for unit, row in zip(bench.units, kept, strict=True):
                assert decision.extra["kept"][unit.name] == np.flatnonzero(row).tolist()
        if not skipped:
            reference.step()
    assert [step for step, d in enumerate(bench.decisions) if d is not None] == [4, 8]


def test_refusals():
    with pytest.raises(ValueError, match=r"method.initial_rank: 2 given; accepted: at least"):
        bench_of(initial_rank=2)
    with pytest.raises(ValueError, match=r"method.initial_rank: 9 given; accepted: at most 8"):
        bench_of(initial_rank=9)
    bench = bench_of(tinit=20, tfinal=10)
    with pytest.raises(ValueError, match=r"method.tinit: 20 given with method.tfinal: 10"):
        bench.options.check_steps(30)


def test_resume():
    for before, after in ((2, 8), (10, 10), (26, 4)):
        check_resume(lambda begin: bench_of(begin=begin, weight_decay=0.1), before, after)


def test_pefts_own_loop_gives_the_same_losses_and_ranks_in_the_same_order(tmp_path):
    """The clipped job of the quickstart; PEFT scores before clipping, as here, and cuts likewise."""
    config = load_config("configs/quickstart.yaml", [
        *OURS, f"run.dir={tmp_path}", f"data.cache={tmp_path}/cache", "run.steps=10",
        "data.train_records=64", "data.eval=16", "data.eval_records=null",
        "method.tinit=2", "method.tfinal=3", "method.delta_t=2",
    ])  # fmt: skip
    (losses, held, ranks), (expected, wanted, theirs) = ours(config), by_peft(config, as_here=True)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert held == pytest.approx(wanted, rel=1e-5)
    assert ranks == theirs and len(set(ranks.values())) > 1
