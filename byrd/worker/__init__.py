"""What a worker's main process does for its steps: keeps its lease, relays, recovers, and watches its pool."""

from __future__ import annotations

from byrd.worker.bootstep import LeaseStep, prepare_worker
from byrd.worker.keeper import Keeper, Settings, Sweeper

__all__ = ["Keeper", "LeaseStep", "Settings", "Sweeper", "prepare_worker"]
