"""Gated low-rank adapters and the methods that steer them.

Nothing in this package knows of processes, engines or run folders; `trainer` builds on it.
"""
