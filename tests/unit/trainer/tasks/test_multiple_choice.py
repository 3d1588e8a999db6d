"""Multiple choice: what is read, learned and scored, against the plain model."""

import json

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import accuracy_score
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import shared
from tests.helpers import TINY, losses, quick_config, sample, save_random_model
from trainer.checkpoint.saved import read_saved
from trainer.config.config import with_overrides
from trainer.config.data_options import DataOptions
from trainer.data.choices import commonsense, multiple_choice
from trainer.data.formats import _part
from trainer.data.tokenise import prepare
from trainer.distributed.world import World
from trainer.errors import BadRecord, UserError
from trainer.export.export import saved_config
from trainer.records.jsonl import read_metrics
from trainer.run.run import run
from trainer.session import open_session
from trainer.tasks.multiple_choice import MultipleChoice
from trainer.tasks.options import MultipleChoiceOptions
from trainer.training.evaluation import evaluate_saved, mean_loss

QUESTION = "Question: Which of them is a fruit?\nAnswer:"


def read(row, **options) -> list[tuple[str, str, float]]:
    """(question, choice, whether it is right) of a row."""
    options = {"prompt": "Question: {question}\nAnswer:", **options}
    records = multiple_choice(row, DataOptions(train="x", **options), _part)
    return [(r.segments[0][0], r.segments[1][0], r.label) for r in records]


@pytest.mark.parametrize(
    ("row", "options"),
    [
        (  # ARC, OpenBookQA
            {"choices": {"text": ["stone", "plum"], "label": ["A", "B"]}, "answerKey": "B"},
            {"label": "answerKey"},
        ),
        ({"choices": [{"text": "stone", "label": "1"}, {"text": "plum", "label": "2"}], "label": "2"}, {}),
        ({"choices": ["stone", "plum"], "label": 1}, {}),  # HellaSwag (endings)
        ({"choices": ["stone", "plum"], "label": "plum"}, {}),
        ({"sol1": "stone", "sol2": "plum", "label": 1}, {"choices": ["sol1", "sol2"]}),  # PIQA
        (  # Social IQa
            {"answerA": "stone", "answerB": "plum", "label": "2"},
            {"choices": ["answerA", "answerB"], "choice_labels": ["1", "2"]},
        ),
        ({"label": True, "no": "stone", "yes": "plum"}, {"choices": ["no", "yes"]}),  # BoolQ
        (
            {"label": True, "no": "stone", "yes": "plum"},
            {"choices": ["no", "yes"], "choice_labels": ["false", "true"]},
        ),
    ],
)  # fmt: skip
def test_the_sets_forms_are_read(row, options):
    found = read({"question": "Which of them is a fruit?", **row}, **options)
    assert found == [(QUESTION, " stone", 0.0), (QUESTION, " plum", 1.0)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"choices": ["stone"], "label": 0}, "1 choices; accepted: two or more"),
        ({"choices": ["stone", "plum"], "label": 2}, "label is 2; accepted: 0, 1, or a choice"),
        ({"choices": ["stone", "stone"], "label": "stone"}, "label is 'stone'"),
        ({"choices": "stone", "label": 0}, "choices holds a str; accepted: a list of texts"),
        ({"choices": ["stone", " "], "label": 0}, "choice 2 of 2 has no text"),
        ({"choices": ["stone", None], "label": 0}, "choices holds a NoneType among its texts"),
        ({"choices": ["stone", float("nan")], "label": 0}, "choices holds NaN among its texts"),
    ],
)
def test_what_cannot_be_used_is_a_bad_record(row, message):
    with pytest.raises(BadRecord, match=message):
        read({"question": "?", **row})


def test_llm_adapters_json_gives_the_answers_texts_or_names():
    options = DataOptions(train="x")
    for name, count in (("ARC-Easy", 2376), ("boolq", 3270), ("openbookqa", 500)):
        rows = json.loads(shared(f"data/commonsense/{name}/test.json").read_text())
        right = [
            next(r.segments[1][0] for r in commonsense(row, options, _part, "") if r.label)
            for row in rows
        ]
        assert len(right) == count
        for row, text in zip(rows, right, strict=True):
            if name == "boolq":
                assert text == f" {row['answer']}"
            else:
                mark = f"{row['answer'].capitalize()}:{text}"
                assert mark in row["instruction"]
    row = json.loads(shared("data/commonsense/boolq/test.json").read_text())[0]
    named = commonsense(row, options.model_copy(update={"answers": "names"}), _part, "asked")
    assert [(r.segments[0][0], r.segments[1][0], r.label) for r in named] == [
        ("asked", "the correct answer is true", 0.0),
        ("asked", "the correct answer is false", 1.0),
    ]
    with pytest.raises(BadRecord, match="instruction has no 'Answer format"):
        commonsense({**row, "instruction": "Is it so?"}, options, _part, "")


def arc(tmp_path, *changes):
    folder = shared("data/commonsense/ARC-Easy")
    return quick_config(
        tmp_path, "task.kind=multiple_choice", f"data.train={folder / 'train.json'}",
        f"data.eval={folder / 'test.json'}", "data.train_records=40", "data.eval_records=12",
        "data.packing=false", "run.steps=4", "run.eval_at_start=true", "optim.learning_rate=1e-2",
        *changes,
    )  # fmt: skip


def test_scores_are_those_of_the_plain_model(tmp_path):
    """Log-likelihoods by transformers, each choice alone; accuracy as EleutherAI's harness has it."""
    config = arc(tmp_path, "data.max_length=96")
    session = open_session(config, World())
    model = AutoModelForCausalLM.from_pretrained(config.model.id, dtype=torch.float32).eval()
    tokenizer, data = session.tokenizer, session.eval_data[""]
    rows = json.loads(shared("data/commonsense/ARC-Easy/test.json").read_text())[:12]
    hits, normalised, total, tokens, example = 0, 0, 0.0, 0, 0
    options = config.data
    for row in rows:
        scores = []
        for record in commonsense(row, options, _part, ""):
            question, choice = (text for text, _ in record.segments)
            asked = tokenizer(question)["input_ids"]
            ids = tokenizer(question + choice)["input_ids"]
            assert ids[: len(asked)] == asked
            learned = len(ids) - len(asked)
            ids = ids[-96:]
            assert data[example].input_ids == ids and sum(data[example].loss_mask) == learned
            with torch.no_grad():
                logp = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            positions = range(len(ids) - learned, len(ids))
            score = sum(float(logp[at - 1, ids[at]]) for at in positions)
            scores.append((score, score / len(choice.strip().encode()), bool(record.label)))
            if record.label:
                total, tokens = total - score, tokens + learned
            example += 1
        hits += scores[int(np.argmax([s[0] for s in scores]))][2]
        normalised += scores[int(np.argmax([s[1] for s in scores]))][2]
    run(config, World())
    found = read_metrics(config.run_folder / "metrics.jsonl")[0]
    assert found["eval_accuracy"] == hits / 12 and found["eval_accuracy_norm"] == normalised / 12
    assert found["eval_loss"] == pytest.approx(total / tokens, rel=1e-5)
    half = 1.96 * (hits / 12 * (1 - hits / 12) / 12) ** 0.5
    assert found["eval_accuracy_interval"] == pytest.approx(half)


@pytest.mark.parametrize("likelihood", sample(["sum", "per_byte"], "per_byte"))
def test_a_distribution_is_learned_over_all_choices(likelihood, tmp_path):
    """Loss by transformers, each choice alone; its gradient by finite differences; the same in any
    micro-batches, and learned."""
    config = arc(
        tmp_path, "task.train_on=distribution", f"task.likelihood={likelihood}", "run.steps=3",
        "data.batch_size=8", "data.train_records=8", "data.eval_records=5", "run.eval_at_start=false",
        "optim.learning_rate=1e-3",
    )  # fmt: skip
    session = open_session(config, World())
    model = AutoModelForCausalLM.from_pretrained(config.model.id, dtype=torch.float32).eval()
    rows = json.loads(shared("data/commonsense/ARC-Easy/test.json").read_text())[:5]
    expected = 0.0
    for row in rows:
        scores, right = [], None
        for record in commonsense(row, config.data, _part, ""):
            question, choice = (text for text, _ in record.segments)
            asked = session.tokenizer(question)["input_ids"]
            ids = session.tokenizer(question + choice)["input_ids"]
            with torch.no_grad():
                logp = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            score = sum(float(logp[at - 1, ids[at]]) for at in range(len(asked), len(ids)))
            right = len(scores) if record.label else right
            scores.append(
                score / len(choice.strip().encode()) if likelihood == "per_byte" else score
            )
        expected -= float(torch.tensor(scores).log_softmax(0)[right]) / len(rows)
    data, examples = session.held_out()
    assert mean_loss(session, data, examples) == pytest.approx(expected, rel=1e-4)

    generator = torch.Generator().manual_seed(3)
    adapter = next(iter(session.method.adapters.values()))
    adapter.B.data.normal_(0, 0.05, generator=generator)
    direction = torch.randn(adapter.B.shape, generator=generator)
    session.optimizer.zero_grad()
    mean_loss(session, data, examples, gradients=True)
    slope = float((adapter.B.grad * direction).sum())
    values = []
    for sign in (1, -1):
        adapter.B.data.add_(direction, alpha=sign * 2e-3)
        values.append(mean_loss(session, data, examples))
        adapter.B.data.add_(direction, alpha=-sign * 2e-3)
    assert slope == pytest.approx((values[0] - values[1]) / 4e-3, rel=0.02)

    run(config, World())
    metrics = read_metrics(config.run_folder / "metrics.jsonl")
    trained = [line["loss"] for line in metrics if "loss" in line]
    saved = read_saved(config.run_folder)
    for size in (1, 8):
        changes = [f"data.micro_batch_size={size}", f"data.padding_free={str(size > 1).lower()}"]
        scores = evaluate_saved(with_overrides(config, changes), World(), saved)
        assert scores["eval_loss"] == pytest.approx(metrics[-1]["eval_loss"], rel=1e-4)
    again = with_overrides(config, [*changes, "run.name=again"])
    run(again, World())
    assert losses(again.run_folder) == pytest.approx(trained, rel=1e-4)
    assert trained[-1] < trained[0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["task.train_on=distribution", "data.packing=true"], r"data.packing: true given with task.train_on"),
        (["task.likelihood=per_byte"], r"task.likelihood: per_byte given with task.train_on=answer"),
    ],
)  # fmt: skip
def test_options_of_a_distribution(given, message, tmp_path):
    with pytest.raises(UserError, match=message):
        quick_config(tmp_path, "task.kind=multiple_choice", "data.packing=false", *given)


def test_a_model_that_carries_state_cannot_learn_a_distribution(tmp_path):
    save_random_model(tmp_path / "model", "mamba", AutoModelForCausalLM, state_size=8)
    config = arc(tmp_path, "task.train_on=distribution", f"model.id={tmp_path}/model")
    with pytest.raises(UserError, match=r"task.train_on: distribution given, but Mamba.*carry"):
        open_session(config, World())


def test_only_right_choices_are_learned_and_padding_changes_nothing(tmp_path):
    config = arc(tmp_path)
    run(config, World())
    trained = losses(config.run_folder)
    assert trained[-1] < trained[0]
    saved = read_saved(config.run_folder)
    scores = read_metrics(config.run_folder / "metrics.jsonl")[-1]
    for changes in ({"micro_batch_size": 1}, {"micro_batch_size": 8, "padding_free": True}):
        changed = saved_config(saved.state)
        changed = changed.model_copy(update={"data": changed.data.model_copy(update=changes)})
        again = evaluate_saved(changed, World(), saved)
        assert again["eval_loss"] == pytest.approx(scores["eval_loss"], rel=1e-5)
        assert again["eval_accuracy"] == scores["eval_accuracy"]


@pytest.mark.parametrize(
    ("how", "outcome"),
    [
        ("drop", "1 of 2 records, 2 examples, 4 tokens (0 truncated, 1 dropped, 0 bad)"),
        ("stop", "data.jsonl:1: longer than data.max_length (8 tokens)"),
        ("truncate", "data.jsonl:1: a choice alone fills data.max_length (8 tokens)"),
    ],
)
def test_a_choice_that_does_not_fit(tmp_path, how, outcome):
    path = tmp_path / "data.jsonl"
    rows = [{"question": "q", "choices": [choice, "b"], "label": 1} for choice in ("a a " * 9, "a")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = DataOptions(
        train=str(path), prompt="question", max_length=8, on_long_record=how, cache=str(tmp_path)
    )
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    task = MultipleChoice(MultipleChoiceOptions(kind="multiple_choice"), tokenizer)
    try:
        found = str(prepare(str(path), "train", None, options, task).counts)
    except UserError as error:
        found = str(error)
    assert outcome in found


def test_accuracy_of_grouped_choices():
    predictions = [[-1.0, 0.0], [-2.0, 1.0], [-3.0, 1.0], [-9.0, 0.0], [-5.0, 0.0]]
    lengths = [2.0, 8.0, 30.0, 10.0, 10.0]
    found = MultipleChoice.metrics(None, predictions, lengths, [0, 0, 1, 1, 1])
    assert (found["accuracy"], found["accuracy_norm"]) == (0.5, 1.0)
    assert found["accuracy_norm_interval"] == 0.0


def test_scores_of_choices_are_those_of_libraries():
    """sklearn's accuracy of NumPy's argmax, and scipy's interval of the normal approximation."""
    rng = np.random.default_rng(0)
    logp, size, right = -rng.random((50, 4)), rng.integers(1, 9, (50, 4)), rng.integers(0, 4, 50)
    predictions = [[logp[q, c], float(c == right[q])] for q in range(50) for c in range(4)]
    records = [q for q in range(50) for _ in range(4)]
    found = MultipleChoice.metrics(None, predictions, size.flatten().tolist(), records)
    for name, scores in (("accuracy", logp), ("accuracy_norm", logp / size)):
        share = accuracy_score(right, scores.argmax(1))
        assert found[name] == pytest.approx(share) and 0 < share < 1
        low, high = stats.norm.interval(0.95, loc=share, scale=(share * (1 - share) / 50) ** 0.5)
        assert found[f"{name}_interval"] == pytest.approx((high - low) / 2, rel=1e-4)
