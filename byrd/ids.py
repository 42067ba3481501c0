"""The ids of runs and steps."""

from __future__ import annotations

import os
import time
import uuid

#: Ids of the same minute begin alike, and so do those of one minute in 256.
_BUCKET_SECONDS, _BUCKETS = 60, 256


def new_id() -> str:
    """Return a new id: a UUID of version 4 whose first byte goes with the minute, and the other 114 bits are random.

    An index finds what is new in a 256th of its pages so, which stay in memory, however much has ended: with ids that
    are random from the first byte on, each new run reads, and after a checkpoint logs as a whole, a page of its own in
    each index.  Ids in order of time would do as well, but those of a minute would be alike in their first eight
    digits, which are what people go by.
    """
    raw = bytearray(os.urandom(16))
    raw[0] = int(time.time() // _BUCKET_SECONDS) % _BUCKETS
    return str(uuid.UUID(bytes=bytes(raw), version=4))
