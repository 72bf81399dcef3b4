"""Launchers of this machine: a queue over its GPUs, and accelerate."""
