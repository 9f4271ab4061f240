"""Runtimes: one file each, what an artifact is executed in."""
