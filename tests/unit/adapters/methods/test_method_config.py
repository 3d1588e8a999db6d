"""Options of the methods: what does not go together is refused by name, every ablation parses."""

import dataclasses

import pytest
from transformers import AutoModelForCausalLM

from adapters.methods.registry import METHODS
from tests.conftest import shared
from tests.helpers import quick_config, save_random_model, thorough
from trainer.config.config import load_config, with_overrides
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.run.run import run

LELORA, GLOBAL = "method.kind=lelora", "method.policy.credit=global"
NAMED = "method.targets=.*_proj"  # `all-linear` leaves out what is too small for the rank

# name: (overrides of a run of 4 steps on the quickstart's 28 units, what the one line must say)
REFUSED = {
    "more survivors than units": (
        ["method.kind=weightlora", "method.keep=29"], ["method.keep: 29", "at most 28"],
    ),
    "no survivor": (["method.kind=rlora", "method.keep=0"], ["method.keep: 0", "greater than 0"]),
    "survivors' rank above the matrix": (
        ["method.kind=weightlora_plus", "method.keep=3", NAMED],
        ["method.keep: 3", "rank 72", "self_attn.k_proj (64 x 128)", "accepted: a larger"],
    ),
    "banks that overlap": (
        [LELORA, "method.rank=18", NAMED],
        ["method.rank", "18 given", "at most 16", "layers.0.self_attn.k_proj", "64 x 128"],
    ),
    "two banks that overlap": (
        [LELORA, "method.locations=[primary, medium]", "method.rank=33", NAMED],
        ["method.rank", "33 given", "at most 32", "k_proj"],
    ),
    "one bank above the matrix": (
        [LELORA, "method.locations=[minor]", "method.rank=65", NAMED], ["method.rank", "65", "at most 64"],
    ),
    "rank of pissa above the matrix": (
        ["method.kind=pissa", "method.rank=65", NAMED], ["method.rank: 65", "at most 64", "k_proj"],
    ),
    "unknown location": (
        [LELORA, "method.locations=[primary, middle]"],
        ["method.locations", "'middle'", "'primary', 'medium'", "'minor'"],
    ),
    "location twice": (
        [LELORA, "method.locations=[minor, minor]"], ["method.locations", "each location once"],
    ),
    "no location": ([LELORA, "method.locations=[]"], ["method.locations", "at least 1"]),
    "ranks not ascending": ([LELORA, "method.ranks=[0, 4, 2]"], ["method.ranks: [0, 4, 2]"]),
    "rank 0 alone": ([LELORA, "method.ranks=[0]"], ["method.ranks: [0]"]),
    "rank that is no number": ([LELORA, "method.rank=many"], ["method.rank: 'many'", "integer"]),
    "weights for other ranks": (
        [LELORA, "method.policy.mode=uniform", "method.policy.rank_weights=[1, 1]"],
        ["method.policy.rank_weights: 2 numbers", "method.ranks (4)"],
    ),
    "weights without uniform draws": (
        [LELORA, "method.policy.rank_weights=[1, 1, 1, 1]"],
        ["method.policy.rank_weights", "uniform"],
    ),
    "next batch for all": (
        [LELORA, GLOBAL, "method.policy.signal=next_batch"],
        ["method.policy.signal: next_batch", "policy.credit=global", "accepted: validation"],
    ),
    "alpha below 0": (
        [LELORA, GLOBAL, "method.policy.alpha=-0.1"],
        ["method.policy.alpha: -0.1", "greater than or equal to 0"],
    ),
    "alpha without L1 and L2": (
        [LELORA, "method.policy.alpha=0.5"], ["method.policy.alpha: 0.5", "policy.credit=global"],
    ),
    "L1 without L1": (
        [LELORA, "method.policy.loss=l1"], ["method.policy.loss: 'l1'", "policy.credit=global"],
    ),
    "price below 0": (
        [LELORA, "method.policy.cost=-1"], ["method.policy.cost: -1", "greater than or equal to 0"],
    ),
    "one point of a spectrum": (
        [LELORA, "method.policy.spectrum_points=1"],
        ["method.policy.spectrum_points: 1", "greater than 1"],
    ),
    "unknown policy network": (
        [LELORA, "method.policy.network=mpl"],
        ["method.policy.network: 'mpl'", "did you mean 'mlp'"],
    ),
    "unknown key of the policy": (
        [LELORA, "method.policy.entorpy=0.1"],
        ["method.policy.entorpy: unknown key", "credit, signal", "did you mean 'entropy'"],
    ),
    "strange key of the policy": (
        [LELORA, "method.policy.foo=1"], ["method.policy.foo: unknown key; accepted: mode, "],
    ),
    "unknown key after selection": (
        ["method.kind=weightlora", "method.after_selection.batch_size=4"],
        ["method.after_selection.batch_size: unknown key; accepted: micro_batch_size"],
    ),
    "micro-batch of 0 after selection": (
        ["method.kind=weightlora", "method.after_selection.micro_batch_size=0"],
        ["method.after_selection.micro_batch_size: 0", "greater than 0"],
    ),
    "key of another method": (
        ["method.kind=lora", "method.gamma=2"], ["method.gamma: unknown key; accepted: "],
    ),
    "no section": ([LELORA, "method.policy=mlp"], ["method.policy: 'mlp'"]),
    "gamma below 0": (["method.kind=lalora", "method.gamma=-1"], ["method.gamma: -1"]),
    "unknown fidelity": (
        ["method.kind=lalora", "method.fidelity=full"], ["method.fidelity: 'full'", "'none'"],
    ),
    "warm-up as long as the run": (
        ["method.kind=weightlora", "method.warmup_steps=4"],
        ["method.warmup_steps: 4", "fewer than the run's 4 steps"],
    ),
    "two counts of survivors": (
        ["method.kind=weightlora", "method.keep=3", "method.keep_parameters=0.5"],
        ["method.keep_parameters: 0.5", "together with method.keep"],
    ),
    "rounds that are too long": (
        ["method.kind=weightlora", "method.warmup_steps=2", "method.rounds=2"],
        ["method.warmup_steps: 2", "method.rounds=2", "fewer than the run's 4 steps"],
    ),
    "warm-up as long as the epochs": (
        ["method.kind=weightlora", "method.warmup_steps=8", "run.steps=null", "run.epochs=1"],
        ["method.warmup_steps: 8", "fewer than the run's 8 steps"],
    ),
    "tied matrix split by pissa": (
        ["method.kind=pissa", "method.include_head=true"],
        ["method.", "lm_head", "shares its matrix"],
    ),
    "tied matrix split by milora": (
        ["method.kind=milora", "method.include_head=true"],
        ["method.", "lm_head", "shares its matrix"],
    ),
    "tied matrix split by lelora": (
        [LELORA, "method.include_head=true"], ["method.", "lm_head", "shares its matrix"],
    ),
    "unit outside the blocks": (
        ["method.kind=lalora", "method.include_head=true"],
        ["method.targets: lm_head", "outside the transformer blocks"],
    ),
    "start below the end": (
        ["method.kind=adalora", "method.initial_rank=4"],
        ["method.initial_rank: 4", "at least method.rank (8)"],
    ),
    "start above the matrix": (
        ["method.kind=adalora", "method.initial_rank=65", NAMED],
        ["method.initial_rank: 65", "at most 64", "k_proj"],
    ),
    "no step to prune in": (
        ["method.kind=adalora", "method.tinit=2", "method.tfinal=2"],
        ["method.tinit: 2", "method.tfinal: 2", "fewer than the run's 4 steps"],
    ),
    "export above the rank": (
        ["method.kind=dylora", "method.export_rank=9"],
        ["method.export_rank: 9", "at most method.rank (8)"],
    ),
    "lora that follows": (
        ["method.kind=lora", "method.replay=runs/other"],
        ["method.replay: runs/other", "lora decides nothing"],
    ),
    "nothing left out to evaluate on": (
        ["data.eval=left_out"], ["data.leave_out: 0", "data.eval=left_out"],
    ),
    "everything left out": (
        ["data.leave_out=64", "data.train_records=64"], ["data.leave_out: 64", "fewer than 64"],
    ),
    "everything validated on": (
        [LELORA, GLOBAL, "method.policy.validation_samples=64"],
        ["method.policy.validation_samples: 64", "fewer than 64"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_does_not_go_together_is_refused_by_name(name, tmp_path, cache):
    overrides, parts = REFUSED[name]
    with pytest.raises(UserError) as refusal:
        run(quick_config(tmp_path, f"data.cache={cache}", *overrides), World())
    message = str(refusal.value)
    for part in parts:
        assert part in message
    assert "\n" not in message and "accepted" in message and len(message) < 600
    assert refusal.value.exit_code == 2
    assert not (tmp_path / "runs").exists()


def test_a_tied_head_of_a_real_model_is_not_split(tmp_path):
    config = quick_config(
        tmp_path, f"model.id={shared('models/books-llama-28m')}", LELORA, "method.include_head=true"
    )
    with pytest.raises(UserError, match="lm_head shares its matrix"):
        run(config, World())


@pytest.mark.parametrize("kind", ["pissa", "milora", "lelora"])
def test_a_head_of_its_own_is_split(kind, tmp_path):
    save_random_model(tmp_path / "model", "llama", AutoModelForCausalLM, tie_word_embeddings=False)
    config = quick_config(
        tmp_path, f"model.id={tmp_path}/model", f"method.kind={kind}", "method.include_head=true",
        "run.steps=1",
    )  # fmt: skip
    run(config, World())
    assert '"lm_head"' in (config.run_folder / "units.json").read_text()


ABLATIONS = {  # by what METHODS.md says must be reachable, or names as an option
    # LoRA and what all methods take
    "rsLoRA": ["method.kind=lora", "method.rank_stabilized=true"],
    "LoRA+": ["method.kind=lora", "method.b_learning_rate_ratio=16"],
    "adapted head": ["method.kind=lora", "method.include_head=true"],
    "dropout on x": ["method.kind=lora", "method.dropout=0.1", "method.dropout_on=input"],
    "dropout on z": ["method.kind=lora", "method.dropout=0.1", "method.dropout_on=hidden"],
    "dropout of the difference": ["method.kind=pissa", "method.dropout=0.1"],
    "pissa": ["method.kind=pissa"],
    "milora": ["method.kind=milora"],
    # LeLoRA: strategies (§4.2.4, App. J)
    "dimension only": [LELORA, "method.locations=[primary]"],
    "location only": [LELORA, "method.ranks=[8]"],
    "neither": [LELORA, "method.ranks=[8]", "method.locations=[primary]"],
    "R of the paper": [LELORA, "method.ranks=[0, 2, 4, 8]"],
    "R up to 16": [LELORA, "method.rank=16"],
    "R without 0": [LELORA, "method.ranks=[1, 3, 8]"],
    **{
        f"S: {places}": [LELORA, f"method.locations=[{places}]"]
        for places in ("medium", "minor", "primary, medium", "primary, minor", "medium, minor")
    },
    # LeLoRA: the policy
    "uniform policy": [LELORA, "method.policy.mode=uniform"],
    "weighted policy": [
        LELORA, "method.policy.mode=uniform", "method.policy.rank_weights=[1, 2, 4, 8]",
    ],
    "frozen policy": [LELORA, "method.policy.mode=frozen"],
    "L1 only": [LELORA, GLOBAL, "method.policy.loss=l1"],
    "L2 only": [LELORA, GLOBAL, "method.policy.loss=l2"],
    **{f"α = {a}": [LELORA, GLOBAL, f"method.policy.alpha={a}"] for a in (0.5, 0.8, 1)},
    **{f"network {n}": [LELORA, f"method.policy.network={n}"] for n in ("mlp", "resnet", "tabnet")},
    "eq. 10 to the letter": [
        LELORA, GLOBAL, "method.policy.optimizer=sgd", "method.policy.learning_rate=1e-3",
        "method.policy.advantage=raw", "method.policy.entropy=0", "method.policy.baseline=mean",
        "method.policy.idle_location=true", "method.policy.signal=validation",
    ],
    "initial features": [LELORA, "method.policy.features=initial"],
    "trend": [LELORA, "method.policy.credit=attributed", "method.policy.baseline=trend", "method.policy.baseline_window=5"],
    **{
        f"{credit}, {signal}": [
            LELORA, f"method.policy.credit={credit}", f"method.policy.signal={signal}",
        ]
        for credit in ("attributed", "counterfactual")
        for signal in ("validation", "next_batch")
    },
    "woken at once": [LELORA, "method.wake=at_once"],
    "balanced": [LELORA, "method.coordinates=balanced"],
    "directions only": [LELORA, "method.coordinates=delta", "method.dropout=0.1"],
    "scores per step": [LELORA, "method.policy.score=per_step"],
    "budget": [LELORA, "method.policy.budget=4"],
    "budget of each block": [LELORA, "method.policy.budget=4", "method.policy.within=layer"],
    "fixed after two draws": [
        LELORA, "method.coordinates=delta", "method.policy.budget=4",
        "method.policy.freeze_after=2",
    ],
    "random and fixed": [
        LELORA, "method.policy.mode=uniform", "method.policy.freeze_after=0",
    ],
    "price": [LELORA, "method.policy.cost=1e-6"],
    "every 3": [LELORA, "method.policy.every=3"],
    "spectrum": [LELORA, "method.policy.spectrum_points=64"],
    "validation samples": [LELORA, GLOBAL, "method.policy.validation_samples=8"],
    # La-LoRA
    **{
        f"fidelity {f}": ["method.kind=lalora", f"method.fidelity={f}"]
        for f in ("truncated_over_full", "previous_over_current", "truncated_over_initial", "none")
    },
    "growth as printed": ["method.kind=lalora", "method.growth=printed"],
    "without CAR": ["method.kind=lalora", "method.budget=full"],
    "Fisher": ["method.kind=lalora", "method.contribution=fisher"],
    "sum of units": ["method.kind=lalora", "method.contribution_scale=sum"],
    "mean of units": ["method.kind=lalora", "method.contribution_scale=mean"],
    "γ = 10, every 2": ["method.kind=lalora", "method.gamma=10", "method.every=2"],
    # WeightLoRA
    "K, T, η": [
        "method.kind=weightlora", "method.keep=5", "method.warmup_steps=2",
        "method.omega_learning_rate=0.5",
    ],
    "η follows the schedule": ["method.kind=weightlora", "method.omega_schedule=main"],
    "H_K by sign": ["method.kind=weightlora", "method.score=signed"],
    "larger micro-batches": ["method.kind=weightlora", "method.after_selection.micro_batch_size=4"],
    "+ drawn anew": ["method.kind=weightlora_plus", "method.expand=reinit"],
    "+ expanded": ["method.kind=weightlora_plus", "method.expand=qr"],
    "+ rescaled": ["method.kind=weightlora_plus", "method.rescale_alpha=true"],
    "random units": ["method.kind=rlora", "method.keep=5"],
    # AdaLoRA, DyLoRA
    "AdaLoRA": [
        "method.kind=adalora", "method.initial_rank=12", "method.tinit=1", "method.tfinal=1",
        "method.delta_t=1", "method.beta1=0.9", "method.beta2=0.9", "method.orthogonality=0.5",
    ],
    "only the b-th": ["method.kind=dylora", "method.only_bth=true"],
    "DyLoRA at rank 4": ["method.kind=dylora", "method.export_rank=4"],
    # all of them
    "WeightLoRA's Adam": ["method.kind=weightlora", "optim.betas=[0.9, 0.99]"],
    "the same records left out": ["method.kind=lora", "data.leave_out=32", "data.eval=left_out"],
}  # fmt: skip


@pytest.mark.parametrize("name", list(ABLATIONS))
def test_ablations_are_one_override_away(name, tmp_path):
    config = quick_config(tmp_path, *ABLATIONS[name])
    for override in ABLATIONS[name]:
        key, _, value = override.partition("=")
        held = config
        for part in key.split("."):
            held = getattr(held, part)
        given = value.strip("[]").split(", ") if isinstance(held, list) else [value]
        for found, text in zip(held if isinstance(held, list) else [held], given, strict=True):
            assert str(found).lower() == text or float(found) == float(text)
    assert with_overrides(config, []) == config
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "again.yaml") == config


@thorough
@pytest.mark.parametrize("name", list(ABLATIONS))
def test_ablations_train(name, tmp_path, cache):
    save_random_model(tmp_path / "model", "llama", AutoModelForCausalLM, head_dim=32)
    config = quick_config(
        tmp_path, f"model.id={tmp_path}/model", f"data.cache={cache}", "run.steps=5",
        "data.eval_records=2", *ABLATIONS[name],
    )  # fmt: skip
    run(config, World())
    assert (config.run_folder / "adapter/adapter_model.safetensors").is_file()


def test_defaults_are_those_of_the_methods_page():
    def options(kind):
        return METHODS[kind].Options()

    assert options("lelora").dimensions == [0, 2, 4, 8]
    assert options("lelora").components == 24
    assert options("lelora").locations == ["primary", "medium", "minor"]
    policy = options("lelora").policy
    assert (policy.alpha, policy.baseline_window, policy.every) == (0.8, 20, 1)
    assert (policy.spectrum_points, policy.validation_samples) == (256, 32)
    assert (policy.optimizer, policy.score, policy.network) == ("adam", "loss", "mlp")
    assert options("lelora").coordinates == "singular" and options("lelora").current_gates
    lalora = options("lalora")
    assert (lalora.gamma, lalora.every, lalora.growth) == (10.0, 10, "same_rank")
    assert (lalora.fidelity, lalora.budget) == ("previous_over_current", "gradual")
    assert (lalora.contribution, lalora.contribution_scale) == ("norm", "mean")
    weightlora = options("weightlora")
    assert weightlora.omega_learning_rate == 5 and weightlora.omega_schedule == "constant"
    assert weightlora.score == "magnitude" and weightlora.kept(29) == 14
    assert [weightlora.warmup(steps) for steps in (200, 201, 1000)] == [1, 2, 5]
    plus = options("weightlora_plus")
    assert (plus.expand, plus.rescale_alpha) == ("kept", False)
    assert (plus.final_rank(28), plus.model_copy(update={"keep": 9}).final_rank(28)) == (16, 24)
    adalora = options("adalora")
    assert adalora.components == 12 and adalora.orthogonality == 0.1
    assert adalora.beta1 == adalora.beta2 == 0.85
    for kind in METHODS:
        assert options(kind).dropout == 0 and options(kind).dropout_on == "hidden"
        assert not options(kind).include_head and options(kind).replay is None


def test_a_rank_and_its_set_follow_from_each_other():
    def resolved(**given):
        options = METHODS["lelora"].Options(**given)
        return options.rank, options.dimensions

    assert resolved(rank=16) == (16, [0, 2, 4, 8, 16])
    assert resolved(rank=128) == (128, [0, 2, 4, 8, 16, 32, 64, 128])
    assert resolved(rank=1) == (1, [0, 1])
    assert resolved(ranks=[0, 3]) == (3, [0, 3])
    assert resolved(rank=16, ranks=[0, 2, 16]) == (16, [0, 2, 16])
    with pytest.raises(ValueError, match=r"method.rank: 8 given with .* accepted: .* 16"):
        resolved(rank=8, ranks=[0, 2, 16])


@pytest.mark.parametrize(
    ("key", "value", "credit"),
    [
        ("alpha", 0.5, "counterfactual"), ("loss", "l1", "attributed"),
        ("baseline", "trend", "counterfactual"), ("idle_location", True, "counterfactual"),
        ("step", "gradient", "attributed"), ("step", "gradient", "global"),
        ("score", "per_step", "global"),
    ],
)  # fmt: skip
def test_keys_of_another_credit_are_refused(key, value, credit):
    with pytest.raises(ValueError, match=f"method.policy.{key}: .*credit={credit}"):
        METHODS["lelora"].Options(policy={"credit": credit, key: value})
    with_effect = "counterfactual" if key in ("step", "score") else "global"
    METHODS["lelora"].Options(policy={"credit": with_effect, key: value})


def test_units_of_odd_sizes_bound_the_rank():
    """r_max ≤ ⌊⌈d/2⌉/2⌋ with all three banks, whatever d."""
    options = METHODS["lelora"].Options
    for d in range(2, 40):
        bound = -(-d // 2) // 2
        unit = SimpleUnit("u", d, d + 3)
        for rank in range(1, bound + 2):
            made = options(rank=rank)
            if rank <= bound:
                made.check_units([unit])
                continue
            with pytest.raises(ValueError, match=rf"at most {bound}, .* of u \({d} x {d + 3}\)"):
                made.check_units([unit])


@dataclasses.dataclass
class SimpleUnit:
    name: str
    out_features: int
    in_features: int
    layer: int | None = 0
