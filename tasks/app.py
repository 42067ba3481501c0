"""The Celery app of this deployment, adopted by Byrd; `celery -A tasks.app` runs its workers, beat and Flower."""

import logging

from celery import Celery

import byrd

app = Celery("byrd", include=["tasks.executors"])
app.config_from_object("celeryconfig")
engine = byrd.Byrd(app)

logging.getLogger("httpx").setLevel(logging.WARNING)  # at INFO it logs every address, and a webhook's is a secret
