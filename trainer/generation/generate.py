"""Continue prompts with a trained model, on any engine, by transformers' own `generate`.

A batch is padded on the left, and a rank answers whole batches: what a prompt gets does not depend
on the number of ranks. Engines that gather blocks by a collective run every forward pass on all
ranks: a rank that is done, or has no batch left, goes on with passes whose results nobody reads.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig

from adapters import seeds
from adapters.layers.linear import fixed_adapters
from trainer.config.generation_options import GenerationOptions
from trainer.config.sections import Shown
from trainer.data.templates import added_tokens, stops
from trainer.errors import RunFailed, UserError
from trainer.generation.prompts import text_of
from trainer.model.attention import with_cache
from trainer.model.backbone import class_name
from trainer.model.hub import end_tokens
from trainer.model.packing import carrying_layers
from trainer.session import LoadedModel
from trainer.tasks.positions import counts_by_itself, longest_text

_SEED = 0x6E7  # of tokens that are drawn, among the seeds of a run


@dataclass(frozen=True)
class Answer:
    """What a model makes of a prompt."""

    tokens: list[int]
    """Without the end token."""
    text: str
    """Up to a stop string, without special tokens."""
    ended: bool
    """By an end token or a stop string, before `max_new_tokens`."""


def generate(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
    *,
    seed: int = 0,
    shown: Shown = "none",
    streamer: Any = None,
) -> list[Answer]:
    """The answer to each prompt of token ids, which must not be empty. Without dropout, and without
    changing torch's random state. `shown`: a bar on rank 0's terminal; `streamer`: of transformers,
    for a single prompt. Collective, with the same prompts on all ranks; so is its result. Raises
    UserError where a prompt and an answer exceed the model's positions."""
    with model.world.all_or_none():
        check_lengths(model, prompts, options)
        settings = _settings(model, options)
    batches = _batches(model, prompts, options.batch_size)
    world, size = model.world, model.world.size
    synced = model.engine.collective_gather and size > 1
    found: list[tuple[int, dict[str, Any]]] = []
    bar = tqdm(
        total=len(batches), desc="generating", unit="batch", leave=False, dynamic_ncols=True,
        disable=not (shown == "bar" and world.is_main),
    )  # fmt: skip
    with bar, _ready(model):
        for first in range(0, len(batches), size):
            index = first + world.rank
            own = batches[index] if index < len(batches) else []
            if own or synced:
                rows = [prompts[prompt] for prompt in own] or [prompts[batches[first][0]][:1]]
                torch.manual_seed(seeds.mixed(seed, _SEED, index))
                sequences = _continue(model, rows, settings, synced, streamer)
                answers = [_answer(model, row, settings) for row in sequences]
                found += zip(own, map(vars, answers), strict=False)
            bar.update(min(size, len(batches) - first))
    by_prompt = dict(pair for of_rank in world.gather(found) for pair in of_rank)
    return [Answer(**by_prompt[index]) for index in range(len(prompts))]


def check_lengths(
    model: LoadedModel, prompts: Sequence[Sequence[int]], options: GenerationOptions
) -> None:
    """Raises UserError where the model generates no text, or has no positions for it."""
    if not model.task.options.generates:
        raise UserError(
            f"task.kind: {model.config.task.kind} given, which generates no text; accepted: a run "
            "of causal_lm"
        )
    limit, longest = longest_text(model.backbone.model), max(map(len, prompts), default=0)
    if limit is not None and model.backbone.model.config.is_encoder_decoder:
        limit += longest if longest <= limit else 0  # its prompt is in a row of its own
    if limit is not None and longest + options.max_new_tokens > limit:
        raise UserError(
            f"generation.max_new_tokens: {options.max_new_tokens} given with a prompt of {longest} "
            f"tokens, but {class_name(model.model)} has positions for {limit}; accepted: at most "
            f"{max(limit - longest, 0)}, or shorter prompts"
        )


def _settings(model: LoadedModel, options: GenerationOptions) -> GenerationConfig:
    """All that is asked for: what else a model's generation_config.json or config.json say, such as
    of sampling, has no effect."""
    drawn, tokenizer = options.temperature > 0, cast(Any, model.tokenizer)
    sampling = {"temperature": options.temperature, "top_p": options.top_p, "top_k": options.top_k}
    tokens, texts = stops(model.tokenizer, model.config.data)
    ends = end_tokens(model.config.model, model.backbone.model.config, model.tokenizer)
    known = added_tokens(tokenizer)  # special ones are not in an answer's text
    tokens += [tokenizer.convert_tokens_to_ids(one) for one in options.stop if one in known]
    texts += [one for one in options.stop if one not in known]
    return GenerationConfig(
        max_new_tokens=options.max_new_tokens,
        do_sample=drawn,
        num_beams=1,
        eos_token_id=[*ends, *tokens] or None,
        pad_token_id=model.task.pad_token_id,
        decoder_start_token_id=getattr(model.task, "start", None),  # of an encoder-decoder
        stop_strings=texts or None,
        **(sampling if drawn else {}),
    )


def _batches(model: LoadedModel, prompts: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Prompts by number, the longest first; of one length where the model would take padding for
    text."""
    backbone = model.backbone.model
    alike = bool(carrying_layers(backbone)) or counts_by_itself(backbone) is not None
    batches: list[list[int]] = []
    for index in sorted(range(len(prompts)), key=lambda index: -len(prompts[index])):
        last = batches[-1] if batches else []
        fits = 0 < len(last) < size
        if fits and not (alike and len(prompts[last[0]]) != len(prompts[index])):
            last.append(index)
        else:
            batches.append([index])
    return batches


@contextmanager
def _ready(model: LoadedModel) -> Iterator[None]:
    """The model as it is evaluated: without dropout and compiled programs, which would be compiled
    again for caches; and without settings of its own. Every forward pass is reported to the
    watchdog."""
    module, device = model.model, model.world.device
    was_training, backbone = module.training, model.backbone.model
    given, backbone.generation_config = backbone.generation_config, GenerationConfig()
    alive = module.register_forward_pre_hook(
        lambda *_: model.watchdog.alive("a forward pass of a generation")
    )
    devices = [device] if device.type == "cuda" else []
    try:
        with (
            model.method.inference(), model.backbone.blocks.uncompiled(),
            with_cache(backbone), torch.random.fork_rng(devices),
            torch.no_grad(), model.casts.fresh(), fixed_adapters(module),
        ):  # fmt: skip
            module.eval()
            yield
    finally:
        alive.remove()
        module.train(was_training)
        backbone.generation_config = given


def _continue(
    model: LoadedModel, rows: Sequence[Sequence[int]], settings: GenerationConfig, synced: bool,
    streamer: Any,
) -> list[list[int]]:  # fmt: skip
    """The new tokens of each row."""
    width, device = max(map(len, rows)), model.world.device
    apart = bool(model.backbone.model.config.is_encoder_decoder)  # an encoder reads the prompts
    ids = torch.full((len(rows), width), model.task.pad_token_id)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        start = 0 if apart else width - len(row)
        ids[index, start : start + len(row)] = torch.tensor(row)
        mask[index, start : start + len(row)] = 1
    try:
        sequences: Tensor = model.backbone.model.generate(  # type: ignore[operator]
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=settings,
            synced_gpus=synced,
            tokenizer=model.tokenizer if settings.stop_strings else None,
            streamer=streamer,
            **_cache(model.backbone.model.config),
        )
    except torch.OutOfMemoryError as error:
        raise RunFailed(
            f"generation.batch_size: {model.config.generation.batch_size} given, but the GPU's "
            f"memory does not suffice for {len(rows)} prompts of {width} tokens; accepted: fewer"
        ) from error
    return sequences[:, 1 if apart else width :].tolist()


def _cache(config: Any) -> dict[str, Any]:
    """A cache that grows, for a T5 whose decoder has more layers than its encoder: transformers
    (5.17) would make one of the encoder's."""
    if getattr(config, "num_decoder_layers", None) in (None, getattr(config, "num_layers", None)):
        return {}
    return {"past_key_values": EncoderDecoderCache(DynamicCache(), DynamicCache())}


def _answer(model: LoadedModel, tokens: list[int], settings: GenerationConfig) -> Answer:
    ends: Any = settings.eos_token_id or []
    stop: Any = settings.stop_strings or []
    end = next((place for place, token in enumerate(tokens) if token in ends), None)
    tokens = tokens[:end]
    text = text_of(tokens, model.tokenizer, stop)
    stopped = any(one in model.tokenizer.decode(tokens, skip_special_tokens=True) for one in stop)
    while stopped and tokens[-1] == settings.pad_token_id:  # while others of the batch went on
        tokens.pop()
    return Answer(tokens, text, end is not None or stopped)
