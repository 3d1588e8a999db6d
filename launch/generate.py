"""Continue prompts with a run's model, on any engine.

    rankcast generate runs/NAME --prompt "Question: 2 + 3?\\n"      texts as they are
    rankcast generate runs/NAME --chat --prompt "What is 2 + 3?"    by the chat template
    rankcast generate runs/NAME --data questions.jsonl --out answers.jsonl
    torchrun --nproc_per_node 2 launch/generate.py runs/NAME --data questions.jsonl

    rankcast generate runs/NAME --data HumanEval.jsonl --run-code --samples 20 --k 1,10 \\
        generation.temperature=0.8

The source may also be a checkpoint, or an adapter's folder (model.quantization is then none unless
given). Rows of `--data` are read as the run's own data, and need no answers. How tokens are chosen
is the configuration's section `generation`, such as generation.temperature=0.7. `--run-code` runs
the answers with the tests of HumanEval or MBPP and prints pass@k; see docs/generation.md first.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config.arguments import Parser, at_least, counts, new_file
from trainer.distributed.failures import guarded
from trainer.errors import UserError

if TYPE_CHECKING:
    from trainer.generation.generate import Answer
    from trainer.generation.prompts import Prompt
    from trainer.session import LoadedModel


def parse(argv: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    parser = Parser(__doc__, prog)
    parser.add_argument("source", type=Path, help="run, checkpoint or adapter folder")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", action="append", help="text to continue; may be repeated")
    what.add_argument("--data", help="file, folder or hub id of prompts")
    parser.add_argument("--chat", action="store_true", help="--prompt is a user's message")
    parser.add_argument("--records", type=at_least(1), help="the first rows of --data only")
    parser.add_argument("--samples", type=at_least(1), default=1, help="answers to each prompt")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of what is drawn")
    parser.add_argument("--run-code", action="store_true", help="run answers with their tests")
    parser.add_argument("--k", type=counts, help="of pass@k, by comma (1)")
    parser.add_argument("--out", type=new_file, help="JSONL file to write")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed's launcher
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    arguments = parse(argv, prog)
    from trainer.generation.code import WARNING, program
    from trainer.generation.generate import generate
    from trainer.run.launch import configure_libraries, join
    from trainer.run.saved_model import open_saved_model, saved_model_config

    configure_libraries()
    config = saved_model_config(arguments.source, arguments.overrides)
    if arguments.samples > 1 and config.generation.temperature == 0:
        raise UserError(
            f"--samples: {arguments.samples} given with generation.temperature=0, where all would "
            "be the same; accepted: a temperature above 0"
        )
    _check(arguments)
    lines: list[dict[str, Any]] = []
    with join(config) as world:
        if world.is_main and arguments.run_code:
            print(f"warning: {WARNING}", file=sys.stderr)
        model = open_saved_model(arguments.source, config, world)
        with world.all_or_none():
            prompts = _prompts(arguments, model)
            if arguments.run_code:  # fails before anything is generated
                for prompt in prompts:
                    program(prompt.row or {}, "")
        began = time.perf_counter()
        with model.watchdog:
            answers = generate(
                model,
                [prompt.ids for prompt in prompts for _ in range(arguments.samples)],
                config.generation,
                seed=arguments.seed,
                shown=config.log.shown,
            )
        seconds = time.perf_counter() - began
        if world.is_main:
            lines = list(_lines(model, prompts, answers, arguments.samples))
            if not arguments.run_code:
                _write(arguments, lines)
            tokens = sum(len(answer.tokens) for answer in answers)
            print(f"{tokens} tokens in {seconds:.1f} s, {tokens / seconds:.1f}/s", file=sys.stderr)
    if arguments.run_code and lines:
        _run_code(arguments, prompts, lines)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Raises UserError for arguments that do not go together."""
    if arguments.chat and arguments.data is not None:
        raise UserError(
            "--chat: given with --data, whose rows are read as the run's own; accepted: with "
            "--prompt"
        )
    if arguments.records is not None and arguments.data is None:
        raise UserError(f"--records: {arguments.records} given without --data; accepted: with it")
    if arguments.k is not None and not arguments.run_code:
        raise UserError("--k: given without --run-code; accepted: with it")
    arguments.k = arguments.k or [1]
    if arguments.run_code and arguments.data is None:
        raise UserError("--run-code: given without --data; accepted: with problems and tests")
    if arguments.run_code and max(arguments.k) > arguments.samples:
        raise UserError(
            f"--k: {max(arguments.k)} given with --samples {arguments.samples}; accepted: at "
            "most as many"
        )


def _run_code(
    arguments: argparse.Namespace, prompts: list["Prompt"], lines: list[dict[str, Any]]
) -> None:
    """Run the answers with their tests; no process group is joined any more."""
    from trainer.generation.code import mean_pass_at_k, program, run_programs

    rows = [prompts[line["record"]].row or {} for line in lines]
    pairs = zip(rows, lines, strict=True)
    results = run_programs([program(row, line["text"]) for row, line in pairs])
    for line, result in zip(lines, results, strict=True):
        line |= {"passed": result == "passed", "result": result}
    if arguments.out is not None:
        _write(arguments, lines)
    outcomes = [line["passed"] for line in lines]
    size = arguments.samples
    by_problem = [outcomes[first : first + size] for first in range(0, len(outcomes), size)]
    print(json.dumps(mean_pass_at_k(by_problem, arguments.k)))


def _prompts(arguments: argparse.Namespace, model: "LoadedModel") -> list["Prompt"]:
    from trainer.data.sources import read_rows
    from trainer.errors import BadRecord
    from trainer.generation.prompts import of_messages, of_rows, of_text

    options, task = model.config.data, model.task
    if arguments.data is not None:
        rows = read_rows(arguments.data, options.eval_split, options, arguments.records)
        return list(of_rows(rows, options, task))
    if not arguments.chat:
        return [of_text(text, options, task) for text in arguments.prompt]
    system = [{"role": "system", "content": options.system}] if options.system else []
    try:
        return [
            of_messages([*system, {"role": "user", "content": text}], options, task.tokenizer)
            for text in arguments.prompt
        ]
    except BadRecord as error:
        raise UserError(f"--chat: {error}") from error


def _write(arguments: argparse.Namespace, lines: list[dict[str, Any]]) -> None:
    """As JSONL; to `--prompt`, without `--out`, the texts as they are."""
    if arguments.out is None and arguments.prompt is not None:
        print("\n\n".join(line["text"] for line in lines))
        return
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    if arguments.out is None:
        print(text)
    else:
        arguments.out.write_text(f"{text}\n", encoding="utf-8")


def _lines(
    model: "LoadedModel", prompts: list["Prompt"], answers: list["Answer"], samples: int
) -> Iterator[dict[str, Any]]:
    for index, answer in enumerate(answers):
        prompt = prompts[index // samples]
        line: dict[str, Any] = {"record": index // samples}
        if samples > 1:
            line["sample"] = index % samples
        line["prompt"] = str(model.tokenizer.decode(prompt.ids))
        line["text"] = answer.text
        if prompt.reference is not None:
            line["reference"] = prompt.reference
        yield line | {"tokens": len(answer.tokens), "ended": answer.ended}


if __name__ == "__main__":
    with guarded():
        code = main()
    sys.exit(code)
