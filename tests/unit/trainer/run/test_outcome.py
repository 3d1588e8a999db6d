"""How a run ends: diverged ones fail, honest ones do not; a rerun that would train nothing says so."""

import json
import random

import pytest
from transformers import AutoModelForCausalLM

from tests.helpers import TINY, quick_config, save_random_model
from trainer.config.config import with_overrides
from trainer.distributed.world import World
from trainer.errors import Diverged, UserError
from trainer.records.heartbeat import read_heartbeat
from trainer.run.outcome import find_fault
from trainer.run.run import run
from trainer.session import open_session


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("outcome")
    save_random_model(tmp / "model", "llama", AutoModelForCausalLM, initializer_range=0.05)
    return tmp


def configured(place, name, *overrides):
    return quick_config(
        place, f"model.id={place}/model", f"run.name={name}", "data.train_records=24",
        "data.eval=null", "data.max_length=48", "data.on_bad_record=skip", "data.batch_size=2",
        "log.every=5", "optim.warmup_ratio=0", "optim.schedule=constant", *overrides,
    )  # fmt: skip


def test_a_diverged_run_is_a_failure_that_keeps_what_it_left(place):
    config = configured(
        place, "diverged", "run.steps=16", "optim.learning_rate=1", f"model.id={TINY}"
    )
    for _ in range(2):  # also where a rerun finds nothing left to train
        with pytest.raises(Diverged, match=r"loss 5\.\d+ in step 1, [\d.]+ at the end .* step 1: the "
                           r"run diverged, with optim\.learning_rate=1; .*adapter") as failure:  # fmt: skip
            run(config, World())
        assert failure.value.exit_code == 1
        heartbeat = read_heartbeat(config.run_folder)
        assert heartbeat["state"] == "failed" and "diverged" in heartbeat["reason"]
        assert (config.run_folder / "adapter/adapter_config.json").is_file()
        assert ": failed" in (config.run_folder / "README.md").read_text()


def test_an_absurd_adapter_is_a_failure_however_short_the_run(place):
    config = configured(place, "absurd", "run.steps=2", "optim.learning_rate=1e4")
    with pytest.raises(Diverged, match=r"of model\.layers\.0\.\S+ has values of [\d.]+e\+0[34];"):
        run(config, World())
    assert (config.run_folder / "adapter/adapter_config.json").is_file()


@pytest.mark.parametrize("kind", ["lora", "pissa"])
def test_every_trained_tensor_is_looked_at(place, kind):
    session = open_session(configured(place, "look", f"method.kind={kind}"), World())
    assert find_fault(session, place, 1) is None
    name, adapter = list(session.method.adapters.items())[-1]
    adapter.B.data[0, 0] = float("nan")
    assert find_fault(session, place, 1) == f"B of {name} has values not finite"
    adapter.B.data[0, 0] = -1001.0
    assert find_fault(session, place, 1) == f"B of {name} has values of 1e+03"
    if kind == "pissa":  # W itself may be large
        session.initial_adapters[name].adapter.B.data[0, 0] = 500.0
        assert find_fault(session, place, 1) is None


def test_rows_of_added_tokens_are_looked_at(place):
    session = open_session(configured(place, "rows", 'model.added_tokens=["<|new|>"]'), World())
    assert find_fault(session, place, 1) is None
    path, rows = next(iter(session.backbone.token_rows.items()))
    rows.values.data[0, 0] = float("nan")
    fault = f"the table of added tokens, {path}, has values not finite"
    assert find_fault(session, place, 1) == fault


def test_what_is_not_divergence(place):
    """Noise, short runs, tiny losses, a rise that warms down again, logs without a first step."""
    session = open_session(configured(place, "judged"), World())
    draw = random.Random(0)
    quiet = {
        "noisy": [6.4, *(draw.uniform(0.0, 14.0) for _ in range(40))],
        "tiny": [1e-4, *[0.4] * 20],
        "better": [2.5, 9.0, 9.0, *[2.0] * 12],
        "a fifth": [10.0, *[11.9] * 20],
    }
    for losses in quiet.values():
        write(place, losses)
        assert find_fault(session, place, 100) is None
    write(place, [0.1, *[12.0] * 20])  # the model itself has a loss of about 6.4
    assert find_fault(session, place, 9) is None
    assert "the run diverged" in find_fault(session, place, 10)
    write(place, [6.4, *[12.0] * 20])  # which it has on these records still
    assert find_fault(session, place, 100) is None
    write(place, [0.1, *[12.0] * 20], first=5)
    assert find_fault(session, place, 100) is None


def write(folder, losses, first=1):
    lines = [{"step": step, "loss": loss} for step, loss in enumerate(losses, first)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_harder_records_at_the_end_are_not_divergence(place):
    draw = random.Random(0)
    texts = ["to to to to to to to to to to to to"] * 8 + [
        "".join(chr(draw.randrange(33, 126)) for _ in range(30)) for _ in range(32)
    ]
    (place / "t.jsonl").write_text(
        "".join(json.dumps({"question": "?", "answer": text}) + "\n" for text in texts)
    )
    config = configured(
        place, "harder", "run.steps=16", "data.shuffle=false", f"data.train={place}/t.jsonl",
        "optim.learning_rate=2e-2", "data.train_records=null",
    )  # fmt: skip
    run(config, World())


def test_a_rerun_that_would_train_nothing(place):
    config = configured(place, "again", "run.steps=2")
    run(config, World())
    adapter = (config.run_folder / "adapter/adapter_model.safetensors").read_bytes()
    run(config, World())  # as it was: completed again
    changes = ["optim.learning_rate=1e-5", "data.eval=configs/quickstart/eval.jsonl"]
    with pytest.raises(UserError) as error:
        run(with_overrides(config, changes), World())
    message = str(error.value)
    assert message.startswith(f"run.name: {config.run_folder} has made all of its 2 steps")
    assert all(change.partition("=")[0] in message for change in changes)
    ways = message.partition("accepted: ")[2]
    assert all(way in ways for way in ("another run.name", "more steps", "as it was"))
    assert (config.run_folder / "adapter/adapter_model.safetensors").read_bytes() == adapter
    more = with_overrides(config, ["optim.learning_rate=1e-5", "run.steps=3"])
    run(more, World())
