"""A run with a chat template of its own: what it says, and what every export of it renders by."""

import io
import json
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.helpers import quick_config
from trainer.config.config import Config
from trainer.distributed.world import World
from trainer.errors import BadCheckpoint
from trainer.export.export import export_run
from trainer.run.dry_run import dry_run
from trainer.run.run import run

CHAT = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "1"}]
MINE = (
    "{{ bos_token }}{% for m in messages %}{{ '<' + m.role + '>' + m.content + m.role[3:] + '\n' }}"
)
MINE += "{% endfor %}{% if add_generation_prompt %}{{ prompt }}{% endif %}"
SAVED = "{% set prompt = prompt | default('<assistant>') %}\n" + MINE


def config(tmp: Path, *more: str) -> Config:
    return quick_config(
        tmp, "run.steps=1", "data.prompt=prompt", "data.completion=completion", "data.eval=null",
        f"data.train={tmp}/chat.jsonl", "method.targets=[q_proj]", "log.progress=plain", *more,
    )  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def undrawn() -> Iterator[None]:
    yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], str]:
    """Folder of a run's files, the keys that set its template, what it said."""
    tmp = tmp_path_factory.mktemp("trained")
    (tmp / "chat.jsonl").write_text((json.dumps({"messages": CHAT}) + "\n") * 8)
    (tmp / "mine.jinja").write_text(MINE)
    keys = [
        f"data.chat_template={tmp}/mine.jinja", "data.template_arguments={prompt: <assistant>}"
    ]  # fmt: skip
    with redirect_stdout(io.StringIO()) as said:
        run(config(tmp, *keys), World())
    (tmp / "mine.jinja").unlink()  # what was trained does not need it
    return tmp, keys, said.getvalue()


def template_in(folder: Path) -> str:
    return AutoTokenizer.from_pretrained(folder).chat_template


def test_every_export_has_it(trained: tuple, tmp_path: Path) -> None:
    tmp, _, said = trained
    assert "ends a turn with 'istant', which is 5 tokens" in said
    folder = tmp / "runs/quickstart"
    assert template_in(folder / "adapter") == SAVED
    for what in ("adapter", "merged"):
        export_run(folder, tmp_path / what, World(), what=what, measure=False)
        assert template_in(tmp_path / what) == SAVED
    # An adapter can be exported without the model; its template still is there.
    gone = [f"model.id={tmp_path}/gone"]
    export_run(folder, tmp_path / "alone", World(), measure=False, overrides=gone)
    assert (tmp_path / "alone/chat_template.jinja").read_text() == SAVED


def test_resuming_compares_it(trained: tuple) -> None:
    tmp, keys, _ = trained
    for more, reason in (
        ("data.chat_template=chatml", "data.chat_template: 'chatml' given"),
        ("data.system=S", "data.system: 'S' given"),
        ("data.template_arguments={prompt: a}", "data.template_arguments: {'prompt': 'a'} given"),
        ("data.as_chat=true", "data.as_chat: True given"),
    ):
        with pytest.raises(BadCheckpoint) as caught:
            run(config(tmp, *keys, more), World())
        assert str(caught.value).startswith(reason)
    (tmp / "mine.jinja").write_text(MINE.replace("<", "["))
    with pytest.raises(BadCheckpoint, match="the same tokens"):
        run(config(tmp, *keys), World())
    assert "'istant'" in dry_run(config(tmp, *keys), World())
