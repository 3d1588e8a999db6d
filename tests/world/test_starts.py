"""Data-driven starts on several ranks, sharded and quantised, are those of one process."""

import os

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from tests.helpers import ROOT, quick_config, sample, save_mixture, save_random_model
from tests.world.cases import ok, run_cases

ENGINES = ["ddp", "peer", "fsdp2", "deepspeed"]
FORMATS = ["none", "nf4", "int8", "fp8"]
USUAL = [
    ("llama", "nf4", "fsdp2", "gradient"),
    ("llama", "int8", "peer", "activation"),
    ("mixtral", "none", "deepspeed", "activation"),
    ("mixtral", "fp8", "ddp", "gradient"),
]
CASES = sample(
    [
        (model, fmt, engine, start)
        for model in ("llama", "mixtral")
        for fmt in FORMATS
        for engine in ENGINES
        for start in ("activation", "gradient")
    ],
    *USUAL,
)


def case(tmp, model, fmt, engine, start) -> tuple[str, dict]:
    config = quick_config(
        tmp, f"model.id={tmp}/{model}", f"engine.kind={engine}", "method.targets=all-linear",
        f"model.quantization={fmt}", f"method.start={start}", "method.start_options.batches=1",
        "method.start_options.passes=4", "method.rank=2", "data.eval=null",
        "engine.activation_checkpointing=true",
    )  # fmt: skip
    return "started", config.model_dump()


@pytest.fixture(scope="module")
def results(tmp_path_factory, request):
    os.chdir(ROOT)
    tmp = tmp_path_factory.mktemp("starts")
    save_random_model(tmp / "llama", "llama", AutoModelForCausalLM)
    save_mixture(tmp / "mixtral", "mixtral")
    chosen = [
        item.callspec.params["case_of"] for item in request.session.items
        if item.module is request.module and not item.get_closest_marker("skipif")
    ]  # fmt: skip
    chosen = chosen or USUAL
    alone = {str(one): case(tmp, *one[:2], "single", one[3]) for one in chosen}
    several = {str(one): case(tmp, *one) for one in chosen}
    return run_cases(tmp / "alone", alone, 1), run_cases(tmp / "work", several)


@pytest.mark.parametrize("case_of", CASES)
def test_ranks_find_together_what_one_process_finds(results, case_of):
    alone, several = results
    (expected,), ranks = ok(alone[str(case_of)]), ok(several[str(case_of)])
    assert ranks[0]["digest"] == ranks[1]["digest"]
    for name, (A, worth) in expected["starts"].items():
        found, values = ranks[0]["starts"][name]
        np.testing.assert_allclose(values, worth, rtol=2e-3)
        if worth[1] > 1.02 * worth[0] or worth[0] > 1.1 * worth[1]:  # else any rotation will do
            assert abs(np.dot(found[0], A[0])) > 0.99, name
