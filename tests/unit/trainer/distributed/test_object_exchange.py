"""Plain data as pages of bytes."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgpack
import pytest
import torch

from trainer.decisions.consensus import with_names, without_names
from trainer.distributed import object_exchange


def exchanged(values: list[Any], size: int) -> tuple[list[Any], list[int]]:
    """What ranks that send these values receive, and the size of each round's pages."""
    barrier = threading.Barrier(len(values), timeout=10)
    sent: list[torch.Tensor] = [torch.empty(0)] * len(values)
    rounds: list[int] = []

    def one(rank: int) -> list[Any]:
        def exchange_buffers(own: torch.Tensor) -> torch.Tensor:
            sent[rank] = own
            barrier.wait()
            received = torch.stack(sent)
            rounds.extend([len(own)] * (rank == 0))
            barrier.wait()
            return received

        return object_exchange.exchange(values[rank], exchange_buffers, size)

    with ThreadPoolExecutor(len(values)) as pool:
        received = list(pool.map(one, range(len(values))))
    assert all(values_of_rank == received[0] for values_of_rank in received)
    return received[0], rounds


def length(value: Any) -> int:
    return object_exchange.HEADER + len(object_exchange.encoded(value))


def test_small_values_take_one_round():
    values = [None, {"a": [1, 0.1 + 0.2, "ω"]}, [1, "x" * 100]]
    assert exchanged(values, 256) == (values, [256])


def test_a_value_that_does_not_fit_takes_a_second_round_for_all():
    values = ["short", "y" * 5000, 7]
    assert exchanged(values, 256) == (values, [256, length(values[1])])


@pytest.mark.parametrize("missing", [0, 1])
def test_a_page_is_used_to_its_last_byte(missing):
    values = ["z" * 400, None]
    found, rounds = exchanged(values, length(values[0]) - missing)
    assert found == values and len(rounds) == 1 + missing


def mixtral_decisions():
    """What LeLoRA and AdaLoRA say, and a selection of some units."""
    stems = [f"model.layers.{layer}.mlp.experts.gate_up_proj" for layer in range(32)]
    names = [f"{stem}.{index}" for stem in stems for index in range(20)]
    ranks = dict.fromkeys(names, 8)
    lelora = {"ranks": ranks, "locations": dict.fromkeys(names, "primary")}
    adalora = {"ranks": ranks, "kept": {name: list(range(24)) for name in names}, "final": False}
    some = {"survivors": names[:9], "ranks": dict.fromkeys(names[:9], 8), "omega": ranks}
    return names, lelora, adalora, some


@pytest.mark.parametrize("index", [0, 1, 2])
def test_names_that_all_know_are_left_out_and_put_back(index):
    names, *decisions = mixtral_decisions()
    decision = decisions[index]
    message = without_names(decision, names)
    again = with_names(msgpack.unpackb(object_exchange.encoded(message)), names)
    assert again == decision and list(again) == list(decision)
    assert (
        length(message) < length(decision) / 3
        and length([message, None]) <= object_exchange.MESSAGE_BYTES
    )


def test_no_decision_and_one_about_other_units():
    assert without_names(None, ["a"]) is None
    with pytest.raises(ValueError, match="zip"):
        with_names(without_names({"ranks": {"a": 1, "b": 2}}, ["a", "b"]), ["a"])
