"""Runs over two and three hosts, which are network namespaces, and what happens to hosts.

    python -m tests.campaigns.hosts OUT [--only cut-fsdp2,…]

Needs root, and Debian's nftables. In every case each host that is left says, within
`engine.timeout` + 15 s of the fault, what is wrong; no process and no listening port is left; and
the run, started again on healthy hosts, ends with the losses of an undisturbed one, to the last bit
(on fewer hosts within 1e-4). Prints a Markdown table; OUT/hosts.json holds the single cases.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from tests.campaigns.host_cases import CASES
from tests.campaigns.host_trial import Trial
from tests.campaigns.namespaces import Network


def table(found: dict[str, dict[str, Any]]) -> str:
    rows = ["| fault | engine, hosts, launcher | outcome | until all had ended | `--only` |",
            "|---|---|---|---|---|"]  # fmt: skip
    for name, row in found.items():
        outcome = "; ".join(row["problems"]) or row["said"] or "the same losses"
        after = "" if row["seconds"] is None else f"{row['seconds']:.0f} s"
        rows.append(f"| {row['fault']} | {row['where']} | {outcome} | {after} | `{name}` |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", help="cases, by comma; none: those without a result in OUT")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    file = out / "hosts.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    names = arguments.only.split(",") if arguments.only else [n for n in CASES if n not in found]
    for name in names:
        case = CASES[name]
        with Network(out, case.hosts) as hosts:
            trial = Trial(out, name, case.engine, case.launcher, hosts, case.elastic)
            shutil.rmtree(trial.run, ignore_errors=True)
            case.what(trial)
        found[name] = {
            "fault": str(case.what.__doc__).rstrip("."), "problems": trial.problems,
            "where": f"{case.engine}, {case.hosts}, {case.launcher}",
            "said": trial.said, "seconds": trial.seconds,
        }  # fmt: skip
        print(name, found[name], flush=True)
        file.write_text(json.dumps({n: found[n] for n in CASES if n in found}, indent=1))
    print(table(found))


if __name__ == "__main__":
    main()
