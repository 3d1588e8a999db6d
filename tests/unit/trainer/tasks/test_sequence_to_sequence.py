"""Sources and targets: tokens, batches and losses against transformers' own, and what is refused."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.metrics import accuracy_score
from tokenizers.processors import TemplateProcessing
from torchmetrics.text import Perplexity
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from tests.helpers import TINY, quick_config, save_random_model
from tests.tiny_models import PAD, PAIRS, save_tiny, tiny_model
from trainer.data.rows import Rows
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.session import open_session
from trainer.tasks.base import IGNORED, Record, TooLong
from trainer.tasks.chunked_cross_entropy import loss_head
from trainer.tasks.options import SequenceToSequenceOptions
from trainer.tasks.sequence_to_sequence import SOURCE, TARGET, SequenceToSequence
from trainer.verification.examples import examples
from trainer.verification.forward import _ours, as_verified
from trainer.verification.verify import verify_session

PAIRS_OF_TEXTS = [
    ("The cat sat on the mat.", "A cat sat."), ("Two birds", "Birds, seen at noon."),
    ("She has three red coins and four eggs", "Coins and eggs"),
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    """Puts </s> behind texts and nothing before them, as T5's."""
    found = AutoTokenizer.from_pretrained(TINY)
    found.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", found.eos_token_id)]
    )
    return found


def task_of(tokenizer, model=None, limit: int = 128) -> SequenceToSequence:
    options = SequenceToSequenceOptions(max_target_length=limit)
    task = SequenceToSequence(options, tokenizer)
    if model is not None:
        task.check_model(model)
    return task


def records(pairs=PAIRS_OF_TEXTS) -> list[Record]:
    return [Record([(source, False), (target, True)]) for source, target in pairs]


def split(example) -> tuple[list[int], list[int]]:
    begin = list(example.loss_mask).index(1)
    assert sum(example.loss_mask) == example.weight == len(example.input_ids) - begin
    return list(example.input_ids[:begin]), list(example.input_ids[begin:])


# --- encoding


def test_tokens_are_those_of_the_tokenizer(tokenizer):
    encoded = task_of(tokenizer).encode(records(), 64)
    for (source, target), example in zip(PAIRS_OF_TEXTS, encoded, strict=True):
        assert split(example) == (
            tokenizer(source)["input_ids"], tokenizer(text_target=target)["input_ids"]
        )  # fmt: skip
        assert not example.truncated


def test_a_target_ends_in_the_end_token_also_where_the_tokenizer_adds_none(tokenizer):
    plain = AutoTokenizer.from_pretrained(TINY)
    source, target = split(task_of(plain).encode(records(), 64)[0])
    assert source == plain("The cat sat on the mat.")["input_ids"]
    assert target == [*plain("A cat sat.")["input_ids"], plain.eos_token_id]
    without = Record([("a", False), ("b", True)], add_eos=False)
    assert plain.eos_token_id not in task_of(plain).encode([without], 64)[0].input_ids


def test_both_are_cut_and_a_source_keeps_its_end_token(tokenizer):
    pairs = [("a long source " * 50, "short"), ("short", "a long target " * 50)]
    (source, _), (_, target) = both = [
        split(example) for example in task_of(tokenizer, limit=7).encode(records(pairs), 9)
    ]
    assert source == tokenizer(pairs[0][0], truncation=True, max_length=9)["input_ids"]
    assert target == tokenizer(pairs[1][1])["input_ids"][:7]
    assert all(found.truncated for found in task_of(tokenizer, limit=7).encode(records(pairs), 9))
    assert len(both[0][1]) < 7 and len(both[1][0]) < 9


@pytest.mark.parametrize(
    ("segments", "reason"),
    [
        ([("", False), ("x", True)], "the prompt is empty"),
        ([("x", False), ("", True)], "the completion is empty"),
        ([("x", False)], "several learned texts, or none"),
        ([("x", False), ("y", True), ("z", False), ("w", True)], "several learned texts"),
    ],
)
def test_what_is_no_pair_is_said(tokenizer, segments, reason):
    (found,) = task_of(tokenizer).encode([Record(segments)], 64)
    assert reason in found
    (found,) = task_of(tokenizer).encode(records()[:1], 1)
    assert isinstance(found, TooLong)


# --- batches and loss


def tiny(kind: str, **changes):
    model = tiny_model(kind, PAIRS, **changes)
    if kind == "bart":
        model.final_logits_bias.normal_()
    if changes.get("tie_word_embeddings") is False:
        assert not model.config.scale_decoder_outputs
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.2)
    return model.requires_grad_(False)


MODELS = {
    "t5": {}, "bart": {}, "mbart": {}, "pegasus": {},
    "v1.1": {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"},
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_that_of_transformers_with_labels(tokenizer, name):
    model = tiny("t5" if name == "v1.1" else name, **MODELS[name])
    task = task_of(tokenizer, model)
    encoded = task.encode(records(), 64)
    batch = task.collate([[example] for example in encoded])
    pairs = [split(example) for example in encoded]
    width, deepest = max(len(s) for s, _ in pairs), max(len(t) for _, t in pairs)
    ids = torch.tensor([s + [PAD] * (width - len(s)) for s, _ in pairs])
    labels = torch.tensor([t + [IGNORED] * (deepest - len(t)) for _, t in pairs])
    seen = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s, _ in pairs])
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=seen, labels=labels)
        found, predictions = task.loss(model, batch)
    count = int((labels != IGNORED).sum())
    assert batch.weight == count and batch.tokens == sum(len(s) + len(t) for s, t in pairs)
    assert float(found) / count == pytest.approx(float(expected.loss), rel=1e-6)
    right = (expected.logits.argmax(-1) == labels).sum(1)
    assert predictions.tolist() == [
        [int(r), len(t)] for r, (_, t) in zip(right, pairs, strict=True)
    ]
    scores = task.metrics(predictions.tolist(), [], [])
    learned = labels != IGNORED
    theirs = accuracy_score(labels[learned], expected.logits.argmax(-1)[learned])
    assert scores == {"token_accuracy": pytest.approx(theirs)}
    perplexity = Perplexity(ignore_index=IGNORED)(expected.logits, labels)
    ours = task.scores_of_loss(float(found) / count)["perplexity"]
    assert ours == pytest.approx(float(perplexity), rel=1e-5)
    assert (loss_head(model) is not None) == (name in ("t5", "v1.1"))


def test_an_empty_micro_batch_has_no_loss(tokenizer):
    model = tiny("t5")
    task = task_of(tokenizer, model)
    batch = task.collate([[task.encode(records(), 64)[0]]], empty=True)
    loss, _ = task.loss(model, batch)
    assert (batch.weight, batch.tokens, float(loss)) == (0, 0, 0.0)


def test_made_up_examples_have_the_rows_asked_for(tokenizer):
    task = task_of(tokenizer, tiny("t5"))
    rows = task.parts(task.made_up([5] * 9, [6] * 4))
    assert [len(row) for row in rows.values()] == [9, 4]
    batch = task.collate([[task.made_up([5] * 9)]])
    assert batch.inputs["input_ids"].shape == batch.inputs["decoder_input_ids"].shape == (1, 9)
    widths = Rows(source_apart=True).widths(np.array([12]), np.array([3]))
    assert widths.tolist() == [[9, 4]]


# --- models


def session_of(tmp_path, folder, *changes):
    (tmp_path / "pairs.jsonl").write_text(
        "".join(json.dumps({"prompt": s, "completion": t}) + "\n" for s, t in PAIRS_OF_TEXTS)
    )
    config = quick_config(
        tmp_path, f"model.id={folder}", "model.dtype=float32", "task.kind=sequence_to_sequence",
        f"data.train={tmp_path / 'pairs.jsonl'}", "data.eval=null", "data.max_length=64",
        "data.prompt='{prompt}'", "data.completion=completion", "method.targets=all-linear",
        "method.rank=4", *changes,
    )  # fmt: skip
    return open_session(config, World())


def test_a_head_that_the_files_hold_apart_is_apart(tmp_path):
    """Flan-T5, mT5: their config.json says so, but the class of their configuration does not."""
    folder = save_tiny(tmp_path / "model", "t5", PAIRS, **MODELS["v1.1"])
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn_like(tensors["shared.weight"])
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors", metadata={"format": "pt"},
    )  # fmt: skip
    session = session_of(tmp_path, folder)
    model, plain = session.model.eval(), AutoModelForSeq2SeqLM.from_pretrained(folder).float()
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight)
    assert model.encoder.embed_tokens.weight is model.shared.weight is not model.lm_head.weight
    batch = session.task.collate([[session.train_data[0]]])
    _, target = split(session.train_data[0])
    with torch.no_grad():
        found, _ = session.task.loss(model, batch)
        labels = torch.tensor([target])
        expected = plain.eval()(input_ids=batch.inputs["input_ids"], labels=labels).loss
    assert float(found) == pytest.approx(float(expected) * len(target), rel=1e-5)


def test_longer_than_the_position_tables(tmp_path):
    folder = save_tiny(tmp_path / "model", "bart", PAIRS, max_position_embeddings=12)
    with pytest.raises(UserError, match=r"data.max_length: 64 given, .* texts of \d+ tokens, but "):
        session_of(tmp_path, folder)
    with pytest.raises(UserError, match=r"task.max_target_length: 129 given, .* has positions for"):
        session_of(tmp_path, folder, "data.max_length=10")
    session_of(tmp_path, folder, "data.max_length=10", "task.max_target_length=8")


def test_whole_layers_are_never_dropped(tmp_path):
    folder = save_tiny(tmp_path / "model", "bart", PAIRS, encoder_layerdrop=0.5)
    assert session_of(tmp_path, folder).model.config.encoder_layerdrop == 0.0


def test_models_that_do_not_fit(tmp_path, tokenizer):
    with pytest.raises(UserError, match="llama has no encoder beside a decoder; accepted: an enc"):
        session_of(tmp_path, save_random_model(tmp_path / "llama", "llama"))
    with pytest.raises(UserError, match="what prophetnet predicts also depends on how long its"):
        session_of(tmp_path, save_tiny(tmp_path / "prophetnet", "prophetnet", PAIRS))
    folder = save_tiny(tmp_path / "t5", "t5", PAIRS, decoder_start_token_id=None)
    with pytest.raises(
        UserError, match=r"no token to start a target with .*decoder_start_token_id"
    ):
        session_of(tmp_path, folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.packing=true"], "data.packing: true given with task.kind=sequence_to_sequence"),
        (["data.padding_free=true"], "data.padding_free: true given with task.kind=sequence_to"),
        (["data.row_lengths=4"], "data.row_lengths: 4 given .*; accepted: auto or 0"),
        (["data.format=text"], "data.format: text given .*; accepted: auto, prompt_completion"),
        (["data.truncate=prompt"], "data.truncate: prompt given with .*; accepted: end"),
        (["task.max_target_length=0"], "task.max_target_length: 0 given; accepted: greater than 0"),
        (
            ["data.micro_batch_size=null", "data.micro_batch_tokens=100", "data.max_length=64"],
            "data.micro_batch_tokens: 100 given; accepted: at least 193, an example of "
            "data.max_length and task.max_target_length",
        ),
    ],
)
def test_options_that_do_not_fit(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        quick_config(tmp_path, "task.kind=sequence_to_sequence", "data.eval=null", *changes)


# --- the proof at start


def test_the_proof_compares_both_stacks(tmp_path):
    session = session_of(tmp_path, save_tiny(tmp_path / "model", "t5", PAIRS))
    assert "padded against T5ForConditionalGeneration" in verify_session(session).line
    sequences = [[example] for example in examples(session)]
    with as_verified(session):
        found = _ours(session, sequences)
    assert found.paths == [f"{stack}.block.{n}" for stack in ("encoder", "decoder") for n in (0, 1)]
    for path, states in zip(found.paths, found.hidden, strict=True):
        rows = [session.task.parts(example) for (example,) in sequences]
        name = TARGET if "decoder" in path else SOURCE
        assert [len(state) for state in states] == [len(row[name]) for row in rows]


def test_the_proof_finds_a_wrong_mask_of_sources(tmp_path, monkeypatch):
    session = session_of(tmp_path, save_tiny(tmp_path / "model", "bart", PAIRS))
    honest = SequenceToSequence.collate

    def blind(task, sequences, **settings):
        batch = honest(task, sequences, **settings)
        batch.inputs["attention_mask"].fill_(1)
        return batch

    monkeypatch.setattr(SequenceToSequence, "collate", blind)
    with pytest.raises(
        UserError, match=r"change each other in Bart.* mask of the padding is wrong"
    ):
        verify_session(session)
