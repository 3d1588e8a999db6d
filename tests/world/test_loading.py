"""Loading by several ranks: each byte is read once a host, and everyone ends with the same bits as
one process alone."""

import json
import os
import shutil
from itertools import product

import pytest
from transformers import AutoModelForCausalLM

from tests.helpers import ALL, ROOT, quick_config, save_mixture, save_random_model
from tests.world.cases import ok, run_cases

ENGINES = ["ddp", "peer", "fsdp2", "deepspeed"]
MODELS = ["llama", "mixtral"]
FORMATS = ["none", "nf4", "int8", "fp8"]
LELORA = ["method.kind=lelora", "method.rank=6", "method.alpha=12"]
VARIANTS = {fmt: [f"model.quantization={fmt}"] for fmt in FORMATS} | {
    "lelora-nf4": ["model.quantization=nf4", *LELORA],
    "lelora-none": ["model.quantization=none", *LELORA],
}
ON_TWO_HOSTS = ["nf4", "lelora-nf4"]
PAIRS = [  # with every engine in turn two formats of a model; all of them in `make test-all`
    (model, variant, engine)
    for shift, model in enumerate(MODELS)
    for number, variant in enumerate(VARIANTS)
    for turn, engine in enumerate(ENGINES)
    if ALL or (number + shift) % len(ENGINES) == turn
]
BROKEN = {"cut": {"cut": True}, "unreadable": {"fails_after": 5}}


def case(tmp, model: str, variant: str, engine: str, **more) -> tuple[str, dict]:
    config = quick_config(
        tmp, f"model.id={tmp}/{model}", f"engine.kind={engine}", "method.targets=all-linear",
        "data.eval=null",
        # Singular slices are not handed from one to the other by their cache.
        f"data.cache={tmp}/cache-{model}-{variant}-{engine}-{len(more)}", *VARIANTS[variant],
    )  # fmt: skip
    return "loaded", {"config": config.model_dump(), **more}


@pytest.fixture(scope="module")
def loads(tmp_path_factory):
    os.chdir(ROOT)
    tmp = tmp_path_factory.mktemp("loads")
    save_random_model(tmp / "llama", "llama", AutoModelForCausalLM, tie_word_embeddings=False)
    save_mixture(tmp / "mixtral", "mixtral", num_hidden_layers=3)
    alone = {f"{m}-{v}": case(tmp, m, v, "single") for m in MODELS for v in VARIANTS}
    cases = {f"{m}-{v}-{e}": case(tmp, m, v, e) for m, v, e in PAIRS} | {
        f"{m}-{v}-hosts": case(tmp, m, v, "ddp", nodes=[[0], [1]])
        for m in MODELS
        for v in ON_TWO_HOSTS
    }
    for name, more in BROKEN.items():
        shutil.copytree(tmp / "mixtral", tmp / name)
        cases[f"broken-{name}"] = case(tmp, name, "nf4", "fsdp2", **more)
    expected = {k: ok(r)[0] for k, r in run_cases(tmp / "alone", alone, 1).items()}
    return tmp, expected, run_cases(tmp / "work", cases)


def regions(tmp, model: str) -> list[tuple[str, int, int]]:
    """(file, first byte, number of bytes) of every tensor of a checkpoint."""
    found = []
    for file in (tmp / model).glob("*.safetensors"):
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        for name, entry in json.loads(content[8 : 8 + length]).items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                found.append((file.name, 8 + length + start, end - start))
    return sorted(found)


@pytest.mark.parametrize(
    ("model", "variant", "engine"),
    [
        *PAIRS,
        *product(MODELS, ON_TWO_HOSTS, ["hosts"]),
    ],
)
def test_each_byte_is_read_once_and_all_have_what_one_process_has(loads, model, variant, engine):
    tmp, expected, results = loads
    name = f"{model}-{variant}-{engine}"
    ranks, alone = ok(results[name]), expected[f"{model}-{variant}"]
    whole = regions(tmp, model)
    assert sorted(map(tuple, alone["pieces"])) == whole
    if engine == "hosts":
        assert all(sorted(map(tuple, rank["pieces"])) == whole for rank in ranks)
    else:
        assert sorted(tuple(piece) for rank in ranks for piece in rank["pieces"]) == whole
        total = sum(size for _, _, size in whole)
        shares = [sum(size for _, _, size in rank["pieces"]) / total for rank in ranks]
        assert min(shares) > 0.35, "the work is shared"
        assert all(rank["bytes_read"] == total for rank in ranks)
    for rank in ranks:
        assert rank["digests"] == alone["digests"]
        assert rank["identity"] == alone["identity"]
        assert rank["error"] == pytest.approx(alone["error"], rel=1e-12)
    assert ranks[0]["error"] == ranks[1]["error"]


@pytest.mark.parametrize("name", list(BROKEN))
def test_a_file_that_one_rank_cannot_read_ends_both_in_one_line(loads, name):
    _, _, results = loads
    ranks = results[f"broken-{name}"]
    assert all(rank["exit_code"] == 2 and rank["seconds"] < 20 for rank in ranks)
    speaking = [rank for rank in ranks if rank["error"] != "FailedElsewhere"]
    assert [rank["error"] for rank in speaking] == ["UserError"]
    what = {"cut": "bytes too early", "unreadable": "Input/output error"}[name]
    assert f"{name}/model.safetensors: not a readable" in speaking[0]["message"]
    assert what in speaking[0]["message"] and "\n" not in speaking[0]["message"]
