"""The trainer: configuration, data, backbone, engines, loop, checkpoints."""
