"""Survivors of a selection that go on as they were (`expand: kept`), or are of every block (`within:
layer`); references in NumPy."""

import numpy as np
import pytest

from adapters.decision import Decision
from tests.unit.adapters.methods.harness import AdamW, Bench, Twin, array, assert_near, check_resume
from tests.unit.adapters.methods.test_selection import SIZES, UNEQUAL, drive, fitting, names
from tests.unit.adapters.methods.test_weightlora import RANK, SCALE, bench_of, omega_of, omega_step

RATE, DECAY = 2e-2, 0.1
CHOSEN = np.array([-1.0, 2.0, 0.4, 2.0, 2.0, -0.6])  # ∂L/∂ω: units 0, 2 and 5 survive


def state_of(bench, name, role):
    """(m, v, t) of a trained tensor."""
    state = bench.optimizer.state_dict()[f"{name}.{role}"]
    return tuple(array(state[part]) for part in ("exp_avg", "exp_avg_sq", "step"))


def with_new_rows(state, added):
    return tuple(np.concatenate([part, np.zeros((added, *part.shape[1:]))]) for part in state)


@pytest.mark.parametrize("kind", ["weightlora", "weightlora_plus"])
def test_kept_survivors_go_on_as_if_omega_had_always_been_in_b(kind):
    """θ′ = c θ has ∂L/∂θ′ = ∂L/∂θ / c, hence moments m / c and v / c²; new rows begin with none."""
    bench = bench_of(
        kind, warmup_steps=4, keep=3, expand="kept", threshold="last", learning_rate=RATE,
        weight_decay=DECAY,
    )  # fmt: skip
    bench.run(3)
    omega_step(bench, CHOSEN)
    index_of = {unit.name: unit.index for unit in bench.units}
    learned = {name: Twin(bench, index_of[name]) for name in bench.adapters}
    moments = {(n, role): state_of(bench, n, role) for n in learned for role in "AB"}
    decision = bench.decide()
    assert len(decision.survivors) == 3
    omega = dict(zip(learned, omega_of(decision), strict=True))
    reference, twins = AdamW(RATE, weight_decay=DECAY), []
    added = 0 if kind == "weightlora" else RANK
    for name, adapter in bench.adapters.items():
        old, factor = learned[name], omega[name]
        assert abs(factor - 1) > 0.05 and old.B.any()
        twin = Twin(bench, index_of[name])
        assert twin.g.tolist() == [SCALE] * (RANK + added)  # ω no longer multiplies
        np.testing.assert_allclose(twin.delta(), factor * SCALE * old.B.T @ old.A, atol=1e-6)
        np.testing.assert_array_equal(twin.A[:RANK], old.A)
        m, v, t = moments[name, "B"]
        for role, state in (("A", moments[name, "A"]), ("B", (m / factor, v / factor**2, t))):
            reference.state[name, role] = with_new_rows(state, added)
            reference.start[name, role] = np.zeros_like(getattr(twin, role))
        assert adapter.mask.all()
        twins.append(twin)
    for _ in range(5):
        bench.backward()
        bench.update()
        for twin in twins:
            gradients = twin.gradients()
            for role in "AB":
                reference.update((twin.name, role), getattr(twin, role), gradients[role])
    for twin in twins:
        assert_near(bench.adapters[twin.name].A, twin.A, 2e-3)
        assert_near(bench.adapters[twin.name].B, twin.B, 2e-3)


def test_random_survivors_may_be_kept_too():
    """The control of learned survivors that are: the same moments and values go on."""
    bench = Bench("rlora", {"rank": RANK, "match": "runs/learned", "expand": "kept"}, steps=10)
    learned = names(bench, [0, 3])
    bench.method.match_selection(3, Decision(dict.fromkeys(learned, 2 * RANK), {}, learned))
    bench.run(3)
    values = {n: (array(a.A), array(a.B)) for n, a in bench.adapters.items()}
    moments = {(n, role): state_of(bench, n, role) for n in values for role in "AB"}
    survivors = bench.decide().survivors
    assert len(survivors) == 2 and len(bench.adapters) == 2
    for name in survivors:
        for role, before in zip("AB", values[name], strict=True):
            np.testing.assert_array_equal(array(getattr(bench.adapters[name], role))[:RANK], before)
            after = state_of(bench, name, role)
            for now, then in zip(after, with_new_rows(moments[name, role], RANK), strict=True):
                np.testing.assert_array_equal(now, then)


@pytest.mark.parametrize("expand", ["kept", "qr"])
def test_resume_after_survivors_were_kept(expand):
    def make(begin):
        return bench_of(
            "weightlora_plus", warmup_steps=2, keep=3, expand=expand, learning_rate=RATE,
            begin=begin,
        )  # fmt: skip

    check_resume(make, 4, 3)


# --- within: layer -------------------------------------------------------------------------------

PER_LAYER = 3


def layered(kind="weightlora", **options):
    given = {"rank": RANK, "keep_parameters": 0.5, "within": "layer", **options}
    if kind != "rlora":
        given = {"warmup_steps": 1, "threshold": "last", "omega_learning_rate": 0.25, **given}
    shapes = given.pop("shapes", [(4 * a, 4 * b) for a, b in UNEQUAL[:6]])
    settings = {name: given.pop(name) for name in ("per_layer", "seed") if name in given}
    return Bench(kind, given, shapes=shapes, **{"per_layer": PER_LAYER, **settings})


def by_layer(score, share):
    """`fitting` in every layer by itself."""
    found = []
    for first in range(0, 6, PER_LAYER):
        part = slice(first, first + PER_LAYER)
        found += [first + i for i in fitting(score[part], SIZES[part], share)]
    return found


@pytest.mark.parametrize("kind", ["weightlora", "weightlora_plus"])
def test_every_layer_keeps_the_best_of_its_own_units(kind):
    rng, whole = np.random.default_rng(5), 0
    for _ in range(12):
        gain = rng.random(6) * np.repeat([0.1, 1.0], PER_LAYER)  # all of the second layer is ahead
        bench = layered(kind)
        survivors = drive(bench, [-gain]).survivors
        assert survivors == names(bench, by_layer(gain, 0.5))
        whole += survivors != names(bench, fitting(gain, SIZES[:6], 0.5))
        held = sum(a.A.numel() + a.B.numel() for a in bench.adapters.values())
        assert held <= 4 * RANK * sum(SIZES[:6])
    assert whole > 0


def test_ties_are_those_at_a_layer_s_own_border():
    bench = layered(shapes=[(8, 8)] * 8, per_layer=4)
    decision = drive(bench, [-np.array([3.0, 2, 2, 1, 6, 5, 1, 1])])
    assert decision.survivors == names(bench, [0, 1, 4, 5])
    assert decision.extra["ties"] == names(bench, [1, 2])


def test_random_survivors_of_every_layer():
    drawn = set()
    for seed in range(8):
        bench = layered("rlora", seed=seed)
        survivors = bench.decide().survivors
        layers = [unit.layer for unit in bench.units if unit.name in survivors]
        assert set(layers) == {0, 1}
        drawn.add(tuple(survivors))
    assert len(drawn) > 1


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"method.within: layer given without method.keep_param"):
        bench_of(within="layer", keep=3)
    # A third of all units' parameters hold the smallest unit, of the first layer's they do not.
    bench_of(keep_parameters=0.3, shapes=[(12, 10)] * 2 + [(40, 40)] * 4)
    with pytest.raises(ValueError, match=r"keep_parameters: 0.3 given, .* at least 0.5"):
        bench_of(keep_parameters=0.3, shapes=[(12, 10)] * 2 + [(40, 40)] * 4, within="layer")
    with pytest.raises(ValueError, match=r"method.within: layer given together with method.match"):
        Bench("rlora", {"match": "runs/x", "keep_parameters": 0.5, "within": "layer"})


def test_a_layer_that_would_lose_all_its_units_is_refused():
    """Of the second one the largest unit alone is left, which is more than half of itself."""
    shapes = [(8, 8)] * 6 + [(24, 24), (32, 32)]
    bench = layered(shapes=shapes, per_layer=4, rounds=2)
    survivors = drive(bench, [-np.array([3.0, 2, 1, 1, 1, 1, 1, 5])]).survivors
    assert survivors == names(bench, [0, 1, 7])
    with pytest.raises(
        ValueError, match=r"none of the 1 survivors in layer 1 fits into this share"
    ):
        drive(bench, [-np.ones(len(bench.adapters))])
