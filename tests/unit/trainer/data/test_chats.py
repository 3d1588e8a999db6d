"""Conversations under the templates of current families: what is learned, and what is refused."""

import json
import re
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.hostile import fuzz
from tests.unit.trainer.data.chat_templates import CHATML, END_OF_TURN, LLAMA3, MARKED, QWEN3
from tests.unit.trainer.tasks.tokenizers_of_all_kinds import byte_level
from trainer.config.data_options import DataOptions
from trainer.data import chats as chats_module
from trainer.data.dataset import TokenDataset
from trainer.data.formats import to_records
from trainer.data.held_out import left_out
from trainer.data.sources import read_rows
from trainer.data.tokenise import prepare
from trainer.errors import BadRecord, UserError
from trainer.tasks.base import Example, Record
from trainer.tasks.causal_lm import CausalLM, CausalLMOptions

TOKENIZER = byte_level(False, True)


def user(content: Any, **more: Any) -> dict:
    return {"role": "user", "content": content, **more}


def assistant(content: Any, **more: Any) -> dict:
    return {"role": "assistant", "content": content, **more}


def options(**keys: Any) -> DataOptions:
    return DataOptions(train="-", **keys)


def examples(template: str, messages: list, row: dict | None = None, **keys: Any) -> list[list]:
    TOKENIZER.chat_template = template
    row = {"messages": messages, **(row or {})}
    return [record.segments for record in to_records(row, "messages", options(**keys), TOKENIZER)]


def learned(segments: list) -> list[str]:
    return [text for text, is_learned in segments if is_learned]


def refused(template: str, messages: list, row: dict | None = None, **keys: Any) -> str:
    with pytest.raises(BadRecord) as caught:
        examples(template, messages, row, **keys)
    return str(caught.value)


# --- every turn once, and nothing else

TEXT = st.text(st.sampled_from("ab01 \n.é👍{<'\""), min_size=0, max_size=8)


@st.composite
def conversations(draw: Any) -> list[dict]:
    """Turns with unique contents, some of them repeated in what the user says."""
    messages = [{"role": "system", "content": "S" + draw(TEXT)}] if draw(st.booleans()) else []
    for turn in range(draw(st.integers(1, 6))):
        said = f"«{turn}»" + draw(TEXT) + f"«/{turn}»"
        quoted = f"«{turn}»" if draw(st.booleans()) else ""
        messages += [user(f"Q{turn}" + draw(TEXT) + quoted), assistant(said)]
    return messages


def body(text: str) -> str:
    """A learned turn without the thought that a template may put before it."""
    text = re.sub(r"^<think>\n\n</think>\n\n", "", text)
    return text.removeprefix("<|channel|>final<|message|>").removeprefix(" ")


@pytest.mark.parametrize("turns", ["auto", "all", "last"])
@pytest.mark.parametrize("family", END_OF_TURN)
@fuzz(usual=12)
@given(messages=conversations())
def test_every_turn_is_learned_once(family: str, turns: str, messages: list) -> None:
    template, end = END_OF_TURN[family]
    if turns == "all" and family.startswith("marked"):
        end += "\n"  # the marks leave it out
    found = examples(template, messages, turns=turns)
    said = [m["content"] for m in messages if m["role"] == "assistant"]
    said = said[-1:] if turns == "last" else said
    texts = [text for segments in found for text in learned(segments) if text]
    assert [body(text) for text in texts] == [text + end for text in said]
    for segments in found:  # and the whole is what the template gives
        whole = "".join(text for text, _ in segments)
        rendered = [
            TOKENIZER.apply_chat_template(messages[:stop], tokenize=False)
            for stop in range(1, len(messages) + 1)
            if messages[stop - 1]["role"] == "assistant" and family != "parts"
        ]
        assert family == "parts" or whole in rendered


@pytest.mark.parametrize(
    ("family", "count"),
    [("ChatML", 1), ("Llama 3", 1), ("Mistral", 1), ("Gemma", 1), ("Phi-3", 3), ("Qwen3", 3),
     ("gpt-oss", 3), ("DeepSeek-R1", 1), ("marked", 1), ("marked, thoughts dropped", 1)],
)  # fmt: skip
def test_an_example_of_its_own_only_where_history_is_rewritten(family: str, count: int) -> None:
    messages = [message for i in range(3) for message in (user(f"q{i}"), assistant(f"<b>a{i}"))]
    assert len(examples(END_OF_TURN[family][0], messages)) == count


@pytest.mark.parametrize("family", ["ChatML", "Llama 3", "Gemma", "DeepSeek-R1", "parts"])
@fuzz(usual=20)
@given(contents=st.lists(st.tuples(TEXT, TEXT), min_size=4, max_size=8), forged=st.booleans())
def test_many_turns_are_found_as_few_are(family: str, contents: list, forged: bool) -> None:
    """By the look of the first turn, or by a rendering for each: the same segments."""
    template, end = END_OF_TURN[family]
    messages = [m for asked, said in contents for m in (user(asked), assistant(said))]
    if forged:  # the user quotes the turn that follows
        prompt = "<|im_start|>assistant\n" if family == "ChatML" else "<｜Assistant｜>"
        messages[4]["content"] = prompt + messages[5]["content"] + end
    fast = examples(template, messages)
    with mock.patch("trainer.data.chats._FEW", 100):
        assert examples(template, messages) == fast


def test_many_turns_need_few_renderings() -> None:
    messages = [m for i in range(40) for m in (user(f"q{i}"), assistant(f"a{i}"))]
    applied = mock.Mock(side_effect=chats_module.render)
    with mock.patch.object(chats_module, "render", applied):
        (segments,) = examples(CHATML, messages)
    assert len(learned(segments)) == 40 and applied.call_count <= 9


# --- thoughts


@pytest.mark.parametrize("family", ["Qwen3", "marked, thoughts dropped"])
def test_thoughts_are_learned_where_they_are_shown(family: str) -> None:
    messages = [user("1?"), assistant("<think>\nhm\n</think>\n\none"),
                user("2?"), assistant("<think>\nwell\n</think>\n\ntwo")]  # fmt: skip
    first, second = examples(END_OF_TURN[family][0], messages)
    assert "hm" in "".join(learned(first)) and "one" in "".join(learned(first))
    assert "hm" not in "".join(text for text, _ in second)
    assert "well" in "".join(learned(second)) and "one" not in "".join(learned(second))


def test_reasoning_is_passed_on() -> None:
    (segments,) = examples(QWEN3, [user("1?"), assistant("one", reasoning_content="hm")])
    assert learned(segments) == ["<think>\nhm\n</think>\n\none<|im_end|>\n"]
    (segments,) = examples(END_OF_TURN["gpt-oss"][0], [user("1?"), assistant("one", thinking="hm")])
    assert learned(segments) == [
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>one"
        "<|return|>"
    ]


def test_a_thought_that_the_template_drops_is_no_record() -> None:
    messages = [user("1?"), assistant("<think>hm</think>one")]
    assert refused(END_OF_TURN["DeepSeek-R1"][0], messages) == (
        "messages[1]: the chat template leaves out its content"
    )


# --- tools

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}
CALLED = [
    user("Rain?"), {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "content": "no"}, assistant("It is dry."),
]  # fmt: skip


@pytest.mark.parametrize("content", ["missing", None, ""])
@pytest.mark.parametrize("as_text", [False, True])
def test_tools_and_their_calls(content: Any, as_text: bool) -> None:
    messages = [dict(message) for message in CALLED]
    if content != "missing":
        messages[1]["content"] = content
    tools = json.dumps([WEATHER]) if as_text else [WEATHER]
    if as_text:
        messages[1]["tool_calls"] = json.dumps([CALL])
    first, second = examples(QWEN3, messages, {"tools": tools})
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
    assert learned(first) == [f"<think>\n\n</think>\n\n{call}<|im_end|>\n"]
    assert learned(second) == ["<think>\n\n</think>\n\nIt is dry.<|im_end|>\n"]
    assert "# Tools" in first[0][0] and json.dumps(WEATHER) in first[0][0]
    (whole,) = examples(LLAMA3, messages, {"t": tools}, tools="t")
    assert learned(whole) == [
        '{"name": "weather", "parameters": {"city": "Köln"}}<|eot_id|>', "It is dry.<|eot_id|>"
    ]  # fmt: skip


BAD = {
    "a template without calls": (CHATML, CALLED, {}, "messages[1]: the chat template leaves out its "
                                 "tool calls"),
    "a template without tools": (CHATML, [user("a"), assistant("b")], {"tools": [WEATHER]},
                                 "tools: the chat template leaves out the tool 'weather'"),
    "tools that are none": (QWEN3, [user("a"), assistant("b")], {"tools": "a hammer"},
                            "tools: no list of functions with names"),
    "arguments that are no object": (
        QWEN3, [user("a"), {"role": "assistant", "tool_calls": [
            {"function": {"name": "f", "arguments": "{x"}}]}], {},
        "messages[1].tool_calls[0]: its arguments are no JSON object"),
    "a call without a name": (
        QWEN3, [user("a"), {"role": "assistant", "tool_calls": [{}]}], {},
        "messages[1].tool_calls[0]: no function with a name"),
    "an image": (CHATML, [user([{"type": "image_url", "image_url": {}}]), assistant("b")], {},
                 "messages[0]: content with a part of type 'image_url'; accepted: text"),
    "an answer that is no text": (CHATML, [user("a"), assistant({"b": 1})], {},
                                  "messages[1]: content holds a dict; accepted: text"),
    "no answer": (CHATML, [user("a"), assistant(None)], {},
                  "messages[1]: no message with role and content"),
    "half a turn": (CHATML, [user("a"), assistant("b", weight=0.5)], {},
                    "messages[1]: weight 0.5; accepted: 0, 1"),
    "a word for a switch": (CHATML, [user("a"), assistant("b", train="no")], {},
                            "messages[1]: train 'no'; accepted: true, false"),
    "nothing to learn": (CHATML, [user("a"), assistant("b", train=False)], {},
                         "messages: no assistant message that is trained"),
}  # fmt: skip


@pytest.mark.parametrize(("template", "messages", "row", "reason"), BAD.values(), ids=BAD.keys())
def test_refused(template: str, messages: list, row: dict, reason: str) -> None:
    assert refused(template, messages, row) == reason


# --- nothing is lost silently

NO_SYSTEM = (
    "{% for m in messages %}{% if m.role in ('user', 'assistant') %}"
    "{{ '<|' + m.role + '|>\n' + m.content + '</s>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
CUT_SHORT = CHATML.replace("m['content']", "m['content'][:5]")
NAMES_ONLY = CHATML.replace(
    "m['content']", "(m.tool_calls[0].function.name if m.tool_calls else m['content'])"
)
TALK = [user("Hi you"), assistant("Ahoy")]


@pytest.mark.parametrize(
    ("template", "messages", "lost"),
    [
        (NO_SYSTEM, [{"role": "system", "content": "Be a pirate."}, *TALK], 0),
        (NO_SYSTEM, [{"role": "system", "content": "Ahoy"}, *TALK], 0),  # elsewhere in the text
        (NO_SYSTEM, [*TALK, {"role": "tool", "content": "no"}, assistant("It is not.")], 2),
        (CUT_SHORT, [user("A long question"), assistant("yes")], 0),
        (CUT_SHORT, [user([{"type": "text", "text": "A long "}, "question"]), assistant("y")], 0),
        (CUT_SHORT, [user("A?"), assistant("not learned", train=False), user("B?"),
                     assistant("yes")], 1),
    ],
)  # fmt: skip
def test_a_message_that_the_template_drops(template: str, messages: list, lost: int) -> None:
    for turns in ("auto", "last"):
        assert refused(template, messages, turns=turns) == (
            f"messages[{lost}]: the chat template leaves out its content"
        )


@pytest.mark.parametrize(
    "content", ["  spaces\n", 'quo"ted\n\tlines', "Ünï", "", {"rain": False, "mm": [0, 1.5]}]
)
def test_contents_that_are_written_otherwise(content: Any) -> None:
    """Trimmed, or as JSON, as templates write what tools return."""
    messages = [*CALLED[:2], {"role": "tool", "content": content}, assistant("dry")]
    template = LLAMA3.replace("m['content'] | trim", "m['content'] | tojson")
    assert learned(*examples(template, messages))[1] == '"dry"<|eot_id|>'
    if isinstance(content, str):
        assert learned(*examples(LLAMA3, messages))[1] == "dry<|eot_id|>"


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_reasoning_that_the_template_drops(template: str, key: str) -> None:
    messages = [user("1?"), assistant("one", **{key: "hm"}), user("2?"), assistant("two")]
    reason = "messages[1]: the chat template leaves out its reasoning"
    assert refused(template, messages[:2]) == refused(template, messages) == reason
    assert learned(*examples(template, messages, turns="last"))[0].startswith("two")


def called(**arguments: Any) -> list:
    return [user("Rain?"), {"role": "assistant", "content": "", "tool_calls": [
        {"function": {"name": "weather", "arguments": arguments}}]}]  # fmt: skip


def test_arguments_are_learned_too() -> None:
    reason = "messages[1]: the chat template leaves out its tool calls"
    assert refused(NAMES_ONLY, called(city="Köln")) == reason
    every = called(city='K"ö"ln\n', days=[1, 2.5, None], deep={"dry": True}, none={})
    plain = (
        "{% for k, v in m.tool_calls[0].function.arguments.items() %}{{ k ~ '=' ~ v }}{% endfor %}"
    )
    for template in (QWEN3, LLAMA3, LLAMA3.replace("{{ f.arguments | tojson }}", plain.replace(
            "m.tool_calls[0].function", "f"))):  # fmt: skip
        assert len(learned(*examples(template, every))) == 1


def test_tools_are_compared_with_none() -> None:
    """A tool that the user speaks of is not yet in the template."""
    messages = [user("Use weather"), assistant("b")]
    reason = "tools: the chat template leaves out the tool 'weather'"
    assert refused(CHATML, messages, {"tools": [WEATHER]}) == reason
    assert examples(QWEN3, messages, {"tools": [WEATHER]})


# --- contents and switches


def test_parts_of_text_are_joined() -> None:
    parts = [{"type": "text", "text": "two "}, "parts"]
    for family, (template, end) in END_OF_TURN.items():
        (segments,) = examples(template, [user(parts), assistant(parts)])
        assert [body(text) for text in learned(segments)] == ["two parts" + end], family
        assert "two parts" in segments[0][0]


@pytest.mark.parametrize("switch", [{"train": False}, {"weight": 0}])
@pytest.mark.parametrize("family", END_OF_TURN)
def test_turns_that_are_not_trained(family: str, switch: dict) -> None:
    messages = [user("1?"), assistant("one"), user("2?"), assistant("two", **switch),
                user("3?"), assistant("three"), user("4?"), assistant("four", **switch)]  # fmt: skip
    found = examples(END_OF_TURN[family][0], messages)
    texts = [text for segments in found for text in learned(segments)]
    assert len(texts) == 2 and "one" in texts[0] and "three" in texts[1]
    whole = "".join(text for text, _ in found[-1])
    assert "two" in whole and "four" not in whole  # what follows the last learned turn is left out


def test_marks_or_all() -> None:
    messages = [user("1?"), assistant("one")]
    assert learned(*examples(MARKED, messages)) == ["one<|im_end|>"]
    assert learned(*examples(MARKED, messages, turns="all")) == ["one<|im_end|>\n"]


def test_the_end_token_that_marks_leave_out() -> None:
    """An added token right after the marks of the last turn ends all turns; headers do not."""
    messages = [user("1?"), assistant("one"), user("2?"), assistant("two")]
    plain = ("{% for m in messages %}{{ '<|user|>' if m.role == 'user' }}"
             "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
             "{{ END }}{% else %}{{ m.content + '\\n' }}{% endif %}{% endfor %}")  # fmt: skip
    for end, learnt in [("'<|end|>\\n'", "<|end|>"), ("'\\n</s>'", "\n</s>"), ("'\\n'", ""),
                        ("'<|none|>'", "")]:  # fmt: skip
        template = plain.replace("END", end)
        assert learned(*examples(template, messages)) == ["one" + learnt, "two" + learnt], end
    inside = plain.replace("{{ m.content }}", "{{ m.content + '<|end|>' }}").replace(
        "END", "'</s>'"
    )
    assert learned(*examples(inside, messages)) == ["one<|end|>", "two<|end|>"]
    alone = plain.replace("END", "'<|end|>'").replace(
        "{{ m.content }}", "{{ m.content if loop.last else m.content.split('</think>')[-1] }}"
    )
    messages[1] = assistant("<think>hm</think>one")
    assert list(map(learned, examples(alone, messages))) == [
        ["<think>hm</think>one<|end|>"], ["two<|end|>"]
    ]  # fmt: skip


def always_opening(header: str, end: str, prompt: str = "") -> str:
    """A template that ends every rendering in the header of an assistant turn."""
    spoken = header.replace("ROLE", "' + m.role + '")
    asked = (prompt or header).replace("ROLE", "assistant")
    return (
        "{% for m in messages %}{{ '" + spoken + "' + m.content + '" + end + "' }}{% endfor %}"
        "{{ '" + asked + "' }}"
    )


@pytest.mark.parametrize("count", [1, 2, 6])
@pytest.mark.parametrize(
    ("header", "end", "prompt", "start"),
    [("<|ROLE|>\\n", "</s>\\n", "", ""), ("<|ROLE|>\\n", "<|end|>", "<|assistant|>", "\n"),
     ("<s>ROLE\\n", "<|end|>\\n", "", ""), ("### ROLE:\\n", "</s>\\n\\n", "", ""),
     ("<|ROLE|>", " </s>", "<|assistant|>\\n", "")],
)  # fmt: skip
def test_a_generation_prompt_that_nobody_asked_for(
    header: str, end: str, prompt: str, start: str, count: int
) -> None:
    messages = [m for i in range(count) for m in (user(f"q{i}"), assistant(f"a{i}"))]
    template = always_opening(header, end, prompt)
    (segments,) = examples(template, messages)
    ends = end.replace("\\n", "\n")
    assert learned(segments) == [f"{start}a{i}{ends}" for i in range(count)]
    assert "".join(text for text, _ in segments).endswith(ends)
    for turns in range(1, count):
        assert learned(*examples(template, messages[: 2 * turns], turns="last")) == (
            [f"{start}a{turns - 1}{ends}"]
        )


@pytest.mark.parametrize("first", ["one", "<think>\nhm\n</think>\n\none"])
@pytest.mark.parametrize("family", [f for f in END_OF_TURN if f not in ("Mistral", "gpt-oss")])
def test_families_that_do_not_heed_whether_it_is_asked_for(family: str, first: str) -> None:
    template, end = END_OF_TURN[family]
    end = end.strip().removesuffix("</s>").strip()
    template = template.replace(end, "<|end|>") if end else template
    before = {"DeepSeek-R1": "one"}.get(family, first)
    messages = [user("1?"), assistant(before), user("2?"), assistant("two")]
    for turns in ("auto", "last"):
        asked = examples(template, messages, turns=turns)
        always = template.replace("{% if add_generation_prompt %}", "{% if true %}")
        found = examples(always, messages, turns=turns)
        texts, wanted = (["".join(learned(segments)) for segments in s] for s in (found, asked))
        if family == "Phi-3":  # its last branch ends in </s> or in the prompt
            wanted = ["one<|end|>\ntwo<|end|>\n".replace("one", first)] if turns == "auto" else (
                ["two<|end|>\n"])  # fmt: skip
        assert texts == wanted


def test_an_end_token_after_every_rendering() -> None:
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}{{ eos_token }}"
    )
    assert learned(*examples(template, TALK)) == ["assistant: Ahoy\n</s>"]


def test_a_turn_that_ends_in_nothing_but_a_generation_prompt() -> None:
    assert refused(always_opening("### ROLE:\\n", "\\n"), TALK) == (
        "messages[1]: the chat template adds a generation prompt that is not asked for, and no "
        "special token shows where the turn ends; accepted: a template that heeds "
        "add_generation_prompt"
    )


@pytest.mark.parametrize("end", ["", "</s>", "<|end|>\\n"])
def test_templates_without_a_generation_prompt(end: str) -> None:
    messages = [user("1?"), assistant("one"), user("2?"), assistant("two")]
    bare = "{% for m in messages %}{{ m.content + 'END' }}{% endfor %}".replace("END", end or " ")
    ends = end.replace("\\n", "\n") or " "
    assert learned(*examples(bare, messages)) == ["one" + ends, "two" + ends]
    named = CHATML.split("{% if add_generation_prompt")[0].replace("<|im_end|>", end)
    found = learned(*examples(named, messages))
    assert found[1] == f"<|im_start|>assistant\ntwo{ends.strip(' ')}\n"


# --- as records


def test_arrows_nulls_are_no_arguments(tmp_path: Path) -> None:
    """Arrow gives every call the arguments of all others; a null in a JSON text is kept."""
    weather, stops = ({"name": name, "arguments": arguments} for name, arguments in [
        ("weather", {"city": "X"}), ("stops", {"zip": "1", "near": [{"a": 1}, {"b": "c"}]})]
    )  # fmt: skip
    tools = [{"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}},
             {"name": "stops", "parameters": {"properties": {"zip": {"description": "z"}}}}]  # fmt: skip
    calls = [weather, stops, {"name": "text", "arguments": '{"zip": null}'}]
    rows = [{"messages": [user("?"), assistant("", tool_calls=calls[:2])], "tools": tools},
            {"messages": [user("?"), assistant("", tool_calls=json.dumps(calls[2:]))]}]  # fmt: skip
    for index, row in enumerate(rows):
        path = tmp_path / f"{index}.parquet"
        pq.write_table(pa.Table.from_pylist([row]), path)
        ((_, found),) = read_rows(str(path), "train", options(), None)
        assert isinstance(found, dict)
        assert examples(QWEN3, found["messages"], {"tools": found.get("tools")}) == (
            examples(QWEN3, row["messages"], {"tools": row.get("tools")})
        )


@pytest.mark.parametrize("prompt", ["hello", "hello</s>", ""])
def test_an_empty_completion_is_no_record(prompt: str) -> None:
    record = Record([(prompt, False), ("", True)])
    (reason,) = CausalLM(CausalLMOptions(), TOKENIZER).encode([record], 64)
    assert reason == "no token to learn: the completion is empty"
    (example,) = CausalLM(CausalLMOptions(), TOKENIZER).encode([Record([("a", True)])], 64)
    assert isinstance(example, Example)


def prepared(tmp_path: Path, template: str, rows: list, **keys: Any) -> TokenDataset:
    TOKENIZER.chat_template = template
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"train": str(path), "cache": str(tmp_path / "cache"), **keys}
    task = CausalLM(CausalLMOptions(), TOKENIZER)
    return prepare(str(path), "train", None, DataOptions(**keys), task)


def chat(turns: int, word: str) -> dict:
    pairs = [(user(f"{word} {i}?"), assistant(f"{word} is {i}")) for i in range(turns)]
    return {"messages": [message for pair in pairs for message in pair]}


@pytest.mark.parametrize("family", [name for name in END_OF_TURN if name != "parts"])
def test_a_chat_has_exactly_its_templates_tokens(tmp_path: Path, family: str) -> None:
    row = chat(3, "ﬁne 👍🏽")
    data = prepared(tmp_path, END_OF_TURN[family][0], [row])
    for index in range(len(data)):
        stop = 6 if len(data) == 1 else 2 * index + 2
        messages = row["messages"][:stop]
        whole = TOKENIZER.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert list(data[index].input_ids) == whole
        ids, mask = data[index].input_ids, data[index].loss_mask
        text = TOKENIZER.decode([i for i, m in zip(ids, mask, strict=True) if m])
        assert f"ﬁne 👍🏽 is {stop // 2 - 1}" in text and "?" not in text


def test_counts_and_held_out_records(tmp_path: Path) -> None:
    rows = [chat(1 + i % 3, f"w{i}") for i in range(9)]
    data = prepared(tmp_path, QWEN3, rows)
    assert (len(data), data.counts.examples) == (18, 18)
    assert (data.counts.records, data.counts.used) == (9, 9)
    assert data.records.tolist() == [0, 1, 1, 2, 2, 2, 3, 4, 4, 5, 5, 5, 6, 7, 7, 8, 8, 8]
    assert str(data.counts).startswith("9 of 9 records, 18 examples, ")
    drawn = left_out(data, 4, 0)
    held = list(dict.fromkeys(data.records[drawn].tolist()))
    assert len(held) == 4  # whole conversations
    assert sorted(drawn) == [i for i in range(18) if data.records[i] in held]
    assert left_out(data, 2, 0).tolist() == data.first_records(drawn, 2).tolist()
    assert data.first_records(drawn, 0).tolist() == left_out(data, 0, 0).tolist() == []
    assert len(prepared(tmp_path, CHATML, rows)) == 9


def test_long_chats(tmp_path: Path) -> None:
    """A conversation that does not fit loses its last turns, however many examples it gives."""
    rows = [chat(1, "a"), chat(9, "b")]
    whole = prepared(tmp_path, QWEN3, rows)
    length = int(whole.lengths[4])
    data = prepared(tmp_path, QWEN3, rows, max_length=length)
    assert (data.counts.used, data.counts.truncated, data.counts.bad) == (2, 0, 0)
    assert 5 <= len(data) == data.counts.examples < 10
    assert data.counts.turns_dropped == 10 - len(data)
    assert f"(0 truncated, {10 - len(data)} turns dropped, 0 dropped, 0 bad)" in str(data.counts)
    assert whole.counts.turns_dropped == 0 and "turns" not in str(whole.counts)
    data = prepared(tmp_path, QWEN3, rows, max_length=length, on_long_record="drop")
    assert (len(data), data.counts.dropped) == (1, 1)
    with pytest.raises(UserError, match=r"chats.jsonl:2: longer than data.max_length"):
        prepared(tmp_path, QWEN3, rows, max_length=length, on_long_record="stop")
