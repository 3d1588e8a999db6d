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
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
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
LONGEST = 24
"""Lines of a command's output in the transcript."""


@dataclass(frozen=True)
class Step:
    """A command of the path."""

    title: str
    command: str
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
PEFT = f"""import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, pipeline

tokenizer = AutoTokenizer.from_pretrained("out/merged")
adapted = AutoPeftModelForCausalLM.from_pretrained("out/adapter", dtype=torch.float32)
chat = [{{"role": "user", "content": "{QUESTION}"}}]
ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")[
    "input_ids"
]
answer = adapted.generate(
    input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False
)
peft = tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)
print("peft:    ", peft)

pipe = pipeline("text-generation", model="out/merged", dtype=torch.float32)
merged = pipe(chat, max_new_tokens=24, do_sample=False)[0]["generated_text"][-1]["content"]
print("pipeline:", merged)
assert peft == merged
"""
LLAMA_CPP = f"""import glob
import torch
from llama_cpp import Llama
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("out/merged")
chat = [{{"role": "user", "content": "{QUESTION}"}}]
ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")[
    "input_ids"
]
merged = AutoModelForCausalLM.from_pretrained("out/merged", dtype=torch.float32)
tokens = merged.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
expected = tokens[0, ids.shape[1] :].tolist()

(file,) = glob.glob("out/gguf/*.gguf")
llama = Llama(file, n_ctx=256, n_threads=1, verbose=False)
found = []
for token in llama.generate(ids[0].tolist(), temp=0.0):
    found.append(token)
    if len(found) == len(expected):
        break
print("llama.cpp:", tokenizer.decode(found, skip_special_tokens=True))
assert found == expected, (found, expected)
"""

STEPS = [
    Step("Install the wheel", "pip install rankcast-*.whl"),
    Step("See what is learned", "rankcast data pirate.yaml --records 1"),
    Step("Train", "rankcast train --config pirate.yaml"),
    Step("Evaluate", "rankcast evaluate runs/pirate"),
    Step("Ask", f'rankcast generate runs/pirate --chat --prompt "{QUESTION}"'),
    Step("Chat, one line", f'echo "{QUESTION}" | rankcast chat runs/pirate'),
    Step("Export the adapter", "rankcast export runs/pirate out/adapter"),
    Step("Export the whole model", "rankcast export runs/pirate out/merged --what merged"),
    Step("Load both: PEFT, and transformers' pipeline", "python load.py", "peft"),
    Step(
        "Export for llama.cpp",
        "rankcast export runs/pirate out/gguf --what gguf --dtype float32",
        "llama_cpp",
    ),
    Step("Load it: the same tokens", "python llama.py", "llama_cpp"),
]
FILES = {"pirate.yaml": CONFIGURATION, "load.py": PEFT, "llama.py": LLAMA_CPP}
PROGRAMS = {"python load.py": "load.py", "python llama.py": "llama.py"}


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
    run = {"check": True, "capture_output": True, "text": True, "env": environment()}
    subprocess.run([sys.executable, "-m", "venv", work / "env"], **run)
    python = work / "env/bin/python"
    where = "import site; print(site.getsitepackages()[0])"
    own = subprocess.run([python, "-c", where], **run).stdout.strip()
    libraries = subprocess.run([sys.executable, "-c", where], **run).stdout.strip()
    (Path(own) / "libraries.pth").write_text(libraries + "\n")
    source = work / "source"  # a build writes beside what it builds
    source.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    subprocess.run(
        [
            sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation",
            "--no-index", "--wheel-dir", folder, source,
        ],
        **run,
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


def walk(work: Path, model: Path) -> list[tuple[Step, str]]:
    """Every step and what it said. Raises AssertionError where one fails."""
    shell = prepare(work, model)
    said = []
    for step in STEPS:
        if step.needs and not _is_here(step.needs, shell):
            print(f"left out, without {step.needs}: {step.command}", flush=True)
            continue
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", step.command], cwd=work / "try", env=shell,
            capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        print(f"$ {step.command}\n{done.stdout}{done.stderr}", flush=True)
        assert done.returncode == 0, f"{step.command}\n{done.stdout[-3000:]}{done.stderr[-5000:]}"
        said.append((step, done.stdout))
    check(work / "try", {step.title: text for step, text in said})
    return said


def _is_here(module: str, shell: dict[str, str]) -> bool:
    probe = ["python", "-c", f"import {module}"]
    found = subprocess.run(shlex.join(probe), shell=True, env=shell, capture_output=True)
    return found.returncode == 0


def check(folder: Path, said: dict[str, str]) -> None:
    """The run learned, nothing came from the sources, and all ways to ask give one answer."""
    lines = [json.loads(x) for x in (folder / "runs/pirate/metrics.jsonl").read_text().splitlines()]
    losses, scores = ([line[key] for line in lines if key in line] for key in ("loss", "eval_loss"))
    assert losses[-1] < losses[0] / 2 and scores, (losses, scores)
    again = json.loads(said["Evaluate"].strip().splitlines()[-1])
    assert abs(again["eval_loss"] - scores[-1]) < 1e-4 * scores[-1], (again, scores)
    answers = {line.split(":", 1)[1].strip() for line in said[STEPS[8].title].splitlines()[-2:]}
    (answer,) = answers
    assert answer.startswith("Arr!"), answer
    for way in ("Ask", "Chat, one line"):
        assert answer in said[way], (way, answer, said[way])


BEGIN, END = "<!-- transcript: make path -->\n", "<!-- end of the transcript -->\n"


def transcript(said: list[tuple[Step, str]]) -> str:
    """The steps as Markdown: a heading, the program where there is one, the command, the output."""
    parts = []
    for step, text in said:
        lines = [x.rstrip() for x in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines() if x.strip()]
        if len(lines) > LONGEST:
            lines = [*lines[: LONGEST - 8], "…", *lines[-7:]]
        program = PROGRAMS.get(step.command)
        shown = f"```python\n# {program}\n{FILES[program]}```\n\n" if program else ""
        output = "".join(f"{line}\n" for line in lines)
        parts.append(f"## {step.title}\n\n{shown}```\n$ {step.command}\n{output}```\n")
    return "\n".join(parts)


def write(page: Path, said: list[tuple[Step, str]], work: Path) -> None:
    """Put the transcript into the page in the place of the earlier one."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    text = transcript(said).replace(f"{os.path.realpath(work)}/", "").replace(f"{work}/", "")
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", type=Path, default=os.environ.get("RANKCAST_SMOLLM2"))
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    if arguments.model is None:
        parser.error("--model: not given, nor RANKCAST_SMOLLM2; accepted: a folder with SmolLM2")
    said = walk(arguments.work.absolute(), Path(arguments.model))
    if arguments.write is not None:
        write(arguments.write, said, arguments.work.absolute())


if __name__ == "__main__":
    main()
