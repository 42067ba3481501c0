"""What a benchmark may fail with."""

from __future__ import annotations


class BenchmarkError(Exception):
    """A benchmark could not be run to its end; the message says why, and may end with a worker's log."""


class UnavailableError(Exception):
    """A peer cannot be had on this machine, which is no failure of the comparison."""
