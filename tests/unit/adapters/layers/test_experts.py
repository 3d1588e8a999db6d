"""Stacked experts: products against one expert after the other, transformers, PEFT; files; runs."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from adapters.decision import Decision
from adapters.formats.formats import FORMATS
from adapters.gated import GatedAdapter
from adapters.layers.expert_modules import AdaptedExperts
from adapters.layers.experts import StackedLinear, adapted_experts
from adapters.layers.linear import Dropout
from adapters.units import linear_names, make_units, select_targets
from tests.helpers import losses, quick_config, save_mixture, save_random_model
from trainer.checkpoint import store
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.export.export import export_run
from trainer.run.run import run
from trainer.session import open_session

E, OUT, IN = 4, 48, 64
ROUTINGS = {"even": [8, 8, 8, 8], "skewed": [1, 29, 2, 4], "some get none": [0, 20, 0, 12]}


def offsets_of(counts):
    return torch.tensor(counts).cumsum(0).int()


def stack_of(fmt="none", ranks=(3, 3, 3, 3), seed=0):
    """A stack with random adapters; rank None: no adapter."""
    torch.manual_seed(seed)
    weight = torch.randn(E, OUT, IN) / 8
    stack = StackedLinear(nn.Parameter(weight.clone(), requires_grad=False), fmt)
    if fmt != "none":
        stack.weight = nn.Parameter(stack.pack(weight, torch.float32), requires_grad=False)
    for host, rank in zip(stack.layers, ranks, strict=True):
        if rank is not None:
            adapter = GatedAdapter(
                torch.randn(rank, IN), 1 + torch.rand(rank), torch.randn(rank, OUT) / 4
            )
            host.adapter = adapter.requires_grad_(True)
    return stack, stack.dequantised(torch.float32).clone()


def reference(stack, W, x, counts):
    """One expert after the other, ΔW in factors."""
    parts, start = [], 0
    for expert, count in enumerate(counts):
        rows = x[start : start + count]
        y = rows @ W[expert].T
        adapter = stack.layers[expert].adapter
        if adapter is not None:
            y = y + (rows @ adapter.A.T * adapter.g) @ adapter.B
        parts.append(y)
        start += count
    return torch.cat(parts)


def gradients(stack, x, y):
    """Of x and of every adapter, for one fixed direction."""
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y)
    held = [h.adapter for h in stack.layers if h.adapter is not None]
    tensors = [x, *(t for a in held for t in (a.A, a.g, a.B))]
    for tensor in tensors:
        tensor.grad = None
    (y * direction).sum().backward()
    return [torch.zeros_like(t) if t.grad is None else t.grad.clone() for t in tensors]


@pytest.mark.parametrize("ranks", [(3, 3, 3, 3), (8, None, 2, 16), (None, None, 1, None)])
@pytest.mark.parametrize("fmt", ["none", "nf4", "int8"])
@pytest.mark.parametrize("routing", list(ROUTINGS))
def test_products_are_those_of_one_expert_after_the_other(routing, fmt, ranks):
    counts = ROUTINGS[routing]
    stack, W = stack_of(fmt, ranks)
    x = torch.randn(sum(counts), IN, requires_grad=True)
    y, expected = stack(x, offsets_of(counts)), reference(stack, W, x, counts)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)
    for ours, theirs in zip(gradients(stack, x, y), gradients(stack, x, expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_a_stack_without_adapters_passes_gradients_through():
    counts = ROUTINGS["skewed"]
    stack, W = stack_of("nf4", (None,) * E)
    x = torch.randn(sum(counts), IN, requires_grad=True)
    y, expected = stack(x, offsets_of(counts)), reference(stack, W, x, counts)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)
    (ours,), (theirs,) = gradients(stack, x, y), gradients(stack, x, expected)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("ranks", [(3, None, 2, 5), (None,) * E])
@pytest.mark.parametrize("dropped", [False, True])
def test_frozen_adapters_are_as_if_they_were_in_the_weights(ranks, dropped):
    (stack, W), (twin, _) = stack_of(ranks=ranks), stack_of(ranks=ranks)
    for layer, rank in zip(stack.layers, (9, 2, None, 1), strict=True):
        if rank is not None:
            layer.frozen = GatedAdapter(
                torch.randn(rank, IN), torch.rand(rank), torch.randn(rank, OUT) / 4
            )
            W[layer.index] += layer.frozen.delta()
    twin.weight = nn.Parameter(W, requires_grad=False)
    counts = ROUTINGS["some get none"]
    found = []
    for one in (stack, twin):
        if dropped:
            for layer in one.layers:
                layer.dropout = Dropout(0.3, True, torch.tensor(3), 0)
        x = torch.randn(sum(counts), IN, generator=torch.Generator().manual_seed(1))
        x.requires_grad_(True)
        y = one(x, offsets_of(counts))
        found.append([y.detach(), *gradients(one, x, y)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("ranks", [(8, 3, None, 8), (None,) * 4])
def test_the_operator_keeps_its_promises_to_autograd_and_the_compiler(ranks):
    stack, _ = stack_of("nf4", ranks)
    offsets = offsets_of(ROUTINGS["some get none"])
    x = torch.randn(32, IN, requires_grad=True)
    torch.library.opcheck(adapted_experts, (x, offsets, stack.handle, OUT))


def test_tokens_without_a_loss_are_not_counted():
    stack, _ = stack_of()
    y = stack(torch.randn(8, IN, requires_grad=True), offsets_of([3, 2, 3, 0]))
    weight = torch.tensor([1.0, 0, 1, 0, 0, 0, 1, 0]).unsqueeze(1)
    (y * weight).sum().backward()
    assert stack.tokens.grad.tolist() == [2, 0, 1, 0]


def test_tokens_are_counted_in_backward_only():
    stack, _ = stack_of()
    for counts in ([3, 0, 5, 0], [1, 0, 0, 2]):
        y = stack(torch.randn(sum(counts), IN, requires_grad=True), offsets_of(counts))
        before = None if stack.tokens.grad is None else stack.tokens.grad.clone()
        y.sum().backward()
    assert before.tolist() == [3, 0, 5, 0] and stack.tokens.grad.tolist() == [4, 0, 5, 2]
    assert "tokens" not in dict(stack.named_parameters())


@pytest.mark.parametrize("on_input", [False, True])
def test_dropout_is_the_same_in_backward_and_only_in_training(on_input):
    counts = ROUTINGS["skewed"]
    stack, W = stack_of(ranks=(8, 8, 8, 8))
    stack.layers[0].dropout = Dropout(0.5, on_input, torch.tensor(3), 0)
    x = torch.randn(sum(counts), IN, requires_grad=True)
    offsets = offsets_of(counts)
    y, again = stack(x, offsets), stack(x, offsets)
    torch.testing.assert_close(y, again, rtol=0, atol=0)
    stack.eval()
    torch.testing.assert_close(stack(x, offsets), reference(stack, W, x, counts), atol=1e-4, rtol=0)
    stack.train()
    # Linear in B: the gradient in backward is the change of the dropped forward.
    y.sum().backward()
    dB = stack.layers[1].adapter.B.grad
    with torch.no_grad():
        stack.layers[1].adapter.B += 1.0
    torch.testing.assert_close((stack(x, offsets) - y).sum(), dB.sum(), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("on_input", [False, True])
def test_dropout_spares_what_belongs_to_the_weight(on_input):
    """While nothing was learned, a part of W that the adapter holds is not dropped."""
    counts = ROUTINGS["skewed"]
    stack, W = stack_of(ranks=(3, 3, 3, 3))
    for host in stack.layers:
        host.initial = host.adapter.copy()
        host.dropout = Dropout(0.5, on_input, torch.tensor(3), 0)
    x = torch.randn(sum(counts), IN)
    torch.testing.assert_close(
        stack(x, offsets_of(counts)), reference(stack, W, x, counts), rtol=1e-4, atol=1e-3
    )


# --- transformers' modules ------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "olmoe"])
def test_experts_are_transformers_own(model_type):
    config = AutoConfig.for_model(
        model_type, hidden_size=32, intermediate_size=48, moe_intermediate_size=48,
        num_local_experts=4, num_experts=4, num_experts_per_tok=2, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, vocab_size=64,
    )  # fmt: skip
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    experts = next(m for m in model.modules() if AdaptedExperts.fits(m))
    nn.init.normal_(experts.gate_up_proj, std=0.2), nn.init.normal_(experts.down_proj, std=0.2)
    ours = AdaptedExperts(experts)
    x = torch.randn(20, 32, requires_grad=True)
    index = torch.stack([torch.randperm(3)[:2] for _ in range(20)])  # nobody chooses the last
    weights = torch.rand(20, 2, requires_grad=True)
    expected, found = experts(x, index, weights), ours(x, index, weights)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(
        torch.autograd.grad(found.square().sum(), (x, weights)),
        torch.autograd.grad(expected.square().sum(), (x, weights)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def ids():
    return torch.randint(3, 500, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "olmoe"])
def test_published_files_load_expert_by_expert(tmp_path, model_type):
    folder = save_mixture(tmp_path / "model", model_type)
    stored = load_file(folder / "model.safetensors")
    assert any(".experts.3." in name for name in stored)  # one tensor an expert
    config = quick_config(tmp_path, f"model.id={folder}", "method.targets=all-linear")
    session = open_session(config, World())
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(
            session.model(ids()).logits, expected(ids()).logits, rtol=1e-4, atol=1e-4
        )
    stack = session.model.get_submodule("model.layers.0.mlp.experts.down_proj")
    assert stack.weight.dim() == 2  # so that a sharder can split it, however few experts there are
    kinds = [unit.kind for unit in session.backbone.units]
    assert kinds.count("mlp.experts.gate_up_proj") == kinds.count("mlp.experts.down_proj") == 8
    assert len(kinds) == 2 * (4 + 8)


@pytest.mark.parametrize("fmt", ["nf4", "int8", "fp8"])
def test_quantised_experts_compute_with_the_matrices_they_stand_for(tmp_path, fmt):
    folder = save_mixture(tmp_path / "model", "mixtral")
    config = quick_config(tmp_path, f"model.id={folder}", f"model.quantization={fmt}")
    session = open_session(config, World())
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen = 0
    for name, parameter in expected.named_parameters():
        if parameter.dim() < 2 or "embed" in name or "lm_head" in name or "mlp.gate" in name:
            continue
        matrix = parameter.data.flatten(0, -2)
        fmt_ = FORMATS[fmt]
        restored = fmt_.unpack(fmt_.pack(matrix, torch.float32), matrix.shape, torch.float32)
        assert 0.001 < (restored - matrix).norm() / matrix.norm() < 0.2
        parameter.data = restored.view_as(parameter)
        seen += "experts" in name
    assert seen == 4
    with torch.no_grad():
        torch.testing.assert_close(
            session.model(ids()).logits, expected(ids()).logits, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("train_router", ["false", "true"])
def test_a_router_s_balancing_bias_is_loaded_and_merged(tmp_path, train_router):
    folder = save_mixture(
        tmp_path / "model", "glm4_moe", n_routed_experts=4, first_k_dense_replace=0, n_group=1,
        topk_group=1, n_shared_experts=1,
    )  # fmt: skip
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "e_score_correction_bias" in name]:
        tensors[name] = torch.tensor([3.0, 0.0, -3.0, 1.0])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = quick_config(
        tmp_path, f"model.id={folder}", *MIXTURE, f"method.train_router={train_router}",
        "run.steps=1", "checkpoint.every=1", "optim.learning_rate=1e-12",
    )  # fmt: skip
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids()).logits
    session = open_session(config, World())
    torch.testing.assert_close(session.model(ids()).logits, expected, rtol=1e-4, atol=1e-4)
    run(config, World())
    export_run(config.run_folder, tmp_path / "merged", World(), what="merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(merged(ids()).logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("model_type", ["qwen2_moe", "phimoe"])
def test_gates_and_routers_take_no_adapter_and_stay_as_they_are(tmp_path, model_type):
    """A shared expert's gate has one row; Phi's router is an nn.Linear that returns choices."""
    changes = {"shared_expert_intermediate_size": 96} if model_type == "qwen2_moe" else {}
    own = {"num_local_experts": 4} if model_type == "phimoe" else {}
    folder = save_mixture(tmp_path / "model", model_type, **changes, **own)
    config = quick_config(
        tmp_path, f"model.id={folder}", "method.targets=all-linear", "model.quantization=int8"
    )
    session = open_session(config, World())
    assert torch.isfinite(session.model(ids()).logits).all()
    names = [unit.name for unit in session.backbone.units]
    assert any("experts.down_proj.3" in name for name in names)
    assert not any(name.endswith(("gate", "router")) for name in names)


def test_a_balancing_bias_keeps_its_precision_beside_bfloat16(tmp_path):
    folder = save_mixture(
        tmp_path / "model", "deepseek_v3", n_routed_experts=4, first_k_dense_replace=0, n_group=1,
        topk_group=1, n_shared_experts=1, q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=16,
        qk_rope_head_dim=16, v_head_dim=16, num_key_value_heads=4,
    )  # fmt: skip
    session = open_session(
        quick_config(tmp_path, f"model.id={folder}", "model.dtype=bfloat16"), World()
    )
    biases = [b for n, b in session.model.named_buffers() if "e_score_correction_bias" in n]
    assert len(biases) == 2 and all(b.dtype == torch.float32 for b in biases)


def test_stacks_of_another_form_are_left_alone_and_mentioned(tmp_path, capsys):
    folder = save_random_model(
        tmp_path / "model", "jetmoe", AutoModelForCausalLM, num_local_experts=4,
        num_experts_per_tok=2, kv_channels=16,
    )  # fmt: skip
    config = quick_config(
        tmp_path, f"model.id={folder}", "method.targets=all-linear", "log.progress=plain",
        "run.steps=1",
    )  # fmt: skip
    run(config, World())
    said = capsys.readouterr().out
    assert "mlp.input_linear.weight" in said and "unsupported layout of experts" in said


def test_a_missing_expert_is_named(tmp_path):
    folder = save_mixture(tmp_path / "model", "mixtral")
    stored = load_file(folder / "model.safetensors")
    gone = next(name for name in stored if ".experts.2.w3" in name)
    save_file({n: t for n, t in stored.items() if n != gone}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"3 tensors for .*experts.* of 4 experts"):
        open_session(quick_config(tmp_path, f"model.id={folder}"), World())


def test_targets_pick_stacks_and_single_experts():
    config = AutoConfig.for_model(
        "mixtral", hidden_size=32, intermediate_size=48, num_local_experts=3, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, vocab_size=64,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.model.layers[0].mlp.experts = AdaptedExperts(model.model.layers[0].mlp.experts)
    names = linear_names(model, ["lm_head"])
    stack = "model.layers.0.mlp.experts.down_proj"
    assert select_targets(names, ["down_proj"]) == [f"{stack}.{e}" for e in range(3)]
    assert select_targets(names, ["down_proj.1"]) == [f"{stack}.1"]
    assert select_targets(names, r".*experts\.down_proj") == [f"{stack}.{e}" for e in range(3)]
    assert select_targets(names, "all-linear") == names and len(names) == 4 + 6
    with pytest.raises(ValueError, match=r"gate_proj.*gate_up_proj"):
        select_targets(names, ["gate_proj"])
    unit = make_units(model, [f"{stack}.1"])[0]
    assert (unit.kind, unit.layer) == ("mlp.experts.down_proj", 0)
    assert (unit.out_features, unit.in_features) == (32, 48)


# --- runs -----------------------------------------------------------------------------------------

MIXTURE = ["method.targets=all-linear", "method.rank=4"]


def mixture_run(tmp_path, *overrides, **changes):
    folder = tmp_path / "model"
    if not folder.exists():
        save_mixture(folder, "mixtral", **changes)
    config = quick_config(tmp_path, f"model.id={folder}", *MIXTURE, *overrides)
    run(config, World())
    return config


METHODS = {
    "lora": [],
    "pissa": ["method.kind=pissa", "method.dropout=0.1"],
    "lelora": ["method.kind=lelora"],
    "lalora": ["method.kind=lalora"],
    "adalora": ["method.kind=adalora", "method.tinit=1", "method.tfinal=1"],
    "weightlora_plus": ["method.kind=weightlora_plus", "method.warmup_steps=2"],
    "rlora": ["method.kind=rlora"],
    "dylora": ["method.kind=dylora"],
}


@pytest.mark.parametrize("method", list(METHODS))
def test_methods_train_experts_and_export_what_peft_loads(tmp_path, method):
    config = mixture_run(
        tmp_path, "run.steps=5", "checkpoint.every=5", "optim.learning_rate=1e-2",
        f"run.name={method}", *METHODS[method],
    )  # fmt: skip
    assert losses(config.run_folder)[-1] > 0
    checkpoint = store.newest(config.run_folder / "checkpoints")
    assert any("experts" in name for name in store.read_tensors(checkpoint))
    export_run(config.run_folder, tmp_path / "out", World())
    export_run(config.run_folder, tmp_path / "merged", World(), what="merged")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    with torch.no_grad():
        untrained = base(ids()).logits.clone()
        adapted = PeftModel.from_pretrained(base, tmp_path / "out")(ids()).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        expected = merged(ids()).logits
    assert (expected - untrained).abs().max() > 0.01
    torch.testing.assert_close(adapted, expected, rtol=1e-3, atol=2e-3)
    targets = json.loads((tmp_path / "out/adapter_config.json").read_text())["target_parameters"]
    assert all(name.endswith(("experts.gate_up_proj", "experts.down_proj")) for name in targets)
    stored = load_file(tmp_path / "merged/model-00001.safetensors")
    assert sum(".block_sparse_moe.experts." in name for name in stored) == 2 * 4 * 3


def test_routers_train_beside_the_adapters_and_are_exported(tmp_path):
    config = mixture_run(
        tmp_path, "method.train_router=true", "run.steps=4", "optim.learning_rate=1e-2",
        "checkpoint.every=4", "run.name=router",
    )  # fmt: skip
    stored = store.read_tensors(store.newest(config.run_folder / "checkpoints"))
    original = load_file(tmp_path / "model/model.safetensors")
    for layer in range(2):
        trained = stored[f"head/model.layers.{layer}.mlp.gate/inner.weight"]
        before = original[f"model.layers.{layer}.block_sparse_moe.gate.weight"]
        assert 1e-3 < (trained - before).abs().max() < 0.1
    export_run(config.run_folder, tmp_path / "again", World())
    for adapter in (config.run_folder / "adapter", tmp_path / "again"):
        assert "num_labels" not in (adapter / "README.md").read_text()  # a router is no new head
    export_run(config.run_folder, tmp_path / "merged", World(), what="merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(merged.model.layers[1].mlp.gate.weight.data, trained)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(base, config.run_folder / "adapter")(ids()).logits
        torch.testing.assert_close(adapted, merged(ids()).logits, rtol=1e-3, atol=2e-3)


def test_a_router_to_train_must_be_there(tmp_path):
    with pytest.raises(UserError, match=r"method.train_router: true given.*accepted: false"):
        open_session(quick_config(tmp_path, "method.train_router=true"), World())


@pytest.mark.parametrize(("own", "kinds"), [("false", 4 + 2), ("true", 4 + 2 * 4)])
def test_experts_share_their_type_s_embedding_unless_asked(tmp_path, own, kinds):
    session = mixture_session(
        tmp_path, "method.kind=lelora", f"method.policy.expert_embedding={own}"
    )
    session.method.decide(0)
    assert session.method._policy.network.kind.num_embeddings == kinds


def mixture_session(tmp_path, *overrides):
    folder = save_mixture(tmp_path / "model", "mixtral")
    return open_session(quick_config(tmp_path, f"model.id={folder}", *MIXTURE, *overrides), World())


def avoid_expert_2(session):
    """Until the returned list is emptied, the router of the first layer sends nothing there."""
    router, on = session.model.model.layers[0].mlp.gate, [True]
    forward = type(router).forward

    def avoiding(hidden):
        logits, scores, index = forward(router, hidden)
        others = torch.where(index == 2, torch.full_like(index, 3), index)
        return logits, scores, others if on else index

    router.forward = avoiding
    return on


def learn_once(session):
    inputs = ids()
    F.cross_entropy(
        session.model(inputs).logits[:, :-1].flatten(0, 1), inputs[:, 1:].flatten()
    ).backward()


@pytest.mark.parametrize("credit", ["attributed", "counterfactual"])
@pytest.mark.parametrize("blind", [0, 1])
def test_an_expert_that_no_token_reached_gets_no_reward(tmp_path, credit, blind):
    """In the step that is judged, or in the one that judges."""
    session = mixture_session(tmp_path, "method.kind=lelora", f"method.policy.credit={credit}")
    on, method, optimizer = avoid_expert_2(session), session.method, session.optimizer
    optimizer.learning_rate = 1e-2
    if blind == 1:
        on.clear()
    for step in range(2):
        names = [unit.name for unit in method.units]
        method.apply(
            Decision(ranks=dict.fromkeys(names, 4), locations=dict.fromkeys(names, "primary"))
        )
        learn_once(session)
        method.observe(step, optimizer)
        optimizer.clip(1.0)
        optimizer.step()
        optimizer.zero_grad()
        on[:] = [True] if blind == 1 else []
    known = method._reward.flatten(1).isfinite().all(1) if method._reward.dim() > 1 else (
        method._reward.isfinite()
    )  # fmt: skip
    assert [n for n, k in zip(names, known, strict=True) if not k] == [
        f"model.layers.0.mlp.experts.{p}.2" for p in ("gate_up_proj", "down_proj")
    ]


def test_an_expert_that_no_token_reached_keeps_every_bit(tmp_path):
    """Weight decay and momentum would move it otherwise."""
    session = mixture_session(tmp_path, "optim.weight_decay=0.5")
    avoid_expert_2(session)
    unit = "model.layers.0.mlp.experts.{}.2"
    names = [unit.format("gate_up_proj"), unit.format("down_proj")]
    other = unit.format("down_proj").replace(".2", ".3")

    def state(name):
        adapter = session.method.adapters[name]
        moments = session.optimizer.state_dict()
        return [t.clone() for role in ("A", "B")
                for t in (getattr(adapter, role), *moments[f"{name}.{role}"].values())]  # fmt: skip

    session.optimizer.learning_rate = 1e-2
    before = {name: state(name) for name in [*names, other]}
    for _ in range(2):
        learn_once(session)
        session.optimizer.clip(1.0)
        session.optimizer.step()
        session.optimizer.zero_grad()
    for name in names:
        assert all(torch.equal(a, b) for a, b in zip(before[name], state(name), strict=True))
    assert not torch.equal(before[other][0], state(other)[0])


@pytest.mark.parametrize("method", ["weightlora_plus", "lelora", "pissa"])
def test_a_mixture_resumes_as_if_nothing_had_happened(tmp_path, method):
    """Before and after WeightLoRA's selection, which leaves stacks with experts of two kinds."""
    whole = mixture_run(
        tmp_path, "run.steps=6", "checkpoint.every=1", "checkpoint.keep=9", "run.name=whole",
        *METHODS[method],
    )  # fmt: skip
    for step in (1, 4):
        folder = tmp_path / "runs" / f"cut-{step}"
        shutil.copytree(whole.run_folder, folder)
        for checkpoint in store.complete(folder / "checkpoints"):
            if int(checkpoint.name.rpartition("-")[2]) > step:
                shutil.rmtree(checkpoint)
        again = mixture_run(
            tmp_path, "run.steps=6", "checkpoint.every=1", "checkpoint.keep=9",
            f"run.name=cut-{step}", *METHODS[method],
        )  # fmt: skip
        assert losses(again.run_folder) == losses(whole.run_folder)
