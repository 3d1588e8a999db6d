"""Records of every format as segments of text, learned or not; expected texts written by hand."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.unit.trainer.data.chat_templates import CHATML, LLAMA3, QWEN3
from tests.unit.trainer.tasks.tokenizers_of_all_kinds import byte_level
from trainer.config.config import parse_config
from trainer.config.data_options import DataOptions
from trainer.data.formats import detect_format, to_records
from trainer.data.tokenise import prepare
from trainer.errors import BadRecord, UserError
from trainer.tasks.causal_lm import CausalLM, CausalLMOptions

TOKENIZER = byte_level(False, True)
TASK = CausalLM(CausalLMOptions(), TOKENIZER)

Segments = list[tuple[str, bool]]


def converted(row: dict, template: str | None = CHATML, **keys: Any) -> list[Segments]:
    TOKENIZER.chat_template = template
    options = DataOptions(train="-", **keys)
    records = to_records(row, detect_format(row, options, TASK), options, TOKENIZER)
    return [[part for part in record.segments if part[0]] for record in records]


def refused(row: dict, template: str | None = CHATML, **keys: Any) -> str:
    with pytest.raises(BadRecord) as caught:
        converted(row, template, **keys)
    return str(caught.value)


def chatml(*turns: tuple[str, str, bool]) -> Segments:
    """(role, content, whether it is learned) as ChatML has it: learned is a turn after its header."""
    found: Segments = []
    for role, content, is_learned in turns:
        header = f"<|im_start|>{role}\n"
        parts = [(header, False), (f"{content}<|im_end|>\n", True)] if is_learned else (
            [(f"{header}{content}<|im_end|>\n", False)])  # fmt: skip
        for text, learned in parts:
            if found and found[-1][1] == learned:
                found[-1] = (found[-1][0] + text, learned)
            else:
                found.append((text, learned))
    return found


QA = ("user", "one?", False), ("assistant", "1", True)
TWO = *QA, ("user", "two?", False), ("assistant", "2", True)
SYSTEM = ("system", "Be brief.", False)


def said(role: str, content: str, **more: Any) -> dict:
    return {"role": role, "content": content, **more}


def came(role: str, value: str, **more: Any) -> dict:
    return {"from": role, "value": value, **more}


TALK = [said("user", "one?"), said("assistant", "1"), said("user", "two?"), said("assistant", "2")]
SHAREGPT = [came("human", "one?"), came("gpt", "1"), came("human", "two?"), came("gpt", "2")]
BRIEF = "Be brief."

CHATS: dict[str, tuple[dict, dict, Segments]] = {
    # --- messages
    "messages": ({"messages": TALK}, {}, chatml(*TWO)),
    "messages elsewhere": ({"chat": TALK}, {"messages": "chat"}, chatml(*TWO)),
    "JSON text": ({"messages": json.dumps(TALK)}, {}, chatml(*TWO)),
    "conversations with role and content": ({"conversations": TALK}, {}, chatml(*TWO)),
    "weight and train": (
        {"messages": [TALK[0], said("assistant", "1", weight=0), TALK[2], TALK[3],
                      said("user", "3?"), said("assistant", "3", train=False)]}, {},
        chatml(QA[0], ("assistant", "1", False), *TWO[2:])),
    # --- ShareGPT
    "ShareGPT": ({"conversations": SHAREGPT, "id": "a"}, {}, chatml(*TWO)),
    "ShareGPT, system": (
        {"conversations": [came("system", BRIEF), *SHAREGPT]}, {}, chatml(SYSTEM, *TWO)),
    "ShareGPT, a column of system": (
        {"conversations": SHAREGPT, "system": BRIEF}, {}, chatml(SYSTEM, *TWO)),
    "ShareGPT, other names": (
        {"conversations": [came("user", "one?"), came("chatgpt", "1"), came("human", "two?"),
                           came("bing", "2")]}, {}, chatml(*TWO)),
    "ShareGPT, weight and train": (
        {"conversations": [SHAREGPT[0], came("gpt", "1", train=False), SHAREGPT[2],
                           came("gpt", "2", weight=1)]}, {},
        chatml(QA[0], ("assistant", "1", False), *TWO[2:])),
    "ShareGPT, last turn": ({"conversations": SHAREGPT}, {"turns": "last"},
                            chatml(QA[0], ("assistant", "1", False), *TWO[2:])),
    "ShareGPT in column messages": ({"messages": SHAREGPT}, {}, chatml(*TWO)),
    "roles of ShareGPT, fields of messages": (
        {"messages": [said("human", "one?"), said("gpt", "1")]}, {}, chatml(*QA)),
    "tool results": (
        {"conversations": [*SHAREGPT[:2], came("observation", "5"), came("gpt", "2")]}, {},
        chatml(*QA, ("tool", "5", False), ("assistant", "2", True))),
    "function results": (
        {"conversations": [*SHAREGPT[:2], came("function", "5"), came("gpt", "2")]}, {},
        chatml(*QA, ("tool", "5", False), ("assistant", "2", True))),
    # --- names of one's own
    "own fields": (
        {"turns": [{"speaker": "user", "text": "one?"}, {"speaker": "assistant", "text": "1"}]},
        {"messages": "turns", "message_fields": {"role": "speaker", "content": "text"}},
        chatml(*QA)),
    "own fields, one of them": (
        {"messages": [{"role": "user", "text": "one?", "content": "no"},
                      {"role": "assistant", "text": "1", "skip": 0}]},
        {"message_fields": {"content": "text", "weight": "skip"}},
        []),
    "own roles": (
        {"messages": [said("customer", "one?"), said("bot", "1")]},
        {"roles": {"assistant": ["bot"], "user": ["customer"]}}, chatml(*QA)),
    "own roles in ShareGPT": (
        {"conversations": [came("human", "one?"), came("Bot", "1")]},
        {"roles": {"assistant": ["Bot"]}}, chatml(*QA)),
    "roles exchanged": (
        {"messages": [said("assistant", "one?"), said("user", "1")]},
        {"roles": {"assistant": ["user"], "user": ["assistant"]}}, chatml(*QA)),
    # --- a system message by default
    "default system": ({"messages": TALK}, {"system": BRIEF}, chatml(SYSTEM, *TWO)),
    "default system, one of its own": (
        {"messages": [said("system", BRIEF), *TALK], "system": "no"}, {"system": "no"},
        chatml(SYSTEM, *TWO)),
    "default system, a column": (
        {"messages": TALK, "system": BRIEF}, {"system": "no"}, chatml(SYSTEM, *TWO)),
    # --- prompt and completion
    "conversational": ({"prompt": TALK[:3], "completion": TALK[3:]}, {},
                       chatml(QA[0], ("assistant", "1", False), *TWO[2:])),
    "conversational, several turns": (
        {"prompt": TALK[:1], "completion": TALK[1:]}, {}, chatml(*TWO)),
    "conversational, elsewhere": (
        {"asked": TALK[:1], "said": TALK[1:2]}, {"prompt": "asked", "completion": "said"},
        chatml(*QA)),
    "conversational, JSON text": (
        {"prompt": json.dumps(TALK[:1]), "completion": json.dumps(TALK[1:2])}, {}, chatml(*QA)),
    "as chat": ({"prompt": "one?", "completion": "1"}, {"as_chat": True}, chatml(*QA)),
    "as chat, templates": (
        {"q": "one", "a": 1}, {"as_chat": True, "prompt": "{q}?", "completion": "a"}, chatml(*QA)),
    "as chat, system": ({"prompt": "one?", "completion": "1"}, {"as_chat": True, "system": BRIEF},
                        chatml(SYSTEM, *QA)),
    "as chat, a column of system": (
        {"prompt": "one?", "completion": "1", "system": BRIEF}, {"as_chat": True},
        chatml(SYSTEM, *QA)),
    "as chat, that column in the prompt": (
        {"q": "?", "completion": "1", "system": "one"}, {"as_chat": True, "prompt": "{system}{q}"},
        chatml(*QA)),
    # --- alpaca
    "alpaca as chat": ({"instruction": "one?", "input": "", "output": "1"}, {"as_chat": True},
                       chatml(*QA)),
    "alpaca as chat, input": (
        {"instruction": "Add.", "input": "1 2", "output": "3"}, {"as_chat": True},
        chatml(("user", "Add.\n1 2", False), ("assistant", "3", True))),
    "alpaca as chat, system and history": (
        {"instruction": "two?", "output": "2", "system": BRIEF, "history": [["one?", "1"]]},
        {"as_chat": True}, chatml(SYSTEM, *TWO)),
    "alpaca as chat, last turn": (
        {"instruction": "two?", "output": "2", "history": [["one?", "1"]]},
        {"as_chat": True, "turns": "last"},
        chatml(QA[0], ("assistant", "1", False), *TWO[2:])),
}  # fmt: skip


@pytest.mark.parametrize("name", CHATS)
def test_conversations(name: str) -> None:
    row, keys, expected = CHATS[name]
    if not expected:
        assert refused(row, **keys) == "messages: no assistant message that is trained"
    else:
        assert converted(row, **keys) == [expected]


ADD = {"name": "add", "arguments": {"a": 1}}


@pytest.mark.parametrize("call", [ADD, [ADD], {**ADD, "arguments": '{"a": 1}'}])
def test_function_calls_of_sharegpt(call: Any) -> None:
    """LLaMA-Factory's form: the call is a turn of its own, tools and system are columns."""
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    row = {
        "conversations": [came("human", "one?"), came("function_call", json.dumps(call)),
                          came("observation", "1"), came("gpt", "It is 1.")],
        "tools": json.dumps([tool]),
    }  # fmt: skip
    asked, answered = converted(row, QWEN3)
    written = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    assert asked[1] == (f"<think>\n\n</think>\n\n{written}<|im_end|>\n", True)
    assert answered[1][0].endswith("It is 1.<|im_end|>\n") and written in answered[0][0]
    (whole,) = converted(row, LLAMA3)
    assert whole[1] == ('{"name": "add", "parameters": {"a": 1}}<|eot_id|>', True)


# --- alpaca's own form

PREAMBLE = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)
ASKED = "\n\n### Instruction:\n{}\n\n### Response:\n"

ALPACA: dict[str, tuple[dict, dict, Segments]] = {
    "plain": ({}, {}, [(PREAMBLE + ASKED.format("two?"), False), ("2", True)]),
    "nothing": ({"system": "", "history": []}, {},
                [(PREAMBLE + ASKED.format("two?"), False), ("2", True)]),
    "cells of a csv": ({"system": "", "history": "", "input": ""}, {},
                       [(PREAMBLE + ASKED.format("two?"), False), ("2", True)]),
    "system": ({"system": BRIEF}, {}, [(BRIEF + ASKED.format("two?"), False), ("2", True)]),
    "default system": ({}, {"system": BRIEF},
                       [(BRIEF + ASKED.format("two?"), False), ("2", True)]),
    "system and input": (
        {"system": BRIEF, "input": "3"}, {"system": "no"},
        [(BRIEF + "\n\n### Instruction:\ntwo?\n\n### Input:\n3\n\n### Response:\n", False),
         ("2", True)]),
    "history": ({"history": [["one?", "1"]]}, {},
                [(PREAMBLE + ASKED.format("one?"), False), ("1</s>", True),
                 (ASKED.format("two?"), False), ("2", True)]),
    "history as JSON": ({"history": '[["one?", "1"]]'}, {"turns": "last"},
                        [(PREAMBLE + ASKED.format("one?"), False), ("1</s>", False),
                         (ASKED.format("two?"), False), ("2", True)]),
    "history without end": ({"history": [["one?", "1"]]}, {"add_eos": False},
                            [(PREAMBLE + ASKED.format("one?"), False), ("1", True),
                             (ASKED.format("two?"), False), ("2", True)]),
}  # fmt: skip


@pytest.mark.parametrize("name", ALPACA)
def test_alpaca(name: str) -> None:
    row, keys, expected = ALPACA[name]
    assert converted({"instruction": "two?", "output": "2", **row}, None, **keys) == [expected]


def test_alpaca_is_its_template(tmp_path: Path) -> None:
    """The same tokens and mask from the plain form, from the chat template of that name, and from
    a conversation."""
    row = {"instruction": "two?", "output": "2", "system": BRIEF, "history": [["one?", "1"]]}
    rows = [row, row, {"messages": [said("system", BRIEF), *TALK]}]
    found = []
    for index, (row, as_chat) in enumerate(zip(rows, (False, True, False), strict=True)):
        path = tmp_path / f"{index}.jsonl"
        path.write_text(json.dumps(row))
        options = DataOptions(
            train=str(path), cache=str(tmp_path), as_chat=as_chat, chat_template="alpaca"
        )
        found.append(prepare(str(path), "train", None, options, TASK)[0])
    assert found[0] == found[1] == found[2]


# --- what is refused

BAD: dict[str, tuple[dict, dict, str]] = {
    "a preference pair": (
        {"prompt": "a", "chosen": "b", "rejected": "c"}, {},
        "chosen and rejected are a preference pair, and there is no preference training; accepted: "
        "one answer, as with data.completion=chosen (data.messages=chosen for a chat)"),
    "a preference pair of chats": (
        {"chosen": TALK, "rejected": TALK, "messages": TALK}, {}, "chosen and rejected are a"),
    "KTO": ({"prompt": "a", "completion": "b", "label": False}, {},
            "label False judges a completion, and there is no preference training; accepted: "
            "data.format=prompt_completion to train on all completions alike"),
    "KTO in a csv": ({"prompt": "a", "completion": "b", "label": "True"}, {},
                     "label 'True' judges a completion"),
    "another role of ShareGPT": (
        {"conversations": [came("human", "a"), came("bot", "b")]}, {},
        "conversations[1]: from 'bot'; accepted: gpt, chatgpt, bing, bard, model, human, "),
    "roles without an assistant": (
        {"messages": [said("Q", "a"), said("A", "b")]}, {},
        "messages: no assistant message; the roles are Q, A (data.roles says which of them is the "
        "assistant's)"),
    "a call that is none": (
        {"conversations": [came("human", "a"), came("function_call", "add(1)")]}, {},
        "conversations[1]: tool_calls holds a str; accepted: a list"),
    "no fields of messages": (
        {"messages": [{"speaker": "user", "text": "a"}]}, {},
        "messages[0]: no message with role and content"),
    "half conversational": (
        {"prompt": TALK[:1], "completion": "1"}, {},
        "prompt or completion is a list of messages, the other is none; accepted: two texts, or "
        "two lists"),
    "a completion without an answer": (
        {"prompt": TALK[:1], "completion": TALK[2:3]}, {},
        "completion: no assistant message; the roles are user"),
    "no completion": ({"prompt": TALK[:1], "completion": []}, {},
                      "prompt or completion is a list of messages, the other is none"),
    "Python's notation": ({"messages": str(TALK)}, {},
                          "messages: a text that is no JSON (it looks like Python's notation); "
                          "accepted: a list, or its JSON"),
    "messages in a text": ({"text": json.dumps(TALK)}, {},
                           "text holds messages; accepted: data.messages=text"),
    "history of one": ({"instruction": "a", "output": "b", "history": [["c"]]}, {},
                       "history[0]: accepted: a pair of texts, [asked, answered]"),
    "history of texts": ({"instruction": "a", "output": "b", "history": "c"}, {},
                         "history: a text that is no JSON; accepted: a list, or its JSON"),
    "a system that is no text": ({"messages": TALK, "system": [1]}, {},
                                 "system holds a list; accepted: text"),
    "text as chat": ({"text": "a"}, {"as_chat": True},
                     "data.as_chat: true given, but a record of format text has no turns; "),
    "a system message of texts": (
        {"prompt": "a", "completion": "b"}, {"system": BRIEF},
        "data.system: given, but a record of format prompt_completion has no system message; "),
    "an empty answer": ({"prompt": "a", "completion": None}, {"as_chat": True},
                        "completion is null"),
    "a text that pandas lacks": ({"text": float("nan")}, {}, "text is NaN; accepted: text"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_refused(name: str) -> None:
    row, keys, reason = BAD[name]
    assert refused(row, **keys).startswith(reason)


def test_a_template_that_leaves_out_the_system_message_names_it() -> None:
    template = CHATML.replace(
        "{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"
    )
    row = {"instruction": "one?", "output": "1"}
    assert refused(row, template, as_chat=True, system=BRIEF) == (
        "system: the chat template leaves out its content"
    )
    row |= {"history": [["zero?", "0"]]}
    template = CHATML.replace("m['content']", "m['content'][:3]")
    assert refused(row, template, as_chat=True) == (
        "history[0]: the chat template leaves out its content"
    )


def test_one_of_a_pair_can_be_trained_on() -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert converted(row, completion="chosen") == [[("a", False), ("b", True)]]
    assert converted({"chosen": TALK, "rejected": TALK}, messages="chosen") == [chatml(*TWO)]
    row = {"prompt": "a", "completion": "b", "label": True}
    assert converted(row, format="prompt_completion") == [[("a", False), ("b", True)]]
    row["label"] = "sports"
    assert converted(row) == [[("a", False), ("b", True)]]


@pytest.mark.parametrize(
    ("keys", "reason"),
    [({"as_chat": True, "format": "text"}, "data.as_chat: true given with data.format=text"),
     ({"as_chat": True, "format": "commonsense"}, "data.as_chat: true given with data.format=commonsense"),
     ({"roles": {"user": ["a"], "assistant": ["b", "a"]}}, "data.roles: a given for two roles"),
     ({"template_arguments": {"tools": 1}}, "data.template_arguments: tools given; accepted: names"),
     ({"template_arguments": {"a b": 1}}, "data.template_arguments: a b given"),
     ({"template_arguments": {"bos_token": ""}}, "data.template_arguments: bos_token given")],
)  # fmt: skip
def test_configurations_that_are_refused(keys: dict, reason: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_config({"model": {"id": "-"}, "data": {"train": "-", **keys}, "run": {"name": "a"}})
    assert str(caught.value).startswith(reason)


# --- from files: the same tokens whatever the file


def test_chats_of_every_file(tmp_path: Path) -> None:
    """Also JSON text in the cells of a csv, and lists in parquet."""
    rows = [{"conversations": SHAREGPT}, {"conversations": SHAREGPT[:2]}]
    cells = [{"conversations": json.dumps(row["conversations"])} for row in rows]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["conversations"])
        writer.writeheader()
        writer.writerows(cells)
    TOKENIZER.chat_template = CHATML
    for suffix in ("jsonl", "json", "parquet", "csv"):
        path = str(tmp_path / f"a.{suffix}")
        options = DataOptions(train=path, cache=str(tmp_path / "cache"))
        data = prepare(path, "train", None, options, TASK)
        for index, turns in enumerate((TWO, QA)):
            whole = "".join(text for text, _ in chatml(*turns))
            ids, mask = data[index].input_ids, data[index].loss_mask
            assert list(ids) == TOKENIZER(whole, add_special_tokens=False)["input_ids"]
            learned = TOKENIZER.decode([i for i, m in zip(ids, mask, strict=True) if m])
            assert learned == "".join(f"{c}<|im_end|>\n" for r, c, _ in turns if r == "assistant")


def test_a_list_of_texts_fills_a_template_line_by_line():
    row = {"text": "Return 1.", "tests": ["assert one() == 1", "assert one()"], "code": "x"}
    (segments,) = converted(row, prompt="{text}\n{tests}\n", completion="code")
    assert segments[0] == ("Return 1.\nassert one() == 1\nassert one()\n", False)
    assert refused(row | {"tests": [1]}, prompt="{tests}", completion="code") == (
        "tests holds a list; accepted: text"
    )
