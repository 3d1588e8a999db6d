"""A long run watched from outside: does anything grow?

    python -m tests.campaigns.long_run OUT [--steps 20000] [--method lelora]

A tiny model on a CPU, a decision before every step, every step logged, a checkpoint every 100.
Memory, open files and step time are read from outside while it runs; their slopes, fitted by least
squares after the first tenth, and the sizes of what it wrote are printed as a Markdown table.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from transformers import AutoModelForCausalLM

from tests.helpers import ROOT, finish, quick_config, save_random_model, start
from trainer.records.heartbeat import read_heartbeat

Sample = tuple[int, float, int]
"""(step, resident MiB, open files)."""


def sample(run: Path) -> Sample | None:
    """How the process stands now; None where it is gone."""
    beat = read_heartbeat(run)
    process = Path(f"/proc/{beat.get('pid')}")
    try:
        status = (process / "status").read_text()
        files = len(list((process / "fd").iterdir()))
    except OSError:
        return None
    resident = next((line for line in status.splitlines() if line.startswith("VmRSS:")), None)
    if resident is None:  # ended, and not yet waited for
        return None
    return beat["step"], int(resident.split()[1]) / 1024, files


def size(paths: list[Path]) -> str:
    return f"{sum(path.stat().st_size for path in paths) / 2**20:.2f} MiB"


def slope(steps: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """(change over a thousand steps, its standard error)."""
    (rate, _), covariance = np.polyfit(steps, values, 1, cov=True)
    return 1000 * rate, 1000 * float(np.sqrt(covariance[0, 0]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--method", default="lelora")
    arguments = parser.parse_args()
    out, steps = arguments.out.resolve(), arguments.steps
    save_random_model(
        out / "model", "llama", AutoModelForCausalLM, hidden_size=32, intermediate_size=48,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    config = quick_config(
        out, f"model.id={out}/model", f"run.name={arguments.method}", f"run.steps={steps}",
        f"method.kind={arguments.method}", "method.rank=4", "data.batch_size=1",
        "data.micro_batch_size=1", "data.max_length=128", "data.eval=null", "checkpoint.every=100",
        "log.tensorboard=true", "log.decisions_mib=1", "optim.learning_rate=1e-4",
    )  # fmt: skip
    (out / "config.yaml").write_text(config.to_yaml())
    process = start("python", 1, ROOT / "launch/train.py", "--config", str(out / "config.yaml"))
    samples: list[Sample] = []
    while process.poll() is None:
        now = sample(config.run_folder)
        if now is not None and (not samples or now[0] > samples[-1][0]):
            samples.append(now)
        time.sleep(1)
    code, _, err = finish(process)
    assert code == 0, err[-3000:]

    run = config.run_folder
    settled = np.array([s for s in samples if s[0] > steps / 10])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = np.array([line["step_seconds"] for line in lines])
    late = np.arange(len(seconds)) >= len(seconds) / 10
    decisions = sorted(run.glob("allocation*"))
    rows = {
        "steps, samples": f"{len(lines)}, {len(samples)}",
        "resident memory after a tenth, at the end": f"{settled[0, 1]:.1f}, {settled[-1, 1]:.1f} MiB",
        "slope of memory": "{:+.3f} ± {:.3f} MiB per 1000 steps".format(*slope(settled[:, 0], settled[:, 1])),
        "open files, least and most": f"{int(settled[:, 2].min())}, {int(settled[:, 2].max())}",
        "step time, median of the second and last tenth": "{:.2f}, {:.2f} ms".format(
            *(1000 * np.median(part) for part in (np.array_split(seconds, 10)[i] for i in (1, 9)))
        ),
        "slope of step time": "{:+.4f} ± {:.4f} ms per 1000 steps".format(
            *slope(np.arange(len(seconds))[late], 1000 * seconds[late])
        ),
        "allocation.jsonl": f"{size(decisions)} in {len(decisions)} files",
        "TensorBoard": size(list((run / "tensorboard").iterdir())),
        "metrics.jsonl": size([run / "metrics.jsonl"]),
        "checkpoints kept": str(len(list((run / "checkpoints").glob("step-*")))),
    }  # fmt: skip
    print("| | |\n|---|---|")
    print("\n".join(f"| {name} | {value} |" for name, value in rows.items()))


if __name__ == "__main__":
    main()
