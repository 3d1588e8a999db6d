"""Zero-shot figures of multiple choice beside those of EleutherAI's harness, on the same records.

    python -m tests.campaigns.lm_eval_figures DATA OUT MODEL [--records 300] [--only NAME…]
        [--site FOLDER] [--run RUN]

DATA holds LLM-Adapters' json (ARC-Easy, boolq, openbookqa). OUT/tasks gets the harness's task
files: prompts, choices and labels as its own tasks of these sets have them, but for BoolQ's
passages, which LLM-Adapters' json leaves out. Printed for each set, in percent: our acc and
acc_norm of the plain MODEL, and the harness's on the model that our session holds. `lm_eval
--model hf --model_args pretrained=MODEL --include_path OUT/tasks --tasks …` gives the harness's
own loading beside it. `--run`: of a run's adapter on its backbone, instead of the plain model.
`--site`: a further folder of packages, behind all others, that holds the harness.
"""

import argparse
import json
import re
import sys
import time
from pathlib import Path

SETS = {  # (file, the harness's task, its prompt, choices, and our keys of `data`)
    "ARC-Easy": ("arc_easy", "Question: {{question}}\nAnswer:", []),
    "boolq": (
        "boolq_without_passage", "Question: {{question}}?\nAnswer:",
        ["data.choice_texts=['yes', 'no']"],
    ),
    "openbookqa": ("openbookqa", "{{question}}", ["data.prompt=question"]),
}  # fmt: skip


def rows(file: Path, records: int) -> list[dict]:
    """The first records of a file, in a form of our own for the harness: read here, not by the
    product."""
    found = []
    for row in json.loads(file.read_text())[:records]:
        text = row["instruction"].split(": ", 1)[1]
        question, _, rest = text.partition("\n\n")
        if row["answer"] in ("true", "false"):
            texts, label = ["no", "yes"], int(row["answer"] == "true")
            question = question.removesuffix("?")
        else:
            listed = (
                rest.rpartition(" Answer format: ")[0] or rest.partition("\n\nAnswer format")[0]
            )
            texts = [text.strip() for text in re.split(r"\s*Answer\d: ?", listed)[1:]]
            label = int(row["answer"][-1]) - 1
        found.append({"question": question.strip(), "choices": texts, "label": label})
    return found


def write_tasks(data: Path, out: Path, records: int) -> None:
    (out / "tasks").mkdir(parents=True, exist_ok=True)
    for name, (task, prompt, _) in SETS.items():
        file = out / f"{task}.jsonl"
        lines = rows(data / name / "test.json", records)
        file.write_text("".join(json.dumps(row) + "\n" for row in lines))
        described = {
            "task": f"local_{task}", "dataset_path": "json", "test_split": "test",
            "dataset_kwargs": {"data_files": {"test": str(file.resolve())}},
            "output_type": "multiple_choice", "doc_to_text": prompt, "doc_to_target": "label",
            "doc_to_choice": "choices",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }  # fmt: skip
        (out / f"tasks/{task}.yaml").write_text(json.dumps(described, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("data", "out", "model"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--records", type=int, default=300)
    parser.add_argument("--only", nargs="*", default=list(SETS))
    parser.add_argument("--site", type=Path)
    parser.add_argument("--run", type=Path)
    arguments = parser.parse_args()
    write_tasks(arguments.data, arguments.out, arguments.records)
    if arguments.site is not None:
        sys.path.append(str(arguments.site))
    from tests.helpers import quick_config
    from trainer.checkpoint.saved import read_saved
    from trainer.config.config import with_overrides
    from trainer.distributed.world import World
    from trainer.export.export import saved_config
    from trainer.session import open_session
    from trainer.training.evaluation import full_evaluation, open_saved
    from trainer.training.harness import run_harness

    for name in arguments.only:
        task, _, options = SETS[name]
        file = arguments.data / name / "test.json"
        given = [
            f"model.id={arguments.model}", "task.kind=multiple_choice", "data.format=commonsense",
            "data.prompt=prompt", f"data.train={file}", f"data.eval={file}",
            f"data.eval_records={arguments.records}", "data.packing=false", "data.max_length=512",
            "data.micro_batch_size=8", *options,
        ]  # fmt: skip
        if arguments.run is None:
            session = open_session(quick_config(arguments.out, *given), World())
        else:
            saved = read_saved(arguments.run)
            config = with_overrides(saved_config(saved.state), given)
            session = open_saved(config, World(), saved)
        own = full_evaluation(session)
        began = time.monotonic()
        found = run_harness(session, [f"local_{task}"], include=arguments.out / "tasks")
        theirs = found[f"local_{task}"]
        line = {"set": name, "records": len(own.answers)}
        for ours, key in (("accuracy", "acc"), ("accuracy_norm", "acc_norm")):
            line[key] = round(100 * own.scores[f"eval_{ours}"], 2)
            line[f"harness {key}"] = round(100 * theirs[f"{key},none"], 2)
        line |= {"seconds": round(own.seconds), "harness seconds": round(time.monotonic() - began)}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
