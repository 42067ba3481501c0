"""How the pool processes of a worker keep from sharing what one of them does better alone.

What a slice records together costs one statement and one commit, however many steps it is.  Two processes that share a
trickle of short steps make twice as many statements of half the size, and are slower together than one of them alone.
So a process whose slice takes all that is ready, and is done with it in little more time than it takes to record it,
says so.  Those whose wake-ups come meanwhile stand by, message in hand, and begin when it does not say so any more, for
whatever reason: there is more than it takes, a step takes its time, its slice is over, or it is gone.  Nor do they
wait for long.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable

#: What a process has said is true for so long: it says so again, or takes it back, with each statement.
_TRUE_SECONDS = 0.02
#: How often those that stand by look, which costs each of them about a hundredth of a core.
_LOOK_SECONDS = 0.005
#: Nobody stands by longer, for in the queue there may be messages behind the one in hand that nobody else can take.  A
#: quarter of it halves the speed of eight processes: each that joins in takes a part of the trickle.
_MOST_SECONDS = 0.2


class Standby:
    """Until when a process of this worker copes, by the clock that all processes of a machine share.

    It is in memory that pool processes inherit from the worker that forks them.  Where they are not forked each has
    its own, and none ever stands by.  Two that write at once do no harm: what is lost is said again, or expires.
    """

    def __init__(self) -> None:
        self._until = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("d")
        self._mine = 0.0

    def say(self, *, copes: bool) -> None:
        """Say that this process copes with all that there is, or does not."""
        if copes:
            self._until[0] = self._mine = time.monotonic() + _TRUE_SECONDS
        elif self.copes():
            self._until[0] = 0.0

    def copes(self) -> bool:
        """Tell whether this process was the last to say that it copes."""
        return self._mine == self._until[0] > 0.0

    def another_copes(self) -> bool:
        """Tell whether another process copes, so that this one need not join in."""
        return self._mine != self._until[0] > time.monotonic()

    def stand_by(self, until: float, *, unless: Callable[[], bool]) -> bool:
        """Wait while another process copes; return whether one did, and has ceased to meanwhile.

        No longer than ``_MOST_SECONDS``, nor than ``until``, by the monotonic clock, nor when ``unless`` says so.
        """
        until = min(until, time.monotonic() + _MOST_SECONDS)
        stood_by = False
        while self.another_copes():
            if time.monotonic() >= until or unless():
                return False
            stood_by = True
            time.sleep(_LOOK_SECONDS)
        return stood_by
