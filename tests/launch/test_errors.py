"""A mistake under the real launchers: one line, and no rank left."""

import pytest

from tests.helpers import error_lines, launch


@pytest.mark.parametrize(("launcher", "options"), [
    ("torchrun", ()), ("deepspeed", ()), ("python", ("--processes", "2")),
])  # fmt: skip
def test_launchers_end_with_one_error_line(launcher, options, tmp_path):
    code, out, err = launch(
        launcher, 2, "launch/train.py", *options, "--config", "configs/quickstart.yaml", "engine.kind=nonsense",
        f"run.dir={tmp_path}", seconds=60,
    )  # fmt: skip
    assert code != 0
    lines = error_lines(out + "\n" + err)
    assert (
        len(lines) == 1 and "engine.kind: 'nonsense' given; accepted: auto, single, ddp" in lines[0]
    )
    assert "Traceback" not in err.split("error:")[0]
    assert not list(tmp_path.iterdir())
