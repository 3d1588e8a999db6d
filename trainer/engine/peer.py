"""Every rank holds a part of each block and reads the other parts where its neighbours keep them.

The backbone never changes, so nobody has to be asked for it: before a block runs, a rank copies the
parts of it that lie on the other GPUs of its host straight out of their memory (`windows.py`). No
collective, no kernel, no staging: products keep the whole GPU while the next block arrives, and no
rank waits for another. Hosts do not share: each has the whole backbone, spread over its GPUs.

Only matrices that operators look up when they run (`adapters/layers/handles.py`) can come and go
in this way; what else a block holds (norms, biases) stays whole everywhere, as do embedding and
head.
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

_ALIGNMENT = 512  # bytes, of every matrix and of every part


@dataclass(frozen=True)
class _Matrix:
    """Where a host's packed weight lies among its block's bytes."""

    host: PackedLayer
    start: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


class _Block:
    """The matrices of one block, laid end to end and cut into equal parts, one for each rank of the
    host. They are taken over whole and left empty."""

    def __init__(self, block: nn.Module, world: World):
        self._matrices: list[_Matrix] = []
        end = 0
        for host in block.modules():
            if isinstance(host, PackedLayer):
                weight = host.weight
                self._matrices.append(_Matrix(host, end, weight.shape, weight.dtype))
                end = round_up(end + self._matrices[-1].nbytes, _ALIGNMENT)
        local_ranks = world.nodes[world.node]
        self._place = local_ranks.index(world.rank)
        self.part = round_up(-(-end // len(local_ranks)), _ALIGNMENT)
        """Bytes of each rank's part."""
        self.size = self.part * len(local_ranks)
        self.whole: Tensor | None = None  # all of it, where it stays from step to step
        self._parts = open_peer_memory(self.part, world)
        first, last = self._place * self.part, (self._place + 1) * self.part
        for matrix in self._matrices:
            begin, stop = max(first, matrix.start), min(last, matrix.start + matrix.nbytes)
            if begin < stop:
                packed = matrix.host.weight.detach().reshape(-1).view(torch.uint8)
                wanted = packed[begin - matrix.start : stop - matrix.start]
                self._parts[self._place][begin - first : stop - first].copy_(wanted)
        self.expose(None)

    def copy_into(self, buffer: Tensor) -> None:
        """All parts, one's neighbour's first: not all ranks read the same one at the same time."""
        count = len(self._parts)
        for turn in range(1, count + 1):
            index = (self._place + turn) % count
            target = buffer[index * self.part : (index + 1) * self.part]
            target.copy_(self._parts[index], non_blocking=True)

    def expose(self, buffer: Tensor | None) -> None:
        """Let the hosts find their weights in `buffer`; None: nowhere."""
        for matrix in self._matrices:
            weight = matrix.host.weight
            if buffer is None:
                weight.data = torch.empty(0, dtype=matrix.dtype, device=weight.device)
            else:
                data = buffer[matrix.start : matrix.start + matrix.nbytes]
                weight.data = data.view(matrix.dtype).view(matrix.shape)


class _Stage:
    """Room for one whole block. It is filled beside what runs, where there is a stream for it."""

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
        """What runs from here on finds the block."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_event(self._filled)

    def release(self) -> None:
        """What has run until here was the last to use it."""
        if self._stream is not None:
            self._free.record()


class PeerEngine(Engine):
    """Two stages: the block that runs, and the one that is next."""

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
        self._open: int | None = None  # the block whose hosts find their weights

    @classmethod
    def obstacle(cls, world: World) -> str | None:
        return None if possible(world) else "they cannot share memory"

    def shard_block(self, block: nn.Module) -> None:
        index = self._index[block] = len(self._blocks)
        self._blocks.append(_Block(block, self.world))
        self.largest_block = max(self.largest_block, self._blocks[index].size)
        block.register_forward_pre_hook(partial(self._before_forward, index))
        block.register_forward_hook(partial(self._after_forward, index))

    def shard(self, model: nn.Module) -> None:
        device, nbytes = self.world.device, self.largest_block
        self._stages = [_Stage(nbytes, device, self._stream) for _ in range(2)]
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
        self.world.gather(None)  # every part is written

    def _keep_unsharded(self, count: int) -> None:
        self._end()
        for index, block in enumerate(self._blocks):
            if index >= count:
                block.whole = None
            elif block.whole is None:
                block.whole = torch.empty(block.size, dtype=torch.uint8, device=self.world.device)
                block.copy_into(block.whole)

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
        """Let block `index` run, and fetch the one that is likely to follow meanwhile."""
        if self._open != index:
            self._end()
        block = self._blocks[index]
        if block.whole is None:
            stage = self._stages[index % 2]
            stage.fill(block)
            stage.wait()
            block.expose(stage.buffer)
        else:
            block.expose(block.whole)
        self._open = index
        if 0 <= following < len(self._blocks) and self._blocks[following].whole is None:
            self._stages[following % 2].fill(self._blocks[following])

    def _end(self) -> None:
        if self._open is not None:
            block = self._blocks[self._open]
            block.expose(None)
            if block.whole is None:
                self._stages[self._open % 2].release()
            self._open = None

    @contextmanager
    def unsharded(self, module: nn.Module) -> Iterator[None]:
        if module not in self._index:  # the rest of the model is whole anyway
            yield
            return
        self._end()
        block = self._blocks[self._index[module]]
        whole = block.whole
        if whole is None:
            whole = torch.empty(block.size, dtype=torch.uint8, device=self.world.device)
            block.copy_into(whole)
        block.expose(whole)
        try:
            yield
        finally:
            block.expose(None)

    def local_bytes(self, model: nn.Module) -> int:
        self._end()
        whole = sum(p.numel() * p.element_size() for p in backbone_parameters(model))
        kept = sum(block.size for block in self._blocks if block.whole is not None)
        return whole + kept + sum(block.part for block in self._blocks)
