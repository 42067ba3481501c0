"""A Celery app without Byrd, on Byrd's broker."""

from __future__ import annotations

import os

from celery import Celery

app = Celery("plain", broker=os.environ["BYRD_BROKER_URL"])
