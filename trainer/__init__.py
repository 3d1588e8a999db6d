"""The trainer: configuration, data, backbone, engines, loop, checkpoints."""

__version__ = "0.1.0"
