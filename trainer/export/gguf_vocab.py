"""A tokenizer as llama.cpp knows it: byte-level BPE, or SentencePiece's BPE with bytes."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import UserError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Of Qwen2 and Llama 3, which take one or three digits for a word."""
_PRE_TOKENIZERS = {
    ("bytes",): "gpt-2",
    ("digits", "bytes"): "smollm",
    (_SPLIT % "", "raw bytes"): "qwen2",
    (_SPLIT % "{1,3}", "raw bytes"): "llama-bpe",
}
"""llama.cpp's names of how texts are split before they are merged (`tokenizer.ggml.pre`)."""
_IGNORES_MERGES = "llama-bpe"
"""The one whose words that are tokens are not merged, in llama.cpp."""


def read_tokenizer(folder: Path) -> dict[str, Any]:
    """What tokenizer.json says. Raises UserError for a tokenizer that llama.cpp's would not
    equal."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise _refused("a tokenizer without tokenizer.json")
    described: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    model = described["model"]
    if model["type"] != "BPE":
        raise _refused(f"a tokenizer of type {model['type']}")
    if not model.get("byte_fallback"):
        _pre_tokenizer(described)
    return described


def add_vocabulary(writer: "GGUFWriter", folder: Path, size: int) -> None:
    """Tokens, merges, special tokens and chat template of the tokenizer in `folder`, padded to
    `size`. Raises UserError for a tokenizer that llama.cpp's would not equal."""
    import gguf
    from transformers import AutoTokenizer

    described = read_tokenizer(folder)
    model = described["model"]
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if model.get("byte_fallback"):
        _add_sentencepiece(writer, folder, described, size)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(described))
        _add_byte_level(writer, tokenizer, size)
    special = gguf.SpecialVocab(folder, load_merges=not model.get("byte_fallback"), n_vocab=size)
    # The library guesses from the file what the tokenizer itself can be asked.
    ids = tokenizer("a")["input_ids"]
    special.add_special_token = {
        "bos": ids[0] == tokenizer.bos_token_id, "eos": ids[-1] == tokenizer.eos_token_id
    }  # fmt: skip
    special.add_to_gguf(writer, quiet=True)


def _add_byte_level(writer: "GGUFWriter", tokenizer: "PreTrainedTokenizerBase", size: int) -> None:
    from gguf import TokenType

    tokens = {index: token for token, index in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    texts, kinds = [], []
    for index in range(size):
        texts.append(tokens.get(index, f"[PAD{index}]"))
        kind = TokenType.NORMAL if index in tokens else TokenType.UNUSED
        if index in added:
            kind = TokenType.CONTROL if added[index].special else TokenType.USER_DEFINED
        kinds.append(kind)
    writer.add_token_list(texts)
    writer.add_token_types(kinds)


def _add_sentencepiece(
    writer: "GGUFWriter", folder: Path, described: dict[str, Any], size: int
) -> None:
    """The library's reader gives every token the same score; llama.cpp merges by scores, which are
    the order of the merges."""
    from gguf import LlamaHfVocab, TokenType

    merges = described["model"]["merges"]
    joined = ["".join(pair) if isinstance(pair, list) else pair.replace(" ", "") for pair in merges]
    order = {token: -float(rank) for rank, token in reversed([*enumerate(joined)])}
    texts, scores, kinds = [], [], []
    for text, score, kind in LlamaHfVocab(folder).all_tokens():
        texts.append(text)
        scores.append(order.get(text.decode("utf-8", "replace"), score))
        kinds.append(kind)
    for index in range(len(texts), size):
        texts.append(f"[PAD{index}]".encode())
        scores.append(-1000.0)
        kinds.append(TokenType.UNUSED)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(texts)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_add_space_prefix(_prefixes_space(described))


def _prefixes_space(described: dict[str, Any]) -> bool:
    normalizer, split = described.get("normalizer") or {}, described.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    prepends = any(step.get("type") == "Prepend" for step in steps)
    return prepends or split.get("prepend_scheme") in ("first", "always")


def _pre_tokenizer(described: dict[str, Any]) -> str:
    """llama.cpp's name of the pre-tokenizer. Raises UserError for one that it has not."""
    split = described.get("pre_tokenizer") or {}
    steps = tuple(map(_step, split.get("pretokenizers", [split])))
    name = _PRE_TOKENIZERS.get(steps)
    if name is None or bool(described["model"].get("ignore_merges")) != (name == _IGNORES_MERGES):
        raise _refused("a tokenizer that splits texts in a way of its own")
    if (described.get("normalizer") or {}).get("type") not in (None, "NFC"):
        raise _refused(f"a tokenizer with the normalizer {described['normalizer']['type']}")
    return name


def _step(step: dict[str, Any]) -> str:
    """A step of a pre-tokenizer, as in `_PRE_TOKENIZERS`."""
    kind = step.get("type")
    if kind == "Digits" and step.get("individual_digits"):
        return "digits"
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return "bytes" if step.get("use_regex", True) else "raw bytes"
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return str(step["pattern"].get("Regex"))
    return f"other: {step}"


def _refused(what: str) -> UserError:
    return UserError(
        f"--what: gguf given for {what}; accepted: byte-level BPE as of GPT-2, SmolLM, Qwen2 or "
        "Llama 3, and SentencePiece's BPE as of Llama 2"
    )
