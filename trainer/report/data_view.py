"""What tokenised data is: the first records as tokens, those marked that are learned; lengths."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.text import Text

from trainer.config.data_options import DataOptions
from trainer.data.dataset import TokenDataset
from trainer.data.packing import best_fit, fill
from trainer.tasks.base import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAME = 9  # characters before what is said of a data set
_LEARNED = "bold green"
_BORDER = "¦"  # between two tokens
_CONTEXT = 8  # tokens before one, by which its text is found
_SHOWN = 1000  # tokens of an example
_BINS, _BAR = 10, 40  # of the histogram: bars, and characters of the longest one
_QUANTILES = {"shortest": 0, "5 %": 5, "median": 50, "95 %": 95, "99 %": 99, "longest": 100}


def show(
    name: str, data: TokenDataset, tokenizer: "PreTrainedTokenizerBase", options: DataOptions,
    records: int,
) -> None:  # fmt: skip
    """Print all of it on the terminal."""
    console = Console(highlight=False, soft_wrap=True, emoji=False, markup=False)
    first, *rest = summary(data, options)
    if len(name) > _NAME:  # a mixture's source
        console.print(name)
        name = ""
    console.print(f"{name:<{_NAME}} {first}", *rest, *histogram(data.lengths), sep="\n")
    for text in records_as_tokens(data, tokenizer, records, colour=console.is_terminal):
        console.print()
        console.print(text)


def records_as_tokens(
    data: TokenDataset, tokenizer: "PreTrainedTokenizerBase", count: int, *, colour: bool
) -> Iterator[Text]:
    """The examples of the first `count` records. Learned tokens are coloured, or without `colour`
    put in [[ ]]."""
    for index in data.first_records(np.arange(len(data)), count):
        example = data[int(index)]
        if not example.weight:  # a wrong choice, which is scored only
            example = replace(example, loss_mask=[0] * len(example.loss_mask))
        learned = sum(example.loss_mask)
        what = f"{learned} learned" if example.loss_mask else f"label {example.label:g}"
        yield Text(
            f"record {data.records[index] + 1}: {len(example.input_ids)} tokens, {what}",
            style="bold",
        )
        yield as_tokens(example, tokenizer, colour=colour)


def as_tokens(example: Example, tokenizer: "PreTrainedTokenizerBase", *, colour: bool) -> Text:
    """The tokens of an example, divided by ¦."""
    text, before = Text(), False
    pieces = list(_pieces(tokenizer, example.input_ids[:_SHOWN], example.loss_mask))
    for number, (piece, is_learned) in enumerate(pieces):
        opens, closes = ("", "") if colour else ("[[", "]]")
        text.append(closes if before and not is_learned else "", style="dim")
        text.append(_BORDER if number else "", style="dim")
        text.append(opens if is_learned and not before else "", style="dim")
        text.append(piece.replace("\n", "↵\n"), style=_LEARNED if is_learned else "")
        before = is_learned
    text.append("]]" if before and not colour else "", style="dim")
    left = len(example.input_ids) - _SHOWN
    text.append(f" … {left:,} more tokens" if left > 0 else "", style="dim")
    return text


def _pieces(tokenizer: Any, ids: Sequence[int], mask: Sequence[int]) -> Iterator[tuple[str, bool]]:
    """(text of a token, whether it is learned); tokens that only together make a character are one
    piece."""
    done = 0
    for end in range(1, len(ids) + 1):
        first = max(0, done - _CONTEXT)
        before, now = (
            tokenizer.decode(ids[first:stop], clean_up_tokenization_spaces=False)
            for stop in (done, end)
        )
        if end == len(ids) or not now.endswith("�"):
            yield now[len(before) :], any(mask[done:end])
            done = end


def summary(data: TokenDataset, options: DataOptions) -> Iterator[str]:
    """Records by format, quantiles of lengths, fill of packed rows."""
    formats = ", ".join(
        f"{number:,} {kind}" for kind, number in sorted(data.counts.formats.items())
    )
    yield f"{data.counts}"
    yield f"formats   {formats}"
    values = np.percentile(data.lengths, list(_QUANTILES.values()))
    quantiles = ", ".join(
        f"{name} {value:,.0f}" for name, value in zip(_QUANTILES, values, strict=True)
    )
    yield f"tokens    {quantiles}, mean {data.lengths.mean():,.1f}"
    packed = best_fit(np.arange(len(data)), data.lengths, options.max_length)
    full = fill(packed, data.lengths, options.max_length)
    would = "" if options.packing else "off; it would make "
    yield f"packing   {would}{len(packed):,} rows of {options.max_length} tokens, {full:.1%} filled"


def histogram(lengths: np.ndarray) -> Iterator[str]:
    """Bars of how many examples have how many tokens."""
    longest = int(lengths.max())
    width = -(-longest // _BINS)
    counts = np.bincount((lengths - 1) // width)
    for number, count in enumerate(counts):
        low, high = number * width + 1, min(longest, (number + 1) * width)
        yield f"{low:>9,} – {high:<9,} {count:>11,} {'█' * round(_BAR * count / counts.max())}"
