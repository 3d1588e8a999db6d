"""`model.added_tokens`: tokens beside those of a model, and whether a tokenizer is the model's.

Their rows of the embedding and of the output head train (`adapters/token_rows.py`). Those of new
tokens start at the mean of the rows in use; models often have rows for more tokens than their
tokenizer, and only where these do not suffice the tables grow. A token that the tokenizer has
already is not added; its row trains from the value that it has.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from trainer.config.sections import ModelOptions
from trainer.errors import UserError
from trainer.model.hub import plain_tokenizer, resolve_folder

if TYPE_CHECKING:
    from transformers.configuration_utils import PretrainedConfig
    from transformers.modeling_utils import PreTrainedModel
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

_AT_ONCE = 8192
"""Rows of a table of which a sum is taken in float64."""


@dataclass(frozen=True)
class AddedTokens:
    """Tokens whose rows train."""

    tokens: tuple[str, ...]
    """In the order of their ids."""
    ids: tuple[int, ...]
    """Ascending."""
    present: tuple[str, ...]
    """Those that the tokenizer had already."""
    in_use: Tensor
    """Ids of the tokens that the files have rows of."""
    stored: int
    """Rows of the tables in the files."""
    rows: int
    """Rows of the run's tables."""

    @staticmethod
    def of(
        options: ModelOptions, tokenizer: "PreTrainedTokenizerBase", config: "PretrainedConfig"
    ) -> "AddedTokens | None":
        """Those of a configuration; None without any. `tokenizer`: with them (`load_tokenizer`);
        `config`: the model's, as its folder has it. Raises UserError."""
        if not options.added_tokens:
            return None
        stored = getattr(config.get_text_config(), "vocab_size", None)
        if not isinstance(stored, int):
            raise UserError(
                f"model.added_tokens: given, but {config.model_type} has no table of tokens; "
                "accepted: null"
            )
        known = plain_tokenizer(options).get_vocab()
        ids = {token: _id_of(tokenizer, token) for token in options.added_tokens}
        others = {number: token for token, number in known.items()}
        for token, number in ids.items():
            if others.get(number, token) != token:
                raise UserError(
                    f"model.added_tokens: {token!r} gets id {number}, which is that of "
                    f"{others[number]!r}; accepted: a tokenizer whose ids have no gaps"
                )
        lacking = [n for t, n in known.items() if n >= stored and t not in ids]
        if lacking:
            raise _too_large(options, max(known.values()) + 1, stored)
        tokens = sorted(ids, key=ids.__getitem__)
        return AddedTokens(
            tokens=tuple(tokens),
            ids=tuple(ids[token] for token in tokens),
            present=tuple(token for token in tokens if token in known),
            in_use=torch.tensor(sorted(n for n in known.values() if n < stored)),
            stored=stored,
            rows=max(stored, *(number + 1 for number in ids.values())),
        )

    @property
    def grown(self) -> bool:
        """Whether the tables have more rows than the files."""
        return self.rows > self.stored

    def resize(self, config: "PretrainedConfig") -> None:
        """Make models of `config` have the tables' rows."""
        config.get_text_config().vocab_size = self.rows

    def filled(self, table: Tensor) -> Tensor:
        """A table (rows, width), given that of the files: rows of new tokens are the mean of those
        in use. It is summed in float64, so that it depends on no order."""
        mean = torch.zeros(table.shape[1], dtype=torch.float64, device=table.device)
        for part in self.in_use.to(table.device).split(_AT_ONCE):
            mean += table[part].double().sum(0)
        mean = (mean / len(self.in_use)).to(table.dtype)
        full = table.new_empty(self.rows, table.shape[1])
        full[: len(table)] = table
        full[self.stored :] = mean
        full[self._new_ids(table.device)] = mean
        return full

    def _new_ids(self, device: torch.device) -> Tensor:
        known = set(self.in_use.tolist())
        return torch.tensor([n for n in self.ids if n not in known], dtype=torch.long).to(device)

    def __str__(self) -> str:
        parts = [f"{len(self.tokens) - len(self.present)} added to the tokenizer"]
        if self.present:
            parts.append(f"{', '.join(map(repr, self.present))} in it already, not added again")
        new = len(self._new_ids(torch.device("cpu")))
        parts.append(
            f"{new} rows start at the mean of {len(self.in_use)}, {len(self.ids) - new} as they are"
        )
        parts.append(
            f"tables of {self.stored} rows grown to {self.rows}"
            if self.grown
            else f"all inside the tables of {self.stored} rows"
        )
        return f"model.added_tokens: {'; '.join(parts)}"


def token_tables(model: "PreTrainedModel", added: AddedTokens, read: set[str]) -> tuple[str, ...]:
    """Paths of the embedding and, where it is not tied to it, the output head. `read`: layers whose
    weight the model reads itself. Raises UserError for a model in which rows of tokens cannot be
    trained apart, or would be lost by PEFT."""
    paths = {id(module): path for path, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()

    def refuse(why: str) -> UserError:
        return UserError(
            f"model.added_tokens: given, but {type(model).__name__} {why}; accepted: a model with "
            "one plain embedding, and a plain output head to predict tokens"
        )

    plain = type(embedding) is nn.Embedding or hasattr(embedding, "embed_scale")
    if not isinstance(embedding, nn.Embedding) or not plain:
        raise refuse(f"has a {type(embedding).__name__} as its embedding")
    tables = [embedding]
    config = model.config.get_text_config().to_dict()
    sizes = {n for key, n in config.items() if "vocab" in key and not key.startswith("type_")}
    for path, module in model.named_modules():
        if not isinstance(module, nn.Embedding) or module is embedding:
            continue
        if module.weight is embedding.weight or module.num_embeddings in sizes:
            raise refuse(f"has another table of tokens, {path}")
    if head is not None:
        if type(head) is not nn.Linear:
            raise refuse(f"has a {type(head).__name__} as its output head")
        if head.bias is not None:
            raise refuse("has an output head with a bias, which PEFT's trained tokens leave out")
        if paths[id(head)] in read:
            raise refuse("reads the weight of its output head itself")
        tables += [head] if head.weight is not embedding.weight else []
    if any(table.weight.shape[0] != added.rows for table in tables):
        raise refuse(
            f"has tables of {' and '.join(str(t.weight.shape[0]) for t in tables)} rows for a "
            f"vocab_size of {added.rows}"
        )
    return tuple(paths[id(table)] for table in tables)


def vocabulary(model: "PreTrainedModel") -> int | None:
    """The number of tokens that the model can embed; None where it has no table of them (characters
    are hashed)."""
    try:
        table = getattr(model.get_input_embeddings(), "weight", None)
    except NotImplementedError:
        return None
    if isinstance(table, Tensor):
        return table.shape[0]
    size = getattr(model.config, "vocab_size", None)  # Perceiver's inputs are its latents
    return size if isinstance(size, int) else None


def check_vocabulary(
    tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel", options: ModelOptions
) -> None:
    """Raises UserError for a tokenizer of more tokens than the model embeds, or of another
    vocabulary than that of the tokenizer in the model's folder."""
    rows, ids = vocabulary(model), tokenizer.get_vocab()
    if rows is not None and max(ids.values(), default=0) >= rows:
        raise _too_large(options, max(ids.values()) + 1, rows)
    if options.tokenizer is None or options.weights == "random":
        return
    own = _own_vocabulary(options)
    other = next((t for t, number in ids.items() if own.get(t, number) != number), None)
    if other is not None:
        raise UserError(
            f"model.tokenizer: {options.tokenizer} gives {other!r} the id {ids[other]}, the "
            f"tokenizer of {options.id} {own[other]}: another vocabulary than the model's; "
            "accepted: the model's own tokenizer, or one that extends it"
        )


def _own_vocabulary(options: ModelOptions) -> dict[str, int]:
    """The ids of the tokenizer in the model's folder; none where it has no tokenizer."""
    folder = resolve_folder(options.id, options.revision, with_weights=False)
    if not any((Path(folder) / name).is_file() for name in _TOKENIZER_FILES):
        return {}
    return plain_tokenizer(options.model_copy(update={"tokenizer": None})).get_vocab()


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def _id_of(tokenizer: "PreTrainedTokenizerBase", token: str) -> int:
    number = tokenizer.get_vocab().get(token)
    if number is None:
        raise UserError(
            f"model.added_tokens: {type(tokenizer).__name__} does not add {token!r}; accepted: "
            "another token"
        )
    return number


def _too_large(options: ModelOptions, tokens: int, rows: int) -> UserError:
    return UserError(
        f"model.tokenizer: {options.tokenizer or options.id} has {tokens} tokens, but the model's "
        f"embedding {rows} rows; accepted: the model's own tokenizer, or those beyond its rows "
        "listed in model.added_tokens"
    )
