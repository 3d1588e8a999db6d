"""Rows end to end, padded to few lengths, against padded ones and each record alone."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from tests.unit.trainer.data.test_loader import dataset, loader, records_of, steps
from tests.unit.trainer.tasks.test_documents import alone, examples, gradients, made
from trainer.data.micro_batches import assign_micro_batches
from trainer.data.rows import Rows, enough_lengths, few_lengths
from trainer.model.attention import VARLEN, register_attention
from trainer.tasks.base import IGNORED
from trainer.tasks.causal_lm import CausalLM, CausalLMOptions

END_TO_END = Rows(end_to_end=True)


@pytest.fixture(scope="module")
def task(tokenizer) -> CausalLM:
    return CausalLM(CausalLMOptions(), tokenizer)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(seen=st.lists(st.integers(1, 30), min_size=1, max_size=12), count=st.integers(1, 5))
def test_the_lengths_that_add_least(seen: list[int], count: int) -> None:
    def added(lengths) -> int:
        return sum(min(length for length in lengths if length >= n) - n for n in seen)

    values = sorted(set(seen))
    ways = itertools.chain.from_iterable(
        itertools.combinations(values[:-1], k) for k in range(min(count, len(values)))
    )
    found = few_lengths(seen, count)
    assert len(found) <= count and found == sorted(found)
    assert added(found) == min(added((*way, values[-1])) for way in ways)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(seen=st.lists(st.integers(1, 2000), min_size=1, max_size=40), count=st.integers(1, 6))
def test_no_more_lengths_than_make_a_difference(seen: list[int], count: int) -> None:
    """With one fewer, half a percent of tokens would be added to the least; with these it is not."""

    def tokens(lengths: list[int]) -> int:
        return sum(min(length for length in lengths if length >= n) for n in seen)

    least, found = tokens(few_lengths(seen, count)), enough_lengths(seen, count)
    assert found == few_lengths(seen, len(found)) and tokens(found) <= 1.005 * least
    assert len(found) == 1 or tokens(few_lengths(seen, len(found) - 1)) > 1.005 * least


def test_row_lengths_of_packed_records() -> None:
    """GSM8K's, packed to 4096: one length in place of five that hardly differ, and one graph."""
    met = {4096: 238, 4080: 28, 4064: 35, 4048: 22, 4032: 19, 160: 1}
    seen = [length for length, count in met.items() for _ in range(count)]
    rows = Rows(few=8).fitted(seen, 4096).without_rare(seen)
    assert (rows.lengths, rows.frequent) == ((160, 4096), (4096,))


def test_rows_are_rounded_up() -> None:
    rows = Rows(few=3).fitted([100, 100, 500, 1000, 1010], 2000)
    assert rows.lengths == (112, 1024, 2000)
    assert [rows.rounded(n) for n in (1, 112, 113, 1024, 1025, 2000)] == [
        112, 112, 1024, 1024, 2000, 2000
    ]  # fmt: skip
    assert rows.rounded(2001) == 2001
    assert Rows().fitted([5], 7).rounded(6) == 6
    assert Rows(few=8, limit=500).fitted([490], 500).lengths == (496, 500)
    assert Rows(few=1).fitted([3, 4], 90_000).lengths == (90_112,)


@pytest.mark.parametrize("form", ["padded", "end to end"])
def test_frequent_row_lengths(form: str, task) -> None:
    """Those of a fiftieth of an epoch's micro-batches, and the longest; the same after a resume,
    in a later epoch and on every rank. Without shuffling later steps may be of any length."""
    data = dataset([96] + [20] * 5 + [50] * 150 + [70] * 144)
    rows = Rows(end_to_end=form == "end to end", few=4)
    options: dict[str, Any] = {"micro_batch_size": 1, "rows": rows}
    made = loader(data, task, **options)
    assert made.rows.lengths == (32, 64, 80, 96) and made.rows.frequent == (64, 80, 96)
    steps(made, 40)
    resumed = loader(data, task, **options, rank=1, world=3)
    resumed.load_state_dict(made.state_dict())
    resumed.micro_batch_size = 1
    assert resumed.rows == made.rows
    ordered = loader(data, task, **options, shuffle=False)
    assert ordered.rows.frequent == ordered.rows.lengths == (32, 64, 80, 96)


@pytest.mark.parametrize("kind", ["rotary, sdpa", "rotary, eager", "window", "sinks and window"])
@pytest.mark.parametrize("width", [0, 64])
def test_end_to_end_equals_padded_and_alone(kind: str, width: int, task) -> None:
    """Losses and all gradients; with `width`, behind 24 tokens of padding."""
    model, records = made(kind), examples()
    sequences = [[record] for record in records]
    batch = task.collate(END_TO_END.laid(sequences), width=width)
    assert batch.targets.shape == (1, max(width, 40)) and batch.tokens == 40
    expected = alone(model, records)
    reference = gradients(model, expected)
    for form in (batch, task.collate(sequences), task.collate(sequences, width=24)):
        loss, _ = task.loss(model, form)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        difference = gradients(model, loss) - reference
        assert float(difference.norm() / reference.norm()) < 1e-5


def test_end_to_end_by_document(llama_config, task) -> None:
    """The attention that GPUs use, in the CPU's form of its kernel."""
    model, records = LlamaForCausalLM(llama_config("sdpa")), examples()
    expected = alone(model, records)
    reference = gradients(model, expected)
    register_attention()
    model.set_attn_implementation(VARLEN)
    for width in (0, 60):
        batch = task.collate(END_TO_END.laid([[record] for record in records]), width=width)
        loss, _ = task.loss(model, batch)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        difference = gradients(model, loss) - reference
        assert float(difference.norm() / reference.norm()) < 1e-5


def test_padding_is_documents_no_longer_than_the_longest(task) -> None:
    """Some models scale all positions by the largest one."""
    batch = task.collate([examples((5, 3))], width=20)
    positions = batch.inputs["position_ids"][0].tolist()
    assert positions == [*range(5), *range(3), *range(5), *range(5), 0, 1]
    assert (batch.targets[0, 8:] == IGNORED).all()
    assert (batch.weight, batch.tokens) == (2, 8)
    assert task.collate([examples((5,))], empty=True, width=9).weight == 0


KEYS: dict[str, dict[str, Any]] = {
    "count": {},
    "tokens": {"micro_batch_size": None, "micro_batch_tokens": 90},
    "packed": {"packing": True, "micro_batch_size": 2},
}


@pytest.mark.parametrize("form", KEYS)
def test_a_step_costs_its_tokens(form: str, task) -> None:
    """End to end, the loader's micro-batches hold the records of the padded ones, in few lengths."""
    data = dataset(np.random.default_rng(5).integers(2, 40, 53).tolist())
    padded = steps(loader(data, task, **KEYS[form]), 12)
    tight = steps(loader(data, task, rows=END_TO_END, **KEYS[form]), 12)
    few = loader(data, task, rows=Rows(end_to_end=True, few=3), **KEYS[form])
    rounded = steps(few, 12)
    assert len(few.rows.lengths) <= 3
    for step, other, third in zip(padded, tight, rounded, strict=True):
        assert sorted(records_of(step)) == sorted(records_of(other)) == sorted(records_of(third))
        assert (step.weight, step.tokens, step.epoch) == (other.weight, other.tokens, other.epoch)
        for _, batch in other.micro_batches:
            assert batch.targets.numel() == batch.tokens
        for _, batch in third.micro_batches:
            assert batch.targets.shape[1] in few.rows.lengths
            assert batch.tokens <= batch.targets.shape[1]
        if form == "tokens":
            assert all(batch.targets.numel() <= 90 for _, batch in step.micro_batches)
            assert all(batch.tokens <= 90 for _, batch in other.micro_batches)


def test_an_empty_micro_batch_of_a_row(task) -> None:
    few = dataset([7, 12, 5])
    parts = [[np.array([0]), np.array([1])], [np.array([2])]]
    (_, batch), (index, empty) = assign_micro_batches(
        [*parts, [np.array([0])]], few, task, Rows(end_to_end=True, lengths=(16,)), 1, 2
    )
    assert batch.records == [2] and index == 3
    assert empty.targets.shape == (1, 16) and (empty.targets == IGNORED).all()
    assert (empty.records, empty.weight, empty.tokens) == ([], 0, 0)
