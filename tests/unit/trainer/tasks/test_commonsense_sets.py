"""The eight sets of commonsense questions that the papers use, in the form of the hub and in that
of LLM-Adapters: a record of each, and what is scored of it. What EleutherAI's harness renders of
the same record is written beside those that are the same there."""

import json

import pytest

from tests.conftest import shared
from tests.helpers import quick_config
from trainer.config.data_options import DataOptions
from trainer.data.choices import commonsense, multiple_choice
from trainer.data.formats import _part
from trainer.errors import BadRecord, UserError

ASKED = "Question: {question}\nAnswer:"

BOOLQ = {
    "question": "does ethanol take more energy make that produces",
    "passage": "All biomass goes through steps.",
}
PIQA = {
    "goal": "When boiling butter, when it's ready, you can",
    "sol1": "Pour it onto a plate",
    "sol2": "Pour it into a jar",
    "label": 1,
}
SIQA = {
    "context": "Tracy didn't go home that evening and resisted Riley's attacks.",
    "question": "What does Tracy need to do before this?", "answerA": "make a new plan",
    "answerB": "Go home and see Riley", "answerC": "Find somewhere to go", "label": "3",
}  # fmt: skip
HELLASWAG = {
    "ind": 24, "activity_label": "Roof shingle removal", "ctx_a": "A man is sitting on a roof.", "ctx_b": "he",
    "ctx": "A man is sitting on a roof. he",
    "endings": ["is using wrap to wrap a pair of skis.", "is ripping level tiles off.",
                "is holding a rubik's cube.", "starts pulling up roofing on a roof."],
    "source_id": "activitynet~v_-JhWjGDPHMY", "label": "3",
}  # fmt: skip
WINOGRANDE = {
    "sentence": "Sarah was a much better surgeon than Maria so _ always got the easier cases.",
    "option1": "Sarah", "option2": "Maria", "answer": "2",
}  # fmt: skip
ARC = {
    "id": "Mercury_417466",
    "question": "Which statement best explains why photosynthesis is the foundation of most food webs?",
    "choices": {"text": ["Sunlight is the source.", "Most ecosystems are found on land.", "Carbon dioxide is available.",
                         "The producers in all ecosystems are plants."], "label": ["A", "B", "C", "D"]},
    "answerKey": "A",
}  # fmt: skip
OBQA = {
    "id": "8-376", "question_stem": "Frilled sharks and angler fish live far beneath the surface of the ocean, which is why they are known as",
    "choices": {"text": ["Deep sea animals", "fish", "Long Sea Fish", "Far Sea Animals"], "label": ["A", "B", "C", "D"]},
    "answerKey": "A",
}  # fmt: skip

BEHIND = "Sarah was a much better surgeon than Maria so"

HUB = {  # set: (row, options, what is given to each choice, what is scored, the right one)
    "boolq": (
        {**BOOLQ, "label": 0},
        {"prompt": "{passage}\nQuestion: {question}?\nAnswer:", "choice_texts": ["no", "yes"]},
        [f"{BOOLQ['passage']}\nQuestion: {BOOLQ['question']}?\nAnswer:"] * 2, [" no", " yes"], 0,
    ),
    "boolq-google": (
        {**BOOLQ, "answer": True},
        {"prompt": "{passage}\nQuestion: {question}?\nAnswer:", "choice_texts": ["no", "yes"], "label": "answer"},
        [f"{BOOLQ['passage']}\nQuestion: {BOOLQ['question']}?\nAnswer:"] * 2, [" no", " yes"], 1,
    ),
    "piqa": (
        PIQA, {"prompt": "Question: {goal}\nAnswer:", "choices": ["sol1", "sol2"]},
        [f"Question: {PIQA['goal']}\nAnswer:"] * 2, [" Pour it onto a plate", " Pour it into a jar"], 1,
    ),
    "siqa": (
        SIQA,
        {"prompt": "Q: {context} {question}\nA:", "choices": ["answerA", "answerB", "answerC"], "choice_labels": ["1", "2", "3"]},
        [f"Q: {SIQA['context']} {SIQA['question']}\nA:"] * 3,
        [" make a new plan", " Go home and see Riley", " Find somewhere to go"], 2,
    ),
    "hellaswag": (
        HELLASWAG, {"prompt": "{activity_label}: {ctx}", "choices": "endings"},
        ["Roof shingle removal: A man is sitting on a roof. he"] * 4,
        [f" {ending}" for ending in HELLASWAG["endings"]], 3,
    ),
    "winogrande": (
        WINOGRANDE, {"prompt": "sentence", "blank": "_", "choices": ["option1", "option2"], "choice_labels": ["1", "2"], "label": "answer"},
        [f"{BEHIND} Sarah", f"{BEHIND} Maria"], [" always got the easier cases."] * 2, 1,
    ),
    "arc": (
        ARC, {"prompt": ASKED, "label": "answerKey"}, [ASKED.format(**ARC)] * 4,
        [f" {text}" for text in ARC["choices"]["text"]], 0,
    ),
    "openbookqa": (
        OBQA, {"prompt": "question_stem", "label": "answerKey"}, [OBQA["question_stem"]] * 4,
        [f" {text}" for text in OBQA["choices"]["text"]], 0,
    ),
}  # fmt: skip


def parts(records) -> tuple[list[str], list[str], int]:
    """(what is given to each choice, what is scored, the right one)"""
    right = [record.label for record in records]
    assert sorted(right) == [0.0] * (len(right) - 1) + [1.0]
    given, scored = zip(*([text for text, _ in record.segments] for record in records), strict=True)
    assert all([s for _, s in record.segments] == [False, True] for record in records)
    return list(given), list(scored), right.index(1.0)


@pytest.mark.parametrize("name", HUB)
def test_the_hubs_form(name):
    row, options, *expected = HUB[name]
    records = multiple_choice(row, DataOptions(train="x", **options), _part)
    assert list(parts(records)) == expected


def adapted(lead: str, question: str, kind: str, answers: list[str], answer: str) -> dict:
    """A record as LLM-Adapters' json has it."""
    listed = " ".join(f"{kind.capitalize()}{n}: {text}" for n, text in enumerate(answers, 1))
    names = "/".join(f"{kind}{n}" for n in range(1, len(answers) + 1))
    return {
        "instruction": f"{lead} {question}\n\n{listed} Answer format: {names}",
        "input": "", "output": f"the correct answer is {answer}", "answer": answer,
    }  # fmt: skip


TO_QUESTION = "Please choose the correct answer to the question:"
ADAPTED = {
    "boolq": (
        {"instruction": "Please answer the following question with true or false, question: "
         f"{BOOLQ['question']}?\n\nAnswer format: true/false", "input": "",
         "output": "the correct answer is false", "answer": "false"},
        {"choice_texts": ["yes", "no"]}, [f"Question: {BOOLQ['question']}?\nAnswer:"] * 2, [" yes", " no"], 1,
    ),
    "piqa": (
        adapted("Please choose the correct solution to the question:", PIQA["goal"], "solution",
                [PIQA["sol1"], PIQA["sol2"]], "solution2"), {}, *HUB["piqa"][2:],
    ),
    "siqa": (
        adapted(TO_QUESTION, f"{SIQA['context']} {SIQA['question']}", "answer",
                [SIQA["answerA"], SIQA["answerB"], SIQA["answerC"]], "answer3"),
        {"prompt": "Q: {question}\nA:"}, *HUB["siqa"][2:],
    ),
    "hellaswag": (
        adapted("Please choose the correct ending to complete the given sentence:",
                "Roof shingle removal: A man is sitting on a roof. he", "ending",
                HELLASWAG["endings"], "ending4"),
        {"prompt": "question"}, *HUB["hellaswag"][2:],
    ),
    "winogrande": (
        adapted("Please choose the correct answer to fill in the blank to complete the given sentence:",
                WINOGRANDE["sentence"], "option", ["Sarah", "Maria"], "option2"),
        {"blank": "_"}, *HUB["winogrande"][2:],
    ),
    "arc": (
        adapted(TO_QUESTION, ARC["question"], "answer", ARC["choices"]["text"], "answer1"), {},
        *HUB["arc"][2:],
    ),
    "openbookqa": (
        adapted(TO_QUESTION, OBQA["question_stem"], "answer", OBQA["choices"]["text"], "answer1"),
        {"prompt": "question"}, *HUB["openbookqa"][2:],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ADAPTED)
def test_llm_adapters_form(name):
    row, options, *expected = ADAPTED[name]
    records = commonsense(row, DataOptions(train="x", **options), _part, "")
    assert list(parts(records)) == expected


@pytest.mark.parametrize("name", ["ARC-Easy", "ARC-Challenge", "openbookqa", "boolq"])
def test_every_record_of_the_real_files_is_read(name):
    options = DataOptions(train="x", choice_texts=["yes", "no"] if name == "boolq" else None)
    for split in ("test", "train"):
        rows = json.loads(shared(f"data/commonsense/{name}/{split}.json").read_text())
        for row in rows:
            given, scored, right = parts(commonsense(row, options, _part, ""))
            assert len(set(given)) == 1 and given[0].startswith("Question: ")
            assert all(text.strip() for text in scored)
            if name != "boolq":
                mark = f"{row['answer'].capitalize()}:{scored[right]}"
                assert mark in row["instruction"]


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({**WINOGRANDE, "sentence": "no blank"}, {}, "no text behind a blank '_'"),
        ({**WINOGRANDE, "sentence": "it ends in _ "}, {}, "no text behind a blank '_'"),
        ({**WINOGRANDE, "answer": ""}, {}, "answer is ''; accepted: 1, 2, or a choice"),
    ],
)  # fmt: skip
def test_a_blank_that_is_missing(row, options, message):
    given = {**HUB["winogrande"][1], **options}
    with pytest.raises(BadRecord, match=message):
        multiple_choice(row, DataOptions(train="x", **given), _part)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["data.choice_texts=[a, b]", "data.choices=[x, y]"], "data.choice_texts: given together"),
        (["data.blank=_", "data.answers=names"], "data.blank: given with data.answers=names"),
        (["data.choice_texts=[a]"], r"data.choice_texts: \['a'\] given"),
        (['data.blank=""'], "data.blank: "),
    ],
)
def test_what_does_not_go_together(given, message, tmp_path):
    with pytest.raises(UserError, match=message):
        quick_config(tmp_path, "task.kind=multiple_choice", *given)


def test_other_texts_need_as_many_answers():
    row = ADAPTED["siqa"][0]
    with pytest.raises(BadRecord, match="3 answers for 2 choice_texts"):
        commonsense(row, DataOptions(train="x", choice_texts=["a", "b"]), _part, "")
