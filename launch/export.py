"""Export a run's adapter, or a merged model.

    rankcast export runs/NAME out/                     a LoRA for PEFT, vLLM, SGLang
    rankcast export runs/NAME out/ --rank 8            the same, compressed
    rankcast export runs/NAME out/ --experts stacked   experts in PEFT's own layout alone
    rankcast export runs/NAME out/ --what merged       the backbone with the LoRA merged
    rankcast export runs/NAME out/ --what backbone     the backbone used in training
    rankcast export runs/NAME out/ --what gguf         the merged model for llama.cpp and Ollama
    rankcast export runs/NAME out/ --what gguf-adapter the LoRA for llama.cpp and Ollama

The source may also be a checkpoint folder. After training on a quantised backbone, `merged` and
`backbone` contain the dequantised matrices (`--base original`: the unquantised ones), and the
export measures on the evaluation data the loss of the adapter on the unquantised backbone.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.config.arguments import Parser
from trainer.distributed.failures import guarded


def parse(argv: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    parser = Parser(__doc__, prog)
    parser.add_argument("source", type=Path, help="run folder or checkpoint folder")
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    parser.add_argument(
        "--what",
        choices=("adapter", "merged", "backbone", "gguf", "gguf-adapter"),
        default="adapter",
    )
    parser.add_argument("--base", choices=("trained", "original"), default="trained")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16", "q8_0"),
        default="auto",
        help="of a whole model; auto: that of the pretrained files; q8_0: of a gguf alone",
    )
    parser.add_argument("--rank", type=int, help="compress the adapter; the error is reported")
    parser.add_argument(
        "--same-rank", action="store_true", help="pad all matrices to one rank, for SGLang"
    )
    parser.add_argument(
        "--experts",
        choices=("per_expert", "stacked"),
        help="layout of experts' adapters: for vLLM, SGLang and PEFT (default where the model's "
        "files hold every expert by itself), or for PEFT alone",
    )
    parser.add_argument("--no-measure", action="store_true", help="skip the evaluation")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="such as new data paths"
    )
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    arguments = parse(argv, prog)
    from trainer.distributed import process_group
    from trainer.export.export import export_run
    from trainer.run.launch import configure_libraries

    configure_libraries()
    note = export_run(
        arguments.source,
        arguments.out,
        process_group.start(arguments.device),
        what=arguments.what,
        base=arguments.base,
        measure=not arguments.no_measure,
        rank=arguments.rank,
        same_rank=arguments.same_rank,
        experts=arguments.experts,
        dtype=arguments.dtype,
        overrides=arguments.overrides,
    )
    print(
        f"{note}\n" * bool(note) + f"{arguments.what} of {arguments.source} is in {arguments.out}"
    )
    return 0


if __name__ == "__main__":
    with guarded():
        code = main()
    sys.exit(code)
