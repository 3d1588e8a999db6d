"""What a user can get wrong: one clear line, a non-zero exit on every rank, no hang, no damage.

The whole table runs on two real processes: in every case both ranks must end in an error within
seconds, and exactly one of them with something to say.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers import ROOT, TINY, error_lines, python, quick_config
from tests.world.cases import ok, run_cases
from trainer.config.config import load_config
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.run.run import run

RECORD = '{"question": "What is 1 + 1?", "answer": "2"}\n'

# name: (files to write, overrides, what the one line must say)
CASES = {
    "missing data file": ({}, ["data.train=TMP/none.jsonl"], ["TMP/none.jsonl", "no such file"]),
    "empty data file": ({"e.jsonl": ""}, ["data.train=TMP/e.jsonl"], ["e.jsonl", "empty file"]),
    "broken JSON": (
        {"b.jsonl": RECORD + '{"question": \n'}, ["data.train=TMP/b.jsonl"],
        ["b.jsonl:2", "broken JSON", "data.on_bad_record=skip"],
    ),
    "not UTF-8": (
        {"l.jsonl": RECORD.encode() + b"\xe9\xff\n"}, ["data.train=TMP/l.jsonl"],
        ["l.jsonl:2", "not UTF-8"],
    ),
    "missing column": (
        {"c.jsonl": RECORD}, ["data.train=TMP/c.jsonl", "data.completion=reply"],
        ["c.jsonl:1", "no column 'reply'", "question, answer"],
    ),
    "record too long": (
        {"r.jsonl": RECORD * 3}, ["data.train=TMP/r.jsonl", "data.max_length=12",
                                  "data.on_long_record=stop"],
        ["r.jsonl:1", "data.max_length (12 tokens)"],
    ),
    "ragged table": (
        {"t.csv": "question,answer\na,b\nc\n"}, ["data.train=TMP/t.csv"],
        ["t.csv:3", "1 columns, expected 2"],
    ),
    "not a data file": ({"x.bin": "x"}, ["data.train=TMP/x.bin"], ["x.bin", "accepted: .json"]),
    "unknown hub data set": (
        {}, ["data.train=nobody/nothing"], ["nobody/nothing", "neither a local file"],
    ),
    "unknown target module": (
        {}, ["method.targets=[q_prj]"], ["method.targets", "'q_prj'", "did you mean 'q_proj'"],
    ),
    "rank larger than the matrix": (
        {}, ["method.rank=65", "method.targets=[k_proj]"], ["method.rank: 65", "at most 64", "k_proj"],
    ),
    "model folder missing": ({}, ["model.id=TMP/nowhere"], ["model.id", "nowhere", "no such folder"]),
    "model without config": ({"m/x": ""}, ["model.id=TMP/m"], ["model.id", "TMP/m"]),
    "pickle instead of safetensors": (
        {}, ["model.id=TMP/pickled"], ["pickled", "pytorch_model.bin", "accepted: .safetensors"],
    ),
    "truncated weights": ({}, ["model.id=TMP/cut"], ["cut", "not a readable safetensors file"]),
    "missing tensor": (
        {}, ["model.id=TMP/holes"], ["holes", "no tensor for model.layers.2.mlp.up_proj.weight"],
    ),
    "tensor of another shape": (
        {}, ["model.id=TMP/shape"], ["shape", "(4, 4)", "config.json makes it"],
    ),
    "prequantised weights": ({}, ["model.id=TMP/quant"], ["quant", "quantised already"]),
    "flash attention on a CPU": (
        {}, ["model.attention=flash_attention_2"], ["model.attention=flash_attention_2"],
    ),
    "impossible override of the model": (
        {}, ["model.weights=random", "model.overrides.num_attention_heads=7"], ["model.", "7"],
    ),
    "encoder asked to predict": ({}, ["model.id=TMP/bert"], ["task.kind: causal_lm", "encoder"]),
    "one label only": (
        {"one.csv": "text,label\na,1\nb,1\n"},
        ["task.kind=sequence_classification", "data.train=TMP/one.csv"],
        ["data.label", "one label only"],
    ),
    "single engine with two processes": (
        {}, ["engine.kind=single"], ["engine.kind: single", "2 processes"],
    ),
    "DeepSpeed JSON broken": (
        {"d.json": "{"}, ["engine.kind=deepspeed", "engine.config=TMP/d.json"],
        ["engine.config", "d.json", "broken JSON"],
    ),
    "DeepSpeed JSON with its own optimizer": (
        {"o.json": '{"optimizer": {"type": "Adam"}}'},
        ["engine.kind=deepspeed", "engine.config=TMP/o.json"], ["engine.config", "optimizer"],
    ),
    "DeepSpeed JSON that contradicts": (
        {"s.json": '{"zero_optimization": {"stage": 2}}'},
        ["engine.kind=deepspeed", "engine.config=TMP/s.json"],
        ["zero_optimization.stage: 2", "accepted: 3"],
    ),
    "run folder not writable": ({"file": ""}, ["run.dir=TMP/file"], ["run.dir", "file"]),
    "resume from nothing": ({}, ["run.resume=TMP/none"], ["none", "no checkpoint"]),
    "truncated checkpoint": ({}, ["run.resume=TMP/truncated"], ["truncated", "bytes"]),
    "damaged checkpoint": ({}, ["run.resume=TMP/damaged"], ["damaged", "checksum"]),
    "checkpoint of another backbone": (
        {}, ["run.resume=TMP/good", "model.id=TMP/other"], ["made on another backbone"],
    ),
    "checkpoint of another method": (
        {}, ["run.resume=TMP/good", "method.rank=4"], ["method.rank: 4", "made with 8"],
    ),
    "checkpoint of other data": (
        {"n.jsonl": RECORD}, ["run.resume=TMP/good", "data.train=TMP/n.jsonl"], ["data.train"],
    ),
    "older checkpoint of a longer run": (
        {}, ["run.resume=RUN/checkpoints/step-00000002", "run.name=base"], ["older than"],
    ),
    "run started anew over another": (
        {}, ["run.resume=never", "run.name=base"], ["run.resume: never", "holds a run already"],
    ),
}  # fmt: skip


def prepare(tmp):
    """A base run with checkpoints, and damaged models and checkpoints beside it."""
    base = quick_config(
        tmp, "run.name=base", "run.steps=4", "checkpoint.every=2", "run.eval_every=0"
    )
    run(base, World())
    for name in ("pickled", "cut", "holes", "shape", "quant", "other"):
        shutil.copytree(TINY, tmp / name)
    weights = "model.safetensors"
    (tmp / "pickled" / weights).rename(tmp / "pickled/pytorch_model.bin")
    (tmp / "cut" / weights).write_bytes((TINY / weights).read_bytes()[:-1000])
    tensors = load_file(TINY / weights)
    up = "model.layers.2.mlp.up_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != up}, tmp / "holes" / weights)
    save_file({**tensors, up: torch.zeros(4, 4)}, tmp / "shape" / weights)
    save_file({**tensors, up: tensors[up] * 1.01}, tmp / "other" / weights)
    config = json.loads((TINY / "config.json").read_text())
    quantised = {**config, "quantization_config": {"quant_method": "fp8"}}
    (tmp / "quant/config.json").write_text(json.dumps(quantised))
    shutil.copytree(TINY, tmp / "bert")
    bert = {"model_type": "bert", "hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 512,
            "num_attention_heads": 2, "intermediate_size": 64}  # fmt: skip
    (tmp / "bert/config.json").write_text(json.dumps(bert))
    good = base.run_folder / "checkpoints/step-00000004"
    for name in ("good", "truncated", "damaged"):
        shutil.copytree(good, tmp / name)
    shard = next((tmp / "truncated").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-50])
    shard = next((tmp / "damaged").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-9] ^= 4
    shard.write_bytes(content)
    for files, *_ in CASES.values():
        for name, text in files.items():
            (tmp / name).parent.mkdir(exist_ok=True)
            (tmp / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return base


def snapshot(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    import os

    os.chdir(ROOT)
    tmp = tmp_path_factory.mktemp("bad")
    base = prepare(tmp)
    before = snapshot(base.run_folder)
    cases = {}
    for name, (_, overrides, _) in CASES.items():
        changes = [
            o.replace("TMP", str(tmp)).replace("RUN", str(base.run_folder)) for o in overrides
        ]
        config = quick_config(
            tmp, "engine.kind=ddp", f"run.name=bad-{len(cases)}", "checkpoint.every=2", *changes
        )
        cases[name] = ("train", config.model_dump())
    cases["and the processes still work"] = (
        "train", quick_config(tmp, "engine.kind=ddp", "run.name=fine").model_dump(),
    )  # fmt: skip
    results = run_cases(tmp / "work", cases)
    return tmp, results, before, snapshot(base.run_folder)


@pytest.mark.parametrize("name", list(CASES))
def test_one_line_on_one_rank_and_an_error_on_every_rank(outcome, name):
    tmp, results, _, _ = outcome
    ranks = results[name]
    for rank in ranks:
        assert "error" in rank, f"{name} was accepted"
        assert rank["exit_code"] == 2
        assert rank["seconds"] < 20
    speaking = [rank for rank in ranks if rank["error"] != "FailedElsewhere"]
    assert len(speaking) == 1, ranks
    message = speaking[0]["message"]
    assert speaking[0]["error"] in ("UserError", "BadCheckpoint"), speaking[0]["traceback"]
    for part in CASES[name][2]:
        assert part.replace("TMP", str(tmp)) in message
    assert len(message) < 600


def test_no_damage_and_nothing_left_behind(outcome):
    tmp, results, before, after = outcome
    assert before == after
    assert not list((tmp / "runs").glob("bad-*")), "a run that never began has a folder"
    ok(results["and the processes still work"])
    assert len(CASES) >= 20


def test_alone_the_exit_code_is_2_and_nothing_is_created(tmp_path):
    code, _, err = python(
        "launch/train.py", "--config", "configs/quickstart.yaml", "optim.learning_rate=-1",
        f"run.dir={tmp_path}", seconds=60,
    )  # fmt: skip
    assert code == 2
    assert err.strip() == "error: optim.learning_rate: -1 given; accepted: greater than 0"
    assert not list(tmp_path.iterdir())


def test_two_processes_with_different_configurations(tmp_path):
    script = tmp_path / "start.py"
    script.write_text(
        "import os, runpy, sys\n"
        f"sys.argv = ['train.py', '--config', '{ROOT}/configs/quickstart.yaml', "
        f"'run.dir={tmp_path}/runs', 'engine.kind=ddp', f\"method.rank={{4 + int(os.environ['RANK'])}}\"]\n"
        f"runpy.run_path('{ROOT}/launch/train.py', run_name='__main__')\n"
    )
    code, out, err = python(script, processes=2, seconds=60)
    lines = error_lines(out + "\n" + err)
    assert code != 0
    assert len(lines) == 1 and "method.rank: 4 on rank 0, 5 on rank 1" in lines[0]
    assert not (tmp_path / "runs").exists()


def test_a_rank_whose_disk_is_full_stops_both(tmp_path):
    """One rank may write no more than 60 kB: the checkpoint fails, and the one before it stays."""
    base = quick_config(tmp_path, "engine.kind=ddp", "run.steps=2", "checkpoint.every=2")
    later = quick_config(tmp_path, "engine.kind=ddp", "run.steps=4", "checkpoint.every=2")
    results = run_cases(
        tmp_path / "work",
        {
            "base": ("train", base.model_dump()),
            "full": ("train_on_a_full_disk", later.model_dump()),
        },
    )
    ok(results["base"])
    for rank in results["full"]:
        assert rank["exit_code"] == 1 and rank["seconds"] < 30
    messages = [r["message"] for r in results["full"] if r["error"] == "RunFailed"]
    assert len(messages) == 1
    assert "step 4 could not be written" in messages[0] and "step-00000002" in messages[0]
    saved = sorted(path.name for path in (base.run_folder / "checkpoints").iterdir())
    assert saved == ["step-00000002"]


def test_messages_of_the_configuration_name_the_key(tmp_path):
    """The rest of the table needs no processes; tests/unit/trainer/config/test_config.py has all of it."""
    with pytest.raises(UserError, match=r"model.quantization: 'nf5' given.*did you mean 'nf4'"):
        load_config(ROOT / "configs/quickstart.yaml", ["model.quantization=nf5"])
