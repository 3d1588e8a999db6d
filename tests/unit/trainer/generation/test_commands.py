"""`rankcast generate` and `rankcast chat` on a run."""

import io
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from launch import chat, generate
from tests.helpers import quick_config
from tests.unit.trainer.data.chat_templates import CHATML
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.export.export import export_run
from trainer.run.run import run

SHORT = ["generation.max_new_tokens=12", "engine.device=cpu", "log.progress=none"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run, and the model that its export merges."""

    folder = tmp_path_factory.mktemp("generated")
    run(
        quick_config(folder, "data.eval=null", "run.name=a", "optim.learning_rate=0.01"),
        World(),
    )
    export_run(
        folder / "runs/a", folder / "merged", World(), what="merged", measure=False, dtype="float32"
    )
    return folder


def continued(trained, tokenizer, text: str) -> str:
    """What transformers' own pipeline of merged model and tokenizer makes of a text."""
    model = AutoModelForCausalLM.from_pretrained(trained / "merged", dtype=torch.float32)
    ids = tokenizer(text, return_tensors="pt")
    new = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("source", ["runs/a", "runs/a/adapter"])
def test_prompts_are_continued(trained, tokenizer, capsys, source):
    texts = ["Mia has 8 eggs. How many?\n", "There are"]
    arguments = [part for text in texts for part in ("--prompt", text)]
    assert generate.main([str(trained / source), *arguments, *SHORT]) == 0
    out, err = capsys.readouterr()
    assert out == "\n\n".join(continued(trained, tokenizer, text) for text in texts) + "\n"
    assert "tokens in" in err


def test_rows_become_lines(trained, tokenizer, tmp_path):
    rows = [{"question": "Mia has 8 eggs.", "answer": "#### 8"}, {"question": "How many?"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out.jsonl"
    drawn = ["--samples", "2", "generation.temperature=1.0"]
    arguments = [str(trained / "runs/a"), "--data", str(tmp_path / "rows.jsonl"), "--out", str(out)]
    generate.main([*arguments, *SHORT])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["record"] for line in lines] == [0, 1]
    assert [line.get("reference") for line in lines] == ["#### 8", None]
    for line, row in zip(lines, rows, strict=True):
        assert line["text"] == continued(trained, tokenizer, row["question"] + "\n")
        assert row["question"] in line["prompt"] and line["tokens"] <= 12
    generate.main([*arguments, *drawn, *SHORT])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["record"], line["sample"]) for line in lines] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert lines[0]["text"] != lines[1]["text"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a", "--chat"], "--chat: the tokenizer has no chat template"),
        (["--prompt", "a", "--samples", "2"], "--samples: 2 given with generation.temperature=0"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--data", "nowhere.jsonl", "--chat"], "--chat: given with --data"),
        (["--prompt", "a", "--records", "3"], "--records: 3 given without --data"),
        (["--prompt", "a", "--k", "1,2"], "--k: given without --run-code"),
    ],
)
def test_refused(trained, arguments, message):
    with pytest.raises(UserError, match=message):
        generate.main([str(trained / "runs/a"), *arguments, *SHORT])
    with pytest.raises(UserError, match="neither a run folder"):
        generate.main([str(trained), "--prompt", "a"])


def test_a_chat_goes_on_until_a_new_one(trained, tokenizer, tmp_path, capsys, monkeypatch):
    template = tmp_path / "template.jinja"
    template.write_text(CHATML)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\nHow many?\n/new\nHello\n"))
    asked = []
    from trainer.generation import prompts

    honest = prompts.of_messages
    monkeypatch.setattr(
        prompts, "of_messages", lambda said, *rest: asked.append(list(said)) or honest(said, *rest)
    )
    arguments = [str(trained / "runs/a"), "--system", "Be brief.", *SHORT]
    assert chat.main([*arguments, f"data.chat_template={template}"]) == 0
    roles = [[message["role"] for message in said] for said in asked]
    first = ["system", "user"]
    assert roles == [first, [*first, "assistant", "user"], first]
    assert asked[0] == asked[2]
    tokenizer.chat_template = CHATML
    text = tokenizer.apply_chat_template(asked[0], tokenize=False, add_generation_prompt=True)
    tokenizer.chat_template = None
    bare = text.removeprefix(tokenizer.bos_token)
    answer = continued(trained, _Unmarked(tokenizer), bare).partition("<|im_end|>")[0]
    assert asked[1][2]["content"] == answer
    assert capsys.readouterr().out.startswith(answer)


class _Unmarked:
    """The tokenizer without a begin token of its own: the template has its own marks."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.decode = tokenizer.decode

    def __call__(self, text, **settings):
        return self._tokenizer(text, add_special_tokens=False, **settings)
