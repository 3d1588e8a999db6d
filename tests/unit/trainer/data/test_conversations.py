"""Random conversations under every chat template: each answer and its end is learned once, and nothing else."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.campaigns.data_table import tokenizer
from tests.hostile import fuzz
from tests.unit.trainer.data.families import FAMILIES
from tests.unit.trainer.data.spoken import SPEECH, Said
from trainer.config.data_options import DataOptions
from trainer.data.formats import to_records
from trainer.tasks.base import Example, Record
from trainer.tasks.causal_lm import CausalLM, CausalLMOptions

TOOLS = [
    {"type": "function", "function": {"name": name, "description": "Does it.", "parameters": {
        "type": "object", "properties": {"what": {"type": "string"}}, "required": ["what"]}}}
    for name in ("count", "weigh")
]  # fmt: skip
PIECES = [
    "eggs", "Anna has 3", ".", " ", "  ", "\n", "\n\n", "\t", "é", "e\u0301", "ﬁ", "👍🏽", "शि", "\u200d", "\u00a0", "\u2028",
    "你好", "שלום", '"', "\\n", "{", "}", "{{ x }}", "<b>", "user", "assistant", "</s>", "<s>", "<think>", "###",
]  # fmt: skip


def texts(family: str) -> st.SearchStrategy[str]:
    """Of up to six pieces, the family's special tokens among them."""
    pieces = [*PIECES, *FAMILIES[family].tokens]
    return st.lists(st.sampled_from(pieces), max_size=6).map("".join)


@st.composite
def conversations(draw: st.DrawFn, family: str) -> tuple[dict, dict[int, str]]:
    """(record, what each answer that is trained has to be, by its index)."""
    speech, text = SPEECH[family], texts(family)
    has_calls = speech.calls > 0 and draw(st.booleans())
    messages: list[dict] = []
    wanted = {}

    def answers(said: Said, **more: Any) -> None:
        message = {"role": "assistant", "content": said.content, **more}
        if said.inline:
            message["content"] = f"<think>\n{said.thought}\n</think>\n\n{said.content}"
        elif said.thought:
            message[speech.thoughts] = said.thought
        if wanted and draw(st.integers(0, 5)) == 0:
            message["train"] = False
        else:
            wanted[len(messages)] = speech.text(said)
        messages.append(message)

    if speech.system and draw(st.booleans()):
        messages.append({"role": "system", "content": draw(text)})
    for _ in range(draw(st.integers(1, 12))):
        messages.append({"role": "user", "content": draw(text)})
        for _ in range(draw(st.integers(0, speech.rounds)) if has_calls else 0):
            names = st.lists(st.sampled_from(["count", "weigh"]), min_size=1, max_size=speech.calls)
            calls = tuple((name, {"what": draw(text)}) for name in draw(names))
            content = draw(text) if speech.content_with_calls else ""
            answers(Said(content, calls=calls), tool_calls=[
                {"type": "function", "function": {"name": name, "arguments": arguments}}
                for name, arguments in calls])  # fmt: skip
            messages.extend({"role": "tool", "content": draw(text)} for _ in calls)
        thought = draw(text).replace("<think>", "").strip() if speech.thoughts else ""
        inline = bool(thought) and speech.inline and draw(st.booleans())
        answers(Said(draw(text), thought, inline))
    if draw(st.booleans()):
        messages.append({"role": "user", "content": draw(text)})
    tools = {"tools": TOOLS} if has_calls and speech.tools else {}
    return {"messages": messages, **tools}, wanted


@pytest.mark.parametrize("family", FAMILIES)
@fuzz(usual=6, many=200)
@given(data=st.data(), turns=st.sampled_from(["auto", "all", "last"]))
def test_every_answer_is_learned_once(family: str, turns: str, data: st.DataObject) -> None:
    row, wanted = data.draw(conversations(family))
    records = to_records(row, "messages", DataOptions(train="-", turns=turns), tokenizer(family))
    if turns == "last":
        wanted = dict([*wanted.items()][-1:])
    if turns == "all" and family == "ChatML, marked":  # the marks leave it out
        wanted = {turn: text + "\n" for turn, text in wanted.items()}
    learned = [text for record in records for text, is_learned in record.segments if is_learned]
    assert learned == [*wanted.values()]
    turn = iter(wanted)
    for record in records:
        before = ""
        for text, is_learned in record.segments:
            if is_learned:
                check_place(family, row, next(turn), before, text)
            before += text
    check_tokens(family, records)


def check_place(family: str, row: dict, turn: int, before: str, text: str) -> None:
    """A turn is learned where the model writes it: behind what it is given then."""
    said, given = (rendered(family, row, turn, prompt) for prompt in (False, True))
    if (before + text).startswith(given):
        assert before == given
    else:  # what is given opens a thought that the answer has not
        assert before.startswith(said) and given.startswith(before)


def rendered(family: str, row: dict, end: int, prompt: bool) -> str:
    messages = []
    for message in row["messages"][:end]:
        calls = [
            {**call, "function": {**call["function"], "arguments": json.dumps(
                call["function"]["arguments"], ensure_ascii=False)}}
            for call in message.get("tool_calls", []) if family == "DeepSeek-V3"
        ]  # fmt: skip
        messages.append({**message, "tool_calls": calls} if calls else message)
    return tokenizer(family).apply_chat_template(
        messages, tools=row.get("tools"), tokenize=False, add_generation_prompt=prompt
    )


def check_tokens(family: str, records: list[Record]) -> None:
    """The learned tokens are those of the learned texts; one may begin before."""
    reader = tokenizer(family)
    for record, example in zip(
        records, CausalLM(CausalLMOptions(), reader).encode(records, 10**6), strict=True
    ):
        assert isinstance(example, Example)
        assert reader.decode(example.input_ids) == "".join(text for text, _ in record.segments)
        runs = [
            [token for token, _ in run]
            for is_learned, run in itertools.groupby(
                zip(example.input_ids, example.loss_mask, strict=True), lambda pair: pair[1]
            )
            if is_learned
        ]
        texts = [text for text, is_learned in record.segments if is_learned]
        for run, text in zip(runs, texts, strict=True):
            assert reader.decode(run).endswith(text) and not reader.decode(run[1:]).endswith(text)
