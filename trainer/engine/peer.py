"""Blocks sharded over the ranks of a host, which read each other's shards by peer access.

The backbone never changes, so reading it needs no synchronisation: before a block runs, a rank
copies the block's shards on the other GPUs of its host directly from their memory
(`peer_memory.py`). No collective, no kernel: GEMMs keep all SMs during the prefetch of the next
block, and no rank waits for another. Every host holds the complete backbone, sharded over its GPUs.

This works only for matrices that operators look up when they run (`adapters/layers/handles.py`).
The other parameters of a block (norms, biases) are replicated, as are the embedding and the head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adapters.layers.base import PackedLayer
from adapters.rounding import round_up
from trainer.config.config import Config
from trainer.config.engines import AUTO
from trainer.distributed.world import World
from trainer.engine.base import Engine, backbone_parameters
from trainer.engine.peer_memory import open_peer_memory, possible
from trainer.errors import UserError
from trainer.model.blocks import hidden_state

_ALIGNMENT = 512  # bytes, of every matrix and of every shard


@dataclass(frozen=True)
class _Matrix:
    """Location of a layer's packed weight in the flat buffer of its block."""

    layer: PackedLayer
    start: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


class _Block:
    """The matrices of one block in one flat buffer, split into equal shards, one per rank of the
    host. The layers' own weights are emptied."""

    def __init__(self, block: nn.Module, world: World):
        self._matrices: list[_Matrix] = []
        end = 0
        for layer in block.modules():
            if isinstance(layer, PackedLayer):
                weight = layer.weight
                self._matrices.append(_Matrix(layer, end, weight.shape, weight.dtype))
                end = round_up(end + self._matrices[-1].nbytes, _ALIGNMENT)
        local_ranks = world.nodes[world.node]
        self._local_rank = local_ranks.index(world.rank)
        self.shard_bytes = round_up(-(-end // len(local_ranks)), _ALIGNMENT)
        self.nbytes = self.shard_bytes * len(local_ranks)
        self.unsharded: Tensor | None = None  # the flat buffer, if kept between steps
        self._shards = open_peer_memory(self.shard_bytes, world)
        first = self._local_rank * self.shard_bytes
        last = first + self.shard_bytes
        for matrix in self._matrices:
            begin, stop = max(first, matrix.start), min(last, matrix.start + matrix.nbytes)
            if begin < stop:
                packed = matrix.layer.weight.detach().reshape(-1).view(torch.uint8)
                wanted = packed[begin - matrix.start : stop - matrix.start]
                self._shards[self._local_rank][begin - first : stop - first].copy_(wanted)
        self.expose(None)

    def copy_into(self, buffer: Tensor) -> None:
        """Gather all shards, starting at the next rank's, so that ranks read from different GPUs at
        the same time."""
        count, size = len(self._shards), self.shard_bytes
        for turn in range(1, count + 1):
            index = (self._local_rank + turn) % count
            target = buffer[index * size : (index + 1) * size]
            target.copy_(self._shards[index], non_blocking=True)

    def expose(self, buffer: Tensor | None) -> None:
        """Point the layers' weights into `buffer`; None empties them."""
        for matrix in self._matrices:
            weight = matrix.layer.weight
            if buffer is None:
                weight.data = torch.empty(0, dtype=matrix.dtype, device=weight.device)
            else:
                data = buffer[matrix.start : matrix.start + matrix.nbytes]
                weight.data = data.view(matrix.dtype).view(matrix.shape)


class _Stage:
    """A gather buffer for one block, filled on a side stream (`stream` None: the current one)."""

    def __init__(self, nbytes: int, device: torch.device, stream: torch.cuda.Stream | None):
        self.buffer = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._holds: _Block | None = None
        self._stream = stream
        if stream is not None:
            self._filled, self._free = torch.cuda.Event(), torch.cuda.Event()

    def fill(self, block: _Block) -> None:
        if self._holds is block:
            return
        self._holds = block
        if self._stream is None:
            block.copy_into(self.buffer)
            return
        self._stream.wait_event(self._free)
        with torch.cuda.stream(self._stream):
            block.copy_into(self.buffer)
            self._filled.record(self._stream)

    def wait(self) -> None:
        """Make the current stream wait until the buffer is filled."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_event(self._filled)

    def release(self) -> None:
        """Allow the next `fill` once the work queued so far has run."""
        if self._stream is not None:
            self._free.record()


class PeerEngine(Engine):
    """Peer access with two gather buffers: the running block's and the next one's."""

    kind = "peer"
    spread = "blocks"
    collective_gather = False
    holds_gather_buffers = True

    def __init__(self, config: Config, world: World):
        super().__init__(config, world)
        if not world.peers:
            raise UserError(
                "engine.kind: peer given, but the GPUs of a host cannot read each other's memory; "
                f"accepted: auto or {AUTO['split']}"
            )
        on_gpu = world.device.type == "cuda"
        self._stream = torch.cuda.Stream(world.device, priority=-1) if on_gpu else None
        self._blocks: list[_Block] = []
        self._index: dict[nn.Module, int] = {}
        self._stages: list[_Stage] = []
        self._open: int | None = None  # the block whose weights are exposed

    @classmethod
    def obstacle(cls, world: World) -> str | None:
        return None if possible(world) else "they cannot share memory"

    def shard_block(self, block: nn.Module) -> None:
        index = self._index[block] = len(self._blocks)
        self._blocks.append(_Block(block, self.world))
        self.largest_block = max(self.largest_block, self._blocks[index].nbytes)
        block.register_forward_pre_hook(partial(self._before_forward, index))
        block.register_forward_hook(partial(self._after_forward, index))

    def shard(self, model: nn.Module) -> None:
        device, nbytes = self.world.device, self.largest_block
        self._stages = [_Stage(nbytes, device, self._stream) for _ in range(2)]
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
        self.world.gather(None)  # a barrier: every shard is written

    def _keep_unsharded(self, count: int) -> None:
        self._end()
        for index, block in enumerate(self._blocks):
            if index >= count:
                block.unsharded = None
            elif block.unsharded is None:
                block.unsharded = self._gathered(block)

    def _before_forward(self, index: int, *_: Any) -> None:
        self._begin(index, index + 1)

    def _after_forward(self, index: int, block: nn.Module, inputs: Any, output: Any) -> None:
        self._end()
        hidden = hidden_state(output)
        if hidden.requires_grad:
            hidden.register_hook(partial(self._before_backward, index))

    def _before_backward(self, index: int, *_: Any) -> None:
        self._begin(index, index - 1)

    def _begin(self, index: int, following: int) -> None:
        """Expose block `index`, and prefetch the one expected `following` it."""
        if self._open != index:
            self._end()
        block = self._blocks[index]
        if block.unsharded is None:
            stage = self._stages[index % 2]
            stage.fill(block)
            stage.wait()
            block.expose(stage.buffer)
        else:
            block.expose(block.unsharded)
        self._open = index
        if 0 <= following < len(self._blocks) and self._blocks[following].unsharded is None:
            self._stages[following % 2].fill(self._blocks[following])

    def _end(self) -> None:
        if self._open is not None:
            block = self._blocks[self._open]
            block.expose(None)
            if block.unsharded is None:
                self._stages[self._open % 2].release()
            self._open = None

    @contextmanager
    def unsharded(self, module: nn.Module) -> Iterator[None]:
        if module not in self._index:  # the rest of the model is replicated
            yield
            return
        self._end()
        block = self._blocks[self._index[module]]
        block.expose(self._gathered(block) if block.unsharded is None else block.unsharded)
        try:
            yield
        finally:
            block.expose(None)

    def _gathered(self, block: _Block) -> Tensor:
        buffer = torch.empty(block.nbytes, dtype=torch.uint8, device=self.world.device)
        block.copy_into(buffer)
        return buffer

    def local_bytes(self, model: nn.Module) -> int:
        self._end()
        replicated = sum(p.numel() * p.element_size() for p in backbone_parameters(model))
        unsharded = sum(block.nbytes for block in self._blocks if block.unsharded is not None)
        return replicated + unsharded + sum(block.shard_bytes for block in self._blocks)
