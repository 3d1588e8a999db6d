"""How the families of `families.py` write an answer, from their published formats: what a model has to say after
the generation prompt until it stops. Independent of `trainer/data`: plain Python, no template is rendered.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Said:
    """An answer."""

    content: str = ""
    thought: str = ""
    inline: bool = False
    """Whether the thought stands in the content."""
    calls: tuple[tuple[str, dict], ...] = ()
    """(name, arguments) of tools."""


@dataclass(frozen=True)
class Speech:
    """What a family can say, and how."""

    text: Callable[[Said], str]
    system: bool = True
    calls: int = 0
    """Tool calls in a turn, at most."""
    rounds: int = 2
    """Calls one after another, before the answer, at most."""
    tools: bool = True
    """Whether it is told which tools there are."""
    content_with_calls: bool = True
    thoughts: str = ""
    """The key of thoughts; empty: it has none."""
    inline: bool = False
    """Whether a content may begin with a thought in `<think>`."""


def _written(arguments: dict) -> str:
    return json.dumps(arguments, ensure_ascii=False)


def _qwen_calls(said: Said) -> str:
    calls = [
        f'<tool_call>\n{{"name": "{name}", "arguments": {_written(arguments)}}}\n</tool_call>'
        for name, arguments in said.calls
    ]
    return "\n".join(calls)


def _chatml(said: Said) -> str:
    between = "\n" if said.content and said.calls else ""
    return said.content + between + _qwen_calls(said) + "<|im_end|>\n"


def _qwen3(said: Said) -> str:
    thought, content = said.thought.strip("\n"), said.content.lstrip("\n")
    between = "\n" if said.content and said.calls else ""
    return f"<think>\n{thought}\n</think>\n\n{content}{between}{_qwen_calls(said)}<|im_end|>\n"


def _qwen3_5(said: Said) -> str:
    content, calls = said.content.strip(), ""
    if said.inline:  # trimmed together with the thought
        content = said.content.rstrip().lstrip("\n")
    for index, (name, arguments) in enumerate(said.calls):
        between = "\n" if index else "\n\n" if content else ""
        values = "".join(
            f"<parameter={key}>\n{value if isinstance(value, str) else _written(value)}\n</parameter>\n"
            for key, value in arguments.items()
        )
        calls += f"{between}<tool_call>\n<function={name}>\n{values}</function>\n</tool_call>"
    return f"{said.thought.strip()}\n</think>\n\n{content}{calls}<|im_end|>\n"


def _nemotron(said: Said) -> str:
    if said.thought:
        return f"{said.thought}\n</think>\n{said.content}".rstrip() + "<|im_end|>\n"
    return f"</think>{said.content}".rstrip() + "<|im_end|>\n"


def _llama(said: Said) -> str:
    if said.calls:
        ((name, arguments),) = said.calls
        return f'{{"name": "{name}", "parameters": {_written(arguments)}}}<|eot_id|>'
    return said.content.strip() + "<|eot_id|>"


def _gpt_oss(said: Said) -> str:
    if said.calls:
        ((name, arguments),) = said.calls
        return f" to=functions.{name}<|channel|>commentary json<|message|>{_written(arguments)}<|call|>"
    thought = f"<|channel|>analysis<|message|>{said.thought}<|end|><|start|>assistant"
    final = f"<|channel|>final<|message|>{said.content}<|return|>"
    return (thought if said.thought else "") + final


def _deepseek(said: Said) -> str:
    calls = "\n".join(
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{_written(arguments)}\n```<｜tool▁call▁end｜>"
        for name, arguments in said.calls
    )
    calls = f"<｜tool▁calls▁begin｜>{calls}<｜tool▁calls▁end｜>" if calls else ""
    return said.content + calls + "<｜end▁of▁sentence｜>"


def _glm(said: Said) -> str:
    content = "\n" + said.content.strip() if said.content.strip() else ""
    calls = ""
    for name, arguments in said.calls:
        values = "".join(
            f"<arg_key>{key}</arg_key>\n<arg_value>{value if isinstance(value, str) else _written(value)}</arg_value>\n"
            for key, value in arguments.items()
        )
        calls += f"\n<tool_call>{name}\n{values}</tool_call>"
    end = "<|observation|>" if calls else "<|user|>"
    return f"\n<think>{said.thought.strip()}</think>{content}{calls}{end}"


def _ending(end: str, trims: bool = False, before: str = "") -> Callable[[Said], str]:
    return lambda said: before + (said.content.strip() if trims else said.content) + end


SPEECH = {
    "SmolLM2": Speech(_ending("<|im_end|>\n")),
    "Qwen2.5": Speech(_chatml, calls=2),
    "Qwen3": Speech(_qwen3, calls=2, thoughts="reasoning_content", inline=True),
    "Qwen3-2507": Speech(_chatml, calls=2),
    "Qwen3.5": Speech(_qwen3_5, calls=2, thoughts="reasoning_content", inline=True),
    "Nemotron 3": Speech(_nemotron, thoughts="reasoning_content"),
    "Llama 3": Speech(_ending("<|eot_id|>", trims=True)),
    "Llama 3.2": Speech(_llama, calls=1, content_with_calls=False),
    "Mistral": Speech(_ending("</s>", trims=True, before=" "), system=False),
    "Gemma 2": Speech(_ending("<end_of_turn>\n", trims=True), system=False),
    "Gemma 3": Speech(_ending("<end_of_turn>\n", trims=True)),
    "Phi-3": Speech(_ending("<|end|>\n</s>")),
    "gpt-oss": Speech(_gpt_oss, calls=1, content_with_calls=False, thoughts="thinking"),
    "DeepSeek-R1": Speech(_ending("<｜end▁of▁sentence｜>")),
    "DeepSeek-V3": Speech(_deepseek, calls=2, rounds=1, tools=False),
    "GLM-4.5": Speech(_glm, calls=2, thoughts="reasoning_content", inline=True),
    "Aya": Speech(_ending("<|END_OF_TURN_TOKEN|>", trims=True)),
    "LFM2": Speech(_ending("<|im_end|>\n")),
    "ChatML, marked": Speech(_ending("<|im_end|>")),
}
