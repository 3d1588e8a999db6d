"""What a record of another run may not hold."""

import json
from types import SimpleNamespace

import pytest

from adapters.decision import Decision
from trainer.decisions.replay import Replay
from trainer.errors import UserError


@pytest.mark.parametrize("rounds", [1, 2])
def test_no_more_selections_are_replayed_than_the_method_makes(tmp_path, rounds):
    """Those beyond its rounds would be left out without a word."""
    file = tmp_path / "allocation.jsonl"
    with file.open("w") as stream:
        for step, survivors in ((2, ["a", "b"]), (4, ["a"])):
            line = {"ranks": dict.fromkeys(survivors, 2), "survivors": survivors, "scores": []}
            digest = Decision.from_plain(line).digest()
            stream.write(
                json.dumps({"step": step, "method": "weightlora", "digest": digest} | line) + "\n"
            )
    method = SimpleNamespace(
        options=SimpleNamespace(kind="weightlora"), decided=["a", "b", "c"], rounds=rounds,
        check_decision=lambda decision: None, due=lambda step: False,
    )  # fmt: skip
    if rounds == 2:
        assert Replay(file, method, 0, 8).decide(4).survivors == ["a"]
        return
    with pytest.raises(UserError, match=r"method\.replay: .*holds 2 selections; accepted: 1"):
        Replay(file, method, 0, 8)
