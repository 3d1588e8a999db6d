"""Broadcast and all-gather msgpack objects in one collective with fixed-size buffers.

torch's object collectives send sizes first, which takes a second collective. Here the buffer has
room for the messages of a training step; only a message that does not fit takes a second round,
with buffers of the longest message's size.
"""

from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
import torch

MESSAGE_BYTES = 2**15
"""Buffer of a broadcast: a decision about 640 units takes 6 KB, AdaLoRA's with 24 components each
18 KB."""

DIGEST_BYTES = 2**8
"""Buffer of an all-gather: an exit code and a digest."""

HEADER = 8
"""Bytes of the length prefix."""

Exchange = Callable[[torch.Tensor], torch.Tensor]
"""A collective: this rank's buffer (bytes) → the received buffers (ranks, bytes). All ranks call it
with buffers of one size."""


def exchange(value: Any, exchange_buffers: Exchange, size: int) -> list[Any]:
    """The values of the ranks whose buffers the collective returns, in their order. `size`: bytes
    of the first round's buffer."""
    message = encoded(value)
    received = exchange_buffers(_buffer(message, size)).numpy()
    lengths = [int(buffer[:HEADER].view(np.int64)[0]) for buffer in received]
    if max(lengths) > size - HEADER:
        received = exchange_buffers(_buffer(message, HEADER + max(lengths))).numpy()
    return [
        msgpack.unpackb(buffer[HEADER : HEADER + length])
        for buffer, length in zip(received, lengths, strict=True)
    ]


def encoded(value: Any) -> bytes:
    """A value as a message."""
    return msgpack.packb(value)


def _buffer(message: bytes, size: int) -> torch.Tensor:
    """The length prefix and as much of the message as fits."""
    buffer = np.zeros(size, dtype=np.uint8)
    buffer[:HEADER] = np.frombuffer(len(message).to_bytes(HEADER, "little"), dtype=np.uint8)
    fitting = message[: size - HEADER]
    buffer[HEADER : HEADER + len(fitting)] = np.frombuffer(fitting, dtype=np.uint8)
    return torch.from_numpy(buffer)
