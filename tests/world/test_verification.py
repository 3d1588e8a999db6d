"""The proof at start on two ranks: every engine's gathers, and faults of one rank alone."""

import itertools
import os
import re

import pytest

from tests.helpers import ALL, ROOT, quick_config, sample, save_mixture
from tests.world.cases import ok, run_cases

ENGINES, SPLIT = ["ddp", "peer", "fsdp2", "deepspeed"], ["fsdp2", "deepspeed"]
MATRIX = "model.layers.1.self_attn.o_proj"
FAULTS = {"shifted": f"{MATRIX}.weight", "garbage": True}
# A model and a fault with each engine in turn.
SOUND = [("ddp", 1), ("peer", 0), ("fsdp2", 1), ("deepspeed", 0)]
FAULTY = [("deepspeed", "shifted"), ("fsdp2", "garbage")]


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
        for engine, number in (itertools.product(ENGINES, [0, 1]) if ALL else SOUND)
        for weight_format, model in [[("nf4", []), ("int8", [f"model.id={mixture}"])][number]]
    }
    cases |= {
        f"{engine}-{fault}": case(engine, **{fault: FAULTS[fault]})
        for engine, fault in (itertools.product(SPLIT, FAULTS) if ALL else FAULTY)
    }
    return run_cases(tmp / "work", cases)


@pytest.mark.parametrize("case", sample(itertools.product(ENGINES, [0, 1]), *SOUND))
def test_sound_models_pass_on_every_engine(proofs, case):
    engine, number = case
    for said in ok(proofs[f"{engine}-{number}"]):
        assert "tensors as loaded" in said and "tokens packed" in said
        assert re.search(r" against \w+ForCausalLM of transformers", said) and "FSDP" not in said


@pytest.mark.parametrize("engine", sample(SPLIT, "deepspeed"))
def test_a_shard_off_by_one_row_is_named_and_ends_every_rank(proofs, engine):
    results = proofs[f"{engine}-shifted"]
    said = [r["message"] for r in results if r.get("error") == "UserError"]
    assert said and all("error" in result for result in results)
    assert said[0].startswith(f"{MATRIX}.weight: what {engine} gathers is not what was loaded")


@pytest.mark.parametrize("engine", sample(SPLIT, "fsdp2"))
def test_a_fault_of_one_rank_ends_all_of_them(proofs, engine):
    one, other = proofs[f"{engine}-garbage"]
    assert one["error"] == "FailedElsewhere" and other["error"] == "UserError"
    assert "model.rotary_emb.inv_freq: this buffer differs" in other["message"]
