"""What several tests need: tiny models on disk, configurations, launching real processes."""

import atexit
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from tests.forkserver import Forked, Server
from trainer.config.config import Config, load_config

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "configs/quickstart.yaml"
TINY = ROOT / "configs/quickstart/model"
ALL = os.environ.get("RANKCAST_ALL") == "1"
"""`make test-all`: whole products instead of samples of them."""
thorough = pytest.mark.skipif(not ALL, reason="minutes: make test-all")


def sample(cases: Iterable[Any], *usual: Any) -> list[Any]:
    """Cases of a test; without `make test-all` only those in `usual` run."""
    return [case if case in usual else pytest.param(case, marks=thorough) for case in cases]


TASK_OF = {
    "causal": "causal_lm", "classification": "sequence_classification",
    "pairs": "sequence_to_sequence",
}  # fmt: skip
"""The task of each part of `tests/tiny_models.py`."""
WORKER = ROOT / "tests/world/worker.py"
SERVER = Server()

SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 576, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip


def save_random_model(
    folder: Path, model_type: str, auto: Any = None, seed: int = 0, **changes: Any
) -> Path:
    """A random model of `model_type` with the quickstart's tokenizer, as transformers saves it."""
    made, state = _random_model(model_type, auto or AutoModel, seed, json.dumps(changes))
    shutil.copytree(made, folder, dirs_exist_ok=True)
    torch.set_rng_state(state)
    return folder


@functools.cache
def _random_models() -> Path:
    """Where this process keeps its random models, until it ends or `drop_random_models`."""
    folder = Path(tempfile.mkdtemp(prefix="rankcast-models-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def drop_random_models() -> None:
    """At the end of a session of tests, whose workers end without Python's own farewell."""
    if _random_models.cache_info().currsize:
        shutil.rmtree(_random_models(), ignore_errors=True)


@functools.cache
def _random_model(model_type: str, auto: Any, seed: int, changes: str) -> tuple[Path, torch.Tensor]:
    """Made once a session: (folder, torch's random state afterwards)."""
    folder = Path(tempfile.mkdtemp(dir=_random_models()))
    settings = {**SMALL, **json.loads(changes)}
    if model_type in ("bert", "roberta", "falcon"):
        settings.pop("head_dim"), settings.pop("num_key_value_heads")
    config = AutoConfig.for_model(model_type, **settings)
    torch.manual_seed(seed)
    auto.from_config(config, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return folder, torch.get_rng_state()


def save_mixture(folder: Path, model_type: str, **changes: Any) -> Path:
    """A random mixture of 4 experts, 2 for every token."""
    own = {"mixtral": {"num_local_experts": 4}}
    settings = own.get(model_type, {"num_experts": 4, "moe_intermediate_size": 96})
    return save_random_model(
        folder, model_type, AutoModelForCausalLM, num_experts_per_tok=2, **{**settings, **changes}
    )


def quick_config(tmp: Path, *overrides: str) -> Config:
    """The quickstart, shortened and silent, in one process unless overridden."""
    return load_config(
        QUICKSTART,
        [
            "engine.kind=single", f"run.dir={tmp}/runs", f"data.cache={tmp}/cache", "run.steps=4",
            "run.eval_every=0", "run.eval_at_start=false", "log.every=1", "log.progress=none",
            "log.tensorboard=false", "data.train_records=64", "data.eval_records=16",
            "data.batch_size=8", "data.micro_batch_size=2", "checkpoint.every=0",
            "model.quantization=none", "run.verify=off", *overrides,
        ],
    )  # fmt: skip


def lean_patches() -> list[Any]:
    """With these, runs cost what they compute: they end without drawing what they trained,
    a fifth of a short one's time, and do not freeze Python's garbage collector and unfreeze it:
    what was imported, a million objects, is frozen for a whole module of tests (conftest.py)."""
    return [
        patch("trainer.run.finish.draw_loss", lambda runs, out: out),
        patch("trainer.run.finish._more_figures", lambda folder: ([], "")),
        patch("trainer.run.run.modules_set_aside", nullcontext),
        patch("trainer.training.loop.settled", nullcontext),
    ]


@contextmanager
def lean_runs() -> Iterator[None]:
    """`lean_patches` where pytest has not applied them: in ranks, forks and campaigns."""
    with ExitStack() as stack:
        for one in lean_patches():
            stack.enter_context(one)
        yield


def losses(run: Path) -> list[float]:
    """Training losses of a run, in order of step; steps are checked to be without gaps."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    assert [line["step"] for line in trained] == list(range(1, len(trained) + 1))
    return [line["loss"] for line in trained]


def kept_steps(run: Path, step: int) -> list[str]:
    """What was logged up to a step, with the times that it took then: a run that went on from there
    holds the same lines, one that began anew does not."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [line for line in lines if json.loads(line)["step"] <= step]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def command(
    launcher: str,
    processes: int,
    script: str | Path,
    *arguments: str,
    options: tuple[str, ...] = (),
) -> list[str]:
    """The command line that starts `script` under a launcher, with `options` of its own."""
    if launcher == "python":
        return [sys.executable, str(script), *arguments]
    port = str(free_port())
    binaries = Path(sys.executable).parent
    if launcher == "deepspeed":
        head = [str(binaries / "deepspeed"), "--num_gpus", str(processes), "--master_port", port]
    else:
        head = [
            sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes),
            "--master_port", port,
        ]  # fmt: skip
    return [*head, *options, str(script), *arguments]


def environment(gpus: str | None = "") -> dict[str, str]:
    """For started processes: offline, one thread each, no trace of an outer launcher, no GPU
    unless `gpus` (CUDA_VISIBLE_DEVICES; None: all)."""
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return clean | {
        "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        "PYTHONWARNINGS": "ignore", **({} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus}),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip


def start(
    launcher: str,
    processes: int,
    script: str | Path,
    *arguments: str,
    gpus: str | None = "",
    options: tuple[str, ...] = (),
) -> subprocess.Popen:
    """Start a launcher in a session of its own; `ranks_of` finds its ranks by a mark."""
    marked = environment(gpus) | {"RANKCAST_TEST_MARK": uuid.uuid4().hex}
    process = subprocess.Popen(
        command(launcher, processes, script, *arguments, options=options),
        cwd=ROOT, env=marked, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip

    process.mark = marked["RANKCAST_TEST_MARK"]  # type: ignore[attr-defined]
    return process


def finish(process: subprocess.Popen, seconds: float = 180) -> tuple[int, str, str]:
    """(exit code, stdout, stderr); a process group that does not end in time is a failure."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"no end after {seconds} s\n{out[-2000:]}\n{err[-4000:]}") from None
    return process.returncode, out, err


def launch(
    launcher: str,
    processes: int,
    script: str | Path,
    *arguments: str,
    seconds: float = 180,
    gpus: str | None = "",
) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a script under a launcher that is really started."""
    return finish(start(launcher, processes, script, *arguments, gpus=gpus), seconds)


def python(
    *arguments: str | Path, processes: int = 1, seconds: float = 180
) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `python SCRIPT …` or `python -m MODULE …`, forked instead of
    started; with several processes, each has the variables that torchrun would set."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = fork_ranks(processes, Path(folder), *map(str, arguments))
        deadline = time.monotonic() + seconds
        ended = [rank.wait(deadline - time.monotonic()) for rank in ranks]
        for rank in ranks:
            rank.kill()
        outs, errs = zip(*(rank.output() for rank in ranks), strict=True)
        out, err = "".join(outs), "".join(errs)
        assert all(ended), f"no end after {seconds} s\n{out[-2000:]}\n{err[-4000:]}"
        return max((rank.code for rank in ranks), key=abs), out, err


def fork_ranks(processes: int, folder: Path, *arguments: str) -> list[Forked]:
    """Processes that find each other as torchrun's do (a single one as if without a launcher, but
    for the worker's), with their output in `folder`."""
    shared = {
        "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    ranks = []
    for rank in range(processes):
        own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        variables = own if processes > 1 or "tests.world.worker" in arguments else {}
        log = folder / f"{rank}.log"
        ranks.append(SERVER.fork(list(arguments), log, environment() | variables, ROOT))
    return ranks


def error_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error:")]


def ranks_of(process: subprocess.Popen) -> dict[int, int]:
    """Process ids of a launcher's ranks that run the training script, by rank."""
    found, parent = {}, {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            variables = dict(
                item.split("=", 1)
                for item in (folder / "environ").read_text().split("\0")
                if "=" in item
            )
            status = (folder / "stat").read_text().rpartition(")")[2].split()
        except (OSError, ValueError):
            continue
        if variables.get("RANKCAST_TEST_MARK") == process.mark and "RANK" in variables:
            pid = int(folder.name)
            found[pid], parent[pid] = int(variables["RANK"]), int(status[1])
    # What a rank starts, as torch's compiler does, has its variables; left alone, it counts.
    return {rank: pid for pid, rank in found.items() if parent[pid] not in found}


def wait_for_step(run: Path, step: int, process: subprocess.Popen, seconds: float = 120) -> None:
    """Until the run has logged `step`."""
    deadline = time.monotonic() + seconds
    file = run / "metrics.jsonl"
    while time.monotonic() < deadline and process.poll() is None:
        if file.exists() and len(file.read_text().splitlines()) >= step:
            return
        time.sleep(0.02)
    out, err = process.communicate(timeout=5) if process.poll() is not None else ("", "")
    raise AssertionError(f"step {step} was not reached\n{out[-2000:]}\n{err[-4000:]}")
