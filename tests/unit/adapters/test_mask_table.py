"""Masks and gates of many adapters as one tensor each."""

import torch

from adapters.gated import GatedAdapter
from adapters.mask_table import MaskTable
from adapters.optimizer import MaskedAdamW, Trainable

RANKS = (2, 3, 1)


def adapters() -> list[GatedAdapter]:
    torch.manual_seed(0)
    return [GatedAdapter(torch.randn(r, 4), torch.randn(r), torch.randn(r, 5)) for r in RANKS]


def test_what_is_written_to_rows_holds_for_the_adapters():
    held = adapters()
    gates = torch.cat([adapter.g.detach() for adapter in held])
    rows = MaskTable(held)
    assert torch.equal(rows.gates, gates) and bool(rows.masks.all())
    rows.masks.copy_(torch.tensor([1, 0, 0, 1, 1, 0]))
    rows.write_gates(torch.arange(6))
    assert [adapter.mask.tolist() for adapter in held] == [[1, 0], [0, 1, 1], [0]]
    assert [adapter.g.tolist() for adapter in held] == [[0, 1], [2, 3, 4], [5]]
    assert rows.gates.tolist() == list(range(6))
    held[1].g.data[0] = 9.0
    assert rows.gates.tolist() == [0, 1, 9, 3, 4, 5]
    assert [mask.data_ptr() for mask in rows.by_adapter] == [a.mask.data_ptr() for a in held]


def test_gates_that_an_optimizer_took_are_found_where_it_keeps_them():
    held = adapters()
    rows = MaskTable(held)
    names = [(f"{index}.{role}", adapter, role) for index, adapter in enumerate(held)
             for role in ("A", "g", "B")]  # fmt: skip
    parameters = [Trainable(n, getattr(a, r).requires_grad_(), a.mask) for n, a, r in names]
    optimizer = MaskedAdamW(parameters, learning_rate=0.1)
    before = rows.gates.clone()
    rows.masks.copy_(torch.tensor([1, 0, 1, 1, 0, 0]))
    optimizer.gradients.fill_(1.0)
    optimizer.step()
    moved = torch.tensor([1.0, 0, 1, 1, 0, 0])
    torch.testing.assert_close(rows.gates, before - 0.1 * moved)
    rows.write_gates(torch.arange(6))
    assert [adapter.g.tolist() for adapter in held] == [[0, 1], [2, 3, 4], [5]]
    optimizer.rebind_parameters(parameters)  # a new buffer
    rows.write_gates(-torch.arange(6))
    assert [adapter.g.tolist() for adapter in held] == [[0, -1], [-2, -3, -4], [-5]]
    assert rows.gates.tolist() == [0, -1, -2, -3, -4, -5]


def test_no_adapters_have_no_rows():
    rows = MaskTable([])
    assert len(rows.masks) == len(rows.gates) == len(rows.by_adapter) == 0
    rows.write_gates(torch.zeros(0))
