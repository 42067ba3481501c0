"""The ids of runs and steps."""

from __future__ import annotations

import os
import time

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
    # Its version and variant; uuid.UUID would take three times as long for all this.
    raw[6], raw[8] = raw[6] & 0x0F | 0x40, raw[8] & 0x3F | 0x80
    digits = raw.hex()
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"
