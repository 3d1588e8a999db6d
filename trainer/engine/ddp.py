"""Data parallelism: the (quantised) backbone is replicated, the adapters' gradients all-reduced.

torch's DistributedDataParallel is not needed: the backbone has no gradients, and the adapters' are
one flat buffer already.
"""

from trainer.engine.single import SingleEngine


class DDPEngine(SingleEngine):
    """Replicas of the backbone: the fastest engine where they fit on every rank."""

    kind = "ddp"
