"""Every text architecture of the installed transformers, tiny: data and one builder.

`tiny_config(name, part)` takes the defaults of a model's configuration class and shrinks every
field that it knows by name (`SIZES`, `COUNTS`, …), also in the configurations inside it.
`EXCEPTIONS` has what common names do not settle, and `NOT_BUILDABLE` what cannot be tiny, with the
reason. Nothing here knows of the project: what is built is transformers' own model.
"""

import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

CAUSAL, CLASSIFICATION, PAIRS = "causal", "classification", "pairs"
PARTS = {
    CAUSAL: (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, AutoModelForCausalLM),
    CLASSIFICATION: (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        AutoModelForSequenceClassification,
    ),
    PAIRS: (MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, AutoModelForSeq2SeqLM),
}
TOKENIZER = Path(__file__).resolve().parents[1] / "configs/quickstart/model"
"""512 tokens: <pad> is 0, <s> is 1, </s> is 2."""
VOCABULARY = 576
PAD, BOS, EOS, OTHER = 0, 1, 2, 3

WIDTH, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, EXPERTS, WINDOW = 64, 4, 2, 16, 96, 4, 8

SIZES = [
    # Widths: a block of 4-bit weights is 64 long.
    (WIDTH, "hidden_size d_model n_embd dim emb_dim embedding_size embedding_dim word_embed_proj_dim "
    "attention_hidden_size hidden_size_global pooler_hidden_size pronunciation_embed_dim "
    "shape_embed_dim input_embedding_size output_embedding_size lru_width adapter_out_dim "
    "prediction_head_size backbone_hidden_size out_hidden_size cross_attention_hidden_size "
    "adapter_in_dim adapter_input_size "
    "d_latents entity_emb_size ple_embed_dim true_hidden_size intra_bottleneck_size"),
    (HIDDEN, "intermediate_size ffn_dim d_ff n_inner dff dim_ff hidden_dim d_inner encoder_ffn_dim "
    "decoder_ffn_dim ffn_hidden_size feed_forward_size moe_intermediate_size "
    "expert_ffn_hidden_size shared_expert_intermediate_size shared_intermediate_size "
    "shared_experts_intermediate_size moe_shared_expert_intermediate_size dense_intermediate_size "
    "intermediate_size_mlp mlp_dim"),
    (HEADS, "num_attention_heads n_head n_heads num_heads encoder_attention_heads "
    "decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads "
    "swa_num_attention_heads linear_num_heads linear_num_value_heads num_query_groups "
    "o_groups num_self_attention_heads num_cross_attention_heads"),
    (KV_HEADS, "linear_num_key_heads"),
    (HEAD_DIM, "head_dim d_kv d_head dim_head kv_channels attention_head_size global_head_dim "
    "swa_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim index_head_dim "
    "qk_rope_head_dim qk_nope_head_dim v_head_dim rotary_dim query_pre_attn_scalar"),
    (32, "q_lora_rank kv_lora_rank o_lora_rank qk_head_dim adapter_rank hc_lowrank "
    "hidden_size_per_layer_input router_hidden_size"),
    # Scores of keys are sums over these heads of ReLUs: with few, many are exactly 0, and which of
    # equal ones are chosen depends on the row's length.
    (16, "index_n_heads"),
    (EXPERTS, "num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num"),
    # State spaces: a hidden width of 2 · 64 in 8 heads of 16.
    (8, "mamba_n_heads mamba_num_heads n_mamba_heads laurel_rank gated_norm_rank conv1d_width"),
    (16, "mamba_d_head mamba_head_dim mamba_headdim mamba_d_state ssm_state_size state_size "
    "mamba_chunk_size chunk_size block_size block_multiple_of index_block_size"),
    (128, "mamba_d_ssm"),
    # Windows that a text of 8 to 24 tokens overruns.
    (WINDOW, "sliding_window sliding_window_size attention_window_size window_size "
    "attention_chunk_size keep_window_size index_topk"),
    (VOCABULARY, "vocab_size decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size "
    "entity_vocab_size pronunciation_vocab_size shape_vocab_size"),
]  # fmt: skip
BY_NAME = {name: value for value, names in SIZES for name in names.split()}
"""What a field becomes where its default is a larger number."""

LAYERS = (
    "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers "
    "num_encoder_layers num_decoder_layers"
).split()
PER_TOKEN = (
    "num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k topk_k top_k_experts"
).split()
KEYS_AND_VALUES = (
    "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads num_global_key_value_heads"
).split()
POSITIONS = "max_position_embeddings n_positions n_ctx max_seq_len context_length".split()
SPECIAL = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
SPREAD = {"initializer_range": 0.2, "init_std": 0.2}
"""Large, so that losses differ clearly."""

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_KV_SHARED = {
    "num_hidden_layers": 4, "num_kv_shared_layers": 2, "intermediate_size": [HIDDEN] * 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "activation_sparsity_pattern": [0.95, 0.0] * 2,
}  # fmt: skip
_ZAMBA = {
    "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2,
    "attention_hidden_size": 2 * WIDTH, "attention_head_dim": 2 * HEAD_DIM,
}  # fmt: skip
_SWA = {
    "swa_num_attention_heads": HEADS, "swa_num_key_value_heads": HEADS, "swa_q_lora_rank": 32,
    "swa_kv_lora_rank": 32, "swa_head_dim": 2 * HEAD_DIM, "swa_qk_nope_head_dim": HEAD_DIM,
    "swa_v_head_dim": HEAD_DIM,
}  # fmt: skip
_INDEXER = {
    "indexer_n_heads": HEADS, "indexer_kv_heads": 1, "indexer_head_dim": HEAD_DIM,
    "indexer_budget": WINDOW, "indexer_compress_ratio": 4, "output_gate_type": "sigmoid",
}  # fmt: skip
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 512},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE},
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note": {"text_config": _SWA},
    "dots3_note_text": _SWA,
    "encoder-decoder": {"decoder_start_token_id": BOS, "pad_token_id": PAD},
    "gemma4": {"text_config": {"global_head_dim": 2 * HEAD_DIM}},
    "gemma4_text": {"global_head_dim": 2 * HEAD_DIM},
    "gemma4_unified": {"text_config": {"global_head_dim": 2 * HEAD_DIM}},
    "gemma4_unified_text": {"global_head_dim": 2 * HEAD_DIM},
    "gemma3n_text": _KV_SHARED,
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_moe": {"num_experts": EXPERTS, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "layoutlmv3": {"coordinate_size": 12, "shape_size": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lilt": {"hidden_size": 192},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "mistral4": {"head_dim": 2 * HEAD_DIM},
    "nemotron": {"num_key_value_heads": KV_HEADS},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds": False},
    **{
        name: {"decoder_start_token_id": PAD}
        for name in ("longt5", "mt5", "switch_transformers", "t5", "umt5")
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": _ZAMBA,
    "zamba2": {**_ZAMBA, "hybrid_layer_ids": [1, 3]},
}
"""By name, or PART/name: settings that common names do not give."""

_ASSISTANT = "drafts tokens from the hidden states and the cache of another model"
_AUDIO = "generates audio codes, not text"
_LISTENS = "listens to speech, with a decoder of text alone"
NOT_BUILDABLE: dict[str, str] = {
    "gemma3n": "needs the package timm, for its images",
    "gemma4_assistant": _ASSISTANT,
    "gemma4_unified_assistant": _ASSISTANT,
    "git": "has no loss without an image",
    "layoutlmv2": "needs the package detectron2, for its images",
    "musicgen": _AUDIO,
    "musicgen_melody": _AUDIO,
    **dict.fromkeys((
        "audioflamingo3", "glmasr", "granite_speech", "granite_speech_plus",
        "moss_transcribe_diarize", "musicflamingo", "nemo_speechlm", "qwen2_audio", "qwen3_asr",
        "vibevoice_asr", "voxtral", "voxtral_realtime",
    ), _LISTENS),
}  # fmt: skip
"""By name, or PART/name: why no tiny text model of it can be built."""


def architectures(part: str) -> list[str]:
    """Names of the configurations of a part, as transformers maps them to classes."""
    return sorted(PARTS[part][0])


def not_buildable(name: str, part: str) -> str | None:
    """Why there is no tiny model of this one; None where there is."""
    return NOT_BUILDABLE.get(f"{part}/{name}", NOT_BUILDABLE.get(name))


def tiny_config(name: str, part: str = CAUSAL, **changes: Any) -> PreTrainedConfig:
    """The configuration of a model of two or a few layers, every kind of layer among them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind = CONFIG_MAPPING[name]
        own = {**EXCEPTIONS.get(name, {}), **EXCEPTIONS.get(f"{part}/{name}", {}), **changes}
        defaults = kind()
        settings = _merged(_shrunk(defaults), own)
        if part == CAUSAL and getattr(defaults, "is_decoder", None) is False:
            settings["is_decoder"] = True
        if part == CLASSIFICATION:
            settings["id2label"] = {0: "no", 1: "yes"}  # default names are not saved
        return kind(**settings)


def tiny_model(name: str, part: str = CAUSAL, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random float32 model; every parameter that starts as zeros or ones is moved a little, so
    that a bias or a scale that is left out shows."""
    config = tiny_config(name, part, **changes)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PARTS[part][1].from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def save_tiny(folder: Path, name: str, part: str = CAUSAL, **changes: Any) -> Path:
    """A tiny model with the quickstart's tokenizer, as transformers saves it. To classify, texts
    end in </s>, by which some models find what to classify."""
    tiny_model(name, part, **changes).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    if part == CLASSIFICATION:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B </s>",
            special_tokens=[("<s>", BOS), ("</s>", EOS)],
        )  # fmt: skip
    tokenizer.save_pretrained(folder)
    return folder


def _merged(settings: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    for name, value in own.items():
        inner = settings.get(name)
        deep = isinstance(value, dict) and isinstance(inner, dict)
        settings[name] = _merged(inner, value) if deep else value
    return settings


def _shrunk(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields to set, by name: those whose default is larger than a tiny model's."""
    found = vars(config)
    layers = next((found[name] for name in LAYERS if isinstance(found.get(name), int)), 0)
    chosen = _chosen_layers(found, layers)
    heads = next((found[n] for n in ("num_attention_heads", "n_heads") if n in found), 0)
    settings: dict[str, Any] = {}
    for name, value in found.items():
        if isinstance(value, PreTrainedConfig):
            settings[name] = _shrunk(value)
        elif isinstance(value, list | tuple) and layers > 1 and len(value) == layers:
            settings[name] = [_smaller(name, value[i]) for i in chosen]
        elif name in LAYERS and value:
            settings[name] = len(chosen) or min(value, 2)
        elif name == "vocab_size":
            settings[name] = VOCABULARY
        elif name in KEYS_AND_VALUES and value:
            settings[name] = 1 if value == 1 else HEADS if value == heads else KV_HEADS
        elif name in PER_TOKEN and value:
            settings[name] = min(value, 2)
        elif name == "n_group" and value:
            settings[name] = min(value, 2)
        elif name in ("topk_group", "num_expert_group") and value:
            settings[name] = 1
        elif name == "first_k_dense_replace" and value:
            settings[name] = 1
        elif name in POSITIONS and isinstance(value, int):
            settings[name] = min(value, 256)
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int | list | None):
            settings |= _special(name, value)
        elif name == "head_dim" and value is None:
            settings[name] = HEAD_DIM
        elif name in SPREAD and isinstance(value, float):
            settings[name] = SPREAD[name]
        elif "drop" in name and isinstance(value, float):
            settings[name] = 0.0  # so that training and evaluation compute the same
        elif name == "rope_parameters" and value:
            settings[name] = _rope(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            small = _smaller(name, value)
            settings |= {name: small} if small != value else {}
    return settings


def _chosen_layers(found: dict[str, Any], layers: int) -> list[int]:
    """Which layers are kept: the first of every kind, and two at least."""
    lists = [v for v in found.values() if isinstance(v, list | tuple) and len(v) == layers]
    kinds = list(zip(*(v for v in lists if all(isinstance(k, str) for k in v)), strict=True))
    first = sorted({kinds.index(kind) for kind in kinds})
    for index in range(layers):
        if len(first) < min(2, layers) and index not in first:
            first.append(index)
    return sorted(first)


def _smaller(name: str, value: Any) -> Any:
    small = BY_NAME.get(name)
    return small if small is not None and isinstance(value, int) and value > small else value


def _special(name: str, value: int | list | None) -> dict[str, int]:
    """Ids inside the tiny vocabulary. A model without padding gets one: batches need it."""
    if name in SPECIAL:
        return {name: SPECIAL[name]}
    return {name: OTHER} if isinstance(value, int) and value >= VOCABULARY else {}


def _rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings, also one for each kind of layer, with sections that fit half a head."""
    rope = {k: _rope(v) if isinstance(v, dict) else v for k, v in rope.items()}
    if sections := rope.get("mrope_section"):
        rope["mrope_section"] = [HEAD_DIM // 2 - 2 * (len(sections) - 1)] + [2] * (
            len(sections) - 1
        )
    return rope


def main() -> None:
    """Which architectures can be built: python -m tests.tiny_models [PART] [NAME…]"""
    parts = [part for part in PARTS if part in sys.argv[1:]] or list(PARTS)
    names = [name for name in sys.argv[1:] if name not in PARTS]
    for part in parts:
        for name in names or architectures(part):
            started = time.perf_counter()
            try:
                model = tiny_model(name, part)
                ids = torch.randint(4, 512, (2, 12))
                ids[:, -1] = EOS
                labels = torch.tensor([0, 1]) if part == CLASSIFICATION else ids
                with torch.no_grad():
                    loss = model(
                        input_ids=ids,
                        attention_mask=torch.ones_like(ids),
                        labels=labels,
                        **({} if part == CLASSIFICATION else {"use_cache": False}),
                    )
                result = f"{sum(p.numel() for p in model.parameters())} {loss.loss.item():.4f}"
            except Exception as error:
                result = f"FAILED {type(error).__name__}: {str(error).strip()}".replace("\n", " ")[
                    :300
                ]
            print(part, name, f"{time.perf_counter() - started:.1f} s", result, flush=True)


if __name__ == "__main__":
    main()
