"""Make the quickstart's assets: word problems to tune on, and a tiny Llama to tune.

    python configs/quickstart/generate.py data    # train.jsonl and eval.jsonl, seconds
    python configs/quickstart/generate.py model   # model/, some minutes on one CPU core

All text comes from the templates below. The word problems are questions with a worked answer;
the model is pretrained from scratch on short declarative stories in the same words, so it knows
the vocabulary and some sums, but not the form of the task.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
LIMIT = 50  # every number in the texts is below this
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}  # ids 0, 1, 2

SHE = ("Anna", "Mia", "Rosa", "Lena", "Sara", "Nina")
HE = ("Tom", "Ben", "Omar", "Paul", "Leo", "Sam")
ITEMS = ("apples", "eggs", "books", "pencils", "coins", "cards", "stamps", "shells", "cups",
         "toys", "beads", "flowers")  # fmt: skip
PLACES = ("shop", "market", "school", "park", "station", "library")
BOXES = ("box", "bag", "basket", "drawer")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = ("January", "March", "April", "May", "June", "August", "October")
MOODS = ("happy", "tired", "proud", "calm", "hungry", "busy")
SKIES = ("sunny", "cold", "warm", "windy", "quiet", "rainy")

# "has|had" is the present and the past form of a word; render() keeps one of them.
STARTS = (
    "{who} has|had {n} {item}.",
    "{who} keeps|kept {n} {item} in a {box}.",
    "There are|were {n} {item} in the {box} that {who} owns|owned.",
    "{who} comes|came to the {place} with {n} {item}.",
)
GAINS = (
    "{he} buys|bought {n} more {item} at the {place}.",
    "{he} finds|found {n} more {item} in a {box}.",
    "{he} gets|got {n} {item} from {friend}.",
    "{he} is|was given {n} more {item} by {friend}.",
)
LOSSES = (
    "{he} gives|gave {n} {item} to {friend}.",
    "{he} loses|lost {n} of the {item} at the {place}.",
    "{he} sells|sold {n} {item} at the {place}.",
    "{he} lends|lent {n} of the {item} to {friend}.",
)
TOTALS = (
    "Now {he} has|had {n} {item}.",
    "{he} counts|counted the {item}, and there are|were {n} of them.",
    "That makes|made {n} {item} in all.",
    "In the {box} there are|were {n} {item} now.",
)
ASKS = (
    "How many {item} does {who} have now?",
    "How many {item} does {he} have in the end?",
    "How many {item} are there now?",
)
ASIDES = (
    "It is|was a {sky} day, and {who} is|was {mood}.",
    "The {place} opens|opened at {n} minutes past {hour}.",
    "{friend} walks|walked to the {place} on {day}.",
    "{who} likes|liked {item} more than anything else.",
    "The {item} are|were in a {box} near the door.",
    '"How are you?" asks|asked {friend}. "I am {mood}," says|said {who}.',
    '"Where is the {place}?" asks|asked {who}, but {friend} does|did not know.',
    "{friend} wants|wanted to know how many {item} there are|were in the {box}.",
    "{who} stands|stood in line with ticket # {n}, and {friend} holds|held ticket # {hour}.",
    "The house of {friend} is|was # {n} in the street by the {place}.",
    "They meet|met on {hour} {month}, when it is|was {sky}.",
)


def render(template: str, tense: int, words: dict[str, str], **numbers: int) -> str:
    """Fill in a template, keep one tense (0 present, 1 past) and start with a capital."""
    text = re.sub(r"([\w']+)\|([\w']+)", lambda m: m.group(tense + 1), template)
    text = text.format(**words, **numbers)
    return text[0].upper() + text[1:]


def draw_words(rng: random.Random) -> dict[str, str]:
    """Draw the people, things and places of one text."""
    who, friend = rng.sample(SHE + HE, 2)
    draws = {"item": ITEMS, "place": PLACES, "box": BOXES, "day": DAYS, "month": MONTHS,
             "mood": MOODS, "sky": SKIES}  # fmt: skip
    words = {key: rng.choice(options) for key, options in draws.items()}
    return words | {"who": who, "friend": friend, "he": "she" if who in SHE else "he"}


def draw_change(rng: random.Random, total: int) -> int:
    """Draw a change of at least 2, up or down, that keeps the total from 2 to LIMIT - 1."""
    up, down = LIMIT - 1 - total, total - 2
    if up >= 2 and (down < 2 or rng.random() < 0.5):
        return rng.randint(2, up)
    return -rng.randint(2, down)


def working(total: int, change: int) -> str:
    """Write one sum out, such as "7 + 5 = 12."."""
    return f"{total} {'+' if change > 0 else '-'} {abs(change)} = {total + change}."


# ---------------------------------------------------------------- the word problems


def change_problem(rng: random.Random) -> tuple[str, list[str], int]:
    """Someone has things and gains or loses some, once or twice."""
    words, total = draw_words(rng), rng.randint(2, LIMIT - 1)
    lines, sums = [render(rng.choice(STARTS), 0, words, n=total)], []
    for _ in range(rng.choice((1, 2))):
        change = draw_change(rng, total)
        lines.append(render(rng.choice(GAINS if change > 0 else LOSSES), 0, words, n=abs(change)))
        sums.append(working(total, change))
        total += change
    return " ".join([*lines, render(rng.choice(ASKS), 0, words)]), sums, total


def pair_problem(rng: random.Random) -> tuple[str, list[str], int]:
    """Two people have things; ask how many together, or how many more the first has."""
    words, first = draw_words(rng), rng.randint(4, LIMIT - 3)
    change = draw_change(rng, first)
    ask = (
        "How many {item} do {who} and {friend} have together?"
        if change > 0
        else "How many more {item} does {who} have than {friend}?"
    )
    text = "{who} has {a} {item} and {friend} has {b} {item}. " + ask
    question = render(text, 0, words, a=first, b=abs(change))
    return question, [working(first, change)], first + change


def write_data(out: Path, seed: int) -> None:
    """Write train.jsonl (2000 records) and eval.jsonl (200 others), the same bytes every time."""
    rng = random.Random(seed)
    records: dict[str, str] = {}  # question -> answer, so that no question comes twice
    while len(records) < 2200:
        make: Callable[[random.Random], tuple[str, list[str], int]]
        make = change_problem if rng.random() < 0.8 else pair_problem
        question, sums, result = make(rng)
        records.setdefault(question, f"{' '.join(sums)} #### {result}")
    lines = [json.dumps({"question": q, "answer": a}) + "\n" for q, a in records.items()]
    for name, part in (("train.jsonl", lines[:2000]), ("eval.jsonl", lines[2000:])):
        (out / name).write_bytes("".join(part).encode())
        print(f"{name}: {len(part)} records")


# ---------------------------------------------------------------- the pretraining text


def count_story(rng: random.Random, words: dict[str, str], tense: int) -> list[str]:
    """Tell how a number of things changes, and mostly how many there are after it."""
    total = rng.randint(2, LIMIT - 1)
    lines = [render(rng.choice(STARTS), tense, words, n=total)]
    for _ in range(rng.randint(1, 3)):
        change = draw_change(rng, total)
        total += change
        templates = GAINS if change > 0 else LOSSES
        lines.append(render(rng.choice(templates), tense, words, n=abs(change)))
        if rng.random() < 0.8:
            lines.append(render(rng.choice(TOTALS), tense, words, n=total))
    return lines


def pair_story(rng: random.Random, words: dict[str, str], tense: int) -> list[str]:
    """Compare what two people have."""
    first = rng.randint(4, LIMIT - 3)
    change = draw_change(rng, first)
    end = (
        "Together they have|had {c} {item}."
        if change > 0
        else "So {who} has|had {c} more {item} than {friend}."
    )
    text = "{who} has|had {a} {item} and {friend} has|had {b} {item}. " + end
    return [render(text, tense, words, a=first, b=abs(change), c=first + change)]


def ledger_story(rng: random.Random, words: dict[str, str], tense: int) -> list[str]:
    """Quote the sums that someone writes down, day by day."""
    lines = [render("{who} writes|wrote down how many {item} come|came and go|went.", tense, words)]
    total = rng.randint(2, LIMIT - 1)
    for day in sorted(rng.sample(DAYS, rng.randint(2, 4)), key=DAYS.index):
        change = draw_change(rng, total)
        note = f"On {day} the note says|said {working(total, change)}"
        lines.append(render(note, tense, words))
        total += change
    return lines


def story(rng: random.Random) -> str:
    """One short story of one or two paragraphs, with sentences around the counting."""
    words, tense = draw_words(rng), rng.randint(0, 1)
    paragraphs = []
    for _ in range(rng.randint(1, 2)):
        lines = rng.choice((count_story, pair_story, ledger_story))(rng, words, tense)
        asides = [
            render(text, tense, words, n=rng.randint(2, LIMIT - 1), hour=rng.randint(2, 12))
            for text in rng.sample(ASIDES, rng.randint(0, 2))
        ]
        before = rng.randint(0, len(asides))
        paragraphs.append(" ".join(asides[:before] + lines + asides[before:]))
    return "\n".join(paragraphs)


# ---------------------------------------------------------------- the model


def train_tokenizer(rng: random.Random, stories: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of 512 tokens that splits numbers into single digits."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((story(rng) for _ in range(stories)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
        **SPECIAL,
    )


def batches(
    tokenizer: PreTrainedTokenizerFast, rng: random.Random, rows: int, length: int
) -> Iterator[torch.Tensor]:
    """Pack an endless run of new stories, each as <s> story </s>, into batches of token ids."""
    import torch

    ids: list[int] = []
    while True:
        while len(ids) < rows * length:
            texts = [story(rng) for _ in range(64)]
            for encoded in tokenizer(texts, add_special_tokens=False)["input_ids"]:
                ids += [tokenizer.bos_token_id, *encoded, tokenizer.eos_token_id]
        yield torch.tensor(ids[: rows * length]).view(rows, length)
        ids = ids[rows * length :]


def write_model(out: Path, seed: int, steps: int, threads: int) -> None:
    """Train the tokenizer and a Llama of 0.75 million parameters; save it in bfloat16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = train_tokenizer(rng, stories=5000)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.08,  # about 1 / sqrt(hidden_size); the usual 0.02 is slow this small
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    print(f"{model.num_parameters()} parameters, {len(tokenizer)} tokens")

    peak, warmup, length, rows = 3e-3, 100, 128, 16
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=peak,
        betas=(0.9, 0.95),
    )

    def rate(step: int) -> float:
        """Linear warm-up, then a cosine down to a twentieth of the peak."""
        done = max(0.0, (step - warmup) / max(1, steps - warmup))
        return min(1.0, (step + 1) / warmup) * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    stream = batches(tokenizer, rng, rows, length)
    start, recent = time.perf_counter(), []
    for step in range(1, steps + 1):
        ids = next(stream)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        if step % 100 == 0 or step == steps:
            mean, seconds = sum(recent) / len(recent), time.perf_counter() - start
            print(f"step {step}/{steps}  loss {mean:.3f}  {seconds:.0f} s", flush=True)
            recent = []

    folder = out / "model"
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"  # name the class that every version knows
    saved = json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings.write_text(json.dumps(saved, indent=2) + "\n")
    for path in sorted(folder.iterdir()):
        print(f"{path.name}: {path.stat().st_size} bytes")


def main() -> None:
    """Read the command line and make what it names."""
    parser = argparse.ArgumentParser(description="Make the quickstart's data or its model.")
    parser.add_argument("command", choices=("data", "model"))
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to")
    parser.add_argument("--seed", type=int, default=None, help="data: 1, model: 2 unless given")
    parser.add_argument("--steps", type=int, default=2600, help="model: pretraining steps")
    parser.add_argument("--threads", type=int, default=1, help="model: CPU threads")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.command == "data":
        write_data(args.out, 1 if args.seed is None else args.seed)
    else:
        write_model(args.out, 2 if args.seed is None else args.seed, args.steps, args.threads)


if __name__ == "__main__":
    main()
