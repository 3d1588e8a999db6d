"""CUDA graphs of the blocks, on a GPU: the losses of the run without them, whatever a method changes."""

import pytest
import torch

from tests.helpers import losses, quick_config
from trainer.distributed import process_group
from trainer.distributed.world import World
from trainer.memory.graphs import _try, capture_graphs, row_batches
from trainer.model.compilations import Compilations
from trainer.records.metrics import MetricsWriter
from trainer.run.run import run
from trainer.session import Session, open_session
from trainer.training.evaluation import full_evaluation
from trainer.training.loop import make_loader

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

METHODS = {
    "lora": ["model.quantization=nf4"],
    "lalora": ["method.gamma=5", "method.every=1"],  # gates and masks change at every step
    "adalora": [],
    "weightlora_plus": ["method.warmup_steps=3"],  # units go, others grow: captured anew
    "lelora": ["model.quantization=fp8"],
}


def configuration(tmp_path, name: str, *changes: str):
    return quick_config(
        tmp_path, f"run.name={name}", "engine.device=cuda", "engine.compile=true", "run.steps=12",
        "data.max_length=256", "data.row_lengths=4", "data.eval=null", "model.dtype=bfloat16",
        "engine.activation_checkpointing=false", *changes,
    )  # fmt: skip


@pytest.fixture
def world() -> World:
    return process_group.start("cuda")


@pytest.mark.parametrize("method", METHODS)
def test_losses_are_those_without_graphs(tmp_path, world, method, capsys):
    found = []
    for graphs in ("true", "false"):
        config = configuration(
            tmp_path, f"{method}-{graphs}", f"method.kind={method}", f"engine.cuda_graphs={graphs}",
            "log.progress=plain", *METHODS[method],
        )  # fmt: skip
        run(config, world)
        found.append(losses(config.run_folder))
    assert found[0] == pytest.approx(found[1], rel=2e-2)
    assert capsys.readouterr().out.count("CUDA graphs of") == 1 + (method == "weightlora_plus")


def gradients(session: Session, batch, *, replayed: bool) -> torch.Tensor:
    graphs = session.backbone.blocks.graphs
    session.optimizer.zero_grad()
    before = graphs.passes
    if replayed:
        with graphs.replaying():
            loss, _ = session.task.loss(session.model, batch)
    else:
        loss, _ = session.task.loss(session.model, batch)
    assert graphs.passes == before + replayed
    loss.backward()
    return session.optimizer.gradients.clone()


def test_gradients_of_every_row_length(tmp_path, world):
    """Replayed in turn, graphs of several lengths do not disturb each other."""
    session = open_session(configuration(tmp_path, "g", "engine.cuda_graphs=true"), world)
    for adapter in session.method.adapters.values():
        torch.nn.init.normal_(adapter.B, std=0.1)
    loader = make_loader(session, world)
    line = capture_graphs(session, row_batches(session, loader))
    assert line is not None and line.startswith("CUDA graphs of 4 row lengths"), line
    steps = [loader.next_step() for _ in range(6)]
    batches = [b.to(world.device) for step in steps for _, b in step.micro_batches]
    batches = [b for b in batches if b.documents is not None]
    expected = [gradients(session, batch, replayed=False) for batch in batches]
    with Compilations() as compiled:
        for _ in range(2):
            for batch, own in zip(batches, expected, strict=True):
                found = gradients(session, batch, replayed=True)
                assert (found - own).norm() <= 2e-2 * own.norm()
    assert compiled.total == 0


def test_nothing_is_compiled_after_the_first_steps(tmp_path, world, monkeypatch):
    """Steps 20 to 220 of a real run."""
    counted, seen, write = Compilations(), [], MetricsWriter.write

    def noted(self: MetricsWriter, values: dict) -> None:
        seen.append(counted.total)
        write(self, values)

    monkeypatch.setattr(MetricsWriter, "write", noted)
    with counted:
        run(configuration(tmp_path, "long", "run.steps=220", "log.every=20"), world)
    assert len(seen) >= 12 and seen[-1] == seen[1]  # after steps 1, 20, 40, …, 220


@pytest.mark.parametrize("method", ["lora", "lelora"])
def test_a_second_run_captures_without_trials(tmp_path, world, method, monkeypatch, capsys):
    found, tried = [], []

    def noted(graph, *args, **kwargs):
        tried.append(graph.shapes[0])
        return _try(graph, *args, **kwargs)

    monkeypatch.setattr("trainer.memory.graphs._try", noted)
    monkeypatch.setattr("trainer.memory.graphs._WAITING", 0.0)  # however busy the GPU is
    for name in ("first", "second"):
        config = configuration(
            tmp_path, name, f"method.kind={method}", "engine.cuda_graphs=true",
            "engine.activation_checkpointing=auto", "log.progress=plain", *METHODS[method],
        )  # fmt: skip
        run(config, world)
        found.append((losses(config.run_folder), len(tried)))
    assert found[0][0] == pytest.approx(found[1][0], rel=2e-2)
    assert 0 < found[0][1] == found[1][1]
    assert capsys.readouterr().out.count("CUDA graphs of") == 2


def test_an_evaluation_takes_several_micro_batches_at_once(tmp_path, world, monkeypatch):
    config = configuration(tmp_path, "e", "data.eval=configs/quickstart/eval.jsonl")
    session = open_session(config, world)
    at_once = full_evaluation(session)
    monkeypatch.setattr("trainer.training.evaluation._together", lambda _: lambda _: 1)
    apart = full_evaluation(session)
    assert at_once.scores["eval_loss"] == pytest.approx(apart.scores["eval_loss"], rel=1e-2)
    assert [one["id"] for one in at_once.losses] == [one["id"] for one in apart.losses]
