"""Token ids of texts of which parts are learned, and the special tokens around them.

A text is tokenised once and whole. Parts that are tokenised alone give other tokens: SentencePiece
puts its dummy prefix before each of them, and merges across their borders are lost. A token is
learned if its span overlaps a learned part, also where it straddles the border.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from trainer.errors import UserError
from trainer.tasks.base import Switch
from trainer.tasks.long_texts import beginning

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Segments = Sequence[tuple[str, bool]]

_PROBES = ("a", "A", "0", ".", "あ")
_CHARACTERS = 2**20  # tokenised in one call: what it returns takes a hundred times as many bytes


def tokenise(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[Segments], first: int | None = None
) -> Iterator[tuple[list[int], list[int]]]:
    """(token ids, 1 for each learned token) of texts given as (part, whether it is learned) pairs.
    The ids are those of the whole text without special tokens around it; of a text that has more
    than `first`, others may follow the first of them, at least one."""
    group: list[tuple[Segments, str]] = []
    size = 0
    for segments in texts:
        text = "".join(part for part, _ in segments)
        if first is not None:
            text = beginning(tokenizer, text, first)
        if group and size + len(text) > _CHARACTERS:
            yield from _tokenise(tokenizer, group)
            group, size = [], 0
        group.append((segments, text))
        size += len(text)
    if group:  # the tokenizer refuses an empty list
        yield from _tokenise(tokenizer, group)


def _tokenise(
    tokenizer: "PreTrainedTokenizerBase", group: Sequence[tuple[Segments, str]]
) -> Iterator[tuple[list[int], list[int]]]:
    texts, whole = [segments for segments, _ in group], [text for _, text in group]
    settings: dict[str, Any] = {
        "add_special_tokens": False, "return_attention_mask": False,
        "return_token_type_ids": False, "verbose": False,
    }  # fmt: skip
    if getattr(tokenizer, "is_fast", False):
        with _untrimmed(tokenizer):
            found = tokenizer(whole, return_offsets_mapping=True, **settings)
        for segments, ids, offsets in zip(
            texts, found["input_ids"], found["offset_mapping"], strict=True
        ):
            yield ids, _overlapping(segments, offsets)
        return
    for segments, ids in zip(texts, tokenizer(whole, **settings)["input_ids"], strict=True):
        yield (
            ids,
            _by_prefixes(segments, ids, lambda text: tokenizer(text, **settings)["input_ids"]),
        )


@contextmanager
def _untrimmed(tokenizer: Any) -> Iterator[None]:
    """Without the post-processor, which adds no tokens here, but may take the spaces of byte-level
    tokens out of their spans."""
    backend = tokenizer.backend_tokenizer
    kept = backend.post_processor
    backend.post_processor = None
    try:
        yield
    finally:
        backend.post_processor = kept


def _overlapping(segments: Segments, offsets: Sequence[tuple[int, int]]) -> list[int]:
    """The learned tokens by their spans of characters. A token without width (some bytes of a
    character) counts as the character at its position."""
    learned = b"".join(bytes([is_learned]) * len(part) for part, is_learned in segments)
    learned += learned[-1:]  # a token without width at the end
    return [int(1 in learned[start : max(end, start + 1)]) for start, end in offsets]


def _by_prefixes(segments: Segments, ids: list[int], ids_of: Any) -> list[int]:
    """The learned tokens where the tokenizer gives no spans. A border lies after as many tokens as
    the whole text shares with the text before the border. Where that text ends in other tokens, the
    next token straddles the border, and is learned."""
    learned = [0] * len(ids)
    text, start = "", 0
    for index, (part, is_learned) in enumerate(segments):
        text += part
        if index == len(segments) - 1:
            end = after = len(ids)
        else:
            before = ids_of(text)
            end = _shared(before, ids)
            after = end if end == len(before) else min(end + 1, len(ids))
        if is_learned and part:
            learned[start:after] = [1] * (after - start)
        start = end
    return learned


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def special_tokens(
    tokenizer: "PreTrainedTokenizerBase", add_bos: Switch, add_eos: Switch
) -> tuple[list[int], list[int]]:
    """Ids before and after a text. `auto`: the begin token where the tokenizer itself adds it, the
    end token always, since a model has to learn to stop. Raises UserError."""
    before, after = affixes(tokenizer)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for key, switch, token in (("bos", add_bos, bos), ("eos", add_eos, eos)):
        if switch is True and token is None:
            raise UserError(
                f"data.add_{key}: true given, but the tokenizer has no {key}_token; accepted: "
                "auto, false"
            )
    if add_bos is True and bos not in before:
        before = [bos, *before]
    if add_bos is False:
        before = [token for token in before if token != bos]
    if add_eos is not False and eos is not None and eos not in after:
        after = [*after, eos]
    if add_eos is False:
        after = [token for token in after if token != eos]
    return before, after


def affixes(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer itself puts before and after every text."""
    for probe in _PROBES:
        bare = tokenizer(probe, add_special_tokens=False)["input_ids"]
        whole = tokenizer(probe)["input_ids"]
        for start in range(len(whole) - len(bare) + 1 if bare else 0):
            if whole[start : start + len(bare)] == bare:
                return whole[:start], whole[start + len(bare) :]
    raise UserError(
        "model.tokenizer: its special tokens are not those around a text "
        f"({_PROBES[0]!r} becomes {tokenizer(_PROBES[0])['input_ids']}); accepted: a tokenizer "
        "that puts special tokens before and after a text"
    )


def surrounded(
    ids: list[int], learned: list[int], before: list[int], after: list[int]
) -> tuple[list[int], list[int]]:
    """A text's ids and mask with special tokens around it, unless it has them itself. Those after
    it are learned."""
    if ids[: len(before)] != before:
        ids, learned = before + ids, [0] * len(before) + learned
    if after and ids[-len(after) :] != after:
        ids, learned = ids + after, learned + [1] * len(after)
    return ids, learned
