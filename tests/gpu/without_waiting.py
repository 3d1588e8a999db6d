"""A task's loss on a GPU, of which no part waits for the GPU."""

import torch

from trainer.model.attention import VARLEN


def loss_without_waiting(task, model, examples) -> float:
    """Of the examples end to end in a row of 64 tokens, by varlen in bfloat16; with its backward
    pass. Fails where either synchronises."""
    model = model.to("cuda", torch.bfloat16)
    model.config._attn_implementation = VARLEN
    batch = task.collate([examples], width=64).to(torch.device("cuda"))
    task.loss(model, batch)  # the first call looks up the tables of positions
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, _ = task.loss(model, batch)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return float(loss.detach())
