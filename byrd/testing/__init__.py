"""For tests of durable workflows: kills a process at every boundary of a run, and checks what comes of it.

The pytest plugin gives the fixture ``byrd_crash_points`` and the marker of the same name; without pytest, use
:class:`CrashPoints`.  ``check_database`` checks a database against the invariants of Byrd's tables.
"""

from byrd.testing.crash import CrashPoints, CrashReport
from byrd.testing.invariants import broken_invariants, check_database, check_invariants
from byrd.testing.probe import boundary

__all__ = ["CrashPoints", "CrashReport", "boundary", "broken_invariants", "check_database", "check_invariants"]
