"""What a start compiles on a GPU."""

import pytest
import torch
import torch._dynamo.utils

from tests.helpers import quick_config
from trainer.distributed import process_group
from trainer.run.run import run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_no_trace_of_a_block_is_thrown_away(tmp_path, quantization: str, attention: str) -> None:
    """Neither handles, spans nor the numbers of a block are traced as inputs that are none."""
    torch._dynamo.reset()
    torch._dynamo.utils.clear_compilation_metrics()
    config = quick_config(
        tmp_path, "engine.device=cuda", "engine.compile=true", "model.dtype=bfloat16",
        f"model.quantization={quantization}", f"model.attention={attention}", "run.steps=3",
        "data.packing=true", "data.max_length=256",
    )  # fmt: skip
    run(config, process_group.start("cuda"))
    metrics = torch._dynamo.utils.get_compilation_metrics()
    # The first is of transformers ≥ 5.18 or so, the second before.
    blocks = [m for m in metrics if m.co_name in ("forward_with_checkpointing", "forward")]
    assert blocks
    assert not [m.restart_reasons for m in blocks if m.restart_reasons]
