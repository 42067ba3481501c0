"""pytest-celery's fixtures, with processes of this machine in the place of its containers."""

from __future__ import annotations

from typing import Any

import pytest
from celery import Celery
from pytest_celery import CeleryBrokerCluster, CeleryTestWorker, CeleryWorkerCluster, RedisTestBroker

from byrd.embedded import EmbeddedValkey
from tests.celery_vendor import BrokerProcess, WorkerProcess
from tests.cluster import Cluster, ClusterFactory

APP = "tests.apps.basic"


@pytest.fixture
def smoke_cluster(database_url: str, own_broker: EmbeddedValkey, cluster_on: ClusterFactory) -> Cluster:
    """A database, and a broker that the test may kill."""
    return cluster_on(database_url=database_url, broker_url=own_broker.url)


@pytest.fixture
def basic(smoke_cluster: Cluster) -> Any:
    """The module of the app."""
    return smoke_cluster.app(APP)


@pytest.fixture
def celery_setup_app(basic: Any) -> Celery:
    """The app of the setup is the one that Byrd has adopted."""
    app: Celery = basic.app
    return app


@pytest.fixture
def celery_broker_cluster(own_broker: EmbeddedValkey) -> CeleryBrokerCluster:
    """One Valkey."""
    return CeleryBrokerCluster(RedisTestBroker(BrokerProcess(own_broker)))


@pytest.fixture
def celery_backend_cluster() -> None:
    """No backend: the results of steps are in Postgres."""


@pytest.fixture
def celery_worker_cluster(smoke_cluster: Cluster, celery_setup_app: Celery) -> CeleryWorkerCluster:
    """Two workers."""
    workers = [smoke_cluster.worker(APP, concurrency=1, name=f"smoke{number}", wait=False) for number in (1, 2)]
    return CeleryWorkerCluster(*[CeleryTestWorker(WorkerProcess(worker), celery_setup_app) for worker in workers])
