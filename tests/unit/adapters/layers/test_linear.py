"""The fused host operator against plain autograd and against PEFT."""

import copy

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from adapters.gated import GatedAdapter, Magnitude
from adapters.layers.linear import AdaptedLinear, Dropout, adapted_linear, fixed_adapters


def host(fmt="none", bias=True, out=48, inp=64, rank=4, dtype=torch.float32, seed=0, learn=True):
    torch.manual_seed(seed)
    linear = nn.Linear(inp, out, bias=bias).to(dtype).requires_grad_(False)
    layer = AdaptedLinear(linear, fmt)
    layer.weight = nn.Parameter(layer.pack(linear.weight.data, dtype), requires_grad=False)
    layer.adapter = GatedAdapter(
        torch.randn(rank, inp), torch.rand(rank) + 0.5, torch.randn(rank, out)
    )
    layer.adapter.g.requires_grad_(learn)
    return layer


def reference(layer, x):
    """The same in separate torch operations, differentiated by autograd."""
    W = layer.dequantised(x.dtype)
    A, g, B = (t.to(x.dtype) for t in (layer.adapter.A, layer.adapter.g, layer.adapter.B))
    return F.linear(x, W, layer.bias) + ((x @ A.T) * g) @ B


def gradients(function, layer, x):
    x = x.detach().clone().requires_grad_(True)
    layer.adapter.zero_grad()
    y = function(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y))
    adapter = layer.adapter
    return [y.detach(), x.grad, adapter.A.grad, adapter.g.grad, adapter.B.grad]


@pytest.mark.parametrize("fmt", ["none", "nf4", "fp4", "int8", "fp8"])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_all_gradients_equal_autograd(fmt, bias):
    layer = host(fmt, bias)
    x = torch.randn(2, 5, 64)
    fused = gradients(layer, layer, x)
    plain = gradients(lambda t: reference(layer, t), layer, x)
    for ours, theirs in zip(fused, plain, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_bfloat16_compute_keeps_float32_adapter_gradients():
    layer = host(dtype=torch.bfloat16, bias=False)
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    fused, plain = gradients(layer, layer, x), gradients(lambda t: reference(layer, t), layer, x)
    assert fused[0].dtype == fused[1].dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in fused[2:])
    for ours, theirs in zip(fused, plain, strict=True):
        assert (ours - theirs).float().norm() <= 2e-2 * theirs.float().norm()


def test_gradients_by_finite_differences_in_numpy():
    layer = host(out=6, inp=64, rank=2, bias=False)
    x = torch.randn(3, 64)
    _, dx, dA, dg, dB = gradients(layer, layer, x)
    W = layer.weight.double().numpy()
    values = {
        "x": x.double().numpy(),
        "A": layer.adapter.A.detach().double().numpy(),
        "g": layer.adapter.g.detach().double().numpy(),
        "B": layer.adapter.B.detach().double().numpy(),
    }
    upstream = np.linspace(-1, 1, 18).reshape(3, 6)

    def loss():
        v = values
        return ((v["x"] @ W.T + ((v["x"] @ v["A"].T) * v["g"]) @ v["B"]) * upstream).sum()

    for name, gradient in (("x", dx), ("A", dA), ("g", dg), ("B", dB)):
        array = values[name]
        for index in list(np.ndindex(array.shape))[:7]:
            kept = array[index]
            array[index] = kept + 1e-6
            above = loss()
            array[index] = kept - 1e-6
            below = loss()
            array[index] = kept
            assert gradient[index].item() == pytest.approx(
                (above - below) / 2e-6, rel=1e-3, abs=1e-3
            )


def test_equals_peft_lora():
    torch.manual_seed(1)
    base = nn.Sequential(nn.Linear(64, 32, bias=True))
    wrapped = peft.get_peft_model(
        base, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights=False)
    )
    lora = wrapped.base_model.model[0]
    layer = AdaptedLinear(lora.base_layer, "none")
    A, B = lora.lora_A["default"].weight, lora.lora_B["default"].weight
    layer.adapter = GatedAdapter(A.detach(), torch.full((4,), 8 / 4), B.detach().T)
    x = torch.randn(5, 64)
    assert torch.allclose(layer(x), wrapped(x), atol=1e-5)


@pytest.mark.parametrize("on_input", [False, True])
def test_dropout_mask_is_the_same_in_backward_and_reproducible(on_input):
    layer, x = host(bias=False), torch.randn(40, 64)
    seed = torch.tensor(7)
    layer.dropout = Dropout(0.5, on_input, seed, unit_index=3)
    layer.train()
    # The operator is linear in B: with the same mask in backward, <dB, B> is the adapter's part
    # of <dy, y>, whatever was dropped.
    y, *_rest, dB = gradients(layer, layer, x)
    upstream = torch.linspace(-1, 1, y.numel()).view_as(y)
    part = ((y - x @ layer.weight.T) * upstream).sum()
    assert torch.allclose((dB * layer.adapter.B).sum(), part, rtol=1e-4)
    assert torch.equal(layer(x), y)  # the same seed, the same mask
    seed.fill_(8)
    assert not torch.allclose(layer(x), y)
    layer.eval()
    assert torch.allclose(layer(x), reference(layer, x), atol=1e-5)


def test_dropout_keeps_the_expectation():
    layer, x = host(bias=False, learn=False), torch.randn(4, 64)
    seed = torch.tensor(0)
    layer.dropout = Dropout(0.3, False, seed, unit_index=0)
    outputs = []
    for value in range(3000):
        seed.fill_(value)
        outputs.append(layer(x).detach())
    mean, plain = torch.stack(outputs).mean(0), reference(layer, x)
    assert (mean - plain).norm() < 0.05 * plain.norm()


@pytest.mark.parametrize("fmt", ["none", "nf4"])
def test_without_adapter_input_gradient_is_exact(fmt):
    layer = host(fmt, bias=False)
    layer.adapter = None
    x = torch.randn(3, 64, requires_grad=True)
    layer(x).sum().backward()
    W = layer.dequantised(torch.float32)
    assert torch.allclose(x.grad, W.sum(0).expand(3, -1), atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_nothing_of_the_weight_is_kept_for_backward(compiled):
    """What a sharder gathered would otherwise stay until then."""
    layer = host("nf4", bias=False, out=256, inp=256)
    run = torch.compile(layer, backend="aot_eager") if compiled else layer
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        run(torch.randn(8, 256, requires_grad=True))
    assert sum(t.numel() for t in saved) == 8 * 256 + 1  # x and the handle
    assert not any(t.data_ptr() == layer.weight.data_ptr() for t in saved)


def test_the_operator_is_opaque_to_torch_compile():
    layer = host("nf4", bias=False)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 5, 64)
    for ours, theirs in zip(gradients(compiled, layer, x), gradients(layer, layer, x), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
    torch.library.opcheck(
        adapted_linear,
        (x.requires_grad_(True), layer.handle, 48),
    )


def test_one_compiled_program_serves_all_hosts_and_whatever_a_method_changes():
    torch._dynamo.reset()
    run = torch.compile(AdaptedLinear.forward, backend="aot_eager", fullgraph=True, dynamic=True)
    layers = [host("nf4", bias=False, seed=seed) for seed in (0, 1)]
    x = torch.randn(2, 5, 64)
    gradients(lambda t: run(layers[0], t), layers[0], x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rank in (3, 1, 7):
            layer = layers[1]
            layer.adapter = GatedAdapter(
                torch.randn(rank, 64), torch.rand(rank), torch.randn(rank, 48)
            )
            layer.adapter.g.requires_grad_(rank == 1)
            layer.dropout = Dropout(0.5, False, torch.tensor(1), 0) if rank == 7 else None
            compiled = gradients(lambda t: run(layer, t), layer, x)
            for ours, theirs in zip(compiled, gradients(layer, layer, x), strict=True):
                assert ours is theirs is None or torch.allclose(ours, theirs, atol=1e-6)
        layers[1].adapter = None
        x = torch.randn(3, 7, 64, requires_grad=True)
        expected = F.linear(x, layers[1].dequantised(torch.float32))
        torch.testing.assert_close(run(layers[1], x), expected, rtol=1e-4, atol=1e-5)


def test_a_copy_has_an_adapter_of_its_own():
    layer = host()
    other = copy.deepcopy(layer)
    other.adapter = None
    x = torch.randn(3, 64)
    assert torch.equal(other(x), F.linear(x, layer.weight, layer.bias))
    assert torch.allclose(layer(x), reference(layer, x), atol=1e-5)


def test_an_adapter_trains_where_its_input_needs_no_gradient():
    layer = host()
    layer(torch.randn(3, 64)).sum().backward()
    assert layer.adapter.A.grad.norm() > 0 and layer.adapter.B.grad.norm() > 0


@pytest.mark.parametrize("fmt", ["none", "nf4"])
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_a_model_may_add_in_place_to_the_output(fmt, backend):
    """As Falcon, Llama 4, DeBERTa and Longformer do; compiled and not, forward and backward."""
    layer = host(fmt)
    residual = torch.randn(2, 5, 48)

    def block(x):
        y = layer(x)
        y += residual
        y[:, 1:] *= 2
        return y

    def plain(x):
        y = reference(layer, x) + residual
        return torch.cat([y[:, :1], y[:, 1:] * 2], 1)

    run = torch.compile(block, backend=backend, fullgraph=True) if backend else block
    x = torch.randn(2, 5, 64)
    fused, expected = gradients(run, layer, x), gradients(plain, layer, x)
    for ours, theirs in zip(fused, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_conv1d_becomes_the_same_layer():
    """transformers' layer of GPT-2, y = x W + b with W (in, out)."""
    conv = Conv1D(48, 64)
    layer = AdaptedLinear(conv, "none", transposed=True)
    assert layer.shape == (48, 64) and layer.stored_shape == (64, 48)
    x = torch.randn(2, 5, 64)
    assert torch.allclose(layer(x), conv(x), atol=1e-5)
    assert torch.equal(layer.reoriented(conv.weight.data), layer.weight.data)
    assert torch.equal(layer.reoriented(layer.weight.data), conv.weight.data)


@pytest.mark.parametrize(
    "trained", ["alone", "dropped hidden", "dropped input", "of the weight", None]
)
def test_a_frozen_adapter_is_as_if_it_were_in_the_weight(trained):
    layer, twin = host(), host()
    layer.frozen = GatedAdapter(torch.randn(6, 64), torch.rand(6), torch.randn(6, 48))
    twin.weight = nn.Parameter(twin.weight + layer.frozen.delta(), requires_grad=False)
    assert not any("frozen" in name for name, _ in layer.named_parameters())
    for one in (layer, twin):
        if trained is None:
            one.adapter = None
        elif trained != "alone":
            one.dropout = Dropout(0.4, trained == "dropped input", torch.tensor(3), 0)
        if trained == "of the weight":
            one.initial = one.adapter.copy()
            one.adapter.A.data += 0.1
    x = torch.randn(2, 5, 64)
    found = []
    for one in (layer, twin):
        rows = x.clone().requires_grad_(True)
        y = one(rows)
        y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
        held = (
            [] if trained is None else [one.adapter.A.grad, one.adapter.g.grad, one.adapter.B.grad]
        )
        found.append([y.detach(), rows.grad, *held])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fmt", ["none", "nf4", "int8", "fp8"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("beside", ["nothing", "a frozen adapter", "a magnitude"])
def test_fixed_adapters_give_what_the_operator_gives(fmt, bias, beside):
    layer = host(fmt, bias).eval()
    x = torch.randn(2, 5, 64)
    W = layer.dequantised(torch.float32) + layer.adapter.delta()
    if beside == "a frozen adapter":
        layer.frozen = GatedAdapter(torch.randn(3, 64), torch.rand(3), torch.randn(3, 48))
        W = W + layer.frozen.delta()
    if beside == "a magnitude":
        layer.adapter.magnitude = Magnitude(layer.dequantised(torch.float32))
        layer.scales_rows = True
        W = W * (layer.adapter.magnitude.m.detach() / torch.linalg.vector_norm(W, dim=1))[:, None]
    with torch.no_grad():
        expected = layer(x)
        with fixed_adapters(nn.Sequential(layer)):
            first, again = layer(x), layer(x[:1, :1])
    dense = F.linear(x, W, layer.bias)
    assert torch.allclose(first, expected, rtol=1e-4, atol=1e-4)
    assert torch.allclose(first, dense, rtol=1e-4, atol=1e-4)
    assert torch.allclose(again, dense[:1, :1], rtol=1e-4, atol=1e-4)
    assert layer.fixed is None


def test_fixed_adapters_follow_the_next_values_and_the_dtype():
    """What is cast once is forgotten at the end of the context, also where that fails."""
    layer = host().eval()
    model, x = nn.Sequential(layer), torch.randn(3, 64)
    with pytest.raises(ZeroDivisionError), torch.no_grad(), fixed_adapters(model):
        model(x), 1 / 0
    assert layer.fixed is None
    with torch.no_grad():
        layer.adapter.B.mul_(2)
        with fixed_adapters(model):
            assert torch.allclose(model(x), reference(layer, x), rtol=1e-4, atol=1e-5)
            assert layer.fixed.keys() == {torch.float32}
        layer.adapter = None
        with fixed_adapters(model):
            assert torch.equal(model(x), F.linear(x, layer.weight, layer.bias))


def test_a_pass_with_fixed_adapters_has_three_products_and_no_cast():
    """A decoding step is bound by launches: x Aᵀ, its product with g ∘ B, and x Wᵀ on top."""
    layer = host(bias=False, dtype=torch.bfloat16).eval()
    x = torch.randn(2, 1, 64, dtype=torch.bfloat16)
    with torch.no_grad(), fixed_adapters(layer):
        layer(x)
        with Launched() as launched:
            layer(x)
    assert launched.names == ["mm", "mm", "addmm_"]


class Launched(TorchDispatchMode):
    """Operators that compute, by name: no views."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.__name__.split(".")[0]
        if name not in ("t", "view", "_unsafe_view", "transpose", "permute", "detach"):
            self.names.append(name)
        assert name != "_to_copy"
        return function(*arguments, **(keywords or {}))
