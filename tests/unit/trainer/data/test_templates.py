"""Chat templates that a configuration sets: names, files, arguments; what they render."""

import ast
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.unit.trainer.data.chat_templates import CHATML, QWEN3
from tests.unit.trainer.tasks.tokenizers_of_all_kinds import BOS, byte_level
from trainer.config.data_options import DataOptions
from trainer.data.formats import to_records
from trainer.data.known_templates import KNOWN
from trainer.data.templates import on_templates, set_template, template_of, templates_of
from trainer.errors import BadRecord, UserError
from trainer.export.tokenizer import save_tokenizer

PLAIN = byte_level(False, True)
BEGINS = byte_level(False, True, BOS)
"""Begins every text with <s>."""


def options(**keys: Any) -> DataOptions:
    return DataOptions(train="-", **keys)


def refused(tokenizer: Any, **keys: Any) -> str:
    with pytest.raises((UserError, BadRecord)) as caught:
        template_of(tokenizer, options(**keys), None)
    return str(caught.value)


@pytest.fixture(autouse=True)
def without_template():
    PLAIN.chat_template = BEGINS.chat_template = None


# --- by name: the published forms, written by hand

CHAT = [{"role": r, "content": c} for r, c in
        [("user", "1?"), ("assistant", "one "), ("user", "2?"), ("assistant", "two")]]  # fmt: skip
SYSTEM = {"role": "system", "content": "S"}

EXPECTED = {
    "alpaca": (
        "*Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.*\n\n### Instruction:\n1?\n\n### Response:\n¦one </s>¦\n\n"
        "### Instruction:\n2?\n\n### Response:\n¦two</s>¦",
        "S\n\n### Instruction:\n1?\n\n### Response:\n",
    ),
    "chatml": (
        "<|im_start|>user\n1?<|im_end|>\n<|im_start|>assistant\n¦one <|im_end|>\n¦"
        "<|im_start|>user\n2?<|im_end|>\n<|im_start|>assistant\n¦two<|im_end|>\n¦",
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n1?<|im_end|>\n<|im_start|>assistant\n",
    ),
    "gemma": (
        "<start_of_turn>user\n1?<end_of_turn>\n<start_of_turn>model\n¦one<end_of_turn>\n¦"
        "<start_of_turn>user\n2?<end_of_turn>\n<start_of_turn>model\n¦two<end_of_turn>\n¦",
        "<start_of_turn>user\nS\n\n1?<end_of_turn>\n<start_of_turn>model\n",
    ),
    "llama-3": (
        "<|start_header_id|>user<|end_header_id|>\n\n1?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n¦one<|eot_id|>¦"
        "<|start_header_id|>user<|end_header_id|>\n\n2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n¦two<|eot_id|>¦",
        "<|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n1?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "mistral": (
        "[INST] 1?[/INST]¦ one </s>¦[INST] 2?[/INST]¦ two</s>¦", "[INST] S\n\n1?[/INST]",
    ),
    "phi-3": (
        "<|user|>\n1?<|end|>\n<|assistant|>\n¦one <|end|>\n¦"
        "<|user|>\n2?<|end|>\n<|assistant|>\n¦two<|end|>\n¦",
        "<|system|>\nS<|end|>\n<|user|>\n1?<|end|>\n<|assistant|>\n",
    ),
}  # fmt: skip
"""A conversation with its learned parts between ¦, and its prompt with a system message."""


def segments(tokenizer: Any, messages: list, **keys: Any) -> list[tuple[str, bool]]:
    (record,) = to_records({"messages": messages}, "messages", options(**keys), tokenizer)
    return [part for part in record.segments if part[0]]


@pytest.mark.parametrize("name", KNOWN)
def test_known_templates(name: str) -> None:
    bars, prompt = EXPECTED[name]
    texts = bars.replace("*", "").split("¦")[:-1]
    expected = [(text, bool(index % 2)) for index, text in enumerate(texts)]
    assert segments(PLAIN, CHAT, chat_template=name) == expected
    (first, _), *rest = expected
    assert segments(BEGINS, CHAT, chat_template=name) == [("<s>" + first, False), *rest]
    found = segments(PLAIN, [SYSTEM, *CHAT], chat_template=name)
    assert found == [(prompt, False), *rest]
    assert segments(PLAIN, CHAT, system="S", chat_template=name) == found
    # And it is what inference gets: the prompt of the first turn.
    template = template_of(PLAIN, options(chat_template=name), None)
    asked = PLAIN.apply_chat_template(
        [SYSTEM, CHAT[0]], chat_template=template, add_generation_prompt=True, tokenize=False
    )
    assert asked == prompt


def test_names_of_the_tokenizer_come_first() -> None:
    PLAIN.chat_template = {"default": CHATML, "tool_use": QWEN3, "chatml": "{{ messages }}"}
    tools = [{"name": "add"}]
    assert template_of(PLAIN, options(), None) == CHATML
    assert template_of(PLAIN, options(), tools) == QWEN3
    assert template_of(PLAIN, options(chat_template="tool_use"), None) == QWEN3
    assert template_of(PLAIN, options(chat_template="chatml"), tools) == "{{ messages }}"
    PLAIN.chat_template = {"rag": CHATML}
    assert refused(PLAIN) == (
        "data.chat_template: null given, and none of the tokenizer's templates is the default; "
        "accepted: rag"
    )
    assert refused(PLAIN, chat_template="chat") == (
        "data.chat_template: 'chat' given; accepted: a file that holds it, rag, alpaca, chatml, "
        "gemma, llama-3, mistral, phi-3"
    )


# --- files


def test_a_file(tmp_path) -> None:
    path = tmp_path / "my.jinja"
    path.write_text("\ufeff" + CHATML, encoding="utf-8")
    assert template_of(PLAIN, options(chat_template=str(path)), None) == CHATML


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "empty; accepted: a file of Jinja text"), (b"\xff\xfe", "not UTF-8; accepted: a file"),
     (b"{% for m in messages %}\n{{ m }", "2: unexpected '}'; accepted: a file of Jinja text")],
)  # fmt: skip
def test_files_that_are_no_template(tmp_path, content: bytes, reason: str) -> None:
    path = tmp_path / "my.jinja"
    path.write_bytes(content)
    separator = "" if reason[0].isdigit() else " "
    assert refused(PLAIN, chat_template=str(path)).startswith(
        f"data.chat_template: {path}:{separator}{reason}"
    )


def test_a_file_that_does_not_end(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("trainer.data.templates._SECONDS", 0.3)
    path = tmp_path / "my.jinja"
    path.write_text(
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    )
    assert "the chat template does not end within 0.3 s" in refused(PLAIN, chat_template=str(path))


def test_what_is_neither_name_nor_file(tmp_path) -> None:
    assert refused(PLAIN, chat_template=str(tmp_path)).startswith(
        f"data.chat_template: '{tmp_path}'"
    )
    assert refused(PLAIN, chat_template=CHATML).startswith(
        "data.chat_template: Jinja text given; accepted: a file that holds it, alpaca, "
    )
    assert refused(PLAIN) == (
        "the tokenizer has no chat template; accepted: data.chat_template (alpaca, chatml, gemma, "
        "llama-3, mistral, phi-3, a file), or a model that has one"
    )


# --- arguments

THINKING = CHATML.replace(
    "'<|im_start|>assistant\\n' }}{% endif",
    "'<|im_start|>assistant\\n' }}{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif",
).replace("m['content'] +", "('<think>\\n\\n</think>\\n\\n' if m.role == 'assistant' else '') + "
          "m['content'] +")  # fmt: skip


def test_arguments_change_what_is_learned() -> None:
    """As with Qwen3: without thoughts the empty one is part of the prompt."""
    PLAIN.chat_template = THINKING
    empty, prompt = (
        "<think>\n\n</think>\n\n",
        "<|im_start|>user\n1?<|im_end|>\n<|im_start|>assistant\n",
    )
    assert segments(PLAIN, CHAT[:2]) == [(prompt, False), (empty + "one <|im_end|>\n", True)]
    found = segments(PLAIN, CHAT[:2], template_arguments={"enable_thinking": False})
    assert found == [(prompt + empty, False), ("one <|im_end|>\n", True)]


VALUES = {
    "null": None, "yes": True, "no": False, "whole": -3, "real": 1.5e-7, "big": 10.0**300,
    "text": "a'b\"c\\n\n%}{{ x }}é👍\ud7ff\x00", "items": [1, "two", [None]],
    "keys": {"a b": {"c": True}, "é": []},
}  # fmt: skip


def test_values_arrive_as_they_are() -> None:
    """Any JSON value, and as a default: whoever renders can say otherwise."""
    PLAIN.chat_template = "{{ [" + ", ".join(VALUES) + "] }}"
    template = template_of(PLAIN, options(template_arguments=VALUES), None)

    def seen(**more: Any) -> list:
        found = PLAIN.apply_chat_template(CHAT, chat_template=template, tokenize=False, **more)
        return ast.literal_eval(found)

    assert repr(seen()) == repr(list(VALUES.values()))
    assert seen(whole=5)[3] == 5 and seen(whole=5)[4:] == list(VALUES.values())[4:]


def test_arguments_change_nothing_else() -> None:
    """Not even the spaces that a template begins with."""
    for text in ("  \n x", "\n\n{%- if x %}{% endif %}a", "  {% if x %}y{% endif %}"):
        PLAIN.chat_template = text
        plain = PLAIN.apply_chat_template(CHAT, tokenize=False, x=1)
        template = template_of(PLAIN, options(template_arguments={"x": 1}), None)
        assert PLAIN.apply_chat_template(CHAT, chat_template=template, tokenize=False) == plain


def test_arguments_that_no_template_uses() -> None:
    PLAIN.chat_template = {"default": CHATML, "tool_use": QWEN3 + "{{ date }}"}
    found = templates_of(PLAIN, options(template_arguments={"date": "today"}))
    assert isinstance(found, dict)
    assert [text.splitlines()[0] for text in found.values()] == [
        "{% set date = date | default('today') %}"
    ] * 2
    assert refused(PLAIN, template_arguments={"enable_thinkin": False}) == (
        "data.template_arguments: enable_thinkin: the chat template does not use it; accepted: "
        "variables of the template"
    )
    PLAIN.chat_template = None
    assert refused(PLAIN, template_arguments={"date": ""}) == (
        "data.template_arguments: given, but the tokenizer has no chat template; accepted: "
        "data.chat_template with it"
    )


# --- what is said, what is saved


def remarks(tokenizer: Any, **keys: Any) -> list[str]:
    return list(on_templates(tokenizer, options(**keys)))


def test_ends_of_turns_that_are_no_token(tmp_path) -> None:
    count = len(PLAIN("<|im_end|>", add_special_tokens=False)["input_ids"])
    assert count > 1
    assert remarks(PLAIN, chat_template="chatml") == [
        f"data.chat_template: chatml ends a turn with '<|im_end|>', which is {count} tokens for "
        "this tokenizer: all are learned, and generation stops there only if it is told to; "
        "model.added_tokens makes it one"
    ]
    for name in ("alpaca", "mistral", "phi-3"):  # </s>, <|end|>
        assert not remarks(PLAIN, chat_template=name)
    path = tmp_path / "t.jinja"
    path.write_text("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}")
    (remark,) = remarks(PLAIN, chat_template=str(path))
    assert remark.endswith("ends a turn with nothing: the model does not learn to stop")
    path = tmp_path / "refuses.jinja"
    path.write_text("{{ raise_exception('no') }}")
    assert not remarks(PLAIN, chat_template=str(path)) and not remarks(PLAIN)


def test_saved_with_the_tokenizer(tmp_path) -> None:
    PLAIN.chat_template = QWEN3
    assert set_template(PLAIN, options()) is None
    for keys in ({"chat_template": "chatml"}, {"template_arguments": {"tools_in": 1}}):
        if "template_arguments" in keys:
            PLAIN.chat_template = QWEN3 + "{{ tools_in }}"
        folder = tmp_path / next(iter(keys))
        save_tokenizer(PLAIN, set_template(PLAIN, options(**keys)), folder)
        read = AutoTokenizer.from_pretrained(folder)
        assert read.chat_template == template_of(PLAIN, options(**keys), None)
        messages = [SYSTEM, *CHAT]
        trained = "".join(text for text, _ in segments(PLAIN, messages[:3], **keys))
        assert read.apply_chat_template(messages[:3], tokenize=False) == trained
    assert PLAIN.chat_template == QWEN3 + "{{ tools_in }}"


def test_sources_with_templates_of_their_own() -> None:
    PLAIN.chat_template = QWEN3
    one, two = {"train": "a", "weight": 1, "chat_template": "phi-3"}, {"train": "b", "weight": 1}

    def mixed(**keys: Any) -> DataOptions:
        return DataOptions(mixture=[one, {**two, **keys}])

    assert set_template(PLAIN, mixed(chat_template="phi-3")) == KNOWN["phi-3"]
    assert not list(on_templates(PLAIN, mixed(chat_template="phi-3")))
    assert set_template(PLAIN, mixed()) is None
    differs = (
        "data.chat_template: differs between sources; exports have that of `data`, not an entry's"
    )
    assert list(on_templates(PLAIN, mixed())) == [differs]
    both = DataOptions(mixture=[one, two], chat_template="alpaca")
    assert set_template(PLAIN, both) == KNOWN["alpaca"]
    assert list(on_templates(PLAIN, both)) == [differs]
