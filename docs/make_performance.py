"""Draw docs/performance.png from docs/performance.json: tokens/s per GPU, PEFT's, and the limit.

python docs/make_performance.py
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent


def main() -> None:
    measured = json.loads((HERE / "performance.json").read_text(encoding="utf-8"))
    jobs = measured["jobs"]
    figure, panels = plt.subplots(1, len(jobs), figsize=(12, 3.6), layout="constrained")
    for axes, job in zip(panels, jobs, strict=True):
        bars = {"PEFT": job["peft"], "rankcast": job["tokens_per_second"]}
        shown = {name: value for name, value in bars.items() if value is not None}
        colours = ["tab:blue" if name == "rankcast" else "0.6" for name in shown]
        drawn = axes.bar(list(shown), list(shown.values()), color=colours, width=0.6)
        axes.bar_label(drawn, fmt="{:,.0f}", padding=2)
        highest = max(shown.values())
        if job["limit"] is not None:
            axes.axhline(job["limit"], color="tab:red", ls="--", lw=1)
            axes.text(0.02, job["limit"], f" limit {job['limit']:,}", color="tab:red", va="bottom",
                      transform=axes.get_yaxis_transform(), fontsize="small")  # fmt: skip
            highest = job["limit"]
        axes.set_xlim(-0.6, 1.6 if len(shown) > 1 else 0.6)
        axes.set_ylim(0, 1.15 * highest)
        axes.set_title(job["job"], fontsize="small")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("tokens/s per GPU")
    figure.suptitle(f"{measured['date']}; limit: matrix products and attention at full rate")
    figure.savefig(HERE / "performance.png", dpi=110)


if __name__ == "__main__":
    main()
