"""Several processes, each with the whole (quantised) backbone; only adapters' gradients travel.

torch's DistributedDataParallel has nothing to add here: the backbone has no gradients, and the
adapters' are one flat buffer already.
"""

from trainer.engine.single import SingleEngine


class DDPEngine(SingleEngine):
    """The fastest engine where the backbone fits on every rank."""

    kind = "ddp"
