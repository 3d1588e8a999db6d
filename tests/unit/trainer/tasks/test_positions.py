"""How long a text may be, against transformers' own models, one token longer too."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.helpers import quick_config, save_random_model, thorough
from trainer.config.data_options import DataOptions
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.run.dry_run import dry_run
from trainer.run.remarks import on_batch, on_length
from trainer.run.run import run
from trainer.session import open_session, refuse_longer
from trainer.tasks.base import Example
from trainer.tasks.causal_lm import CausalLM, CausalLMOptions
from trainer.tasks.positions import longest_row, longest_text

POSITIONS = 40
COMMON = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99,
    "intermediate_size": 48, "max_position_embeddings": POSITIONS, "pad_token_id": 1,
}  # fmt: skip
OWN = {
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bart": {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 2},
    "xglm": {"d_model": 32, "num_layers": 1, "attention_heads": 2, "ffn_dim": 48},
    "mpt": {"d_model": 32, "n_layers": 1, "n_heads": 2, "max_seq_len": POSITIONS},
    "gptj": {"rotary_dim": 8},
    "gpt_neo": {"num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]]},
}
LIMITS = {
    "bert": POSITIONS, "roberta": POSITIONS - 2, "opt": POSITIONS, "bart": POSITIONS,
    "gpt2": POSITIONS, "gptj": POSITIONS, "ctrl": POSITIONS, "gpt_neo": POSITIONS, "mpt": POSITIONS,
    "llama": None, "gpt_neox": None, "xglm": None, "bloom": None,
}  # fmt: skip


def tiny(model_type, auto=AutoModelForCausalLM):
    config = AutoConfig.for_model(model_type, **{**COMMON, **OWN.get(model_type, {})})
    if model_type in ("bert", "roberta"):
        config.is_decoder = True
    return auto.from_config(config, dtype=torch.float32).eval()


def fits(model, tokens):
    ids = torch.arange(2, 2 + tokens).unsqueeze(0) % 90 + 2
    try:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("model_type", LIMITS)
def test_the_longest_text_is_the_longest_that_runs(model_type):
    model = tiny(model_type)
    limit = longest_text(model)
    assert limit == LIMITS[model_type]
    assert fits(model, limit or 3 * POSITIONS)
    assert limit is None or not fits(model, limit + 1)


@thorough
def test_every_causal_architecture():
    from tests.tiny_models import CAUSAL, architectures, not_buildable, tiny_model

    wrong = []
    for name in architectures(CAUSAL):
        # The second stream of ProphetNet's decoder is one position ahead.
        if not_buildable(name, CAUSAL) or name in ("prophetnet", "reformer"):
            continue
        model = tiny_model(name, CAUSAL)
        limit = longest_text(model)
        if not fits(model, limit or 300) or (limit is not None and fits(model, limit + 1)):
            wrong.append((name, limit))
    assert not wrong


def data_of(*lengths):
    lengths = np.array(lengths)
    return SimpleNamespace(lengths=lengths, weights=lengths - 1)


def options(**settings):
    return DataOptions(train="data.jsonl", **settings)


def test_only_texts_that_are_there_are_refused():
    """The default data.max_length is longer than BERT's table: what counts is the data."""
    model = tiny("bert", AutoModelForSequenceClassification)
    refuse_longer(model, options(max_length=1024), data_of(3, POSITIONS), {})
    message = (
        f"data.max_length: 1024 given, and the data has texts of 41 tokens, but .* has positions "
        f"for {POSITIONS}; accepted: at most {POSITIONS}$"
    )
    with pytest.raises(UserError, match=message):
        refuse_longer(model, options(max_length=1024), data_of(41), {})
    with pytest.raises(UserError, match="texts of 41"):
        refuse_longer(model, options(max_length=1024), data_of(3), {"": data_of(41, 2)})
    refuse_longer(tiny("llama"), options(max_length=1024), data_of(900), {})


def test_rows_of_packed_texts():
    """Positions restart in every text; a table that a whole row looks up at once is its limit."""
    for model_type in ("opt", "bert", "roberta", "gpt2"):
        model, given = tiny(model_type), options(max_length=1024, packing=True)
        assert longest_row(model) is None
        refuse_longer(model, given, data_of(30, 30), {})
        with pytest.raises(UserError, match="has texts of 41 tokens"):
            refuse_longer(model, given, data_of(20, 41), {})
    for model_type in ("mpt", "gpt_neo"):
        model = tiny(model_type)
        refuse_longer(model, options(max_length=POSITIONS, packing=True), data_of(30, 30), {})
        refuse_longer(model, options(max_length=1024, packing=True), data_of(20, 20), {})
        refuse_longer(model, options(max_length=1024), data_of(30, 30), {})
        with pytest.raises(UserError, match="has packed rows of 60 tokens"):
            refuse_longer(model, options(max_length=1024, packing=True), data_of(30, 30), {})


@pytest.mark.parametrize("model_type", ["opt", "bert", "roberta", "gpt2"])
def test_a_packed_row_longer_than_the_table(model_type, tokenizer):
    """Two texts as long as the table, in one row beside a shorter one, against each alone."""
    model, task = tiny(model_type), CausalLM(CausalLMOptions(), tokenizer)
    limit = longest_text(model)
    torch.manual_seed(1)
    texts = [torch.randint(2, 90, (n,)).tolist() for n in (limit, limit, 7, 9)]
    texts[1][4] = texts[2][3] = 1  # RoBERTa does not count padding tokens, not even inside a text
    found = [Example(ids, [0] + [1] * (len(ids) - 1), weight=len(ids) - 1) for ids in texts]

    def loss(*rows):
        with torch.no_grad():
            return float(task.loss(model, task.collate(rows))[0])

    alone = 0.0
    for ids in map(torch.tensor, texts):
        with torch.no_grad():
            logits = model(input_ids=ids[None], use_cache=False).logits[0]
        alone += float(F.cross_entropy(logits[:-1], ids[1:], reduction="sum"))
    assert abs(loss(found[:2], found[2:]) / alone - 1) < 1e-5


def test_a_longer_text_is_one_error_at_start(tmp_path):
    (tmp_path / "long.jsonl").write_text('{"text": "' + "one two three " * 120 + '"}\n')
    folder = save_random_model(
        tmp_path / "model", "opt", AutoModelForCausalLM, ffn_dim=96, word_embed_proj_dim=64
    )
    config = quick_config(
        tmp_path, f"model.id={folder}", f"data.train={tmp_path}/long.jsonl", "data.eval=null",
        "data.max_length=1024", "method.targets=[q_proj]",
    )  # fmt: skip
    for start in (open_session, dry_run):
        with pytest.raises(UserError, match=r"data.max_length: 1024 .* accepted: at most 256$"):
            start(config, World())


def test_a_rotary_model_beyond_its_pretraining_is_said():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = tiny("llama")
    assert list(on_length(model, data_of(POSITIONS), {})) == []
    (said,) = on_length(model, data_of(5), {"": data_of(POSITIONS + 1)})
    assert said.startswith(f"data.max_length: the longest record has {POSITIONS + 1} tokens")
    assert list(on_length(tiny("bert"), data_of(POSITIONS), {})) == []


def test_a_step_larger_than_the_data_is_said(tmp_path, capsys):
    assert list(on_batch(options(batch_size=7), 7)) == []
    (tmp_path / "few.jsonl").write_text('{"text": "one two"}\n' * 7)
    config = quick_config(
        tmp_path, f"data.train={tmp_path}/few.jsonl", "data.eval=null", "data.batch_size=32",
        "run.steps=1", "log.progress=plain",
    )  # fmt: skip
    said = (
        "data.batch_size: 32 sequences, but the data has 7: each step repeats records "
        "(4.57 epochs a step)"
    )
    assert said in dry_run(config, World())
    capsys.readouterr()
    run(config, World())
    assert f"note      {said}" in capsys.readouterr().out
