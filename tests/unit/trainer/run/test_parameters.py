"""Counted parameters are those of the exported file."""

import pytest
from safetensors.torch import load_file

from tests.helpers import quick_config
from trainer.distributed.world import World
from trainer.run.run import run


@pytest.mark.parametrize("method", ["lora", "pissa", "weightlora"])
def test_the_counts_of_a_run_are_those_of_what_it_exports(tmp_path, method):
    config = quick_config(tmp_path, "run.name=a", f"method.kind={method}", "run.steps=3")
    found = run(config, World())
    exported = load_file(config.run_folder / "adapter/adapter_model.safetensors")
    assert found.exported == sum(tensor.numel() for tensor in exported.values())
    # PiSSA's slice is exported beside what it has become
    assert found.touched == found.exported / (2 if method == "pissa" else 1)
    assert found.others == 0
