"""Whole runs end to end and by tokens: the padded runs' losses, resumed to the last bit."""

import shutil
import threading

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.helpers import losses, quick_config, save_random_model
from tests.world.worker import cut_run, train_only
from trainer.config.config import Config, with_overrides
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.model.packing import choose_rows
from trainer.run.dry_run import dry_run
from trainer.run.remarks import on_rows
from trainer.run.run import run
from trainer.session import open_session
from trainer.training.evaluation import evaluate
from trainer.training.loop import make_loader

BY_TOKENS = ["data.micro_batch_size=null", "data.micro_batch_tokens=384"]
END_TO_END = ["data.padding_free=true", "data.row_lengths=3"]


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    save_random_model(folder / "model", "llama", AutoModelForCausalLM)
    return folder


def configured(tmp, name: str, *changes: str) -> Config:
    return quick_config(
        tmp, f"model.id={tmp}/model", f"run.name={name}", "data.max_length=128",
        "data.on_bad_record=skip", "data.leave_out=3", "checkpoint.every=2", *changes,
    )  # fmt: skip


def test_losses_do_not_depend_on_the_form_of_micro_batches(tmp) -> None:
    found = {}
    for name, changes in {
        "padded": [], "rows": END_TO_END, "tokens": BY_TOKENS, "both": [*BY_TOKENS, *END_TO_END],
    }.items():  # fmt: skip
        config = configured(tmp, name, *changes)
        run(config, World())
        found[name] = losses(config.run_folder)
    assert not [thread for thread in threading.enumerate() if "prefetch" in thread.name]
    for name in ("rows", "tokens", "both"):
        assert found[name] == pytest.approx(found["padded"], rel=1e-5)


@pytest.mark.parametrize("packing", [False, True])
def test_a_resumed_run_is_the_same_to_the_last_bit(tmp, packing: bool) -> None:
    changes = [
        *BY_TOKENS,
        *END_TO_END,
        f"data.packing={str(packing).lower()}",
        "method.dropout=0.2",
    ]
    whole = configured(tmp, f"whole-{packing}", *changes)
    train_only(World(), whole.model_dump())
    again = configured(tmp, f"again-{packing}", *changes)
    cut_run(whole.run_folder, again.run_folder, 2)
    train_only(World(), again.model_dump())
    assert losses(again.run_folder) == losses(whole.run_folder)
    shutil.rmtree(again.run_folder)
    cut_run(whole.run_folder, again.run_folder, 2)
    with pytest.raises(UserError, match=r"data\.micro_batch_tokens: 512 given, but .* 384"):
        train_only(World(), with_overrides(again, ["data.micro_batch_tokens=512"]).model_dump())


def test_evaluation_is_packed_too(tmp) -> None:
    scores = [
        evaluate(open_session(configured(tmp, "evaluation", *changes), World()))
        for changes in ([], ["data.packing=true"], ["data.packing=true", *END_TO_END, *BY_TOKENS])
    ]
    for packed in scores[1:]:
        assert packed == pytest.approx(scores[0], rel=1e-5)


def test_what_is_said_at_the_start(tmp) -> None:
    packed = configured(tmp, "said", *BY_TOKENS, "data.packing=true")
    lines = list(on_rows(make_loader(open_session(packed, World()), World())))
    assert lines[0].startswith("packed by best fit into ") and lines[0].endswith("% filled")
    assert lines[1] == (
        "micro-batches of at most 384 tokens, padded to the longest of a micro-batch (attention "
        "would need a mask of documents: on cpu there is no kernel for it)"
    )
    assert "end to end in one row a micro-batch, without padding, 3 lengths up to" in dry_run(
        configured(tmp, "said", *END_TO_END), World()
    )


def classification(tmp, name: str, *changes: str) -> Config:
    """Whether a number is odd, in texts of different lengths."""
    lines = ["text\tlabel", *(f"{'one more ' * (n % 7)}{n}\t{n % 2}" for n in range(60))]
    (tmp / "numbers.tsv").write_text("\n".join(lines))
    return configured(
        tmp, name, "task.kind=sequence_classification", "data.format=classification",
        "data.text=text", "data.label=label", f"data.train={tmp}/numbers.tsv",
        "data.train_records=null", "data.eval=left_out", "data.leave_out=16",
        "data.eval_records=null", "data.micro_batch_size=4", "run.verify=full", *changes,
    )  # fmt: skip


def test_classified_records_end_to_end(tmp) -> None:
    found = {}
    for name, changes in {"padded": ["data.padding_free=false"], "rows": END_TO_END}.items():
        config = classification(tmp, f"classes-{name}", *changes)
        said = dry_run(config, World())
        assert ("end to end in one row a micro-batch" in said) == (name == "rows")
        run(config, World())
        found[name] = losses(config.run_folder)
    # The first step of Adam has the size of the learning rate where a gradient is rounding alone.
    assert found["rows"][0] == pytest.approx(found["padded"][0], rel=1e-6)
    assert found["rows"] == pytest.approx(found["padded"], rel=1e-4)


def test_encoders_end_to_end(tmp) -> None:
    without = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = save_random_model(tmp / "bert", "bert", AutoModelForSequenceClassification, **without)
    found = []
    for form, changes in {"padded": ["data.padding_free=false"], "rows": END_TO_END}.items():
        config = classification(tmp, f"bert-{form}", f"model.id={model}", *changes)
        run(config, World())
        found.append(losses(config.run_folder))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_an_encoder_that_reads_otherwise_has_a_row_for_each(tmp) -> None:
    model = save_random_model(tmp / "albert", "albert", AutoModelForSequenceClassification)
    config = classification(tmp, "albert", f"model.id={model}", *END_TO_END)
    with pytest.raises(UserError, match=r"padding_free: true given, but task\.kind=sequence_class"):
        dry_run(config, World())


def test_models_that_need_padded_rows(tmp_path) -> None:
    layers = {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
    model = save_random_model(tmp_path / "model", "lfm2", AutoModelForCausalLM, **layers)
    given = [f"model.id={model}", "data.max_length=128"]
    with pytest.raises(UserError, match=r"data\.padding_free: true .* state along a row \(conv\)"):
        dry_run(quick_config(tmp_path, *given, "data.padding_free=true"), World())
    assert "padded to the longest" in dry_run(quick_config(tmp_path, *given), World())


@pytest.mark.parametrize(
    ("kind", "lies"), [("bert", True), ("roberta", True), ("albert", False), ("llama", True)]
)
def test_texts_lie_end_to_end_on_a_gpu(tmp_path, kind: str, lies: bool) -> None:
    """In 16 bits; in 32 there is no kernel for it, and a mask of the row would cost more."""
    save_random_model(tmp_path / "model", kind, AutoModelForSequenceClassification)
    config = quick_config(
        tmp_path, f"model.id={tmp_path}/model", "task.kind=sequence_classification",
        "data.format=classification", "data.text=text",
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    rows, attention = choose_rows(model, config, torch.device("cuda"), torch.bfloat16)
    assert rows.end_to_end == lies == attention.by_document
    rows, attention = choose_rows(model, config, torch.device("cuda"), torch.float32)
    assert not rows.end_to_end and not attention.by_document
