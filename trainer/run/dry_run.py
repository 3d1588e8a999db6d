"""What a run would be, without training: `--dry-run`."""

from itertools import zip_longest

from trainer.config.config import Config
from trainer.config.data_options import DataOptions
from trainer.data.dataset import TokenDataset
from trainer.data.held_out import hold_out
from trainer.data.loader import Loader
from trainer.data.templates import on_templates
from trainer.device_memory import readable
from trainer.distributed.world import World
from trainer.engine.select import make_engine
from trainer.model.build import build
from trainer.model.footprint import estimate, trainable_parameters
from trainer.report.data_view import records_as_tokens, summary
from trainer.run.remarks import (
    describe_engine,
    on_batch,
    on_evaluation,
    on_length,
    on_rows,
    on_sources,
)
from trainer.run.second_stage import SecondStage
from trainer.run.without_effect import on_keys
from trainer.session import open_data, refuse_longer


def dry_run(config: Config, world: World) -> str:
    """Description of the run: data, units, parameters, memory. Trains and writes nothing."""
    tokenizer, task, train_data, eval_data = open_data(config, world)
    stage = None if config.model.adapter is None else SecondStage(config, world)
    with world.all_or_none():
        backbone = build(config, task, world.device)
        beside = stage.frozen(backbone) if stage is not None else {}
        refuse_longer(
            backbone.model, config.data, train_data, eval_data,
            together=task.options.records_together, task=task.options,
        )  # fmt: skip
        left_out, evaluated = hold_out(config, train_data, task)
    loader = Loader(train_data, task, config.data, config.run.seed, 0, 1, left_out, backbone.rows)
    evaluation = on_evaluation(train_data, evaluated)
    notes = [
        *on_batch(config.data, len(loader.sequences(loader.epoch))),
        *on_length(backbone.model, train_data, eval_data),
        *on_templates(tokenizer, config.data),
        *on_keys(config, train_data, eval_data),
    ]
    engine = make_engine(config, world, task)
    needs = estimate(
        backbone, config, world.size, engine.spread, local_ranks=len(world.nodes[world.node])
    )
    frozen = sum(p.nbytes for adapter in beside.values() for p in adapter.parameters())
    by_kind: dict[str, list[str]] = {}
    for unit in backbone.units:
        size = f"{unit.out_features} x {unit.in_features}"
        by_kind.setdefault(f"{unit.kind} ({size})", []).append(unit.name)
    lines = [
        *_data("train data", train_data, config.data),
        *(f"                    {line}" for line in on_sources(train_data)),
        *(
            [
                line
                for name, data in eval_data.items()
                for line in _data(f"eval data {name}".strip(), data, config.data)
            ]
            or [f"eval data           {evaluation or 'none'}"]
        ),
        f"engine              {describe_engine(engine)}, {world.size} rank(s), {world.device.type}",
        f"model               {type(backbone.model).__name__}, {backbone.dtype}, "
        f"{config.model.quantization}",
        *(f"rows                {line}" for line in on_rows(loader)),
        f"units               {len(backbone.units)}",
        *(f"                    {len(names)} x {kind}" for kind, names in by_kind.items()),
        *(f"                    {left}" for left in backbone.left_alone),
        *([f"adapter             {stage.line}"] if stage is not None else []),
        f"trainable           {trainable_parameters(backbone, config):,} parameters",
        "memory per rank     without activations (`rankcast estimate` has them)",
        f"  backbone          {readable(needs.backbone)}",
        f"  gathered layers   {readable(needs.gathered)}",
        f"  trainable state   {readable(needs.trainable)}",
        *([f"  earlier stages    {readable(frozen)}"] if frozen else []),
        f"  total             {readable(needs.total + frozen)}",
        *([f"note                {backbone.left_out}"] if backbone.left_out else []),
        *([f"note                {backbone.added}"] if backbone.added else []),
        *(f"note                {note}" for note in notes),
    ]
    first = records_as_tokens(train_data, tokenizer, 1, colour=False)
    return "\n".join([*lines, *(text.plain for text in first)])


def _data(name: str, data: TokenDataset, options: DataOptions) -> list[str]:
    """Lines of a data set, under its name."""
    return [
        f"{title:<20}{line}"
        for title, line in zip_longest([name], summary(data, options), fillvalue="")
    ]
