"""Fault injection: a known load, faults in what may be touched, then an audit of everything that was submitted.

What ``byrd chaos`` does, and ``make soak``:

- :mod:`byrd.chaos.tasks`: the tasks of the load, and its canvases; workers get them with ``-I byrd.chaos.load``;
- :mod:`byrd.chaos.submitter`: submits them, and remembers what ``submit`` has promised;
- :mod:`byrd.chaos.targets`: the workers and servers that may be touched, and nothing else;
- :mod:`byrd.chaos.faults`: what is done to them;
- :mod:`byrd.chaos.audit`: what became of the runs, from the tables alone;
- :mod:`byrd.chaos.session`: all of it, in order.
"""

from __future__ import annotations

from byrd.chaos.report import Recovery, Report
from byrd.chaos.session import Options, Session

__all__ = ["Options", "Recovery", "Report", "Session"]
