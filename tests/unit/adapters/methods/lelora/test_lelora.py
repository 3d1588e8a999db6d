"""LeLoRA: banks, slices, what trains, rewards and features, against NumPy."""

import itertools

import numpy as np
import pytest
import torch

from adapters.decision import Decision
from adapters.methods.lelora.reinforce import Reinforce
from tests.unit.adapters.methods.harness import (
    AdamW,
    Bench,
    array,
    assert_near,
    bits,
    check_resume,
    no_validation,
    twins,
)
from tests.unit.adapters.methods.lelora.banks import PLACES, RANKS, SHAPES, first_index, held


def bench_of(policy=None, locations=PLACES, ranks=RANKS, wake="gradual", **settings):
    policy = {"credit": "attributed", **(policy or {})}
    options = {
        "ranks": list(ranks), "locations": list(locations), "wake": wake, "policy": policy,
    }  # fmt: skip
    return Bench(
        "lelora", options,
        **{"shapes": SHAPES, "records": 32, "learning_rate": 5e-3, **settings},
    )  # fmt: skip


def decision_of(bench, *actions):
    """A decision that gives the units these (r, s) in turn."""
    pairs = dict(zip([unit.name for unit in bench.units], itertools.cycle(actions), strict=False))
    return Decision(
        ranks={name: r for name, (r, _) in pairs.items()},
        locations={name: s for name, (_, s) in pairs.items()},
    )


# --- banks, slices, what trains ----------------------------------------------------------------


@pytest.mark.parametrize("locations", [PLACES, ["minor", "primary"], ["medium"]])
def test_components_are_singular_triplets_that_w_loses(locations):
    bench = bench_of(locations=locations)
    for unit in bench.units:
        W, adapter = bench.W[unit.name], bench.adapters[unit.name]
        U, S, Vh = np.linalg.svd(W, full_matrices=False)
        indices = held(unit, locations)
        assert adapter.rank == len(indices) == 4 * len(locations)
        A, g, B = array(adapter.A), array(adapter.g), array(adapter.B)
        np.testing.assert_allclose(g, S[indices], atol=1e-6)
        for j, i in enumerate(indices):
            triplet = S[i] * np.outer(U[:, i], Vh[i])
            np.testing.assert_allclose(g[j] * np.outer(B[j], A[j]), triplet, atol=1e-5)
            assert np.linalg.norm(A[j]) == pytest.approx(1, abs=1e-5)
            assert np.linalg.norm(B[j]) == pytest.approx(1, abs=1e-5)
        residual = W - (U[:, indices] * S[indices]) @ Vh[indices]
        np.testing.assert_allclose(
            array(bench.adapted_layers[unit.name].weight), residual, atol=1e-5
        )
        assert adapter.g.requires_grad
        expected = bench.x[unit.name] @ W.T
        np.testing.assert_allclose(array(bench.output(unit.name)), expected, atol=5e-5)


@pytest.mark.parametrize(("r", "place"), itertools.product(RANKS, PLACES))
def test_slices(r, place):
    for locations in (PLACES, ["minor", place] if place != "minor" else ["minor"]):
        bench = bench_of(locations=locations)
        assert bench.method.apply(decision_of(bench, (r, place))) is False
        for unit in bench.units:
            start = first_index(place, min(unit.out_features, unit.in_features), r)
            active = set(range(start, start + r))
            expected = [index in active for index in held(unit, locations)]
            assert bench.adapters[unit.name].mask.tolist() == expected
            assert sum(expected) == r
        size = sum(r * (unit.in_features + unit.out_features + 1) for unit in bench.units)
        assert bench.method.adapters.active_parameters() == size


def test_the_largest_rank_that_fits():
    """r_max ≤ ⌊⌈d/2⌉/2⌋ with three banks; a larger one is refused by name."""
    for d in range(4, 40):
        largest = -(-d // 2) // 2
        bench_of(shapes=[(d, 45)], ranks=[largest])
        with pytest.raises(ValueError, match=f"{largest + 1} given; accepted: at most {largest}.*"
                           f"layers.0.k0"):  # fmt: skip
            bench_of(shapes=[(45, d)], ranks=[largest + 1])


def test_ranks_follow_from_the_rank():
    """R = {0, 2, 4, 8, …, r_max}."""

    def drawn(**given):
        bench = Bench("lelora", {**given, "policy": {"mode": "uniform"}}, shapes=[(80, 90)])
        found = {r for step in range(80) for r in bench.method.decide(step).ranks.values()}
        assert bench.options.components == 3 * max(found)
        return sorted(found)

    assert drawn() == [0, 2, 4, 8]
    assert drawn(rank=16) == [0, 2, 4, 8, 16]
    assert drawn(rank=2) == [0, 2] and drawn(rank=12) == [0, 2, 4, 8, 12]
    assert drawn(ranks=[0, 3, 5]) == [0, 3, 5]


def test_all_components_take_part_in_the_forward_pass():
    rng = np.random.default_rng(0)
    bench = bench_of()
    bench.method.apply(decision_of(bench, (2, "minor"), (0, "primary"), (4, "medium")))
    for adapter in bench.adapters.values():
        for tensor in (adapter.A, adapter.g, adapter.B):
            tensor.data.add_(torch.from_numpy(rng.normal(size=tuple(tensor.shape)) * 0.1))
    for twin in twins(bench):
        np.testing.assert_allclose(array(bench.output(twin.name)), twin.output(), atol=1e-4)


@pytest.mark.parametrize("wake", ["gradual", "at_once"])
def test_training_is_numpy_s_and_inactive_rows_keep_every_bit(wake):
    bench = bench_of(weight_decay=0.1, max_norm=1.0, wake=wake)
    references = twins(bench)
    optimizer = AdamW(
        5e-3, weight_decay=0.1, no_bias_correction=wake == "gradual", to_start=True
    )  # fmt: skip
    rested = 0
    for _ in range(12):
        decision = bench.decide()
        active = {}
        for unit in bench.units:
            r, s = decision.ranks[unit.name], decision.locations[unit.name]
            start = first_index(s, min(unit.out_features, unit.in_features), r)
            own = range(first_index(s, min(unit.out_features, unit.in_features), 4), 10**6)
            begin = 4 * PLACES.index(s) + (start - own[0])
            active[unit.name] = np.isin(np.arange(12), np.arange(begin, begin + r))
        before = state(bench)
        bench.backward()
        bench.update()
        after = state(bench)
        for (name, role), tensors in before.items():
            still = torch.from_numpy(~active[name])
            for old, new in zip(tensors, after[name, role], strict=True):
                assert torch.equal(old[still], new[still])
            assert still.all() or not torch.equal(tensors[0], after[name, role][0])
            rested += bool(still.all())
        found = [twin.gradients() for twin in references]
        for twin, gradients in zip(references, found, strict=True):
            for gradient in gradients.values():
                gradient[~active[twin.name]] = 0  # the norm is over what is active
        norm = np.sqrt(sum((g**2).sum() for gradients in found for g in gradients.values()))
        for twin, gradients in zip(references, found, strict=True):
            for role, gradient in gradients.items():
                optimizer.update(
                    (twin.name, role), getattr(twin, role), gradient / max(norm, 1.0),
                    active[twin.name],
                )  # fmt: skip
    assert rested > 0  # r = 0 was drawn
    for index, twin in enumerate(references):
        for role in ("A", "g", "B"):
            assert_near(getattr(bench.adapter(index), role), getattr(twin, role), 2e-3)


def state(bench):
    """Values, moments and step counts, as bits."""
    moments = bench.optimizer.state_dict()
    return {
        (name, role): [bits(t) for t in (getattr(a, role), *moments[f"{name}.{role}"].values())]
        for name, a in bench.adapters.items()
        for role in ("A", "g", "B")
    }


@pytest.mark.parametrize("where", ["hidden", "input"])
def test_dropout_spares_the_part_of_w(where):
    options = {"ranks": RANKS, "dropout": 0.5, "dropout_on": where}
    bench = Bench("lelora", options, shapes=SHAPES)
    for host in bench.adapted_layers.values():
        host.train()
    for unit in bench.units:
        expected = bench.x[unit.name] @ bench.W[unit.name].T
        np.testing.assert_allclose(array(bench.output(unit.name)), expected, atol=1e-4)


# --- rewards -----------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """Everything that the policy is told or asked: ("learn", R) and ("draw", step)."""
    made = []
    learn, draw = Reinforce.learn, Reinforce.draw

    def spy_learn(self, reward):
        made.append(("learn", reward.detach().clone().numpy()))
        return learn(self, reward)

    def spy_draw(self, step, features):
        made.append(("draw", step))
        return draw(self, step, features)

    monkeypatch.setattr(Reinforce, "learn", spy_learn)
    monkeypatch.setattr(Reinforce, "draw", spy_draw)
    return made


def rewards(calls):
    return [value for what, value in calls if what == "learn"]


def product(gradients, now, before):
    """⟨∇L, Δθ⟩ over A, g and B of one unit."""
    return sum(
        (gradients[role] * (getattr(now, role) - getattr(before, role))).sum()
        for role in ("A", "g", "B")
    )


@pytest.mark.parametrize("every", [1, 3])
def test_attributed_reward_by_the_next_batch(every, calls):
    """Unclipped gradient of the next batch, actual change with weight decay, of every component."""
    bench = bench_of({"every": every}, weight_decay=0.2, max_norm=0.1)
    rng = np.random.default_rng(0)
    expected, before = [], None
    for step in range(4 * every + 2):
        start = int(rng.integers(0, 24))
        bench.batch = slice(start, start + 8)
        due = step % every == 0
        decision = bench.decide()
        assert (decision is not None) == due
        now = twins(bench)
        if due:
            if before is not None:
                changes = [twin.gradients(bench.batch) for twin in now]
                expected.append([product(*x) for x in zip(changes, now, before, strict=True)])
            before = now
        bench.backward()
        bench.update()
    found = rewards(calls)
    assert len(found) == (4 if every == 1 else 3) and len(expected) == (5 if every == 1 else 4)
    for reward, reference in zip(found, expected, strict=False):
        assert reward.shape == (4,) and reward.dtype == np.float64
        np.testing.assert_allclose(
            reward, reference, rtol=2e-3, atol=2e-4 * np.abs(reference).max()
        )
    # A draw's reward is there once the backward of the next one is done, and is used before the
    # one after that is drawn.
    order = [what if what == "learn" else value for what, value in calls]
    k = every
    assert order[:6] == [0, k, "learn", 2 * k, "learn", 3 * k]


def test_a_unit_that_rests_has_no_reward(calls):
    bench = bench_of(weight_decay=0.5)
    for _ in range(8):
        bench.step()
    drawn = [list(decision.ranks.values()) for decision in bench.decisions]
    zeros = 0
    for reward, ranks in zip(rewards(calls), drawn, strict=False):
        np.testing.assert_array_equal(reward == 0, np.array(ranks) == 0)
        zeros += (reward == 0).sum()
    assert zeros > 0


def validation(bench, gradients):
    """The loss of the first 8 records; its gradient goes into the optimizer's buffer."""
    training, bench.batch = bench.batch, slice(0, 8)
    with torch.set_grad_enabled(gradients):
        loss = bench.loss()
        if gradients:
            assert not bench.optimizer.gradients.any()
            loss.backward()
    bench.batch = training
    return float(loss.detach())


@pytest.mark.parametrize("every", [1, 3])
def test_attributed_reward_by_validation(every, calls):
    bench = bench_of(
        {"signal": "validation", "every": every}, weight_decay=0.2, max_norm=0.1,
        validate=validation,
    )  # fmt: skip
    bench.batch = slice(8, None)
    expected, before = [], None
    for step in range(3 * every + 1):
        bench.decide()
        if step % every == 0:
            before = twins(bench)
        bench.backward()
        bench.update()
        assert not bench.optimizer.gradients.any()
        if (step + 1) % every == 0:
            now = twins(bench)
            changes = [twin.gradients(slice(0, 8)) for twin in now]
            expected.append([product(*x) for x in zip(changes, now, before, strict=True)])
    found = rewards(calls)
    assert len(found) == 3
    for reward, reference in zip(found, expected, strict=False):
        np.testing.assert_allclose(
            reward, reference, rtol=2e-3, atol=2e-4 * np.abs(reference).max()
        )
    order = [what if what == "learn" else value for what, value in calls]
    assert order[:5] == [0, "learn", every, "learn", 2 * every]
    assert bench.options.validation_samples == 32


def table(bench, earlier, later):
    """R_u(r, s) = −Σ_{j in slice} Σ_{A, g, B} ⟨sign(G_j), G′_j⟩."""
    found = np.zeros((4, 3, 3))
    for u, unit in enumerate(bench.units):
        d = min(unit.out_features, unit.in_features)
        indices = held(unit, PLACES)
        for (a, r), (b, s) in itertools.product(enumerate(RANKS), enumerate(PLACES)):
            for index in range(first_index(s, d, r), first_index(s, d, r) + r):
                j = next(j for j in range(4 * b, 4 * b + 4) if indices[j] == index)
                for role in ("A", "g", "B"):
                    G, H = np.ravel(earlier[u][role][j]), np.ravel(later[u][role][j])
                    found[u, a, b] -= np.where(G < 0, -1.0, 1.0) @ H
    return found


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("signal", ["next_batch", "validation"])
def test_counterfactual_rewards(signal, every, calls):
    """Every action's reward in every step, from two unclipped gradients of all components."""
    validate = validation if signal == "validation" else no_validation
    bench = bench_of(
        {"credit": "counterfactual", "signal": signal, "every": every}, weight_decay=0.2,
        max_norm=0.1, validate=validate,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    expected, earlier = [], None
    for step in range(4 * every + 1):
        start = int(rng.integers(8, 24))
        bench.batch = slice(start, start + 8)
        bench.decide()
        gradients = [twin.gradients(bench.batch) for twin in twins(bench)]
        if step % every == 0:
            if signal == "next_batch" and earlier is not None:
                expected.append(table(bench, earlier, gradients))
            earlier = gradients
        bench.backward()
        bench.update()
        if signal == "validation" and (step + 1) % every == 0:
            later = [twin.gradients(slice(0, 8)) for twin in twins(bench)]
            expected.append(table(bench, earlier, later))
    found = rewards(calls)
    assert len(found) == (3 if signal == "next_batch" else 4) and len(expected) >= 4
    for reward, reference in zip(found, expected, strict=False):
        assert reward.shape == (4, 3, 3) and not reward[:, 0].any()  # r = 0 promises nothing
        np.testing.assert_allclose(
            reward, reference, rtol=2e-3, atol=2e-4 * np.abs(reference).max()
        )


def script(values):
    """A validation loss that says these numbers in turn, and is never asked for gradients."""
    left = list(values)

    def validate(bench, gradients):
        assert not gradients
        return left.pop(0)

    return validate, left


@pytest.mark.parametrize("loss", ["both", "l1", "l2"])
@pytest.mark.parametrize("alpha", [0.5, 0.8, 1.0])
@pytest.mark.parametrize("every", [1, 2])
def test_the_literal_reward(loss, alpha, every, calls):
    """R = L1 + α L2; one validation before the first step, then one for every draw."""
    values = [3.0, 2.5, 2.75, 2.25, 2.0, 2.125]
    validate, left = script(values)
    policy = {"credit": "global", "loss": loss, "alpha": alpha, "every": every}
    bench = bench_of(policy, validate=validate)
    assert len(left) == 5
    for step in range(4 * every + 1):
        assert len(left) == 5 - step // every
        bench.step()
    expected = []
    for before, after in itertools.pairwise(values[:5]):
        l1, l2 = after, after - before
        expected.append({"both": l1 + alpha * l2, "l1": l1, "l2": l2}[loss])
    np.testing.assert_allclose(np.array(rewards(calls)), np.array(expected)[:, None], rtol=1e-12)


def test_a_skipped_step_drops_its_sample(calls):
    """Step 3 is skipped: the draw of step 3 taught nothing, nor can it measure step 2's."""
    bench = bench_of()
    parameters = []
    for step in range(9):
        bench.step(skip=step == 3)
        network = bench.method.decider_state()
        parameters.append(torch.cat([t.flatten() for n, t in network.items() if "network" in n]))
    found = rewards(calls)  # of the draws of steps 0 … 6, learned before the draws of 2 … 8
    assert [bool(np.isfinite(reward).all()) for reward in found] == [
        True, True, False, False, True, True, True
    ]  # fmt: skip
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(parameters)]
    # The first reward has no baseline, the second one no spread; those of 2 and 3 are dropped.
    assert moved == [False, False, False, False, False, True, True, True]


@pytest.mark.parametrize("credit", ["global", "attributed", "counterfactual"])
def test_a_skipped_step_drops_its_sample_with_validation(credit, calls):
    policy = {"credit": credit, "signal": "validation", "every": 2}
    bench = bench_of(policy, validate=validation)
    for step in range(9):
        bench.step(skip=step == 3)  # within the draw of step 2
    finite = [bool(np.isfinite(reward).all()) for reward in rewards(calls)]
    assert finite == [True, False, True, True]


def test_samples_are_not_mixed_up_after_a_skipped_step(monkeypatch):
    """The reward of a draw goes to that draw, however many were dropped before it."""
    pairs = []
    update = Reinforce._update

    def spy(self, draw, advantage):
        pairs.append(draw.ranks.tolist())
        return update(self, draw, advantage)

    monkeypatch.setattr(Reinforce, "_update", spy)
    bench = bench_of()
    for step in range(12):
        bench.step(skip=step in (4, 5))
    drawn = [[RANKS.index(r) for r in d.ranks.values()] for d in bench.decisions]
    # draws 3, 4 and 5 are dropped; 0 and 1 give the first baseline and spread; 10, 11 are pending
    assert pairs == [drawn[step] for step in (2, 6, 7, 8, 9)]


def advance(main, other):
    """A step of a rank that decides and of one that only applies."""
    decision = main.decide()
    if decision is not None:
        other.method.apply(decision)
    for bench in (main, other):
        bench.backward()
        bench.update()


def test_decisions_can_be_applied_where_none_is_made():
    """Other ranks only apply, and hold the same adapters and the same common state."""
    main, other = bench_of({"every": 2}), bench_of({"every": 2})
    for _ in range(9):
        advance(main, other)
        for a, b in zip(main.adapters.values(), other.adapters.values(), strict=True):
            assert torch.equal(bits(a.A), bits(b.A)) and torch.equal(a.mask, b.mask)
        first, second = main.method.state_dict(), other.method.state_dict()
        assert first.keys() == second.keys()
        for name, tensor in first.items():
            torch.testing.assert_close(second[name], tensor, rtol=0, atol=0, equal_nan=True)
    assert other.method.decider_state() == {}


@pytest.mark.parametrize("credit", ["global", "attributed", "counterfactual"])
def test_the_common_state_is_common_with_validation(credit):
    policy = {"credit": credit, "signal": "validation", "every": 2}
    main, other = (bench_of(policy, validate=validation) for _ in range(2))
    for _ in range(5):
        advance(main, other)
        assert main.method.state_dict().keys() == other.method.state_dict().keys()


# --- features ----------------------------------------------------------------------------------


@pytest.mark.parametrize("points", [5, 40])
@pytest.mark.parametrize("kind", ["current", "initial"])
def test_features(kind, points):
    """log1p of the norm, the spectrum resampled over its index by σ₁, and today's gates by σ₁."""
    bench = bench_of({"features": kind, "spectrum_points": points}, locations=["minor", "primary"])
    rng = np.random.default_rng(0)
    spectra = {name: np.linalg.svd(W, compute_uv=False) for name, W in bench.W.items()}
    for trained in (False, True):
        if trained:
            for adapter in bench.adapters.values():
                adapter.g.data.add_(torch.from_numpy(rng.uniform(0, 0.5, 8)))
        found = bench.method.features()
        assert found.shape == (4, 1 + points + (8 if kind == "current" else 0))
        for row, unit in zip(array(found), bench.units, strict=True):
            S, g = spectra[unit.name], array(bench.adapters[unit.name].g)
            norm = np.linalg.norm(bench.W[unit.name])
            if kind == "current":
                indices = held(unit, ["minor", "primary"])
                norm = np.sqrt(norm**2 - (S[indices] ** 2).sum() + (g**2).sum())
            curve = np.interp(np.linspace(0, len(S) - 1, points), np.arange(len(S)), S) / S[0]
            expected = [np.log1p(norm), *curve, *(g / S[0] if kind == "current" else [])]
            np.testing.assert_allclose(row, expected, rtol=1e-5, atol=1e-6)


def test_layer_and_type_are_what_the_backbone_says(monkeypatch):
    seen = {}
    make = Reinforce.__init__

    def spy(self, options, **given):
        seen.update(given)
        make(self, options, **given)

    monkeypatch.setattr(Reinforce, "__init__", spy)
    bench = bench_of()
    bench.step()
    assert seen["layer"].tolist() == [0, 0, 1, 1] and seen["kind"].tolist() == [0, 1, 0, 1]
    assert list(seen["ranks"]) == RANKS and seen["locations"] == 3
    assert seen["sizes"].tolist() == [o + i + 1 for o, i in SHAPES]
    assert seen["features"] == bench.method.features().shape[1] == 1 + 256 + 12


# --- modes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 5.0]])
def test_uniform_draws(weights):
    bench = bench_of({"mode": "uniform", "rank_weights": weights})
    rounds = 500
    counts = np.zeros((3, 3))
    for step in range(rounds):
        decision = bench.method.decide(step)
        for r, s in zip(decision.ranks.values(), decision.locations.values(), strict=True):
            counts[RANKS.index(r), PLACES.index(s)] += 1
    share = np.array(weights or [1, 1, 1]) / sum(weights or [1, 1, 1])
    expected = np.outer(share, np.full(3, 1 / 3)) * rounds * 4
    assert ((counts - expected) ** 2 / expected).sum() < 26.1  # 8 degrees of freedom, 99.9 %


def test_another_seed_draws_other_actions():
    for mode in ("uniform", "learned"):
        drawn = []
        for seed in (0, 1):
            bench = bench_of({"mode": mode}, seed=seed)
            drawn.append(
                [bench.method.decide(0 if mode == "learned" else step) for step in range(9)]
            )
        same = sum(a.ranks == b.ranks for a, b in zip(*drawn, strict=True))
        assert same < 5, mode


@pytest.mark.parametrize("mode", ["uniform", "frozen"])
def test_what_does_not_learn_never_validates_nor_updates(mode, calls):
    policy = {"mode": mode, "credit": "global", "signal": "validation"}
    bench = bench_of(policy)  # its validation loss raises when asked
    bench.step()
    before = bench.snapshot()["decider"]
    for _ in range(12):
        bench.step()
    after = bench.method.decider_state()
    assert after.keys() == before.keys() and rewards(calls) == []
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert bench.options.validation_samples == 0
    assert len({str(decision) for decision in bench.decisions}) > 6


def test_single_choices():
    """Location only (r fixed) and dimension only (s fixed)."""
    bench = bench_of(ranks=[4])
    bench.run(6)
    assert {r for d in bench.decisions for r in d.ranks.values()} == {4}
    assert len({s for d in bench.decisions for s in d.locations.values()}) == 3
    bench = bench_of(locations=["primary"])
    bench.run(6)
    assert {s for d in bench.decisions for s in d.locations.values()} == {"primary"}
    assert len({r for d in bench.decisions for r in d.ranks.values()}) == 3


def test_a_replayed_run_does_not_learn(calls):
    options = {"ranks": RANKS, "replay": "runs/other", "policy": {"signal": "validation"}}
    bench = Bench("lelora", options, shapes=SHAPES)
    for _ in range(4):
        bench.method.apply(decision_of(bench, (2, "primary"), (4, "minor")))
        bench.backward()
        bench.update()
    assert calls == []
    assert not {"before", "reached", "reward"} & bench.method.state_dict().keys()


def test_what_the_log_shows():
    bench = bench_of(shapes=[(16, 20), (24, 17)] * 3)
    actions = [
        (4, "primary"),
        (0, "minor"),
        (2, "minor"),
        (0, "medium"),
        (2, "minor"),
        (4, "medium"),
    ]
    bench.method.apply(decision_of(bench, *actions))
    bench.method.apply(decision_of(bench, *actions[1:], actions[0]))
    bench.method.apply(decision_of(bench, *actions))
    found = bench.method.scalars()
    assert found["mean_rank"] == 2 and found["distinct_actions"] == 4
    expected = {
        "k0": 8 / 3, "k1": 4 / 3, "front": 2, "middle": 1, "back": 3,
    }  # fmt: skip
    for group, mean in expected.items():
        assert found[f"mean_rank/{group}"] == pytest.approx(mean)
    assert found["share_primary/k0"] == pytest.approx(1 / 3)
    assert found["share_minor/k0"] == pytest.approx(2 / 3)
    assert found["share_medium/k1"] == 1 and found["share_primary/front"] == 1
    touched = [
        {0, 1, 2, 3},
        {10, 11},
        {10, 11},
        {10, 11},
        {10, 11, 4, 5, 6, 7},
        {4, 5, 6, 7, 0, 1, 2, 3},
    ]
    sizes = [37 if index % 2 == 0 else 42 for index in range(6)]
    total = sum(len(rows) * size for rows, size in zip(touched, sizes, strict=True))
    assert found["touched_parameters"] == total


# --- resume ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy",
    [
        {},
        {"credit": "counterfactual"},
        {"credit": "counterfactual", "signal": "validation", "every": 2, "cost": 1e-4},
        {"every": 3, "entropy": 0.1},
        {"signal": "validation", "every": 2},
        {"credit": "global", "baseline": "trend", "optimizer": "sgd", "learning_rate": 0.1},
        {"credit": "global", "every": 2, "advantage": "raw"},
        {"mode": "uniform"},
        {"mode": "frozen", "network": "resnet", "features": "initial"},
        {"network": "tabnet"},
    ],
    ids=lambda policy: ",".join(f"{k}={v}" for k, v in policy.items()) or "defaults",
)
def test_resume(policy):
    def make(begin):
        bench = bench_of(policy, begin=begin, validate=validation, weight_decay=0.1)
        bench.batch = slice(8, None)
        return bench

    for before in (1, 6):
        check_resume(make, before, 5)
