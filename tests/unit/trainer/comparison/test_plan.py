"""A comparison's file: what it may say, extends, and what the command line adds."""

import pytest
import yaml

from trainer.comparison.plan import Comparison, read_comparison
from trainer.errors import UserError

PLAIN = {
    "base": "x.yaml", "learning_rates": [1e-3, 2e-3], "seeds": [0, 1],
    "methods": {"lora": [], "a": ["method.rank=2"]},
}  # fmt: skip


def written(folder, name="c.yaml", **keys):
    file = folder / name
    file.write_text(yaml.safe_dump(keys, sort_keys=False))
    return file


@pytest.mark.parametrize("text", ["", "[1]", "base: x\nsedes: [1]\n", "extends: [1]\n"])
def test_a_broken_file_is_one_line(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError) as refusal:
        read_comparison(tmp_path / "c.yaml")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"learning_rates": [1e-3, 3e-3]}, "accepted: each twice the one before"),
        ({"learning_rates": [3.333333e-4, 6.666667e-4]}, "each twice the one before"),
        ({"learning_rates": [0.0]}, "learning_rates: 0.0 given"),
        ({"score": "eval_bleu"}, "score: eval_bleu given; accepted: eval_loss, "),
        ({"learning_rate_bounds": [1.0, 0.5]}, "low < high"),
        ({"methods": {"a": {"like": "b"}}}, "methods.a.like: b given; accepted: another"),
        ({"methods": {"a": {"rate_of": "a"}}}, "methods.a.rate_of: a given"),
        ({"methods": {"a": {"like": "b"}, "b": {"like": "a"}}}, "leads back to a"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, changed, message):
    with pytest.raises(UserError, match=message):
        read_comparison(written(tmp_path, **PLAIN | changed))


def test_arms_are_like_others():
    arms = PLAIN["methods"] | {"b": {"like": "a", "overrides": ["method.alpha=1"]}}
    comparison = Comparison.model_validate(PLAIN | {"methods": arms})
    assert comparison.overrides_of("b") == ["method.rank=2", "method.alpha=1"]


def test_a_file_completes_the_one_that_it_extends(tmp_path):
    written(tmp_path, "common.yaml", **PLAIN, overrides=["run.steps=5"], places={"data": "d"})
    file = written(tmp_path, extends="common.yaml", overrides=["data.train={data}/t"], seeds=[7],
                   methods={"b": []}, variants={"few": ["data.train_records=4"]})  # fmt: skip
    read = read_comparison(file)
    assert read.seeds == [7] and list(read.methods) == ["lora", "a", "b"]
    assert read.located(read.overrides) == ["run.steps=5", "data.train=d/t"]
    given = read_comparison(
        file, variants=["few"], places={"data": "/e"}, overrides=["run.steps=9"], methods=["b"]
    )
    assert given.located(given.overrides)[1:] == [
        "data.train=/e/t", "data.train_records=4", "run.steps=9"
    ]  # fmt: skip
    assert list(given.methods) == ["b"]
    without = written(tmp_path, "d.yaml", extends="c.yaml", methods={"a": None})
    assert list(read_comparison(without).methods) == ["lora", "b"]
    for wrong in ({"variants": ["many"]}, {"places": {"model": "x"}}, {"methods": ["z"]}):
        with pytest.raises(UserError, match="accepted"):
            read_comparison(file, **wrong)
    written(tmp_path, "common.yaml", extends="c.yaml")
    with pytest.raises(UserError, match="no circle"):
        read_comparison(file)


def test_a_variant_begins_all_searches_elsewhere(tmp_path):
    arms = {"lora": {"learning_rates": [1e-3, 2e-3]}, "a": []}
    variants = {"few": {"overrides": ["run.steps=3"], "learning_rates": [1e-4, 2e-4]}}
    file = written(tmp_path, **PLAIN | {"methods": arms, "variants": variants})
    assert read_comparison(file).methods["lora"].learning_rates == [1e-3, 2e-3]
    given = read_comparison(file, variants=["few"])
    assert given.learning_rates == [1e-4, 2e-4] and "run.steps=3" in given.overrides
    assert all(arm.learning_rates is None for arm in given.methods.values())
    variants["few"]["learning_rates"] = [1e-4, 3e-4]
    file = written(tmp_path, **PLAIN | {"variants": variants})
    with pytest.raises(UserError, match="each twice the one before"):
        read_comparison(file)


def test_arms_that_others_need_are_kept(tmp_path):
    arms = {"lora": [], "a": [], "b": {"rate_of": "a", "against": "lora"}, "c": []}
    file = written(tmp_path, **PLAIN | {"methods": arms})
    assert list(read_comparison(file, methods=["b"]).methods) == ["lora", "a", "b"]


def test_what_an_arm_is_like_does_not_run_for_it(tmp_path):
    arms = {"a": ["x=1"], "b": {"like": "a", "overrides": ["y=2"]},
            "c": {"like": "b", "overrides": ["z=3"], "learning_rates": [4e-3]}}  # fmt: skip
    file = written(tmp_path, **PLAIN | {"methods": arms})
    read = read_comparison(file, methods=["c"])
    assert list(read.methods) == ["c"] and read.methods["c"].learning_rates == [4e-3]
    whole = read_comparison(file)
    assert read.overrides_of("c") == whole.overrides_of("c") == ["x=1", "y=2", "z=3"]


def test_a_file_may_leave_out_all_arms_that_it_extends(tmp_path):
    written(tmp_path, "common.yaml", **PLAIN)
    file = written(tmp_path, extends="common.yaml", methods={"*": None, "b": ["method.rank=3"]})
    assert list(read_comparison(file).methods) == ["b"]


def test_an_arm_that_replays_another_follows_it(tmp_path):
    arms = {"lora": [], "a": [], "b": {"replays": "a"},
            "c": {"replays": "a", "permuted": True, "against": "b"},
            "d": {"replays": "a", "permuted": "any", "against": "b"}}  # fmt: skip
    read = read_comparison(written(tmp_path, **PLAIN | {"methods": arms}), methods=["c", "d"])
    assert list(read.methods) == ["a", "b", "c", "d"]
    assert [read.methods[name].permuted for name in "bcd"] == [False, True, "any"]
    for name, other in (("b", "a"), ("c", "b"), ("d", "b")):
        arm = read.methods[name]
        assert arm.rate_of == arm.after == "a" and arm.against == other
    for wrong in (
        {"permuted": True}, {"permuted": "any"}, {"replays": "a", "permuted": "all"},
        {"replays": "a", "rate_of": "lora"}, {"replays": "z"},
    ):  # fmt: skip
        with pytest.raises(UserError, match="accepted"):
            read_comparison(written(tmp_path, **PLAIN | {"methods": arms | {"b": wrong}}))
