"""Draw docs/methods.png: what five methods decide while the quickstart's model trains.

python docs/make_methods.py
"""

import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from trainer.config.config import load_config
from trainer.distributed.world import World
from trainer.report.allocation_history import by_layer, by_type, read_allocation
from trainer.run.run import run

HERE = Path(__file__).parent
STEPS, RANK, SPANS = 80, 8, 80
METHODS = {
    "lelora": (),
    "lalora": ("method.gamma=5",),
    "weightlora_plus": ("method.warmup_steps=40",),
    "adalora": ("method.delta_t=2", "method.tinit=10", "method.tfinal=20"),
    "dylora": (),
}


def trained(folder: str, kind: str) -> Path:
    """The folder of a run of one process."""
    config = load_config(
        HERE.parent / "configs/quickstart.yaml",
        [
            "engine.kind=single", f"run.dir={folder}/runs", f"run.name={kind}", "run.resume=never",
            f"run.steps={STEPS}", f"data.cache={folder}/cache", "run.eval_every=0",
            "log.progress=none", "log.tensorboard=false", "checkpoint.every=0", "run.verify=off",
            "data.batch_size=4", "data.micro_batch_size=4", f"method.kind={kind}",
            f"method.rank={RANK}", *METHODS[kind],
        ],
    )  # fmt: skip
    run(config, World())
    return config.run_folder


def main() -> None:
    figure, rows = plt.subplots(2, len(METHODS), figsize=(15, 5), layout="constrained", sharex=True)
    with tempfile.TemporaryDirectory() as folder:
        for column, kind in enumerate(METHODS):
            allocation = read_allocation(trained(folder, kind), RANK, STEPS)
            assert allocation is not None
            for axes, groups in zip(
                rows[:, column],
                (by_layer(allocation.units), by_type(allocation.units)),
                strict=True,
            ):
                edges, means = allocation.ranks.spans(groups, STEPS, SPANS)
                mesh = axes.pcolormesh(edges, range(len(groups) + 1), means, vmin=0, vmax=2 * RANK)
                named = column == 0
                axes.set_yticks(
                    [n + 0.5 for n in range(len(groups))], list(groups) if named else []
                )
                axes.invert_yaxis()
            rows[0, column].set_title(kind)
            rows[1, column].set_xlabel("optimizer step")
    rows[0, 0].set_ylabel("layer")
    figure.colorbar(mesh, ax=rows, label="mean rank", extend="max")
    figure.savefig(HERE / "methods.png", dpi=110)


if __name__ == "__main__":
    main()
