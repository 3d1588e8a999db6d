"""Extractive question answering: windows, targets, the best span and its scores."""

import itertools
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, PreTrainedTokenizerFast

from benchmarks.number_questions import number_questions, squad_json
from tests.conftest import shared
from tests.helpers import TINY, losses, quick_config, sample, save_random_model
from trainer.checkpoint.saved import read_saved
from trainer.data.sources import read_rows
from trainer.data.squad import question_answering
from trainer.distributed.world import World
from trainer.errors import BadRecord, UserError
from trainer.export.export import saved_config
from trainer.records.jsonl import read_metrics
from trainer.run.run import run
from trainer.session import open_session
from trainer.tasks.options import QuestionAnsweringOptions
from trainer.tasks.question_answering import QuestionAnswering, _answer
from trainer.tasks.squad_scores import squad_scores
from trainer.training.evaluation import evaluate, evaluate_saved


def questions(split: str, count: int, *, without: int = 0) -> list[dict]:
    """Questions made of GSM8K's problems, in SQuAD's form."""
    lines = shared(f"data/gsm8k/{split}.jsonl").read_text().splitlines()
    problems = (json.loads(line)["question"] for line in lines)
    found = list(itertools.islice(number_questions(problems, without=without), count))
    assert len(found) == count
    return found


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """A tiny random BERT with a WordPiece tokenizer of GSM8K's words."""
    normalizer, splitter = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    texts = [normalizer.normalize_str(row["context"]) for row in questions("train", 300)]
    words = Counter(word for text in texts for word, _ in splitter.pre_tokenize_str(text))
    # Not trained: a trainer breaks ties by chance, anew in every process.
    letters = sorted(set("".join(words)))
    pieces = [*letters, *(f"##{letter}" for letter in letters)]
    frequent = sorted(words, key=lambda word: (-words[word], word))
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    entries = list(dict.fromkeys([*special, *pieces, *frequent]))[:1000]
    vocabulary = {entry: index for index, entry in enumerate(entries)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )  # fmt: skip
    folder = save_random_model(tmp_path_factory.mktemp("encoder"), "bert", vocab_size=1000)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)  # fmt: skip
    return folder


def task_of(folder: Path, **options) -> QuestionAnswering:
    return QuestionAnswering(
        QuestionAnsweringOptions(**options), AutoTokenizer.from_pretrained(folder)
    )


# --- records


SQUAD = {
    "version": "1.1",
    "data": [{"title": "Rome", "paragraphs": [{
        "context": "Rome was founded in 753 BC.",
        "qas": [
            {"id": "a", "question": "When?", "answers": [{"text": "753 BC", "answer_start": 20}]},
            {"id": "b", "question": "Who?", "answers": [], "is_impossible": True,
             "plausible_answers": [{"text": "Rome", "answer_start": 0}]},
        ],
    }]}],
}  # fmt: skip


@pytest.mark.parametrize("answer", [("tree ", 5), (" plum", 0), ("plum tree", 1)])
def test_spaces_around_an_answer_do_not_make_it_none(answer):
    """At either end of the context " plum tree ", whose tokens leave them out."""
    text, start = answer
    context = " plum tree " if text != "tree " else "plum tree "
    assert context[start : start + len(text)] == text
    spans = [(found.start(), found.end()) for found in re.finditer(r"\w+", context)]
    expected = {"tree ": (1, 2), " plum": (0, 1), "plum tree": (0, 2)}
    assert _answer([answer], spans) == expected[text]


@pytest.mark.parametrize("indent", [None, 2])
def test_the_official_files_are_read(tmp_path, indent):
    file = tmp_path / "dev-v2.0.json"
    file.write_text(json.dumps(SQUAD, indent=indent))
    options = quick_config(tmp_path, "data.packing=false").data
    found = [question_answering(row) for _, row in read_rows(str(file), "test", options, None)]
    assert [record.segments for record in found] == [
        [("When?", False), ("Rome was founded in 753 BC.", False)],
        [("Who?", False), ("Rome was founded in 753 BC.", False)],
    ]
    assert [record.answers for record in found] == [(("753 BC", 20),), ()]


def test_questions_made_of_problems_are_in_the_form_of_the_official_files(tmp_path):
    rows = questions("test", 30, without=3)
    file = tmp_path / "dev-v2.0.json"
    file.write_text(json.dumps(squad_json(rows, without=True)))
    options = quick_config(tmp_path, "data.packing=false").data
    found = [question_answering(row) for _, row in read_rows(str(file), "test", options, None)]
    assert found == [question_answering(row) for row in rows]
    assert sum(not record.answers for record in found) == 10
    for record in found:
        (asked, _), (context, _) = record.segments
        text = record.answers[0][0] if record.answers else ""
        parts = asked.split("how many")  # of which one stands for the number
        sentences = [
            "how many".join(parts[:at]) + text + "how many".join(parts[at:])
            for at in range(1, len(parts))
        ]
        assert any(sentence in context for sentence in sentences) == bool(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": {"text": ["753"], "answer_start": [19]}}, "'753' does not stand in context"),
        ({"answers": {"text": ["753"], "answer_start": [-7]}}, "does not stand in context"),
        ({"answers": {"text": ["753"], "answer_start": []}}, "not two lists of one length"),
        ({"answers": {"text": [""], "answer_start": [0]}}, "does not stand in context"),
        ({"answers": "753"}, r"answers: accepted: \{text"),
        ({"answers": [{"text": "753"}]}, r"answers\[0\]: accepted: a text, and the character"),
        ({"context": None}, "context: no text"),
    ],
)
def test_what_cannot_be_used_is_a_bad_record(change, message):
    row = {"question": "When?", "context": "Rome was founded in 753 BC.", **change}
    with pytest.raises(BadRecord, match=message):
        question_answering(row)


# --- windows


@pytest.mark.parametrize(("length", "stride"), [(96, 16), (80, 0), (384, 128)])
def test_windows_are_those_of_transformers(encoder, length, stride):
    """`return_overflowing_tokens` of the tokenizer; the target's text is the answer."""
    task = task_of(encoder, stride=stride)
    rows = questions("test", 40)
    encoded = task.encode([question_answering(row) for row in rows], length)
    several = with_answer = 0
    for row, windows in zip(rows, encoded, strict=True):
        theirs = task.tokenizer(
            row["question"], row["context"], truncation="only_second", max_length=length,
            stride=stride, return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        assert [list(window.input_ids) for window in windows] == theirs["input_ids"]
        assert [list(window.token_type_ids) for window in windows] == theirs["token_type_ids"]
        several += len(windows) > 1
        start = row["answers"]["answer_start"][0]
        end = start + len(row["answers"]["text"][0])
        for number, window in enumerate(windows):
            inside = [
                at
                for at, (a, b) in enumerate(theirs["offset_mapping"][number])
                if theirs.sequence_ids(number)[at] == 1 and a < end and b > start
            ]
            spans = [theirs["offset_mapping"][number][at] for at in inside]
            if spans and spans[0][0] <= start and spans[-1][1] >= end:
                with_answer += 1
            else:
                inside = [0]  # [CLS]
            assert [at for at, learned in enumerate(window.loss_mask) if learned] == inside
    assert with_answer >= len(rows)
    assert several == 0 if length == 384 else several > 5


def test_a_decoder_s_windows_end_in_the_token_for_no_answer():
    task = task_of(TINY, stride=8)
    row = questions("test", 1)[0]
    (windows,) = task.encode([question_answering(row)], 64)
    assert len(windows) > 1 and all(len(window.input_ids) <= 64 for window in windows)
    ids = task.tokenizer(row["question"] + "\n", row["context"])["input_ids"]
    assert list(windows[0].input_ids) == [*ids[:63], task.tokenizer.eos_token_id]
    for window in windows:
        known = json.loads(window.reference)
        assert known["null"] == len(window.input_ids) - 1
        marked = [at for at, learned in enumerate(window.loss_mask) if learned]
        if marked != [known["null"]]:
            first, last = (known["spans"][at - known["first"]] for at in (marked[0], marked[-1]))
            text = row["context"][first[0] : last[1]]
            assert text.strip() == row["answers"]["text"][0]


def test_what_leaves_no_room_is_refused(encoder, tmp_path):
    task = task_of(encoder, stride=40)
    rows = [question_answering(row) for row in questions("test", 3)]
    assert all("task.stride" in found for found in task.encode(rows, 48))
    none = [question_answering({**questions("test", 1)[0], "is_impossible": True})]
    assert task.encode(none, 256) == ["no answer; accepted: one, or task.no_answer=true"]
    assert not isinstance(task_of(encoder, no_answer=True).encode(none, 256)[0], str)
    with pytest.raises(UserError, match=r"data.packing: true given with task.kind=question_ans"):
        quick_config(tmp_path, "task.kind=question_answering", "data.packing=true")
    with pytest.raises(UserError, match=r"task.max_answer_length: 0 given"):
        quick_config(
            tmp_path, "task.kind=question_answering", "data.packing=false",
            "task.max_answer_length=0",
        )  # fmt: skip

    class Slow:
        pad_token_id = eos_token_id = unk_token_id = 0
        is_fast = False

    with pytest.raises(UserError, match="given with Slow, which does not say where"):
        QuestionAnswering(QuestionAnsweringOptions(), Slow())


# --- scores

CASES = [
    ("The Denver  Broncos!", ["Denver Broncos", "the Broncos"]),
    ("in the year 1998", ["1998", "about 1998"]), ("a", ["A", "B vitamins"]),
    ("the", ["vitamin A"]), ("to be, or not to be", ["not to be", "be be be"]),
    ("Zürich", ["zürich."]), ("42", ["forty two"]), ("", ["x"]),
]  # fmt: skip
WITHOUT = [("", []), ("something", []), ("the", []), ("An", ["an"])]


def test_scores_are_those_of_the_official_scripts():
    """What evaluate-v1.1.py printed for CASES, and evaluate-v2.0.py (by way of transformers 4.57's
    squad_metrics) for all, with answers of which normalising leaves nothing among them."""
    predicted, answers = zip(*CASES, strict=True)
    assert squad_scores(predicted, answers, no_answer=False) == pytest.approx(
        {"exact_match": 37.5, "f1": 39.58333333333333}, abs=1e-10
    )
    predicted, answers = zip(*CASES, *WITHOUT, strict=True)
    assert squad_scores(predicted, answers, no_answer=True) == pytest.approx(
        {
            "exact_match": 41.666666666666664, "f1": 51.388888888888886,
            "has_answer_exact_match": 33.333333333333336, "has_answer_f1": 46.29629629629629,
            "no_answer_exact_match": 66.66666666666667, "no_answer_f1": 66.66666666666667,
        },
        abs=1e-10,
    )  # fmt: skip


def torchmetrics_scores(predicted: list[str], answers: list[list[str]]) -> dict[str, float]:
    pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
    from torchmetrics.functional.text import squad

    given = [{"prediction_text": text, "id": str(i)} for i, text in enumerate(predicted)]
    target = [
        {"answers": {"text": texts or [""], "answer_start": [0] * max(1, len(texts))}, "id": str(i)}
        for i, texts in enumerate(answers)
    ]
    return {name: float(score) for name, score in squad(given, target).items()}


def test_scores_are_those_of_torchmetrics():
    """On answers of GSM8K's text, right, too long, too short or none."""
    rng = np.random.default_rng(0)
    predicted, answers = [], []
    for row in questions("test", 200, without=4):
        words = row["context"].split()
        start = rng.integers(len(words) - 3)
        answers.append(row["answers"]["text"] and [" ".join(words[start : start + 3])])
        shift, length = rng.integers(0, 3), rng.integers(0, 5)
        predicted.append(" ".join(words[start + shift :][:length]))
    for no_answer in (False, True):
        chosen = [i for i, given in enumerate(answers) if given or no_answer]
        texts, given = [predicted[i] for i in chosen], [answers[i] for i in chosen]
        found = squad_scores(texts, given, no_answer=no_answer)
        theirs = torchmetrics_scores(texts, given)
        assert 0 < theirs["exact_match"] < theirs["f1"] < 100
        assert {name: found[name] for name in theirs} == pytest.approx(theirs, rel=1e-5)


# --- the model


def asked(tmp_path, folder: Path, *changes: str, count: int = 24, without: int = 0):
    file = write(tmp_path / "questions.jsonl", questions("train", count, without=without))
    return quick_config(
        tmp_path, f"model.id={folder}", "task.kind=question_answering", f"data.train={file}",
        f"data.eval={file}", "data.packing=false", "data.train_records=null", "task.stride=16",
        "data.eval_records=null", "data.max_length=128", "method.targets=all-linear", *changes,
    )  # fmt: skip


@pytest.mark.parametrize("no_answer", [False, True])
def test_answers_are_those_of_the_plain_model(tmp_path, encoder, no_answer):
    """The loss by transformers, each window alone; the best span by trying them all."""
    config = asked(
        tmp_path, encoder, f"task.no_answer={no_answer}", "data.max_length=72",
        "task.max_answer_length=4", without=3 * no_answer,
    )  # fmt: skip
    session = open_session(config, World())
    model = AutoModelForQuestionAnswering.from_pretrained(encoder, dtype=torch.float32).eval()
    head = session.backbone.heads["qa_outputs"]
    inner = dict(head.named_parameters())
    model.qa_outputs.weight.data = next(v for k, v in inner.items() if k.endswith("weight")).data
    model.qa_outputs.bias.data = next(v for k, v in inner.items() if k.endswith("bias")).data
    tokenizer, total, windows, texts, answers = session.tokenizer, 0.0, 0, [], []
    for row in questions("train", 24, without=3 * no_answer):
        theirs = tokenizer(
            row["question"], row["context"], truncation="only_second", max_length=72, stride=16,
            return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        best, text, null = -np.inf, "", np.inf
        for number in range(len(theirs["input_ids"])):
            example = session.eval_data[""][windows]
            at = [i for i, learned in enumerate(example.loss_mask) if learned]
            with torch.no_grad():
                out = model(
                    torch.tensor([theirs["input_ids"][number]]),
                    token_type_ids=torch.tensor([theirs["token_type_ids"][number]]),
                    start_positions=torch.tensor([at[0]]), end_positions=torch.tensor([at[-1]]),
                )  # fmt: skip
            total, windows = total + float(out.loss), windows + 1
            starts, ends = out.start_logits[0], out.end_logits[0]
            null = min(null, float(starts[0] + ends[0]))
            inside = [i for i, of in enumerate(theirs.sequence_ids(number)) if of == 1]
            for a in inside:
                for b in inside:
                    if a <= b < a + 4 and float(starts[a] + ends[b]) > best:
                        best = float(starts[a] + ends[b])
                        offsets = theirs["offset_mapping"][number]
                        text = row["context"][offsets[a][0] : offsets[b][1]]
        texts.append("" if no_answer and null > best else text)
        answers.append(row["answers"]["text"])
    assert windows == len(session.eval_data[""]) > 24
    scores = evaluate(session)
    assert scores["eval_loss"] == pytest.approx(total / windows, rel=1e-5)
    expected = squad_scores(texts, answers, no_answer=no_answer)
    assert {k: v for k, v in scores.items() if k != "eval_loss"} == pytest.approx(
        {f"eval_{name}": score for name, score in expected.items()}
    )


def test_it_learns_is_saved_and_exports_to_peft(tmp_path, encoder):
    config = asked(
        tmp_path, encoder, "run.steps=120", "optim.learning_rate=5e-3", "method.rank=16",
        "method.alpha=16", "run.eval_at_start=true", "run.verify=auto", "data.batch_size=12",
        "data.micro_batch_size=12", "run.name=learns", "optim.schedule=constant",
    )  # fmt: skip
    run(config, World())
    scores = [
        line for line in read_metrics(config.run_folder / "metrics.jsonl") if "eval_f1" in line
    ]
    assert scores[0]["eval_f1"] < 20 and scores[-1]["eval_f1"] > 50
    trained = losses(config.run_folder)
    assert np.mean(trained[-10:]) < trained[0] / 2
    saved = read_saved(config.run_folder)
    again = evaluate_saved(saved_config(saved.state), World(), saved)
    assert again["eval_f1"] == pytest.approx(scores[-1]["eval_f1"])
    check_peft(tmp_path, config, saved)


def check_peft(tmp_path, config, saved) -> None:
    """The exported adapter gives PEFT's model the logits of the run."""
    from trainer.checkpoint.state import load_trained

    base = AutoModelForQuestionAnswering.from_pretrained(config.model.id, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, config.run_folder / "adapter").eval()
    session = open_session(config, World(), saved.initial_adapters)
    load_trained(session, saved.checkpoint, saved.tensors)
    batch = session.task.collate([[session.eval_data[""][0]], [session.eval_data[""][1]]])
    with torch.no_grad(), session.method.inference():
        ours = session.task.logits(session.model.eval()(**batch.inputs))
        found = theirs(**batch.inputs)
    seen = batch.inputs["attention_mask"].bool()
    expected = torch.stack([found.start_logits, found.end_logits], -1)
    torch.testing.assert_close(ours[seen], expected[seen], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "kind",
    sample(["llama", "roberta", "deberta-v2", "bart", "qwen2", "gpt2"], "llama"),
)
def test_architectures(tmp_path, kind):
    """Of encoders and decoders: the proof holds, it trains, PEFT loads it."""
    sizes = {
        "bart": {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 96,
                 "decoder_ffn_dim": 96, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
                 "decoder_start_token_id": 2, "forced_eos_token_id": 2},
        "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},
        "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"],
                       "position_biased_input": False, "type_vocab_size": 0},
    }.get(kind, {})  # fmt: skip
    folder = save_random_model(tmp_path / "model", kind, AutoModelForQuestionAnswering, **sizes)
    config = asked(
        tmp_path, folder, "run.verify=auto", "run.steps=3", "data.max_length=192", count=12
    )
    run(config, World())
    check_peft(tmp_path, config, read_saved(config.run_folder))
