"""What becomes of examples that are longer than `data.max_length`, where they are not cut at the
end: a text is split into pieces, a prompt loses its beginning."""

from collections.abc import Iterator
from dataclasses import replace

from trainer.tasks.base import Example


def pieces(example: Example, length: int, overlap: int) -> Iterator[Example]:
    """A text as examples of at most `length` tokens, one after the other. Each begins with the last
    `overlap` tokens of the one before, which are not learned again; so every token but the first is
    learned once. Without overlap the first token of a piece is not learned: nothing precedes it."""
    start = 0
    while start == 0 or start + overlap < len(example.input_ids):
        ids = example.input_ids[start : start + length]
        mask = list(example.loss_mask[start : start + length])
        if start:
            context = max(overlap, 1)
            mask[:context] = [0] * len(mask[:context])
        if any(mask):
            yield replace(example, input_ids=ids, loss_mask=mask, weight=sum(mask))
        start += length - overlap


def without_beginning(example: Example, length: int, begin_token: int | None) -> Example:
    """An example of at most `length` tokens. First the beginning of its prompt is left out: what
    precedes the first learned token, but for the begin token, or one token; then its end."""
    ids, mask = list(example.input_ids), list(example.loss_mask)
    kept = int(ids[0] == begin_token)
    stop = kept + max(0, min(len(ids) - length, mask.index(1) - max(kept, 1)))
    ids, mask = (values[:kept] + values[stop:] for values in (ids, mask))
    mask = mask[:length]
    truncated = len(example.input_ids) > length
    return replace(
        example, input_ids=ids[:length], loss_mask=mask, weight=sum(mask), truncated=truncated
    )
