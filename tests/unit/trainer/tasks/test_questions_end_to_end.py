"""Windows of questions end to end in a row, against each alone in transformers' own model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForQuestionAnswering
from transformers.cache_utils import Cache

from adapters.units import transformer_blocks
from tests.helpers import losses, quick_config, save_random_model
from tests.unit.trainer.tasks.test_encoders_end_to_end import LENGTHS, SMALL, gradients
from trainer.config.config import Config
from trainer.data.micro_batches import _mark_document
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.model.attention import VARLEN, register_attention
from trainer.records.jsonl import read_metrics
from trainer.run.dry_run import dry_run
from trainer.run.run import run
from trainer.tasks.base import Example
from trainer.tasks.documents import MASKS
from trainer.tasks.options import QuestionAnsweringOptions
from trainer.tasks.question_answering import QuestionAnswering
from trainer.tasks.text_rows import ENCODERS

register_attention()
DECODERS = {
    "llama": {"num_key_value_heads": 2, "intermediate_size": 48},
    "bloom": {"n_layer": 2, "n_head": 4},  # ALiBi: it takes no positions
}
END_TO_END = ["data.padding_free=true", "data.row_lengths=3"]


def answering(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    own = {"gptj": {"rotary_dim": 4}, **DECODERS}.get(kind, {})
    config = AutoConfig.for_model(kind, **SMALL | {"num_labels": 2} | own)
    model = AutoModelForQuestionAnswering.from_config(config, **changes).train()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name.lower() else 0.0, 0.2)
    return model


def windows(kind: str) -> list[Example]:
    """Of each the answer is a token, or all of the context."""
    generator, found = torch.Generator().manual_seed(1), []
    for number, length in enumerate(LENGTHS):
        ids = torch.randint(2, 99, (length,), generator=generator).tolist()
        types = [int(place > length // 2) for place in range(length)] if kind == "bert" else ()
        first, last = (length // 3, length - 1) if number % 2 else (length // 2, length // 2)
        marked = [int(first <= place <= last) for place in range(length)]
        known = {"first": length // 3, "spans": [[0, 1]] * (length - length // 3), "null": 0}
        found.append(Example(ids, marked, types, reference=json.dumps(known)))
    return found


def task(longest_answer: int = 4) -> QuestionAnswering:
    made = QuestionAnswering.__new__(QuestionAnswering)
    made.options = QuestionAnsweringOptions(max_answer_length=longest_answer)
    made.pad_token_id = 1
    return made


def alone(model: Any, given: list[Example]) -> tuple[Tensor, list[tuple[float, ...]]]:
    """(the summed loss by transformers, the best span of each window by trying all)"""
    total, best = torch.zeros((), dtype=model.dtype), list[tuple[float, ...]]()
    for example in given:
        at = [place for place, marked in enumerate(example.loss_mask) if marked]
        types = {"token_type_ids": torch.tensor([example.token_type_ids])}
        out = model(
            torch.tensor([example.input_ids]), start_positions=torch.tensor([at[0]]),
            end_positions=torch.tensor([at[-1]]), **(types if example.token_type_ids else {}),
        )  # fmt: skip
        total = total + out.loss
        starts, ends = out.start_logits[0].detach(), out.end_logits[0].detach()
        inside = range(json.loads(example.reference)["first"], len(starts))
        spans = [(a, b) for a in inside for b in inside if a <= b < a + 4]
        a, b = max(spans, key=lambda span: float(starts[span[0]] + ends[span[1]]))
        best.append((a, b, float(starts[a] + ends[b]), float(starts[0] + ends[0])))
    return total, best


@pytest.mark.parametrize("width", [0, 64])
@pytest.mark.parametrize("attention", ["sdpa", VARLEN])
@pytest.mark.parametrize("kind", [*sorted(ENCODERS), *DECODERS])
def test_each_window_as_alone(kind: str, attention: str, width: int) -> None:
    """Loss, best spans and all gradients; by a dense mask and by spans, with and without padding.
    In float64 but for the scores: in float32 windows alone are themselves up to 1e-4 off."""
    if kind == "bloom" and attention == VARLEN:
        pytest.skip("BLOOM's attention adds ALiBi: it keeps its own")
    model = answering(kind, attn_implementation="eager" if kind == "bloom" else "sdpa").double()
    given = windows(kind)
    assert QuestionAnswering.reads_documents(model)
    expected, best = alone(model, given)
    theirs = gradients(model, expected)
    if kind != "bloom":
        model.config._attn_implementation = attention
    batch = task().collate([given], width=width)
    assert batch.inputs["input_ids"].shape == (1, max(width, sum(LENGTHS)))
    loss, found = task().loss(model, batch)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    torch.testing.assert_close(found, torch.tensor(best), rtol=1e-5, atol=1e-5)
    ours = gradients(model, loss)
    assert ours.keys() == theirs.keys()
    largest = max(float(gradient.norm()) for gradient in theirs.values())
    for name, gradient in ours.items():
        scale = float(theirs[name].norm())
        if scale < 1e-9 * largest:  # 0: what adds the same to the scores of all tokens
            assert float(gradient.norm()) < 1e-6 * largest, name
        else:
            # By spans scores of attention are float32 on a CPU.
            tolerance = 5e-5 if attention == VARLEN else 1e-5
            assert float((gradient - theirs[name]).norm()) <= tolerance * scale, name


def test_rows_are_padded_alike() -> None:
    """A row of windows and rows of one: the same targets, spans and loss; an empty one has none."""
    model, given = answering("bert"), windows("bert")
    one, rows = task().collate([given]), task().collate([[window] for window in given])
    assert torch.equal(one.targets, rows.targets) and torch.equal(one.contexts, rows.contexts)
    torch.testing.assert_close(task().loss(model, one), task().loss(model, rows))
    empty, _ = task().loss(model, task().collate([given], empty=True))
    assert float(empty.detach()) == 0 and not any(
        gradient.any() for gradient in gradients(model, empty).values()
    )


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_row_of_one_window_attends_by_spans_as_rows_of_several_do(kind: str, monkeypatch) -> None:
    """Where most rows hold several, it is marked as a document: the same programs and graphs."""
    masks, make = [], MASKS[VARLEN]
    monkeypatch.setitem(MASKS, VARLEN, lambda *a, **k: masks.append(make(*a, **k)) or masks[-1])
    model, (window, *_) = answering(kind, attn_implementation="sdpa"), windows(kind)
    expected, best = task().loss(model, task().collate([[window]]))
    model.config._attn_implementation = VARLEN
    batch = task().collate([[window]], width=24)
    _mark_document(batch, len(window.input_ids))
    loss, found = task().loss(model, batch)
    assert [mask.dtype for mask in masks] == [torch.int32]
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, best)


def asked(tmp_path: Path, name: str, *changes: str) -> Config:
    lines = []
    for n in range(40):
        context = f"{'So it is. ' * (n % 3)}There are {n} red apples and {2 * n} old ones here."
        answers = {"text": [str(n)], "answer_start": [context.index(str(n))]}
        row = {"question": "how many red?", "context": context, "answers": answers}
        lines.append(json.dumps(row) + "\n")
    (tmp_path / "questions.jsonl").write_text("".join(lines))
    return quick_config(
        tmp_path, f"run.name={name}", "task.kind=question_answering", "data.packing=false",
        f"data.train={tmp_path}/questions.jsonl", f"data.eval={tmp_path}/questions.jsonl",
        "data.train_records=null", "data.max_length=48", "task.stride=8", "run.verify=full",
        "method.targets=all-linear", "data.micro_batch_size=4", "run.eval_every=4", *changes,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "bloom", "gptj"])
def test_blocks_get_no_cache_of_keys(kind: str) -> None:
    """A graph, or a recomputed block, would append to it in every pass. Heads of the first kind
    take no `use_cache`, those of the others do not hand it on."""
    model, given = answering(kind), windows(kind)
    caches = []
    for block in transformer_blocks(model):
        block[1].register_forward_pre_hook(
            lambda _, args, kwargs: caches.extend(
                value for value in (*args, *kwargs.values()) if isinstance(value, Cache)
            ),
            with_kwargs=True,
        )
    task().loss(model, task().collate([given]))
    assert caches == [] and model.config.use_cache
    model(torch.tensor([given[0].input_ids]))
    assert caches


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_runs(tmp_path: Path, kind: str) -> None:
    """Losses and scores of padded rows, windows of long contexts among them."""
    without: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = save_random_model(
        tmp_path / kind, kind, AutoModelForQuestionAnswering, **(without if kind == "bert" else {})
    )
    found, scores = [], []
    for form, changes in {"padded": ["data.padding_free=false"], "rows": END_TO_END}.items():
        config = asked(tmp_path, f"{kind}-{form}", f"model.id={model}", *changes)
        said = dry_run(config, World())
        assert ("end to end in one row a micro-batch" in said) == (form == "rows")
        run(config, World())
        found.append(losses(config.run_folder))
        lines = list(read_metrics(config.run_folder / "metrics.jsonl"))
        scores.append(
            [line[k] for line in lines if "eval_f1" in line for k in ("eval_loss", "eval_f1")]
        )
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert len(scores[0]) > 1 and scores[1] == pytest.approx(scores[0], rel=1e-4)


@pytest.mark.parametrize("kind", ["albert", "bart"])
def test_others_have_a_row_for_each(tmp_path: Path, kind: str) -> None:
    model = save_random_model(tmp_path / kind, kind, AutoModelForQuestionAnswering)
    config = asked(tmp_path, kind, f"model.id={model}", *END_TO_END)
    with pytest.raises(UserError, match=r"padding_free: true given, but task\.kind=question_answ"):
        dry_run(config, World())
