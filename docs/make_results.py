"""Remake the tables of benchmarks/results/ from the results kept there, without a run, and put them
into docs/results.md, between lines such as

    <!-- table: smollm2_gsm8k/table.md -->
    <!-- end -->

`python docs/make_results.py` in the project's root; two minutes.
"""

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path

PAGE = Path(__file__).with_name("results.md")
FILES = Path(__file__).parents[1] / "benchmarks"
TABLES = FILES / "results"
TASKS = ("gsm8k", "arc_easy", "openbookqa", "boolq", "sst2", "mrpc", "rte", "cola", "stsb")
"""Those of a summary, in its order; other comparisons have a table alone."""
NONE = "No runs so far."
_BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(page: str, tables: Path) -> str:
    """The page with the tables as they are now, or that there is none."""

    def with_table(block: re.Match[str]) -> str:
        file = tables / block[2]
        table = file.read_text(encoding="utf-8").strip() if file.exists() else ""
        is_empty = table.partition("\n\n")[0].count("\n") < 2  # beside its head and a line
        return f"{block[1]}\n{NONE if is_empty else table}\n\n{block[3]}"

    return _BLOCK.sub(with_table, page)


def comparisons(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """(variant, names of files) of what is kept in a folder: all tasks of a variant together, other
    files one by one."""
    kept = sorted(file.parent.name.partition("-")[::2] for file in folder.glob("*/*.jsonl.xz"))
    for variant in dict.fromkeys(variant for _, variant in kept):
        of = [(name.partition("_")[2], name) for name, other in kept if other == variant]
        yield variant, [name for task in TASKS for of_task, name in of if of_task == task]
        yield from ((variant, [name]) for task, name in of if task not in TASKS)


def remake(folder: Path) -> None:
    """Write the tables of a folder of kept results anew."""
    from launch import compare

    for variant, names in comparisons(folder):
        files = [str(FILES / f"{name}.yaml") for name in names]
        options = ["--minutes", "0", "--any-code", *(["--variant", variant] if variant else [])]
        if files:
            with contextlib.redirect_stdout(io.StringIO()):
                compare.main([*files, str(folder), *options])


if __name__ == "__main__":
    remake(TABLES)
    remake(TABLES / "minilm")
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), TABLES), encoding="utf-8")
