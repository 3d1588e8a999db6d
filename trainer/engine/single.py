"""One process without sharding or communication."""

from contextlib import nullcontext

from torch import nn

from trainer.engine.base import Engine, backbone_parameters


class SingleEngine(Engine):
    """The backbone is complete on the only rank."""

    kind = "single"
    spread = "whole"
    collective_gather = False

    def shard_block(self, block: nn.Module) -> None:
        """The block stays as it was loaded."""

    def shard(self, model: nn.Module) -> None:
        """The model stays as it was loaded."""

    def unsharded(self, module: nn.Module) -> nullcontext:
        return nullcontext()

    def local_bytes(self, model: nn.Module) -> int:
        trains = self.config.method.trains == "backbone"
        parameters = model.parameters() if trains else backbone_parameters(model)
        return sum(p.numel() * p.element_size() for p in parameters)
