"""Types of command line arguments, and scripts that refuse a wrong one before they begin."""

from argparse import ArgumentTypeError

import pytest

from tests.helpers import python
from trainer.config.arguments import among, at_least, counts, new_file
from trainer.errors import first_line


def test_what_is_accepted(tmp_path):
    assert at_least(0)("0") == 0 and at_least(2)("17") == 17
    assert counts("") == [] and counts("8,16") == [8, 16]
    assert among(["a", "b"])("b,a") == ["b", "a"]
    assert new_file(f"{tmp_path}/x.json") == tmp_path / "x.json"


@pytest.mark.parametrize("parse, text, accepted", [
    (at_least(1), "0", "1 or more"), (at_least(1), "1.5", "1 or more"),
    (at_least(0), "-1", "0 or more"), (counts, "abc", "whole numbers, 1 or more"),
    (counts, "0", "whole numbers, 1 or more"), (counts, "1,", "whole numbers, 1 or more"),
    (counts, "2,1,2", "each number once"), (among(["a", "b"]), "a,c", "a, b"),
    (new_file, "/nowhere/x.json", "a folder that exists"), (new_file, "/tmp", "a file"),
])  # fmt: skip
def test_what_is_not(parse, text, accepted):
    with pytest.raises(ArgumentTypeError, match=f"^{text} given; accepted.*{accepted}"):
        parse(text)


@pytest.mark.parametrize("command, said", [
    ("benchmarks.throughput configs/llama70b_random.yaml --layers abc", "error: --layers: abc given"),
    ("benchmarks.decisions configs/mixtral_random.yaml --methods lora", "error: --methods: "),
    ("benchmarks.overhead --rounds 0", "error: --rounds: 0 given; accepted: "),
    ("benchmarks.spectral configs/llama70b_random.yaml --units=-1", "error: --units: -1 given"),
    ("benchmarks.loading configs/llama70b_random.yaml x --layers 0", "error: --layers: 0 given"),
    ("launch.estimate x --gpus abc", "error: --gpus: abc given; accepted: 1 or more"),
    ("launch.train", "error: the following arguments are required: --config"),
    ("launch.compare benchmarks/gsm8k.yaml out --workers 0", "error: --workers: 0 given"),
])  # fmt: skip
def test_scripts_refuse_before_they_begin(command, said):
    code, _, err = python("-m", *command.split())
    (line,) = err.splitlines()
    assert code == 2 and line.startswith(said)


def test_a_line_that_only_announces_the_next_one_is_not_alone():
    assert first_line(ValueError("Class validation error:\n    63 is odd\nmore")) == (
        "Class validation error: 63 is odd"
    )
    assert first_line(ValueError("a\nb")) == "a" and first_line(ValueError("a:")) == "a:"
    assert first_line(ValueError()) == "ValueError()"
