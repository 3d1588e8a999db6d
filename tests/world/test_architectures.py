"""Architectures of transformers against transformers itself and PEFT: a sample, or all of them.

`docs/models.md` has the table of all, which the campaign makes (`make architectures`).
"""

import itertools

import pytest

from tests.architectures import CHECKS, ENGINES, Case, outcome, ranks_outcome
from tests.helpers import ALL, losses, sample, thorough
from tests.tiny_models import CAUSAL, CLASSIFICATION
from tests.world.cases import run_cases
from trainer.distributed.world import World
from trainer.run.run import run

SAMPLE = {
    "falcon": CAUSAL,  # adds in place to what a projection returns
    "bloom": CAUSAL,  # ALiBi
    "gpt2": CAUSAL,  # Conv1D, learned positions
    "gpt_neox": CAUSAL,
    "opt": CAUSAL,
    "gpt_oss": CAUSAL,  # experts with biases, sinks
    "deepseek_v3": CAUSAL,  # latent attention, shared and routed experts
    "llama4_text": CAUSAL,  # transposed experts
    "gemma3": CAUSAL,  # inside a multimodal model
    "gemma3n_text": CAUSAL,  # tiny auxiliary matrices, keys shared by layers
    "qwen3_next": CAUSAL,  # linear attention
    "mamba": CAUSAL,  # a projection whose weight is read directly
    "granitemoehybrid": CAUSAL,
    "phi3": CAUSAL,
    "zamba2": CAUSAL,  # blocks that share their weights
    "deberta": CLASSIFICATION,
    "distilbert": CLASSIFICATION,
    "big_bird": CLASSIFICATION,
    "modernbert": CLASSIFICATION,
    "t5": CLASSIFICATION,  # encoder and decoder
}
USUAL = [
    "gpt2", "deepseek_v3", "llama4_text", "gemma3n_text", "qwen3_next", "mamba", "zamba2", "deberta",
    "t5",
]  # fmt: skip
ON_TWO_RANKS = ["granitemoehybrid", "t5"]
IN_TURN = list(zip(ON_TWO_RANKS, itertools.cycle(ENGINES), strict=False))
FAST = ["train", "loss", "signs", "export"]


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("architectures")
    return {name: Case(name, part, folder / name) for name, part in SAMPLE.items()}


@pytest.mark.parametrize("name", sample(SAMPLE, *USUAL))
def test_losses_gradients_and_export_are_those_of_transformers_and_peft(cases, name):
    for check in FAST:
        CHECKS[check](cases[name])


def test_a_tied_head_that_comes_before_the_embedding_is_merged_under_its_name_in_the_files(
    tmp_path,
):
    CHECKS["merged"](Case("camembert", CAUSAL, tmp_path / "camembert"))


def test_layers_whose_gradient_is_always_zero_are_named_and_can_be_left_out(tmp_path):
    """The first token of Longformer, which alone is classified, has projections of its own."""
    case = Case("longformer", CLASSIFICATION, tmp_path)
    found = outcome(case.trained)
    assert found["status"] == "refused"
    assert found["message"].startswith("longformer.encoder.layer.1.attention.self.query, ")
    assert "no gradient in the first steps" in found["message"]
    assert found["message"].endswith("accepted: method.targets without it")
    dead = r"layer\.1\.attention\.self\.(query|key|value)"
    config = case.config("without", f"method.targets=(?!.*{dead}$).*")
    run(config, World())
    assert len(losses(config.run_folder)) == 3


@pytest.fixture(scope="module")
def ranks(cases, tmp_path_factory) -> dict[str, list]:
    for name in ON_TWO_RANKS:
        cases[name].trained()
    runs = {
        f"{name}-{engine}": (
            "train",
            cases[name].config(engine, f"engine.kind={kind}").model_dump(),
        )
        for name, engine in (itertools.product(ON_TWO_RANKS, ENGINES) if ALL else IN_TURN)
        for kind in [ENGINES[engine]]
    }
    return run_cases(tmp_path_factory.mktemp("ranks") / "work", runs)


@pytest.mark.parametrize("case", sample(itertools.product(ON_TWO_RANKS, ENGINES), *IN_TURN))
def test_two_ranks_train_as_one(cases, ranks, case):
    name, engine = case
    found = ranks_outcome(cases[name], engine, ranks[f"{name}-{engine}"])
    assert found["status"] == "ok", found["message"]


@thorough
def test_every_architecture_is_right_or_refused(tmp_path):
    from tests.campaigns.architectures import chosen, read, run_all, verdict

    run_all(tmp_path, chosen(None, None), jobs=2, with_ranks=True)
    found = {key: verdict(outcomes) for key, outcomes in read(tmp_path).items()}
    assert {key: word for key, word in found.items() if word in ("wrong", "crashed")} == {}
    assert list(found.values()).count("clean") >= 110
