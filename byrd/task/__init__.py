"""What runs in a worker's pool: the task base classes, the attempt at a step, and where results go."""

from __future__ import annotations

from byrd.task.attempt import Attempt, Compensation, current_attempt
from byrd.task.checkpoint import CheckpointTask, Outcome, Progress
from byrd.task.durable import DurableTask, adopt_app, adopt_task
from byrd.task.runtime import Runtime, runtime_of
from byrd.task.saga import SagaTask, current_compensation

__all__ = [
    "Attempt",
    "CheckpointTask",
    "Compensation",
    "DurableTask",
    "Outcome",
    "Progress",
    "Runtime",
    "SagaTask",
    "adopt_app",
    "adopt_task",
    "current_attempt",
    "current_compensation",
    "runtime_of",
]
