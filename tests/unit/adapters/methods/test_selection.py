"""WeightLoRA's options beyond the paper: one threshold, scores and shares of parameters, rounds, the
authors' expansion; and RLoRA as the control of a learned selection. References are written out here."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from adapters.decision import Decision
from tests.conftest import SHARED
from tests.helpers import quick_config, save_random_model
from tests.unit.adapters.methods.harness import Bench, Twin, array, check_resume, twins
from tests.unit.adapters.methods.test_weightlora import (
    RANK,
    SCALE,
    bench_of,
    omega_of,
    omega_step,
)
from tests.world.worker import train_only
from trainer.decisions.selection import read_selection
from trainer.distributed.world import World
from trainer.errors import UserError

UNEQUAL = [(12, 10), (30, 10), (8, 14), (40, 12), (6, 6), (20, 20), (9, 31)]
SIZES = [out + inp for out, inp in UNEQUAL]


def names(bench, indices):
    return [bench.units[index].name for index in indices]


def drive(bench, gradients):
    """One step for each ∂L/∂ω of the units that are left; the decision after the last."""
    for gradient in gradients:
        omega_step(bench, gradient)
    return bench.decide()


# --- threshold: last -----------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["magnitude", "signed", "per_parameter"])
def test_steps_of_omega_add_up_before_one_threshold(score):
    rng = np.random.default_rng(3)
    gradients = rng.normal(size=(8, 7))
    bench = bench_of(shapes=UNEQUAL, threshold="last", warmup_steps=8, keep=3, score=score)
    for step, gradient in enumerate(gradients):
        decision = omega_step(bench, gradient)
        expected = 1 - 0.25 * gradients[:step].sum(0)
        np.testing.assert_allclose(omega_of(decision), expected, atol=1e-5)
        assert decision.survivors is None and not decision.extra
        for adapter, value in zip(bench.adapters.values(), expected, strict=True):
            np.testing.assert_allclose(array(adapter.g), SCALE * value, rtol=1e-4, atol=1e-5)
            assert adapter.mask.all()
    omega = 1 - 0.25 * gradients.sum(0)
    by = {
        "magnitude": np.abs(omega), "signed": omega, "per_parameter": (omega - 1) / np.sqrt(SIZES),
    }[score]  # fmt: skip
    best = set(np.argsort(by)[-3:])
    decision = bench.decide()
    expected = [omega[index] if index in best else 0 for index in range(7)]
    np.testing.assert_allclose(omega_of(decision), expected, atol=1e-5)
    survivors = names(bench, [i for i in sorted(best) if omega[i] > 0])
    assert decision.survivors == survivors == list(bench.adapters)


def test_per_parameter_counts_in_every_threshold_too():
    """Gains 4 : 3 at sizes 50 : 12 and 22: the wide unit loses only by its size."""
    gradient = -np.array([0, 0, 0, 4.0, 3.0, 0, 0])
    for score, expected in (("signed", 3), ("per_parameter", 4)):
        bench = bench_of(shapes=UNEQUAL, keep=1, score=score)
        omega_step(bench, gradient)
        assert np.flatnonzero(omega_of(bench.decide())).tolist() == [expected]


def test_only_steps_with_a_gradient_begin_phase_2():
    bench = bench_of(threshold="last", warmup_steps=2, keep=3)
    zero = np.zeros(6)
    assert drive(bench, [zero, zero, zero]).survivors is None
    omega_step(bench, -np.arange(6.0))
    assert bench.decide().survivors == names(bench, [3, 4, 5])


def test_ties_at_one_threshold():
    bench = bench_of(threshold="last", warmup_steps=2, keep=3)
    decision = drive(bench, np.array([[1.0, -1, 1, 0, -1, 1], [0, 0, 0, 1, 0, 0]]))
    assert decision.survivors == names(bench, [0, 1, 4])
    assert decision.extra["ties"] == names(bench, [0, 2, 3, 5])


# --- a share of the parameters -------------------------------------------------------------------


def fitting(score, sizes, share):
    """In the order of the scores, whatever still fits."""
    room, chosen = share * sum(sizes), []
    for index in sorted(range(len(sizes)), key=lambda i: (-score[i], i)):
        if sum(sizes[i] for i in chosen) + sizes[index] <= room + 1e-6:
            chosen.append(index)
    return sorted(chosen)


@pytest.mark.parametrize("share", [0.25, 0.4, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["weightlora", "weightlora_plus"])
def test_survivors_of_a_share_never_exceed_it(kind, share):
    rng = np.random.default_rng(round(100 * share))
    full = RANK * sum(SIZES)
    for _ in range(6):
        gain = rng.random(7)
        bench = bench_of(
            kind, shapes=[(4 * a, 4 * b) for a, b in UNEQUAL], keep_parameters=share,
            threshold="last", warmup_steps=1,
        )  # fmt: skip
        decision = drive(bench, [-gain])
        assert decision.survivors == names(bench, fitting(gain, SIZES, share))
        rank = RANK * (math.floor(1 / share) if kind == "weightlora_plus" else 1)
        assert set(decision.ranks.values()) == {rank}
        held = sum(a.A.numel() + a.B.numel() for a in bench.adapters.values())
        assert held <= 4 * full and bench.method.scalars()["parameters_left_over"] == (
            4 * full - held
        )


def test_a_count_of_wide_units_exceeds_lora_and_says_so():
    bench = bench_of("weightlora_plus", shapes=[(40, 40), (10, 10)] * 2, warmup_steps=1)
    drive(bench, [-np.array([2.0, 1, 2, 1])])
    assert bench.method.scalars() == {
        "survivors": 2, "rank_left_over": 0, "parameters_left_over": -2 * RANK * (80 - 20),
    }  # fmt: skip


def test_refusals():
    for options, message in (
        ({"keep_parameters": 0.5, "keep": 2}, r"method.keep_parameters: 0.5 given together with"),
        ({"rounds": 2, "keep": 2}, r"method.rounds: 2 given with method.keep; accepted: 1"),
        ({"keep_parameters": 0.01}, r"method.keep_parameters: 0.01 given, .* at least 0.167"),
    ):
        with pytest.raises(ValueError, match=message):
            bench_of(**options)
    with pytest.raises(ValueError, match=r"method.keep_parameters=0.1 would give each .* rank 20"):
        bench_of("weightlora_plus", keep_parameters=0.1, shapes=[(12, 10)] * 10)
    with pytest.raises(ValueError, match=r"warmup_steps: 5 given with method.rounds=2; accepted"):
        bench_of(warmup_steps=5, rounds=2).options.check_steps(10)


# --- the authors' expansion ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["weightlora", "weightlora_plus"])
def test_the_authors_expansion(kind):
    bench = bench_of(kind, warmup_steps=1, keep=2, expand="authors", learning_rate=5e-2)
    bench.run(1)
    omega_step(bench, np.array([0.3, 4.0, 4.0, 4.0, -0.9, 4.0]))
    learned = twins(bench)
    decision = bench.decide()
    grown = 3 * RANK if kind == "weightlora_plus" else RANK
    for index in (0, 4):
        unit, adapter, before = bench.units[index], bench.adapter(index), learned[index]
        omega = decision.scores["omega"][unit.name]
        A, B = array(adapter.A), array(adapter.B)
        assert A.shape == (grown, unit.in_features) and not B[RANK:].any()
        Q = A[:RANK]  # an orthonormal basis of what the learned rows span
        np.testing.assert_allclose(Q @ Q.T, np.eye(RANK), atol=1e-6)
        np.testing.assert_allclose(before.A @ Q.T @ Q, before.A, atol=1e-6)
        np.testing.assert_allclose(B[:RANK], omega * Q @ before.A.T @ before.B, atol=1e-6)
        expected = omega * SCALE * before.B.T @ before.A
        delta = B.T @ np.diag(array(adapter.g)) @ A
        np.testing.assert_allclose(delta, expected, rtol=1e-5, atol=1e-7)
        rest = np.eye(unit.in_features) - Q.T @ Q
        np.testing.assert_allclose(A[RANK:] @ rest, A[RANK:], atol=1e-6)  # (I − Q Qᵀ) N
        mean = A[RANK:] @ rest.sum(1) / rest.sum()  # of N, uniform on [0, 1)
        assert (np.abs(mean - 0.5) < 0.45).all()


def test_survivors_of_equal_rank_may_keep_what_they_learned():
    bench = bench_of(warmup_steps=1, keep=2, expand="qr", learning_rate=5e-2)
    bench.run(1)
    omega_step(bench, np.array([0.3, 4.0, 4.0, 4.0, -0.9, 4.0]))
    learned = twins(bench)
    decision = bench.decide()
    for index in (0, 4):
        omega, adapter = omega_of(decision)[index], bench.adapter(index)
        np.testing.assert_array_equal(array(adapter.A), learned[index].A)
        np.testing.assert_allclose(array(adapter.B), omega * learned[index].B, rtol=1e-6)
        assert adapter.g.tolist() == [SCALE] * RANK and not adapter.g.requires_grad


# --- rounds --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("expand", ["reinit", "qr", "authors"])
def test_two_rounds_halve_the_units_twice(expand, rescale):
    """8 → 4 → 2 units of rank 2 → 4 → 8, each round with ω from 1, as `FatAdamW`'s n → n/2 → n/4."""
    bench = bench_of(
        "weightlora_plus", shapes=[(12, 10)] * 8, rounds=2, warmup_steps=3, threshold="last",
        expand=expand, rescale_alpha=rescale, learning_rate=2e-2,
    )  # fmt: skip
    bench.run(1)
    first = drive(bench, [-np.array([0, 1, 2, 3, 1, 0, 3, 2.0])] * 2)
    assert first.survivors == names(bench, [2, 3, 6, 7])
    assert set(first.ranks.values()) == {2 * RANK}
    assert bench.method.due(bench.at) and bench.method.micro_batch_size is None
    bench.backward()
    bench.update()
    for adapter in bench.adapters.values():
        assert adapter.g.requires_grad and adapter.rank == 2 * RANK and adapter.mask.all()
    before = twins_of(bench)
    second = bench.decide()
    omega = omega_of(second)
    assert (omega[[0, 1, 4, 5]] == 0).all() and (omega[[2, 3, 6, 7]] != 0).all()
    gate = SCALE / 2 if rescale else SCALE
    for index, adapter in zip((2, 3, 6, 7), bench.adapters.values(), strict=True):
        np.testing.assert_allclose(array(adapter.g), gate * omega[index], rtol=1e-6)
    while bench.decisions[-1].survivors is None:
        bench.backward()
        bench.update()
        before = twins_of(bench)
        bench.decide()
    last = bench.decisions[-1]
    assert bench.method.selected and not bench.method.due(bench.at)
    assert len(last.survivors) == 2 and set(last.survivors) <= set(first.survivors)
    assert set(last.ranks.values()) == {4 * RANK}
    assert bench.method.scalars()["parameters_left_over"] == 0
    omega = dict(zip([u.name for u in bench.units], omega_of(last), strict=True))
    assert sum(value != 0 for value in omega.values()) == 2
    for name, adapter in bench.adapters.items():
        assert not adapter.g.requires_grad and adapter.rank == 4 * RANK
        delta = array(adapter.B).T @ np.diag(array(adapter.g)) @ array(adapter.A)
        old = before[name]
        expected = omega[name] * gate * old.B.T @ old.A if expand != "reinit" else 0 * delta
        np.testing.assert_allclose(delta, expected, rtol=1e-4, atol=1e-6)


def twins_of(bench):
    """Of the adapters that are left, by name."""
    return {u.name: Twin(bench, u.index) for u in bench.units if u.name in bench.adapters}


@pytest.mark.parametrize("before", [1, 4, 7])
def test_resume_in_every_round(before):
    def make(begin):
        return bench_of(
            "weightlora_plus", shapes=[(12, 10)] * 8, rounds=2, warmup_steps=2, threshold="last",
            expand="authors", keep_parameters=0.5, score="per_parameter", begin=begin,
            learning_rate=2e-2,
        )  # fmt: skip

    check_resume(make, before, 5)


def test_ranks_of_fewer_survivors_stay_within_what_was_checked():
    """12 → 6, of which 3 have ω > 0, → 1: not rank 2 · 3 but 2 · 2."""
    bench = bench_of(
        "weightlora_plus", shapes=[(12, 10)] * 12, rounds=2, warmup_steps=1, score="signed"
    )
    gradients = [[0.0] * 12, [-1.0, -2.0, -3.0] + [8.0] * 9]
    assert drive(bench, gradients).survivors == names(bench, [0, 1, 2])
    bench.method._gradient = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
    last = bench.method.decide(bench.at)
    assert last.ranks == {bench.units[2].name: 4 * RANK}
    bench.method.check_decision(last)


def test_a_share_of_which_rounds_leave_nothing_is_refused():
    with pytest.raises(ValueError, match="rounds: 2 given with"):
        bench_of(shapes=[(8, 8)] * 12, rounds=2, keep_parameters=0.25)
    # Enough for 3 of 9 and 1 of 3, but here only 2 have ω > 0.
    bench = bench_of(
        shapes=[(8, 8)] * 9, rounds=2, warmup_steps=1, keep_parameters=0.34, score="signed"
    )
    assert drive(bench, [[0.0] * 9, [0.0, -1.0] + [8.0] * 7]).survivors == names(bench, [0, 1])
    with pytest.raises(ValueError, match="none of the 2 survivors fits"):
        drive(bench, [[1.0, 2.0]])


def test_ranks_that_differ_are_refused_before_another_round():
    bench = bench_of("weightlora_plus", rounds=2, rank=1, keep_parameters=0.5)
    omega = {unit.name: 1.0 for unit in bench.units}
    ranks = dict(zip(names(bench, [0, 1]), (2, 1), strict=True))
    with pytest.raises(ValueError, match="survivors of different ranks"):
        bench.method.check_decision(Decision(ranks, {}, list(ranks), {"omega": omega}))


# --- RLoRA ---------------------------------------------------------------------------------------


def learned_selection(bench, indices, rank):
    chosen = names(bench, indices)
    omega = {unit.name: float(unit.name in chosen) for unit in bench.units}
    return Decision(dict.fromkeys(chosen, rank), {}, chosen, {"omega": omega})


def matched(seed, indices=(0, 2, 5, 6), rank=2 * RANK, when=3):
    bench = Bench(
        "rlora", {"rank": RANK, "alpha": 6.0, "match": "runs/learned"}, seed=seed, steps=10,
        shapes=[(12, 10), (8, 14)] * 6,
    )  # fmt: skip
    bench.method.match_selection(when, learned_selection(bench, indices, rank))
    return bench


def test_a_matched_control_has_the_types_ranks_and_parameters_of_what_it_matches():
    counts = np.zeros(12)
    for seed in range(60):
        bench = matched(seed)
        bench.run(3)
        assert not any(d is not None for d in bench.decisions) and len(bench.adapters) == 12
        decision = bench.step()
        chosen = [u.index for u in bench.units if u.name in decision.survivors]
        assert sum(index % 2 == 0 for index in chosen) == 3 and len(chosen) == 4
        assert decision.ranks == dict.fromkeys(names(bench, chosen), 2 * RANK)
        assert bench.optimizer.numel == 2 * RANK * 4 * 22
        assert not bench.method.due(4)
        bench.method.check_decision(decision)
        counts[chosen] += 1
        if seed == 0:
            assert matched(0).method.decide(3) == decision
    expected = np.array([30.0, 10.0] * 6)  # of 60: 3 of 6 of one type, 1 of 6 of the other
    assert (np.abs(counts - expected) < 4 * np.sqrt(expected)).all()


def test_a_selection_that_does_not_fit_is_refused():
    bench = matched(0)
    other = Bench("rlora", {"rank": RANK}, shapes=[(12, 10)] * 20)
    with pytest.raises(ValueError, match=r"names layers.9.k1, which is no unit of this run"):
        bench.method.match_selection(1, learned_selection(other, [19], RANK))
    with pytest.raises(ValueError, match=r"was made before step 10; accepted: in a run of more"):
        matched(0, when=10)


def test_a_random_share_of_the_parameters():
    bench = bench_of("rlora", shapes=UNEQUAL, keep_parameters=0.5)
    decision = bench.step()
    held = sum(u.size for u in bench.units if u.name in decision.survivors)
    assert 0.3 * sum(SIZES) < held <= 0.5 * sum(SIZES)


# --- whole runs on a small model -----------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A trained model of 260,000 parameters where it is there, else a random one."""
    trained = SHARED / "models/stories260K"
    if trained.is_dir():
        return trained
    return save_random_model(tmp_path_factory.mktemp("model") / "m", "llama", AutoModelForCausalLM)


def selected(tmp, model, name, *overrides):
    config = quick_config(
        tmp, f"model.id={model}", f"run.name={name}", "data.eval=null", "data.max_length=128",
        "data.train_records=null", "data.on_bad_record=skip", "run.steps=53",
        "optim.warmup_ratio=0", *overrides,
    )  # fmt: skip
    train_only(World(), config.model_dump())
    return config.run_folder


def test_the_length_of_the_warm_up_matters_and_a_run_can_be_matched(tmp_path, model):
    learned = ["method.kind=weightlora", "method.threshold=last", "method.score=per_parameter"]
    found = {}
    for steps in (10, 50):
        folder = selected(tmp_path, model, f"t-{steps}-0", *learned, f"method.warmup_steps={steps}")
        when, decision = read_selection(folder)
        assert when >= steps
        found[steps] = set(decision.survivors)
    assert found[10] != found[50]
    match = f"method.match={tmp_path}/runs/t-10-{{seed}}"
    folder = selected(tmp_path, model, "control", "method.kind=rlora", match, "run.steps=14")
    _, control = read_selection(folder)
    assert set(control.survivors) != found[10]
    types = [sorted(n.split(".", 3)[3] for n in s) for s in (control.survivors, found[10])]
    assert types[0] == types[1]
    beat = json.loads((tmp_path / "runs/t-10-0/heartbeat.json").read_text())
    (tmp_path / "runs/t-10-0/heartbeat.json").write_text(
        json.dumps(beat | {"state": "interrupted"})
    )
    with pytest.raises(UserError, match=r"t-10-0: its state is interrupted; accepted: a finished"):
        selected(tmp_path, model, "c1", "method.kind=rlora", match)
    with pytest.raises(UserError, match=r"method.match: .*/t-10-7: no such folder; accepted"):
        selected(tmp_path, model, "c2", "method.kind=rlora", match, "run.seed=7")
    with pytest.raises(UserError, match=r"method.match: .*: 2 folders fit; accepted: one run"):
        selected(tmp_path, model, "c3", "method.kind=rlora", f"method.match={tmp_path}/runs/t-*")
