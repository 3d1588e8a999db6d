"""WeightLoRA, WeightLoRA+ and RLoRA: StoIHT by hand, selection, expansion, support recovery."""

import gc
import math
import weakref

import numpy as np
import pytest
import torch

from adapters.decision import Decision
from tests.unit.adapters.methods.harness import (
    AdamW,
    Bench,
    Twin,
    array,
    assert_near,
    bits,
    check_resume,
    twins,
)

RANK, ALPHA = 2, 6.0
SCALE = ALPHA / RANK
SIX = [(12, 10), (8, 14)] * 3

both_scores = pytest.mark.parametrize("score", ["magnitude", "signed"])


def bench_of(kind="weightlora", **options):
    settings = {"seed", "steps", "rate", "begin", "shapes", "weight_decay", "learning_rate"}
    given = {key: options.pop(key) for key in list(options) if key in settings}
    defaults = {"rank": RANK, "alpha": ALPHA, "expand": "reinit"}
    if kind != "rlora":
        defaults |= {"warmup_steps": 50, "omega_learning_rate": 0.25}
    return Bench(kind, {**defaults, **options}, **{"shapes": SIX, "steps": 1000, **given})


def threshold(omega, keep, score="magnitude"):
    """H_K; of equal scores the lower unit."""
    key = np.abs(omega) if score == "magnitude" else omega
    kept = np.argsort(-key, kind="stable")[:keep]
    result = np.zeros_like(omega)
    result[kept] = omega[kept]
    return result


def omega_step(bench, gradient, skip=False):
    """A step in which ∂L/∂ω is `gradient` and A, B have none; the decision before it."""
    decision = bench.decide()
    bench.optimizer.zero_grad()
    for adapter, value in zip(bench.adapters.values(), gradient, strict=True):
        share = np.array([0.3, 0.7]) * value / SCALE  # ∂L/∂ω = (α/r) Σ_j ∂L/∂g_j
        adapter.g.grad.copy_(torch.from_numpy(share))
    bench.update(skip=skip)
    return decision


def omega_of(decision):
    return np.array(list(decision.scores["omega"].values()))


# --- phase 1 -----------------------------------------------------------------------------------


def test_start():
    bench = bench_of()
    for unit in bench.units:
        adapter = bench.adapters[unit.name]
        assert adapter.A.abs().max() <= 1 / unit.in_features**0.5 and not adapter.B.any()
        assert adapter.g.tolist() == [SCALE] * RANK and adapter.mask.all()
    decision = bench.step()
    assert omega_of(decision).tolist() == [1.0] * 6 and decision.survivors is None
    assert not any(".g" in name for name in bench.optimizer.state_dict())  # no Adam on ω


def test_defaults():
    bench = Bench("weightlora", shapes=[(12, 10)] * 7)
    options = bench.options
    assert options.kept(7) == 3 and options.kept(1) == 1
    assert [options.warmup(steps) for steps in (100, 200, 201, 1000)] == [1, 1, 2, 5]
    assert options.omega_learning_rate == 5.0 and options.omega_schedule == "constant"
    assert options.score == "magnitude"
    plus = Bench("weightlora_plus", {"rank": 2}).options
    assert plus.expand == "kept" and not plus.rescale_alpha


@both_scores
@pytest.mark.parametrize("keep", [1, 3, 5])
def test_stoiht_by_hand(score, keep):
    bench = bench_of(score=score, keep=keep)
    rng = np.random.default_rng(keep)
    omega = np.ones(6)
    for step in range(12):
        gradient = rng.normal(size=6) * 6
        decision = omega_step(bench, gradient)
        np.testing.assert_allclose(omega_of(decision), omega, rtol=1e-5, atol=1e-5)
        for adapter, value in zip(bench.adapters.values(), omega, strict=True):
            np.testing.assert_allclose(array(adapter.g), SCALE * value, rtol=1e-4, atol=1e-4)
            assert adapter.mask.tolist() == [value != 0] * RANK
        assert step == 0 or (omega != 0).sum() == keep
        omega = threshold(omega - 0.25 * gradient, keep, score)
    assert (omega < 0).any() or keep == 1 or score == "signed"  # else both scores are the same


def test_the_two_scores_differ():
    gradient = np.array([12.0, 0.4, 0.8, 1.2, 1.6, 2.0])  # ω: −2, 0.9, 0.8, …, 0.5
    for score, expected in (("magnitude", [-2, 0.9, 0.8]), ("signed", [0, 0.9, 0.8, 0.7])):
        bench = bench_of(score=score, keep=3)
        omega_step(bench, gradient)
        found = omega_of(omega_step(bench, np.zeros(6)))
        np.testing.assert_allclose(found, expected + [0] * (6 - len(expected)), atol=1e-5)


@both_scores
def test_training_is_numpy_s(score):
    """Phase 1 with real gradients: A, B by AdamW, ω by StoIHT, a zeroed unit's A and B kept."""
    bench = bench_of(
        score=score, keep=3, omega_learning_rate=2.0, learning_rate=3e-2, weight_decay=0.1
    )
    references, optimizer = twins(bench), AdamW(3e-2, weight_decay=0.1)
    omega, gradient, zeroed, back = np.ones(6), np.zeros(6), 0, 0
    for _ in range(12):
        if np.linalg.norm(gradient) > 1e-10:
            before, omega = omega, threshold(omega - 2.0 * gradient, 3, score)
            back += ((before == 0) & (omega != 0)).sum()
        decision = bench.step()
        np.testing.assert_allclose(omega_of(decision), omega, rtol=1e-3, atol=1e-3)
        for index, twin in enumerate(references):
            twin.g = np.full(RANK, omega[index] * SCALE)
            gradients = twin.gradients()
            gradient[index] = SCALE * gradients["g"].sum()
            active = np.full(RANK, omega[index] != 0)
            zeroed += not active[0]
            for role in "AB":
                optimizer.update((index, role), getattr(twin, role), gradients[role], active)
    for index, twin in enumerate(references):
        assert_near(bench.adapter(index).A, twin.A, 2e-3)
        assert_near(bench.adapter(index).B, twin.B, 2e-3)
    assert zeroed >= 20 and back >= 1


def test_a_zeroed_unit_keeps_every_bit_and_may_return():
    bench = bench_of(keep=2, weight_decay=0.5)
    bench.run(3)
    weak = next(name for name, adapter in bench.adapters.items() if not adapter.mask.any())
    index = [unit.name for unit in bench.units].index(weak)

    def state():
        adapter, optimizer = bench.adapters[weak], bench.optimizer.state_dict()
        moments = [t for role in "AB" for t in optimizer[f"{weak}.{role}"].values()]
        return [bits(tensor) for tensor in (adapter.A, adapter.B, *moments)]

    before = state()
    bench.decide()
    bench.backward()
    assert bench.adapters[weak].gate_gradient.abs().sum() > 0  # though its g is 0
    bench.update()
    assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    push = np.zeros(6)
    push[index] = -40.0
    omega_step(bench, push)
    decision = bench.decide()
    assert omega_of(decision)[index] > 5 and bench.adapters[weak].mask.all()
    bench.backward()
    bench.update()
    assert not torch.equal(state()[0], before[0])


def test_nothing_is_thresholded_without_a_gradient():
    bench = bench_of(keep=2)
    for gradient in (np.zeros(6), np.full(6, 1e-11), np.full(6, 4e-11)):
        assert omega_of(omega_step(bench, gradient)).tolist() == [1.0] * 6
    omega_step(bench, np.array([3e-10, 0, 0, 0, 0, 0]))
    assert (omega_of(bench.decide()) != 0).sum() == 2
    # and from the model: B = 0 in the first step
    bench = bench_of(keep=2)
    found = [omega_of(bench.step()) for _ in range(3)]
    assert (found[0] == 1).all() and (found[1] == 1).all() and (found[2] != 0).sum() == 2


def test_tiny_steps_on_omega_still_rank_the_units():
    """ω − 1 holds digits that ω in float32, or in float64, would lose."""
    bench = bench_of(keep=3)
    gradient = np.array([5.0, -1.0, 2.0, -4.0, 3.0, -2.0]) * 1e-9
    omega_step(bench, gradient * 1e-1)
    kept = np.flatnonzero(omega_of(omega_step(bench, np.zeros(6))))
    assert kept.tolist() == [1, 3, 5]


@both_scores
def test_ties_go_to_the_lower_unit_and_are_recorded(score):
    bench = bench_of(score=score, keep=3)
    omega_step(bench, np.array([1.0, -1.0, 1.0, 1.0, -1.0, 1.0]))
    decision = omega_step(bench, np.zeros(6))
    np.testing.assert_allclose(omega_of(decision), [0.75, 1.25, 0, 0, 1.25, 0], atol=1e-6)
    names = [unit.name for unit in bench.units]
    assert decision.extra["ties"] == [names[index] for index in (0, 2, 3, 5)]
    bench = bench_of(score=score, keep=2)
    omega_step(bench, np.array([1.0, -1.0, 1.0, 1.0, -1.0, 1.0]))
    assert "ties" not in bench.decide().extra  # the border runs between two values


def test_differences_in_the_last_bits_are_ties():
    bench = bench_of(keep=3)
    noise = 1 + 1e-9 * np.random.default_rng(0).normal(size=6)
    omega_step(bench, np.ones(6) * noise)
    decision = bench.decide()
    assert (
        np.flatnonzero(omega_of(decision)).tolist() == [0, 1, 2]
        and len(decision.extra["ties"]) == 6
    )


def test_the_step_on_omega_may_follow_the_main_schedule():
    rates = [0.5, 1.0, 0.25, 0.0625]
    for schedule in ("constant", "main"):
        bench = bench_of(omega_schedule=schedule, keep=6, rate=lambda step: rates[step])
        omega = np.ones(6)
        for step in range(4):
            gradient = np.random.default_rng(step).normal(size=6)
            found = omega_of(omega_step(bench, gradient))
            np.testing.assert_allclose(found, omega, atol=1e-5)
            omega = omega - 0.25 * (rates[step] if schedule == "main" else 1) * gradient


def test_a_skipped_step_moves_no_omega_and_does_not_count():
    bench, never = bench_of(warmup_steps=3), bench_of(warmup_steps=3)
    for step in range(3):
        gradient = np.random.default_rng(step).normal(size=6)
        if step == 1:
            omega_step(bench, gradient * np.nan, skip=True)
        first, second = omega_step(bench, gradient), omega_step(never, gradient)
        assert first == second and first.survivors is None
    assert bench.decide() == never.decide() and bench.decisions[-1].survivors


# --- when phase 1 ends -------------------------------------------------------------------------


def steps_of_phase_1(bench, gradients):
    for step in range(40):
        decision = bench.decide()
        if decision.survivors is not None:
            return step
        for adapter in bench.adapters.values():
            adapter.g.grad.fill_(-0.1 if gradients(step) else 0.0)
        bench.adapter(0).g.grad.mul_(2)
        bench.update()
    return None


def test_only_steps_with_a_learning_rate_count():
    assert steps_of_phase_1(bench_of(warmup_steps=4), lambda step: True) == 4
    rate = lambda step: 0.0 if step in (0, 1, 3) else 0.5  # noqa: E731
    assert steps_of_phase_1(bench_of(warmup_steps=4, rate=rate), lambda step: True) == 7
    assert steps_of_phase_1(bench_of(warmup_steps=1, rate=rate), lambda step: True) == 3


def test_warm_up_goes_on_until_something_was_thresholded():
    assert steps_of_phase_1(bench_of(warmup_steps=3), lambda step: step >= 8) == 9
    assert steps_of_phase_1(bench_of(warmup_steps=3), lambda step: step == 1) == 3
    bench = bench_of(warmup_steps=1)  # the model's own first step has no gradient
    bench.run(2)
    assert bench.decide().survivors


def test_a_warm_up_as_long_as_the_run_is_refused():
    options = bench_of(warmup_steps=10).options
    options.check_steps(11)
    with pytest.raises(ValueError, match=r"method.warmup_steps: 10 given; accepted: fewer than"):
        options.check_steps(10)


# --- phase 2 -----------------------------------------------------------------------------------


def select(bench, gradient=(0.0, 4.0, 0.0, 4.0, 0.0, 4.0)):
    """One real step, so that there are moments; then ω = 1 − η · gradient decides."""
    bench.step()
    omega_step(bench, np.array(gradient))
    return bench.decide()


@pytest.mark.parametrize("kind", ["weightlora", "weightlora_plus"])
def test_survivors_start_anew_and_the_others_are_gone(kind):
    bench = bench_of(kind, warmup_steps=1, keep=3, weight_decay=0.1)
    old = {name: adapter.A.detach().clone() for name, adapter in bench.adapters.items()}
    gone = {name: weakref.ref(adapter) for name, adapter in bench.adapters.items()}
    before = bench.optimizer.numel
    decision = select(bench)
    names = [unit.name for unit in bench.units]
    survivors = [names[0], names[2], names[4]]
    rank = RANK if kind == "weightlora" else 2 * RANK
    assert decision.survivors == survivors == list(bench.adapters)
    assert decision.ranks == dict.fromkeys(survivors, rank)
    gc.collect()
    assert all(reference() is None for reference in gone.values())
    for unit in bench.units:
        host = bench.adapted_layers[unit.name]
        if unit.name not in survivors:
            assert host.adapter is None
            W = bench.W[unit.name]
            np.testing.assert_allclose(
                array(bench.output(unit.name)), bench.x[unit.name] @ W.T, atol=1e-4
            )
            continue
        adapter = bench.adapters[unit.name]
        assert host.adapter is adapter and adapter.rank == rank
        bound = 1 / unit.in_features**0.5
        assert 0.5 * bound < adapter.A.abs().max() <= bound
        assert not adapter.B.any() and adapter.mask.all() and not adapter.g.requires_grad
        assert adapter.g.tolist() == [SCALE] * rank  # ω no longer multiplies
        for row in adapter.A:  # none of the earlier rows
            assert (row - old[unit.name]).abs().max(1).values.min() > 1e-3
    assert bench.optimizer.numel == sum(
        rank * (unit.in_features + unit.out_features)
        for unit in bench.units
        if unit.name in survivors
    )
    assert bench.optimizer.numel <= before
    assert not bench.method.due(bench.at) and not bench.method.due(bench.at + 1)


@pytest.mark.parametrize("kind", ["weightlora", "weightlora_plus"])
def test_survivors_have_a_fresh_optimizer_state(kind):
    bench = bench_of(kind, warmup_steps=1, keep=3)
    select(bench)
    for name, state in bench.optimizer.state_dict().items():
        for part, tensor in state.items():
            assert not tensor.any(), f"{name}: {part}"


@pytest.mark.parametrize("kind", ["weightlora", "weightlora_plus"])
def test_phase_2_is_numpy_s_lora(kind):
    bench = bench_of(kind, warmup_steps=1, keep=3, weight_decay=0.1, learning_rate=3e-3)
    select(bench)
    index_of = {unit.name: index for index, unit in enumerate(bench.units)}
    references = [Twin(bench, index_of[name]) for name in bench.adapters]
    optimizer = AdamW(3e-3, weight_decay=0.1)
    for _ in range(6):
        bench.backward()
        bench.update()
        assert not bench.method.due(bench.at)
        for twin in references:
            gradients = twin.gradients()
            for role in "AB":
                optimizer.update((twin.name, role), getattr(twin, role), gradients[role])
    assert len(references) == 3
    for twin in references:
        adapter = bench.adapter(index_of[twin.name])
        assert_near(adapter.A, twin.A)
        assert_near(adapter.B, twin.B)


def test_a_negative_omega_is_kept_by_h_k_and_dropped_at_selection():
    bench = bench_of(warmup_steps=1, keep=3)
    decision = select(bench, (16.0, 0.0, 0.4, 3.0, 3.0, 3.0))  # ω: −3, 1, 0.9, 0.25 …
    np.testing.assert_allclose(omega_of(decision), [-3, 1, 0.9, 0, 0, 0], atol=1e-3)
    names = [unit.name for unit in bench.units]
    assert decision.survivors == [names[1], names[2]]
    left = 4 * 22 * RANK  # of 6 units, each of 22 parameters a component
    assert bench.method.scalars() == {
        "survivors": 2, "rank_left_over": 4 * RANK, "parameters_left_over": left,
    }  # fmt: skip


def test_when_no_omega_is_positive_the_run_says_so():
    bench = bench_of(warmup_steps=1, keep=2)
    with pytest.raises(ValueError, match="no unit has ω > 0"):
        select(bench, (16.0, 16.0, 4.0, 4.0, 4.0, 4.0))


@pytest.mark.parametrize("n", [1, 2, 4, 5, 7])
def test_plus_spends_at_most_what_lora_spends(n):
    for keep in range(1, n + 1):
        bench = bench_of(
            "weightlora_plus", shapes=[(40, 30)] * n, keep=keep, warmup_steps=1, rank=RANK
        )
        bench.step()
        omega_step(bench, 0.1 + np.arange(n) * 0.1)
        decision = bench.decide()
        assert len(decision.survivors) == keep
        rank = RANK * math.floor(n / keep)
        assert set(decision.ranks.values()) == {rank} == {a.rank for a in bench.adapters.values()}
        held = sum(adapter.rank for adapter in bench.adapters.values())
        assert held == keep * rank <= n * RANK
        assert bench.method.scalars()["rank_left_over"] == n * RANK - held


def test_plus_doubles_the_rank_by_default():
    bench = bench_of("weightlora_plus", warmup_steps=1)
    assert set(select(bench).ranks.values()) == {2 * RANK}


@pytest.mark.parametrize("expand", ["reinit", "qr"])
@pytest.mark.parametrize("rescale", [False, True])
def test_scale_of_a_survivor(expand, rescale):
    bench = bench_of(
        "weightlora_plus", warmup_steps=1, keep=3, expand=expand, rescale_alpha=rescale
    )
    select(bench)
    expected = ALPHA / (2 * RANK if rescale else RANK)
    for adapter in bench.adapters.values():
        assert adapter.g.tolist() == pytest.approx([expected] * (2 * RANK))


@pytest.mark.parametrize("rescale", [False, True])
def test_qr_keeps_the_function(rescale):
    bench = bench_of(
        "weightlora_plus", warmup_steps=1, keep=2, expand="qr", rescale_alpha=rescale,
        learning_rate=5e-2,
    )  # fmt: skip
    bench.run(1)
    learned = twins(bench)
    omega_step(bench, np.array([0.3, 4.0, 4.0, 4.0, -0.9, 4.0]))
    moved = twins(bench)  # A, B did not move in that step but for Adam's momentum
    decision = bench.decide()
    assert decision.survivors == [bench.units[0].name, bench.units[4].name]
    assert learned[0].B.any()
    for index in (0, 4):
        unit, adapter = bench.units[index], bench.adapter(index)
        omega = decision.scores["omega"][unit.name]
        assert adapter.rank == 3 * RANK
        expected = omega * SCALE * moved[index].B.T @ moved[index].A
        new = array(adapter.B).T @ np.diag(array(adapter.g)) @ array(adapter.A)
        np.testing.assert_allclose(new, expected, rtol=1e-5, atol=1e-7)
        A, B = array(adapter.A), array(adapter.B)
        np.testing.assert_array_equal(A[:RANK], moved[index].A)
        assert not B[RANK:].any()
        overlap = A[RANK:] @ A[:RANK].T  # new rows: orthogonal to what was learned, and mutually
        assert np.abs(overlap).max() < 1e-6
        gram = A[RANK:] @ A[RANK:].T
        assert np.abs(gram - np.diag(np.diag(gram))).max() < 1e-6 and np.diag(gram).min() > 0.1
        y = bench.x[unit.name] @ (bench.W[unit.name] + expected).T
        np.testing.assert_allclose(array(bench.output(unit.name)), y, atol=1e-4)
    bench.backward()  # new columns of B have gradients
    assert (bench.adapter(0).B.grad[RANK:].abs().sum(1) > 0).all()


def test_micro_batches_may_grow_after_selection():
    bench = bench_of(warmup_steps=1, after_selection={"micro_batch_size": 16})
    assert bench.method.micro_batch_size is None
    select(bench)
    assert bench.method.micro_batch_size == 16
    bench = bench_of(warmup_steps=1)
    select(bench)
    assert bench.method.micro_batch_size is None


def test_refusals():
    with pytest.raises(ValueError, match=r"method.keep: 7 given; accepted: at most 6"):
        bench_of(keep=7)
    with pytest.raises(ValueError, match=r"method.keep: 1 of 6 units.*rank 12.*layers.0.k0"):
        bench_of("weightlora_plus", keep=1)


# --- RLoRA -------------------------------------------------------------------------------------


def test_rlora_keeps_k_units_before_the_first_step():
    bench = bench_of("rlora", keep=2)
    decision = bench.step()
    assert len(decision.survivors) == 2 == len(bench.adapters)
    order = [unit.name for unit in bench.units]
    assert decision.survivors == sorted(decision.survivors, key=order.index)
    assert decision.ranks == dict.fromkeys(decision.survivors, RANK)
    for adapter in bench.adapters.values():
        assert adapter.rank == RANK and adapter.g.tolist() == [SCALE] * RANK
    assert not any(bench.method.due(step) for step in range(1, 20))
    assert len(Bench("rlora", shapes=[(12, 10)] * 7).method.decide(0).survivors) == 3


def test_rlora_draws_every_unit_alike_over_seeds():
    bench = bench_of("rlora", keep=2)
    names = [unit.name for unit in bench.units]
    counts = np.zeros(6)
    for seed in range(300):
        method = type(bench.method)(bench.options, seed)
        method.adapters.units = bench.units
        for name in method.decide(0).survivors:
            counts[names.index(name)] += 1
    assert counts.sum() == 600
    # 2 of 6 without putting back: χ² is (6 − 1) / (6 − 2) of a multinomial's
    assert ((counts - 100) ** 2 / 100).sum() * 5 / 4 < 20.5  # 5 degrees of freedom, 99.9 %


# --- resume ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["weightlora", "weightlora_plus", "rlora"])
@pytest.mark.parametrize("before", [1, 3, 6])
def test_resume(kind, before):
    options = {} if kind == "rlora" else {"warmup_steps": 4, "omega_learning_rate": 2.0}

    def make(begin):
        return bench_of(kind, begin=begin, learning_rate=2e-2, weight_decay=0.1, **options)

    check_resume(make, before, 5)


# --- support recovery --------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_stoiht_recovers_a_sparse_regression(seed):
    """y = Σ_u w*_u φ_u(x), with fixed unit outputs φ_u, so that ω is the regression vector."""
    n, keep, out, inp = 12, 3, 16, 24
    bench = bench_of(
        shapes=[(out, inp)] * n, seed=seed, keep=keep, warmup_steps=50, omega_learning_rate=0.6,
        learning_rate=0.0,
    )  # fmt: skip
    rng = np.random.default_rng(1000 + seed)
    maps = []
    for unit in bench.units:
        host, adapter = bench.adapted_layers[unit.name], bench.adapters[unit.name]
        host.weight.data.zero_()
        A, B = rng.normal(size=(RANK, inp)), rng.normal(size=(RANK, out))
        B /= np.linalg.norm(SCALE * B.T @ A)  # E ‖φ_u(x)‖² = 1 for x ~ N(0, 1)
        adapter.A.data.copy_(torch.from_numpy(A))
        adapter.B.data.copy_(torch.from_numpy(B))
        maps.append(SCALE * B.T @ A)
    support = np.sort(rng.permutation(n)[:keep])
    w = np.zeros(n)
    w[support] = rng.uniform(0.5, 2.0, keep) * np.where(np.arange(keep) == 0, -1, 1)
    target = sum(value * M for value, M in zip(w, maps, strict=True))
    for _ in range(50):
        bench.decide()
        x = rng.normal(size=(64, inp))  # a fresh batch every step
        inputs = torch.from_numpy(x).float()
        y = sum(bench.adapted_layers[unit.name](inputs) for unit in bench.units)
        error = y - torch.from_numpy(x @ target.T).float()
        (0.5 * error.square().sum(1).mean()).backward()
        bench.update()
    omega = omega_of(bench.decide())
    assert np.flatnonzero(omega).tolist() == support.tolist()
    np.testing.assert_allclose(omega, w, atol=1e-3)
    positive = [bench.units[index].name for index in np.flatnonzero(w > 0)]
    assert bench.decisions[-1].survivors == positive == list(bench.adapters)


def test_a_recorded_rank_below_what_a_survivor_has_learned_is_refused():
    """`expand: qr` keeps the r learned components; a smaller rank has no room for them."""
    for expand, accepted in (("qr", False), ("reinit", True)):
        bench = bench_of("weightlora_plus", warmup_steps=1, keep=2, expand=expand)
        omega = {unit.name: 1.0 for unit in bench.units}
        name = bench.units[0].name
        recorded = Decision(survivors=[name], ranks={name: RANK - 1}, scores={"omega": omega})
        if accepted:
            bench.method.check_decision(recorded)
        else:
            with pytest.raises(ValueError, match=f"rank {RANK - 1} for {name}; accepted"):
                bench.method.check_decision(recorded)
