"""The selection of units that another run made, for a run that is to match it."""

from pathlib import Path

from adapters.decision import Decision
from adapters.methods.base import Method
from trainer.config.config import Config
from trainer.errors import UserError
from trainer.records.heartbeat import read_heartbeat
from trainer.records.jsonl import decision_files, read_objects


def match_selection(config: Config, method: Method) -> None:
    """Rank 0: give `method` the last selection of the run that `method.match` names, in which
    {seed} stands for `run.seed`. Raises UserError."""
    assert config.method.selection_of is not None
    pattern = Path(config.method.selection_of.replace("{seed}", str(config.run.seed)))
    found = Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor)))
    folders = [path for path in sorted(found) if path.is_dir()]
    if len(folders) != 1:
        problem = f"{len(folders)} folders fit" if folders else "no such folder"
        raise UserError(f"method.match: {pattern}: {problem}; accepted: one run folder")
    try:
        method.match_selection(*read_selection(folders[0]))
    except ValueError as error:
        raise UserError(f"method.match: {folders[0]}: {error}") from error


def read_selection(folder: Path) -> tuple[int, Decision]:
    """(step, decision) of the last selection of survivors in the folder of a run that has ended.
    Raises ValueError where there is none, or the run may yet make another."""
    state = read_heartbeat(folder).get("state", "unknown")
    if state != "done":
        raise ValueError(f"its state is {state}; accepted: a finished run of weightlora")
    for file in reversed(decision_files(folder)):
        for line in reversed(list(read_objects(file))):
            if line.get("survivors") is not None:
                return int(line["step"]), Decision.from_plain(line)
    raise ValueError("no selection was recorded in it; accepted: a finished run of weightlora")
