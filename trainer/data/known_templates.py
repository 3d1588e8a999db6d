"""Chat templates by name (`data.chat_template`): the forms of well-known families, for models that
come without a template. They render conversations of text: no tools, no thoughts.

None writes a begin token: it is put before where the tokenizer itself begins texts with one.
"""

CHATML = r"""
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""

LLAMA_3 = r"""
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}
    {{- message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""

# As of version 3 of the tokenizer. The system message goes with the first user message; models of
# that version get it with the last one, which would rewrite the turns before.
MISTRAL = r"""
{%- set system = '' %}
{%- set turns = messages %}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content + '\n\n' %}
    {%- set turns = messages[1:] %}
{%- endif %}
{%- for message in turns %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' + (system if loop.first else '') + message.content + '[/INST]' }}
    {%- elif message.role == 'assistant' %}
        {{- ' ' + message.content }}{{ eos_token }}
    {%- endif %}
{%- endfor %}
"""

GEMMA = r"""
{%- set system = '' %}
{%- set turns = messages %}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content + '\n\n' %}
    {%- set turns = messages[1:] %}
{%- endif %}
{%- for message in turns %}
    {%- set role = 'model' if message.role == 'assistant' else message.role %}
    {{- '<start_of_turn>' + role + '\n' + (system if loop.first else '') }}
    {{- message.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<start_of_turn>model\n' }}
{%- endif %}
"""

# Without the end token that the family's own template puts after the last turn: it ends a whole
# rendering only, and <|end|> is what generation stops at.
PHI_3 = r"""
{%- for message in messages %}
    {{- '<|' + message.role + '|>\n' + message.content + '<|end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\n' }}
{%- endif %}
"""

ALPACA = r"""
{%- set system = 'Below is an instruction that describes a task. '
    + 'Write a response that appropriately completes the request.' %}
{%- set turns = messages %}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content %}
    {%- set turns = messages[1:] %}
{%- endif %}
{{- system + '\n\n' }}
{%- for message in turns %}
    {%- if message.role == 'user' %}
        {{- '### Instruction:\n' + message.content + '\n\n### Response:\n' }}
    {%- elif message.role == 'assistant' %}
        {{- message.content }}{{ eos_token }}
        {%- if not loop.last %}
            {{- '\n\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
"""

KNOWN = {
    "alpaca": ALPACA.strip(),
    "chatml": CHATML.strip(),
    "gemma": GEMMA.strip(),
    "llama-3": LLAMA_3.strip(),
    "mistral": MISTRAL.strip(),
    "phi-3": PHI_3.strip(),
}
"""Jinja text by name."""
