"""What takes adapters, what `all-linear` leaves out, and what is refused."""

import pytest
import torch
from torch import nn

from adapters.methods.options import LaLoRAOptions, LoRAOptions
from adapters.methods.registry import METHODS
from adapters.methods.selection_options import WeightLoRAPlusOptions
from trainer.errors import UserError
from trainer.model.targets import choose_targets, within_blocks


def model(blocks: int = 2) -> nn.Module:
    """Blocks of a large matrix, a small one and a tiny one."""
    with torch.device("meta"):
        return nn.ModuleDict({
            "layers": nn.ModuleList(
                nn.ModuleDict({
                    "large": nn.Linear(64, 32), "small": nn.Linear(64, 6), "tiny": nn.Linear(2, 2),
                })
                for _ in range(blocks)
            )
        })  # fmt: skip


def names(*kinds: str) -> list[str]:
    return [f"layers.{index}.{kind}" for index in range(2) for kind in kinds]


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        (LoRAOptions(rank=2), ["large", "small", "tiny"]),
        (LoRAOptions(rank=4), ["large", "small"]),
        (LaLoRAOptions(rank=8), ["large"]),
        (METHODS["adalora"].Options(rank=6), ["large"]),  # starts with 1.5 · rank
        (WeightLoRAPlusOptions(rank=2, keep=1), ["large"]),  # expands to rank · units
    ],
)
def test_all_linear_leaves_out_what_is_too_small_for_the_method(options, chosen):
    found = choose_targets(model(), options, [], set(), ())
    assert found.chosen == names(*chosen)
    left = sorted({"large", "small", "tiny"} - set(chosen))
    assert within_blocks(model(), found.too_small) == left


def test_matrices_that_the_user_names_are_refused():
    for targets in (["large", "tiny"], ".*tiny|.*large"):
        with pytest.raises(UserError, match=r"method.rank: 4 given; accepted: at most 2.*tiny"):
            choose_targets(model(), LoRAOptions(rank=4, targets=targets), [], set(), ())


def test_a_rank_above_every_matrix_is_refused():
    with pytest.raises(UserError, match=r"method.rank: 64 given; accepted: at most 32"):
        choose_targets(model(), LoRAOptions(rank=64), [], set(), ())


def test_layers_that_the_model_reads_are_left_out_or_refused():
    read = set(names("large"))
    assert choose_targets(model(), LoRAOptions(rank=2), [], read, ()).chosen == names(
        "small", "tiny"
    )
    with pytest.raises(UserError, match=r"layers\.0\.large: ModuleDict reads its weight itself"):
        choose_targets(model(), LoRAOptions(rank=2, targets=["large"]), [], read, ())
    with pytest.raises(UserError, match="picks no linear layer"):
        choose_targets(model(), LoRAOptions(), [], set(names("large", "small", "tiny")), ())
