"""Are the tests worth their time? Plant one fault, run the tests that should catch it.

    python -m tests.campaigns.planted_faults [--only NAME,…] [--control] [--list]

For every fault of `FAULTS` the project is copied to a temporary folder, one passage of one file is
replaced, and the named tests, all part of `make test`, are run there until the first one fails.
`--control` runs the same tests without a fault: they must pass. Prints a Markdown table; the exit
code is 1 where a fault was not caught, or where a control failed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.helpers import ROOT

OPTIMIZER, METHOD_TESTS = "tests/unit/adapters/test_optimizer.py", "tests/unit/adapters/methods"
ENGINES, METHODS = "tests/world/test_engines.py", "tests/world/test_methods.py"
CHECKPOINT = "tests/unit/trainer/checkpoint/test_checkpoint.py"


@dataclass(frozen=True)
class Fault:
    """`old`, found exactly once in `file`, is replaced by `new`; `tests` should then fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


FAULTS = [
    Fault(
        "the optimizer ignores masks", "adapters/optimizer.py",
        "state.copy_(value if keep is None else torch.where(keep, value, state))",
        "state.copy_(value)",
        (OPTIMIZER, METHODS),
    ),
    Fault(
        "inactive components decay", "adapters/optimizer.py",
        "        direction = (m / correction1)",
        "        if keep is not None:\n"
        "            values.mul_(1 - self.learning_rate * self.weight_decay)\n"
        "        direction = (m / correction1)",
        (OPTIMIZER,),
    ),
    Fault(
        "gradients are not summed over ranks", "trainer/engine/base.py",
        "self.world.sum_(optimizer.gradients)", "pass",
        (ENGINES,),
    ),
    Fault(
        "one rank skips the all-reduce", "trainer/engine/base.py",
        "self.world.sum_(optimizer.gradients)",
        "self.world.sum_(optimizer.gradients if self.world.is_main else optimizer.gradients + 0)",
        (ENGINES,),
    ),
    Fault(
        "a decision is applied a step late", "trainer/decisions/consensus.py",
        "changed = method.apply(decision)",
        "earlier, method.late = getattr(method, 'late', decision), decision\n"
        "        changed = method.apply(earlier)",
        (METHODS, "tests/unit/trainer/run/test_run.py"),
    ),
    Fault(
        "a checkpoint is taken up without its moments", "trainer/checkpoint/state.py",
        'session.optimizer.load_state_dict(_unflatten(stored, "optimizer/"))', "pass",
        (CHECKPOINT,),
    ),
    Fault(
        "rank 0's own state is not restored", "trainer/checkpoint/state.py",
        'session.method.load_decider_state(_below(stored, "decider/"))', "pass",
        ("tests/world/test_method_resume.py",),
    ),
    Fault(
        "an export leaves the gates out", "adapters/factors.py",
        "(adapter.B.detach() * adapter.g.detach().unsqueeze(1)).cpu()",
        "adapter.B.detach().cpu()",
        ("tests/unit/trainer/export/test_export.py",),
    ),
    Fault(
        "deepspeed silently becomes ddp", "trainer/engine/select.py",
        'return asked, ""', 'return asked.replace("deepspeed", "ddp"), ""',
        (ENGINES,),
    ),
    Fault(
        "blocks stay gathered from forward to backward", "trainer/engine/fsdp2.py",
        "fully_shard(block, mesh=self._mesh, reshard_after_forward=True)",
        "fully_shard(block, mesh=self._mesh, reshard_after_forward=False)",
        (ENGINES,),
    ),
    Fault(
        "a block runs with another block's weights", "trainer/engine/peer.py",
        "if self._holds is block:", "if self._holds is not None:",
        (ENGINES,),
    ),
    Fault(
        "dropout is the same in every micro-batch", "adapters/adapter_set.py",
        "self._dropout_seed.fill_(seeds.mixed(self.seed, step, micro_batch))",
        "self._dropout_seed.fill_(seeds.mixed(self.seed, step, 0))",
        (f"{METHOD_TESTS}/test_lora.py", "tests/unit/trainer/training/test_structure.py"),
    ),
    Fault(
        "every rank draws another adapter", "adapters/methods/base.py",
        "return seeds.generator(self.seed, purpose, unit.index)",
        'rank = int(__import__("os").environ.get("RANK", 0))\n'
        "        return seeds.generator(self.seed + rank, purpose, unit.index)",
        ("tests/world/test_loading.py",),
    ),
    Fault(
        "a resumed loader repeats a record", "trainer/data/loader.py",
        '"offset": self.offset, "sequences"', '"offset": max(0, self.offset - 1), "sequences"',
        ("tests/unit/trainer/data/test_loader.py", CHECKPOINT),
    ),
    Fault(
        "a checkpoint holds the position of the step prepared ahead", "trainer/data/prefetch.py",
        "self._position = prepared.position\n",
        "self._position = {**prepared.position, "
        '"offset": prepared.position["offset"] + self._loader.options.batch_size}\n',
        ("tests/unit/trainer/data/test_prefetch.py",),
    ),
    Fault(
        "documents of a row end to end see each other", "trainer/tasks/causal_lm.py",
        "if len(examples) > len(sequences):", "if len(sequences) > 1:",
        ("tests/unit/trainer/data/test_rows.py",),
    ),
    Fault(
        "a micro-batch by tokens holds one too many", "trainer/data/micro_batches.py",
        "fits = all(load <= capacity or", "fits = all(load <= capacity + 1 or",
        ("tests/unit/trainer/data/test_micro_batches.py",),
    ),
    Fault(
        "each rank takes its own mean over tokens", "trainer/training/step.py",
        "loss = loss / batch.weight",
        "loss = loss / max(1, sum(part.weight for _, part in batch.micro_batches))",
        (ENGINES,),
    ),
    Fault(
        "the mean counts padding-free tokens, not learned ones", "trainer/data/loader.py",
        "weight=int(self.data.weights[records].sum()),",
        "weight=int(self.data.lengths[records].sum()),",
        ("tests/unit/trainer/data/test_loader.py",),
    ),
    Fault(
        "scales are rounded to bfloat16", "adapters/formats/formats.py",
        "scale_bytes = scales.float()", "scale_bytes = scales.bfloat16().float()",
        ("tests/unit/adapters/formats/test_formats.py",),
    ),
    Fault(
        "methods observe clipped gradients", "trainer/engine/base.py",
        "        self.world.sum_(optimizer.gradients)\n",
        "        self.world.sum_(optimizer.gradients)\n        optimizer.clip(0.01)\n",
        (f"{METHOD_TESTS}/test_lalora.py", "tests/unit/trainer/training", METHODS),
    ),
    Fault(
        "a replay takes a record whose digest differs", "trainer/decisions/replay.py",
        'if line["digest"] != digest:', "if False:",
        (METHODS,),
    ),
    Fault(
        "a run that is asked to stop saves nothing", "trainer/training/loop.py",
        "if last or stopping or _due(config.checkpoint.every, progress.step):",
        "if last or _due(config.checkpoint.every, progress.step):",
        ("tests/unit/trainer/training/test_stop_request.py",),
    ),
    Fault(
        "an encoder's head reads the last token of a text", "trainer/tasks/sequence_classification.py",
        "_reads_at(model, ends[:-1])", "_reads_at(model, ends[1:] - 1)",
        ("tests/unit/trainer/tasks/test_encoders_end_to_end.py",),
    ),
    Fault(
        "backward drops other scores than forward", "trainer/model/varlen_dropout.py",
        "found = varlen_dropout_backward(dout, *ctx.saved_tensors, *ctx.numbers)",
        "query, key, value, out, lse, state, at = ctx.saved_tensors\n"
        "    state = (state.view(torch.int64) + 1).view(torch.uint64)\n"
        "    given = (query, key, value, out, lse, state, at)\n"
        "    found = varlen_dropout_backward(dout, *given, *ctx.numbers)",
        ("tests/unit/trainer/model/test_varlen_dropout.py",),
    ),
    Fault(
        "the numbers of a block are traced as inputs", "trainer/model/blocks.py",
        "torch._dynamo.config.specialize_float = constant_floats", "pass",
        ("tests/unit/trainer/model/test_blocks.py",),
    ),
    Fault(
        "an evaluation leaves a record out", "trainer/training/evaluation.py",
        "parts = _forward(session, data, records)\n",
        "parts = _forward(session, data, records[:-1])\n",
        ("tests/unit/trainer/training/test_evaluation.py",),
    ),
    Fault(
        "a larger survivor keeps the smaller one's alpha/r", "adapters/methods/weightlora.py",
        "return self.options.alpha / rank if self.options.rescale_alpha else self.scale",
        "return self.scale",
        (f"{METHOD_TESTS}/test_weightlora.py",),
    ),
    Fault(
        "a failure on one rank leaves the others waiting", "trainer/distributed/world.py",
        "            raise self._elsewhere(failed[0], reports[failed[0]]) from failure\n",
        "            return\n",
        ("tests/world/test_bad_input.py",),
    ),
    Fault(
        "hosts on which nothing failed end without a word", "trainer/distributed/world.py",
        "speaks = rank not in ranks and self.rank == ranks[0]", "speaks = False",
        ("tests/unit/trainer/distributed/test_hosts.py",),
    ),
    Fault(
        "prompts are padded on the right", "trainer/generation/generate.py",
        "start = 0 if apart else width - len(row)", "start = 0",
        ("tests/unit/trainer/generation/test_generate.py",),
    ),
    Fault(
        "a rank without prompts leaves the others alone", "trainer/generation/generate.py",
        "if own or synced:", "if own:",
        ("tests/world/test_generation.py",),
    ),
    Fault(
        "all blocks pay one price", "adapters/methods/lelora/reinforce.py",
        'part = layer if options.within == "layer" else torch.zeros_like(layer)',
        "part = torch.zeros_like(layer)",
        (f"{METHOD_TESTS}/lelora/test_budget.py",),
    ),
    Fault(
        "what a block's price leaves goes to no one", "adapters/methods/lelora/reinforce.py",
        'fill = options.within == "layer"', "fill = False",
        (f"{METHOD_TESTS}/lelora/test_budget.py",),
    ),
    Fault(
        "kept results of another control are shown", "trainer/comparison/kept.py",
        'arm.permuted == "any"', "False",
        ("tests/unit/trainer/comparison/test_summary.py",),
    ),
]  # fmt: skip


def copy_project(target: Path) -> None:
    """The working tree, without what git ignores; the real data beside it, where it is there."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    shared = ROOT.parent / "shared"
    if shared.exists():
        (target.parent / "shared").symlink_to(shared.resolve())


def plant(project: Path, fault: Fault) -> None:
    """Raises ValueError where the passage is not there exactly once."""
    file = project / fault.file
    text = file.read_text() if file.is_file() else ""
    if text.count(fault.old) != 1:
        raise ValueError(
            f"{fault.name}: found {text.count(fault.old)} times in {fault.file}: {fault.old!r}"
        )
    file.write_text(text.replace(fault.old, fault.new))


def run_tests(project: Path, tests: tuple[str, ...]) -> tuple[bool, str]:
    """(whether all passed, the first failure). RuntimeError where no test could be run."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests],
        cwd=project, capture_output=True, text=True,
        env={k: v for k, v in os.environ.items() if k != "RANKCAST_ALL"} | {"PYTHONPATH": ""},
    )  # fmt: skip
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest ended in {done.returncode}\n{done.stdout[-3000:]}{done.stderr}")
    failures = [line for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return done.returncode == 0, failures[0] if failures else ""


def try_one(fault: Fault, *, control: bool) -> tuple[bool, str]:
    """(whether the tests passed, the first failure)."""
    with tempfile.TemporaryDirectory(prefix="rankcast-fault-") as folder:
        project = Path(folder) / "project"
        copy_project(project)
        if not control:
            plant(project, fault)
        return run_tests(project, fault.tests)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", default="", help="names, or parts of them, with commas between")
    parser.add_argument("--control", action="store_true", help="run the tests without the faults")
    parser.add_argument("--list", action="store_true", help="only check that all can be planted")
    options = parser.parse_args()
    wanted = [part for part in options.only.split(",") if part]
    chosen = [f for f in FAULTS if not wanted or any(part in f.name for part in wanted)]
    if not chosen:
        parser.error(f"--only: {options.only} given; accepted: {', '.join(f.name for f in FAULTS)}")
    with tempfile.TemporaryDirectory(prefix="rankcast-fault-") as folder:
        for fault in chosen:  # before hours of tests
            project = Path(folder) / "project"
            shutil.rmtree(project, ignore_errors=True)
            (project / fault.file).parent.mkdir(parents=True)
            shutil.copy2(ROOT / fault.file, project / fault.file)
            plant(project, fault)
    if options.list:
        print(f"{len(chosen)} faults can be planted")
        return
    print("| fault | result | seconds | first failure |\n|---|---|---|---|")
    wrong = 0
    for fault in chosen:
        started = time.monotonic()
        passed, failure = try_one(fault, control=options.control)
        wrong += passed != options.control
        result = (
            ("passes" if passed else "FAILS")
            if options.control
            else ("NOT CAUGHT" if passed else "caught")
        )
        print(f"| {fault.name} | {result} | {time.monotonic() - started:.0f} | {failure.split(' - ')[0]} |",
              flush=True)  # fmt: skip
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
