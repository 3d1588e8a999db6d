"""Put the tables of benchmarks/results/ into docs/results.md, between lines such as

    <!-- table: smollm2_gsm8k/table.md -->
    <!-- end -->

The tables are remade from the kept results by

    rankcast compare benchmarks/smollm2_*.yaml benchmarks/results --minutes 0 --any-code
"""

import re
from pathlib import Path

PAGE = Path(__file__).with_name("results.md")
TABLES = Path(__file__).parents[1] / "benchmarks/results"
_BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(page: str, tables: Path) -> str:
    """The page with the tables as they are now. Raises OSError for one that is not there."""

    def with_table(block: re.Match[str]) -> str:
        table = (tables / block[2]).read_text(encoding="utf-8").strip()
        return f"{block[1]}\n{table}\n\n{block[3]}"

    return _BLOCK.sub(with_table, page)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), TABLES), encoding="utf-8")
