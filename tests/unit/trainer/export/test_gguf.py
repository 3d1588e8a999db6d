"""GGUF files: llama.cpp itself, where it is installed, gives the tokens, logits and continuations
that transformers gives; what it would compute otherwise is refused."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tests.conftest import shared
from tests.helpers import SMALL, quick_config, save_random_model
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.export.export import export_run
from trainer.export.gguf_file import write_gguf_adapter, write_gguf_model
from trainer.export.gguf_folder import refuse
from trainer.export.gguf_vocab import _SPLIT, _pre_tokenizer
from trainer.run.run import run

TEXTS = [
    "Once upon a time, 1234 little girls who'd   play\n\n outside!", "Tom has 5 — “flowers”. 🙂 ",
    " Ünïcode\tand\r\n\nrows: 17,000.5 don't WE'LL", "<s>Anna</s> and",
]  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, untied, biased": ("llama", {"tie_word_embeddings": False, "attention_bias": True}),
    "llama 3's RoPE": ("llama", {"rope_parameters": LLAMA3}),
    "linear RoPE": (
        "llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}
    ),
    "yarn": ("llama", {"rope_parameters": YARN}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
}  # fmt: skip


@pytest.fixture(scope="module")
def llama_cpp() -> Any:
    return pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed here")


def opened(llama_cpp: Any, file: Path, **options: Any) -> Any:
    """llama.cpp on one thread, its cache in float32, every position's logits kept."""
    return llama_cpp.Llama(
        str(file), n_ctx=256, logits_all=True, verbose=False, n_threads=1, n_gpu_layers=0,
        type_k=0, type_v=0, flash_attn=False, **options,
    )  # fmt: skip


def logits(model: Any, ids: list[int]) -> np.ndarray:
    model.reset()
    model.eval(ids)
    return np.array(model.scores[: len(ids)])


def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    model.reset()
    drawn: Iterator[int] = model.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0)
    return [token for _, token in zip(range(count), drawn)]


@torch.no_grad()
def check_equal(model: Any, expected: torch.nn.Module, ids: list[int], count: int = 20) -> None:
    """Logits to a thousandth of their spread, and the same greedy tokens."""
    found, wanted = logits(model, ids), expected(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(found - wanted).max() < 2e-3 * wanted.std()
    followed = expected.generate(  # type: ignore[operator]
        torch.tensor([ids]), max_new_tokens=count, do_sample=False, eos_token_id=-1
    )
    assert greedy(model, ids, count) == followed[0, len(ids) :].tolist()


def trained(tmp: Path, base: Path, *more: str) -> Path:
    config = quick_config(
        tmp, f"model.id={base}", "data.eval=null", "run.steps=3", "optim.learning_rate=0.01",
        "method.kind=adalora", "data.train_records=24", *more,
    )  # fmt: skip
    run(config, World())
    return config.run_folder


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of AdaLoRA (ranks differ by matrix) on a pretrained Llama, and its exports."""
    tmp = tmp_path_factory.mktemp("books")
    base = shared("models/books-llama-28m")
    folder = trained(tmp, base, "data.max_length=128")
    for what in ("gguf", "merged"):
        export_run(folder, tmp / what, World(), what=what, dtype="float32")
    export_run(folder, tmp / "gguf-adapter", World(), what="gguf-adapter")
    export_run(folder, tmp / "q8", World(), what="gguf", dtype="q8_0")
    return tmp


def test_a_merged_model_in_llama_cpp(books: Path, llama_cpp: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(books / "merged")
    expected = AutoModelForCausalLM.from_pretrained(books / "merged")
    model = opened(llama_cpp, books / "gguf/model.gguf")
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert model.tokenize(text.encode(), add_bos=True, special=True) == ids
    check_equal(model, expected, tokenizer(TEXTS[0])["input_ids"])


def test_an_adapter_in_llama_cpp(books: Path, llama_cpp: Any) -> None:
    """Beside the base model, converted likewise."""
    base = shared("models/books-llama-28m")
    tokenizer = AutoTokenizer.from_pretrained(base)
    write_gguf_model(base, books / "base.gguf", "float32", "base")
    expected = AutoModelForCausalLM.from_pretrained(books / "merged")
    ids = tokenizer(TEXTS[0])["input_ids"]
    adapter = str(books / "gguf-adapter/adapter.gguf")
    check_equal(opened(llama_cpp, books / "base.gguf", lora_path=adapter), expected, ids)
    alone = logits(opened(llama_cpp, books / "base.gguf"), ids)
    assert np.abs(alone - logits(opened(llama_cpp, books / "gguf/model.gguf"), ids)).max() > 0.1


def test_eight_bits_in_llama_cpp(books: Path, llama_cpp: Any) -> None:
    """llama.cpp rounds the activations as the weights are rounded: measured 1.5 % of the logits'
    spread behind all blocks."""
    ids = AutoTokenizer.from_pretrained(books / "merged")(TEXTS[0])["input_ids"]
    whole, eight = (
        logits(opened(llama_cpp, books / name / "model.gguf"), ids) for name in ("gguf", "q8")
    )
    error = np.sqrt(np.mean((whole - eight) ** 2)) / whole.std()
    assert 1e-4 < error < 0.03, error
    sizes = [(books / name / "model.gguf").stat().st_size for name in ("gguf", "q8")]
    assert sizes[1] < 0.3 * sizes[0]


def test_eight_bits_are_rounded_and_no_more(books: Path) -> None:
    """Blocks of 32 weights in steps of a 127th of the largest, a float16."""
    gguf = pytest.importorskip("gguf")
    whole, eight = (gguf.GGUFReader(books / name / "model.gguf") for name in ("gguf", "q8"))
    values = {tensor.name: tensor.data for tensor in whole.tensors}
    rounded = 0
    for tensor in eight.tensors:
        if tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0:
            expected = values[tensor.name].astype(np.float32).reshape(-1, 32)
            found = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(-1, 32)
            bound = np.abs(expected).max(1, keepdims=True) * (1 / 254 + 2**-11) + 1e-7
            assert (np.abs(found - expected) <= bound).all(), tensor.name
            rounded += 1
    assert rounded > 10


@pytest.mark.parametrize("name", MODELS)
def test_architectures_in_llama_cpp(name: str, tmp_path: Path, llama_cpp: Any) -> None:
    """Random weights, biases and norms too: a wrong order of rows would show."""
    kind, changes = MODELS[name]
    folder = save_random_model(tmp_path / "model", kind, AutoModelForCausalLM, **changes)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for key, value in tensors.items():
        if value.dim() == 1:
            shift = 1.0 if "norm" in key else 0.0
            tensors[key] = shift + 0.3 * torch.randn(value.shape, generator=generator)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_gguf_model(folder, tmp_path / "model.gguf", "float32", name)
    ids = torch.randint(3, 500, (120,), generator=generator).tolist()
    expected = AutoModelForCausalLM.from_pretrained(folder)
    check_equal(opened(llama_cpp, tmp_path / "model.gguf"), expected, ids)


def test_sentencepiece_in_llama_cpp(tmp_path: Path, llama_cpp: Any) -> None:
    base = shared("models/stories260K")
    config = {**json.loads((base / "config.json").read_text())}
    for file in base.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_gguf_model(tmp_path, tmp_path / "model.gguf", "float32", "stories")
    model, tokenizer = (
        opened(llama_cpp, tmp_path / "model.gguf"),
        AutoTokenizer.from_pretrained(base),
    )
    for text in TEXTS[:3]:
        assert model.tokenize(text.encode(), add_bos=True) == tokenizer(text)["input_ids"]
    ids = tokenizer(TEXTS[0])["input_ids"]
    check_equal(model, AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), ids)


def split_by(kind: str) -> Tokenizer:
    """Byte-level BPE, trained on the texts, that splits them as models of that kind do."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "llama-bpe"))
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    if kind in ("qwen2", "llama-bpe"):
        split = Regex(_SPLIT % ("" if kind == "qwen2" else "{1,3}"))
        steps = [pre_tokenizers.Split(split, "isolated")]
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    elif kind == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([*TEXTS, "1234 34 12 don't WE'LL who'd"] * 4, trainer)
    return tokenizer


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "qwen2", "llama-bpe"])
def test_tokenizers_in_llama_cpp(kind: str, tmp_path: Path, llama_cpp: Any) -> None:
    folder = save_random_model(tmp_path / "model", "llama", AutoModelForCausalLM)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=split_by(kind), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    wrapped.save_pretrained(folder)
    described = json.loads((folder / "tokenizer.json").read_text())
    assert _pre_tokenizer(described) == kind
    write_gguf_model(folder, tmp_path / "model.gguf", "float32", kind)
    model = opened(llama_cpp, tmp_path / "model.gguf")
    for text in [*TEXTS, "12345 1234 we'll"]:
        found = model.tokenize(text.encode(), add_bos=True, special=True)
        assert found == wrapped(text)["input_ids"], text


def test_the_file_holds_the_merged_tensors(books: Path) -> None:
    """Read by the library alone; q and k up to the order of their rows."""
    merged: dict[str, torch.Tensor] = {}
    for file in (books / "merged").glob("*.safetensors"):
        merged |= load_file(file)
    reader = gguf.GGUFReader(books / "gguf/model.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == len(merged)
    for ours, theirs in (
        ("model.embed_tokens", "token_embd"), ("model.layers.3.mlp.up_proj", "blk.3.ffn_up"),
        ("model.layers.2.self_attn.v_proj", "blk.2.attn_v"), ("model.norm", "output_norm"),
    ):  # fmt: skip
        assert np.array_equal(tensors[f"{theirs}.weight"].data, merged[f"{ours}.weight"].numpy())
    q, turned = (
        merged["model.layers.0.self_attn.q_proj.weight"],
        tensors["blk.0.attn_q.weight"].data,
    )
    assert np.array_equal(turned[0:4], q[[0, 32, 1, 33]].numpy())  # heads of 64 rows
    assert sorted(map(tuple, turned.tolist())) == sorted(map(tuple, q.tolist()))


def test_the_folder(books: Path) -> None:
    for name, file in (("gguf", "model.gguf"), ("gguf-adapter", "adapter.gguf")):
        assert {path.name for path in (books / name).iterdir()} == {file, "Modelfile", "README.md"}
        card = ModelCard.load(books / name / "README.md")
        assert card.data.library_name == "gguf" and "gguf" in card.data.tags
        assert "ollama create quickstart -f Modelfile" in card.text
    model, adapter = ((books / n / "Modelfile").read_text() for n in ("gguf", "gguf-adapter"))
    assert model.splitlines() == [
        "FROM ./model.gguf", 'TEMPLATE "{{ .Prompt }}"', 'PARAMETER stop "</s>"'
    ]  # fmt: skip
    assert adapter.splitlines()[1:] == [
        "FROM ./base.gguf", "ADAPTER ./adapter.gguf", 'PARAMETER stop "</s>"'
    ]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), [
    ({"model_type": "gpt2"}, r"of type gpt2; accepted: llama, mistral, qwen2, qwen3"),
    ({"hidden_act": "gelu"}, r"hidden_act: gelu; accepted: silu"),
    ({"sliding_window": 64}, r"sliding_window: 64; accepted: None"),
    ({"rope_parameters": {"rope_type": "longrope"}}, r"rope_type: longrope; accepted: default"),
])  # fmt: skip
def test_refused_models(changes: dict, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SMALL, **changes}))
    with pytest.raises(UserError, match=message):
        write_gguf_model(tmp_path, tmp_path / "model.gguf", "float32", "a")


def test_refused_before_merging(tmp_path: Path) -> None:
    base = save_random_model(tmp_path / "base", "gpt_neox", AutoModelForCausalLM)
    folder = trained(tmp_path, base, "method.kind=lora", "method.targets=all-linear")
    with pytest.raises(UserError, match="--what: gguf given for a model of type gpt_neox"):
        export_run(folder, tmp_path / "out", World(), what="gguf")
    with pytest.raises(UserError, match="--dtype: q8_0 given for --what merged; accepted: with"):
        export_run(folder, tmp_path / "out", World(), what="merged", dtype="q8_0")
    assert not (tmp_path / "out").exists()


CASES = [
    ("hidden_act", False, [], [], "hidden_act: gelu; accepted: silu"),
    ("lower", False, [], [], "a tokenizer with the normalizer Lowercase; accepted: byte-level"),
    ("", False, ["task.kind=sequence_classification"], [], "task.kind=sequence_classification, a"),
    ("", True, [], ["adapter/u/A", "head/score/weight"], "run that trained score beside LoRA"),
    ("", True, [], ["trained/u.magnitude"], "run that trained u.magnitude beside LoRA on"),
]


@pytest.mark.parametrize(("base", "adapter", "given", "tensors", "message"), CASES)
def test_refused_before_any_work(
    base: str, adapter: bool, given: list[str], tensors: list[str], message: str, tmp_path: Path
) -> None:
    changes = {"hidden_act": "gelu"} if base == "hidden_act" else {}
    folder = save_random_model(tmp_path / "base", "llama", AutoModelForCausalLM, **changes)
    if base == "lower":
        split_by("gpt-2").save(str(folder / "tokenizer.json"))
        described = json.loads((folder / "tokenizer.json").read_text())
        described["normalizer"] = {"type": "Lowercase"}
        (folder / "tokenizer.json").write_text(json.dumps(described))
    config = quick_config(tmp_path, f"model.id={folder}", *given)
    saved: Any = SimpleNamespace(state={}, tensors=dict.fromkeys(tensors))
    with pytest.raises(UserError, match=message):
        refuse(saved, config, adapter=adapter)


@pytest.mark.parametrize(
    "key", ["model.layers.0.self_attn.q_proj.lora_magnitude_vector", "score.weight"]
)
def test_refused_adapters(key: str, tmp_path: Path) -> None:
    save_file({f"base_model.model.{key}": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    config = {"model_type": "llama", **SMALL}
    with pytest.raises(UserError, match=r"is no LoRA of a linear layer that llama\.cpp has"):
        write_gguf_adapter(tmp_path, tmp_path / "adapter.gguf", config, "a")


@pytest.mark.parametrize("change", [
    {"pre_tokenizer": None}, {"normalizer": {"type": "Lowercase"}},
    {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
])  # fmt: skip
def test_refused_tokenizers(change: dict) -> None:
    usual = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    described = {"pre_tokenizer": usual, "normalizer": None, "model": {"ignore_merges": False}}
    assert _pre_tokenizer(described) == "gpt-2"
    with pytest.raises(UserError, match=r"--what: gguf given for a tokenizer .*; accepted: byte"):
        _pre_tokenizer({**described, **change})
