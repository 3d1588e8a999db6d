"""Which architectures of the installed transformers train here, and are right?

    python -m tests.campaigns.architectures OUT [--part causal|classification] [--only NAME…]
        [--jobs N] [--without-ranks] [--table docs/models.md]

Every causal and every sequence-classification architecture is built tiny (`tests/tiny_models.py`)
and checked (`tests/architectures.py`) in a process of its own, which may crash or hang; then it
trains in two processes under FSDP2 and under DeepSpeed ZeRO-3, whose losses are those of one
process. Outcomes are lines of OUT/outcomes.jsonl; what is there already is not run again. At the
end the table is printed, or written into the file given. The exit code is 1 where anything was
wrong or crashed.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.helpers import ROOT, SERVER, environment, fork_ranks, losses
from tests.tiny_models import PARTS, architectures, not_buildable

CHECKS = ["train", "loss", "signs", "nf4", "int8", "export", "merged", "packing"]
ENGINES = {"fsdp2": "fsdp2", "ZeRO-3": "deepspeed"}
PATIENCE = 240.0
"""Seconds after which a process is taken to hang."""
RANKS = 1e-4
"""Largest relative difference of a step's loss between two ranks and one process."""
BEGIN, END = "<!-- architectures: begin -->", "<!-- architectures: end -->"
