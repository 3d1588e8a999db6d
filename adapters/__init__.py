"""Gated low-rank adapters and the methods that train and adapt them.

This package is independent of processes, engines and run folders; `trainer` builds on it.
"""
