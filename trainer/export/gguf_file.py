"""Models and adapters as GGUF, which llama.cpp and Ollama load, by llama.cpp's own library.

The names of tensors are the library's; what llama.cpp expects beyond names (its order of the rows
of q and k, its RoPE) is as in its `conversion/llama.py` and `conversion/qwen.py`.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from trainer.errors import UserError
from trainer.export.gguf_vocab import add_vocabulary

if TYPE_CHECKING:
    from gguf import GGUFWriter

MODEL_FILE, ADAPTER_FILE = "model.gguf", "adapter.gguf"


@dataclass(frozen=True)
class _Architecture:
    name: str
    """llama.cpp's."""
    interleaved: bool
    """RoPE turns neighbouring pairs, not halves: the rows of q and k are in another order."""


_ARCHITECTURES = {
    "llama": _Architecture("LLAMA", interleaved=True),
    "mistral": _Architecture("LLAMA", interleaved=True),
    "qwen2": _Architecture("QWEN2", interleaved=False),
    "qwen3": _Architecture("QWEN3", interleaved=False),
}
"""By transformers' `model_type`."""
_ROPE = ("default", "linear", "llama3", "yarn")
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
"""The library's names of dtypes."""


def refuse_gguf(config: dict[str, Any]) -> None:
    """Raises UserError where there is no library, no conversion of a model with this config.json,
    or llama.cpp would compute something else than it."""
    model_type = config["model_type"]
    if find_spec("gguf") is None:
        raise UserError(
            "--what: gguf given, but the library gguf is not installed; accepted: pip install gguf"
        )
    if model_type not in _ARCHITECTURES:
        raise UserError(
            f"--what: gguf given for a model of type {model_type}; accepted: "
            f"{', '.join(_ARCHITECTURES)}"
        )
    _refuse_unlike(config)


def write_gguf_model(folder: Path, file: Path, dtype: str, name: str) -> None:
    """Convert a model's folder (config, safetensors, tokenizer), a tensor at a time. `dtype`: of
    its matrices, one of `TYPES`; vectors are float32. Raises UserError where llama.cpp would
    compute something else."""
    from gguf import GGMLQuantizationType, LlamaFileType

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    refuse_gguf(config)
    writer = _writer(file, config, name)
    _add_parameters(writer, config)
    kind = GGMLQuantizationType[TYPES[dtype]]
    kinds = {"F32": "ALL_F32", "Q8_0": "MOSTLY_Q8_0", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16"}
    writer.add_file_type(LlamaFileType[kinds[kind.name]])
    add_vocabulary(writer, folder, config["vocab_size"])
    rename, frequencies = _renamer(config), _rope_frequencies(config)
    tensors = list(_files_tensors(folder))
    if frequencies is not None:
        tensors.append(("rope_freqs.weight", lambda: frequencies))
    _write(writer, [(rename(n), _ordered(config, n, read), kind) for n, read in tensors])


def write_gguf_adapter(folder: Path, file: Path, config: dict[str, Any], name: str) -> None:
    """Convert an adapter's folder, for a model with this config.json. Raises UserError for adapters
    that hold more than LoRA on linear layers."""
    from gguf import GGMLQuantizationType, GGUFType

    refuse_gguf(config)
    described = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    writer = _writer(file, config, name)
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string("adapter.type", "lora")
    # llama.cpp scales by alpha over each matrix's own rank, or for 0 not at all: α/r is 1 here.
    writer.add_float32("adapter.lora.alpha", 0.0)
    rename = _renamer(config)
    tensors = []
    for key, read in _files_tensors(folder):
        path, _, role = key.removeprefix("base_model.model.").rpartition(".lora_")
        tied = config.get("tie_word_embeddings") and path == "lm_head"
        if role not in ("A.weight", "B.weight") or tied or described.get("target_parameters"):
            raise UserError(
                f"--what: gguf-adapter given, but {key} is no LoRA of a linear layer that "
                "llama.cpp has; accepted: gguf, which merges it"
            )
        weight = f"{path}.weight"
        value = _ordered(config, weight, read) if role == "B.weight" else read
        tensors.append(
            (f"{rename(weight)}.lora_{role[0].lower()}", value, GGMLQuantizationType.F32)
        )
    _write(writer, tensors)


def _refuse_unlike(config: dict[str, Any]) -> None:
    """Raises UserError for what llama.cpp's code for the architecture does not compute."""
    rope = config.get("rope_parameters") or {}
    window = config.get("sliding_window")
    for key, given, accepted in (
        ("hidden_act", config.get("hidden_act", "silu"), ("silu",)),
        ("rope_type", rope.get("rope_type", "default"), _ROPE),
        ("sliding_window", window if config.get("use_sliding_window", True) else None, (None,)),
    ):
        if given not in accepted:
            raise UserError(
                f"--what: gguf given for a model with {key}: {given}; accepted: "
                f"{', '.join(map(str, accepted))}"
            )


def _writer(file: Path, config: dict[str, Any], name: str) -> "GGUFWriter":
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter

    architecture = MODEL_ARCH[_ARCHITECTURES[config["model_type"]].name]
    writer = GGUFWriter(file, MODEL_ARCH_NAMES[architecture])
    writer.add_name(name)
    return writer


def _add_parameters(writer: "GGUFWriter", config: dict[str, Any]) -> None:
    from gguf import GGUFType, RopeScalingType

    writer.add_type(GGUFType.MODEL)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(_head_size(config))
    writer.add_value_length(_head_size(config))
    writer.add_rope_dimension_count(_head_size(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    rope = config.get("rope_parameters") or {}
    writer.add_rope_freq_base(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    if rope.get("rope_type") in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType[rope["rope_type"].upper()])
        writer.add_rope_scaling_factor(rope["factor"])
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _head_size(config: dict[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _rope_frequencies(config: dict[str, Any]) -> Tensor | None:
    """Divisors of Llama 3's RoPE frequencies (head size / 2), None for another RoPE: 1 for short
    wavelengths, `factor` for long ones, between them smooth."""
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type") != "llama3":
        return None
    size, context = _head_size(config), rope["original_max_position_embeddings"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    exponents = torch.arange(0, size, 2, dtype=torch.float64) / size
    turns = context / (2 * math.pi * rope["rope_theta"] ** exponents)  # in the original context
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()


def _renamer(config: dict[str, Any]) -> Callable[[str], str]:
    from gguf import MODEL_ARCH, get_tensor_name_map

    architecture = MODEL_ARCH[_ARCHITECTURES[config["model_type"]].name]
    names = get_tensor_name_map(architecture, config["num_hidden_layers"])

    def rename(name: str) -> str:
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None and name != "rope_freqs.weight":
            raise UserError(
                f"--what: gguf given, but llama.cpp's {_ARCHITECTURES[config['model_type']].name} "
                f"has no tensor for {name}; accepted: a model of the layers that it has"
            )
        return found or name

    return rename


def _ordered(config: dict[str, Any], name: str, read: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Rows of q and k from halves to pairs: in a head, rows i and i + d/2 become neighbours."""
    found = re.search(r"\.([qk])_proj\.(weight|bias)$", name)
    if found is None or not _ARCHITECTURES[config["model_type"]].interleaved:
        return read
    heads = config["num_attention_heads" if found[1] == "q" else "num_key_value_heads"]

    def turned() -> Tensor:
        value = read()
        halves = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
        return halves.transpose(1, 2).reshape(value.shape)

    return turned


def _files_tensors(folder: Path) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """(name, function that reads it) of every tensor of the folder's safetensors files."""

    def reader(file: Path, name: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            with safe_open(file, "pt") as opened:
                return opened.get_tensor(name)

        return read

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no dict)
                yield name, reader(file, name)


def _write(writer: "GGUFWriter", tensors: list[tuple[str, Callable[[], Tensor], Any]]) -> None:
    """Write all, one in memory at a time. A matrix has its kind, unless its rows have no whole
    number of blocks: then, as vectors, float32."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

    described = []
    for name, read, wanted in tensors:
        shape = read().shape
        block, size = GGML_QUANT_SIZES[wanted]
        whole = len(shape) > 1 and shape[-1] % block == 0
        kind = wanted if whole else GGMLQuantizationType.F32
        block, size = GGML_QUANT_SIZES[kind]
        nbytes = math.prod(shape) // block * size
        writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, raw_dtype=kind)
        described.append((read, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for read, kind in described:
        writer.write_tensor_data(quants.quantize(read().float().contiguous().numpy(), kind))
    writer.close()
