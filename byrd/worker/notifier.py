"""Tells somebody outside that a rollback is stuck: the setting ``byrd_rollback_stuck_hook`` says whom.

It is a Celery task of the app by its name, the URL of a webhook, an address for e-mail (``mailto:``), or several of
these.  A task is submitted as a run, once for each notice; a webhook is sent a POST with JSON, and an address an
e-mail, at least once.  Each is told by itself.
"""

from __future__ import annotations

import json
import logging
import urllib.request
from http.client import HTTPException
from importlib.metadata import version
from typing import Any
from urllib.parse import urlsplit

from celery import Celery

from byrd.errors import ByrdError, ConfigurationError
from byrd.ids import new_id
from byrd.store import Store, notices, plans
from byrd.store.notices import Notice
from byrd.task.runtime import Runtime
from byrd.worker import mail
from byrd.worker.loop import Loop
from byrd.worker.mail import MailServer

log = logging.getLogger(__name__)

HOOK = "byrd_rollback_stuck_hook"
_LOOK_SECONDS = 1.0
_IDLE_SECONDS = 3600.0
#: A webhook that takes longer than this has failed, and is called again later.
_TIMEOUT_SECONDS = 5.0


def hooks_of(app: Celery) -> list[str]:
    """Return whom to tell; raise :class:`ConfigurationError` for what can be told nothing."""
    said = app.conf.get("byrd_rollback_stuck_hook")
    hooks = [] if not said else list(said) if isinstance(said, list | tuple) else [said]
    for hook in hooks:
        if not isinstance(hook, str) or not hook.strip() or not _may_be_told(hook):
            raise ConfigurationError(
                f"{HOOK}={hook!r} must be a task's name, an http(s) URL, mailto: and one address, or a list of such"
            )
    if any(map(mail.is_mail, hooks)):
        MailServer.of(app)  # or it says what is missing
    return hooks


def _may_be_told(hook: str) -> bool:
    if mail.is_mail(hook):
        return mail.address_of(hook) != ""
    return _is_http(hook) or not _is_url(hook)


def payload_of(notice: Notice) -> dict[str, Any]:
    """Return what is told: ``notice`` is the same each time that it is told."""
    return {
        "event": "rollback_stuck",
        "notice": notice.id,
        "run": notice.run_id,
        "workflow": notice.workflow,
        "title": notice.title,
        "status": notice.status,
        "step": notice.step_no,
        "task": notice.task,
        "undoes": notice.undoes,
        "error": json.loads(notice.error) if notice.error else None,
        "at": notice.at.isoformat(),
    }


class Notifier(Loop):
    """Delivers notices; any number may run, for each takes others."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__("byrd-notifier")
        self.runtime, self.hooks = runtime, hooks_of(runtime.app)
        # Of its own: a webhook may hang for seconds, and its thread holds nobody up.
        self.store = Store(runtime.store.url, patience=0.0, pool_size=1)

    def tick(self) -> float:
        if not self.hooks:
            return _IDLE_SECONDS
        taken = self.store.run(notices.take)
        for notice in taken:
            self._deliver(notice)
        return _LOOK_SECONDS if not taken else 0.0

    def stop(self, timeout: float = 5.0) -> None:
        super().stop(timeout)
        self.store.close()

    def _deliver(self, notice: Notice) -> None:
        """Tell all who have not been told; one who cannot be keeps nobody else from it, and is told again later."""
        errors = []
        for hook in self.hooks:
            if hook in notice.told:
                continue
            try:
                self._tell(hook, notice)
            except (OSError, HTTPException, ValueError, ByrdError) as exc:
                log.warning("run %s is stuck, of which %s could not be told: %s", notice.run_id, hook, exc)
                errors.append(f"{hook}: {exc}")
            else:
                self.store.run(notices.told, notice.id, hook)
        if errors:
            self.store.run(notices.failed, notice.id, "; ".join(errors))
        else:
            self.store.run(notices.delivered, notice.id)

    def _tell(self, hook: str, notice: Notice) -> None:
        payload = payload_of(notice)
        if mail.is_mail(hook):
            server = MailServer.of(self.runtime.app)
            server.send(mail.message_of(payload, server.sender, mail.address_of(hook)))
            return
        if _is_url(hook):
            _post(hook, payload)
            return
        plan = self.runtime.plan(self.runtime.app.signature(hook, args=(payload,)))
        key = f"byrd.rollback_stuck:{notice.id}:{hook}"
        run = plans.NewRun(new_id(), plan, title=f"{hook}: run {notice.run_id} is stuck", key=key)
        self.runtime.publisher.publish(self.store.run(plans.write, [run])[1])


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A POST that is sent elsewhere is no POST any more: an error, as each answer but 2xx."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _post(url: str, payload: dict[str, Any]) -> None:
    headers = {
        "Content-Type": "application/json",
        "User-Agent": f"byrd/{version('byrd')}",
        "Idempotency-Key": f"byrd-notice-{payload['notice']}",
    }
    # hooks_of() has let through http and https only.
    request = urllib.request.Request(url, json.dumps(payload).encode(), headers, method="POST")  # noqa: S310
    with urllib.request.build_opener(_NoRedirects).open(request, timeout=_TIMEOUT_SECONDS) as answer:
        answer.read(1024)


def _is_url(hook: str) -> bool:
    return "://" in hook


def _is_http(hook: str) -> bool:
    parts = urlsplit(hook)
    return parts.scheme in ("http", "https") and bool(parts.hostname)
