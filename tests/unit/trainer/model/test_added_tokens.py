"""`model.added_tokens`: rows of new tokens against a model of transformers' whose tables train."""

import itertools
import json

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.architectures import Case
from tests.helpers import TINY, quick_config, sample, save_random_model, thorough
from tests.references import reference_loss, summed_loss
from tests.tiny_models import CAUSAL, CLASSIFICATION, architectures, not_buildable
from trainer.checkpoint import store
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.export.export import export_run
from trainer.model.hub import load_tokenizer
from trainer.run.run import run
from trainer.session import open_session

NEW = ["<|new|>", "<|end|>"]
IDS = [512, 513]
"""Behind the 512 tokens of the tokenizer."""
TEXTS = [
    ("The cat <|new|>", " sat on<|end|> the mat."), ("<|new|>Two birds", " were seen.<|end|>"),
    ("A red apple", " fell<|new|>."), ("She has 3 coins", " and 4 eggs<|end|>"),
]  # fmt: skip
INSIDE, BEYOND = 576, 512
"""Rows of tables that have room for the new tokens, and of some that have not."""


class Tokens(Case):
    """A tiny model, and records with new tokens."""

    def __post_init__(self):
        super().__post_init__()
        rows = [{"prompt": p, "completion": c} for p, c in TEXTS]
        if self.part == CLASSIFICATION:
            rows = [{"text": p + c, "label": i % 2} for i, (p, c) in enumerate(TEXTS)]
        self.records.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def config(self, name, *changes):
        return super().config(name, f"model.added_tokens={json.dumps(NEW)}", *changes)


def records(folder):
    rows = [{"question": prompt, "answer": rest} for prompt, rest in TEXTS]
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "records.jsonl"


def configured(folder, *changes):
    """A run on the model in `folder`/model."""
    return quick_config(
        folder, f"model.id={folder}/model", f"data.train={records(folder)}", "data.eval=null",
        f"model.added_tokens={json.dumps(NEW)}", "run.verify=auto", "data.batch_size=4",
        "method.alpha=8", *changes,
    )  # fmt: skip


def by_hand(folder, rows: dict[str, torch.Tensor]):
    """transformers' model with tables of at least 514 rows: those of the files, those of tokens
    `IDS` from `rows` by path."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if model.config.get_text_config().vocab_size < 514:
        model.resize_token_embeddings(514, mean_resizing=False)
    with torch.no_grad():
        for path, values in rows.items():
            model.get_submodule(path).weight[IDS] = values
    return model.eval()


def check_gradients(session, model):
    """The loss and the rows' gradients are those of `model`, whose tables are trained as a whole."""
    examples = [session.train_data[index] for index in range(len(session.train_data))]
    session.model.eval()
    session.optimizer.zero_grad()
    loss = sum(
        session.task.loss(session.model, session.task.collate([[example]]))[0]
        for example in examples
    )
    loss.backward()
    model.requires_grad_(False)
    for path in session.backbone.tables:
        model.get_submodule(path).weight.requires_grad_(True)
    expected = summed_loss(CAUSAL, model, examples)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for path, rows in session.backbone.token_rows.items():
        found, whole = rows.values.grad, model.get_submodule(path).weight.grad[IDS]
        assert found.abs().max() > 0
        assert (found - whole).abs().max() <= 1e-6 * whole.abs().max(), path


TABLES = [*itertools.product([True, False], [INSIDE, BEYOND])]


@pytest.mark.parametrize("case", sample(TABLES, (True, BEYOND), (False, INSIDE)))
def test_rows_start_at_the_mean_and_have_the_gradients_of_whole_tables(tmp_path, case):
    tied, size = case
    folder = save_random_model(
        tmp_path / "model", "llama", AutoModelForCausalLM, tie_word_embeddings=tied,
        vocab_size=size,
    )  # fmt: skip
    session = open_session(configured(tmp_path), World())
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tables = ["model.embed_tokens", *([] if tied else ["lm_head"])]
    assert list(session.backbone.token_rows) == tables
    for path, rows in session.backbone.token_rows.items():
        stored = plain.get_submodule(path).weight.detach().numpy()
        ours = session.model.get_submodule(path).weight.detach().numpy()
        mean = stored[:512].astype(np.float64).mean(0)
        for part in (ours[IDS], rows.values.detach().numpy()):
            np.testing.assert_allclose(part, np.stack([mean] * 2), rtol=1e-6)
        kept = [i for i in range(size) if i not in IDS]
        np.testing.assert_array_equal(ours[kept], stored[kept])
        assert len(ours) == max(size, 514)
        rows.values.data.normal_(0, 0.3)  # the table's own rows must not be used
    check_gradients(
        session,
        by_hand(folder, {p: rows.values for p, rows in session.backbone.token_rows.items()}),
    )


SAMPLE = ["gemma3_text", "gemma2", "gemma3n_text", "phi"]
REFUSED = {
    "gemma3n_text": "has another table of tokens, model.embed_tokens_per_layer",
    "phi": "has an output head with a bias",
    "bert": "has an output head with a bias",
    "cpmant": "has tables of 1600 and 576 rows for a vocab_size of 576",
    "inkling_text": "has a InklingNormedEmbedding as its embedding",
}


@pytest.mark.parametrize(
    "name", sample([n for n in architectures(CAUSAL) if not not_buildable(n, CAUSAL)], *SAMPLE)
)
def test_every_architecture_is_right_or_refused_by_name(tmp_path, name):
    case = Tokens(name, CAUSAL, tmp_path)
    try:
        session = open_session(case.config("tokens"), World())
    except UserError as error:
        said = str(error)
        assert name not in SAMPLE or said.startswith("model.added_tokens: given, but ")
        assert REFUSED.get(name, "accepted:") in said
        return
    assert name not in REFUSED
    for rows in session.backbone.token_rows.values():
        rows.values.data.normal_(0, 0.3)
    model = case.plain()
    with torch.no_grad():
        for path, rows in session.backbone.token_rows.items():
            model.get_submodule(path).weight[IDS] = rows.values
    check_gradients(session, model)


def test_a_classifier_trains_rows_of_its_embedding(tmp_path):
    case = Tokens("distilbert", CLASSIFICATION, tmp_path)
    session = open_session(case.config("tokens"), World())
    (path,) = session.backbone.tables
    assert path == "distilbert.embeddings.word_embeddings"
    ours, examples = case.trained_loss()
    model = peft.PeftModel.from_pretrained(case.plain(), case.trained().run_folder / "adapter")
    assert reference_loss(CLASSIFICATION, model.eval(), examples) == pytest.approx(ours, rel=1e-5)


LOADED = [*itertools.product(["none", "nf4"], [True, False], [INSIDE, BEYOND])]


@pytest.mark.parametrize("case", sample(LOADED, ("none", False, BEYOND), ("nf4", True, BEYOND)))
def test_peft_and_merged_models_have_the_trained_rows(tmp_path, case):
    fmt, tied, size = case
    folder = save_random_model(
        tmp_path / "model", "llama", AutoModelForCausalLM, tie_word_embeddings=tied,
        vocab_size=size,
    )  # fmt: skip
    config = configured(
        tmp_path, f"model.quantization={fmt}", "run.steps=20", "optim.learning_rate=1e-2",
        'model.added_tokens=["<|new|>","</s>","<|end|>"]',
    )  # fmt: skip
    run(config, World())
    lines = [json.loads(line) for line in (config.run_folder / "metrics.jsonl").open()]
    assert lines[-1]["loss"] < 0.3 * lines[0]["loss"]  # half of what is learned are new tokens
    adapter, merged = config.run_folder / "adapter", tmp_path / "merged"
    export_run(config.run_folder, merged, World(), what="merged", measure=False)
    if fmt != "none":
        folder = tmp_path / "backbone"
        export_run(config.run_folder, folder, World(), what="backbone", measure=False)
    readme = (adapter / "README.md").read_text().split("```")[1].removeprefix("python\n")
    assert ("resize_token_embeddings(len(tokenizer))" in readme) == (size == BEYOND)
    readme = readme.replace("path/to/model", str(folder))
    names: dict = {}
    exec(readme.replace("path/to/this/folder", str(adapter)), names)  # what a user would run
    ids = torch.tensor([names["tokenizer"]("The <|new|> cat<|end|> sat</s>")["input_ids"]])
    assert {2, *IDS} <= set(ids[0].tolist())
    whole = AutoModelForCausalLM.from_pretrained(merged).eval()
    assert whole.config.vocab_size == max(size, 514)
    assert len(AutoTokenizer.from_pretrained(merged)) == 514
    with torch.no_grad():
        found, expected = (model(ids).logits for model in (names["model"].eval(), whole))
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_tokens_that_the_tokenizer_has_are_not_added(tmp_path, capsys):
    save_random_model(tmp_path / "model", "llama", AutoModelForCausalLM)
    config = configured(tmp_path, 'model.added_tokens=["</s>","<|new|>"]', "log.progress=plain")
    assert len(load_tokenizer(config.model)) == 513
    session = open_session(config, World())
    table = session.model.get_input_embeddings().weight
    stored = AutoModelForCausalLM.from_pretrained(config.model.id).get_input_embeddings().weight
    rows = session.backbone.token_rows["model.embed_tokens"]
    assert rows.ids.tolist() == [2, 512]
    assert torch.equal(rows.values[0], stored[2]) and torch.equal(table[2], stored[2])
    assert str(session.backbone.added) == (
        "model.added_tokens: 1 added to the tokenizer; '</s>' in it already, not added again; "
        "1 rows start at the mean of 512, 1 as they are; all inside the tables of 576 rows"
    )


@thorough
def test_a_second_stage_goes_on_with_the_rows_of_a_run(tmp_path):
    save_random_model(tmp_path / "model", "llama", AutoModelForCausalLM, vocab_size=BEYOND)
    first = configured(tmp_path, "run.name=first", "run.steps=3")
    run(first, World())
    adapter = f"model.adapter={first.run_folder}"
    second = configured(
        tmp_path, "run.name=second", "run.steps=1", "optim.learning_rate=1e-12", adapter
    )
    run(second, World())
    then, now = (store.read_tensors(store.newest(one.run_folder / "checkpoints"))
                 for one in (first, second))  # fmt: skip
    rows = [name for name in then if name.startswith("rows/")]
    assert rows
    for name in rows:
        torch.testing.assert_close(now[name], then[name], rtol=0, atol=1e-8)
    with pytest.raises(UserError, match=r"was trained with model\.added_tokens: "):
        run(configured(tmp_path, "run.name=third", "model.added_tokens=null", adapter), World())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (['model.added_tokens=["a b","a b"]'], "model.added_tokens: 'a b' given; accepted: "),
        (['model.added_tokens=[" "]'], "model.added_tokens: ' ' given; accepted: "),
        (["method.include_head=true"], "method.include_head: true given with model.added_tokens"),
        (
            ["model.added_tokens=null", "model.tokenizer=LARGER"],
            "has 580 tokens, but the model's embedding 576 rows; accepted: the model's own "
            "tokenizer, or those beyond its rows listed in model.added_tokens",
        ),
        (
            ["model.tokenizer=LARGER"],
            "has 580 tokens, but the model's embedding 576 rows",
        ),
        (
            ["model.added_tokens=null", "model.tokenizer=OTHER"],
            "another vocabulary than the model's",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, changes, said):
    save_random_model(tmp_path / "model", "llama", AutoModelForCausalLM)
    larger = AutoTokenizer.from_pretrained(TINY)
    larger.add_tokens([f"<{i}>" for i in range(68)])
    larger.save_pretrained(tmp_path / "larger")
    other = json.loads((TINY / "tokenizer.json").read_text())
    vocabulary = other["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    larger.save_pretrained(tmp_path / "other")
    (tmp_path / "other/tokenizer.json").write_text(json.dumps(other))
    places = {"LARGER": tmp_path / "larger", "OTHER": tmp_path / "other"}
    for name, place in places.items():
        changes = [change.replace(name, str(place)) for change in changes]
    with pytest.raises(UserError) as error:
        open_session(configured(tmp_path, *changes), World())
    assert said in str(error.value)
    assert "\n" not in str(error.value)
