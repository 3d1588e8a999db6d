"""What trackers wrote without a server, read from their own files: (tag → step → value)."""

import csv
import json
import sqlite3
import struct
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

Figures = dict[str, dict[int, float]]


def collected(triples: Iterable[tuple[str, int, float]]) -> Figures:
    found: Figures = {}
    for tag, step, value in triples:
        assert step not in found.setdefault(tag, {}), f"{tag} twice at step {step}"
        found[tag][step] = value
    return found


def log_records(content: bytes, header: int = 7, block: int = 32768) -> Iterator[bytes]:
    """The records of a LevelDB log (wandb's and swanlab's, behind a header): parts of (checksum,
    length, type) and data; types 1 whole, 2 first, 3 middle, 4 last."""
    place, whole = header, b""
    while place + 7 <= len(content):
        if block - place % block < 7:  # padding
            place += block - place % block
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""


def wandb(run: Path, _: Path) -> Figures:
    from wandb.proto import wandb_internal_pb2

    found: Figures = {}
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for data in log_records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            row = {
                item.key or "/".join(item.nested_key): item.value_json
                for item in record.history.item
            }
            for tag, value in row.items():
                if not tag.startswith(("_", "figures/")):
                    found.setdefault(tag, {})[int(row["_step"])] = float(value)
    return found


def swanlab(run: Path, _: Path) -> Figures:
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record

    def scalars() -> Iterator[tuple[str, int, float]]:
        for file in run.glob("swanlab/run-*/*.swanlab"):
            for data in log_records(file.read_bytes()):
                record = Record()
                record.ParseFromString(data)
                if record.HasField("scalar"):
                    yield record.scalar.key, record.scalar.step, record.scalar.value.number

    return collected(scalars())


def trackio(_: Path, place: Path) -> Figures:
    def scalars() -> Iterator[tuple[str, int, float]]:
        for file in place.glob("*.db"):
            rows = sqlite3.connect(file).execute("select step, metrics from metrics")
            for step, metrics in rows:
                for tag, value in json.loads(metrics).items():
                    if isinstance(value, int | float):
                        yield tag, step, value

    return collected(scalars())


def comet(_: Path, place: Path) -> Figures:
    def scalars() -> Iterator[tuple[str, int, float]]:
        for file in place.glob("*.zip"):
            with zipfile.ZipFile(file) as opened:
                lines = opened.read("messages.json").decode().splitlines()
            for line in map(json.loads, lines):
                metric = line["payload"].get("metric", {})
                if "/" in metric.get("metricName", ""):  # others are the machine's
                    yield metric["metricName"], metric["step"], metric["metricValue"]

    return collected(scalars())


def clearml(_: Path, place: Path) -> Figures:
    def scalars() -> Iterator[tuple[str, int, float]]:
        for file in place.rglob("*.zip"):
            with zipfile.ZipFile(file) as opened:
                lines = opened.read("metrics.jsonl").decode().splitlines()
            for event in (event for line in lines for event in json.loads(line)):
                series, name = event["variant"], event["metric"]
                if event["type"] == "training_stats_scalar" and series in ("train", "eval"):
                    prefix = "eval_" * (series == "eval" and not name.startswith("evaluation_"))
                    yield f"{series}/{prefix}{name}", event["iter"], event["value"]

    return collected(scalars())


def dvclive(run: Path, _: Path) -> Figures:
    def scalars() -> Iterator[tuple[str, int, float]]:
        folder = run / "dvclive/plots/metrics"
        for file in folder.rglob("*.tsv"):
            with file.open(newline="") as lines:
                for row in csv.DictReader(lines, delimiter="\t"):
                    yield (
                        file.relative_to(folder).with_suffix("").as_posix(),
                        int(row["step"]),
                        float(row[file.stem]),
                    )

    return collected(scalars())


READERS = {
    "trackio": trackio, "swanlab": swanlab, "comet": comet, "clearml": clearml, "dvclive": dvclive,
}  # fmt: skip
"""Of trackers that go on in no run of theirs, or were not tried to; wandb has a test of its own."""
