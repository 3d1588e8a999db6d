"""The papers' recipes, configs/paper: each is what its table says, and trains here with a tiny model
of its architecture and local records in the form of its data."""

import importlib
import json
import re
import shlex
import shutil

import pytest
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from tests.conftest import shared
from tests.helpers import ROOT, losses, sample, save_random_model
from tests.images import save_images, save_vit
from trainer.config.config import load_config
from trainer.distributed.world import World
from trainer.records.jsonl import read_metrics
from trainer.run.run import run

FOLDER = ROOT / "configs/paper"
SETS = ("boolq", "ARC-Easy", "ARC-Challenge", "openbookqa")
AUTO = {"roberta": AutoModel, "deberta-v2": AutoModel, "t5": AutoModelForSeq2SeqLM, "bart": AutoModelForSeq2SeqLM}  # fmt: skip
T5 = {"decoder_start_token_id": 0, "num_decoder_layers": 2}
LLAMA = {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj"}
RECIPES = {  # name: (architecture, data, batch, peak learning rate, warm-up, weight decay, targets, set of ranks or rank, alpha)
    "lelora_glue_base": ("roberta", "glue", 128, 5e-4, 0.06, 0.1, {"query", "value"}, [0, 2, 4, 8], None),
    "lelora_glue_large": ("roberta", "glue", 32, 2e-4, 0.03, 0.0, {"query", "value"}, [0, 2, 4, 8], None),
    "lelora_commonsense": ("llama", "commonsense", 64, 3e-4, 100, 0.0, LLAMA, [0, 2, 4, 8, 16, 32], None),
    "lelora_math": ("mistral", "math", 64, 3e-4, 100, 0.0, LLAMA, [0, 2, 4, 8, 16, 32], None),
    "lelora_code": ("mistral", "code", 64, 3e-4, 100, 0.0, LLAMA, [0, 2, 4, 8, 16, 32], None),
    "lelora_instructions": ("mistral", "instructions", 64, 3e-4, 100, 0.0, LLAMA, [0, 2, 4, 8, 16, 32], None),
    "lalora_glue": ("roberta", "glue", 16, 5e-4, 0.06, 0.0, {"query", "value"}, 8, 8),
    "lalora_squad": ("deberta-v2", "squad", 16, 1e-3, 1000, 0.0, {"query_proj", "value_proj"}, 8, 16),
    "lalora_cnn_t5": ("t5", "cnn", 32, 1e-3, 0.06, 0.0, {"q", "v"}, 8, 16),
    "lalora_images": ("vit", "images", 128, 2e-3, 0.06, 0.0, {"q_proj", "v_proj"}, 16, 16),
    "lalora_commonsense": ("llama", "commonsense", 16, 2e-4, 100, 0.0, LLAMA, 16, 32),
    "weightlora_squad": ("deberta-v2", "squad", 64, 3e-4, 100, 1e-4, "all-linear", 8, 32),
    "weightlora_xsum": ("bart", "xsum", 128, 3e-4, 100, 1e-4, "all-linear", 8, 32),
    "weightlora_glue_attention": ("deberta-v2", "glue", 64, 5e-4, 100, 1e-4, {"query_proj", "key_proj", "value_proj"}, 8, 32),
    "weightlora_glue": ("deberta-v2", "glue", 192, 3e-4, 100, 1e-4, "all-linear", 8, 16),
    "weightlora_llama3_glue": ("llama", "glue", 32, 3e-4, 25, 1e-4, "all-linear", 8, 32),
    "weightlora_qwen3_gsm8k": ("qwen3", "gsm8k", 32, 3e-4, 500, 1e-4, "all-linear", 8, 32),
    "weightlora_qwen3_arc": ("qwen3", "arc", 32, 3e-4, 500, 1e-4, "all-linear", 8, 32),
}  # fmt: skip


GENERATED = {"weightlora_qwen3_gsm8k": "exact_match", "lalora_cnn_t5": "rougeL", "weightlora_xsum": "rougeL"}  # fmt: skip
"""Recipes whose evaluations score generated answers, and the score."""


def test_every_recipe_is_tried_here():
    assert {file.stem for file in FOLDER.glob("*.yaml")} == RECIPES.keys()


@pytest.mark.parametrize("name", RECIPES)
def test_it_is_what_the_table_says(name):
    config = load_config(FOLDER / f"{name}.yaml")
    _, _, batch, rate, warmup, decay, targets, ranks, alpha = RECIPES[name]
    method, optim = config.method, config.optim
    assert (config.data.batch_size, optim.learning_rate, optim.weight_decay) == (batch, rate, decay)
    assert (optim.warmup_steps or optim.warmup_ratio, optim.schedule) == (warmup, "linear")
    assert (targets if isinstance(targets, str) else sorted(targets)) == (
        method.targets if isinstance(method.targets, str) else sorted(method.targets)
    )
    if method.kind == "lelora":
        policy = method.policy
        assert method.ranks == ranks and method.locations == ["primary", "medium", "minor"]
        assert (policy.learning_rate, policy.validation_samples, policy.head_scale) == (1e-3, 32, 1)
        assert (policy.credit, policy.network) == ("global", "mlp")
    else:
        assert (method.rank, method.alpha) == (ranks, alpha)
    if method.kind == "lalora":
        assert (method.gamma, method.every, method.growth) == (1, 1, "printed")
        assert (method.fidelity, method.contribution_scale) == ("previous_over_current", "sum")
        assert (method.contribution, method.budget) == ("norm", "gradual")
    if method.kind == "weightlora":
        assert optim.betas == [0.9, 0.99] and method.expand == "reinit"
    assert config.run.name == f"paper_{name}"
    assert (config.generation.records > 0) == (name in GENERATED)


def rows(kind: str) -> list[dict]:
    """Local records with the columns of the data set that the recipe names."""
    if kind == "glue":
        lines = shared("data/glue/SST-2/dev.tsv").read_text().splitlines()[1:65]
        pairs = [line.rsplit("\t", 1) for line in lines]
        return [{"idx": n, "sentence": s, "label": int(y)} for n, (s, y) in enumerate(pairs)]
    if kind == "arc":
        asked = [("Which is a fruit?", ["stone", "plum", "nail", "rope"], "B")] * 64
        return [
            {"question": q, "choices": {"text": t, "label": list("ABCD")}, "answerKey": a}
            for q, t, a in asked
        ]
    if kind == "squad":
        questions = [("Who wrote it?", "Anna"), ("Where?", "in Rome")] * 32
        return [
            {"id": str(n), "question": asked, "context": "Anna wrote it in Rome.",
             "answers": {"text": [given], "answer_start": ["Anna wrote it in Rome.".index(given)]}}
            for n, (asked, given) in enumerate(questions)
        ]  # fmt: skip
    names = {"cnn": ("article", "highlights"), "xsum": ("document", "summary"), "gsm8k": ("question", "answer"), "math": ("query", "response"), "code": ("query", "answer"), "instructions": ("instruction", "output")}  # fmt: skip
    asked, answered = names[kind]
    found = []
    with shared("data/gsm8k/train.jsonl").open() as lines:
        for line, _ in zip(lines, range(300), strict=False):
            row = json.loads(line)
            found.append({asked: row["question"][:60], answered: f"{row['answer'][:60]}\n#### 5"})
    return found


@pytest.mark.parametrize(
    "name",
    sample(
        RECIPES, "lelora_glue_base", "lelora_commonsense", "weightlora_qwen3_gsm8k", "lalora_images"
    ),
)
def test_it_trains(name, tmp_path):
    architecture, kind, *_ = RECIPES[name]
    if architecture == "vit":
        save_vit(tmp_path / "model")
    else:
        auto = AUTO.get(architecture, AutoModelForCausalLM)
        start = T5 if architecture == "t5" else {}
        save_random_model(tmp_path / "model", architecture, auto, **start)
    given = [
        f"model.id={tmp_path}/model", f"run.dir={tmp_path}/runs", f"data.cache={tmp_path}/cache",
        "run.epochs=null", "run.steps=3", "run.eval_every=1", "log.every=1", "log.progress=none",
        "log.tensorboard=false", "data.max_length=160", "data.batch_size=4",
        "data.micro_batch_size=4", "optim.warmup_ratio=null", "optim.warmup_steps=1",
        "engine.kind=single", "run.verify=off",
    ]  # fmt: skip
    if kind == "images":
        folder = save_images(tmp_path / "images/train", 24).parent
        shutil.copytree(folder / "train", folder / "test")
        given += [f"data.train={folder}", f"data.eval={folder}", "data.image=image", "data.label=label",
                  "data.eval_records=6"]  # fmt: skip
    elif kind == "commonsense":
        files = {name: str(shared(f"data/commonsense/{name}/test.json")) for name in SETS}
        given += [f"data.train={shared('data/commonsense/ARC-Easy/train.json')}",
                  f"data.eval={json.dumps(files)}", "data.train_records=60", "data.eval_records=4"]  # fmt: skip
    else:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows(kind)))
        config = load_config(FOLDER / f"{name}.yaml")
        given += [f"data.train={file}", "data.subset=null"]
        if not isinstance(config.data.eval, float):
            given += [f"data.eval={file}", "data.eval_records=8"]
    if name.startswith("lelora"):
        given += ["method.ranks=[0, 2, 4, 8]"]
    if name in GENERATED:
        given += ["generation.records=2", "generation.max_new_tokens=4"]
    config = load_config(FOLDER / f"{name}.yaml", given)
    run(config, World())
    assert len(losses(config.run_folder)) == 3
    evaluated = [m for m in read_metrics(config.run_folder / "metrics.jsonl") if "eval_loss" in m]
    assert len(evaluated) == 3
    if kind == "commonsense":
        assert all(f"eval_{name}_accuracy" in evaluated[-1] for name in SETS)
    if config.run.keep_best is not None:
        assert config.run.keep_best in evaluated[-1]
    if name in GENERATED:
        assert all(0 <= line[f"eval_{GENERATED[name]}"] <= 1 for line in evaluated)
    assert (config.run_folder / "adapter/adapter_model.safetensors").is_file()


def commands(name: str) -> list[list[str]]:
    """The commands in the comment of a recipe, as a shell splits them."""
    lines = (FOLDER / f"{name}.yaml").read_text().splitlines()
    comment = "\n".join(line[1:].strip() for line in lines if line.startswith("#"))
    found = re.findall(r"^rankcast (?:.*\\\n)*.*$", comment, re.MULTILINE)
    return [shlex.split(command.replace("\\\n", " ")) for command in found]


PROBLEMS = {  # a row of each set that a command names
    "openai/gsm8k": {"question": "1 + 1?", "answer": "It is 2.\n#### 2"},
    "HuggingFaceH4/MATH-500": {"problem": "1 + 1?", "solution": r"It is \boxed{2}."},
    "openai/openai_humaneval": {
        "prompt": "def one():\n", "entry_point": "one",
        "test": "def check(one):\n    assert one() == 1\n",
    },
    "google-research-datasets/mbpp": {
        "text": "Return 1.", "test_list": ["assert one() == 1", "assert one() < 2"],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ["lelora_math", "lelora_code"])
def test_its_commands_give_the_scores_of_generated_answers(name, tmp_path, capsys):
    save_random_model(tmp_path / "model", "mistral", AutoModelForCausalLM)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows(RECIPES[name][1])[:40]))
    config = load_config(FOLDER / f"{name}.yaml", [
        f"model.id={tmp_path}/model", f"run.dir={tmp_path}/runs", f"data.cache={tmp_path}/cache",
        f"data.train={file}", "data.eval=null", "run.epochs=null", "run.steps=1", "run.eval_every=0",
        "data.batch_size=4", "data.micro_batch_size=4", "data.max_length=160", "run.verify=off",
        "optim.warmup_steps=0", "method.ranks=[0, 2]", "method.policy.validation_samples=4",
        "log.tensorboard=false", "log.progress=none", "engine.kind=single",
    ])  # fmt: skip
    run(config, World())
    found = []
    for _, verb, source, *arguments in commands(name):
        assert source == f"runs/paper_{name}"
        for number, (hub_id, row) in enumerate(PROBLEMS.items()):
            (tmp_path / f"{number}.jsonl").write_text((json.dumps(row) + "\n") * 8)
            arguments = [one.replace(hub_id, f"{tmp_path}/{number}.jsonl") for one in arguments]
        few = ["generation.max_new_tokens=4", "data.subset=null", "data.max_length=400"]
        if verb == "evaluate":
            few.append("generation.records=1")
        importlib.import_module(f"launch.{verb}").main([str(config.run_folder), *arguments, *few])
        found.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    expected = {
        "lelora_math": ["eval_exact_match", "eval_math"], "lelora_code": ["pass@1", "pass@1"],
    }[name]  # fmt: skip
    assert [scores[key] for scores, key in zip(found, expected, strict=True)] == [0, 0]
