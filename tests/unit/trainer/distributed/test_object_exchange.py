"""Plain data as fixed-size buffers, and nothing but plain data."""

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
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


@pytest.mark.parametrize(
    "value",
    [
        ("a", (1, [2.5, None])), {("key", 3): b"\xff", 7: True}, Path("runs/\udcff"), "\udcff",
        2**62, float("inf"), [], {}, (),
    ],
    ids=repr,
)  # fmt: skip
def test_what_arrives_has_the_types_that_were_sent(value):
    (found,), _ = exchanged([value], 256)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.bool, torch.uint8])
@pytest.mark.parametrize("shape", [(), (0, 3), (4, 2)])
def test_tensors_arrive_to_the_last_bit(dtype, shape):
    value = (torch.rand(shape, dtype=torch.float64) * 9).to(dtype)
    (found,), _ = exchanged([{"A": value}], 256)
    assert found["A"].dtype == dtype and torch.equal(found["A"], value)
    found["A"].zero_()  # memory of its own


def test_numpy_s_own_float_is_a_float():
    assert exchanged([[np.float64(0.1)]], 256)[0] == [[0.1]]


@pytest.mark.parametrize(
    "value", [object(), {1, 2}, ValueError("x"), np.ones(3)], ids=lambda v: type(v).__name__
)
def test_nothing_but_plain_data_is_sent(value):
    with pytest.raises(TypeError, match="is not plain data"):
        object_exchange.encoded([value])


def test_a_pickle_that_arrives_is_bytes(tmp_path):
    class Touches:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    sent = pickle.dumps(Touches())
    assert exchanged([sent], 256)[0] == [sent]
    assert not (tmp_path / "ran").exists()


def test_no_collective_of_the_project_pickles():
    root = Path(object_exchange.__file__).parents[2]
    files = [f for p in ("adapters", "trainer", "launch") for f in (root / p).rglob("*.py")]
    words = ("gather_object(", "object_list(", "torch.load(")
    found = [f.name for f in files if any(word in f.read_text() for word in words)]
    assert len(files) > 100 and found == []


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
    again = with_names(object_exchange.decoded(object_exchange.encoded(message)), names)
    assert again == decision and list(again) == list(decision)
    assert (
        length(message) < length(decision) / 3
        and length([message, None]) <= object_exchange.MESSAGE_BYTES
    )


def test_no_decision_and_one_about_other_units():
    assert without_names(None, ["a"]) is None
    with pytest.raises(ValueError, match="zip"):
        with_names(without_names({"ranks": {"a": 1, "b": 2}}, ["a", "b"]), ["a"])
