"""The inputs of the table in docs/data.md: records as people have them, and how each is read.

Imports nothing of the trainer: `tests/campaigns/trl_reference.py` gives the same records to TRL.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

Reference = Literal["sft", "turns"]


@dataclass(frozen=True)
class Input:
    """A record, and what TRL makes of it."""

    what: str
    row: dict
    family: str | None = None
    """Chat template and special tokens; None: a tokenizer without a template."""
    data: dict = field(default_factory=dict)
    """Keys of the section `data`."""
    loss_on: str = "completion"
    """`task.loss_on`."""
    reference: Reference = "sft"
    """What of TRL it is compared with. sft: its `SFTTrainer`, on answers only; turns: the same, given
    a prompt and a completion for each answer."""
    trl: dict | None = None
    """The record as TRL takes it, where it takes it otherwise."""
    difference: str = ""
    """Why TRL learns something else; empty: it learns the same."""


def system(content: Any) -> dict:
    return {"role": "system", "content": content}


def user(content: Any) -> dict:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> dict:
    return {"role": "assistant", "content": content, **more}


CHAT = [user("How many eggs?"), assistant("Anna has 3 eggs."), user("And Ben?"),
        assistant("Ben has 5.")]  # fmt: skip
SYSTEM = [system("I count."), *CHAT]
THOUGHTS = [CHAT[0], assistant("Anna has 3 eggs.", reasoning_content="I count."),
            CHAT[2], assistant("Ben has 5.", reasoning_content="He has more.")]  # fmt: skip
INLINE = [CHAT[0], assistant("<think>\nI count.\n</think>\n\nAnna has 3 eggs."),
          CHAT[2], assistant("<think>\nHe has more.\n</think>\n\nBen has 5.")]  # fmt: skip
TOOLS = [{"type": "function", "function": {
    "name": "count", "description": "Counts things.", "parameters": {
        "type": "object", "properties": {"what": {"type": "string"}}, "required": ["what"]}}}]  # fmt: skip


def called(arguments: Any, **more: Any) -> list[dict]:
    call = {"type": "function", "function": {"name": "count", "arguments": arguments}}
    return [
        CHAT[0], {"role": "assistant", **more, "tool_calls": [call]},
        {"role": "tool", "content": "3"}, CHAT[1],
    ]  # fmt: skip


OBJECT, TEXT = {"what": "eggs"}, '{"what": "eggs"}'

_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\nHow many eggs?\n\n### Response:\n"
)
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\nHow many eggs?\n\n"
    "### Input:\nAnna has 3.\n\n### Response:\n"
)
_PAIR = {"prompt": "How many eggs?\n", "completion": "Anna has 3."}
_ASKED = {"question": "How many eggs?", "answer": "Anna has 3."}
_INSTRUCTION = {"instruction": "How many eggs?", "output": "3"}

_HEADER = "learns the end of the header too, which stands in the prompt"
_ALL_AT_ONCE = (
    "learns both answers in one rendering, the earlier one as no model meets it: the template rewrites it when "
    "the next question comes"
)

TEXTS = [
    Input("text", {"text": "Anna has 3 eggs."}),
    Input("prompt and completion", _PAIR),
    Input(
        "the same, a template over columns", _ASKED,
        data={"prompt": "{question}\n", "completion": "answer"}, trl=_PAIR,
    ),
    Input("prompt and completion within a word", {"prompt": "3 egg", "completion": "s are there."}),
    Input(
        "a completion that has its end token", {"prompt": "How many?", "completion": " 3</s>"},
    ),
    Input("prompt and completion, loss on all", _PAIR, loss_on="all"),
    Input(
        "an empty completion", {"prompt": "How many?", "completion": ""},
        difference="learns the end token alone, as the answer to everything",
    ),
    Input("alpaca", _INSTRUCTION, trl={"prompt": _ALPACA, "completion": "3"}),
    Input(
        "alpaca with an input", {**_INSTRUCTION, "input": "Anna has 3."},
        trl={"prompt": _ALPACA_INPUT, "completion": "3"},
    ),
    Input(
        "alpaca with a system message", {**_INSTRUCTION, "system": "I count."},
        trl={"prompt": _ALPACA.replace(_ALPACA.partition("\n\n")[0], "I count."), "completion": "3"},
    ),
    Input(
        "alpaca with a history", {**_INSTRUCTION, "history": [["Who has eggs?", "Anna"]]}, data={"turns": "last"},
        trl={"prompt": _ALPACA.replace("How many eggs?", "Who has eggs?") + "Anna</s>\n\n"
             + _ALPACA.partition("\n\n")[2], "completion": "3"},
    ),
]  # fmt: skip

TWO_TURNS = [
    Input("chat", {"messages": SYSTEM}, "SmolLM2", reference="turns"),
    Input("chat", {"messages": SYSTEM}, "Qwen2.5", reference="turns"),
    Input("chat", {"messages": SYSTEM}, "Qwen3", reference="turns"),
    Input("chat", {"messages": SYSTEM}, "Qwen3-2507"),
    Input("chat", {"messages": SYSTEM}, "Qwen3.5", reference="turns"),
    Input("chat", {"messages": SYSTEM}, "Nemotron 3", reference="turns"),
    Input("chat", {"messages": SYSTEM}, "Llama 3"),
    Input("chat", {"messages": SYSTEM}, "Llama 3.2", reference="turns"),
    Input("chat without a system message", {"messages": CHAT}, "Mistral", reference="turns"),
    Input("chat without a system message", {"messages": CHAT}, "Gemma 2"),
    Input("chat", {"messages": SYSTEM}, "Gemma 3"),
    Input("chat", {"messages": SYSTEM}, "Phi-3", reference="turns"),
    Input("chat", {"messages": SYSTEM}, "gpt-oss", reference="turns"),
    Input("chat", {"messages": SYSTEM}, "DeepSeek-R1", reference="turns"),
    Input("chat", {"messages": SYSTEM}, "DeepSeek-V3", reference="turns"),
    Input("chat", {"messages": SYSTEM}, "GLM-4.5"),
    Input("chat", {"messages": SYSTEM}, "Aya"),
    Input("chat", {"messages": SYSTEM}, "LFM2"),
    Input("chat", {"messages": SYSTEM}, "ChatML, marked"),
]

SPECIAL = [
    Input("chat", {"messages": SYSTEM}, "Mistral", reference="turns",
          difference="learns the question too: with an answer behind it, the template shows no system message"),
    Input("chat, all at once", {"messages": CHAT}, "Qwen2.5", difference=_HEADER),
    Input("chat, all at once", {"messages": CHAT}, "Nemotron 3", difference=_HEADER),
    Input("chat, all at once", {"messages": CHAT}, "DeepSeek-V3", difference=_HEADER),
    Input("chat, all at once", {"messages": CHAT}, "Qwen3", difference=_ALL_AT_ONCE + " (its own training "
          "template keeps the empty thought)"),
    Input("chat, all at once", {"messages": CHAT}, "Phi-3", difference=_ALL_AT_ONCE),
    Input("chat, all at once", {"messages": CHAT}, "gpt-oss", difference=_ALL_AT_ONCE + ", and the header"),
    Input("chat, the last answer", {"messages": CHAT}, "Llama 3", {"turns": "last"},
          trl={"prompt": CHAT[:3], "completion": CHAT[3:]}),
    Input("chat, all of a turn", {"messages": CHAT}, "ChatML, marked", {"turns": "all"},
          difference="learns what is marked, as `data.turns: auto` does"),
    Input("contents in parts", {"messages": [
        user([{"type": "text", "text": "How many "}, {"type": "text", "text": "eggs?"}]),
        assistant([{"type": "text", "text": "Anna has 3 eggs."}])]}, "Llama 3",
        difference="learns the Python text of the list"),
    Input("contents with spaces around", {"messages": [user(" How many eggs? "), assistant("\nAnna has 3 eggs.\n")]},
          "Llama 3"),
    Input("the question comes last", {"messages": CHAT[:3]}, "Llama 3",
          difference="the same tokens; what follows them is kept, though nothing of it is learned"),
    Input("a turn with `train: false`", {"messages": [CHAT[0], {**CHAT[1], "train": False}, *CHAT[2:]]}, "Llama 3",
          difference="knows no such key"),
    Input("a turn with `weight: 0`", {"messages": [*CHAT[:3], {**CHAT[3], "weight": 0}]}, "Llama 3",
          difference="knows no such key"),
    Input("thoughts", {"messages": THOUGHTS}, "Qwen3", reference="turns"),
    Input("thoughts in the content", {"messages": INLINE}, "Qwen3", reference="turns"),
    Input("thoughts", {"messages": THOUGHTS}, "Qwen3.5", reference="turns"),
    Input("thoughts", {"messages": THOUGHTS}, "Nemotron 3", reference="turns"),
    Input("thoughts in the content", {"messages": INLINE}, "Qwen3.5", reference="turns"),
    Input("thoughts in the content", {"messages": INLINE}, "Nemotron 3", reference="turns"),
    Input("thoughts", {"messages": THOUGHTS[:2]}, "GLM-4.5"),
    Input("thoughts", {"messages": [CHAT[0], assistant("Anna has 3 eggs.", thinking="I count.")]}, "gpt-oss",
          reference="turns"),
    Input("thoughts in the content", {"messages": INLINE[:2]}, "DeepSeek-R1",
          difference="its own training template keeps the thought, which the model's template drops; give such a "
          "one as `data.chat_template`"),
    Input("tools", {"messages": called(OBJECT, content=""), "tools": TOOLS}, "Qwen2.5", reference="turns"),
    Input("tools", {"messages": called(OBJECT, content=""), "tools": TOOLS}, "Qwen3", reference="turns"),
    Input("tools, arguments as text", {"messages": called(TEXT, content=""), "tools": TOOLS}, "Qwen3",
          reference="turns"),
    Input("tools, a call without content", {"messages": called(OBJECT), "tools": TOOLS}, "Qwen3",
          reference="turns"),
    Input("tools", {"messages": called(OBJECT, content=""), "tools": TOOLS}, "Qwen3.5", reference="turns"),
    Input("tools", {"messages": called(OBJECT, content=""), "tools": TOOLS}, "Llama 3.2", reference="turns"),
    Input("tools", {"messages": called(OBJECT), "tools": TOOLS}, "gpt-oss", reference="turns"),
    Input("tools", {"messages": called(OBJECT, content=""), "tools": TOOLS}, "GLM-4.5"),
    Input("tool calls, arguments as text", {"messages": called(TEXT, content="")}, "DeepSeek-V3",
          reference="turns"),
    Input("tools that the template ignores", {"messages": called(OBJECT, content=""), "tools": TOOLS}, "Phi-3",
          difference="learns an empty answer in place of the call"),
]  # fmt: skip

_SHAREGPT = [
    {"from": "human", "value": "How many eggs?"},
    {"from": "gpt", "value": "Anna has 3 eggs."},
]
_SPOKEN = {"prompt": CHAT[:1], "completion": CHAT[1:2]}
FORMATS = [
    Input("ShareGPT", {"conversations": _SHAREGPT}, "Llama 3", trl={"messages": CHAT[:2]}),
    Input("ShareGPT, as it is", {"conversations": _SHAREGPT}, "Llama 3", trl={"conversations": _SHAREGPT},
          difference="knows no human and gpt"),
    Input("prompt and completion of messages", {"prompt": CHAT[:3], "completion": CHAT[3:]}, "Llama 3"),
    Input("prompt and completion", {"prompt": "How many eggs?", "completion": "Anna has 3 eggs."}, "Llama 3",
          {"as_chat": True}, trl=_SPOKEN),
    Input("alpaca", {"instruction": "How many eggs?", "output": "Anna has 3 eggs."}, "Llama 3", {"as_chat": True},
          trl=_SPOKEN),
    Input("chat with a system message for all", {"messages": CHAT}, "Llama 3", {"system": "I count."},
          trl={"messages": SYSTEM}),
    Input("chat that is not to think", {"messages": CHAT[:2]}, "Qwen3",
          {"template_arguments": {"enable_thinking": False}}, reference="turns",
          trl={"messages": CHAT[:2], "chat_template_kwargs": {"enable_thinking": False}}),
]  # fmt: skip

INPUTS = [*TEXTS, *TWO_TURNS, *SPECIAL, *FORMATS]
