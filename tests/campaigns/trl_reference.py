"""What TRL learns from the inputs of the table in docs/data.md:

    PYTHONPATH=. HF_HUB_OFFLINE=1 PYTHON -m tests.campaigns.trl_reference

where PYTHON has torch, transformers and trl, which are not needed otherwise. Writes tests/kept/trl.json:
the token ids and those that are learned (labels) as TRL's `SFTTrainer` prepares them, or the error that it
ends in. The published chat templates are those that TRL ships, with its own marks where it has some; that the
compact ones of `families.py` render as they do is checked for every input, and noted.
"""

import json
import tempfile
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import trl
from datasets import IterableDataset
from transformers import AutoModelForCausalLM
from transformers.utils.chat_template_utils import render_jinja_template
from trl import SFTConfig, SFTTrainer
from trl.chat_template_utils import get_training_chat_template

from tests.unit.trainer.data.families import FAMILIES, TOKENIZER, tokenizer_of
from tests.unit.trainer.data.inputs import INPUTS, Input

KEPT = Path(__file__).resolve().parents[1] / "kept/trl.json"
SHIPPED = Path(trl.__file__).parent / "chat_templates"
DATES = {'strftime_now("%Y-%m-%d")': '"2025-08-05"', 'strftime_now("%d %b %Y")': '"26 Jul 2024"'}


def dated(template: str) -> str:
    """A template whose date does not pass."""
    for call, date in DATES.items():
        template = template.replace(call, date)
    return template


def published(family: str) -> str | None:
    shipped = FAMILIES[family].shipped
    return (SHIPPED / f"{shipped}.jinja").read_text(encoding="utf-8") if shipped else None


def marked(family: str) -> str | None:
    """The family's template as TRL marks it for training; None where it does not know how."""
    tokenizer = tokenizer_of(family, published(family))
    try:
        return dated(get_training_chat_template(tokenizer) or tokenizer.chat_template)
    except ValueError:
        return None


def prepared(row: dict, tokenizer: Any, **settings: Any) -> dict:
    """The example that `SFTTrainer` makes of a record: token ids, and which of them are learned."""
    model = AutoModelForCausalLM.from_pretrained(TOKENIZER)
    model.resize_token_embeddings(len(tokenizer))
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(folder, report_to="none", max_length=None, use_cpu=True, bf16=False, max_steps=1,
                           eos_token=tokenizer.eos_token, **settings)  # fmt: skip
        data = IterableDataset.from_generator(lambda: iter([row]))
        try:
            trainer = SFTTrainer(model, config, train_dataset=data, processing_class=tokenizer)
            (example,) = trainer.train_dataset
        except Exception as error:
            return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"}
    return {
        "ids": example["input_ids"],
        "learned": [int(label != -100) for label in example["labels"]],
    }


def in_turns(row: dict) -> Iterator[dict]:
    """A prompt and a completion for every answer."""
    other = {key: value for key, value in row.items() if key != "messages"}
    for index, message in enumerate(row["messages"]):
        if message["role"] == "assistant":
            yield {"prompt": row["messages"][:index], "completion": [message], **other}


def results(case: Input) -> dict:
    """What TRL makes of an input: {"sft": [example], "turns": [example, …]}."""
    row = case.trl or case.row
    settings: dict[str, Any] = {}
    if "prompt" in row:
        settings["completion_only_loss"] = case.loss_on == "completion"
    if case.family is None:
        return {"sft": [prepared(row, tokenizer_of(None), **settings)]}
    template = dated(published(case.family) or FAMILIES[case.family].template)
    if "messages" not in row:
        return {"sft": [prepared(row, tokenizer_of(case.family, template), **settings)]}
    with_marks = marked(case.family)
    answers = prepared(
        row, tokenizer_of(case.family, with_marks or template), assistant_only_loss=True
    )
    turns = [prepared(turn, tokenizer_of(case.family, template)) for turn in in_turns(row)]
    return {"sft": [answers], "turns": turns}


def renders_alike(case: Input) -> bool | None:
    """Whether the compact template renders every beginning of a chat as the published one does, where that
    does not refuse it."""
    if case.family is None or "messages" not in case.row or published(case.family) is None:
        return None
    tokenizer, messages = tokenizer_of(case.family), case.row["messages"]
    texts = []
    for template in (dated(published(case.family) or ""), FAMILIES[case.family].template):
        texts.append([
            _rendered(template, messages[: end + 1], case.row.get("tools"), prompt, tokenizer)
            for end in range(len(messages)) for prompt in (False, True)
        ])  # fmt: skip
    return all(a == b for a, b in zip(*texts, strict=True) if a is not None)


def _rendered(
    template: str, messages: list, tools: Any, prompt: bool, tokenizer: Any
) -> str | None:
    try:
        found, _ = render_jinja_template([messages], tools=tools, chat_template=template,
                                         add_generation_prompt=prompt, **tokenizer.special_tokens_map)  # fmt: skip
    except Exception:
        return None
    return found[0]


def main() -> None:
    warnings.simplefilter("ignore")
    versions = {name: version(name) for name in ("trl", "transformers", "tokenizers", "torch")}
    lines = []
    for case in INPUTS:
        found = {
            "what": case.what,
            "family": case.family,
            "renders_alike": renders_alike(case),
            **results(case),
        }
        lines.append(json.dumps(found, ensure_ascii=False))
        short = [
            e.get("error", sum(e.get("learned", []))) for e in found["sft"] + found.get("turns", [])
        ]
        print(case.what, "|", case.family, "|", found["renders_alike"], "|", short, flush=True)
    body = ",\n".join(lines)
    KEPT.write_text(
        f'{{"versions": {json.dumps(versions)}, "inputs": [\n{body}\n]}}\n', encoding="utf-8"
    )


if __name__ == "__main__":
    main()
