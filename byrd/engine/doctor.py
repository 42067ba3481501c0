"""Says what is wrong with a set-up, and what to do about it: what ``byrd doctor`` prints.

It changes nothing: it reads from Postgres, asks the broker, and lets the workers answer.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from byrd.engine import settings
from byrd.engine.words import count, moment, shortened, span
from byrd.errors import ByrdError, ConfigurationError
from byrd.store import Store, WorkerRow, current_revision, head_revision, insight, notices, sweeps
from byrd.worker import Settings
from byrd.worker.bootstep import settings_of
from byrd.worker.notifier import HOOK, hooks_of

if TYPE_CHECKING:
    from byrd.engine.engine import Byrd

#: Clocks that differ by more than this confuse people (times shown, ``eta``), or are plainly wrong.
_SKEW_SECONDS, _WRONG_SECONDS = 2.0, 30.0
#: A step that was due for longer than this should have been taken, or its worker be there.
_PATIENCE_SECONDS = 5.0
_OLDEST_POSTGRES, _OLDEST_REDIS = 140_000, (6, 2)


class Level(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Check:
    """One finding: ``what`` is the case, and what to ``do`` about it, if anything."""

    name: str
    level: Level
    what: str
    do: str = ""


def examine(engine: Byrd, *, timeout: float = 1.5) -> list[Check]:
    """Look at everything; ``timeout``: for how many seconds workers and servers may answer."""
    checks = list(_settings(engine.app))
    url = engine.runtime.store.url
    found, migrated, skew = _database(url)
    checks += found
    workers: list[WorkerRow] = []
    broker = _Broker(engine.app, timeout=timeout)
    checks += broker.checks()
    checks += _clocks({"Postgres": skew, "Redis": broker.skew})
    if migrated:
        store = Store(url, patience=0.0)
        try:
            workers = list(store.run(sweeps.list_workers))
            checks += _workers(workers, store, engine)
            if broker.reachable:
                checks += _answers(broker.consumers(), workers, engine)
            checks += _waiting(store, workers)
        finally:
            store.close()
    return sorted(checks, key=lambda check: _ORDER.index(check.name))


def examine_database(url: str | URL) -> list[Check]:
    """Look at the database alone, where no app can be loaded."""
    found, _, skew = _database(url)
    return [*found, *_clocks({"Postgres": skew})]


_ORDER = ("app", "settings", "database", "tables", "broker", "eviction", "persistence", "clocks", "results", "workers",
          "queues", "rollbacks")  # fmt: skip


def _ok(name: str, what: str, do: str = "") -> Check:
    return Check(name, Level.OK, what, do)


def _warning(name: str, what: str, do: str) -> Check:
    return Check(name, Level.WARNING, what, do)


def _problem(name: str, what: str, do: str) -> Check:
    return Check(name, Level.PROBLEM, what, do)


# -- Postgres --------------------------------------------------------------------------------------


def _database(url: str | URL) -> tuple[list[Check], bool, float | None]:
    """Return what there is to say, whether Byrd's tables can be used, and how far the clock is ahead of ours."""
    store = Store(url, patience=0.0)
    where = _place(store.url)
    try:
        began = datetime.now(UTC)
        facts = store.run(insight.server_facts)
        ours = began + (datetime.now(UTC) - began) / 2
        revision = store.run(current_revision)
    except (ByrdError, SQLAlchemyError) as exc:
        do = "start Postgres, or correct BYRD_DATABASE_URL (`byrd dev` starts a Postgres for development)"
        return [_problem("database", _first_line(exc), do)], False, None
    finally:
        store.close()
    tables = _tables(revision)
    checks = [*_server(facts, where), tables]
    return checks, tables.level is not Level.PROBLEM, (facts.now - ours).total_seconds()


def _server(facts: insight.ServerFacts, where: str) -> list[Check]:
    found = []
    if facts.version_num < _OLDEST_POSTGRES:
        found.append(
            _problem("database", f"Postgres {facts.version} at {where} is too old", "use Postgres 14 or newer")
        )
    if facts.standby:
        do = "connect to the primary: a standby takes no writes"
        found.append(_problem("database", f"Postgres at {where} is a standby", do))
    if facts.fsync == "off":
        do = "set fsync = on, unless the data may be lost, as in tests"
        found.append(_warning("database", f"Postgres at {where} runs with fsync = off", do))
    if facts.synchronous_commit == "off":
        do = "set it to on for Byrd's role: `ALTER ROLE ... SET synchronous_commit = on`"
        found.append(_warning("database", "synchronous_commit = off: what was recorded may be lost in a crash", do))
    return found or [_ok("database", f"Postgres {facts.version.partition(' ')[0]} at {where}")]


def _tables(revision: str | None) -> Check:
    wanted = head_revision()
    if revision is None:
        return _problem("tables", "Byrd's tables are missing in this database", "run `byrd migrate`")
    if revision < wanted:
        return _problem("tables", f"Byrd's tables are at version {revision}, not {wanted}", "run `byrd migrate`")
    if revision > wanted:
        do = f"upgrade byrd here (it is {version('byrd')}), as where the database was migrated"
        return _warning("tables", f"Byrd's tables are at version {revision}, newer than this Byrd's {wanted}", do)
    return _ok("tables", f"Byrd's tables are at version {revision}")


# -- the broker ------------------------------------------------------------------------------------


class _Broker:
    """What the broker says of itself, and who answers on it."""

    def __init__(self, app: Any, *, timeout: float) -> None:
        self.app, self.timeout = app, timeout
        self.reachable = False
        #: How many seconds its clock is ahead of ours.
        self.skew: float | None = None

    def checks(self) -> list[Check]:
        """Connect, and look at the settings of a Redis."""
        with self.app.connection_for_write() as connection:
            where = connection.as_uri()
            try:
                connection.ensure_connection(max_retries=0, timeout=5)
                if connection.transport.driver_type != "redis":
                    self.reachable = True
                    return [_ok("broker", f"{connection.transport.driver_type} at {where}")]
                found = self._redis(connection.default_channel.client, where)
                self.reachable = all(check.name != "broker" or check.level is Level.OK for check in found)
                return found
            except Exception as exc:  # noqa: BLE001 - each transport has errors of its own
                do = "start it, or correct the broker's URL (BYRD_BROKER_URL); runs wait in Postgres meanwhile"
                return [_problem("broker", f"the broker at {where} does not answer: {_first_line(exc)}", do)]

    def consumers(self) -> dict[str, list[str]]:
        """Return the queues that each worker on the broker says it consumes, by its node name."""
        replies = self.app.control.inspect(timeout=self.timeout).active_queues() or {}
        return {
            node: [queue["name"] for queue in queues if isinstance(queue, dict)]
            for node, queues in replies.items()
            if isinstance(queues, list)  # what is no worker (Beat answers too) has no queues to tell of
        }

    def _redis(self, client: Any, where: str) -> list[Check]:
        began = time.time()
        info = client.info()
        middle = (began + time.time()) / 2
        seconds, microseconds = client.time()
        # The second question was asked after the first had been answered.
        self.skew = seconds + microseconds / 1e6 - (middle + (time.time() - began) / 2)
        return [_server_version(info, where), _eviction(info), _persistence(client, info)]


def _server_version(info: dict[str, Any], where: str) -> Check:
    kind = "Valkey" if info.get("server_name") == "valkey" else "Redis"
    number = str(info.get("valkey_version") if kind == "Valkey" else info.get("redis_version"))
    if info.get("role") == "slave":
        do = "connect to the primary: a replica takes no messages"
        return _problem("broker", f"{kind} at {where} is a replica", do)
    parts = tuple(int(part) for part in number.split(".")[:2] if part.isdigit())
    if kind == "Redis" and parts < _OLDEST_REDIS:
        return _problem("broker", f"Redis {number} at {where} is too old", "use Redis 6.2 or newer, or Valkey")
    return _ok("broker", f"{kind} {number} at {where}")


def _eviction(info: dict[str, Any]) -> Check:
    limit, policy = int(info.get("maxmemory") or 0), str(info.get("maxmemory_policy") or "noeviction")
    if not limit:
        return _ok("eviction", "Redis has no memory limit, so it evicts nothing")
    size = f"{limit / 2**20:,.0f} MB"
    if policy == "noeviction":
        return _ok("eviction", f"Redis evicts nothing (maxmemory {size}, noeviction)")
    do = (
        "set maxmemory-policy to noeviction: steps would only be late, but messages of other tasks, and the broker's "
        "own bindings, would be gone"
    )
    return _problem("eviction", f"Redis may evict messages: maxmemory {size} with maxmemory-policy {policy}", do)


def _persistence(client: Any, info: dict[str, Any]) -> Check:
    if int(info.get("aof_enabled") or 0):
        return _ok("persistence", "Redis keeps a log of its writes (appendonly yes)")
    try:
        how = "only saves snapshots now and then" if client.config_get("save").get("save") else "keeps nothing on disk"
    except Exception:  # noqa: BLE001 - managed services refuse CONFIG
        how = "keeps no log of its writes (appendonly no)"
    do = "steps are sent again after a restart, only later; set appendonly yes to keep the messages of other tasks too"
    return _ok("persistence", f"Redis {how}", do)


def _clocks(skews: dict[str, float | None]) -> Iterator[Check]:
    known = {name: skew for name, skew in skews.items() if skew is not None}
    for name, skew in known.items():
        if abs(skew) >= _SKEW_SECONDS:
            level = Level.PROBLEM if abs(skew) >= _WRONG_SECONDS else Level.WARNING
            what = f"the clock of {name} is {span(abs(skew))} {'ahead of' if skew > 0 else 'behind'} this machine's"
            do = "synchronise both (NTP): leases go by Postgres's clock alone, but an eta, and times shown, are wrong"
            yield Check("clocks", level, what, do)
    if known and all(abs(skew) < _SKEW_SECONDS for skew in known.values()):
        most = max(abs(skew) for skew in known.values())
        yield _ok("clocks", f"{' and '.join(known)} differ from this machine's by {span(most)} at most")


# -- settings --------------------------------------------------------------------------------------


def _settings(app: Any) -> Iterator[Check]:
    found = list(_unsafe(app))
    yield from found or [_ok("settings", "Celery's settings are safe")]
    yield _results(app)


def _unsafe(app: Any) -> Iterator[Check]:
    conf = app.conf
    try:
        settings.refuse_unsafe(app.conf)
        settings_of(app)
        hooks_of(app)
    except ConfigurationError as exc:
        yield _problem("settings", str(exc), "change it where the app is configured")
    options = conf.broker_transport_options or {}
    if str(conf.broker_url or "").startswith(("redis", "valkey", "sentinel")) and not options.get("socket_timeout"):
        what = "broker_transport_options has no socket_timeout: a frozen Redis would block workers for ever"
        yield _warning("settings", what, "set it to 5, and socket_connect_timeout too")
    if conf.broker_connection_max_retries is not None:
        what = f"broker_connection_max_retries = {conf.broker_connection_max_retries}: workers give up on a long outage"
        yield _warning("settings", what, "set it to None")
    if conf.get("worker_cancel_long_running_tasks_on_connection_loss"):
        what = "worker_cancel_long_running_tasks_on_connection_loss = True: a Redis restart would repeat running work"
        yield _warning("settings", what, "set it to False: steps need no broker to end")
    if not conf.get("worker_disable_prefetch") and conf.worker_prefetch_multiplier != 1:
        what = f"worker_prefetch_multiplier = {conf.worker_prefetch_multiplier}: steps wait behind others in one worker"
        yield _warning("settings", what, "set worker_disable_prefetch = True, or the multiplier to 1")
    if conf.task_always_eager:
        what = "task_always_eager = True: tasks called with delay() run in the caller; steps do not"
        yield _warning("settings", what, "set it in unit tests only")


def _results(app: Any) -> Check:
    backend = str(app.conf.result_backend or "disabled://")
    kind = backend.partition(":")[0].partition("+")[0]
    do = "set result_backend to db+postgresql://..., or leave it unset and Byrd sets it; steps' results are in Postgres"
    if kind in ("disabled", "rpc", "amqp", "cache", "memory"):
        lost = {"disabled": "are not kept", "rpc": "are messages, lost once read or with the broker"}
        how = lost.get(kind, "are kept in memory only")
        return _warning("results", f"results of tasks that are no steps {how} (result_backend {kind}://)", do)
    if kind in ("redis", "rediss", "sentinel", "valkey", "valkeys"):
        expires = app.conf.result_expires
        after = (
            "" if not expires else f", and expire after {span(getattr(expires, 'total_seconds', lambda: expires)())}"
        )
        return _warning("results", f"results of tasks that are no steps are lost with Redis{after}", do)
    return _ok("results", f"steps keep their results in Postgres, other tasks theirs in {kind}://")


# -- workers ---------------------------------------------------------------------------------------


def _workers(workers: list[WorkerRow], store: Store, engine: Byrd) -> Iterator[Check]:
    live = [worker for worker in workers if worker.alive]
    lost = store.run(insight.orphans, seconds=_lease_seconds(engine))
    if lost:
        what = f"{count(lost, 'step is', 'steps are')} held by workers whose lease is over, and nobody recovers them"
        yield _problem("workers", what, "start a worker, or `byrd relay`")
    if not live:
        waiting = sum(demand.steps for demand in store.run(insight.demand))
        do = "start one: `celery -A <app> worker`"
        if waiting:
            yield _problem("workers", f"no worker is alive, and {count(waiting, 'step waits', 'steps wait')}", do)
        else:
            yield _warning("workers", "no worker is alive", do)
    names = [worker.hostname for worker in live]
    for name in sorted({name for name in names if names.count(name) > 1}):
        what = f"{names.count(name)} live workers are called {name}: Celery's remote control cannot tell them apart"
        yield _warning("workers", what, "give each its own name: `celery worker -n name@%h`")
    ours = version("byrd")
    for other in sorted({worker.version for worker in live} - {ours}):
        what = f"workers run Byrd {other}, and {ours} is installed here"
        yield _warning("workers", what, "upgrade them all to the same version")


def _lease_seconds(engine: Byrd) -> float:
    try:
        return settings_of(engine.app).lease_seconds
    except ConfigurationError:  # a finding of its own
        return Settings().lease_seconds


def _answers(consumers: dict[str, list[str]], workers: list[WorkerRow], engine: Byrd) -> Iterator[Check]:
    """Compare who answers on the broker with who holds a lease."""
    live = {worker.hostname for worker in workers if worker.alive}
    ours = {queue for worker in workers if worker.alive for queue in worker.queues}
    ours |= {str(engine.app.conf.task_default_queue), *engine.app.amqp.queues}
    strangers = {node: sorted(ours & set(queues)) for node, queues in consumers.items() if node not in live}
    strangers = {node: queues for node, queues in strangers.items() if queues}
    for node, queues in sorted(strangers.items()):
        what = f"worker {node} takes messages from queue {', '.join(queues)} and has no Byrd, or another database"
        do = "call byrd.Byrd(app) in its app and give it the same BYRD_DATABASE_URL, or give it queues of its own"
        yield _problem("workers", what, do)
    silent = sorted(live - consumers.keys())
    for node in silent:
        what = f"worker {node} holds a lease, but does not answer on this broker"
        do = "give it the same BYRD_BROKER_URL; a solo worker answers only while it runs nothing"
        yield _warning("workers", what, do)
    if live and not silent and not strangers:
        yield _ok("workers", f"{count(len(live), 'worker')} with Byrd: {', '.join(sorted(live))}")


def _waiting(store: Store, workers: list[WorkerRow]) -> Iterator[Check]:
    live = [worker for worker in workers if worker.alive and not worker.stopping]
    demands = store.run(insight.demand)
    consumed = {queue for worker in live for queue in worker.queues}
    missing = [demand for demand in demands if demand.queue not in consumed]
    for queue in sorted({demand.queue for demand in missing}):
        steps = sum(demand.steps for demand in missing if demand.queue == queue)
        what = f"{count(steps, 'step waits', 'steps wait')} in queue {queue!r}, which no live worker consumes"
        yield _problem("queues", what, f"start one: `celery -A <app> worker -Q {queue}`")
    unknown = [demand for demand in demands if demand.queue in consumed and not _known(demand, live)]
    for demand in unknown:
        waits = count(demand.steps, "step waits", "steps wait")
        what = f"{waits} for a worker on queue {demand.queue!r} that has the task {demand.task} registered"
        yield _problem("queues", what, "deploy the code that defines it, or import its module in the app")
    if live and not missing and not unknown:
        yield _queue_state(demands, store)
    stuck = store.run(insight.stuck_rollbacks)
    if stuck:
        do = f"`byrd why {stuck[0][:8]}` tells the cause; remove it, then `byrd retry {stuck[0][:8]}`"
        number = max(len(stuck), store.run(insight.count_stuck))
        more = ", ..." if number > len(stuck) else ""
        what = f"{count(number, 'rollback')} stuck: {', '.join(run_id[:8] for run_id in stuck)}{more}"
        yield _problem("rollbacks", what, do)
    untold, why = store.run(notices.undelivered)
    if untold:
        what = f"{count(untold, 'notice')} of a stuck rollback not delivered: {shortened(why or '', 200)}"
        yield _problem("rollbacks", what, f"correct the setting {HOOK}, or what it names; it is tried again meanwhile")


def _known(demand: insight.Demand, live: Iterable[WorkerRow]) -> bool:
    there = [worker for worker in live if demand.queue in worker.queues]
    return demand.task.startswith("celery.") or any(demand.task in worker.tasks for worker in there)


def _queue_state(demands: list[insight.Demand], store: Store) -> Check:
    if not demands:
        return _ok("queues", "no step waits for a worker")
    now = store.run(insight.server_facts).now
    oldest = min(demand.since for demand in demands)
    waited = (now - oldest).total_seconds()
    steps = count(sum(demand.steps for demand in demands), "step is", "steps are")
    if waited < _PATIENCE_SECONDS:
        return _ok("queues", f"{steps} due, and every queue has its workers")
    what = f"{steps} due, the first since {moment(oldest, now)} ({span(waited)})"
    return _ok("queues", what, "more workers, or a higher --concurrency, would take them sooner")


# -- words -----------------------------------------------------------------------------------------


def _place(url: URL) -> str:
    return f"{url.host or 'localhost'}:{url.port or 5432}/{url.database or ''}"


def _first_line(exc: BaseException) -> str:
    said = str(exc.orig if isinstance(exc, DBAPIError) and exc.orig is not None else exc).strip()
    return said.splitlines()[0] if said else type(exc).__name__
