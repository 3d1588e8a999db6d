"""Tokenizers of every class, small and trained here, with the behaviour of the published ones."""

import functools
from collections.abc import Callable
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import trainers as t
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast
from transformers.models.ctrl.tokenization_ctrl import CTRLTokenizer

from tests.conftest import shared

TEXTS = [
    "Question: 2+2?\nAnswer: four", "Hello world again", "the quick brown fox jumps over it",
    "  two  spaces\n\nand lines\t", "naïve café, Ångström ﬁne", "Hello, world! Is it four? It is.",
]  # fmt: skip
SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>", "<|end|>"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
BOS = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
BOS_EOS = processors.TemplateProcessing(
    single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
)
EOS = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])


def fast(backend: Tokenizer, **tokens: str) -> PreTrainedTokenizerFast:
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", **tokens}
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    extra = [name for name in ("<|user|>", "<|end|>") if name in backend.get_vocab()]
    made.add_special_tokens({"additional_special_tokens": extra} if extra else {})
    return made


def byte_level(prefix_space: bool, trim: bool, post: Any = None) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = t.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, special_tokens=SPECIAL)
    backend.train_from_iterator(TEXTS * 9, trainer)
    spans = processors.ByteLevel(trim_offsets=trim)
    backend.post_processor = processors.Sequence([spans, *([post] if post else [])])
    return fast(backend)


def sentencepiece(normalizer: Any, pre_tokenizer: Any) -> PreTrainedTokenizerFast:
    """BPE with byte fallback: Llama 2, Mistral, Gemma."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if normalizer:
        backend.normalizer = normalizer
    if pre_tokenizer:
        backend.pre_tokenizer = pre_tokenizer
    trainer = t.BpeTrainer(vocab_size=325, special_tokens=SPECIAL + BYTES, limit_alphabet=40)
    backend.train_from_iterator(TEXTS * 9, trainer)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.post_processor = BOS
    return fast(backend)


def unigram() -> PreTrainedTokenizerFast:
    """T5's: NFKC, spaces joined, a dummy prefix, and the end token that it adds itself."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = t.UnigramTrainer(vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>")
    backend.train_from_iterator(TEXTS * 9, trainer)
    backend.post_processor = EOS
    return fast(backend, bos_token=None)


def word_piece() -> PreTrainedTokenizerFast:
    """BERT's: lowercase, no accents, spaces in no token."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    names = ["[UNK]", "[CLS]", "[SEP]", "[PAD]"]
    backend.train_from_iterator(TEXTS * 9, t.WordPieceTrainer(vocab_size=200, special_tokens=names))
    backend.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        pad_token="[PAD]",
    )  # fmt: skip


def slow_bpe(folder: Any) -> CTRLTokenizer:
    """A Python class without spans: words, whose ends are marked by the pieces inside."""
    pieces = [
        "hello",
        "hel@@",
        "lo",
        "wor@@",
        "ld",
        "world",
        "a@@",
        "g@@",
        "ain",
        "l",
        "d",
        "o</w>",
    ]
    characters = [
        c + mark for c in "abcdefghijklmnopqrstuvwxyz.,!?:0123456789" for mark in ("", "@@")
    ]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(["<unk>", *pieces, *characters]))}
    import json

    (folder / "vocab.json").write_text(json.dumps(vocab))
    merges = ["h e", "he l", "l o</w>", "hel lo</w>", "w o", "wo r", "l d</w>", "wor ld</w>"]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return CTRLTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))


def real(name: str) -> Any:
    return AutoTokenizer.from_pretrained(shared(f"models/{name}"))


LEGACY = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
LOWER = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])

KINDS: dict[str, Callable[[], Any]] = {
    "byte-level": functools.partial(byte_level, False, False, BOS),
    "byte-level, prefix space": functools.partial(byte_level, True, True),
    "byte-level, trimmed spans": functools.partial(byte_level, False, True, BOS_EOS),
    "Prepend": functools.partial(sentencepiece, LEGACY, None),
    "Metaspace first": lambda: sentencepiece(
        None, pre_tokenizers.Metaspace(prepend_scheme="first")
    ),
    "Metaspace always": lambda: sentencepiece(
        None, pre_tokenizers.Metaspace(prepend_scheme="always")
    ),
    "Metaspace never": lambda: sentencepiece(
        None, pre_tokenizers.Metaspace(prepend_scheme="never")
    ),
    "NFKC, lowercase": lambda: sentencepiece(
        LOWER, pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    ),
    "unigram": unigram,
    "WordPiece": word_piece,
    "ByT5": ByT5Tokenizer,
    "books-llama": functools.partial(real, "books-llama-28m"),
    "stories260K": functools.partial(real, "stories260K"),
}
