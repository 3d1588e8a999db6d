"""Chat templates of current families in compact form: they render the inputs of the table in
docs/data.md as the published ones do (`tests/campaigns/trl_reference.py` compares them). Left out
are branches that no input takes, such as images.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from transformers import AutoTokenizer

TOKENIZER = Path(__file__).resolve().parents[4] / "configs/quickstart/model"

TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
"""Tokens of their own in many vocabularies, but not special."""

_IM = ("<|im_start|>", "<|im_end|>")

# The system message that is there if there is none, or nothing.
_CHATML = (
    "{%% if messages[0].role != 'system' %%}{{ '%s' }}{%% endif %%}"
    "{%% for m in messages %%}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{%% endfor %%}{%% if add_generation_prompt %%}{{ '<|im_start|>assistant\\n' }}{%% endif %%}"
)
SMOLLM2 = _CHATML % (
    "<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\\n"
)

_QWEN_TOOLS = (
    "{{ '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\nYou are "
    "provided with function signatures within <tools></tools> XML tags:\\n<tools>' }}"
    "{% for t in tools %}{{ '\\n' }}{{ t | tojson }}{% endfor %}"
    "{{ '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments "
    'within <tool_call></tool_call> XML tags:\\n<tool_call>\\n{"name": <function-name>, "arguments": '
    "<args-json-object>}\\n</tool_call><|im_end|>\\n' }}"
)
_QWEN_CALLS = (
    "{% for call in m.tool_calls or [] %}{% set call = call.function or call %}"
    "{% if not loop.first or BEFORE_FIRST %}{{ '\\n' }}{% endif %}"
    '{{ \'<tool_call>\\n{"name": "\' + call.name + \'", "arguments": \' }}'
    "{{ call.arguments if call.arguments is string else call.arguments | tojson }}{{ '}\\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}"
)
_QWEN_RESULT = (
    "{% elif m.role == 'tool' %}"
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\\n<tool_response>\\n' + CONTENT + '\\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}"
    "{% elif m.role == 'user' or not loop.first %}"
    "{{ '<|im_start|>' + m.role + '\\n' + CONTENT + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
)
_ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"

_QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
QWEN2_5 = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% else %}"
    "{% set system = '" + _QWEN + "' %}{% endif %}{{ '<|im_start|>system\\n' + system }}"
    "{% if tools %}{{ '\\n\\n' }}" + _QWEN_TOOLS + "{% else %}{{ '<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant' }}"
    "{% if m.content or not m.tool_calls %}{{ '\\n' + m.content }}{% endif %}"
    + _QWEN_CALLS.replace("BEFORE_FIRST", "true").replace("call.arguments is string", "false")
    + _QWEN_RESULT.replace("CONTENT", "m.content")
    + _ASK
)

_QWEN3_SYSTEM = (
    "{% if tools %}{{ '<|im_start|>system\\n' }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}" + _QWEN_TOOLS +
    "{% elif messages[0].role == 'system' %}"
    "{{ '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{% endif %}"
)  # fmt: skip
QWEN3_2507 = (
    _QWEN3_SYSTEM + "{% for m in messages %}{% set content = m.content or '' %}"
    "{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\\n' + content }}"
    + _QWEN_CALLS.replace("BEFORE_FIRST", "content")
    + _QWEN_RESULT.replace("CONTENT", "content")
    + _ASK
)

# Thoughts only after the last question, where there is an empty one if need be.
_LAST_QUESTION = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
)
_THOUGHT = (
    "{% if m.reasoning_content is string %}{% set thought = m.reasoning_content %}"
    "{% elif '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\\n') %}"
    "{% else %}{% set thought = '' %}{% endif %}"
)
QWEN3 = (
    _QWEN3_SYSTEM + _LAST_QUESTION + "{% for m in messages %}{% set content = m.content or '' %}"
    "{% if m.role == 'assistant' %}" + _THOUGHT + "{{ '<|im_start|>assistant\\n' }}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}"
    "{% else %}{{ content }}{% endif %}"
    + _QWEN_CALLS.replace("BEFORE_FIRST", "content")
    + _QWEN_RESULT.replace("CONTENT", "content")
    + _ASK
    + "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
)

# The generation prompt opens the thought. Tools are written as XML.
_XML_CALLS = (
    "{% for call in m.tool_calls or [] %}{% set call = call.function or call %}"
    "{{ BEFORE + '<tool_call>\\n<function=' + call.name + '>\\n' }}"
    "{% for key, value in call.arguments | items %}{{ '<parameter=' + key + '>\\n' }}"
    "{{ value if value is string else value | tojson }}{{ '\\n</parameter>\\n' }}{% endfor %}"
    "{{ '</function>\\n</tool_call>' + AFTER }}{% endfor %}"
)
_XML_TOOLS = (
    "<IMPORTANT>\\nReminder:\\n- Function calls MUST follow the specified format: an inner "
    "<function=...></function> block must be nested within <tool_call></tool_call> XML tags\\n- Required "
    "parameters MUST be specified\\n- You may provide optional reasoning for your function call in natural "
    "language BEFORE the function call, but NOT after\\n- If there is no function call available, answer "
    "the question like normal with your current knowledge and do not tell the user about function calls\\n"
    "</IMPORTANT>"
)
_XML_HOW = (
    "\\n\\nIf you choose to call a function ONLY reply in the following format with NO suffix:\\n\\n"
    "<tool_call>\\n<function=example_function_name>\\n<parameter=example_parameter_1>\\nvalue_1\\n"
    "</parameter>\\n<parameter=example_parameter_2>\\nThis is the value for the second parameter\\nthat "
    "can span\\nmultiple lines\\n</parameter>\\n</function>\\n</tool_call>\\n\\n" + _XML_TOOLS
)
QWEN3_5 = (
    "{% if tools %}{{ '<|im_start|>system\\n# Tools\\n\\nYou have access to the following functions:\\n\\n"
    "<tools>' }}{% for t in tools %}{{ '\\n' }}{{ t | tojson }}{% endfor %}{{ '\\n</tools>" + _XML_HOW + "' }}"
    "{% if messages[0].role == 'system' %}{{ '\\n\\n' + messages[0].content | trim }}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% elif messages[0].role == 'system' %}"
    "{{ '<|im_start|>system\\n' + messages[0].content | trim + '<|im_end|>\\n' }}{% endif %}"
    + _LAST_QUESTION + "{% for m in messages %}{% set content = (m.content or '') | trim %}"
    "{% if m.role == 'assistant' %}" + _THOUGHT + "{{ '<|im_start|>assistant\\n' }}"
    "{% if loop.index0 > ns.last %}{{ '<think>\\n' + thought | trim + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ content }}"
    + _XML_CALLS.replace("BEFORE", "('' if loop.first and not content else '\\n\\n' if loop.first else '\\n')")
    .replace(" + AFTER", "") + "{{ '<|im_end|>\\n' }}"
    + _QWEN_RESULT.replace("CONTENT", "content")
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)  # fmt: skip

# An empty thought before every answer; of earlier turns' thoughts the tags are left.
NEMOTRON_3 = (
    _LAST_QUESTION
    + "{{ '<|im_start|>system\\n' + (messages[0].content if messages[0].role == 'system' else '') + "
    "'<|im_end|>\\n' }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set content = m.content or '' %}"
    "{% if m.reasoning_content %}{% set content = '<think>\\n' + m.reasoning_content + '\\n</think>\\n' + content %}"
    "{% elif '</think>' not in content %}{% set content = '<think></think>' + content %}{% endif %}"
    "{% if loop.index0 < ns.last %}{% set content = '<think></think>' + content.split('</think>')[-1] %}"
    "{% endif %}{{ '<|im_start|>assistant\\n' + content | trim + '<|im_end|>\\n' }}"
    "{% elif m.role == 'user' %}{{ '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)

_LLAMA_TURN = "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}"
_LLAMA_ASK = "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
LLAMA3 = "{{ bos_token }}{% for m in messages %}" + _LLAMA_TURN + "{% endfor %}" + _LLAMA_ASK

# A system message with a date always; tools go into the first question.
LLAMA3_2 = (
    "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\\n\\n' }}"
    "{% if tools %}{{ 'Environment: ipython\\n' }}{% endif %}"
    "{{ 'Cutting Knowledge Date: December 2023\\nToday Date: 26 Jul 2024\\n\\n' }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% set messages = messages[1:] %}"
    "{% endif %}{{ '<|eot_id|>' }}{% if tools %}{{ '<|start_header_id|>user<|end_header_id|>\\n\\nGiven the "
    "following functions, please respond with a JSON for a function call with its proper arguments that best "
    "answers the given prompt.\\n\\nRespond in the format {\"name\": function name, \"parameters\": dictionary of "
    "argument name and its value}.Do not use variables.\\n\\n' }}"
    "{% for t in tools %}{{ t | tojson(indent=4) }}{{ '\\n\\n' }}{% endfor %}"
    "{{ messages[0].content | trim + '<|eot_id|>' }}{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% if m.tool_calls %}{% set call = m.tool_calls[0].function %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    "{{ '{\"name\": \"' + call.name + '\", \"parameters\": ' }}{{ call.arguments | tojson }}{{ '}<|eot_id|>' }}"
    "{% elif m.role == 'tool' %}{{ '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}"
    "{{ m.content | tojson }}{{ '<|eot_id|>' }}"
    "{% else %}" + _LLAMA_TURN + "{% endif %}{% endfor %}" + _LLAMA_ASK
)  # fmt: skip

# No generation prompt; the system message goes with the last question, which rewrites history.
MISTRAL = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{% if loop.last and system is defined %}{{ '[INST] ' + system + '\\n\\n' + m.content + '[/INST]' }}"
    "{% else %}{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}"
    "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"
)

_GEMMA = (
    "{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\\n' }}{{ first if loop.first else '' }}"
    "{{ m.content | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
GEMMA2 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}" + _GEMMA
)
GEMMA3 = (
    "{{ bos_token }}{% set first = '' %}{% if messages[0].role == 'system' %}"
    "{% set first = messages[0].content + '\\n\\n' %}{% set messages = messages[1:] %}{% endif %}" + _GEMMA
)  # fmt: skip

# The whole ends in an end token, which disappears when another turn is added.
PHI3 = (
    "{% for m in messages if m.role != 'tool' %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)

# The last turn ends otherwise than earlier ones, and only it shows its thoughts.
GPT_OSS = (
    "{{ '<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\\nKnowledge "
    "cutoff: 2024-06\\nCurrent date: 2025-08-05\\n\\nReasoning: medium\\n\\n# Valid channels: analysis, "
    "commentary, final. Channel must be included for every message.' }}"
    "{% if tools %}{{ \"\\nCalls to these tools must go to the commentary channel: 'functions'.\" }}{% endif %}"
    "{{ '<|end|>' }}{% if messages[0].role == 'system' %}{% set developer = messages[0].content %}"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% if developer or tools %}{{ '<|start|>developer<|message|>' }}"
    "{% if developer %}{{ '# Instructions\\n\\n' + developer + '\\n\\n' }}{% endif %}"
    "{% if tools %}{{ '# Tools\\n\\n## functions\\n\\nnamespace functions {\\n\\n' }}{% for t in tools %}"
    "{{ '// ' + t.function.description + '\\ntype ' + t.function.name + ' = (_: {\\n' }}"
    "{% for key, value in t.function.parameters.properties | items %}{{ key + ': ' + value.type + ',\\n' }}"
    "{% endfor %}{{ '}) => any;\\n\\n' }}{% endfor %}{{ '} // namespace functions' }}{% endif %}"
    "{{ '<|end|>' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{% if m.tool_calls %}"
    "{% set call = m.tool_calls[0].function %}{{ '<|start|>assistant to=functions.' + call.name }}"
    "{{ '<|channel|>commentary json<|message|>' }}{{ call.arguments | tojson }}{{ '<|call|>' }}"
    "{% else %}{% set is_last = loop.last and not add_generation_prompt %}"
    "{% if m.thinking and is_last %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}"
    "{% endif %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
    "{{ '<|return|>' if is_last else '<|end|>' }}{% endif %}"
    "{% elif m.role == 'tool' %}{{ '<|start|>functions.' + messages[loop.index0 - 1].tool_calls[0].function.name }}"
    "{{ ' to=assistant<|channel|>commentary<|message|>' + m.content | tojson + '<|end|>' }}"
    "{% else %}{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)  # fmt: skip

# Thoughts are dropped everywhere, and the generation prompt opens one that no turn has.
_DEEPSEEK = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% elif m.role == 'assistant' and m.tool_calls %}CALLS"
    "{% elif m.role == 'assistant' %}{% if loop.index0 and messages[loop.index0 - 1].role == 'tool' %}"
    "{{ '<｜tool▁outputs▁end｜>' + m.content }}{% else %}"
    "{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] }}{% endif %}{{ '<｜end▁of▁sentence｜>' }}"
    "{% elif m.role == 'tool' %}{{ '<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>' + m.content }}"
    "{{ '<｜tool▁output▁end｜>' }}{% endif %}{% endfor %}"
    "{% if messages[-1].role == 'tool' %}{{ '<｜tool▁outputs▁end｜>' }}"
    "{% elif add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)
DEEPSEEK_R1 = _DEEPSEEK.replace("CALLS", "")
DEEPSEEK_V3 = _DEEPSEEK.replace(
    "CALLS",
    "{{ '<｜Assistant｜>' + (m.content or '') + '<｜tool▁calls▁begin｜>' }}{% for call in m.tool_calls %}"
    "{{ ('' if loop.first else '\\n') + '<｜tool▁call▁begin｜>' + call.type + '<｜tool▁sep｜>' + call.function.name }}"
    "{{ '\\n```json\\n' + call.function.arguments + '\\n```<｜tool▁call▁end｜>' }}{% endfor %}"
    "{{ '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' }}",
)

# A turn ends where the next one begins: no token of its own.
GLM_4_5 = (
    "{{ '[gMASK]<sop>' }}{% if tools %}{{ '<|system|>\\n# Tools\\n\\nYou may call one or more functions to "
    "assist with the user query.\\n\\nYou are provided with function signatures within <tools></tools> XML "
    "tags:\\n<tools>\\n' }}{% for t in tools %}{{ t | tojson + '\\n' }}{% endfor %}{{ '</tools>\\n\\nFor each "
    "function call, output the function name and arguments within the following XML format:\\n<tool_call>"
    "{function-name}\\n<arg_key>{arg-key-1}</arg_key>\\n<arg_value>{arg-value-1}</arg_value>\\n<arg_key>"
    "{arg-key-2}</arg_key>\\n<arg_value>{arg-value-2}</arg_value>\\n...\\n</tool_call>' }}{% endif %}"
    + _LAST_QUESTION + "{% for m in messages %}"
    "{% if m.role == 'assistant' %}{% set content = m.content or '' %}" + _THOUGHT +
    "{{ '<|assistant|>\\n<think>' + (thought.strip() if loop.index0 > ns.last else '') + '</think>' }}"
    "{{ '\\n' + content.strip() if content.strip() else '' }}"
    "{% for call in m.tool_calls or [] %}{{ '\\n<tool_call>' + call.function.name + '\\n' }}"
    "{% for key, value in call.function.arguments | items %}{{ '<arg_key>' + key + '</arg_key>\\n<arg_value>' }}"
    "{{ value if value is string else value | tojson }}{{ '</arg_value>\\n' }}{% endfor %}{{ '</tool_call>' }}"
    "{% endfor %}{% elif m.role == 'tool' %}{{ '<|observation|>' if messages[loop.index0 - 1].role != 'tool' }}"
    "{{ '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}"
    "{% else %}{{ '<|' + m.role + '|>\\n' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)  # fmt: skip

_COHERE_ROLE = (
    "{% set name = {'system': 'SYSTEM', 'user': 'USER', 'assistant': 'CHATBOT'}[m.role] %}"
    "{{ '<|START_OF_TURN_TOKEN|><|' + name + '_TOKEN|>' }}"
)
COHERE = (
    "{{ bos_token }}{% for m in messages %}" + _COHERE_ROLE +
    "{{ (m.content if m.role == 'system' else m.content.strip()) + '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
)  # fmt: skip

LFM2 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}" + _ASK
)

# As training libraries ship them: turns are marked.
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}" + _ASK
)


@dataclass(frozen=True)
class Family:
    """A chat template, and what its tokenizer has."""

    template: str
    end: str
    """What a learned turn ends in, as the last one of a conversation."""
    tokens: tuple[str, ...]
    """Special tokens."""
    eos: str
    shipped: str | None = None
    """The published template: a file in TRL's `chat_templates`."""


def _named(*names: str) -> tuple[str, ...]:
    return tuple(f"<|{name}|>" for name in names)


_LLAMA_TOKENS = _named("start_header_id", "end_header_id", "eot_id")
_DEEPSEEK_TOKENS = tuple(
    f"<｜{name}｜>" for name in (
        "User", "Assistant", "end▁of▁sentence", "tool▁calls▁begin", "tool▁call▁begin", "tool▁sep",
        "tool▁call▁end", "tool▁calls▁end", "tool▁outputs▁begin", "tool▁output▁begin",
        "tool▁output▁end", "tool▁outputs▁end",
    )
)  # fmt: skip
_COHERE_TOKENS = _named(
    "START_OF_TURN_TOKEN", "END_OF_TURN_TOKEN", "SYSTEM_TOKEN", "USER_TOKEN", "CHATBOT_TOKEN"
)
_GPT_OSS_TOKENS = _named("start", "end", "message", "channel", "call", "return")
_TURN = ("<start_of_turn>", "<end_of_turn>")
_SENTENCE = "<｜end▁of▁sentence｜>"
_IM_END = "<|im_end|>\n"

FAMILIES = {
    "SmolLM2": Family(SMOLLM2, _IM_END, _IM, "<|im_end|>"),
    "Qwen2.5": Family(QWEN2_5, _IM_END, _IM, "<|im_end|>", "qwen2_5"),
    "Qwen3": Family(QWEN3, _IM_END, _IM, "<|im_end|>", "qwen3"),
    "Qwen3-2507": Family(QWEN3_2507, _IM_END, _IM, "<|im_end|>", "qwen3_instruct_2507"),
    "Qwen3.5": Family(QWEN3_5, _IM_END, _IM, "<|im_end|>", "qwen3_5_think"),
    "Nemotron 3": Family(NEMOTRON_3, _IM_END, _IM, "<|im_end|>", "nemotron_3_nano"),
    "Llama 3": Family(LLAMA3, "<|eot_id|>", _LLAMA_TOKENS, "<|eot_id|>", "llama3"),
    "Llama 3.2": Family(LLAMA3_2, "<|eot_id|>", _LLAMA_TOKENS, "<|eot_id|>", "llama3_2"),
    "Mistral": Family(MISTRAL, "</s>", ("[INST]", "[/INST]"), "</s>"),
    "Gemma 2": Family(GEMMA2, "<end_of_turn>\n", _TURN, "</s>", "gemma"),
    "Gemma 3": Family(GEMMA3, "<end_of_turn>\n", _TURN, "</s>", "gemma3"),
    "Phi-3": Family(
        PHI3, "<|end|>\n</s>", _named("system", "user", "assistant", "end"), "</s>", "phi3"
    ),
    "gpt-oss": Family(GPT_OSS, "<|return|>", _GPT_OSS_TOKENS, "<|return|>", "gptoss"),
    "DeepSeek-R1": Family(
        DEEPSEEK_R1, _SENTENCE, _DEEPSEEK_TOKENS, _SENTENCE, "deepseek_r1_distill"
    ),
    "DeepSeek-V3": Family(DEEPSEEK_V3, _SENTENCE, _DEEPSEEK_TOKENS, _SENTENCE, "deepseekv3"),
    "GLM-4.5": Family(
        GLM_4_5, "<|user|>", (*_named("system", "user", "assistant", "observation"), "[gMASK]", "<sop>"),
        "<|user|>", "glm4moe",
    ),
    "Aya": Family(
        COHERE, "<|END_OF_TURN_TOKEN|>", _COHERE_TOKENS, "<|END_OF_TURN_TOKEN|>", "cohere"
    ),
    "LFM2": Family(LFM2, _IM_END, _IM, "<|im_end|>", "lfm2"),
    "ChatML, marked": Family(MARKED, "<|im_end|>", _IM, "<|im_end|>"),
}  # fmt: skip


def tokenizer_of(family: str | None, template: str | None = None) -> Any:
    """The quickstart's tokenizer with the special tokens and the template of a family, or with
    another `template`; without a family as it is."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    if family is not None:
        found = FAMILIES[family]
        tokens = [AddedToken(token, special=True, normalized=False) for token in found.tokens]
        tokenizer.add_special_tokens({"additional_special_tokens": tokens})
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in TAGS])
        tokenizer.eos_token = found.eos
        tokenizer.chat_template = template or found.template
    return tokenizer
