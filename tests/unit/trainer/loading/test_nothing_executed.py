"""Files and names that would have something executed, or read or written where they should not."""

import ast
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from tests.helpers import QUICKSTART, ROOT, TINY, quick_config
from tests.hostile import attempt
from trainer.config.config import load_config
from trainer.config.data_options import DataOptions
from trainer.config.yaml import parse_yaml
from trainer.data.sources import read_rows
from trainer.data.tokenise import prepare
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.loading.safetensors_files import PretrainedFiles
from trainer.model.build import build
from trainer.model.hub import load_tokenizer
from trainer.run.introduction import _unpinned
from trainer.run.run import run
from trainer.tasks.causal_lm import CausalLM, CausalLMOptions
from trainer.tasks.registry import TASKS

# --- the source itself

SOURCES = [
    path for folder in ("trainer", "adapters", "launch") for path in (ROOT / folder).rglob("*.py")
]
MODULES = {
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "subprocess",
    "imp",
}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.hub.load",
         "importlib.import_module", "runpy.run_path", "yaml.unsafe_load", "yaml.full_load",
         "torch.jit.load", "torch.package.PackageImporter"}  # fmt: skip
OWN = {
    # Pickled is this process's own, and sent through a pipe to processes that it started.
    "trainer/data/workers.py": ("import pickle", "from joblib import cpu_count"),
    # The command as it was given, once a rank.
    "trainer/distributed/local_ranks.py": ("import subprocess",),
    # Programs that a model wrote run where `--run-code` asks for it, in a process apart.
    "trainer/generation/code.py": ("import subprocess",),
    "trainer/generation/code_child.py": (
        "exec(compile(text, 'program', 'exec'), {'__name__': 'program'})",
        "compile(text, 'program', 'exec')",
    ),
    "trainer/__init__.py": (  # of a table
        "importlib.import_module('trainer.records.bars')",
        "importlib.import_module(_API[name])",
    ),
    "trainer/generation/scores.py": ("importlib.import_module(library)",),  # of a table
}
"""Lines that a file may have."""
KNOWN = ("importlib.import_module(module)",)  # of the registries and of the commands
REMOTE = {
    "AutoConfig.from_pretrained",
    "AutoTokenizer.from_pretrained",
    "task.auto_class.from_config",
}


def offences(tree: ast.AST) -> list[str]:
    """Calls and imports that execute what a file or a name says, as `line: source`."""
    found = []
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        wrong = any(name.split(".")[0] in MODULES for name in names)
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            wrong = (
                name in CALLS
                or (name == "torch.load" and given.get("weights_only") != "True")
                or (
                    name == "yaml.load"
                    and given.get("Loader") not in ("_Loader", "yaml.SafeLoader")
                )
                or (
                    name in ("np.load", "numpy.load")
                    and given.get("allow_pickle", "False") != "False"
                )
                or given.get("trust_remote_code", "False") != "False"
                or (name in REMOTE and "trust_remote_code" not in given)
                or given.get("shell", "False") != "False"
            )
        if wrong and ast.unparse(node) not in KNOWN:
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source_executes_no_input(path):
    own = OWN.get(str(path.relative_to(ROOT)), ())
    found = offences(ast.parse(path.read_text()))
    assert [line for line in found if line.partition(": ")[2] not in own] == []


@pytest.mark.parametrize("line", [
    "import pickle", "from joblib import load", "eval(x)", "torch.load(f)", "torch.load(f, weights_only=False)",
    "yaml.load(t, Loader=yaml.Loader)", "yaml.load(t)", "f(trust_remote_code=True)", "f(trust_remote_code=x)",
    "AutoConfig.from_pretrained(x)", "np.load(f, allow_pickle=True)", "run(c, shell=True)", "os.system(x)",
])  # fmt: skip
def test_the_check_of_the_source_sees(line):
    assert offences(ast.parse(line))


def test_one_place_parses_yaml_of_others():
    """`yaml.safe_load` knows aliases; it is for what this program has written itself."""
    users = [p.name for p in SOURCES if "yaml.safe_load(" in p.read_text()]
    assert users == ["launch.py"]


# --- configuration


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{key}: &{key} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, key in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize("text", [
    BOMB, "a: &a [*a]\n", "a: &a {b: 1}\nc: {<<: *a}\n", "!!python/object/apply:os.system [id]",
    "!!python/object/new:os.system [id]", "a: !!python/name:os.system", "a: !!python/module:os",
    "a: !!bool x", "a: !!int ''", "a: !!timestamp x", "a: !!map [b]", "a: 0x" + "f" * 5000, "a: 9223372036854775808",
    "a: " + "[" * 5000,
], ids=range(14))  # fmt: skip
def test_yaml_that_is_refused(tmp_path, text):
    outcome = attempt(tmp_path, lambda: parse_yaml(text, "file"))
    assert isinstance(outcome, UserError) and "not valid YAML" in str(outcome)


@pytest.mark.parametrize(
    "name",
    ["..", ".", "../x", "/x", "a/b", "a\\b", "..\n", "~", "a\0", "-/..", "\u202e", "a" * 300],
)
def test_run_names_stay_in_the_folder_of_runs(tmp_path, name):
    outcome = attempt(tmp_path, lambda: load_config(QUICKSTART, [f"run.name={json.dumps(name)}"]))
    assert isinstance(outcome, UserError) and "run.name" in str(outcome)


READ = ["data.train", "model.id", "model.tokenizer", "engine.config", "run.resume"]
REFUSED = [(key, value) for key in ["run.dir", "data.cache", *READ] for value in ("\0", "a" * 300)]
REFUSED += [(key, value) for key in READ for value in ("/proc/self/mem", "/dev/null/x.jsonl")]


@pytest.mark.parametrize(("key", "value"), REFUSED, ids=range(len(REFUSED)))
def test_paths_that_the_system_refuses(tmp_path, key, value):
    def start() -> None:
        changes = ["engine.kind=deepspeed"] if key == "engine.config" else []
        config = quick_config(tmp_path, *changes, f"{key}={json.dumps(value)}", "run.steps=1")
        run(config, World())

    assert isinstance(attempt(tmp_path, start), UserError)


def test_what_the_hub_may_change_is_noted(tmp_path):
    assert list(_unpinned(quick_config(tmp_path))) == []
    hub = ["model.id=a/b", "data.train=a/c", "data.eval=a/d"]
    found = [key for key, *_ in _unpinned(quick_config(tmp_path, *hub, "model.tokenizer=a/t"))]
    assert found == ["model.id", "model.tokenizer", "data.train", "data.eval"]
    fixed = [*hub, "model.revision=x", "data.revision=y"]
    assert list(_unpinned(quick_config(tmp_path, *fixed))) == []


# --- models


@pytest.fixture
def model(tmp_path):
    """A copy of the quickstart's model, and a module that leaves a mark when it is imported."""
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\nclass Evil: pass\n")
    return folder


def edited(folder: Path, file: str, **changes) -> None:
    values = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**values, **changes}))


REMOTE_CODE = dict.fromkeys(
    ("AutoConfig", "AutoModelForCausalLM", "AutoModelForSequenceClassification"), "evil.Evil"
) | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model_type": "evil"},
        {"model_type": "vit"},  # known, but no language model: auto_map would be all there is
        {"attn_implementation": "evil/kernel", "_attn_implementation": "evil/kernel"},
        {"experts_implementation": "evil/kernel"},
    ],
    ids=lambda changes: "-".join(changes.values()) or "auto_map",
)
def test_code_beside_a_model_is_not_run(tmp_path, model, changes, monkeypatch):
    edited(model, "config.json", auto_map=REMOTE_CODE, **changes)
    edited(model, "tokenizer_config.json", auto_map=REMOTE_CODE)
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # nobody is asked
    config = quick_config(tmp_path, f"model.id={model}", "run.steps=1")

    def build_it() -> None:
        tokenizer = load_tokenizer(config.model)
        task = TASKS["causal_lm"](config.task, tokenizer)
        built = build(config, task, torch.device("cpu"))
        assert built.model.config._attn_implementation in ("sdpa", "eager")

    attempt(tmp_path, build_it)
    assert not (tmp_path / "mark").exists() and "evil" not in sys.modules


@pytest.mark.parametrize(
    "key", ["auto_map", "to_dict", "__class__", "_attn_implementation", "from_dict"]
)
def test_overrides_are_keys_of_the_configuration(tmp_path, model, key):
    config = quick_config(
        tmp_path, f"model.id={model}", "model.weights=random", f"model.overrides.{key}=evil"
    )
    task = CausalLM(CausalLMOptions(), load_tokenizer(config.model))
    outcome = attempt(tmp_path, lambda: build(config, task, torch.device("cpu")))
    assert f"model.overrides: {key}: not a key of" in str(outcome)


class Mark:
    """Unpickled, it leaves a mark."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_under_the_name_of_safetensors(tmp_path, model):
    (model / "model.safetensors").write_bytes(pickle.dumps(Mark(tmp_path / "mark")))
    outcome = attempt(tmp_path, lambda: PretrainedFiles(model).digest())
    assert "not a readable safetensors file" in str(outcome) and not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/hostname", "sub/a.safetensors", "..", "",
                                  "a" * 300, 7, None, ["a"], "\0"])  # fmt: skip
def test_index_that_names_files_elsewhere(tmp_path, model, name):
    (model / "sub").mkdir()
    for file in (tmp_path / "outside.safetensors", model / "sub/a.safetensors"):
        save_file({"x": torch.ones(1)}, file)
    index = {"weight_map": {"x": name}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    outcome = attempt(tmp_path, lambda: PretrainedFiles(model))
    assert isinstance(outcome, UserError) and "index" in str(outcome)


# --- data


def test_chat_templates_run_in_a_sandbox(tmp_path, tokenizer):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    escape = "''.__class__.__base__.__subclasses__()"
    tokenizer.chat_template = f"{{% for c in {escape} %}}{{{{ c }}}}{{% endfor %}}"
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": chat}))
    path = str(tmp_path / "chat.jsonl")
    options = DataOptions(train=path, cache=str(tmp_path / "cache"))
    task = CausalLM(CausalLMOptions(), tokenizer)
    outcome = attempt(tmp_path, lambda: prepare(path, "train", None, options, task))
    assert "the chat template refuses it" in str(outcome) and "unsafe" in str(outcome)


def test_templates_of_the_data_are_no_code(tmp_path):
    (tmp_path / "d.jsonl").write_text(
        json.dumps({"prompt": "{completion}{0.__class__}", "completion": "x"})
    )
    path = str(tmp_path / "d.jsonl")
    options = DataOptions(train=path, prompt="{prompt} {prompt.__class__} {0}")
    ((_, row),) = read_rows(path, "train", options, None)
    from trainer.data.formats import BadRecord, to_records

    with pytest.raises(BadRecord, match="no column '0'"):
        to_records(row, "prompt_completion", options, None)
    options = DataOptions(train=path, prompt="{prompt} {prompt.__class__}")
    (record,) = to_records(row, "prompt_completion", options, None)
    assert record.segments[0][0] == "{completion}{0.__class__} {prompt.__class__}"


def test_parquet_with_a_pickled_type(tmp_path):
    metadata = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(Mark(tmp_path / "mark")),
    }
    schema = pa.schema(
        [pa.field("prompt", pa.string(), metadata=metadata), ("completion", pa.string())]
    )
    table = pa.table({"prompt": ["a"], "completion": ["b"]}).cast(schema)
    path = str(tmp_path / "d.parquet")
    pq.write_table(table, path)
    options = DataOptions(train=path)
    attempt(tmp_path, lambda: list(read_rows(path, "train", options, None)))
    assert not (tmp_path / "mark").exists()


def test_half_a_surrogate_pair_is_a_bad_record(tmp_path, tokenizer):
    path = tmp_path / "d.jsonl"
    path.write_text(
        '{"prompt": "a", "completion": "b"}\n{"prompt": "\\ud83d", "completion": "b"}\n'
    )
    task = CausalLM(CausalLMOptions(), tokenizer)
    options = DataOptions(train=str(path), cache=str(tmp_path / "cache"), on_bad_record="skip")
    held = prepare(str(path), "train", None, options, task)
    assert (len(held), held.counts.bad) == (1, 1)


def test_integer_labels_of_any_length(tokenizer):
    task = TASKS["sequence_classification"](
        TASKS["sequence_classification"].Options(kind="sequence_classification"), tokenizer
    )
    task.learn_labels(["9" * 5000, "10", "9", "x"])
    assert task.labels_state()["labels"] == ["9", "10", "9" * 5000, "x"]
