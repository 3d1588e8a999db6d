"""The same run under every engine: the same losses, and a backbone that is really sharded."""

import itertools
import json

import numpy as np
import pytest

from tests.helpers import ALL, losses, quick_config, sample, save_mixture, save_random_model
from tests.images import save_images, save_vit
from tests.world.cases import ok, run_cases
from trainer.config.config import Config
from trainer.distributed.world import World
from trainer.run.run import run

ENGINES = ["ddp", "peer", "fsdp2", "deepspeed"]
SHARDING = ["peer", "fsdp2", "deepspeed"]
FORMATS = ["none", "nf4", "fp4", "int8", "fp8"]

SHORT = [
    "data.max_length=64", "data.on_bad_record=skip", "data.batch_size=3", "data.micro_batch_size=1",
]  # fmt: skip
VARIANTS = {
    "float32": ["model.dtype=float32"],
    "nf4": ["model.quantization=nf4"],
    "fp4": ["model.quantization=fp4"],
    "int8": ["model.quantization=int8"],
    "fp8": ["model.quantization=fp8"],
    # bfloat16 products are emulated on most CPUs: short and few.
    "bfloat16": ["model.dtype=bfloat16", *SHORT],
    "nf4-bfloat16": ["model.dtype=bfloat16", "model.quantization=nf4", *SHORT],
    "packed-checkpointed-dropout": [
        "data.packing=true", "engine.activation_checkpointing=true", "method.dropout=0.1",
        "data.batch_size=3", "data.micro_batch_size=1",
    ],
    "by-tokens": [
        "data.micro_batch_size=null", "data.micro_batch_tokens=128", "data.max_length=96",
        "data.on_bad_record=skip", "data.padding_free=true", "data.row_lengths=3",
        "data.batch_size=7", "method.dropout=0.1",
    ],
    "uneven": ["data.batch_size=5", "data.micro_batch_size=3", "model.quantization=nf4"],
    "classification": [
        "task.kind=sequence_classification", "data.train=TRAIN", "data.eval=TRAIN",
        "model.quantization=nf4", "data.padding_free=true", "data.row_lengths=3",
    ],
    "encoder": [
        "model.id=ENCODER", "task.kind=sequence_classification", "data.train=TRAIN",
        "data.eval=TRAIN", "data.max_length=48", "data.padding_free=true", "data.row_lengths=3",
        "method.targets=all-linear", "optim.learning_rate=1e-3",
    ],
    # Every rank routes its own tokens in its own way.
    "experts": [
        "model.id=MIXTURE", "method.targets=all-linear", "method.alpha=2",
        "method.train_router=true",
    ],
    "experts-nf4-checkpointed": [
        "model.id=MIXTURE", "method.targets=all-linear", "model.quantization=nf4",
        "engine.activation_checkpointing=true", "method.dropout=0.1", "method.alpha=2",
    ],
    "questions": [
        "model.id=ENCODER", "task.kind=question_answering", "data.train=QUESTIONS",
        "data.eval=QUESTIONS", "data.max_length=48", "task.stride=8", "model.quantization=int8",
        "method.targets=all-linear", "data.padding_free=true", "data.row_lengths=3",
    ],
    "images": [
        "model.id=VIT", "task.kind=image_classification", "data.train=IMAGES", "data.eval=IMAGES",
        "model.quantization=nf4", "method.targets=all-linear", "data.eval_split=train",
    ],
}  # fmt: skip
LONG = ("experts", "questions", "encoder")
STEPS = {variant: 20 if ALL or variant in LONG else 8 for variant in VARIANTS}
USUAL = [
    *itertools.product(["float32", "nf4"], ENGINES),
    ("nf4-bfloat16", "fsdp2"), ("packed-checkpointed-dropout", "deepspeed"),
    ("by-tokens", "ddp"), ("uneven", "peer"), ("classification", "fsdp2"), ("encoder", "fsdp2"),
    ("experts-nf4-checkpointed", "ddp"), ("questions", "peer"),
]  # fmt: skip
"""What `make test` runs: two variants under every engine, one of each kind of data under one."""
PAIRS = list(itertools.product(VARIANTS, ENGINES)) if ALL else USUAL
RUN = list(dict.fromkeys(variant for variant, _ in PAIRS))


def configuration(tmp, variant: str, engine: str) -> Config:
    places = {
        "TRAIN": "labels.csv", "QUESTIONS": "questions.jsonl", "MIXTURE": "mixture",
        "ENCODER": "encoder", "VIT": "vit", "IMAGES": "images",
    }  # fmt: skip
    changes = VARIANTS[variant]
    for name, place in places.items():
        changes = [change.replace(name, str(tmp / place)) for change in changes]
    if (variant, engine) == ("nf4", "deepspeed"):
        changes.append("engine.config=configs/deepspeed/zero3.json")
    return quick_config(
        tmp, f"run.steps={STEPS[variant]}", f"engine.kind={engine}", f"run.name={variant}-{engine}",
        "method.alpha=8", "data.batch_size=4", "data.eval_records=4", *changes,
    )  # fmt: skip


def question(number: int) -> str:
    """A line of SQuAD's form, whose context is longer than a window."""
    context = (
        f"There are {number} red apples, {number + 5} green ones and {2 * number} old ones here."
    )
    row = {"question": "how many red?", "context": context}
    answers = {"text": [str(number)], "answer_start": [10]}
    return json.dumps(row | {"answers": answers}) + "\n"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every variant under every engine with two processes, and in this process alone."""
    import os

    from tests.helpers import ROOT

    os.chdir(ROOT)
    tmp = tmp_path_factory.mktemp("engines")
    rows = [f"the {'good' if i % 3 else 'bad'} apple number {i},{i % 3 > 0}" for i in range(60)]
    (tmp / "labels.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    (tmp / "questions.jsonl").write_text("".join(map(question, range(30))))
    save_mixture(tmp / "mixture", "mixtral")
    without = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    save_random_model(tmp / "encoder", "bert", **without)
    save_vit(tmp / "vit")
    save_images(tmp / "images", 24)
    for variant in RUN:
        run(configuration(tmp, variant, "single"), World())
    cases = {
        f"{variant}-{engine}": ("train", configuration(tmp, variant, engine).model_dump())
        for variant, engine in PAIRS
    }
    for results in run_cases(tmp / "work", cases).values():
        ok(results)
    return tmp / "runs"


@pytest.mark.parametrize(("variant", "engine"), PAIRS)
def test_losses_agree_with_one_process(runs, variant, engine):
    alone, spread = losses(runs / f"{variant}-single"), losses(runs / f"{variant}-{engine}")
    assert len(alone) == len(spread) == STEPS[variant]
    quarter = len(alone) // 4
    assert sum(alone[-quarter:]) < sum(alone[:quarter])
    tolerance = 2e-2 if "bfloat16" in variant else 1e-4
    assert max(abs(a - b) / a for a, b in zip(alone, spread, strict=True)) <= tolerance


def gathering(tmp, engine: str, fmt: str, device: str = "cpu") -> Config:
    """A bfloat16 backbone whose packed bytes, seen as bfloat16, include many that mean NaN; of a
    mixture where `fmt` begins with `experts-`."""
    mixture = [f"model.id={tmp}/mixture"] if fmt.startswith("experts-") else []
    return quick_config(
        tmp, f"engine.kind={engine}", f"model.quantization={fmt.removeprefix('experts-')}",
        "model.dtype=bfloat16", f"engine.device={device}", "data.eval=null", *mixture,
    )  # fmt: skip


def check_gathered(tmp, device: str) -> None:
    """Every rank's gathered bytes under every sharder are those that one process packs."""
    save_mixture(tmp / "mixture", "mixtral")
    packed = [*FORMATS[1:], "experts-nf4", "experts-int8"]
    formats = packed if ALL or device == "cuda" else ["nf4", "int8", "experts-nf4"]
    cases = {
        f"{engine}-{fmt}": ("gathered", gathering(tmp, engine, fmt, device).model_dump())
        for engine in SHARDING
        for fmt in formats
    }
    results = run_cases(tmp / "work", cases, device=device)
    alone = {fmt: ("gathered", gathering(tmp, "single", fmt, device).model_dump())
             for fmt in formats}  # fmt: skip
    for fmt, result in run_cases(tmp / "alone", alone, 1, device).items():
        (expected,) = ok(result)
        assert len(expected) == (2 * (4 + 2) if fmt.startswith("experts-") else 28)
        for engine in SHARDING:
            for digests in ok(results[f"{engine}-{fmt}"]):
                assert digests == expected, f"{engine} {fmt}"


def test_packed_bytes_survive_sharding_and_gathering(tmp_path):
    check_gathered(tmp_path, "cpu")


@pytest.mark.parametrize(
    "nodes", sample([[[0, 1, 2]], [[0, 2], [1]], [[0], [1], [2]]], [[0, 2], [1]])
)
def test_windows_show_what_the_ranks_of_a_host_wrote(tmp_path, nodes):
    found = ok(run_cases(tmp_path, {"windows": ("windows", nodes)}, processes=3)["windows"])
    written = [[rank + 1, int((np.arange(1000) % (rank + 2)).sum())] for rank in range(3)]
    for rank, seen in enumerate(found):
        host = next(ranks for ranks in nodes if rank in ranks)
        assert seen == [written[other] for other in host]


@pytest.mark.parametrize(
    "case",
    sample(
        itertools.product(["peer", "fsdp2"], ["none", "nf4"]), ("peer", "nf4"), ("fsdp2", "none")
    ),
)
def test_blocks_that_stay_whole_change_nothing_but_memory(tmp_path, case):
    engine, fmt = case
    config = quick_config(
        tmp_path, f"engine.kind={engine}", f"model.quantization={fmt}", "model.weights=random",
        "model.overrides.num_hidden_layers=4", "model.overrides.hidden_size=256",
        "model.overrides.intermediate_size=512", "data.eval=null", "method.alpha=8",
    )  # fmt: skip
    case = {"whole": ("unsharded_blocks", config.model_dump())}
    for rank in ok(run_cases(tmp_path, case)["whole"]):
        none, two, four, one, again = rank
        for found in (two, four, one, again):
            assert found | {"bytes": 0} == none | {"bytes": 0}
        block = (four["bytes"] - none["bytes"]) / 4
        linear = 256 * (2 * 128 + 2 * 64 + 3 * 512) * BYTES[fmt]
        assert linear <= block <= 1.01 * linear  # alignment; under fsdp2 norms
        assert two["bytes"] - none["bytes"] == pytest.approx(2 * block)
        assert one["bytes"] - none["bytes"] == pytest.approx(block)
        assert again["bytes"] == none["bytes"]


@pytest.mark.parametrize("engine", sample(["peer", "fsdp2"], "fsdp2"))
def test_as_many_blocks_stay_whole_as_were_asked_for(tmp_path, engine):
    cases = {
        f"whole-{whole}": ("shard", quick_config(
            tmp_path, f"engine.kind={engine}", f"run.name=whole-{whole}", f"engine.unsharded_blocks={whole}",
            "model.weights=random", "model.overrides.num_hidden_layers=4", "data.train_records=8",
        ).model_dump()) for whole in (0, 1, 3, 5)
    }  # fmt: skip
    results = run_cases(tmp_path / "work", cases)
    held = {n: [rank["local_bytes"] for rank in ok(results[f"whole-{n}"])] for n in (0, 1, 3)}
    for none, one, three in zip(held[0], held[1], held[3], strict=True):
        assert three - none == 3 * (one - none) > 0
    first, other = results["whole-5"]
    assert "engine.unsharded_blocks: 5 given; accepted: at most 4" in first["message"]
    assert other["exit_code"] == first["exit_code"] != 0


def test_formats_are_not_all_the_same_run(runs):
    names = [name for name in ("float32", *FORMATS[1:]) if name in RUN]
    first = {losses(runs / f"{name}-single")[0] for name in names}
    assert len(first) == len(names) >= 2


SHARES = list(itertools.product(SHARDING, [*FORMATS, "bfloat16"] if ALL else ["nf4"]))


@pytest.fixture(scope="module")
def shares(tmp_path_factory):
    """Memory of a model of 100 MB or so (in its own format) under each sharding engine."""
    import os

    from tests.helpers import ROOT

    os.chdir(ROOT)
    tmp = tmp_path_factory.mktemp("shares")
    cases = {}
    for engine, fmt in SHARES:
        quantization = "none" if fmt == "bfloat16" else fmt
        config = quick_config(
            tmp, f"engine.kind={engine}", f"model.quantization={quantization}",
            f"model.dtype={'bfloat16' if fmt == 'bfloat16' else 'float32'}",
            "model.weights=random", "model.overrides.hidden_size=768",
            "model.overrides.intermediate_size=2048", "model.overrides.num_hidden_layers=10",
            "data.batch_size=2", "data.micro_batch_size=1", "data.train_records=2",
            "data.eval=null", "task.loss_on=all", "data.max_length=16", "method.rank=1",
        )  # fmt: skip
        cases[f"{engine}-{fmt}"] = ("shard", config.model_dump())
    return {name: ok(results) for name, results in run_cases(tmp / "work", cases).items()}


LINEAR = 10 * (768 * 128 * 2 + 768 * 64 * 2 + 3 * 768 * 2048)
BYTES = {"none": 4.0, "bfloat16": 2.0, "nf4": 0.5625, "fp4": 0.5625, "int8": 1.0, "fp8": 1.0}


@pytest.mark.parametrize(("engine", "fmt"), SHARES)
def test_each_rank_holds_half_of_the_backbone(shares, engine, fmt):
    """By the engine's account and by the process's resident memory, also inside a step."""
    whole = LINEAR * BYTES[fmt]
    block = whole / 10
    for rank in shares[f"{engine}-{fmt}"]:
        assert rank["kind"] == engine
        assert 0.48 * whole <= rank["local_bytes"] <= 0.56 * whole
        assert rank["resident_after_loading"] <= 0.56 * whole + max(12e6, 0.15 * whole)
        # Between forward and backward: up to 8 MB of activations, and two of ten blocks that may be
        # whole (ZeRO-3 keeps the last one and one on its way). Keeping all would be five more.
        assert rank["held_after_forward"] <= 3 * block + 8e6
        assert rank["held_after_backward"] <= block + 8e6
