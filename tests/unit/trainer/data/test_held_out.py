"""Training records that are evaluated on, or left out: drawn by the seed, never trained on."""

import json
from typing import Any

import numpy as np
import pytest

from tests.helpers import quick_config
from tests.unit.trainer.data.test_loader import dataset
from tests.unit.trainer.data.test_mixture import mixed
from trainer.checkpoint.compatibility import check_options
from trainer.config.config import Config
from trainer.config.data_options import DataOptions
from trainer.data.dataset import TokenDataset
from trainer.data.held_out import apportion, for_evaluation, hold_out, left_out
from trainer.data.mixture import MixedDataset
from trainer.distributed.world import World
from trainer.errors import BadCheckpoint, UserError
from trainer.session import open_data


def labelled(counts: list[int]) -> TokenDataset:
    data = dataset([5] * sum(counts))
    labels = np.repeat(np.arange(len(counts)), counts)
    data.labels = np.random.default_rng(0).permutation(labels).astype(float)
    return data


@pytest.mark.parametrize("count", [1, 10, 25, 99])
def test_labels_are_drawn_in_proportion(count: int) -> None:
    data = labelled([60, 30, 10])
    drawn = for_evaluation(data, count, 3, by_label=True)
    found = np.bincount(data.labels[drawn].astype(int), minlength=3)
    assert len(drawn) == len(set(drawn.tolist())) == count
    assert np.abs(found - np.array([0.6, 0.3, 0.1]) * count).max() < 1
    others = [for_evaluation(data, count, seed, by_label=True).tolist() for seed in (3, 4, 5)]
    assert others[0] == drawn.tolist() and others[1] != others[2]


def test_sources_of_a_mixture_are_drawn_in_proportion_to_their_records() -> None:
    data = mixed()
    drawn = for_evaluation(data, 28, 0, by_label=False)
    assert np.bincount(data.source_of(drawn)).tolist() == [5, 20, 3]


def test_records_are_drawn_with_all_their_examples() -> None:
    data = dataset([5] * 12)
    data.records = np.array([0, 0, 0, 1, 2, 2, 3, 4, 4, 5, 5, 5])
    drawn = for_evaluation(data, 3, 1, by_label=False)
    records = np.unique(data.records[drawn])
    assert len(records) == 3
    assert drawn.tolist() == np.flatnonzero(np.isin(data.records, records)).tolist()


def test_largest_remainders() -> None:
    for sizes in ([1], [3, 3, 3], [997, 2, 1], [5, 4, 3, 2, 1]):
        total = sum(sizes)
        for count in range(total + 1):
            parts = apportion(count, np.array(sizes))
            assert parts.sum() == count
            assert np.abs(parts - np.array(sizes) * count / total).max() < 1
            assert (parts <= sizes).all()


def test_what_is_left_out_is_a_prefix_of_every_larger_draw_and_not_evaluated() -> None:
    data = mixed()
    evaluated = for_evaluation(data, 30, 7, by_label=False)
    draws = [left_out(data, count, 7, evaluated) for count in (0, 10, 200)]
    assert [len(draw) for draw in draws] == [0, 10, 200]
    assert draws[2][:10].tolist() == draws[1].tolist()
    assert not set(draws[2].tolist()) & set(evaluated.tolist())


# --- as configured


LORA = "method.kind=lora"
VALIDATING = ("method.kind=lelora", "method.policy.credit=global")


def held(tmp_path, *overrides: str) -> tuple[TokenDataset, np.ndarray, np.ndarray]:
    config: Config = quick_config(tmp_path, "data.eval_records=null", *overrides)
    _, task, data, eval_data = open_data(config, World())
    assert eval_data == {}
    return data, *hold_out(config, data, task)


def test_an_evaluation_share_is_the_same_for_all_methods(tmp_path) -> None:
    _, nothing, evaluated = held(tmp_path, "data.eval=0.25", LORA)
    assert len(evaluated) == 16 and nothing.tolist() == evaluated.tolist()
    assert held(tmp_path, "data.eval=16", LORA)[2].tolist() == evaluated.tolist()
    _, both, again = held(tmp_path, "data.eval=0.25", *VALIDATING)
    assert again.tolist() == evaluated.tolist() == both[-16:].tolist()
    assert len(set(both.tolist())) == 48, "a record is validated on or evaluated on, never both"
    _, kept, _ = held(tmp_path, "data.eval=0.25", "data.leave_out=32", LORA)
    assert kept.tolist() == both.tolist()
    assert held(tmp_path, "data.eval=0.25", "run.seed=5", LORA)[2].tolist() != evaluated.tolist()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.eval=64"], "data.eval: 64 given; accepted: fewer than 64, the training records"),
        (["data.eval=0.999"], "data.eval: 0.999 given; accepted: fewer than 64"),
        (
            ["data.eval=40", "data.leave_out=24"],
            "data.leave_out: 24 given; accepted: fewer than 24",
        ),
    ],
)
def test_some_must_be_left_to_train_on(tmp_path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        held(tmp_path, LORA, *overrides)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("value", [0, -3, 1.0, 0.0, -0.1, True, []])
def test_no_share_and_no_number(value: Any) -> None:
    with pytest.raises(ValueError, match=r"data\.eval|eval"):
        DataOptions(train="x", eval=value)


def test_records_drawn_for_evaluation_cannot_be_limited_too() -> None:
    with pytest.raises(ValueError, match=r"data.eval_records: 5 given with data.eval=0.1"):
        DataOptions(train="x", eval=0.1, eval_records=5)


def test_a_source_of_a_mixture_that_is_left_out_whole(tmp_path) -> None:
    (tmp_path / "few.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    names = (f"{tmp_path}/few.jsonl", "configs/quickstart/train.jsonl")
    mixture = [{"train": name, "weight": 1} for name in names]
    changes = [f"data.mixture={json.dumps(mixture)}", "data.train=null", LORA]
    assert len(held(tmp_path, *changes, "data.eval=0.1")[2]) == 6
    with pytest.raises(
        UserError, match=r"data.mixture: all 1 records of \S+few.jsonl are held out"
    ):
        held(tmp_path, *changes, "data.eval=63")


def test_labels_of_real_mixtures(tmp_path, shared_data) -> None:
    """All sources' labels are learned, and each source's are drawn in proportion."""
    mixture = [
        {"train": f"{shared_data}/glue/SST-2/dev.tsv", "weight": 1, "text": "sentence"},
        {
            "train": f"{shared_data}/glue/CoLA/dev.tsv",
            "weight": 2,
            "columns": ["source", "label", "star", "sentence"],
            "text": "sentence",
        },
    ]
    changes = [
        f"data.mixture={json.dumps(mixture)}", "data.train=null", "data.quoting=none", "data.eval=0.2",
        "data.train_records=null", "task.kind=sequence_classification", LORA, "data.format=auto",
    ]  # fmt: skip
    data, _, evaluated = held(tmp_path, *changes)
    assert isinstance(data, MixedDataset)
    for source in range(2):
        own = np.flatnonzero(data.source_of(np.arange(len(data))) == source)
        drawn = evaluated[data.source_of(evaluated) == source]
        for label in np.unique(data.labels):
            there, taken = (np.count_nonzero(data.labels[of] == label) for of in (own, drawn))
            assert there > 100 and abs(taken - 0.2 * there) < 1


def test_a_run_resumes_with_the_same_records_held_out_only(tmp_path) -> None:
    then = quick_config(tmp_path, "data.eval_records=null", "data.eval=0.25")
    state = {"config": then.model_dump(mode="json")}
    check_options(then, tmp_path, state)
    for other in ("0.5", "16", "null", "configs/quickstart/eval.jsonl"):
        config = quick_config(tmp_path, "data.eval_records=null", f"data.eval={other}")
        with pytest.raises(BadCheckpoint, match=r"data.eval: .* given, but .* was made with 0.25"):
            check_options(config, tmp_path, state)
