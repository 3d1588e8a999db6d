"""A model's folder, configuration and tokenizer, local or from the hub."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config.sections import ModelOptions
from trainer.config.validation import local
from trainer.errors import UserError, first_line

_COUNTED = re.compile(r"(layers?|experts|blocks|n_layer)$")
_MOST = 10_000


if TYPE_CHECKING:
    from transformers.configuration_utils import PretrainedConfig
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase


def resolve_folder(name: str, revision: str | None, *, with_weights: bool = True) -> Path:
    """The local folder of a model, downloaded from the hub if needed (safetensors only). Raises
    UserError where there is none."""
    path = local(name)
    if path is not None and path.is_dir():
        for file in path.iterdir():
            if not file.is_file() and not file.is_dir() and file.exists():
                raise UserError(
                    f"model.id: {file}: neither a file nor a folder (such as a named pipe, which "
                    "nobody may write to); accepted: regular files"
                )
        return path
    if path is not None or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(f"model.id: {name}: no such folder; accepted: a local folder or a hub id")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=[*patterns, *(["*.safetensors"] if with_weights else [])],
                ignore_patterns=["consolidated*", "original/*"],
            )
        )
    except Exception as error:  # the hub client raises many types
        raise UserError(
            f"model.id: {name}: neither a local folder nor a model on the hub ({first_line(error)})"
        ) from error


def load_tokenizer(options: ModelOptions) -> "PreTrainedTokenizerBase":
    """The model's tokenizer, or the one that `model.tokenizer` names, with `model.added_tokens`.
    Raises UserError."""
    from transformers import AddedToken

    tokenizer = plain_tokenizer(options)
    known = tokenizer.get_vocab() if options.added_tokens else {}
    new = [token for token in options.added_tokens or () if token not in known]
    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in new], special_tokens=True
    )
    return tokenizer


def plain_tokenizer(options: ModelOptions) -> "PreTrainedTokenizerBase":
    """The tokenizer without `model.added_tokens`. Raises UserError."""
    key = "model.id" if options.tokenizer is None else "model.tokenizer"
    revision = options.revision if options.tokenizer is None else None
    folder = resolve_folder(options.tokenizer or options.id, revision, with_weights=False)
    from transformers.models.auto.tokenization_auto import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises many types on bad files
        raise UserError(f"{key}: {folder}: no usable tokenizer ({first_line(error)})") from error


def _refuse_many(folder: Path, values: dict[str, Any]) -> None:
    """Raises UserError for numbers of layers or experts that no model has: each of them would be
    built, as objects, before the first tensor is looked for."""
    for key, value in values.items():
        if isinstance(value, dict):
            _refuse_many(folder, value)
        elif isinstance(value, int) and _COUNTED.search(key) and value > _MOST:
            raise UserError(
                f"model.id: {folder}/config.json: {key}: {value} given; accepted: at most {_MOST}"
            )


def load_model_config(folder: Path, options: ModelOptions) -> "PretrainedConfig":
    """The model's configuration with `model.overrides` applied. Raises UserError."""
    from transformers.models.auto.configuration_auto import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # as for the tokenizer
        raise UserError(
            f"model.id: {folder}: no usable config.json ({first_line(error)})"
        ) from error
    _refuse_many(folder, config.to_dict())
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else None
        if method != "mxfp4":
            raise UserError(
                f"model.id: {folder}: its weights are quantised already (quantization_config: "
                f"{method}); accepted: an unquantised model, with model.quantization for its "
                "format, or experts in mxfp4"
            )
        del config.quantization_config  # read as the values they stand for
    if not options.overrides:
        return config
    values = config.to_dict()
    for key in options.overrides:  # the model's own names and transformers' common ones
        if key not in values and key not in config.attribute_map:
            raise UserError(f"model.overrides: {key}: not a key of {folder / 'config.json'}")
    values.pop("layer_types", None)  # derived from the number of layers
    try:
        return type(config).from_dict({**values, **options.overrides})
    except Exception as error:  # likewise
        raise UserError(f"model.overrides: {options.overrides}: {first_line(error)}") from error
