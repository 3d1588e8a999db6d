"""Fixtures of the unit tests: the quickstart's tokenizer, tiny models, the real data if there."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data sets, which are no part of the repository."""
    folder = ROOT / ".." / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the real data in ../shared/data, which is not here")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One folder for all examples of a module, which overwrite one another."""
    return tmp_path_factory.mktemp("examples")


@pytest.fixture(scope="session")
def tokenizer():
    """The quickstart's tokenizer: <s> is 1, </s> is 2, <pad> is 0, and no chat template."""
    return AutoTokenizer.from_pretrained(ROOT / "configs/quickstart/model")


@pytest.fixture(scope="session")
def llama_config(tokenizer):
    """Makes configurations of a two-layer Llama over the quickstart's vocabulary."""

    def make(attention: str = "sdpa") -> LlamaConfig:
        return LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.3,  # large, so that losses differ clearly
            attn_implementation=attention,
        )

    return make


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
