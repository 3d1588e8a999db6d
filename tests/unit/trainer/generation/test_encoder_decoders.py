"""Encoder-decoders answer as transformers' own, from sources of unequal length."""

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from tests.helpers import quick_config, sample
from tests.tiny_models import tiny_config
from trainer.distributed.world import World
from trainer.generation.generate import generate
from trainer.generation.prompts import of_text
from trainer.session import open_model

PROMPTS = [[44, 90, 81, 76, 302, 2], [17, 2], [60, 61, 62, 2], [33, 35, 2]]


def save(shapes, folder, tokenizer):
    """A random model whose answers differ by prompt."""
    model = AutoModelForSeq2SeqLM.from_config(shapes)
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    model.generation_config.forced_eos_token_id = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("kind", sample(["t5", "bart", "pegasus"], "bart"))
def test_a_batch_gets_what_transformers_gives_to_each_prompt(tmp_path, tokenizer, kind):
    folder = tmp_path / kind
    save(tiny_config(kind, decoder_start_token_id=2), folder, tokenizer)
    config = quick_config(
        tmp_path, f"model.id={folder}", "task.kind=sequence_to_sequence", "data.eval=null",
        "method.targets=all-linear", "generation.max_new_tokens=10", "generation.batch_size=3",
    )  # fmt: skip
    ours = open_model(config, World())
    answers = generate(ours, PROMPTS, config.generation)
    reference = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()
    for ids, answer in zip(PROMPTS, answers, strict=True):
        new = reference.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)).long(), max_new_tokens=10,
            do_sample=False, num_beams=1, eos_token_id=2, pad_token_id=0,
            decoder_start_token_id=ours.task.start,
        )[0, 1:].tolist()  # fmt: skip
        assert answer.tokens == (new[: new.index(2)] if 2 in new else new)
    text = of_text("One day", config.data, ours.task)
    assert text.ids == tokenizer("One day")["input_ids"]


def test_a_t5_whose_decoder_is_deeper(tmp_path, tokenizer):
    """As T5-efficient's: transformers (5.17) makes its cache for the encoder's layers, and fails
    with it; without one it gives the reference."""
    folder = tmp_path / "deep"
    shapes = tiny_config("t5", decoder_start_token_id=2, num_layers=1, num_decoder_layers=3)
    save(shapes, folder, tokenizer)
    config = quick_config(
        tmp_path, f"model.id={folder}", "task.kind=sequence_to_sequence", "data.eval=null",
        "method.targets=all-linear", "generation.max_new_tokens=6", "generation.batch_size=3",
    )  # fmt: skip
    answers = generate(open_model(config, World()), PROMPTS, config.generation)
    reference = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()
    for ids, answer in zip(PROMPTS, answers, strict=True):
        new = reference.generate(
            torch.tensor([ids]), max_new_tokens=6, do_sample=False, use_cache=False,
            eos_token_id=2, pad_token_id=0, decoder_start_token_id=2,
        )[0, 1:].tolist()  # fmt: skip
        assert answer.tokens == (new[: new.index(2)] if 2 in new else new)
