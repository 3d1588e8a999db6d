"""The names of the weight formats, for who must not import torch."""

FORMAT_NAMES = ("none", "nf4", "fp4", "int8", "fp8")
"""The keys of `formats.FORMATS`."""
