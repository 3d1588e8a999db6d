"""The beginning of a long text that has the same first tokens: no more than needed is tokenised.

Up to a space after a letter or digit the tokens are those of the whole text, if nothing that the
tokenizer does reaches across it:

- its normaliser sees single characters and what combines with them, or changes spaces to spaces;
- no token, of the vocabulary or added, has a space after another character. Wherever the
  pre-tokenizer splits, merges (BPE) and paths (Unigram) then never cross it. WordPiece looks for
  whole words, so that it has to be split at spaces.

Where this cannot be shown, and where a text has no spaces, it is cut only if it is huge: its first
2¹⁸ characters stand for it. Their first tokens could differ from those of the whole text in theory
only: something would have to reach across all of the others.
"""

import functools
import json
import re
from typing import Any

_CHARACTERS = 8  # looked at first, for every token that is needed: twice the usual length
_MOST = 2**18  # characters of a text that cannot be cut where it changes nothing
_SPACES = " ▁Ġ"
"""The space, as text and in vocabularies."""
_ACROSS = re.compile(rf"[^{_SPACES}\s][{_SPACES}]")
_ONLY_SPACES = re.compile(r"(▁|\s|\\[sntr]|[+*\[\]]|\{\d*,?\d*\})+")
"""A pattern that matches spaces alone."""
_LOCAL = {
    "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Lowercase", "StripAccents", "BertNormalizer", "Strip",
    "Prepend", "ByteLevel", "Precompiled",
}  # fmt: skip
_WORDS = {"BertPreTokenizer", "Whitespace", "WhitespaceSplit"}


def beginning(tokenizer: Any, text: str, tokens: int) -> str:
    """A beginning of `text` of which the first `tokens` + 1 tokens, without special ones around
    them, are those of `text`; all of it if it has fewer or cannot be cut and is not huge."""
    stop = _CHARACTERS * tokens
    if stop >= len(text):
        return text
    while can_cut(tokenizer) and stop < min(len(text), _most(tokens)):
        last = _last_space(text, stop)
        if last and _tokens_before(tokenizer, text[:stop], last) > tokens:
            return text[:stop]
        stop *= 2
    return bounded(tokenizer, text, tokens)


def bounded(tokenizer: Any, text: str, tokens: int) -> str:
    """`text`; of a huge one as much as has more than twice `tokens` tokens, if that is less."""
    part = text[: _most(tokens)]
    if len(part) == len(text) or len(_ids(tokenizer, part)["input_ids"]) <= 2 * tokens:
        return text
    return part


def truncated_pair(tokenizer: Any, first: str, second: str, max_length: int) -> Any:
    """The `tokenizers.Encoding` of a pair with special tokens, the longer text cut first. As the
    library's own truncation, which however also makes every combination of what is left of both:
    memory in the product of their lengths. So what is far longer than needed is shortened first."""
    pair = [_ids(tokenizer, text).encodings[0] for text in (first, second)]
    room = max_length - tokenizer.num_special_tokens_to_add(pair=True)
    shorter, longer = sorted(range(2), key=lambda index: len(pair[index]))
    for index, text in enumerate((first, second)):
        if len(pair[index]) > 4 * max_length:
            end = pair[index].offsets[3 * max_length][1]
            pair[index] = _ids(tokenizer, text[:end]).encodings[0]
    pair[shorter].truncate(min(len(pair[shorter]), room // 2))
    pair[longer].truncate(room - len(pair[shorter]))
    return tokenizer.backend_tokenizer.post_process(*pair)


def _most(tokens: int) -> int:
    return max(_MOST, 64 * tokens)


def _tokens_before(tokenizer: Any, text: str, place: int) -> int:
    offsets = _ids(tokenizer, text, return_offsets_mapping=True)["offset_mapping"]
    return sum(end <= place for _, end in offsets)


def _ids(tokenizer: Any, text: str, **settings: bool) -> Any:
    return tokenizer(
        text, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False,
        verbose=False, **settings,
    )  # fmt: skip


def _last_space(text: str, stop: int) -> int:
    """The last space after a letter or digit in `text[:stop]`, but not at its end; 0: none."""
    place = stop - 1
    while (place := text.rfind(" ", 0, place)) > 0:
        if text[place - 1].isalnum():
            return place
    return 0


@functools.lru_cache(maxsize=4)  # of a large vocabulary it takes a tenth of a second
def can_cut(tokenizer: Any) -> bool:
    """Whether the tokens before a space after a letter or digit do not depend on what follows."""
    if not getattr(tokenizer, "is_fast", False):
        return False
    backend = tokenizer.backend_tokenizer
    model, vocabulary = backend.model, tokenizer.get_vocab()
    splits = parts(backend.pre_tokenizer, "pretokenizers")
    if type(model).__name__ in ("BPE", "Unigram"):
        # A space that is no token could be joined with unknown characters around it.
        is_split = not vocabulary.keys().isdisjoint(_SPACES)
        is_random = any(getattr(model, name, None) for name in ("dropout", "alpha", "nbest_size"))
    else:
        is_split, is_random = any(part["type"] in _WORDS for part in splits), False
    return (
        is_split
        and not is_random
        and all(part.get("replacement", "▁") == "▁" for part in splits)
        and all(map(_is_local, parts(backend.normalizer, "normalizers")))
        and not any(_ACROSS.search(token) for token in vocabulary)
    )


def _is_local(normalizer: dict[str, Any]) -> bool:
    if normalizer["type"] != "Replace":
        return normalizer["type"] in _LOCAL
    kind, pattern = next(iter(normalizer["pattern"].items()))
    content = normalizer["content"]
    if kind == "String" and not set(pattern) & {*_SPACES}:
        return not any(character.isalnum() for character in pattern)
    return bool(_ONLY_SPACES.fullmatch(pattern) and content and not content.strip(_SPACES))


def parts(component: Any, name: str) -> list[dict[str, Any]]:
    """A normaliser or pre-tokenizer as plain data; a sequence's parts, which are under `name`."""
    if component is None:
        return []
    queue, found = [json.loads(component.__getstate__())], []
    while queue:
        part = queue.pop(0)
        if part["type"] == "Sequence":
            queue = [*part[name], *queue]
        else:
            found.append(part)
    return found
