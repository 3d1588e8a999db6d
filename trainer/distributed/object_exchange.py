"""Plain data (msgpack's) as pages of bytes: it then takes one collective and not two.

torch's own collectives for objects send sizes first. Here a page has room for what is sent while
training; only where a value does not fit is there a second round, with pages for the longest.
"""

from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
import torch

MESSAGE_BYTES = 2**15
"""Bytes that one sends to all: a decision about 640 units takes 6 KB, AdaLoRA's with 24 components
each 18."""

DIGEST_BYTES = 2**8
"""Bytes that all send to all: an exit code, a digest."""

HEADER = 8
"""Bytes in front that say how many follow."""

Exchange = Callable[[torch.Tensor], torch.Tensor]
"""Takes one's page (bytes), gives everyone's (ranks, bytes); all ranks call it with one size."""


def exchange(value: Any, exchange_buffers: Exchange, size: int) -> list[Any]:
    """The values of everyone whose pages, of `size` bytes at first, come back, in their order."""
    message = encoded(value)
    received = exchange_buffers(_buffer(message, size)).numpy()
    lengths = [int(page[:HEADER].view(np.int64)[0]) for page in received]
    if max(lengths) > size - HEADER:
        received = exchange_buffers(_buffer(message, HEADER + max(lengths))).numpy()
    return [
        msgpack.unpackb(page[HEADER : HEADER + length])
        for page, length in zip(received, lengths, strict=True)
    ]


def encoded(value: Any) -> bytes:
    """What a letter says."""
    return msgpack.packb(value)


def _buffer(message: bytes, size: int) -> torch.Tensor:
    """The letter behind its length; as much of it as fits."""
    page = np.zeros(size, dtype=np.uint8)
    page[:HEADER] = np.frombuffer(len(message).to_bytes(HEADER, "little"), dtype=np.uint8)
    fitting = message[: size - HEADER]
    page[HEADER : HEADER + len(fitting)] = np.frombuffer(fitting, dtype=np.uint8)
    return torch.from_numpy(page)
