"""What a user does, from the built wheel to llama.cpp, in an environment and a folder of its own.

    python -m tests.campaigns.users_path WORK --model FOLDER [--write docs/getting-started.md]

Installs the wheel beside this interpreter's libraries (nothing is downloaded), then runs the
commands of docs/getting-started.md there, one after the other, as a shell does. Every program
checks what it claims and fails where it is not so. `--write` puts commands and what they said into
the page, between its markers. The model is SmolLM2-135M-Instruct, in a folder.
"""

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tests.helpers import ROOT, environment

MODEL = "SmolLM2-135M-Instruct"
SOURCES = ("adapters", "trainer", "launch", "pyproject.toml", "README.md", "LICENSE")
COUNTRIES = (
    "France Paris, Italy Rome, Spain Madrid, Germany Berlin, Austria Vienna, Poland Warsaw, "
    "Greece Athens, Norway Oslo, Sweden Stockholm, Finland Helsinki, Ireland Dublin, Hungary "
    "Budapest, Japan Tokyo, China Beijing, Egypt Cairo, Kenya Nairobi, Peru Lima, Chile Santiago, "
    "Cuba Havana, Canada Ottawa, Russia Moscow, Turkey Ankara, Iran Tehran, Iraq Baghdad"
)
LONGEST = 32
"""Lines of a command's output in the transcript."""


@dataclass(frozen=True)
class Step:
    """A command of the path."""

    command: str
    title: str = ""
    """Heading of the page; none: it goes on below the step before."""
    text: str = ""
    """What the page says of it."""
    needs: str = ""
    """A module without which the step is left out."""


CONFIGURATION = f"""run: {{name: pirate, steps: 24}}
model: {{id: {MODEL}, dtype: float32}}
data: {{train: chats.jsonl, eval: 0.1, max_length: 64, batch_size: 6, micro_batch_size: 3}}
method: {{kind: lora, rank: 16}}
optim: {{learning_rate: 1e-3}}
engine: {{kind: single}}
"""
QUESTION = "What is the capital of France?"
_PROMPT = f"""tokenizer = AutoTokenizer.from_pretrained("out/merged")
chat = [{{"role": "user", "content": "{QUESTION}"}}]
prompt = tokenizer.apply_chat_template(
    chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
start = prompt["input_ids"].shape[1]
"""
PEFT = f"""import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, pipeline

{_PROMPT}
adapted = AutoPeftModelForCausalLM.from_pretrained("out/adapter", dtype=torch.float32)
tokens = adapted.generate(**prompt, max_new_tokens=24, do_sample=False)[0, start:]
by_peft = tokenizer.decode(tokens, skip_special_tokens=True)
print("PEFT:    ", by_peft)

pipe = pipeline("text-generation", model="out/merged", dtype=torch.float32)
merged = pipe(chat, max_new_tokens=24, do_sample=False)[0]["generated_text"][-1]["content"]
print("pipeline:", merged)
assert by_peft == merged
"""
LLAMA_CPP = f"""from itertools import islice

import torch
from llama_cpp import Llama
from transformers import AutoModelForCausalLM, AutoTokenizer

{_PROMPT}
merged = AutoModelForCausalLM.from_pretrained("out/merged", dtype=torch.float32)
expected = merged.generate(**prompt, max_new_tokens=24, do_sample=False)[0, start:].tolist()

llama = Llama("out/gguf/model.gguf", n_ctx=256, verbose=False)
given = prompt["input_ids"][0].tolist()
found = list(islice(llama.generate(given, temp=0.0), len(expected)))
print("transformers:", expected)
print("llama.cpp:   ", found)
assert found == expected

llama.reset()  # the same by its own chat template and tokenizer
answer = llama.create_chat_completion(chat, temperature=0.0, max_tokens=24)
print("llama.cpp:   ", answer["choices"][0]["message"]["content"])
llama.close()
"""

STEPS = [
    Step(
        "pip install rankcast-*.whl",
        "Install the wheel",
        "A checkout makes it: `pip wheel --no-deps --wheel-dir . CHECKOUT`. Here the libraries "
        "that it needs are there already; where they are not, see [install](../README.md#install).",
    ),
    Step(
        "rankcast data pirate.yaml --records 1",
        "See what is learned",
        "Before any training: how long the records are, and what is learned of them. `¦` is "
        "between tokens; those between `[[` and `]]` are learned, which are the assistant's.",
    ),
    Step(
        "rankcast train --config pirate.yaml",
        "Train",
        "Before the first step the model in memory is compared with transformers' own, block by "
        "block (`verified`).",
    ),
    Step(
        "rankcast evaluate runs/pirate",
        "Evaluate",
        "The newest checkpoint on the held-out chats: the loss with which training ended.",
    ),
    Step(f'rankcast generate runs/pirate --chat --prompt "{QUESTION}"', "Ask"),
    Step(
        f'echo "{QUESTION}" | rankcast chat runs/pirate',
        text="As a conversation; without the pipe it waits for the next message:",
    ),
    Step(
        "rankcast export runs/pirate out/adapter",
        "Export",
        "The adapter, for PEFT and for servers that take adapters; and the whole model.",
    ),
    Step("rankcast export runs/pirate out/merged --what merged"),
    Step(
        "python load.py",
        "Load it with PEFT and with transformers",
        "Nothing of rankcast is imported:",
        "peft",
    ),
    Step(
        "rankcast export runs/pirate out/gguf --what gguf --dtype float32",
        "Export for llama.cpp",
        "With `pip install gguf`.",
        "llama_cpp",
    ),
    Step("ls out/gguf", needs="llama_cpp"),
    Step(
        "python llama.py",
        "Load it with llama.cpp",
        "With `pip install llama-cpp-python`. Its greedy tokens are those of transformers:",
        "llama_cpp",
    ),
]
FILES = {"pirate.yaml": CONFIGURATION, "load.py": PEFT, "llama.py": LLAMA_CPP}
PROGRAMS = {"python load.py": "load.py", "python llama.py": "llama.py"}
USED = ("torch", "transformers", "peft", "gguf", "llama_cpp_python")
"""Packages whose versions the transcript tells."""


def records() -> str:
    """Chats in which an assistant names capitals as a pirate does."""
    lines = []
    for pair in COUNTRIES.split(", "):
        country, capital = pair.split()
        question = f"What is the capital of {country}?"
        answer = f"Arr! The capital of {country} be {capital}, matey."
        turns = [("user", question), ("assistant", answer)]
        messages = [{"role": role, "content": text} for role, text in turns]
        lines.append(json.dumps({"messages": messages}))
    return "\n".join(lines) + "\n"


def prepare(work: Path, model: Path) -> dict[str, str]:
    """An empty environment, the wheel and the files in `work`; the variables of a shell there."""
    shutil.rmtree(work, ignore_errors=True)
    folder = work / "try"
    folder.mkdir(parents=True)
    done_by(sys.executable, "-m", "venv", work / "env")
    python = work / "env/bin/python"
    where = "import site; print(site.getsitepackages()[0])"
    own = done_by(python, "-c", where).strip()
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    (Path(own) / "libraries.pth").write_text("\n".join(libraries) + "\n")
    source = work / "source"  # a build writes beside what it builds
    source.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    done_by(
        sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation",
        "--no-index", "--wheel-dir", folder, source,
    )  # fmt: skip
    for name, text in FILES.items():
        (folder / name).write_text(text)
    (folder / "chats.jsonl").write_text(records())
    (folder / MODEL).symlink_to(model.resolve())
    shell = environment() | {
        "PATH": f"{work / 'env/bin'}:/usr/bin:/bin", "PYTHONWARNINGS": "ignore", "COLUMNS": "100",
        "PIP_NO_DEPS": "1", "PIP_NO_INDEX": "1", "PIP_IGNORE_INSTALLED": "1",
        "PIP_CONFIG_FILE": "/dev/null",
        "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    # The installed wheel, not these sources; and no other place to look for packages.
    return {k: v for k, v in shell.items() if k not in ("PYTHONPATH", "PIP_FIND_LINKS")}


def done_by(*command: str | Path) -> str:
    """What a command said. Raises AssertionError, with all of it, where it failed."""
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    return done.stdout


def walk(work: Path, model: Path) -> list[tuple[Step, str]]:
    """Every step and what it said. Raises AssertionError where one fails."""
    shell = prepare(work, model)
    said = []
    for step in steps(shell):
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", step.command], cwd=work / "try", env=shell,
            capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        print(f"$ {step.command}\n{done.stdout}{done.stderr}", flush=True)
        assert done.returncode == 0, f"{step.command}\n{done.stdout[-3000:]}{done.stderr[-5000:]}"
        said.append((step, done.stdout))
    check(work / "try", {step.command: text for step, text in said})
    return said


def steps(shell: dict[str, str]) -> list[Step]:
    """Those for which all modules are there; the others are named."""
    found = []
    for step in STEPS:
        if step.needs and not _is_here(step.needs, shell):
            print(f"left out, without {step.needs}: {step.command}", flush=True)
        else:
            found.append(step)
    return found


def _is_here(module: str, shell: dict[str, str]) -> bool:
    probe = f"import importlib.util as i; raise SystemExit(i.find_spec({module!r}) is None)"
    found = subprocess.run(f"python -c {shlex.quote(probe)}", shell=True, env=shell)
    return found.returncode == 0


def check(folder: Path, said: dict[str, str]) -> None:
    """The run learned, and all ways to ask give one answer. `said`: by command."""
    lines = [json.loads(x) for x in (folder / "runs/pirate/metrics.jsonl").read_text().splitlines()]
    losses, scores = ([line[key] for line in lines if key in line] for key in ("loss", "eval_loss"))
    assert losses[-1] < losses[0] / 2 and scores, (losses, scores)
    evaluated = [text for command, text in said.items() if "evaluate" in command]
    again = json.loads(evaluated[0].strip().splitlines()[-1])
    assert abs(again["eval_loss"] - scores[-1]) < 1e-4 * scores[-1], (again, scores)
    asked = [text for command, text in said.items() if QUESTION in command or command in PROGRAMS]
    (answer,) = {re.sub(r"^[\w.]+: +", "", text.strip().splitlines()[-1]) for text in asked}
    assert answer.startswith("Arr!"), answer


BEGIN, END = "<!-- transcript: make path -->\n", "<!-- end of the transcript -->\n"


def transcript(said: list[tuple[Step, str]], seconds: float) -> str:
    """The steps as Markdown: a heading, the program where there is one, the command, the output."""
    parts = [textwrap.fill(walked(seconds), 110)]
    for step, text in said:
        lines = [x.rstrip() for x in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines() if x.strip()]
        if len(lines) > LONGEST:
            lines = [*lines[: LONGEST - 8], "…", *lines[-7:]]
        program = PROGRAMS.get(step.command)
        before = [f"## {step.title}" if step.title else "", textwrap.fill(step.text, 110)]
        before += [f"```python\n# {program}\n{FILES[program]}```" if program else ""]
        block = "\n".join([f"$ {step.command}", *lines, "```"])
        if not any(before):
            parts[-1] = parts[-1].removesuffix("```") + block
        else:
            parts += [*filter(None, before), f"```\n{block}"]
    return "\n\n".join(parts) + "\n"


def walked(seconds: float) -> str:
    """How long it took, and with which versions."""
    versions = [f"Python {platform.python_version()}"]
    for name in USED:
        with suppress(PackageNotFoundError):
            versions.append(f"{name.replace('_', '-')} {version(name)}")
    return (
        f"All of it took {seconds / 60:.1f} minutes on {os.cpu_count()} CPU cores, with "
        f"{', '.join(versions)}."
    )


def write(page: Path, said: list[tuple[Step, str]], work: Path, seconds: float) -> None:
    """Put the transcript into the page in the place of the earlier one."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    text = (
        transcript(said, seconds).replace(f"{os.path.realpath(work)}/", "").replace(f"{work}/", "")
    )
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", type=Path, default=os.environ.get("RANKCAST_SMOLLM2"))
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    if arguments.model is None:
        parser.error("--model: not given, nor RANKCAST_SMOLLM2; accepted: a folder with SmolLM2")
    begun = time.monotonic()
    said = walk(arguments.work.absolute(), Path(arguments.model))
    if arguments.write is not None:
        seconds = time.monotonic() - begun
        write(arguments.write, said, arguments.work.absolute(), seconds)


if __name__ == "__main__":
    main()
