"""Mixtures: shares, order, positions that are resumed, and what else looks at records."""

import heapq
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.trainer.data.test_loader import dataset, records_of, steps
from trainer.config.data_options import DataOptions
from trainer.data.held_out import left_out
from trainer.data.loader import Loader
from trainer.data.mixture import MixedDataset, Source, prepare_training
from trainer.data.rows import Rows
from trainer.errors import UserError
from trainer.tasks.causal_lm import CausalLM, CausalLMOptions

SIZES, WEIGHTS = (53, 200, 31), (3, 5, 2.5)


@pytest.fixture(scope="module")
def task(tokenizer) -> CausalLM:
    return CausalLM(CausalLMOptions(), tokenizer)


def mixed(sizes: Any = SIZES, weights: Any = WEIGHTS, until: Any = "first") -> MixedDataset:
    draw = np.random.default_rng(1)
    lengths = [draw.integers(2, 10 * (i + 2), size).tolist() for i, size in enumerate(sizes)]
    parts = [dataset(one, seed) for seed, one in enumerate(lengths)]
    return MixedDataset(list(map(Source, "abc", parts, weights)), until)


def loader(data: MixedDataset, task, rank: int = 0, world: int = 1, **keys: Any) -> Loader:
    held, rows = keys.pop("left_out", ()), keys.pop("rows", Rows())
    keys = {"batch_size": 16, "micro_batch_size": 3, "max_length": 40, **keys}
    options = DataOptions(mixture=[{"train": "-", "weight": 1}], **keys)
    return Loader(data, task, options, 3, rank, world, held, rows)


def drawn(of: Loader, count: int) -> list[int]:
    """The examples of the next `count` optimizer steps, step by step (in a step by length)."""
    return [i for _ in range(count) for part in of._next_parts() for row in part for i in row]


def in_order(of: Loader, epochs: int) -> np.ndarray:
    return np.concatenate([np.concatenate(of.sequences(epoch)) for epoch in range(epochs)])


# --- shares and order


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("until", ["first", "last"])
@pytest.mark.parametrize("weights", [WEIGHTS, (1, 1, 1), (0.004, 0.75, 0.246)])
def test_shares_over_1000_steps(task, weights, until, packing: bool) -> None:
    data = mixed(weights=weights, until=until)
    sources = data.source_of(np.array(drawn(loader(data, task, packing=packing), 1000)))
    assert len(sources) >= 16_000
    found = np.bincount(sources, minlength=3) / len(sources)
    assert np.abs(found - np.array(weights) / sum(weights)).max() < 0.01


def test_shares_hold_from_the_start_on(task) -> None:
    """Never more than a few records off, so not in blocks either."""
    for until in ("first", "last"):
        data = mixed(until=until)
        sources = data.source_of(in_order(loader(data, task), 40))
        counts = np.cumsum(sources[:, None] == np.arange(3), axis=0)
        exact = np.arange(1, len(sources) + 1)[:, None] * np.array(WEIGHTS) / sum(WEIGHTS)
        assert np.abs(counts - exact).max() < 2


def test_packed_shares_hold_within_a_long_epoch(task) -> None:
    """Where the sources differ in length, so that rows hold one record or many."""
    draw = np.random.default_rng(0)
    long, short = (dataset(draw.integers(*of, 12_000).tolist()) for of in ((30, 40), (2, 6)))
    data = MixedDataset([Source("long", long, 1), Source("short", short, 3)], "first")
    of = loader(data, task, packing=True, batch_size=4)
    sources = data.source_of(np.array(drawn(of, 1000)))
    assert of.epoch == 0 and len(sources) > 3 * 4000
    assert np.mean(sources == 0) == pytest.approx(0.25, abs=0.01)


def events(weight: Fraction, source: int) -> Iterator[tuple[Fraction, int]]:
    for k in itertools.count():
        yield (k + Fraction(1, 2)) / weight, source


@pytest.mark.parametrize("until", ["first", "last"])
def test_the_order_of_sources_is_that_of_exact_arithmetic(task, until: str) -> None:
    weights = (2, 4, 1)  # no two sources give an example at the same time
    data = mixed(weights=weights, until=until)
    lengths = [Fraction(size, weight) for size, weight in zip(SIZES, weights, strict=True)]
    epoch = min(lengths) if until == "first" else max(lengths)
    merged = heapq.merge(*(events(Fraction(weight), i) for i, weight in enumerate(weights)))
    expected = itertools.takewhile(lambda event: event[0] < 7 * epoch, merged)
    of = loader(data, task)
    assert data.source_of(in_order(of, 7)).tolist() == [source for _, source in expected]
    in_epoch = [Counter(data.source_of(np.concatenate(of.sequences(e))).tolist()) for e in range(7)]
    ending = lengths.index(epoch)
    assert all(counts[ending] == SIZES[ending] for counts in in_epoch)
    for source, size in enumerate(SIZES):
        for counts in in_epoch:
            assert counts[source] <= size if until == "first" else counts[source] >= size


@pytest.mark.parametrize("until", ["first", "last"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_source_is_used_up_before_it_repeats(task, until: str, shuffle: bool) -> None:
    data = mixed(until=until)
    held = np.array([0, 60, 61, 283])
    order = in_order(loader(data, task, shuffle=shuffle, left_out=held), 30)
    for source in range(3):
        own = np.setdiff1d(np.arange(*data.bounds[source:][:2]), held)
        taken = order[data.source_of(order) == source]
        passes = [taken[at : at + len(own)] for at in range(0, len(taken), len(own))]
        assert len(passes) > 2
        assert all(sorted(one) == own.tolist() for one in passes[:-1])
        assert len({tuple(one) for one in passes[:-1]}) == (len(passes) - 1 if shuffle else 1)


def test_the_order_depends_on_the_seed_only(task) -> None:
    data = mixed()
    first, again = loader(data, task), loader(data, task, rank=1, world=3)
    orders = [np.concatenate(first.sequences(epoch)).tolist() for epoch in (0, 1, 2)]
    assert [np.concatenate(again.sequences(e)).tolist() for e in (2, 0, 1)] == [
        orders[2], orders[0], orders[1],
    ]  # fmt: skip
    last = in_order(loader(mixed(until="last"), task), 2).tolist()
    assert last[: len(orders[0])] == orders[0], "when epochs end changes nothing else"
    other = Loader(data, task, loader(data, task).options, 4, 0, 1)
    assert np.concatenate(other.sequences(0)).tolist() != orders[0]


BATCHES: dict[str, dict[str, Any]] = {
    "padded": {},
    "packed": {"packing": True},
    "by tokens": {"micro_batch_size": None, "micro_batch_tokens": 120},
    "few row lengths": {"rows": Rows(few=2)},
    "until last": {},
}


@pytest.mark.parametrize("name", BATCHES)
def test_resumed_in_the_middle_on_another_number_of_ranks(task, name: str) -> None:
    data = mixed(until="last" if name == "until last" else "first")

    def records(world: int, position: dict, count: int) -> tuple[list[list[int]], dict]:
        """The records of each step, by micro-batch, and the position after them."""
        ranks = [loader(data, task, rank, world, **BATCHES[name]) for rank in range(world)]
        for of in ranks:
            of.load_state_dict(position)
        of_ranks = [steps(of, count) for of in ranks]
        together = [
            [batch.records for _, batch in sorted(
                (part for one in same for part in one.micro_batches if part[1].records),
                key=lambda part: part[0],
            )]
            for same in zip(*of_ranks, strict=True)
        ]  # fmt: skip
        states = [of.state_dict() for of in ranks]
        assert all(state == states[0] for state in states)
        return together, json.loads(json.dumps(states[0]))

    start = loader(data, task, **BATCHES[name]).state_dict()
    whole, _ = records(1, start, 40)
    for worlds in ((1, 2, 3), (3, 1, 2)):
        position, found = start, []
        for world, count in zip(worlds, (7, 18, 15), strict=True):
            taken, position = records(world, position, count)
            found += taken
        assert found == whole
        assert position["epoch"] >= 1


def test_the_steps_of_a_run_are_the_same_when_it_resumes(task) -> None:
    of = loader(mixed(), task, packing=True)
    total = of.steps_for(3.5)
    steps(of, 9)
    assert of.epoch > 0 and of.steps_for(3.5) == total


# --- as one data set


def test_examples_records_and_counts_are_those_of_the_sources() -> None:
    data = mixed()
    for source, part in enumerate(data.sources):
        for index in (0, 7, len(part.data) - 1):
            at = int(data.bounds[source]) + index
            assert data[at] == part.data[index]
            assert data.lengths[at] == len(data[at].input_ids)
            assert data.weights[at] == sum(data[at].loss_mask)
    assert len(data) == sum(SIZES) and data.records.tolist() == list(range(sum(SIZES)))
    keys = {mixed(weights=w, until=u).key for w in (WEIGHTS, (1, 1, 1)) for u in ("first", "last")}
    assert len(keys) == 4 and mixed().key in keys


def test_what_is_left_out_is_never_drawn(task) -> None:
    data = mixed()
    held = left_out(data, 90, 5)
    assert {0, 1, 2} == set(data.source_of(held).tolist())
    assert not set(drawn(loader(data, task, left_out=held), 60)) & set(held.tolist())


def write(path: Path, rows: list[dict] | str) -> str:
    text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text)
    return str(path)


def test_sources_of_several_formats(tmp_path: Path, task) -> None:
    qa = write(tmp_path / "qa.jsonl", [{"q": f"q{i}", "a": f"a{i}"} for i in range(5)])
    table = write(tmp_path / "t.tsv", "one\ttwo\nthree\tfour\n")
    text = write(tmp_path / "b.txt", "first\n\nsecond\n\nthird\n")
    options = DataOptions.model_validate(
        {
            "mixture": [
                {"train": qa, "weight": 2, "train_records": 4},
                {"train": table, "weight": 1, "columns": ["q", "a"], "completion": "{a}!"},
                {"train": [text, text], "weight": 0.5, "format": "text"},
            ],
            "prompt": "{q}?", "completion": "a", "cache": str(tmp_path / "cache"),
        }
    )  # fmt: skip
    data = prepare_training(options, task)
    assert isinstance(data, MixedDataset)
    texts = [task.tokenizer.decode(data[i].input_ids) for i in range(len(data))]
    expected = ["q0?a0", "q1?a1", "q2?a2", "q3?a3", "one?two!", "three?four!"]
    expected += ["first", "second", "third"] * 2
    assert texts == [f"{text}</s>" for text in expected]
    assert data.counts.used == 12
    assert list(data.named_parts()) == [
        f"source 1: {qa}, 57.1%", f"source 2: {table}, 28.6%", f"source 3: {text}, {text}, 14.3%",
    ]  # fmt: skip
    assert len(list((tmp_path / "cache").iterdir())) == 3, "each source is cached on its own"
    again = DataOptions.model_validate(options.model_dump())
    assert again == options and prepare_training(again, task).key == data.key


MISTAKES: dict[str, tuple[dict, str]] = {
    "no weight": ({"weight": 0}, "data.mixture.1.weight: 0 given; accepted: greater than 0"),
    "negative": ({"weight": -1.5}, "data.mixture.1.weight: -1.5 given"),
    "infinite": ({"weight": float("inf")}, "data.mixture.1.weight: inf given"),
    "missing": ({"weight": None}, "data.mixture.1.weight: null given; accepted: number"),
    "no source": ({"train": None}, "data.mixture.1.train: missing; accepted: string or a list"),
    "empty list": ({"train": []}, "data.mixture.1.train: missing; accepted: string or a list"),
    "key of the section": ({"max_length": 5}, "data.mixture.1.max_length: unknown key; accepted"),
    "three columns": ({"text": ["a", "b", "c"]}, "data.mixture.1.text: ['a', 'b', 'c'] given"),
    "another type": ({"train_records": "all"}, "data.mixture.1.train_records: 'all' given"),
    "another task's": ({"format": "classification"}, "data.mixture.1.format: classification given"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_of_an_entry(name: str) -> None:
    from trainer.config.config import parse_config

    keys, message = MISTAKES[name]
    mixture = [{"train": "a", "weight": 1}, {"train": "b", "weight": 1, **keys}]
    with pytest.raises(UserError) as caught:
        parse_config({"run": {"name": "x"}, "model": {"id": "m"}, "data": {"mixture": mixture}})
    assert str(caught.value).startswith(message)


def test_mixture_and_train_exclude_one_another() -> None:
    mixture = [{"train": "a", "weight": 1}]
    with pytest.raises(ValueError, match=r"data.mixture: given together with data.train \(c\)"):
        DataOptions.model_validate({"train": "c", "mixture": mixture})
    with pytest.raises(ValueError, match=r"data\.mixture_until: last given without data.mixture"):
        DataOptions.model_validate({"train": "c", "mixture_until": "last"})
    with pytest.raises(ValueError, match=r"data.train: missing; .* or data.mixture"):
        DataOptions.model_validate({})


def test_records_of_a_step_are_of_all_sources(task) -> None:
    data = mixed(weights=(1, 1, 2))
    for step in steps(loader(data, task), 20):
        found = np.bincount(data.source_of(np.array(records_of(step))), minlength=3)
        assert np.abs(found - [4, 4, 8]).max() <= 1
