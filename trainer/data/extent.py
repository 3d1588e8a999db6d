"""How much of a source has been read."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass
class Extent:
    """Filled in by who reads a source: bytes of its files (as they lie on disk), or rows."""

    done: float = 0.0
    total: float = 0.0
    """0: not known."""

    def expect(self, amount: float) -> None:
        """There is so much more to read than was known."""
        self.total += amount

    def add(self, amount: float) -> None:
        self.done += amount

    def counted(self, rows: Iterable[T], number: int) -> Iterator[T]:
        """These `number` rows, each of which is added when it is read."""
        self.expect(number)
        for row in rows:
            yield row
            self.add(1)

    @property
    def share(self) -> float | None:
        """Of the whole, from 0 to 1; None where that is not known."""
        return min(1.0, self.done / self.total) if self.total else None
