"""The commands: each file is a script, and what `rankcast NAME` calls."""
