"""Seconds and memory of tokenising, by the number of processes.

    python -m benchmarks.tokenising TOKENIZER gsm8k/train.jsonl --kind chats [--records 100000]
        [--workers 1,2,16] [--stop 0.5] [--out FILE.json]

The records of GSM8K are repeated with other numbers, drawn by a seed: as chats of one to three
questions and answers (about 410 tokens), as short chats of one (about 80), or as short prompts and
completions. Memory is that of all processes, sampled
twice a second; pages that processes share count once (PSS). `--stop`: kill a first start when that
share of the records is done, and measure what the second one has left to do.
"""

import argparse
import json
import random
import re
import tempfile
import time
from collections.abc import Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import psutil

from trainer.config.arguments import Parser, at_least, new_file

_NUMBER = re.compile(r"\d+")
_KINDS = ("chats", "short-chats", "short")
_EVERY = 0.5  # seconds between two samples of memory


def made(source: Path, kind: str, records: int) -> Iterator[dict]:
    """Records from those of GSM8K, with other numbers."""
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    rng = random.Random(0)

    def varied(text: str) -> str:
        return _NUMBER.sub(lambda found: str(rng.randrange(10 ** len(found.group()))), text)

    for number in range(records):
        row = rows[number % len(rows)]
        if kind != "chats":
            asked = varied(row["question"].partition(". ")[0])
            answer = varied(row["answer"].splitlines()[-1])
            if kind == "short":
                yield {"prompt": asked, "completion": answer}
            else:
                yield {"messages": [_said("user", asked), _said("assistant", answer)]}
            continue
        messages = []
        for said in rng.sample(rows, rng.randrange(1, 4)):
            messages.append(_said("user", varied(said["question"])))
            messages.append(_said("assistant", varied(said["answer"])))
        yield {"messages": messages}


def _said(role: str, text: str) -> dict:
    return {"role": role, "content": text}


def tokenised(tokenizer: str, data: str, cache: str, workers: int, out: Connection) -> None:
    """In a process of its own: tokenise, and send [seconds, records, tokens]."""
    from transformers import AutoTokenizer

    from trainer.config.data_options import DataOptions
    from trainer.data.tokenise import prepare
    from trainer.run.launch import configure_libraries
    from trainer.tasks.causal_lm import CausalLM, CausalLMOptions

    configure_libraries()
    task = CausalLM(CausalLMOptions(), AutoTokenizer.from_pretrained(tokenizer))
    options = DataOptions(train=data, cache=cache, workers=workers, max_length=2048)
    began = time.perf_counter()
    counts = prepare(data, "train", None, options, task, shown="plain").counts
    out.send([time.perf_counter() - began, counts.records, counts.tokens])


def measure(arguments: argparse.Namespace, data: Path, workers: int, cache: Path) -> dict:
    """Figures of one start; with `arguments.stop`, of the one after a start that was killed."""
    figures = {"workers": workers}
    if arguments.stop:
        killed, _ = _started(arguments, data, workers, cache)
        while _done(cache) < arguments.stop * arguments.records:
            time.sleep(_EVERY)
        killed.kill()
        killed.join()
        figures["kept"] = _done(cache)
    process, results = _started(arguments, data, workers, cache)
    peak, cpu = 0, 0.0
    while not results.poll(_EVERY):
        assert process.is_alive()
        family = [psutil.Process(process.pid)]
        family += family[0].children(recursive=True)
        memory, used = 0, 0.0
        for member in family:
            try:
                memory += member.memory_full_info().pss
                times = member.cpu_times()
            except psutil.Error:  # it has just ended
                continue
            used += times.user + times.system
        peak, cpu = max(peak, memory), max(cpu, used)
    seconds, records, tokens = results.recv()
    process.join()
    return figures | {
        "seconds": seconds, "cpu_seconds": cpu, "peak_mib": peak / 2**20, "records": records,
        "tokens": tokens,
    }  # fmt: skip


def _started(arguments: argparse.Namespace, data: Path, workers: int, cache: Path) -> tuple:
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(
        target=tokenised, args=(arguments.tokenizer, str(data), str(cache), workers, theirs)
    )
    process.start()
    return process, ours


def _done(cache: Path) -> int:
    """Records of whole parts."""
    lines = [
        line for file in cache.glob("*/parts.jsonl") for line in file.read_bytes().splitlines()
    ]
    return sum(json.loads(line)["counts"]["records"] for line in lines)


def main() -> None:
    parser = Parser(__doc__, None)
    parser.add_argument("tokenizer", help="folder or hub id")
    parser.add_argument("source", type=Path, help="GSM8K's train.jsonl")
    parser.add_argument("--kind", choices=_KINDS, default="chats")
    parser.add_argument("--records", type=at_least(1), default=100_000)
    parser.add_argument("--workers", default="1,2,16")
    parser.add_argument("--stop", type=float, default=0.0)
    parser.add_argument("--out", type=new_file)
    arguments = parser.parse_args()
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.jsonl"
        with data.open("w", encoding="utf-8") as file:
            for row in made(arguments.source, arguments.kind, arguments.records):
                file.write(json.dumps(row) + "\n")
        for workers in map(int, arguments.workers.split(",")):
            found = measure(arguments, data, workers, Path(folder) / f"cache-{workers}")
            figures.append({"kind": arguments.kind, **found})
            print(json.dumps(figures[-1]), flush=True)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
