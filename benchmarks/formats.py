"""Quality and memory of each weight format: perplexity on held-out text.

    python benchmarks/formats.py MODEL TEXT [--records 120] [section.key=value ...]

TEXT is plain text that the model was not trained on, cut into records of 2000 characters; the first
`--records` are scored. The loss is the backbone's (a fresh LoRA adds 0); its difference from the
unquantised loss is paired over records.
"""

import json
import math
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch

from adapters.formats.formats import FORMATS
from trainer.config.arguments import Parser, at_least
from trainer.config.config import load_config
from trainer.distributed.failures import guarded
from trainer.distributed.world import World
from trainer.errors import UserError, first_line
from trainer.model.footprint import estimate
from trainer.session import open_session
from trainer.training.evaluation import mean_loss

CHARACTERS = 2000


def losses(
    fmt: str, model: str, file: Path, overrides: list[str]
) -> tuple[list[float], int, float]:
    """(mean loss of each record, bytes of the backbone, relative error of its matrices)."""
    config = load_config(
        "configs/gsm8k_lora.yaml",
        [
            f"model.id={model}", f"model.quantization={fmt}", f"data.train={file}",
            f"data.eval={file}", "data.subset=null", "data.format=text", "data.max_length=1024",
            "data.eval_records=null", "data.micro_batch_size=1", "task.loss_on=all",
            "engine.kind=single",
            f"data.cache={file.parent}/cache", *overrides,
        ],
    )  # fmt: skip
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    session = open_session(config, World(device=device))
    data, records = session.held_out()
    with torch.no_grad(), session.method.inference():
        found = [mean_loss(session, data, np.array([record])) for record in records]
    size = estimate(session.backbone, config, 1, "whole").backbone
    return found, size, session.backbone.quantization_error


def read(file: Path) -> str:
    """The text. Raises UserError where it is unreadable or too short."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: {first_line(error)}; accepted: a text in UTF-8") from error
    if len(text) <= 2 * CHARACTERS:
        raise UserError(f"{file}: {len(text)} characters; accepted: more than {2 * CHARACTERS}")
    return text


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--records", type=at_least(2), default=120)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    text = read(arguments.text)
    pieces = [text[i : i + CHARACTERS] for i in range(0, len(text) - CHARACTERS, CHARACTERS)]
    print("| format | perplexity | loss minus unquantised | error of W | backbone, MiB |")
    print("|---|---|---|---|---|")
    plain: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "text.jsonl"
        lines = (json.dumps({"text": piece}) for piece in pieces[: arguments.records])
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        for fmt in FORMATS:
            found, size, error = losses(fmt, arguments.model, file, arguments.overrides)
            plain = plain or found
            pairs = [a - b for a, b in zip(found, plain, strict=True)]
            spread = statistics.stdev(pairs) / math.sqrt(len(pairs))
            change = f"{statistics.mean(pairs):+.4f} ± {spread:.4f}"
            perplexity = math.exp(statistics.mean(found))
            size /= 2**20
            print(f"| {fmt} | {perplexity:.2f} | {change} | {error:.2%} | {size:.1f} |", flush=True)


if __name__ == "__main__":
    with guarded():
        main()
