"""Settings of the data that have no effect, or one that was perhaps not meant: said at the start.

They are not refused: overrides of a whole configuration leave keys behind that were for its data.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.config.config import Config
from trainer.config.data_options import LEFT_OUT, DataOptions
from trainer.config.validation import local, shown
from trainer.data.dataset import TokenDataset
from trainer.data.readers import ending
from trainer.data.sources import hub_ids, located, names_in

_READ_BY = {
    "prompt": {"prompt_completion", "multiple_choice", "commonsense"},
    "completion": {"prompt_completion"},
    "text": {"text", "classification"},
    "messages": {"messages"},
    "message_fields": {"messages", "prompt_completion"},
    "roles": {"messages", "prompt_completion"},
    "tools": {"messages", "prompt_completion", "alpaca"},
    "turns": {"messages", "prompt_completion", "alpaca"},
    "image": {"images"},
    "label": {"classification", "images", "multiple_choice"},
    "choices": {"multiple_choice"},
    "choice_texts": {"multiple_choice", "commonsense"},
    "choice_labels": {"multiple_choice"},
    "blank": {"multiple_choice", "commonsense"},
    "answers": {"commonsense"},
}
"""The formats of records that a key of `data` is for."""
_OF_SCORES = ("scores", "pattern", "shown")
"""Keys of `generation` that only evaluations use."""


def on_keys(
    config: Config, train_data: TokenDataset, eval_data: Mapping[str, TokenDataset]
) -> list[str]:
    """A line for each key that was given a value, but that nothing in the run reads, for each
    source that is both learned and evaluated on, and for answers that are compared with cut ones.
    """
    data = [train_data, *eval_data.values()]
    formats = {kind for one in data for kind in one.counts.formats}
    unread = [*_by_format(formats), *_by_source(config.data)]
    lines = [
        f"data.{key}: {shown(value)} has no effect: {why}"
        for key, why in unread
        if (value := _given(config.data, key)) is not None
    ]
    if config.log.record_losses and not config.task.knows_losses:
        lines.append(f"log.record_losses: no effect with task.kind={config.task.kind}")
    return [*lines, *_on_answers(config, data[1:] or data), *_on_learned(config.data)]


def _on_answers(config: Config, evaluated: Sequence[TokenDataset]) -> Iterator[str]:
    options, cut = config.generation, sum(one.counts.truncated for one in evaluated)
    if options.records and cut:
        yield (
            f"generation.records: {cut} of the records are cut to "
            f"{' or '.join(config.task.limits(config.data.max_length))}, perhaps with the answers "
            "that generated ones are compared with"
        )
    for key in _OF_SCORES:
        if not options.records and key in _changed(options):
            yield f"generation.{key}: no effect on evaluations, as generation.records is 0"


def _by_format(formats: set[str]) -> Iterator[tuple[str, str]]:
    for key, readers in _READ_BY.items():
        if formats and not readers & formats:
            yield key, f"the records are of format {', '.join(sorted(formats))}"


def _by_source(data: DataOptions) -> Iterator[tuple[str, str]]:
    trained = [source for source, _ in data.sources]
    evaluated = list(data.eval_sources.values())
    if not any(map(hub_ids, [*trained, *evaluated])):
        for key in ("subset", "revision"):
            yield key, "no source is a data set of the hub"
    if data.eval == LEFT_OUT:
        yield "eval_records", "data.leave_out says how many records are left out"
    files = [*_learned(data), *(place for _, place in _evaluated(data))]
    if not any(ending(Path(file)).startswith((".csv", ".tsv")) for file in files):
        # Not `quoting`, which tells how files are made, where the hub's are read in their place.
        yield "columns", "no source is a csv or tsv file"
    for key, sources in (("train_split", trained), ("eval_split", evaluated)):
        if not any(hub_ids(one) or any(map(_is_folder, names_in(one))) for one in sources):
            yield key, "files have no splits"


def _is_folder(name: str) -> bool:
    path = local(name)
    return path is not None and path.is_dir()


def _given(data: DataOptions, key: str) -> Any:
    """The value of a key, in the section or a source of the mixture; None where none is given."""
    for own in (data, *(data.mixture or [])):
        if key in _changed(own):
            return getattr(own, key)
    return None


def _changed(section: Any) -> Mapping[str, Any]:
    """The keys of a section whose values are not their defaults."""
    fields = type(section).model_fields
    return {
        key: value
        for key, value in section
        if value != fields[key].get_default(call_default_factory=True)
    }


def _on_learned(data: DataOptions) -> Iterator[str]:
    """Sources of evaluation data that are trained on."""
    learned = set(_learned(data))
    for name, place in _evaluated(data):
        if place in learned:
            key = f"data.eval.{name}" if name else "data.eval"
            yield f"{key}: {place} is trained on too: its scores are those of learned records"


def _learned(data: DataOptions) -> Iterator[str]:
    """Where the training records are."""
    for source, own in data.sources:
        yield from located(source, own.train_split, own)


def _evaluated(data: DataOptions) -> Iterator[tuple[str, str]]:
    """Likewise of each set that is evaluated on, with its name."""
    for name, source in data.eval_sources.items():
        for place in located(source, data.eval_split, data):
            yield name, place
