"""Export what a run trained.

    python launch/export.py runs/NAME out/                     a LoRA for PEFT, vLLM, SGLang
    python launch/export.py runs/NAME out/ --what merged       the backbone with the LoRA in it
    python launch/export.py runs/NAME out/ --what backbone     the backbone as it was trained on

A checkpoint folder serves in place of a run folder. After training on a quantised backbone,
`merged` and `backbone` hold the dequantised matrices (`--base original`: the unquantised ones),
and the export measures on the evaluation data what the adapter loses on the unquantised backbone.
"""

import argparse
from pathlib import Path

from trainer import distributed
from trainer.errors import UserError
from trainer.start import guarded


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="run folder or checkpoint folder")
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    parser.add_argument("--what", choices=("adapter", "merged", "backbone"), default="adapter")
    parser.add_argument("--base", choices=("trained", "original"), default="trained")
    parser.add_argument("--no-measure", action="store_true", help="skip the evaluation")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="where data moved"
    )
    return parser.parse_intermixed_args()


def main() -> None:
    arguments = parse()
    from trainer import export
    from trainer.config import with_overrides

    world = distributed.start(arguments.device)
    if arguments.out.exists():
        raise UserError(f"{arguments.out}: exists already; accepted: a folder that does not")
    checkpoint, state = export.locate(arguments.source)
    config = with_overrides(export.saved_config(state), arguments.overrides)
    state["config"] = config.model_dump(mode="json")
    note = ""
    if config.model.quantization != "none" and not arguments.no_measure:
        note = export.cost_of_dequantising(config, world, checkpoint)
        print(note)
    if arguments.what == "adapter":
        export.write_adapter(checkpoint, state, arguments.out, note)
    else:
        export.write_model(
            checkpoint, state, arguments.out,
            with_adapter=arguments.what == "merged",
            dequantised=arguments.base == "trained",
            device=world.device,
        )  # fmt: skip
    print(f"{arguments.what} of {checkpoint} written to {arguments.out}")


if __name__ == "__main__":
    with guarded():
        main()
