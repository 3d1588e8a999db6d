"""Answers of one process: kinds of models, stop strings, end tokens, what is refused."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers import quick_config, sample
from tests.tiny_models import tiny_model
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.generation.generate import generate
from trainer.model.attention import VARLEN, with_cache
from trainer.session import open_model

PROMPTS = [[1, 44, 90, 81, 76, 302], [1, 17], [1, 60, 61, 62], [1, 33, 35]]
KINDS = ["gpt2", "mamba", "bloom", "opt", "gemma2", "gpt_oss", "mixtral", "recurrent_gemma", "xglm"]
"""Learned positions, a recurrent state, ALiBi, an offset, a window and a soft cap, sinks, experts,
both of the second and fifth, positions that the model counts by itself."""


@pytest.fixture
def opened(tmp_path, tokenizer):
    """Opens the quickstart's model, or that of a folder."""

    def open_it(*overrides: str):
        return open_model(quick_config(tmp_path, *overrides), World())

    return open_it


@pytest.mark.parametrize("kind", sample(KINDS, "mamba", "opt", "gemma2"))
def test_a_batch_gets_what_transformers_gives_to_each_prompt(tmp_path, opened, tokenizer, kind):
    folder = tmp_path / kind
    tiny_model(kind).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = opened(f"model.id={folder}", "method.targets=all-linear", "generation.batch_size=3",
                   "generation.max_new_tokens=12")  # fmt: skip
    answers = generate(model, PROMPTS, model.config.generation)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for ids, answer in zip(PROMPTS, answers, strict=True):
        row = torch.tensor([ids])
        new = reference.generate(
            row, attention_mask=torch.ones_like(row), max_new_tokens=12, do_sample=False,
            eos_token_id=2, pad_token_id=0,
        )[0, len(ids) :].tolist()  # fmt: skip
        assert answer.tokens == (new[: new.index(2)] if 2 in new else new)


def test_a_stop_string_ends_an_answer_and_is_no_part_of_it(opened, tokenizer):
    model = opened("generation.max_new_tokens=40")
    prompt = [
        tokenizer("Mia has 8 eggs. She lends 5 of the eggs to Sara. How many?\n")["input_ids"]
    ]
    (whole,) = generate(model, prompt, model.config.generation)
    middle = whole.text[len(whole.text) // 2 :][:2]
    (short,) = generate(
        model, prompt, model.config.generation.model_copy(update={"stop": [middle]})
    )
    assert short.ended and short.text == whole.text[: whole.text.index(middle)]
    assert len(short.tokens) < len(whole.tokens)


def test_a_special_stop_and_the_padding_behind_a_stop(opened, tokenizer):
    """A special token is in no text, and what fills the row of an answer that ended is none of its
    tokens."""
    options = {"max_new_tokens": 40, "batch_size": 2}
    model = opened()
    prompts = [
        tokenizer(text)["input_ids"] for text in ("Mia has 8 eggs. How many?\n", "There are some")
    ]
    plain = model.config.generation.model_copy(update=options)
    whole, other = generate(model, prompts, plain)
    at = len(whole.tokens) // 2
    stop = str(tokenizer.decode(whole.tokens[at : at + 2]))
    assert stop not in other.text
    short, _ = generate(model, prompts, plain.model_copy(update={"stop": [stop]}))
    assert short.ended and short.tokens == whole.tokens[: len(short.tokens)]
    assert stop in tokenizer.decode(short.tokens)
    assert stop not in tokenizer.decode(short.tokens[:-1])

    mark = tokenizer.convert_ids_to_tokens(whole.tokens[at])
    marked = copy.deepcopy(tokenizer)  # other tests share it
    marked.add_special_tokens({"additional_special_tokens": [mark]})
    assert marked.convert_tokens_to_ids(mark) == whole.tokens[at]
    special = replace(model, tokenizer=marked)
    short, _ = generate(special, prompts, plain.model_copy(update={"stop": [mark]}))
    assert (short.tokens, short.ended) == (
        whole.tokens[: whole.tokens.index(whole.tokens[at])],
        True,
    )


def test_answers_end_at_the_tokens_that_the_model_names_and_the_tokenizers(
    tmp_path, opened, tokenizer
):
    folder = tmp_path / "model"
    model = tiny_model("llama")
    model.generation_config.eos_token_id = [2, 7]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    plain = opened(f"model.id={folder}", "generation.max_new_tokens=12")
    (answer,) = generate(plain, PROMPTS[:1], plain.config.generation)
    given = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(
        json.dumps(
            given | {"eos_token_id": answer.tokens[4], "do_sample": True, "temperature": 9.0}
        )
    )
    first = answer.tokens.index(answer.tokens[4])
    (shorter,) = generate(plain, PROMPTS[:1], plain.config.generation)
    assert (shorter.tokens, shorter.ended) == (answer.tokens[:first], True)


def test_dropout_is_off_and_training_goes_on_afterwards(opened):
    model = opened("method.dropout=0.5", "generation.max_new_tokens=4")
    model.model.train()
    one, two = (generate(model, PROMPTS, model.config.generation) for _ in range(2))
    assert one == two and model.model.training
    assert not any(module._forward_pre_hooks for module in [model.model])


def test_an_answer_beyond_the_models_positions_is_refused(tmp_path, opened, tokenizer):
    folder = tmp_path / "gpt2"
    tiny_model("gpt2", n_positions=16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = opened(f"model.id={folder}", "method.targets=all-linear")
    options = model.config.generation
    with pytest.raises(UserError, match=r"max_new_tokens: 256 given.*positions for 16.*at most 10"):
        generate(model, PROMPTS, options)
    generate(model, PROMPTS, options.model_copy(update={"max_new_tokens": 10}))


def test_attention_by_spans_gives_way_to_the_cache(opened):
    model = opened("generation.max_new_tokens=6")
    expected = generate(model, PROMPTS, model.config.generation)
    model.backbone.model.config._attn_implementation = VARLEN
    assert generate(model, PROMPTS, model.config.generation) == expected
    assert model.backbone.model.config._attn_implementation == VARLEN
    with with_cache(model.backbone.model):
        assert model.backbone.model.config._attn_implementation == "sdpa"


def test_the_watchdog_hears_of_every_pass(opened):
    model, heard = opened("generation.max_new_tokens=3"), []

    class Listening:
        def alive(self, doing: str) -> None:
            heard.append(doing)

    answers = generate(replace(model, watchdog=Listening()), PROMPTS[:1], model.config.generation)
    assert len(heard) == len(answers[0].tokens) == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("generation.records=4 data.eval=null", "generation.records: 4 given without data.eval"),
        ("generation.records=4 task.loss_on=all", "with task.loss_on=all"),
        ("generation.records=4 task.kind=sequence_classification", "which generates no text"),
        ("generation.pattern='('", "generation.pattern: '[(]' given.*a regular expression"),
        ("generation.top_p=0.5", "generation.top_p: 0.5 given with generation.temperature=0"),
        ("generation.top_k=5", "generation.top_k: 5 given with generation.temperature=0"),
        ("generation.stop=['']", "generation.stop: .* accepted: texts that are not empty"),
        ("generation.scores=[rogue]", "generation.scores.0: 'rogue' given.*rouge"),
        ("generation.scores=[rouge] generation.pattern=gsm8k", "without exact_match"),
        ("generation.max_new_tokens=0", "generation.max_new_tokens: 0 given"),
    ],
)  # fmt: skip
def test_refused(tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        quick_config(tmp_path, *override.split(" "))
