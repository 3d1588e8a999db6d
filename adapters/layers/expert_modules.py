"""Modules of stacked experts, in the forms that transformers' models have.

Most classes of experts follow one contract (`use_experts_implementation`): two stacks, an input
projection and a `down_proj`,

    y = down(act(up x))        or        y = down(gate(gate_up x))

with flags for the storage (`is_transposed`: (E, in, out)), biases per expert, the absence of a gate
and a norm after each expert. What the gate computes, with which halves of its input, is the class's
own `_apply_gate`. Llama 4 passes all tokens through all experts, scaled by the router.
"""

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adapters.layers.experts import StackedLinear

_ROUTED = 3
"""Arguments of a module of experts: hidden states, chosen experts, their weights."""


@dataclass(frozen=True)
class ExpertsForm:
    """How a model's module of experts holds its stacks and is called."""

    up: str
    """Its input projection, `gate_up_proj` or, without a gate, `up_proj`."""
    transposed: bool
    """Whether the stacks are (E, in, out)."""
    biased: bool
    routed: bool
    """Called with each token's experts and their weights; else with the rows of all experts."""

    @property
    def stacks(self) -> tuple[str, str]:
        return self.up, "down_proj"

    @property
    def biases(self) -> tuple[str, ...]:
        return tuple(f"{name}_bias" for name in self.stacks) if self.biased else ()

    def shapes(self, experts: nn.Module) -> list[tuple[int, int, int]]:
        """(E, out, in) of each stack."""
        found = []
        for name in self.stacks:
            count, rows, columns = getattr(experts, name).shape
            found.append((count, columns, rows) if self.transposed else (count, rows, columns))
        return found


def experts_form(module: nn.Module) -> ExpertsForm | None:
    """The form of a module of experts; None if it is none, or of another form."""
    form = _contract(module) or _all_rows(module)
    if form is None:
        return None
    own = dict(module.named_parameters(recurse=False))
    expected = {*form.stacks, *form.biases}
    if own.keys() != expected or any(True for _ in module.buffers(recurse=False)):
        return None
    if any(own[name].dim() != 3 for name in form.stacks):
        return None
    (experts, up_out, up_in), (other_experts, down_out, down_in) = form.shapes(module)
    halved = 2 if form.up == "gate_up_proj" else 1
    if (other_experts, down_out, down_in * halved) != (experts, up_in, up_out):
        return None
    biases = [tuple(own[name].shape) for name in form.biases]
    if form.biased and biases != [(experts, up_out), (experts, down_out)]:
        return None
    return form


def _contract(module: nn.Module) -> ExpertsForm | None:
    """The form by the flags of `use_experts_implementation`. A class with an `_apply_gate` but no
    flags has their defaults."""
    gate = getattr(type(module), "_apply_gate", None)
    has_gate = getattr(module, "has_gate", gate is not None)
    flagged = hasattr(module, "has_gate") and hasattr(module, "is_transposed")
    if not (flagged or gate is not None) or _arguments(module) != _ROUTED:
        return None
    if not has_gate and not hasattr(module, "act_fn"):
        return None
    if has_gate and (
        gate is None
        or (gate.__name__ == "_default_apply_gate" and not hasattr(module, "act_fn"))
        or (gate.__name__ == "_default_apply_gate" and not getattr(module, "is_concatenated", True))
    ):
        return None
    return ExpertsForm(
        up="gate_up_proj" if has_gate else "up_proj",
        transposed=getattr(module, "is_transposed", False),
        biased=getattr(module, "has_bias", False),
        routed=True,
    )


def _all_rows(module: nn.Module) -> ExpertsForm | None:
    """The form of Llama 4's experts: act(gate) · up on transposed stacks, for all rows of all
    experts, sorted by expert."""
    stacks = (getattr(module, name, None) for name in ("gate_up_proj", "down_proj"))
    if not all(isinstance(stack, nn.Parameter) for stack in stacks):
        return None
    if hasattr(module, "has_gate") or not hasattr(module, "act_fn") or _arguments(module) != 1:
        return None
    return ExpertsForm(up="gate_up_proj", transposed=True, biased=False, routed=False)


def _arguments(module: nn.Module) -> int:
    """Number of arguments of the class's own forward."""
    forward = inspect.unwrap(type(module).forward)
    return len(inspect.signature(forward).parameters) - 1


class AdaptedExperts(nn.Module):
    """Replaces transformers' module of stacked experts in a mixture.

    A copy of the model's module without its parameters stays as the holder of its gate and
    constants; the modules in it (norms, activations) keep their paths.
    """

    _own: Any
    down_proj: StackedLinear
    post_expert_norm: nn.Module

    def __init__(self, experts: Any):
        super().__init__()
        form = experts_form(experts)
        assert form is not None
        self.form = form
        for name in form.stacks:
            setattr(self, name, StackedLinear(getattr(experts, name), transposed=form.transposed))
        for name in form.biases:
            self.register_parameter(name, getattr(experts, name))
        for name, child in experts.named_children():
            self.add_module(name, child)
        own = copy.copy(experts)
        own._parameters = {}
        # Not registered with nn.Module: sharders and paths know its children as this module's.
        self.__dict__["_own"] = own

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether `module` is one of experts in a form that can take adapters."""
        return experts_form(module) is not None

    @property
    def experts(self) -> int:
        """Their number."""
        return self.down_proj.experts

    @property
    def swapped(self) -> bool:
        """Whether PEFT takes the stacks, (E, in, out), for (E, out, in): it asks the module's
        `is_transposed`, which Llama 4's lacks."""
        return self.form.transposed and not getattr(self._own, "is_transposed", False)

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor | None = None,
        top_k_weights: Tensor | None = None,
    ) -> Tensor:
        """hidden_states (T, H), top_k_index and top_k_weights (T, k) → (T, H); or, unrouted, rows
        (E · T, H) of all experts → (E · T, H)."""
        if top_k_index is None or top_k_weights is None:
            return self._all_rows(hidden_states)
        k = top_k_index.shape[1]
        sorted_experts, order = top_k_index.flatten().sort(stable=True)
        # Nothing here synchronises with the device: no shape depends on the routing.
        numbers = torch.arange(self.experts, device=order.device)
        offsets = torch.searchsorted(sorted_experts, numbers, right=True).int()
        inverse = order.argsort()
        x = _Dispatch.apply(hidden_states, order, inverse, k)
        y = self._products(x, offsets, sorted_experts)
        if getattr(self._own, "has_post_expert_norm", False):
            y = self.post_expert_norm(y)
        y = (y * top_k_weights.flatten()[order].unsqueeze(1)).to(hidden_states.dtype)
        return _Combine.apply(y, order, inverse, k)

    def _all_rows(self, x: Tensor) -> Tensor:
        x = x.view(-1, x.shape[-1])
        numbers = torch.arange(1, self.experts + 1, device=x.device)
        offsets = (numbers * (x.shape[0] // self.experts)).int()
        y = self._products(x, offsets, None)
        # A token's row is zero for experts that it did not choose: without a gradient it does not
        # count as one of their tokens.
        return y * (x.detach() != 0).any(1, keepdim=True)

    def _products(self, x: Tensor, offsets: Tensor, expert_of: Tensor | None) -> Tensor:
        """Rows (N, H) sorted by expert → (N, H); `expert_of` (N,) is needed with biases."""
        up, down = (getattr(self, name) for name in self.form.stacks)
        y = up(x, offsets)
        if self.form.biased:
            y = y + getattr(self, self.form.biases[0])[expert_of].to(y.dtype)
        own = self._own
        if self.form.up == "up_proj":
            y = own.act_fn(y)
        elif hasattr(own, "_apply_gate"):
            y = own._apply_gate(y)
        else:
            gate, y = y.chunk(2, dim=-1)
            y = own.act_fn(gate) * y
        y = down(y, offsets)
        if self.form.biased:
            y = y + getattr(self, self.form.biases[1])[expert_of].to(y.dtype)
        return y


def swapped_stacks(model: nn.Module) -> set[str]:
    """Paths of the stacks that PEFT takes for transposed ones."""
    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, AdaptedExperts) and module.swapped
        for name in module.form.stacks
    }


class _Dispatch(torch.autograd.Function):
    """Copies each token to its k experts, sorted by expert."""

    @staticmethod
    def forward(ctx, x, order, inverse, k):
        ctx.save_for_backward(inverse)
        ctx.k = k
        return x[order // k]

    @staticmethod
    def backward(ctx, dy):
        (inverse,) = ctx.saved_tensors
        return _summed(dy, inverse, ctx.k), None, None, None


class _Combine(torch.autograd.Function):
    """Adjoint of `_Dispatch`: sums the outputs of a token's k experts in a fixed order."""

    @staticmethod
    def forward(ctx, y, order, inverse, k):
        ctx.save_for_backward(order)
        ctx.k = k
        return _summed(y, inverse, k)

    @staticmethod
    def backward(ctx, dx):
        (order,) = ctx.saved_tensors
        return dx[order // ctx.k], None, None, None


def _summed(rows: Tensor, inverse: Tensor, k: int) -> Tensor:
    return rows[inverse].view(-1, k, rows.shape[-1]).sum(1)
