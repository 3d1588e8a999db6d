"""Write records of very different lengths: GSM8K, mixed with pieces of books.

    python -m benchmarks.mixed_records GSM8K.jsonl BOOKS.txt OUT.jsonl [--longest 3000] [--seed 0]

Books are cut at random: a piece has between 16 words and `--longest`, log-uniformly, its first
eight words being the question. Every second record is one, while the books last; then they are cut
again, elsewhere. Records have the columns of GSM8K, question and answer.
"""

import argparse
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path

from trainer.config.arguments import Parser, at_least, new_file

SHORTEST = 16


def pieces(words: list[str], longest: int, draw: random.Random) -> Iterator[list[str]]:
    """Endless pieces of the text, of random lengths."""
    while True:
        start = draw.randrange(SHORTEST)
        while start + SHORTEST <= len(words):
            size = round(math.exp(draw.uniform(math.log(SHORTEST), math.log(longest))))
            yield words[start : start + size]
            start += size


def mixed(records: list[dict], words: list[str], longest: int, seed: int) -> Iterator[dict]:
    """Records and pieces in turn."""
    draw = random.Random(seed)
    for record, piece in zip(records, pieces(words, longest, draw), strict=False):
        yield record
        yield {"question": " ".join(piece[:8]), "answer": " ".join(piece[8:])}


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("gsm8k", type=argparse.FileType(encoding="utf-8"))
    parser.add_argument("books", type=Path)
    parser.add_argument("out", type=new_file)
    parser.add_argument("--longest", type=at_least(SHORTEST), default=3000, help="words")
    parser.add_argument("--seed", type=at_least(0), default=0)
    arguments = parser.parse_args()
    records = [json.loads(line) for line in arguments.gsm8k]
    words = arguments.books.read_text(encoding="utf-8").split()
    with arguments.out.open("w", encoding="utf-8") as stream:
        for record in mixed(records, words, arguments.longest, arguments.seed):
            stream.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
