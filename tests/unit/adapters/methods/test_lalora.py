"""La-LoRA: equations 5 to 10 in NumPy for every option, and the allocation of whole ranks."""

import itertools

import numpy as np
import pytest
import torch

from adapters.methods.lalora import allocate
from tests.unit.adapters.methods.harness import (
    AdamW,
    Bench,
    array,
    assert_near,
    bits,
    check_resume,
    twins,
)

RANK, ALPHA = 5, 10.0
SIX = [(12, 10), (8, 14)] * 3
PRINTED = {"every": 1, "fidelity": "truncated_over_full", "contribution_scale": "sum"}


def bench_of(begin=True, rank=RANK, learning_rate=3e-2, weight_decay=0.0, steps=100, **options):
    return Bench(
        "lalora", {**PRINTED, "rank": rank, "alpha": ALPHA, "gamma": 2.0, **options}, shapes=SIX,
        begin=begin, learning_rate=learning_rate, weight_decay=weight_decay, steps=steps,
    )  # fmt: skip


def whole_ranks(c, total, largest):
    """Eq. 8 in whole numbers. Of all ways to hold the u largest at `largest` and the l smallest at
    1, the one that is consistent; the layers between share in proportion to e^c."""
    c = np.asarray(c, dtype=np.longdouble)
    L = len(c)
    order = np.argsort(-c, kind="stable")
    slack = 1e-9
    for u, low in itertools.product(range(L + 1), range(L + 1)):
        if u + low > L:
            continue
        free = order[u : L - low]
        rest = total - largest * u - low
        real = np.ones(L, dtype=np.longdouble)
        real[order[:u]] = largest
        if len(free):
            weights = np.exp(c[free] - c[free].max())
            factor = rest / weights.sum()
            real[free] = weights * factor
            reference = c[free].max()
            if real[free].min() < 1 - slack or real[free].max() > largest + slack or rest <= 0:
                continue
            # what the bounds hold back must want to go beyond them
            if u and np.log(factor) + c[order[u - 1]] - reference < np.log(largest) - slack:
                continue
            if low and np.log(factor) + c[order[L - low]] - reference > slack:
                continue
        elif abs(rest) > slack:
            continue
        break
    else:
        raise AssertionError("no consistent shares")
    real = np.round(real.astype(float), 6)
    ranks = np.floor(real).astype(int)
    rest = round(total) - ranks.sum()
    for layer in sorted(range(L), key=lambda i: (-(real[i] - ranks[i]), i))[:rest]:
        ranks[layer] += 1
    return ranks


class Reference:
    """What rank 0 decides, from the full A and B of every unit."""

    def __init__(
        self,
        rank=RANK,
        gamma=2.0,
        fidelity="truncated_over_full",
        growth="same_rank",
        budget="gradual",
        contribution="norm",
        contribution_scale="sum",
        every=1,
    ):
        self.r, self.gamma, self.fidelity, self.growth = rank, gamma, fidelity, growth
        self.gradual, self.contribution = budget == "gradual", contribution
        self.mean = contribution_scale == "mean"
        self.ranks = None
        self.fisher = None

    @staticmethod
    def norm(matrix, rank):
        return np.sqrt((matrix[:rank] ** 2).sum())

    def s(self, layers, ranks):
        """Eq. 7; layers: per layer a list of (A, B)."""
        return np.array(
            [
                sum(self.norm(B, rank) + self.norm(A, rank) for A, B in units) / rank
                for units, rank in zip(layers, ranks, strict=True)
            ]
        )

    def observe(self, gradients):
        """Averaged squared gradients, by layer and unit, of A and B by component."""
        squares = [[((dA**2).sum(1), (dB**2).sum(1)) for dA, dB in units] for units in gradients]
        if self.fisher is None:
            self.fisher = [[(0 * a, 0 * b) for a, b in units] for units in squares]
        self.fisher = [
            [
                (0.9 * fa + 0.1 * a, 0.9 * fb + 0.1 * b)
                for (fa, fb), (a, b) in zip(f, s, strict=True)
            ]
            for f, s in zip(self.fisher, squares, strict=True)
        ]

    def ratio(self, above, below):
        return 1.0 if below == 0 else above / below

    def c(self, layers):
        """Eq. 9 with eq. 10, crossed as printed."""
        found = []
        for i, units in enumerate(layers):
            rank, total = self.ranks[i], 0.0
            for j, (A, B) in enumerate(units):
                if self.contribution == "fisher":
                    fa, fb = self.fisher[i][j]
                    total += fa[:rank].sum() + fb[:rank].sum()
                    continue
                a, b = self.norm(A, rank), self.norm(B, rank)
                A0, _ = self.initial[i][j]
                A1, B1 = self.previous[i][j]
                f_A, f_B = {
                    "truncated_over_full": lambda: (
                        self.ratio(a, self.norm(A, None)), self.ratio(b, self.norm(B, None))
                    ),
                    "previous_over_current": lambda: (
                        self.ratio(self.norm(A1, rank), a), self.ratio(self.norm(B1, rank), b)
                    ),
                    "truncated_over_initial": lambda: (self.ratio(a, self.norm(A0, None)), 1.0),
                    "none": lambda: (1.0, 1.0),
                }[self.fidelity]()  # fmt: skip
                total += f_A * b + f_B * a
            found.append(total / (len(units) if self.mean else 1))
        found = np.array(found)
        if self.contribution == "fisher" and found.mean() > 0:
            found = found / found.mean()
        return found

    def decide(self, layers):
        L = len(layers)
        if self.ranks is None:
            self.budget = float(L if self.gradual else self.r * L)
            self.ranks = np.full(L, 1 if self.gradual else self.r)
            self.initial = layers
            self.s_previous = self.s(layers, self.ranks)
        else:
            s = self.s(layers, self.ranks)
            if self.gradual:
                growth = np.mean((s - self.s_previous) / self.s_previous)
                self.budget = np.clip(self.budget * (1 + self.gamma * growth), L, self.r * L)
            old = self.ranks
            self.ranks = whole_ranks(self.c(layers), self.budget, self.r)
            self.s_previous = self.s(layers, self.ranks if self.growth == "same_rank" else old)
        self.previous = layers
        return self.ranks, self.budget


def matrices(bench, role_of=lambda adapter: (adapter.A, adapter.B)):
    """(A, B) by layer and unit."""
    pairs = [tuple(array(m) for m in role_of(adapter)) for adapter in bench.adapters.values()]
    return [pairs[0:2], pairs[2:4], pairs[4:6]]


def compare(steps=14, **options):
    """Runs a bench beside its reference; the ranks and budgets of every decision."""
    bench, reference = bench_of(**options), Reference(**options)
    every = options.get("every", 1)
    history = []

    def observe():
        reference.observe(matrices(bench, lambda a: (a.A.grad, a.B.grad)))

    for step in range(steps):
        now = matrices(bench)
        decision = bench.decide()
        assert (decision is not None) == (step % every == 0)
        if decision is not None:
            ranks, budget = reference.decide(now)
            assert list(decision.ranks.items()) == [(str(i), r) for i, r in enumerate(ranks)]
            assert decision.scores["budget"] == pytest.approx(budget, rel=1e-4)
            assert sum(ranks) == round(budget)
            reference.budget = decision.scores["budget"]  # else rounding errors would grow with γ
            history.append((ranks.tolist(), budget))
        bench.backward()
        bench.update(between=observe)
    return history


FIDELITIES = [
    "truncated_over_full", "previous_over_current", "truncated_over_initial", "none",
]  # fmt: skip


@pytest.mark.parametrize("fidelity", FIDELITIES)
@pytest.mark.parametrize("scale", ["sum", "mean"])
@pytest.mark.parametrize("growth", ["same_rank", "printed"])
def test_equations_5_to_10(fidelity, growth, scale):
    history = compare(fidelity=fidelity, growth=growth, contribution_scale=scale)
    assert history[0] == ([1, 1, 1], 3.0)
    assert len({tuple(ranks) for ranks, _ in history}) >= 4  # something happened


@pytest.mark.parametrize("contribution", ["norm", "fisher"])
@pytest.mark.parametrize("budget", ["gradual", "full"])
@pytest.mark.parametrize("scale", ["sum", "mean"])
def test_contribution_and_budget(contribution, budget, scale):
    history = compare(contribution=contribution, budget=budget, contribution_scale=scale)
    if budget == "full":
        assert all(total == 15.0 and ranks == [5, 5, 5] for ranks, total in history)
    else:
        assert len({tuple(ranks) for ranks, _ in history}) >= 4


@pytest.mark.parametrize("gamma", [0.0, 1.0, 3.0])
def test_gamma(gamma):
    history = compare(gamma=gamma, steps=20)
    budgets = [budget for _, budget in history]
    assert gamma > 0 or budgets == [3.0] * 20
    assert gamma == 0 or budgets[-1] > 3.0


@pytest.mark.parametrize("every", [2, 3])
@pytest.mark.parametrize("contribution", ["norm", "fisher"])
def test_decisions_every_few_steps(every, contribution):
    history = compare(every=every, contribution=contribution, steps=18)
    assert len(history) == 18 // every


def test_uniform_growth_spends_the_same_budget_on_equal_ranks():
    """The budget is still eq. 5 of this run's norms; ranks are D / L, one more in lower layers."""
    bench, reference = bench_of(allocation="uniform"), Reference()
    seen = set()
    for _ in range(14):
        now = matrices(bench)
        decision = bench.decide()
        if reference.ranks is None:
            reference.decide(now)
        else:
            s = reference.s(now, reference.ranks)
            growth = np.mean((s - reference.s_previous) / reference.s_previous)
            reference.budget = np.clip(reference.budget * (1 + 2.0 * growth), 3, 3 * RANK)
            each, rest = divmod(round(reference.budget), 3)
            reference.ranks = np.array([each + (layer < rest) for layer in range(3)])
            reference.s_previous = reference.s(now, reference.ranks)
        assert list(decision.ranks.values()) == reference.ranks.tolist()
        assert decision.scores["budget"] == pytest.approx(reference.budget, rel=1e-4)
        reference.budget = decision.scores["budget"]
        seen.add(tuple(reference.ranks))
        bench.backward()
        bench.update()
    assert len(seen) >= 4


# --- gates, masks, training --------------------------------------------------------------------


def test_gates_and_masks_follow_the_ranks():
    bench = bench_of(weight_decay=0.2)
    before_first = bench.decide()
    assert before_first.ranks == {"0": 1, "1": 1, "2": 1} and before_first.scores["budget"] == 3.0
    moments = lambda name, role: bench.optimizer.state_dict()[f"{name}.{role}"]  # noqa: E731
    for step in range(10):
        if step:
            bench.decide()
        ranks = bench.decisions[-1].ranks
        before = {}
        for unit in bench.units:
            adapter, rank = bench.adapters[unit.name], ranks[str(unit.layer)]
            assert adapter.g.tolist() == [ALPHA / RANK] * rank + [0.0] * (RANK - rank)
            assert adapter.mask.tolist() == [True] * rank + [False] * (RANK - rank)
            assert not adapter.g.requires_grad
            A, B = array(adapter.A)[:rank], array(adapter.B)[:rank]
            W = bench.W[unit.name] + ALPHA / RANK * B.T @ A
            np.testing.assert_allclose(
                array(bench.output(unit.name)), bench.x[unit.name] @ W.T, rtol=1e-4, atol=1e-4
            )
            for role in "AB":
                tensors = [getattr(adapter, role), *moments(unit.name, role).values()]
                before[unit.name, role] = rank, [bits(tensor[rank:]) for tensor in tensors]
        bench.backward()
        bench.update()
        for (name, role), (rank, old) in before.items():
            new = [getattr(bench.adapters[name], role), *moments(name, role).values()]
            assert all(torch.equal(a, bits(b[rank:])) for a, b in zip(old, new, strict=True))
    assert max(ranks.values()) > 1


def test_training_is_numpy_s():
    bench = bench_of(weight_decay=0.1)
    references, optimizer = twins(bench), AdamW(3e-2, weight_decay=0.1)
    for _ in range(10):
        ranks = bench.step().ranks
        for unit, twin in zip(bench.units, references, strict=True):
            active = np.arange(RANK) < ranks[str(unit.layer)]
            twin.g = np.where(active, ALPHA / RANK, 0.0)
            gradients = twin.gradients()
            for role in "AB":
                optimizer.update((twin.name, role), getattr(twin, role), gradients[role], active)
    for index, twin in enumerate(references):
        assert_near(bench.adapter(index).A, twin.A, 5e-3)
        assert_near(bench.adapter(index).B, twin.B, 5e-3)


# --- the budget --------------------------------------------------------------------------------


def grow(bench, factors):
    """Instead of training: multiply every layer's A and B."""
    decision = bench.decide()
    for unit in bench.units:
        adapter = bench.adapters[unit.name]
        adapter.A.data.mul_(factors[unit.layer])
        adapter.B.data.mul_(factors[unit.layer])
    bench.update(step=False)
    return decision


def budgets(gamma, factors, steps=8, **options):
    bench = bench_of(gamma=gamma, **options)
    for adapter in bench.adapters.values():
        adapter.B.data.copy_(torch.ones_like(adapter.B) * 0.1)
    bench.method.on_train_begin(bench.optimizer, bench.validate)
    return [grow(bench, factors).scores["budget"] for _ in range(steps)]


def test_budget_by_hand():
    """Norms that grow by 10 %, 20 % and 0 % a step: by 10 % · γ, until all of it."""
    found = budgets(2.0, (1.1, 1.2, 1.0), 12, growth="same_rank")
    expected = [min(3 * 1.2**k, 15) for k in range(12)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    shrinking = budgets(2.0, (0.9, 0.9, 0.9), 4)
    np.testing.assert_allclose(shrinking, [3.0] * 4)  # never below one a layer


def test_budget_is_monotone_in_gamma():
    rows = [budgets(gamma, (1.05, 1.1, 1.02)) for gamma in (0, 0.5, 1, 2, 5, 20)]
    for smaller, larger in itertools.pairwise(rows):
        assert all(a <= b for a, b in zip(smaller, larger, strict=True)) and smaller != larger
    assert rows[0] == [3.0] * 8 and rows[-1][-1] == 15.0
    for row in rows:
        assert row == sorted(row)


def test_a_change_of_rank_alone_is_no_growth():
    """One step of growth raises the ranks; without any more, the budget stays where it is."""

    def run(growth):
        bench = bench_of(gamma=10.0, growth=growth)
        for adapter in bench.adapters.values():
            adapter.B.data.copy_(torch.ones_like(adapter.B) * 0.1)
        bench.method.on_train_begin(bench.optimizer, bench.validate)
        grow(bench, (1.1, 1.1, 1.1))
        return [grow(bench, (1.0, 1.0, 1.0)).scores["budget"] for _ in range(5)]

    found = run("same_rank")
    np.testing.assert_allclose(found, [6.0] * 5, rtol=1e-6)
    printed = run("printed")
    assert printed[0] == pytest.approx(6.0) and printed[1] < 5  # 1/r_i makes a larger rank a loss


def test_a_skipped_step_is_no_growth():
    for contribution in ("norm", "fisher"):
        bench = bench_of(contribution=contribution)
        bench.run(5)
        bench.decide()
        bench.backward()
        bench.update(skip=True)
        held = bench.decisions[-1]
        decision = bench.decide()
        assert decision.scores["budget"] == pytest.approx(held.scores["budget"], rel=1e-6)
        assert sum(decision.ranks.values()) == round(decision.scores["budget"])


def test_an_overflow_leaves_the_fisher_information_alone():
    """Infinite gradients of a skipped step are no information; later decisions need finite ones."""
    bench, never = bench_of(contribution="fisher"), bench_of(contribution="fisher")
    bench.run(6)
    never.run(6)
    bench.backward()
    bench.update(skip=True)
    bench.at -= 1
    bench.run(4)
    never.run(4)
    assert bench.decisions[-3:] == never.decisions[-3:]


# --- whole ranks -------------------------------------------------------------------------------


def test_allocation_by_hand():
    log = np.log
    # shares 6.4, 1.6 → 6, 2 by the larger remainder
    assert allocate(log([4.0, 1.0]), 8, 8).tolist() == [6, 2]
    # 1/2, 1/4, 1/4 of 20: 10 is cut to 8, the other two share the excess
    assert allocate(log([2.0, 1.0, 1.0]), 20, 8).tolist() == [8, 6, 6]
    # of 17 in proportion 8 : 6 : 3; 8 stays 8
    assert allocate(log([8.0, 6.0, 3.0]), 17, 8).tolist() == [8, 6, 3]
    # excess goes in proportion, not evenly: 12 + 6 : 2 → 8 + 9 : 3 is cut again
    assert allocate(log([12.0, 6.0, 2.0]), 20, 8).tolist() == [8, 8, 4]
    assert allocate(log([100.0, 6.0, 2.0]), 16, 8).tolist() == [8, 6, 2]
    # ties: the lower layer
    assert allocate(np.zeros(4), 6, 8).tolist() == [2, 2, 1, 1]
    assert allocate(np.full(3, 7.0), 10, 8).tolist() == [4, 3, 3]
    # nobody below 1, nobody above r
    assert allocate(np.array([1e4, 0.0, -1e4]), 9, 8).tolist() == [7, 1, 1]
    assert allocate(np.array([0.0, 1e4, -1e4]), 14, 8).tolist() == [5, 8, 1]
    assert allocate(np.array([0.0, 1e4]), 9, 8).tolist() == [1, 8]


@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0, 30.0, 1e4])
def test_allocation_of_random_contributions(spread):
    rng = np.random.default_rng(int(spread * 10))
    for trial in range(60):
        L, r = int(rng.integers(1, 13)), int(rng.integers(1, 33))
        c = rng.normal(size=L) * spread
        if trial % 3 == 0:
            c = np.round(c)  # ties
        budget = rng.uniform(L, r * L)
        ranks = allocate(c, budget, r)
        assert ranks.sum() == round(budget)
        assert ranks.min() >= 1 and ranks.max() <= r
        np.testing.assert_array_equal(ranks, whole_ranks(c, budget, r))
        order = np.argsort(-c, kind="stable")  # more contribution, not less rank; ties: lower
        assert (np.diff(ranks[order]) <= 0).all()


def test_allocation_reaches_both_ends():
    rng = np.random.default_rng(0)
    for spread in (0.0, 1.0, 1e4):
        c = rng.normal(size=7) * spread
        assert allocate(c, 7, 6).tolist() == [1] * 7
        assert allocate(c, 42, 6).tolist() == [6] * 7
        assert allocate(c, 7.0, 1).tolist() == [1] * 7


def test_last_bits_do_not_move_a_rank():
    rng = np.random.default_rng(1)
    for _ in range(50):
        c = rng.normal(size=8)
        noisy = c + 1e-12 * rng.normal(size=8)
        assert allocate(c, 30.2, 8).tolist() == allocate(noisy, 30.2, 8).tolist()
    tied = np.ones(8)
    assert allocate(tied + 1e-9 * rng.normal(size=8), 20, 8).tolist() == [3] * 4 + [2] * 4


# --- the rest ----------------------------------------------------------------------------------


def test_units_outside_the_blocks_are_refused():
    bench = bench_of()
    units = [*bench.units[:2], type(bench.units[0])(6, "lm_head", None, "lm_head", 12, 10)]
    with pytest.raises(ValueError, match=r"method.targets: lm_head lies outside"):
        bench.options.check_units(units)


@pytest.mark.parametrize("contribution", ["norm", "fisher"])
@pytest.mark.parametrize("growth", ["same_rank", "printed"])
def test_resume(contribution, growth):
    def make(begin):
        return bench_of(
            begin=begin, contribution=contribution, growth=growth, every=2,
            fidelity="previous_over_current",
        )  # fmt: skip

    for before in (1, 4, 7):
        check_resume(make, before, 6)
