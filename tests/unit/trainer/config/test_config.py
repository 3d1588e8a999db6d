"""The configuration: what is refused, in which words, and how overrides apply."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import QUICKSTART
from trainer.config.config import Config, load_config, on_engine, parse_config, with_overrides
from trainer.errors import UserError

MINIMAL: dict[str, Any] = {"model": {"id": "some/model"}, "data": {"train": "train.jsonl"}}


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    """The smallest configuration with `section.key` (or whole `section`) values put in."""
    raw = copy.deepcopy(MINIMAL)
    for path, value in changes.items():
        section, dot, key = path.partition(".")
        if dot:
            raw.setdefault(section, {})[key] = value
        else:
            raw[section] = value
    return raw


def refusal(raw: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        parse_config(raw)
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    return message


def file_of(folder: Path, text: str | bytes, name: str = "my-run.yaml") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


MINIMAL_TEXT = "model: {id: some/model}\ndata: {train: train.jsonl}\n"

# (what is changed, what the line must say: the key, the value given, the values accepted)
REFUSED = {
    # unknown keys, with the nearest known one
    "unknown section": (
        {"optimizer": {}},
        ["optimizer: unknown key", "accepted: run, model, task", "did you mean 'optim'?"],
    ),
    "unknown key": (
        {"run.sed": 1},
        ["run.sed: unknown key", "name, dir, seed, steps", "did you mean 'seed'?"],
    ),
    "unknown key of the method": (
        {"method.rnak": 4},
        ["method.rnak: unknown key", "targets", "did you mean 'rank'?"],
    ),
    "unknown key like no other": ({"log.zzz": 1}, ["log.zzz: unknown key", "accepted: every"]),
    "key of the other task": (
        {"task.problem": "regression"},
        ["task.problem: unknown key", "accepted: kind, loss_on"],
    ),
    # missing keys
    "no model": ({"model": {}}, ["model.id: missing", "accepted: string"]),
    "empty section": ({"model": None}, ["model.id: missing", "accepted: string"]),
    "no data": ({"data": {}}, ["data.train: missing", "accepted: string"]),
    # types
    "section is a list": ({"run": [1]}, ["run: [1] given", "accepted: a section"]),
    "section is a string": ({"data": "x.csv"}, ["data: 'x.csv' given", "accepted: a section"]),
    "string for number": (
        {"optim.learning_rate": "fast"},
        ["optim.learning_rate: 'fast' given", "accepted: number"],
    ),
    "number in quotes": (
        {"optim.learning_rate": "1e-3"},
        ["optim.learning_rate: '1e-3' given", "accepted: number"],
    ),
    "fraction for integer": (
        {"run.steps": 1.5},
        ["run.steps: 1.5 given", "accepted: integer or null"],
    ),
    "whole float for integer": ({"method.rank": 8.0}, ["method.rank: 8.0", "accepted: integer"]),
    "boolean for integer": ({"log.every": True}, ["log.every: true", "accepted: integer"]),
    "integer for boolean": ({"data.packing": 1}, ["data.packing: 1", "accepted: true or false"]),
    "string for boolean": (
        {"log.tensorboard": "on"},
        ["log.tensorboard: 'on'", "accepted: true or false"],
    ),
    "number for string": ({"model.id": 7}, ["model.id: 7 given", "accepted: string"]),
    "null where none may be": ({"run.dir": None}, ["run.dir: null", "accepted: string"]),
    "number for optional string": (
        {"data.subset": 3},
        ["data.subset: 3", "accepted: string or null"],
    ),
    "string for list": (
        {"data.columns": "a,b"},
        ["data.columns: 'a,b'", "accepted: a list of strings or null"],
    ),
    "wrong item in list": ({"optim.betas": [0.9, "b"]}, ["optim.betas", "'b'", "list of numbers"]),
    "neither string nor list": (
        {"method.targets": 3},
        ["method.targets: 3", "accepted: string or a list of strings"],
    ),
    "mapping for string": (
        {"data.prompt": {"question": None}},
        ["data.prompt: {'question': None}", "accepted: string"],
    ),
    "list for mapping": (
        {"model.overrides": [1]},
        ["model.overrides: [1]", "accepted: a mapping"],
    ),
    # bounds
    "negative learning rate": (
        {"optim.learning_rate": -0.1},
        ["optim.learning_rate: -0.1 given", "accepted: greater than 0"],
    ),
    "rank 0": ({"method.rank": 0}, ["method.rank: 0", "accepted: greater than 0"]),
    "dropout 1": ({"method.dropout": 1.0}, ["method.dropout: 1.0", "accepted: less than 1"]),
    "negative seed": ({"run.seed": -1}, ["run.seed: -1", "greater than or equal to 0"]),
    "huge seed": ({"run.seed": 2**20}, ["run.seed: 1048576", "less than 1048576"]),
    "length 1": ({"data.max_length": 1}, ["data.max_length: 1", "greater than 1"]),
    "infinite": ({"run.epochs": float("inf")}, ["run.epochs: inf", "finite number"]),
    "NaN": ({"optim.eps": float("nan")}, ["optim.eps: nan", "a finite number"]),
    "warm-up over 1": ({"optim.warmup_ratio": 1.5}, ["optim.warmup_ratio: 1.5", "equal to 1"]),
    "one beta": ({"optim.betas": [0.9]}, ["optim.betas: [0.9]", "at least 2"]),
    "three betas": ({"optim.betas": [0.9, 0.9, 0.9]}, ["optim.betas: [0.9, 0.9", "at most 2"]),
    "beta 1": ({"optim.betas": [0.9, 1.0]}, ["optim.betas: [0.9, 1.0]", "each in [0, 1)"]),
    "no text column": ({"data.text": []}, ["data.text: []", "one or two columns"]),
    "three text columns": (
        {"data.text": ["a", "b", "c"]},
        ["data.text: ['a', 'b', 'c']", "one or two columns"],
    ),
    # choices
    "engine": (
        {"engine.kind": "fsdp"},
        ["engine.kind: 'fsdp'", "auto, single, ddp, peer, fsdp2, deepspeed", "mean 'fsdp2'?"],
    ),
    "schedule": (
        {"optim.schedule": "cosin"},
        ["optim.schedule: 'cosin'", "'linear', 'cosine' or 'constant'", "mean 'cosine'?"],
    ),
    "method": ({"method.kind": "lorra"}, ["method.kind: 'lorra'", "lora", "mean 'lora'?"]),
    "method is a list": ({"method.kind": ["lora"]}, ["method.kind: ['lora']", "accepted: lora"]),
    "no method": ({"method.kind": None}, ["method.kind: None", "accepted: lora"]),
    "task": (
        {"task.kind": "causal"},
        [
            "task.kind: 'causal'",
            "causal_lm, image_classification, multiple_choice, question_answering, "
            "sequence_classification",
            "mean 'causal_lm'?",
        ],
    ),
    "quantization": (
        {"model.quantization": "nf5"},
        ["model.quantization: 'nf5'", "none, nf4, fp4, int8", "did you mean 'nf4'?"],
    ),
    "run name with a slash": ({"run.name": "a/b"}, ["run.name: 'a/b'", "pattern"]),
    "run name that leaves the folder": ({"run.name": ".."}, ["run.name: '..'", "pattern"]),
    "run name that is the folder": ({"run.name": "."}, ["run.name: '.'", "pattern"]),
    # combinations
    "steps and epochs": (
        {"run.steps": 5, "run.epochs": 1.0},
        ["run.epochs: given together with run.steps", "accepted: one of them"],
    ),
    "two warm-ups": (
        {"optim.warmup_steps": 5, "optim.warmup_ratio": 0.1},
        ["optim.warmup_ratio: given together with optim.warmup_steps", "one of them"],
    ),
    "warm-up longer than the run": (
        {"optim.warmup_steps": 6, "run.steps": 5},
        ["optim.warmup_steps: 6 given", "at most run.steps (5)"],
    ),
    "micro-batch over batch": (
        {"data.micro_batch_size": 9, "data.batch_size": 8},
        ["data.micro_batch_size: 9 given", "at most data.batch_size (8)"],
    ),
    "micro-batches by number and by tokens": (
        {"data.micro_batch_size": 2, "data.micro_batch_tokens": 4096},
        [
            "data.micro_batch_tokens: 4096 given together with data.micro_batch_size (2)",
            "one of them, the other null",
        ],
    ),
    "micro-batches shorter than a sequence": (
        {"data.micro_batch_tokens": 1000},
        ["data.micro_batch_tokens: 1000 given", "at least data.max_length (1024)"],
    ),
    "a multiple of micro-batches by number": (
        {"data.micro_batches_multiple_of": 2},
        ["data.micro_batches_multiple_of: 2 given without data.micro_batch_tokens", "null"],
    ),
    "a negative number of row lengths": (
        {"data.row_lengths": -1},
        ["data.row_lengths: -1 given", "auto, or at least 0"],
    ),
    "rows end to end without documents": (
        {"data.padding_free": True, "task.kind": "image_classification"},
        ["data.padding_free: true given with task.kind=image_classification", "false"],
    ),
    "overrides of pretrained weights": (
        {"model.overrides": {"num_hidden_layers": 2}},
        ["model.overrides: given with model.weights=pretrained", "only with model.weights=random"],
    ),
    "copy engines where nothing is gathered": (
        {"engine.copy_engines": True, "engine.kind": "peer"},
        [
            "engine.copy_engines: true given with engine.kind=peer",
            "auto or false, or engine.kind=fsdp2",
        ],
    ),
    "neither a word nor a number": (
        {"engine.unsharded_blocks": "many", "engine.kind": "peer"},
        ["engine.unsharded_blocks: 'many' given; accepted: auto or integer"],
    ),
    "neither a word nor true or false": (
        {"engine.compile": "Auto"},
        ["engine.compile: 'Auto' given; accepted: auto or true or false"],
    ),
    "fewer blocks than none": (
        {"engine.unsharded_blocks": -1, "engine.kind": "peer"},
        ["engine.unsharded_blocks: -1 given", "auto, or at least 0"],
    ),
    "blocks that stay whole where all do": (
        {"engine.unsharded_blocks": 3, "engine.kind": "ddp"},
        [
            "engine.unsharded_blocks: 3 given with engine.kind=ddp",
            "auto or 0, or engine.kind=peer or fsdp2",
        ],
    ),
    "DeepSpeed file for another engine": (
        {"engine.config": "ds.json", "engine.kind": "ddp"},
        ["engine.config: given with engine.kind=ddp", "with deepspeed only"],
    ),
    "packed classification": (
        {"data.packing": True, "task.kind": "sequence_classification"},
        ["data.packing: true given with task.kind=sequence_classification", "accepted: false"],
    ),
    "text for a classifier": (
        {"data.format": "text", "task.kind": "sequence_classification"},
        ["data.format: text given with task.kind=sequence_cl", "accepted: auto, classification"],
    ),
    "labels for a language model": (
        {"data.format": "classification"},
        [
            "data.format: classification given with task.kind=causal_lm",
            "accepted: auto, prompt_completion, alpaca, messages, text",
        ],
    ),
    "evaluation without data": (
        {"run.eval_every": 5},
        ["run.eval_every: 5 given without data.eval", "accepted: 0"],
    ),
    "first evaluation without data": (
        {"run.eval_at_start": True},
        ["run.eval_at_start: true given without data.eval", "accepted: false"],
    ),
}


@pytest.mark.parametrize(("changes", "expected"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(changes: dict[str, Any], expected: list[str]) -> None:
    message = refusal(changed(changes))
    for part in expected:
        assert part in message, message


ACCEPTED = [
    {"optim.learning_rate": 1},  # an integer is a number
    {"run.epochs": 0.5},
    {"optim.warmup_steps": 5, "run.steps": 5},
    {"data.micro_batch_size": 8, "data.batch_size": 8},
    {"data.micro_batch_tokens": 2048, "data.micro_batches_multiple_of": 2},
    {"data.micro_batch_size": None, "data.micro_batch_tokens": 1024, "data.row_lengths": 4},
    {"model.overrides": {"num_hidden_layers": 2, "tie": True}, "model.weights": "random"},
    {
        "data.text": ["a", "b"],
        "data.format": "classification",
        "task.kind": "sequence_classification",
    },
    {"run.eval_every": 5, "run.eval_at_start": True, "data.eval": "e.csv"},
    {"engine.config": "ds.json", "engine.kind": "deepspeed"},
    {"optim.max_grad_norm": None},
    {"run.name": "a.b-c_1"},
    {"optim": None},  # a section without keys, as YAML reads it
]


@pytest.mark.parametrize("changes", ACCEPTED, ids=[", ".join(c) for c in ACCEPTED])
def test_accepted_values_arrive(changes: dict[str, Any]) -> None:
    config = parse_config(changed(changes)).model_dump()
    for path, value in changes.items():
        section, dot, key = path.partition(".")
        if dot:
            assert config[section][key] == value


def test_a_section_cannot_be_changed_afterwards() -> None:
    config = parse_config(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        config.run.seed = 3
    assert config.run.seed == 0


# --- the file


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ["an empty file", "accepted: the sections run, model"]),
        ("# only a comment\n", ["an empty file", "accepted: the sections"]),
        ("- a\n- b\n", ["list", "accepted: the sections"]),
        ("just words\n", ["str", "accepted: the sections"]),
        (b"model: {id: \xff}\n", ["not UTF-8 at byte 12", "accepted: a YAML file"]),
        ("run:\n  seed: 1\n  seed: 2\n", ["line 3", "'seed' is given twice"]),
        ("run: {}\nlog: {}\nrun: {}\n", ["line 3", "'run' is given twice"]),
        ("run:\n  seed: [1\n", ["line 3", "not valid YAML"]),
        ("run:\n  1: 2\n", ["line 2", "key 1 is not a string"]),
        ("run: {? [a] : 1}\n", ["line 1", "is not a string"]),
        ("run: !!python/object/apply:os.getcwd []\n", ["line 1", "not valid YAML"]),
        ("run: \x00\n", ["not valid YAML"]),
        ("a: 1\n---\nb: 2\n", ["line 2", "another document"]),
        ("run: " + "[" * 600 + "\n", ["not valid YAML"]),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, text, expected: list[str]) -> None:
    path = file_of(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load_config(path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for part in [str(path), *expected]:
        assert part in message, message


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml: No such file.*accepted: a YAML file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(UserError, match=r"Is a directory.*accepted: a YAML file"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("2E-4", 2e-4),
        ("1.e-2", 1e-2),
        ("+5e-1", 0.5),
        (".5e1", 5.0),
        ("0.25", 0.25),
    ],
)
def test_numbers_as_people_write_them(tmp_path: Path, text: str, value: float) -> None:
    path = file_of(tmp_path, MINIMAL_TEXT + f"optim: {{learning_rate: {text}}}\n")
    assert load_config(path).optim.learning_rate == value


def test_run_is_named_after_the_file(tmp_path: Path) -> None:
    for text in (
        MINIMAL_TEXT,
        MINIMAL_TEXT + "run:\n",
        MINIMAL_TEXT + "run: {name: '', seed: 4}\n",
    ):
        config = load_config(file_of(tmp_path, text))
        assert config.run.name == "my-run"
        assert config.run_folder == Path("runs/my-run")
    assert config.run.seed == 4
    assert load_config(file_of(tmp_path, MINIMAL_TEXT), ["run.name=x"]).run.name == "x"


def test_shipped_configurations_load(root: Path) -> None:
    files = sorted((root / "configs").glob("*.yaml"))
    assert len(files) >= 4
    for file in files:
        config = load_config(file)
        assert config.run.name == file.stem
        assert parse_config(yaml.safe_load(config.to_yaml())) == config


# --- overrides


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.prompt={q}", ["data.prompt: {'q': None} given; accepted: string", "'\"{column}\"'"]),
        (
            "data.prompt=Q: {q}",
            ["data.prompt: {'Q': {'q': None}} given", "a template needs quotes"],
        ),
        ("data.completion={q} {a}", ["not valid YAML", "data.completion='\"{q} {a}\"'"]),
    ],
)
def test_templates_without_quotes(tmp_path: Path, override: str, words: list[str]) -> None:
    path = file_of(tmp_path, MINIMAL_TEXT)
    with pytest.raises(UserError) as caught:
        load_config(path, [override])
    assert all(word in str(caught.value) for word in words)
    key, _, text = override.partition("=")
    section, name = key.split(".")
    config = load_config(path, [f'{key}="{text}"'])
    assert getattr(getattr(config, section), name) == text


def test_a_template_without_quotes_in_the_file(tmp_path: Path) -> None:
    path = file_of(tmp_path, "model: {id: some/model}\ndata:\n  train: a\n  prompt: {q}\n")
    with pytest.raises(UserError, match=r"a template needs quotes, .* '\{column\}' in a file"):
        load_config(path)


def test_overrides_apply_in_order_and_the_last_wins(tmp_path: Path) -> None:
    path = file_of(tmp_path, MINIMAL_TEXT + "optim: {learning_rate: 0.5, eps: 0.1}\n")
    overrides = ["optim.learning_rate=1e-3", "run.seed=7", "optim.learning_rate=2e-3"]
    config = load_config(path, overrides)
    assert config.optim.learning_rate == 2e-3
    assert config.optim.eps == 0.1  # the rest of the section stays
    assert config.run.seed == 7  # the file has no such section
    assert load_config(path, overrides[::-1]).optim.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("method.targets=[q_proj, v_proj]", "method", "targets", ["q_proj", "v_proj"]),
        ("optim.max_grad_norm=null", "optim", "max_grad_norm", None),
        ("optim.max_grad_norm=", "optim", "max_grad_norm", None),
        ("data.packing=true", "data", "packing", True),
        ('data.prompt="{question}\\n"', "data", "prompt", "{question}\n"),
        ("data.train=a=b.csv", "data", "train", "a=b.csv"),
        ("model.revision='1e5'", "model", "revision", "1e5"),
    ],
)
def test_override_values_are_yaml(tmp_path: Path, override, section, key, value) -> None:
    config = load_config(file_of(tmp_path, MINIMAL_TEXT), [override])
    assert config.model_dump()[section][key] == value


def test_nested_overrides(tmp_path: Path) -> None:
    path = file_of(tmp_path, MINIMAL_TEXT)
    config = load_config(
        path,
        [
            "model.weights=random",
            "model.overrides.hidden_size=64",
            "model.overrides.num_hidden_layers=2",
            "model.overrides.hidden_size=128",
        ],
    )
    assert config.model.overrides == {"hidden_size": 128, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.learning_rate", ["'optim.learning_rate'", "section.key=value", "run, model"]),
        ("steps=5", ["'steps=5'", "section.key=value"]),
        ("=5", ["'=5'", "section.key=value"]),
        (".seed=5", ["'.seed=5'", "section.key=value"]),
        ("run.=5", ["'run.=5'", "section.key=value"]),
        ("run..seed=5", ["'run..seed=5'", "section.key=value"]),
        ("model.id.x=5", ["'model.id.x=5'", "id is not a section", "section.key=value"]),
        ("run.seed=[1", ["'run.seed=[1'", "not valid YAML"]),
        ("run.seed={a: 1, a: 2}", ["'a' is given twice"]),
        ("run.stepz=5", ["run.stepz: unknown key", "did you mean 'steps'?"]),
        ("optin.eps=5", ["optin: unknown key", "did you mean 'optim'?"]),
        ("run.seed=abc", ["run.seed: 'abc' given", "accepted: integer"]),
        ("model=x", ["'model=x'", "section.key=value"]),
    ],
)
def test_overrides_that_are_refused(tmp_path: Path, override: str, expected: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_config(file_of(tmp_path, MINIMAL_TEXT), [override])
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for part in expected:
        assert part in message, message


def test_with_overrides_checks_again_and_leaves_the_original() -> None:
    config = parse_config(changed({"optim.eps": 0.5}))
    other = with_overrides(config, ["run.seed=3", "run.seed=4"])
    assert (other.run.seed, other.optim.eps, config.run.seed) == (4, 0.5, 0)
    with pytest.raises(UserError, match=r"run\.seed: -1 given"):
        with_overrides(config, ["run.seed=-1"])


# --- round trip

ROUND_TRIPS = [
    {},
    *ACCEPTED,
    {"task.kind": "sequence_classification", "task.problem": "regression"},
    {"optim.learning_rate": 1e-5, "optim.eps": 1e-30, "optim.betas": [0.0, 0.99]},
    {"model.revision": "12e4567", "data.subset": "1e5", "run.name": "null"},
    {"data.prompt": "Frage: {q}\n\tAntwort → ", "data.completion": "yes"},
    {"method.targets": ["q_proj", "1.5", "true", "2024-01-01", "~", ".5e3"]},
]


@pytest.mark.parametrize("changes", ROUND_TRIPS, ids=[", ".join(c) for c in ROUND_TRIPS])
def test_yaml_round_trip(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = parse_config(changed({"run.name": "named", **changes}))
    assert load_config(file_of(tmp_path, config.to_yaml())) == config


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    | st.from_regex(r"[-+.0-9eE_:]{1,8}", fullmatch=True)
)
def test_any_text_survives_the_round_trip(tmp_path_factory, text: str) -> None:
    config = parse_config(changed({"run.name": "named", "data.prompt": text}))
    path = file_of(tmp_path_factory.getbasetemp(), config.to_yaml())
    assert load_config(path).data.prompt == text


def test_yaml_names_every_key() -> None:
    written = yaml.safe_load(parse_config(MINIMAL).to_yaml())
    assert list(written) == list(Config.model_fields)
    assert written["method"]["rank"] == 8
    assert written["task"]["loss_on"] == "completion"


@pytest.mark.parametrize(
    ("kind", "given"),
    [("fsdp2", "engine.unsharded_blocks=2"), ("fsdp2", "engine.copy_engines=true"),
     ("deepspeed", "engine.config=configs/deepspeed/zero3.json")],
)  # fmt: skip
def test_on_another_engine_its_own_keys_are_left_behind(kind, given):
    """A run is evaluated and exported on any engine, whichever recorded it."""
    recorded = load_config(QUICKSTART, [f"engine.kind={kind}", given, "engine.timeout=77"])
    for other in ("auto", "single"):
        config = on_engine(recorded, other)
        assert config.engine.kind == other and config.engine.timeout == 77
        assert config.engine.unsharded_blocks == config.engine.copy_engines == "auto"
        assert config.engine.config is None
        assert config.model_copy(update={"engine": recorded.engine}) == recorded


def test_the_default_of_micro_batches_stays_through_a_round_trip() -> None:
    for changes, expected in (
        ({}, (4, None)),
        ({"data.micro_batch_size": None}, (4, None)),
        ({"data.micro_batch_tokens": 4096}, (None, 4096)),
    ):
        config = parse_config(changed(changes))
        again = parse_config(config.model_dump(mode="json"))
        for one in (config, again, with_overrides(config, [])):
            assert (one.data.micro_batch_size, one.data.micro_batch_tokens) == expected
