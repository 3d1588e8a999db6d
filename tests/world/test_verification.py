"""The proof at start on two ranks: every engine's gathers, and faults of one rank alone."""

import os

import pytest

from tests.helpers import ROOT, quick_config, save_mixture
from tests.world.cases import ok, run_cases

ENGINES = ["ddp", "peer", "fsdp2", "deepspeed"]
MATRIX = "model.layers.1.self_attn.o_proj"
FAULTS = {"shifted": f"{MATRIX}.weight", "garbage": True}


@pytest.fixture(scope="module")
def proofs(tmp_path_factory):
    os.chdir(ROOT)
    tmp = tmp_path_factory.mktemp("proofs")
    mixture = save_mixture(tmp / "mixtral", "mixtral")

    def case(engine: str, *overrides: str, **fault) -> tuple[str, dict]:
        config = quick_config(
            tmp, "run.verify=auto", f"engine.kind={engine}", "data.packing=true", *overrides
        )
        return "verified", {"config": config.model_dump(), **fault}

    cases = {
        f"{engine}-{number}": case(engine, f"model.quantization={weight_format}", *model)
        for engine in ENGINES
        for number, (weight_format, model) in enumerate(
            [("nf4", []), ("int8", [f"model.id={mixture}"])]
        )
    }
    cases |= {
        f"{engine}-{fault}": case(engine, **{fault: value})
        for engine in ("fsdp2", "deepspeed")
        for fault, value in FAULTS.items()
    }
    return run_cases(tmp / "work", cases)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("number", [0, 1])
def test_sound_models_pass_on_every_engine(proofs, engine, number):
    for said in ok(proofs[f"{engine}-{number}"]):
        assert said.startswith("verified") and "tokens packed" in said


@pytest.mark.parametrize("engine", ["fsdp2", "deepspeed"])
def test_a_shard_off_by_one_row_is_named_and_ends_every_rank(proofs, engine):
    results = proofs[f"{engine}-shifted"]
    said = [r["message"] for r in results if r.get("error") == "UserError"]
    assert said and all("error" in result for result in results)
    assert said[0].startswith(f"{MATRIX}.weight: what {engine} gathers is not what was loaded")


@pytest.mark.parametrize("engine", ["fsdp2", "deepspeed"])
def test_a_fault_of_one_rank_ends_all_of_them(proofs, engine):
    one, other = proofs[f"{engine}-garbage"]
    assert one["error"] == "FailedElsewhere" and other["error"] == "UserError"
    assert "model.rotary_emb.inv_freq: this buffer differs" in other["message"]
