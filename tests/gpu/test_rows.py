"""Rows end to end and steps prepared ahead, on a GPU."""

import pytest
import torch
from transformers import AutoTokenizer

from tests.helpers import TINY, losses, quick_config
from tests.unit.trainer.data.test_loader import dataset, loader
from trainer.data.prefetch import Prefetcher
from trainer.data.rows import Rows
from trainer.distributed import process_group
from trainer.run.run import run
from trainer.tasks.causal_lm import CausalLM, CausalLMOptions

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


def test_prepared_steps_arrive_whole() -> None:
    """Tensors of the thread's stream, read at once while the GPU is busy and memory is reused."""
    task = CausalLM(CausalLMOptions(), AutoTokenizer.from_pretrained(TINY))
    data = dataset([3 + 7 * n % 30 for n in range(53)])
    rows = Rows(end_to_end=True, few=4)
    alone, busy = loader(data, task, rows=rows), torch.randn(4096, 4096, device="cuda")
    with Prefetcher(loader(data, task, rows=rows), torch.device("cuda"), 40) as ahead:
        for _ in range(40):
            busy = busy @ busy * 1e-2
            step, expected = ahead.next_step(), alone.next_step()
            for (_, batch), (_, own) in zip(
                step.micro_batches, expected.micro_batches, strict=True
            ):
                assert batch.targets.is_cuda
                assert torch.equal(batch.targets.cpu(), own.targets)
                assert torch.equal(batch.inputs["input_ids"].cpu(), own.inputs["input_ids"])


@pytest.mark.parametrize("tokens", [False, True])
def test_losses_of_padded_rows(tmp_path, tokens: bool) -> None:
    by_tokens = ["data.micro_batch_size=null", "data.micro_batch_tokens=512"] if tokens else []
    found = []
    for free in ("true", "false"):
        config = quick_config(
            tmp_path, f"run.name=free-{free}", "engine.device=cuda", "data.max_length=256",
            f"data.padding_free={free}", *by_tokens,
        )  # fmt: skip
        run(config, process_group.start("cuda"))
        found.append(losses(config.run_folder))
    assert found[0] == pytest.approx(found[1], rel=2e-2)
