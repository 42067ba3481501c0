"""Sends notices as e-mail, by the server that ``byrd_mail_server`` names."""

from __future__ import annotations

import re
import smtplib
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.errors import MessageError
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import SMTP
from typing import Any
from urllib.parse import unquote, urlsplit

from celery import Celery

from byrd.errors import ConfigurationError

_SCHEME = "mailto:"
_PORTS = {"smtp": 25, "smtps": 465}
#: A server that takes longer than this for one answer has failed, and is tried again later.
_TIMEOUT_SECONDS = 10.0
_HERE = ("localhost", "127.0.0.1", "::1")


def is_mail(hook: str) -> bool:
    """Tell whether a hook is an address for e-mail: ``mailto:on-call@example.com``."""
    return hook.lower().startswith(_SCHEME)


def address_of(hook: str) -> str:
    """Return the address of a ``mailto:`` hook; empty when it is none, or more than one."""
    address = unquote(hook[len(_SCHEME) :])
    return address if _is_address(address) else ""


def _is_address(text: str) -> bool:
    try:
        address = Address(addr_spec=text)
    except (MessageError, ValueError, IndexError):
        return False
    return address.addr_spec == text and re.fullmatch(r"[\w.-]+", address.domain) is not None


@dataclass(frozen=True, slots=True)
class MailServer:
    """A server, and who sends by it.  The password is never shown."""

    host: str
    port: int
    sender: str
    tls: bool
    user: str | None = None
    password: str | None = field(default=None, repr=False)

    @classmethod
    def of(cls, app: Celery) -> MailServer:
        """Return what the settings say; raise :class:`ConfigurationError` for what cannot be right."""
        url, sender = app.conf.get("byrd_mail_server"), app.conf.get("byrd_mail_from")
        try:
            parts = urlsplit(url) if isinstance(url, str) else None
            port = parts.port if parts else None
        except ValueError:  # which would show the password
            parts = port = None
        if parts is None or parts.scheme not in _PORTS or not parts.hostname or parts.path not in ("", "/"):
            raise ConfigurationError(
                "a hook is a mailto: address, so byrd_mail_server must be smtp://host:port, or smtps://, or "
                "smtp://user:password@host for a server that wants it"
            )
        if not isinstance(sender, str) or not _is_address(sender):
            raise ConfigurationError(f"byrd_mail_from={sender!r} must be an address: byrd@example.com")
        user, password = parts.username, parts.password
        return cls(
            parts.hostname, port or _PORTS[parts.scheme], sender, parts.scheme == "smtps",
            None if user is None else unquote(user), None if password is None else unquote(password),
        )  # fmt: skip

    def send(self, message: EmailMessage) -> None:
        """Hand a message to the server.  Raises ``OSError``, of which smtplib's errors are some, when it takes none."""
        context = ssl.create_default_context()
        with (
            smtplib.SMTP_SSL(self.host, self.port, timeout=_TIMEOUT_SECONDS, context=context)
            if self.tls
            else smtplib.SMTP(self.host, self.port, timeout=_TIMEOUT_SECONDS)
        ) as server:
            server.ehlo()
            encrypted = self.tls
            if not encrypted and server.has_extn("starttls"):
                server.starttls(context=context)
                server.ehlo()
                encrypted = True
            if self.user is not None:
                if not encrypted and self.host not in _HERE:
                    raise smtplib.SMTPException(f"{self.host} has no TLS: no password is sent to it")
                server.login(self.user, self.password or "")
            server.send_message(message)


def message_of(payload: Mapping[str, Any], sender: str, to: str) -> EmailMessage:
    """Return the message that tells of a notice, the same each time that it is told."""
    run, step = payload["run"], payload["step"]
    what = _line(payload["workflow"] or payload["title"] or "a run")
    undoes = "" if payload["undoes"] is None else f", which undoes step {payload['undoes']},"
    error = payload["error"] or {}
    said = ": ".join(_line(part) for part in (error.get("exc_type"), *_texts(error.get("exc_message"))) if part)
    message = EmailMessage(policy=SMTP)
    message["From"], message["To"] = sender, to
    message["Subject"] = f"Rollback stuck: {what[:80]}, run {run[:8]}"
    message["Message-ID"] = f"<byrd-notice-{payload['notice']}-{run}@{sender.rpartition('@')[2]}>"
    message["Auto-Submitted"] = "auto-generated"
    message.set_content(
        f"The rollback of run {run} ({what}) is stuck since {payload['at']}:\n"
        f"its step {step} ({payload['task']}){undoes} has failed for good.\n\n"
        f"    {said or 'no error was recorded'}\n\n"
        "Nothing more of the run is undone until somebody decides:\n\n"
        f"    byrd why {run}\n"
        f"    byrd retry {run}\n"
        f"    byrd skip {run} {step} --reason 'why it stays as it is'\n"
        f"    byrd done-by-hand {run} {step} --note 'what was done'\n"
    )
    return message


def _texts(said: Any) -> list[str]:
    return [str(part) for part in said] if isinstance(said, list | tuple) else [str(said)] if said else []


def _line(text: Any) -> str:
    """Return a text without what would begin another line, or another header."""
    return " ".join(str(text).split())
