"""Masked AdamW against torch's AdamW and a NumPy reference."""

import numpy as np
import pytest
import torch
from torch import nn

from adapters.optimizer import MaskedAdamW, Trainable


def parameters(seed=0):
    torch.manual_seed(seed)
    return [nn.Parameter(torch.randn(shape)) for shape in ((4, 10), (4,), (3, 7), (5, 1))]


def trainables(tensors, masks=None):
    masks = masks or [None] * len(tensors)
    return [Trainable(f"p{i}", p, m) for i, (p, m) in enumerate(zip(tensors, masks, strict=True))]


def set_gradients(tensors, step):
    torch.manual_seed(100 + step)
    for tensor in tensors:
        tensor.grad.copy_(torch.randn_like(tensor))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_without_masks_it_is_torch_adamw(weight_decay):
    ours, theirs = parameters(), parameters()
    settings = {"betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": weight_decay}
    optimizer = MaskedAdamW(trainables(ours), learning_rate=1e-2, **settings)
    reference = torch.optim.AdamW(theirs, lr=1e-2, **settings)
    for step in range(12):
        set_gradients(ours, step)
        for mine, other in zip(ours, theirs, strict=True):
            other.grad = mine.grad.clone()
        optimizer.step()
        reference.step()
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, other, atol=1e-6)


def test_masked_rows_follow_their_own_step_count():
    """NumPy, row by row: a row moves only when active, and t counts its active steps."""
    tensor = nn.Parameter(torch.randn(4, 6))
    value = tensor.detach().double().numpy().copy()
    mask = torch.ones(4, dtype=torch.bool)
    optimizer = MaskedAdamW(
        [Trainable("p", tensor, mask)], learning_rate=1e-2, betas=(0.9, 0.95), weight_decay=0.1
    )
    m, v, t = np.zeros((4, 6)), np.zeros((4, 6)), np.zeros(4)
    rng = np.random.default_rng(0)
    for _ in range(20):
        active = rng.random(4) < 0.6
        mask.copy_(torch.from_numpy(active))
        gradient = rng.normal(size=(4, 6))
        tensor.grad.copy_(torch.from_numpy(gradient))
        optimizer.clip(None)
        optimizer.step()
        for row in np.flatnonzero(active):
            t[row] += 1
            m[row] = 0.9 * m[row] + 0.1 * gradient[row]
            v[row] = 0.95 * v[row] + 0.05 * gradient[row] ** 2
            direction = (m[row] / (1 - 0.9 ** t[row])) / (
                np.sqrt(v[row] / (1 - 0.95 ** t[row])) + 1e-8
            )
            value[row] -= 1e-2 * (0.1 * value[row] + direction)
    assert np.abs(tensor.detach().numpy() - value).max() < 1e-6
    assert optimizer.state_dict()["p"]["step"].tolist() == t.tolist()


def test_inactive_rows_keep_every_bit():
    tensors = parameters()
    masks = [
        torch.tensor([1, 0, 1, 0], dtype=torch.bool),
        torch.tensor([0, 1, 1, 0]).bool(),
        None,
        None,
    ]
    tensors[0].data[1, 0] = -0.0
    optimizer = MaskedAdamW(trainables(tensors, masks), learning_rate=0.1, weight_decay=0.5)
    for mask in masks[:2]:
        mask.fill_(True)
    set_gradients(tensors, 0)
    optimizer.step()  # moments are not zero any more
    masks[0].copy_(torch.tensor([1, 0, 1, 0]))
    masks[1].copy_(torch.tensor([0, 1, 1, 0]))

    def bits(state):
        return {(n, k): t.clone().view(torch.int32) for n, s in state.items() for k, t in s.items()}

    values, moments = [t.detach().clone() for t in tensors], bits(optimizer.state_dict())
    set_gradients(tensors, 1)
    tensors[0].grad[1] = float("inf")  # an inactive row's gradient counts for nothing
    assert np.isfinite(optimizer.clip(1.0))
    optimizer.step()
    after = bits(optimizer.state_dict())
    for index, mask in enumerate(masks[:2]):
        still, moved = ~mask, mask
        now, before = tensors[index].detach(), values[index]
        assert torch.equal(now[still].view(torch.int32), before[still].view(torch.int32))
        assert not torch.equal(now[moved], before[moved])
        for key in ("exp_avg", "exp_avg_sq", "step"):
            old, new = moments[(f"p{index}", key)], after[(f"p{index}", key)]
            assert torch.equal(old[still], new[still]) and not torch.equal(old[moved], new[moved])


def test_clip_is_torch_clip_grad_norm():
    ours, theirs = parameters(), parameters()
    optimizer = MaskedAdamW(trainables(ours), learning_rate=1e-2)
    set_gradients(ours, 0)
    for mine, other in zip(ours, theirs, strict=True):
        other.grad = mine.grad.clone()
    expected = torch.nn.utils.clip_grad_norm_(theirs, 0.7)
    assert optimizer.clip(0.7) == pytest.approx(expected.item(), rel=1e-6)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine.grad, other.grad, atol=1e-7)


def test_a_scaled_tensor_is_clipped_and_learns_as_what_it_is_a_multiple_of():
    """θ = 3 φ beside another tensor, against torch's AdamW on φ itself, clipped."""
    phi, other = torch.randn(4), torch.randn(2, 3)
    target = torch.randn(4)

    def loss(theta, beside):
        return ((theta - target) ** 2).sum() + (beside**2).sum()

    ours = [torch.nn.Parameter(3 * phi), torch.nn.Parameter(other.clone())]
    theirs = [torch.nn.Parameter(phi.clone()), torch.nn.Parameter(other.clone())]
    mine = MaskedAdamW(
        [Trainable("theta", ours[0], scale=3.0), Trainable("other", ours[1])],
        learning_rate=0.05, weight_decay=0.1,
    )  # fmt: skip
    torchs = torch.optim.AdamW(theirs, lr=0.05, weight_decay=0.1)
    for _ in range(5):
        mine.zero_grad()
        torchs.zero_grad()
        loss(*ours).backward()
        loss(3 * theirs[0], theirs[1]).backward()
        expected = torch.nn.utils.clip_grad_norm_(theirs, 0.7)
        assert mine.clip(0.7) == pytest.approx(float(expected), rel=1e-5)
        mine.step()
        torchs.step()
    torch.testing.assert_close(ours[0].detach(), 3 * theirs[0].detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours[1].detach(), theirs[1].detach(), rtol=1e-4, atol=1e-5)


def test_parameters_can_be_differentiated_and_stepped_as_usual():
    layer = nn.Linear(6, 3)
    optimizer = MaskedAdamW(
        [Trainable(n, p) for n, p in layer.named_parameters()], learning_rate=0.05
    )
    x, target = torch.randn(32, 6), torch.randn(32, 3)
    losses = []
    for _ in range(60):
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert torch.equal(optimizer.gradients, torch.zeros_like(optimizer.gradients))


def test_follow_keeps_moments_of_what_stays():
    first, second, third = parameters()[:3]
    optimizer = MaskedAdamW(trainables([first, second, third]), learning_rate=1e-2)
    set_gradients([first, second, third], 0)
    optimizer.step()
    kept = {k: t.clone() for k, t in optimizer.state_dict()["p0"].items()}
    value = first.detach().clone()
    fresh = nn.Parameter(torch.randn(2, 2))
    optimizer.rebind_parameters([Trainable("new", fresh), Trainable("p0", first)])
    assert torch.equal(first, value)
    state = optimizer.state_dict()
    assert set(state) == {"new", "p0"}
    assert all(torch.equal(state["p0"][key], kept[key]) for key in kept)
    assert state["new"]["step"].tolist() == [0.0, 0.0]


def test_state_round_trip_continues_exactly():
    ours, copy = parameters(), parameters()
    masks = [torch.tensor([1, 0, 1, 1]).bool(), None, None, None]
    first = MaskedAdamW(trainables(ours, masks), learning_rate=1e-2, weight_decay=0.1)
    for step in range(3):
        set_gradients(ours, step)
        first.step()
    second = MaskedAdamW(trainables(copy, masks), learning_rate=1e-2, weight_decay=0.1)
    for mine, other in zip(ours, copy, strict=True):
        other.data.copy_(mine)
    second.load_state_dict(
        {n: {k: t.clone() for k, t in s.items()} for n, s in first.state_dict().items()}
    )
    for tensors, optimizer in ((ours, first), (copy, second)):
        set_gradients(tensors, 9)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, copy, strict=True))


def test_learning_rate_ratio():
    slow, fast = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2, 2))
    optimizer = MaskedAdamW(
        [Trainable("A", slow), Trainable("B", fast, learning_rate_ratio=16.0)], learning_rate=1e-3
    )
    slow.grad.fill_(1.0)
    fast.grad.fill_(1.0)
    optimizer.step()
    assert torch.allclose(fast, 16 * slow)


def test_counters_decide_which_tensors_saw_tokens_and_keep_no_old_buffer():
    """A tensor whose counter is 0 stays to the last bit; one without a counter always moves."""
    first, second, third = parameters()[:3]
    tokens = nn.Parameter(torch.zeros(2))
    mine = [
        Trainable("first", first, token_counter=(tokens, 0)),
        Trainable("second", second, token_counter=(tokens, 1)),
        Trainable("third", third),
        Trainable("tokens", tokens, observed=True),
    ]
    optimizer = MaskedAdamW(mine, learning_rate=0.1, weight_decay=0.5)
    set_gradients([first, second, third], 0)
    tokens.grad.copy_(torch.tensor([0.0, 3.0]))
    saw_tokens = optimizer.active_rows.saw_tokens()
    assert saw_tokens is not None
    rows = [len(first), len(second), len(third)]
    assert [part.unique().tolist() for part in saw_tokens.split(rows)] == [[False], [True], [True]]
    before = [p.detach().clone() for p in (first, second, third)]
    optimizer.clip(1.0)
    optimizer.step()
    same = [torch.equal(a, b) for a, b in zip(before, (first, second, third), strict=True)]
    assert same == [True, False, False]
    optimizer.rebind_parameters([Trainable("third", third)])
    assert tokens.grad is None and optimizer.active_rows.saw_tokens() is None


def units_and_a_head(R=(3, 3), counters=()):
    """Two units' A, g, B and a head's weight."""
    shapes = [(R[0], 5), (R[0],), (R[0], 4), (R[1], 7), (R[1],), (R[1], 2), (6, 9)]
    tensors = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    roles = [*"AgBAgB", None]
    of_unit = [None, *counters] if counters else [None] * 3
    return tensors, [
        Trainable(f"t{i}", tensor, role=role, token_counter=of_unit[i // 3 + 1] if role else None)
        for i, (tensor, role) in enumerate(zip(tensors, roles, strict=True))
    ]


def test_sums_by_component_are_of_units_and_roles_alone():
    tensors, held = units_and_a_head()
    optimizer = MaskedAdamW(held, learning_rate=1e-2)
    expected = torch.stack([t.detach().reshape(3, -1).sum(1) for t in tensors[:6]]).view(2, 3, 3)
    torch.testing.assert_close(optimizer.by_component(optimizer.values), expected)
    assert optimizer.units_that_saw_tokens() is None
    without_g = MaskedAdamW([t for t in held if t.role != "g"], learning_rate=1e-2)
    torch.testing.assert_close(without_g.by_component(without_g.values), expected[:, [0, 2]])


def test_units_of_different_rank_have_no_common_shape():
    optimizer = MaskedAdamW(units_and_a_head((3, 2))[1], learning_rate=1e-2)
    with pytest.raises(AssertionError, match="different R"):
        optimizer.by_component(optimizer.values)


def test_units_that_saw_tokens():
    tokens = nn.Parameter(torch.zeros(2))
    _, held = units_and_a_head(counters=[(tokens, 0), (tokens, 1)])
    optimizer = MaskedAdamW([*held, Trainable("tokens", tokens, observed=True)], learning_rate=0.1)
    tokens.grad.copy_(torch.tensor([0.0, 4.0]))
    assert optimizer.units_that_saw_tokens().tolist() == [False, True]
