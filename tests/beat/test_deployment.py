"""The files that start a deployment agree with each other, and let in nobody by accident."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from celery import Celery
from celery.app import defaults

import beat
import celeryconfig
from byrd.engine import engine

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    return found


def procfile() -> dict[str, str]:
    lines = (ROOT / "Procfile").read_text().splitlines()
    return {name: command.strip() for name, _, command in (line.partition(":") for line in lines)}


def test_the_procfile_and_compose_run_the_same_commands(services: dict[str, Any]) -> None:
    commands = procfile()
    assert list(commands) == ["worker", "beat", "web", "flower"]
    for name in ("worker", "beat", "flower"):
        assert shlex.split(commands[name]) == services[name]["command"]
    # In a composition, migrating is a service of its own.
    assert (commands["web"], services["web"]["command"]) == ("python -m beat run", ["python", "-m", "beat", "web"])


def test_nothing_is_published_to_other_machines(services: dict[str, Any]) -> None:
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert len(ports) == 2
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert {name for name, service in services.items() if "ports" in service} == {"web", "flower"}


def test_workers_scale(services: dict[str, Any]) -> None:
    assert not {"container_name", "ports", "hostname"} & services["worker"].keys()


def test_each_service_waits_for_what_it_needs_to_be_healthy(services: dict[str, Any]) -> None:
    assert all("healthcheck" in service for name, service in services.items() if name != "migrate")
    for service in services.values():
        for needed, how in service.get("depends_on", {}).items():
            ends = needed == "migrate"
            assert how["condition"] == ("service_completed_successfully" if ends else "service_healthy")
    for name in ("worker", "beat", "web", "flower"):
        assert services[name]["depends_on"].keys() == {"postgres", "redis", "migrate"}


def test_redis_keeps_a_log_and_evicts_nothing(services: dict[str, Any]) -> None:
    command = " ".join(services["redis"]["command"])
    assert "--appendonly yes" in command
    assert "--maxmemory-policy noeviction" in command


def test_stopping_a_worker_leaves_its_steps_the_time_that_they_are_given(services: dict[str, Any]) -> None:
    assert services["worker"]["environment"]["REMAP_SIGTERM"] == "SIGQUIT"
    grace = float(services["worker"]["stop_grace_period"].removesuffix("s"))
    assert grace > celeryconfig.worker_soft_shutdown_timeout > 0


def test_docker_compose_accepts_the_file() -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("no docker with its compose plugin")
    subprocess.run(
        [docker, "compose", "--file", str(ROOT / "docker-compose.yml"), "config", "--quiet"], check=True, timeout=60
    )


def test_the_image_holds_what_the_deployment_needs() -> None:
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text()
    ignored = (ROOT / "docker" / "Dockerfile.dockerignore").read_text().splitlines()
    copied = {
        source
        for line in dockerfile.splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for source in line.split()[1:-1]
    }
    assert {"byrd", "beat", "tasks", "celeryconfig.py", "flowerconfig.py"} <= copied
    for source in copied:
        assert (ROOT / source).exists()
        assert f"!{source}" in ignored


def test_celery_knows_every_setting_in_celeryconfig() -> None:
    names = {name for name in vars(celeryconfig) if not name.startswith("_")} - {"annotations", "os"}
    assert names <= defaults.SETTING_KEYS
    app = Celery(set_as_current=False)
    app.config_from_object(celeryconfig)
    assert app.conf.worker_disable_prefetch
    assert app.conf.broker_connection_max_retries is None
    assert app.conf.accept_content == ["json"]


def test_a_schedule_names_the_task_of_the_engine() -> None:
    assert beat.SUBMIT_TASK == engine.SUBMIT_TASK
