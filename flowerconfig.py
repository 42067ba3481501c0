"""Flower's settings: it listens on loopback unless FLOWER_ADDRESS says otherwise, and shows runs beside steps.

Flower can revoke tasks and stop workers, and asks nobody who they are.  Before it listens anywhere else, set
FLOWER_BASIC_AUTH=user:password, or one of its OAuth providers (see Flower's documentation, "Authentication").
"""

from __future__ import annotations

import os

address = os.environ.get("FLOWER_ADDRESS", "127.0.0.1")
port = int(os.environ.get("FLOWER_PORT", "5555"))

# A step's root_id is its run.
tasks_columns = "name,root_id,uuid,state,args,kwargs,result,received,started,runtime,retries,worker"

# Steps that ended long ago are in Postgres; what is kept here is memory.
max_tasks = 10_000
purge_offline_workers = 3600
