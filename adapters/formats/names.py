"""The names of the weight formats, importable without torch."""

FORMAT_NAMES = ("none", "nf4", "fp4", "int8", "fp8")
"""The keys of `formats.FORMATS`."""
