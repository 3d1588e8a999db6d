"""Every parameter and buffer of a loaded model is that of transformers' `from_pretrained`.

A sample of architectures whose files or constructors are special; all of them with RANKCAST_ALL=1.
"""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, LlamaConfig, PreTrainedModel
from transformers.initialization import constant_

from adapters.layers.base import PackedLayer
from tests.helpers import ALL, TASK_OF, quick_config
from tests.tiny_models import (
    CAUSAL,
    CLASSIFICATION,
    PARTS,
    architectures,
    not_buildable,
    save_tiny,
)
from trainer.distributed.world import World
from trainer.engine.single import SingleEngine
from trainer.errors import UserError
from trainer.loading.load import check_backbone, load_backbone
from trainer.model.hub import load_tokenizer
from trainer.model.meta import is_unset, on_meta
from trainer.tasks.registry import TASKS

SAMPLE = [
    (CAUSAL, "gemma3", "float32"),  # multimodal, published with other names
    (CAUSAL, "mixtral", "float32"),  # an expert's matrices are a tensor each on disk
    (CAUSAL, "hrm_text", "float32"),  # one tensor on disk is four in the model
    (CAUSAL, "olmo_hybrid", "float32"),  # three tensors are one
    (CAUSAL, "inkling2_text", "float32"),  # rows in another order
    (CAUSAL, "gptj", "bfloat16"),  # sines that `_init_weights` of the parent fills
    (CAUSAL, "flint", "bfloat16"),  # sinks that stay in float32
    (CLASSIFICATION, "nomic_bert", "float32"),
]
SAMPLE = [case for case in SAMPLE if case[1] in architectures(case[0])]  # older transformers
EVERY = [
    (part, name, dtype)
    for part in PARTS
    for name in architectures(part)
    for dtype in (("float32", "bfloat16") if part == CAUSAL else ("float32",))
    if not not_buildable(name, part)
]
LOADING = (
    "no tensor",
    "no values",
    "cannot be made",
    "config.json makes it",
    "differ",
    "does not have",
    "not finite",
)
"""Of messages of the loader, which must not refuse what transformers loads."""


def prepared(folder, *overrides, part=CAUSAL):
    config = quick_config(
        folder.parent, f"model.id={folder}", f"task.kind={TASK_OF[part]}", "data.format=auto",
        "method.rank=1", *overrides,
    )  # fmt: skip
    task = TASKS[config.task.kind](config.task, load_tokenizer(config.model))
    task.learn_labels([str(label) for label in range(labels_of(folder))])
    return config, task


def labels_of(folder):
    return AutoConfig.from_pretrained(folder).num_labels


def load(folder, *overrides, part=CAUSAL):
    config, task = prepared(folder, *overrides, part=part)
    return load_backbone(config, task, SingleEngine(config, World()), World())


def tensors(model):
    """Parameters and buffers, also those that no file holds, by transformers' names."""
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    return {name.replace(".inner.", "."): tensor for name, tensor in named}


@pytest.mark.parametrize(("part", "name", "dtype"), EVERY if ALL else SAMPLE)
def test_every_tensor_is_that_of_transformers(part, name, dtype, tmp_path):
    folder = save_tiny(tmp_path / name, name, part)
    try:
        loaded = load(folder, f"model.dtype={dtype}", part=part)
    except UserError as error:
        assert not any(words in str(error) for words in LOADING)
        pytest.skip(str(error))
    assert loaded.left_out is None
    ours = tensors(loaded.model)
    layers = {path: m for path, m in loaded.model.named_modules() if isinstance(m, PackedLayer)}
    theirs = tensors(PARTS[part][1].from_pretrained(folder, dtype=getattr(torch, dtype)))
    for name, expected in theirs.items():
        value = ours[name] if name in ours else ours.get(f"{name}.weight")
        if value is None:
            continue  # biases of stacked experts have no tensor of this name
        layer = layers.get(name, layers.get(name.removesuffix(".weight")))
        if layer is not None and layer.transposed:
            expected = expected.mT
        found = value.detach().reshape(expected.shape)
        assert torch.equal(found.to(expected.dtype), expected), name
        # A head trains in float32, an adapted matrix computes in the model's dtype.
        assert found.dtype in (expected.dtype, torch.float32), name


def test_published_multimodal_gemma3_loads_and_a_dry_run_finds_its_names(tmp_path):
    folder = save_tiny(tmp_path / "model", "gemma3")
    stored = load_file(folder / "model.safetensors")
    assert "language_model.model.layers.0.mlp.up_proj.weight" in stored
    config, task = prepared(folder)
    check_backbone(config, task, torch.device("cpu"))
    loaded = load(folder)
    assert type(loaded.model).__name__ == "Gemma3ForConditionalGeneration"
    ours = loaded.model.model.language_model.layers[0].mlp.up_proj.weight
    assert torch.equal(ours, stored["language_model.model.layers.0.mlp.up_proj.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.0.mlp.experts.1.w1.weight"), "3 tensors for .*4 experts"),
        (lambda t: t.pop("model.norm.weight"), "no tensor for model.norm.weight"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(3)}),
            r"model.norm.weight is \(3,\); accepted: \(64,\), as config.json makes it",
        ),
    ],
)
def test_files_that_do_not_fit_are_refused_before_and_at_loading(change, message, tmp_path):
    folder = save_tiny(tmp_path / "model", "mixtral")
    _rewrite(folder, lambda names: _old_names(names, change))
    config, task = prepared(folder)
    with pytest.raises(UserError, match=message):
        check_backbone(config, task, torch.device("cpu"))
    with pytest.raises(UserError, match=message):
        load(folder)


def _old_names(stored, change):
    assert any(".block_sparse_moe.experts.1.w1." in name for name in stored)
    stored = {name.replace("block_sparse_moe", "mlp"): value for name, value in stored.items()}
    change(stored)
    return stored


def test_a_conversion_without_one_of_its_tensors_is_refused(tmp_path):
    folder = save_tiny(tmp_path / "model", "olmo_hybrid")

    def without(stored):
        gone = next(name for name in stored if name.endswith("k_conv1d.weight"))
        return {name: value for name, value in stored.items() if name != gone}

    _rewrite(folder, without)
    with pytest.raises(
        UserError, match=r"(conv1d.*|cannot be made.*)accepted: .*config.json makes|no tensor"
    ):
        load(folder)


def test_tied_matrices_that_differ_in_the_files_are_refused(tmp_path):
    folder = save_tiny(tmp_path / "model", "llama", tie_word_embeddings=True)
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    _rewrite(folder, lambda stored: stored | {"lm_head.weight": embedding.clone()})
    load(folder)
    _rewrite(folder, lambda stored: stored | {"lm_head.weight": embedding + 1})
    with pytest.raises(UserError, match=r"differ, but config.json ties them; accepted"):
        load(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    loaded = load(folder)
    assert torch.equal(loaded.model.lm_head.weight, embedding + 1)


def test_a_buffer_of_another_shape_is_refused_not_broadcast(tmp_path):
    folder = save_tiny(tmp_path / "model", "deepseek_v3")
    name = next(
        name for name in load_file(folder / "model.safetensors") if "e_score_correction" in name
    )
    _rewrite(folder, lambda stored: stored | {name: torch.ones(1)})
    with pytest.raises(UserError, match=rf"{name} is \(1,\); accepted: \(4,\), as config.json"):
        load(folder)


def _rewrite(folder, change):
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def test_random_decays_and_scales_are_the_models_own_and_the_same_on_every_rank(tmp_path):
    folder = save_tiny(tmp_path / "model", "mamba2")
    first, second = (load(folder, "model.weights=random").model for _ in range(2))
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b) and a.isfinite().all(), name
    mixer = first.backbone.layers[0].mixer
    heads = torch.arange(1, mixer.A_log.numel() + 1).float()
    assert torch.allclose(mixer.A_log, heads.log())  # as Mamba-2 initialises it
    assert mixer.dt_bias.abs().min() > 0


class Part(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.drawn = nn.Parameter(torch.normal(0.0, 1.0, (width,)))
        self.register_buffer("computed", torch.arange(width) / 3)
        self.register_buffer("by_parent", torch.empty(width), persistent=False)
        self.register_buffer("forgotten", torch.empty(width))
        self.register_buffer("numbers", torch.empty(width, dtype=torch.int64))


class Whole(PreTrainedModel):
    def __init__(self, config, width=5):
        super().__init__(config)
        self.part = Part(width)
        self.scale = nn.Parameter(torch.empty(width))
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, Whole):
            constant_(module.part.by_parent, 2.0)
            constant_(module.scale, math.e)


def test_buffers_are_computed_and_what_nobody_fills_is_found():
    before = torch.get_rng_state()
    values = []
    for seed in (0, 0, 1):
        with on_meta(seed) as finish:
            model = Whole(LlamaConfig())
            values.append(finish(model))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(model.part.computed, torch.arange(5) / 3)
    assert torch.equal(model.part.by_parent, torch.full((5,), 2.0))
    unset = {name for name, buffer in model.named_buffers() if is_unset(buffer)}
    assert unset == {"part.forgotten", "part.numbers"}
    assert values[0].keys() == {"part.drawn", "scale"}
    assert torch.equal(values[0]["scale"], torch.full((5,), math.e))
    first, again, other = (found["part.drawn"] for found in values)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert nn.Linear(2, 2).weight.device.type == "cpu"


def test_an_unset_buffer_is_refused_by_name(tmp_path, monkeypatch):
    """A persistent buffer that waits for its values from files which lack it."""
    from transformers.models.llama.modeling_llama import LlamaModel

    made = LlamaModel.__init__

    def with_buffer(self, config):
        made(self, config)
        self.register_buffer("statistics", torch.empty(4))

    folder = save_tiny(tmp_path / "model", "llama")
    monkeypatch.setattr(LlamaModel, "__init__", with_buffer)
    with pytest.raises(
        UserError, match=r"no values for model.statistics.*accepted: files that hold"
    ):
        load(folder)
