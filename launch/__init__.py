"""The commands: each file is a script and the implementation of `rankcast NAME`."""
