"""The order of what a step does."""

import subprocess
import sys

import pytest
import torch

from tests.helpers import ROOT, environment, quick_config
from trainer.decisions import consensus
from trainer.distributed.world import World
from trainer.engine.base import Engine
from trainer.session import open_session
from trainer.tasks.causal_lm import CausalLM
from trainer.training.loop import make_loader
from trainer.training.step import Training, train_step
from trainer.training.validation import make_validate


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("lalora", "decide forward meanwhile reduce observe step after"),
        ("lelora", "forward decide meanwhile reduce observe step after"),
    ],
)
def test_a_method_decides_where_it_says(tmp_path, monkeypatch, kind, expected):
    session = open_session(quick_config(tmp_path, f"method.kind={kind}"), World())
    validate = make_validate(session)
    session.method.set_horizon(4, lambda step: 1.0)
    session.method.on_train_begin(session.optimizer, validate)
    calls: list[str] = []

    def noted(owner, attribute, name):
        honest = getattr(owner, attribute)

        def call(*args, **kwargs):
            if name not in calls:
                calls.append(name)
            return honest(*args, **kwargs)

        monkeypatch.setattr(owner, attribute, call)

    noted(consensus, "decide_and_apply", "decide")
    noted(CausalLM, "loss", "forward")
    noted(Engine, "reduce", "reduce")
    noted(Engine, "step", "step")
    noted(session.method, "observe", "observe")
    noted(session.method, "after_step", "after")
    training = Training(session, make_loader(session, World()), 4, validate)
    done = train_step(training, 0, meanwhile=lambda: calls.append("meanwhile") or "kept")
    assert " ".join(calls) == expected
    assert done.meanwhile == "kept" and not done.update.skipped
    assert done.tokens > 0 and 0 < done.epoch < 1
    rate = session.config.optim.learning_rate
    assert 0 < session.optimizer.learning_rate <= rate
    assert torch.isfinite(torch.tensor(done.update.loss))


def test_a_method_observes_gradients_before_they_are_clipped(tmp_path):
    """Summed over the ranks, as they are; what follows scales them for the update alone."""
    observed = {}
    for limit in ("null", "1e-3"):
        session = open_session(quick_config(tmp_path, f"optim.max_grad_norm={limit}"), World())
        session.method.observe = lambda step, optimizer, limit=limit: observed.update(
            {limit: optimizer.gradients.clone()}
        )
        training = Training(session, make_loader(session, World()), 4, make_validate(session))
        done = train_step(training, 0)
        assert done.update.grad_norm == pytest.approx(float(observed[limit].norm()), rel=1e-5)
    assert torch.equal(observed["null"], observed["1e-3"])
    assert float(observed["null"].norm()) > 1e-2, "nothing would be clipped"


SETTINGS = """
import torch.fx.experimental._config as shapes
import trainer.model.blocks as blocks
assert shapes.use_duck_shape
blocks.configure_compiler()
assert not shapes.use_duck_shape
"""


def test_importing_blocks_sets_nothing_of_torch():
    done = subprocess.run(
        [sys.executable, "-c", SETTINGS], cwd=ROOT, env=environment(), capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
