"""A model's folder, configuration and tokenizer, local or from the hub."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config.sections import ModelOptions
from trainer.config.validation import local
from trainer.config.yaml import parse_json
from trainer.errors import UserError, first_line
from trainer.files import CONFIG, METRICS
from trainer.model.normalizer_growth import refuse_growing

_COUNTED = re.compile(r"(layers?|experts|blocks|n_layer)$")
_MOST = 10_000
_MODEL_FOLDER = "a folder with config.json and .safetensors files, or a hub id"
_ADAPTER_CONFIG = "adapter_config.json"
_GENERATION_CONFIG = "generation_config.json"
_HUB_ID = re.compile(r"^\w[\w.-]*/\w[\w.-]*$")
_CACHED = re.compile(r"^models--([^-]|-(?!-))+--.+$")
"""A model's folder in the hub's cache."""


if TYPE_CHECKING:
    from transformers.configuration_utils import PretrainedConfig
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase


def resolve_folder(
    name: str, revision: str | None, *, with_weights: bool = True, key: str = "model.id"
) -> Path:
    """The local folder of a model, downloaded from the hub if needed (safetensors only). Raises
    UserError, naming `key`, where there is none."""
    path = local(name)
    if path is not None and path.is_dir():
        for file in path.iterdir():
            if not file.is_file() and not file.is_dir() and file.exists():
                raise UserError(
                    f"{key}: {file}: neither a file nor a folder (such as a named pipe, which "
                    "nobody may write to); accepted: regular files"
                )
        return path
    if path is not None:
        what = "a GGUF file" if path.suffix == ".gguf" else "a file"
        raise UserError(f"{key}: {name}: {what}; accepted: {_MODEL_FOLDER}")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(f"{key}: {name}: no such folder; accepted: a local folder or a hub id")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.jinja", "*.model", "*.txt", "README.md"]
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
            f"{key}: {name}: neither a local folder nor a model on the hub ({first_line(error)})"
        ) from error


def hub_id(options: ModelOptions) -> str | None:
    """The model's id on the hub, where it is known: as it is configured; of a local folder from its
    place in the hub's cache, or from `_name_or_path` in its config.json, by which transformers says
    where a model was loaded from. A name that is a folder here is no id, as in `resolve_folder`."""
    path = local(options.id)
    if path is None:  # of a folder that is gone, too
        return options.id if _HUB_ID.match(options.id) else None
    cached = next((part for part in path.absolute().parts if _CACHED.match(part)), None)
    if cached is not None:
        return "/".join(cached.split("--", 2)[1:])
    try:
        said = parse_json((path / "config.json").read_text(encoding="utf-8"))["_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    is_id = isinstance(said, str) and _HUB_ID.match(said) and local(said) is None
    return said if is_id else None


def _refuse_others(folder: Path, name: str) -> None:
    """Raises UserError, saying what it is, for a folder that holds no model."""
    if _holds_adapter(folder):
        what = (
            f"an adapter, no model; accepted: model.id={_base_of(folder)} with model.adapter={name}"
        )
    elif (folder / "config.json").is_file():
        return
    elif (folder / CONFIG).is_file() and (folder / METRICS).is_file():
        what = f"a run, no model; accepted: the model that it trained, with model.adapter={name}"
    elif any(folder.glob("*.gguf")):
        what = f"a folder of GGUF files; accepted: {_MODEL_FOLDER}"
    else:
        what = f"no config.json in it; accepted: {_MODEL_FOLDER}"
    raise UserError(f"model.id: {name}: {what}")


def _holds_adapter(folder: Path) -> bool:
    """Some write the model's config.json beside it, but no weights of it."""
    return (folder / _ADAPTER_CONFIG).is_file() and not any(folder.glob("model*.safetensors"))


def _base_of(folder: Path) -> str:
    try:
        base = parse_json((folder / _ADAPTER_CONFIG).read_text(encoding="utf-8"))
        return str(base["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError):
        return "its base model"


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
    name = options.tokenizer or options.id
    folder = resolve_folder(name, revision, with_weights=False, key=key)
    if options.tokenizer is None:
        _refuse_others(folder, name)
    refuse_growing(folder, key)
    from transformers.models.auto.tokenization_auto import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises many types on bad files
        raise UserError(f"{key}: {folder}: no usable tokenizer ({first_line(error)})") from error


def end_tokens(
    options: ModelOptions, config: "PretrainedConfig", tokenizer: "PreTrainedTokenizerBase"
) -> list[int]:
    """Ids of the tokens that end a text: those of generation_config.json, else of config.json, and
    the tokenizer's, with which records end."""
    file = resolve_folder(options.id, options.revision, with_weights=False) / _GENERATION_CONFIG
    given = getattr(config.get_text_config(), "eos_token_id", None)
    if file.is_file():
        try:
            given = parse_json(file.read_text(encoding="utf-8")).get("eos_token_id", given)
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(
                f"model.id: {file}: cannot be read ({first_line(error)}); accepted: JSON"
            ) from error
    found = [given] if isinstance(given, int) else list(given or [])
    return sorted({token for token in [*found, tokenizer.eos_token_id] if token is not None})


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

    _refuse_others(folder, options.id)
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
