"""A network of a worker's own, whose links to Postgres and to Redis can be cut: packets vanish, nothing is refused.

Three Linux network namespaces in a row: the machine's own, a router's, the worker's.  The two servers have an address
each, on the machine's end of the first link, where a proxy leads to the real ones; the router forwards, or drops.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Literal

from sqlalchemy import make_url

from byrd.embedded import EmbeddedPostgres, EmbeddedValkey
from tests.cluster import START_SECONDS, Cluster, Worker
from tests.reliability.proxy import Proxy

Link = Literal["postgres", "redis"]
#: Reserved for tests of networks (RFC 2544): nobody's addresses.
_NETWORK = "198.18"
#: Others may be at it on this machine, and what they take is found out by trying.
_TRIES = 5


@dataclass(frozen=True)
class CutOff:
    """A network namespace; ``urls`` is where Postgres and Redis are, seen from there."""

    name: str
    router: str
    addresses: dict[Link, str]
    urls: dict[Link, str]

    def cut(self, *links: Link) -> None:
        """From now on, packets of these links are lost, in both directions."""
        for link in links:
            for direction in ("to", "from"):
                _ip("-n", self.router, "rule", "add", direction, self.addresses[link], "blackhole")

    def mend(self, *links: Link) -> None:
        """Let packets pass again."""
        for link in links:
            for direction in ("to", "from"):
                _ip("-n", self.router, "rule", "del", direction, self.addresses[link], "blackhole")

    def worker(self, cluster: Cluster, module: str, *, pool: str = "prefork", queues: str = "celery") -> Worker:
        """Start a worker in here, and return once it consumes."""
        name = f"far{len(cluster.workers) + 1}"
        command = [
            "ip", "netns", "exec", self.name, sys.executable, "-m", "celery", "-A", module, "worker",
            "-n", f"{name}@localhost", "-P", pool, "-c", "2", "-l", "INFO", "-Q", queues,
            "--without-mingle", "--without-gossip",
        ]  # fmt: skip
        env = {**cluster.env, "BYRD_DATABASE_URL": self.urls["postgres"], "BYRD_BROKER_URL": self.urls["redis"]}
        worker = Worker(name, command, env, cluster.folder / f"{name}.log")
        cluster.workers.append(worker)
        worker.start()
        worker.wait_for_log(r" ready\.", timeout=START_SECONDS)
        return worker


@cache
def why_not() -> str:
    """Say why no namespaces can be made here; an empty string when they can."""
    if sys.platform != "linux" or shutil.which("ip") is None:
        return "network namespaces need Linux and the command `ip` (package iproute2)"
    if os.geteuid() != 0:
        return "network namespaces that are linked with this machine's need root"
    try:
        with _namespaces():
            return ""
    except subprocess.CalledProcessError as exc:
        return f"network namespaces cannot be made here: {exc.stderr.strip()}"


@contextmanager
def cut_off(postgres: EmbeddedPostgres, broker: EmbeddedValkey) -> Iterator[CutOff]:
    """Have a namespace from which both servers can be reached until their links are cut."""
    with _namespaces() as (name, router, addresses), ExitStack() as stack:
        servers: dict[Link, EmbeddedPostgres | EmbeddedValkey] = {"postgres": postgres, "redis": broker}
        ports = {
            link: stack.enter_context(Proxy(server.port, host=addresses[link])).port for link, server in servers.items()
        }
        url = make_url(postgres.url).set(host=addresses["postgres"], port=ports["postgres"])
        urls: dict[Link, str] = {
            "postgres": url.render_as_string(hide_password=False),
            "redis": f"redis://{addresses['redis']}:{ports['redis']}/0",
        }
        yield CutOff(name, router, addresses, urls)


@contextmanager
def _namespaces() -> Iterator[tuple[str, str, dict[Link, str]]]:
    for left in reversed(range(_TRIES)):
        with ExitStack() as stack:
            try:
                made = _make(stack)
            except subprocess.CalledProcessError:
                if not left:
                    raise
                continue
            yield made
            return


def _make(stack: ExitStack) -> tuple[str, str, dict[Link, str]]:
    tag = secrets.token_hex(3)
    router, far, near = f"byrd-r-{tag}", f"byrd-w-{tag}", f"byrd{tag}"
    net = [f"{_NETWORK}.{number}" for number in random.sample(range(256), 2)]
    addresses: dict[Link, str] = {"postgres": f"{net[0]}.1", "redis": f"{net[0]}.2"}
    for name in (router, far):
        _ip("netns", "add", name)
        stack.callback(_forget, "netns", "del", name)
    _ip("link", "add", near, "type", "veth", "peer", "name", "near", "netns", router)
    stack.callback(_forget, "link", "del", near)
    _ip("-n", router, "link", "add", "far", "type", "veth", "peer", "name", "up", "netns", far)
    for address in addresses.values():
        _ip("addr", "add", f"{address}/24", "dev", near)
    _ip("-n", router, "addr", "add", f"{net[0]}.9/24", "dev", "near")
    _ip("-n", router, "addr", "add", f"{net[1]}.9/24", "dev", "far")
    _ip("-n", far, "addr", "add", f"{net[1]}.1/24", "dev", "up")
    _ip("link", "set", "dev", near, "up")
    for where, device in ((router, "near"), (router, "far"), (far, "up"), (far, "lo")):
        _ip("-n", where, "link", "set", "dev", device, "up")
    _ip("-n", far, "route", "add", "default", "via", f"{net[1]}.9")
    _ip("route", "add", f"{net[1]}.0/24", "via", f"{net[0]}.9")
    _ip("netns", "exec", router, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
    # A rule that drops comes before all others, so one that is there is enough to see that they work.
    CutOff(far, router, addresses, {}).cut("postgres")
    CutOff(far, router, addresses, {}).mend("postgres")
    return far, router, addresses


def _ip(*arguments: str) -> None:
    try:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20)
    except subprocess.CalledProcessError as exc:
        exc.add_note(exc.stderr.strip())
        raise


def _forget(*arguments: str) -> None:
    with contextlib.suppress(subprocess.SubprocessError):
        _ip(*arguments)
