"""The model of a run, a checkpoint or an adapter's folder, without data."""

from collections.abc import Sequence
from pathlib import Path

from trainer.checkpoint.saved import read_on_all, read_state
from trainer.checkpoint.state import load_trained
from trainer.config.config import Config, on_engine, parse_config, with_overrides
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.export.export import saved_config
from trainer.export.peft_folder import CONFIG, is_adapter, read_peft_folder
from trainer.run.second_stage import SecondStage
from trainer.session import LoadedModel, open_model


def saved_model_config(source: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a run or checkpoint on the engine that `auto` chooses, with overrides;
    of an adapter's folder, one for its base model. Raises UserError."""
    if is_adapter(source):
        return with_overrides(_of_adapter(source), overrides)
    config = on_engine(saved_config(read_state(source)), "auto")
    return with_overrides(config, overrides)


def _of_adapter(folder: Path) -> Config:
    found = read_peft_folder(folder)
    if found.base is None:
        raise UserError(
            f"{folder / CONFIG}: base_model_name_or_path: missing; accepted: the model that the "
            "adapter was trained on"
        )
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    model = {
        "id": found.base, "revision": found.config.get("revision"), "adapter": str(folder),
        "tokenizer": str(folder) if has_tokenizer else None,
    }  # fmt: skip
    return parse_config({
        "run": {"name": "generation"},
        "model": model,
        "data": {"train": "-"},  # which is not opened
    })  # fmt: skip


def open_saved_model(source: Path, config: Config, world: World) -> LoadedModel:
    """The model with all that was learned, on the backbone that `config` describes. Raises
    UserError. Collective."""
    if is_adapter(source):
        stage = SecondStage(config, world)
        model = open_model(config, world, stage.initial_adapters, frozen=stage.frozen)
        with world.all_or_none():
            stage.begin(model)
        return model
    saved = read_on_all(source, world)
    unreached = saved.state.get("unreached", [])
    model = open_model(
        config, world, saved.initial_adapters, unreached, frozen=lambda _: saved.frozen
    )
    with world.all_or_none():
        load_trained(model, saved.checkpoint, saved.tensors)
    return model
