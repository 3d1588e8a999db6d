"""Time, bytes and memory of loading a checkpoint, compared with the disk's own bandwidth.

    python -m benchmarks.loading configs/llama8b_random.yaml FOLDER [--layers 32] [--out FILE.json]
        [section.key=value ...]

Writes a checkpoint of the configured shapes into FOLDER unless it exists: random bfloat16 values in
shards with an index, tensors named as published (Mixtral's experts one by one). `--layers`: number
of blocks (default: enough for 8 billion parameters). Then the files are read raw, and loaded as a
run loads them: each first from the disk, as far as the system evicts them from its page cache, then
from memory. Under torchrun several ranks share the work.

Bytes are those of tensors read by all ranks; the disk's share is the kernel's count. Host memory is
anonymous and shared resident memory above the start, sampled every few ms, of the worst rank; with
a GPU it should stay below the size of two unquantised layers (on a CPU it includes the model).
"""

import argparse
import gc
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import SimpleQueue

import torch
from torch import Tensor

from adapters.formats.formats import FORMATS
from adapters.methods.registry import METHODS
from adapters.units import transformer_blocks
from benchmarks.throughput import built
from trainer.config.arguments import Parser, at_least, new_file
from trainer.config.config import Config, with_overrides
from trainer.device_memory import GIB, peak_gib, release
from trainer.distributed.world import World
from trainer.engine.select import make_engine
from trainer.errors import UserError
from trainer.export.merge import write_shards
from trainer.loading.async_reader import read_into
from trainer.loading.load import load_backbone
from trainer.loading.spectral_init import SpectralInit
from trainer.model.backbone import BuiltModel
from trainer.model.hub import load_tokenizer
from trainer.run.launch import launched
from trainer.tasks.base import Task
from trainer.tasks.registry import TASKS

PARAMETERS = 8e9
PIECE, THREADS = 8 * 2**20, 4  # per rank; the fastest measured
INDEX = "model.safetensors.index.json"


@dataclass
class Figures:
    """One pass over the files."""

    what: str
    seconds: float
    bytes_read: int
    """Over all ranks."""
    share_read: float
    """Of the checkpoint's bytes."""
    gb_per_second: float
    share_from_disk: float | None
    """None where the kernel does not report it."""
    stages: dict[str, float] = field(default_factory=dict)
    """Rank 0's seconds of waiting for files, decomposing, packing, and broadcasting."""
    host_gib: list[float] = field(default_factory=list)
    """Each rank's peak above its start."""
    gpu_gib: float | None = None


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("config")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=at_least(1))
    parser.add_argument("--out", type=new_file)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    with launched(arguments.config, arguments.overrides) as (config, world):
        layers = arguments.layers or enough_layers(built(config, world))
        config = with_overrides(config, [f"model.overrides.num_hidden_layers={layers}"])
        model = built(config, world)
        with world.all_or_none():
            if world.is_main:
                write(model, arguments.folder, world.device)
        config = with_overrides(
            config,
            [
                f"model.id={arguments.folder}", "model.weights=pretrained", "model.overrides={}",
                f"model.tokenizer={config.model.tokenizer or config.model.id}",
            ],
        )  # fmt: skip
        warm_up(config, world)
        found = []
        for state in ("cold", "cached"):
            for what, one_pass in (("files alone", read_alone), ("load", load)):
                if state == "cold":
                    drop(arguments.folder, world)
                found.append(measured(f"{what}, {state}", one_pass, config, world))
        if world.is_main:
            report(found, config, model, world, arguments.out)


# --- the checkpoint ---------------------------------------------------------------------------


def enough_layers(model: BuiltModel) -> int:
    """The number of blocks for 8 billion parameters, at most all."""
    blocks = transformer_blocks(model.model)
    block = sum(p.numel() for p in blocks[0][1].parameters())
    rest = sum(p.numel() for p in model.model.parameters()) - block * len(blocks)
    return min(len(blocks), max(1, -int(-(PARAMETERS - rest) // block)))


def write(model: BuiltModel, folder: Path, device: torch.device) -> None:
    """Write the checkpoint unless it exists. Raises UserError where the folder holds another."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; accepted: a folder to write to") from error
    wanted = model.model.config.to_json_string()
    if (folder / INDEX).exists():
        if (folder / "shapes.json").read_text(encoding="utf-8") != wanted:
            raise UserError(
                f"{folder}: holds a checkpoint of other shapes; accepted: another folder"
            )
        return
    write_shards(random_tensors(model, device), folder)
    for file in folder.glob("*.safetensors"):  # dirty pages cannot be evicted
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    model.model.config.save_pretrained(folder)
    (folder / "shapes.json").write_text(wanted, encoding="utf-8")


def random_tensors(model: BuiltModel, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """(name as published, value)."""
    from transformers.core_model_loading import revert_weight_conversion

    for name, tensor in model.tensors.items():
        if name in model.model.all_tied_weights_keys:
            continue
        values = torch.empty(tensor.shape, dtype=torch.bfloat16, device=device)
        values = (values.normal_(0, 0.02) if tensor.dim() > 1 else values.fill_(1)).cpu()
        published = revert_weight_conversion(model.model, {name: values})
        yield from ((key, value.clone()) for key, value in published.items())


def tensor_bytes(folder: Path) -> int:
    return int(json.loads((folder / INDEX).read_text())["metadata"]["total_size"])


def drop(folder: Path, world: World) -> None:
    """Ask the system to evict the files from its page cache."""
    world.gather(None)
    if world.is_main:
        for file in folder.glob("*.safetensors"):
            with file.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    world.gather(None)


# --- the passes -------------------------------------------------------------------------------


def measured(what: str, one_pass, config: Config, world: World) -> Figures:
    """Measure a pass on all ranks. `one_pass` returns (bytes read, seconds by stage)."""
    release(world.device)
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
    disk = from_disk()
    world.gather(None)
    started = time.perf_counter()
    with watched_memory() as peak:
        count, stages = one_pass(config, world)
    seconds = max(world.gather(time.perf_counter() - started))
    held = peak_gib(world.device) if world.device.type == "cuda" else None
    gc.collect()
    now = from_disk()
    fetched = world.gather(None if disk is None or now is None else now - disk)
    total, size = sum(world.gather(count)), tensor_bytes(Path(config.model.id))
    return Figures(
        what, seconds, total, total / size, total / seconds / 1e9,
        None if None in fetched else sum(fetched) / total, stages,
        [bytes_ / GIB for bytes_ in world.gather(peak[0])],
        None if held is None else max(world.gather(held)),
    )  # fmt: skip


def read_alone(config: Config, world: World) -> tuple[int, dict[str, float]]:
    """Every rank reads its part of the files with a few threads into reused buffers."""
    pieces = [
        (file, start, min(PIECE, file.stat().st_size - start))
        for file in sorted(Path(config.model.id).glob("*.safetensors"))
        for start in range(0, file.stat().st_size, PIECE)
    ][world.rank :: world.size]
    buffers: SimpleQueue[bytearray] = SimpleQueue()
    for _ in range(THREADS):
        buffers.put(bytearray(PIECE))

    def read(piece: tuple[Path, int, int]) -> int:
        file, start, size = piece
        buffer = buffers.get()
        read_into(memoryview(buffer)[:size], file, start)
        buffers.put(buffer)
        return size

    with ThreadPoolExecutor(THREADS) as pool:
        return sum(pool.map(read, pieces)), {}


def task_of(config: Config) -> Task:
    return TASKS[config.task.kind](config.task, load_tokenizer(config.model))


def load(config: Config, world: World) -> tuple[int, dict[str, float]]:
    """Load as a run does, with an empty cache of decompositions."""
    task = task_of(config)
    method = METHODS[config.method.kind](config.method, config.run.seed)
    with tempfile.TemporaryDirectory() as cache:
        spectral_init = SpectralInit(method, world, Path(cache)) if method.splits_weight else None
        engine = make_engine(config, world, task)
        loaded = load_backbone(config, task, engine, world, spectral_init)
    assert loaded.loading is not None
    nbytes = loaded.loading.bytes_read if world.is_main else 0  # already summed over ranks
    return nbytes, loaded.loading.stages


def warm_up(config: Config, world: World) -> None:
    """Load the libraries used below, so that their memory is not counted as the model's."""
    weight = torch.randn(256, 256, dtype=torch.bfloat16, device=world.device)
    packed = FORMATS[config.model.quantization].pack(weight, torch.bfloat16)
    FORMATS[config.model.quantization].unpack(packed, (256, 256), torch.bfloat16)
    world.share_(packed, world.nodes[world.node][0])
    world.sum_(weight)
    torch.linalg.qr(torch.linalg.eigh(weight.double() @ weight.double().T)[1])
    make_engine(config, world, task_of(config))


def resident() -> int:
    """Anonymous and shared resident memory of this process, in bytes."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    lines = dict(line.split(":", 1) for line in text.splitlines())
    keys = ("RssAnon", "RssShmem") if "RssAnon" in lines else ("VmRSS",)
    return sum(int(lines[key].split()[0]) for key in keys) * 1024


@contextmanager
def watched_memory() -> Iterator[list[int]]:
    """Context that measures the peak rise of `resident`; read it afterwards."""
    start, peak, done = resident(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.003):
            peak[0] = max(peak[0], resident() - start)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def from_disk() -> int | None:
    """Bytes read from storage for this process by the kernel's count; None where unavailable."""
    with suppress(OSError, KeyError, ValueError):
        text = Path("/proc/self/io").read_text(encoding="utf-8")
        return int(dict(line.split(": ") for line in text.splitlines())["read_bytes"])
    return None


def report(
    found: list[Figures], config: Config, model: BuiltModel, world: World, out: Path | None
) -> None:
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    kind = f"{config.model.quantization}, {config.method.kind}, {config.engine.kind}"
    job = f"{config.run.name}, {kind}, {world.size} x {device}"
    blocks = transformer_blocks(model.model)
    parameters = sum(p.numel() for p in model.model.parameters())
    layers = 2 * 2 * sum(p.numel() for p in blocks[0][1].parameters()) / GIB
    size = tensor_bytes(Path(config.model.id))
    print(f"{job}, torch {torch.__version__}: {len(blocks)} layers, {parameters / 1e9:.2f}e9 "
          f"parameters, {size / 1e9:.1f} GB; two unquantised layers {layers:.2f} GiB")  # fmt: skip
    print("| | seconds | read/size | GB/s | from disk | waiting, s | decomposing | packing "
          "| broadcasting | host peak, GiB | GPU peak, GiB |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for f in found:
        disk = "unknown" if f.share_from_disk is None else f"{f.share_from_disk:.0%}"
        stages = " | ".join(
            f"{f.stages[stage]:.1f}" if stage in f.stages else ""
            for stage in ("reading", "decomposing", "packing", "exchanging")
        )
        gpu = "" if f.gpu_gib is None else f"{f.gpu_gib:.1f}"
        speed = f"{f.seconds:.1f} | {f.share_read:.2f} | {f.gb_per_second:.2f} | {disk}"
        print(f"| {f.what} | {speed} | {stages} | {max(f.host_gib):.2f} | {gpu} |")
    if out is not None:
        data = {"job": job, "parameters": parameters, "layers": len(blocks), "bytes": size,
                "two_layers_gib": layers, "figures": [asdict(f) for f in found]}  # fmt: skip
        out.write_text(json.dumps(data, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
