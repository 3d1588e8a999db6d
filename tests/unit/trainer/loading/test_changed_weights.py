"""Weights that have changed since a checkpoint was made, wherever in a tensor."""

import json
import shutil
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers import TINY, losses, quick_config, save_mixture
from trainer.checkpoint import store
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.loading.load import _weights
from trainer.loading.safetensors_files import PretrainedFiles, tensor_digests
from trainer.run.run import run


def config(tmp, *more):
    return quick_config(
        tmp, "run.steps=1", "method.rank=2", "data.eval=null", f"model.id={tmp}/model", *more
    )


def changed(file, key, change) -> None:
    tensors = load_file(file)
    change(tensors[key])
    save_file(tensors, file, {"format": "pt"})


@pytest.fixture
def trained(tmp_path):
    shutil.copytree(TINY, tmp_path / "model")
    run(config(tmp_path), World())
    return tmp_path, tmp_path / "model/model.safetensors"


@pytest.mark.parametrize("rows", [slice(0, 1), slice(1, None, 2)])
def test_changed_rows_outside_the_sample_are_refused_by_name(rows, trained):
    tmp, file = trained
    sampled = PretrainedFiles(tmp / "model").digest()
    key = "model.layers.1.mlp.down_proj.weight"
    changed(file, key, lambda tensor: tensor[rows].zero_())
    assert PretrainedFiles(tmp / "model").digest() == sampled, "the sample sees it"
    with pytest.raises(UserError, match=rf"the values of {key} have changed since .*step-00000001"):
        run(config(tmp, "run.steps=2"), World())
    assert len(store.complete(tmp / "runs/quickstart/checkpoints")) == 1


def test_the_same_weights_in_other_files_are_the_same(trained):
    tmp, file = trained
    tensors = load_file(file)
    first, second = dict(list(tensors.items())[::2]), dict(list(tensors.items())[1::2])
    file.unlink()
    file_of = {}
    for name, part in (("b.safetensors", first), ("a.safetensors", second)):
        save_file(part, tmp / "model" / name, {"format": "pt"})
        file_of |= dict.fromkeys(part, name)
    index = tmp / "model/model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": file_of}))
    run(config(tmp, "run.steps=2"), World())
    assert len(losses(tmp / "runs/quickstart")) == 2


def test_one_expert_of_many_is_seen(tmp_path):
    save_mixture(tmp_path / "model", "mixtral")
    run(config(tmp_path, "method.targets=[q_proj]"), World())
    key = next(
        key for key in load_file(tmp_path / "model/model.safetensors") if ".experts.3." in key
    )
    changed(tmp_path / "model/model.safetensors", key, lambda tensor: tensor[0].mul_(2))
    with pytest.raises(UserError, match=r"experts\.\*\.\w+\.weight have changed since"):
        run(config(tmp_path, "method.targets=[q_proj]", "run.steps=2"), World())


def test_parts_make_up_the_tensor_whichever_rank_reads_them():
    parts = {("a", 0): b"1", ("a", 8): b"2", ("l.experts.0.w", 0): b"3", ("l.experts.1.w", 0): b"4"}
    digests = tensor_digests(parts)
    assert digests == tensor_digests(dict(reversed(parts.items())))
    assert digests.keys() == {"a", "l.experts.*.w"}
    for part in parts:
        other = tensor_digests({**parts, part: b"5"})
        assert [name for name in digests if digests[name] != other[name]] == [
            "a" if part[0] == "a" else "l.experts.*.w"
        ]


def test_hosts_that_read_other_bytes_are_told(tmp_path):
    save_file({"w": torch.ones(3)}, tmp_path / "model.safetensors")
    files = PretrainedFiles(tmp_path)
    files.read("w")
    world = World()
    ours = files.parts_read()
    theirs = dict.fromkeys(ours, b"other")
    with patch.object(World, "gather", lambda *_: [ours, theirs]):
        source = type("Source", (), {"files": files})
        with pytest.raises(UserError, match=r"w is not the same for rank 1 as for others"):
            _weights(source, world)
