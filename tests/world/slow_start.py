"""launch/train.py, whose first rank tokenises slowly, or ends while it does.

    python tests/world/slow_start.py HOW ARGUMENTS…

HOW: seconds that a chunk takes; `die`; or a file whose making ends the chunk.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from launch.train import main
from trainer.data.encode import Encoder

encode = Encoder.__call__


def slowly(how: str) -> Any:
    def slow(work: Encoder, chunk: Any, tick: Any = lambda: None) -> Any:
        began = time.monotonic()
        print("chunk", flush=True)
        if how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        while not (
            time.monotonic() - began > float(how) if how[0].isdigit() else Path(how).exists()
        ):
            threading.Event().wait(0.02)
            tick()
        return encode(work, chunk, tick)

    return slow


if __name__ == "__main__":
    with patch.object(Encoder, "__call__", slowly(sys.argv[1])):
        sys.exit(main(sys.argv[2:]))
