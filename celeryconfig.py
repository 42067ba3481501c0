"""Celery's settings for a Byrd deployment, each with its reason; addresses come from the environment.

BYRD_DATABASE_URL  postgresql://...  Byrd's tables, and the results of tasks that are no steps
BYRD_BROKER_URL    redis://...       the pipe: messages only wake workers up, so it may be lost at any moment
"""

from __future__ import annotations

import os

# ------------------------------------------------------------------------------------------------ the pipe

broker_url = os.environ.get("BYRD_BROKER_URL", "redis://127.0.0.1:6379/0")

broker_transport_options = {
    # kombu waits for ever by default: with Redis frozen, a publisher hung and took its process with it.
    "socket_timeout": 5,
    "socket_connect_timeout": 5,
    "socket_keepalive": True,
    # Has to be the same in every app on this Redis, for the shortest wins. Messages are acknowledged at once, so it
    # only matters to tasks with acks_late. `retry_on_timeout` stays unset: it turns off publishing in batches.
    "visibility_timeout": 3600,
}

# However long Redis is away, a worker comes back to it; the default is to give up after 100 tries.
broker_connection_retry_on_startup = True
broker_connection_max_retries = None

# A publish that fails fails fast: the step is `ready` in Postgres, and the relay publishes it again.
task_publish_retry_policy = {"max_retries": 2, "interval_start": 0.0, "interval_step": 0.2, "interval_max": 0.5}

# ------------------------------------------------------------------------------------------------ workers

# A message is acknowledged when it arrives. Redelivery is not what keeps the work: with acks_late on Redis, SIGKILL
# still lost messages, and a task longer than the visibility time-out ran again and again. Leases in Postgres keep it.
task_acks_late = False

# A message goes to a process that is free. Prefetched ones would wait behind a long step while other workers idle,
# and be stranded in the worker when Redis goes away.
worker_disable_prefetch = True
worker_prefetch_multiplier = 1

# Redis going away is no reason to kill steps: they report to Postgres.
worker_cancel_long_running_tasks_on_connection_loss = False

# Seconds that running steps have to reach their next checkpoint and be handed back when a worker is asked to stop;
# with REMAP_SIGTERM=SIGQUIT in its environment, SIGTERM asks so. The default, 0, cuts them off at once.
worker_soft_shutdown_timeout = 20.0

# ------------------------------------------------------------------------------------------------ data

# Nothing that is read from Redis can run code.
task_serializer = "json"
result_serializer = "json"
accept_content = ["json"]

# In Postgres, like the steps: results in Redis would be gone with it. Byrd keeps the steps' own; this is for the rest.
if _url := os.environ.get("BYRD_DATABASE_URL"):
    result_backend = "db+postgresql+psycopg2://" + _url.partition("://")[2]
database_engine_options = {"connect_args": {"connect_timeout": 5}, "pool_pre_ping": True}
result_extended = True  # with the task's name and arguments, or a row of the table says nothing
result_expires = 7 * 24 * 3600

timezone = "UTC"
enable_utc = True

# ------------------------------------------------------------------------------------------------ what watches

# For Flower. Events cost throughput and may be lost; nothing but the display depends on them.
worker_send_task_events = True
task_send_sent_event = True

# One run per due time, however many beats there are. It reads its schedules from the database at least this often.
beat_scheduler = "beat.scheduler:ByrdScheduler"
beat_max_loop_interval = 5
beat_enable_remote_control = True  # answers `celery inspect ping` while it looks at schedules (Celery 5.7 and later)
