"""Prompts of rows are the tokens before the answer as training has them, with an answer or not."""

import pytest

from tests.helpers import quick_config
from tests.unit.trainer.data.chat_templates import CHATML
from trainer.data.encode import Encoder
from trainer.errors import BadRecord, UserError
from trainer.generation.prompts import of_messages, of_rows, of_text
from trainer.tasks.registry import TASKS

ALPACA = {"instruction": "Name a fruit.", "output": "An apple."}
ASKED = [
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "It is 5."},
]
MORE = [*ASKED, {"role": "user", "content": "And 3 + 3?"}, {"role": "assistant", "content": "6"}]
SHAREGPT = [{"from": "human", "value": "Hi there"}, {"from": "gpt", "value": "Hello."}]
FULL = {
    "template": ({"question": "Mia has 3 eggs.", "answer": "3 = 3. #### 3"},
                 ["data.prompt='{question}\\n'", "data.completion=answer"], {"answer"}),
    "column": ({"prompt": "Mia has three", "completion": " eggs now."}, [], {"completion"}),
    "trailing space": ({"prompt": "Q: Mia? A: ", "completion": "eggs"}, [], {"completion"}),
    "alpaca": (ALPACA, [], {"output"}),
    "chat": ({"messages": ASKED}, [], {"messages"}),
    "chat of two turns": ({"messages": MORE}, [], {"messages"}),
    "sharegpt": ({"conversations": SHAREGPT}, [], {"conversations"}),
    "as a chat": ({"prompt": "Mia has 3", "completion": "eggs"}, ["data.as_chat=true"],
                  {"completion"}),
}  # fmt: skip
"""(row, keys of the configuration, columns that hold the answer)"""


def without_answer(row: dict, answers: set[str]) -> dict:
    kept = {name: value for name, value in row.items() if name not in answers}
    return kept | {name: row[name][:-1] for name in answers if isinstance(row[name], list)}


@pytest.fixture
def task_of(tmp_path, tokenizer):
    def make(*overrides: str):
        config = quick_config(
            tmp_path, "data.prompt=prompt", "data.completion=completion", *overrides
        )
        tokenizer.chat_template = CHATML
        return config, TASKS["causal_lm"](config.task, tokenizer)

    yield make
    tokenizer.chat_template = None


@pytest.mark.parametrize("kind", FULL)
def test_a_rows_prompt_is_what_training_has_before_the_answer(task_of, kind):
    row, overrides, answers = FULL[kind]
    config, task = task_of(*overrides, "data.turns=last")
    batch, _ = Encoder("rows", config.data, task)([("rows:1", row)])
    ids, mask = (batch.column(name)[0].as_py() for name in ("input_ids", "loss_mask"))
    expected = ids[: mask.index(1)]
    bare = without_answer(row, answers)
    with_answer, alone = of_rows(iter([("rows:1", row), ("rows:2", bare)]), config.data, task)
    assert with_answer.ids == alone.ids == expected
    assert alone.reference is None and with_answer.reference
    said = "".join(str(value) for value in row.values())
    assert with_answer.reference.strip() in said


def test_texts_are_taken_as_they_are(task_of):
    config, task = task_of("data.add_bos=true")
    ids = [1, *task.tokenizer("One day a fox")["input_ids"]]
    rows = iter([("rows:1", {"text": "One day a fox"})])
    (of_row,) = of_rows(rows, config.data, task)
    assert of_row.ids == of_text("One day a fox", config.data, task).ids == ids
    bare, _ = task_of()
    assert of_text("One day a fox", bare.data, task).ids == ids[1:]
    with pytest.raises(UserError, match="no token in it"):
        of_text("", bare.data, task)


def test_a_conversation_ends_where_the_assistant_begins(task_of):
    config, task = task_of()
    text = task.tokenizer.apply_chat_template(ASKED[:1], tokenize=False, add_generation_prompt=True)
    expected = task.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert of_messages(ASKED[:1], config.data, task.tokenizer).ids == expected
    task.tokenizer.chat_template = None
    with pytest.raises(BadRecord, match="no chat template"):
        of_messages(ASKED[:1], config.data, task.tokenizer)


@pytest.mark.parametrize("row", [{"question": "?"}, {"prompt": 3.5j}, {"prompt": ""}])
def test_a_row_that_cannot_be_used_is_named(task_of, row):
    config, task = task_of("data.add_bos=false")
    with pytest.raises(UserError, match=r"^rows:7: "):
        list(of_rows(iter([("rows:7", row)]), config.data, task))
