"""Somebody is told of a stuck rollback by e-mail, through a real SMTP server on this machine."""

from __future__ import annotations

import json
import shutil
import smtplib
import ssl
import subprocess
from collections.abc import Callable, Iterator
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.handlers import Message as Handler
from aiosmtpd.smtp import AuthResult, LoginPassword
from celery import Celery

from byrd.errors import ConfigurationError
from byrd.worker.mail import MailServer, message_of
from byrd.worker.notifier import hooks_of
from tests.cluster import Cluster, wait_until
from tests.worker.test_sagas import APP, stuck

PAYLOAD = {
    "notice": 7, "run": "0f2c9a52-0000-4000-8000-000000000000", "workflow": None, "status": "rollback_stuck",
    "title": "a title\nBcc: all@example.com", "step": 5, "task": "shop.cancel", "undoes": 2,
    "at": "2026-01-02T03:04:05+00:00",
    "error": {"exc_type": "ConnectionError", "exc_message": ["no answer from 10.0.0.1"]},
}  # fmt: skip


class Post(Handler):
    """Keeps what it is sent; ``refuse`` so many messages first."""

    def __init__(self, refuse: int = 0) -> None:
        super().__init__()
        self.refuse, self.calls = refuse, 0
        self.got: list[Message] = []
        self.logins: list[tuple[bytes, bytes, bool]] = []

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:  # noqa: N802 - aiosmtpd's name
        self.calls += 1
        if self.calls <= self.refuse:
            return "451 come again later"
        return str(await super().handle_DATA(server, session, envelope))

    def handle_message(self, message: Message) -> None:
        self.got.append(message)

    def authenticate(self, server: Any, _session: Any, _envelope: Any, _mechanism: str, data: Any) -> AuthResult:
        assert isinstance(data, LoginPassword)
        encrypted = server.transport.get_extra_info("ssl_object") is not None
        self.logins.append((data.login, data.password, encrypted))
        return AuthResult(success=True)


class Office(Controller):
    """A server on a free port."""

    def _trigger_server(self) -> None:
        server: Any = self.server
        self.port = server.sockets[0].getsockname()[1]
        super()._trigger_server()  # type: ignore[no-untyped-call]


@pytest.fixture
def post_office() -> Iterator[Callable[..., tuple[Post, str]]]:
    """Start servers: each a Post, and its host and port."""
    running = []

    def start(refuse: int = 0, host: str = "127.0.0.1", **options: Any) -> tuple[Post, str]:
        post = Post(refuse)
        controller = Office(post, hostname=host, port=0, authenticator=post.authenticate, **options)
        controller.start()
        running.append(controller)
        return post, f"{host}:{controller.port}"

    yield start
    for controller in running:
        controller.stop()


def configured(server: Any, sender: Any = "byrd@example.com") -> Celery:
    return Celery("mail", changes={"byrd_mail_server": server, "byrd_mail_from": sender})


def test_a_stuck_rollback_is_told_by_mail(cluster: Cluster, tmp_path: Path, post_office: Any) -> None:
    app = cluster.app(APP)
    cluster.rows(app.TABLE)
    post, address = post_office(refuse=1)
    hooks = json.dumps(["mailto:on-call@example.com", f"{APP}.told"])
    env = {"SAGA_FILES": str(tmp_path), "SAGA_HOOKS": hooks, "SAGA_MAIL": f"smtp://{address}"}
    cluster.worker(APP, env=env)
    run = stuck(app, tmp_path, "loud")
    # The server takes nothing at first: that keeps nobody else from being told.
    wait_until(lambda: cluster.rows("SELECT 1 FROM effects WHERE what = 'told'"))
    [(error,)] = wait_until(lambda: cluster.rows("SELECT error FROM byrd.notices WHERE error IS NOT NULL"))
    assert "come again later" in error
    cluster.rows("UPDATE byrd.notices SET due_at = now()")
    wait_until(lambda: cluster.rows("SELECT 1 FROM byrd.notices WHERE delivered_at IS NOT NULL"))
    [mail] = post.got
    assert (mail["From"], mail["To"]) == ("byrd@example.com", "on-call@example.com")
    assert run.id[:8] in mail["Subject"]
    text = mail.get_payload()
    for wanted in (f"byrd why {run.id}", f"byrd retry {run.id}", f"byrd skip {run.id} ", "loud cannot be undone now"):
        assert wanted in text
    # The worker dies before it has recorded that: it is sent once more, as the same message.
    cluster.rows("UPDATE byrd.notices SET due_at = now(), delivered_at = NULL, told = '{}'")
    wait_until(lambda: len(post.got) == 2)
    assert post.got[1]["Message-ID"] == mail["Message-ID"]
    assert len(cluster.rows("SELECT 1 FROM effects WHERE what = 'told'")) == 1


def test_a_message_is_one_whatever_a_title_says() -> None:
    message = message_of(PAYLOAD, "byrd@example.com", "on-call@example.com")
    assert message["Bcc"] is None
    assert message["Subject"] == "Rollback stuck: a title Bcc: all@example.com, run 0f2c9a52"
    assert "step 5 (shop.cancel), which undoes step 2" in message.get_content()
    assert "ConnectionError: no answer from 10.0.0.1" in message.get_content()
    assert bytes(message) == bytes(message_of(PAYLOAD, "byrd@example.com", "on-call@example.com"))


def test_the_password_is_not_sent_in_clear_to_another_machine(post_office: Any) -> None:
    post, address = post_office(host="127.0.0.2", auth_require_tls=False)
    server = MailServer.of(configured(f"smtp://anna:s3cret@{address}"))
    with pytest.raises(smtplib.SMTPException, match="no TLS") as caught:
        server.send(message_of(PAYLOAD, server.sender, "on-call@example.com"))
    assert "s3cret" not in f"{caught.value} {server!r}"
    assert not post.logins
    post, address = post_office(auth_require_tls=False)
    server = MailServer.of(configured(f"smtp://anna:s3%40cret@{address}"))
    server.send(message_of(PAYLOAD, server.sender, "on-call@example.com"))
    assert post.logins == [(b"anna", b"s3@cret", False)]
    assert len(post.got) == 1


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
@pytest.mark.parametrize("scheme", ["smtp", "smtps"])
def test_tls_is_used_and_the_certificate_is_checked(
    post_office: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = [
        "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=mail",
        "-addext", "subjectAltName=IP:127.0.0.2", "-keyout", str(key), "-out", str(certificate),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    options = {"tls_context": context} if scheme == "smtp" else {"ssl_context": context, "auth_require_tls": False}
    post, address = post_office(host="127.0.0.2", **options)
    server = MailServer.of(configured(f"{scheme}://anna:s3cret@{address}"))
    message = message_of(PAYLOAD, server.sender, "on-call@example.com")
    with pytest.raises(ssl.SSLCertVerificationError):
        server.send(message)
    assert not post.got
    assert not post.logins
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    server.send(message)
    assert post.logins == [(b"anna", b"s3cret", True)]
    assert len(post.got) == 1


@pytest.mark.parametrize(
    "hook",
    ["mailto:", "mailto:nobody", "mailto:a@example.com,b@example.com", "mailto:a@example.com?subject=x",
     "mailto:a@example.com%0ABcc:b@example.com", "mailto:Anna <a@example.com>"],
)  # fmt: skip
def test_what_is_no_address_is_refused(hook: str) -> None:
    app = configured("smtp://mail.example.com")
    app.conf.byrd_rollback_stuck_hook = hook
    with pytest.raises(ConfigurationError, match="one address"):
        hooks_of(app)


@pytest.mark.parametrize(
    ("server", "sender", "says"),
    [
        (None, "byrd@example.com", "byrd_mail_server"),
        ("mail.example.com", "byrd@example.com", "byrd_mail_server"),
        ("http://mail.example.com", "byrd@example.com", "byrd_mail_server"),
        ("smtp://anna:s3cret@mail.example.com:port", "byrd@example.com", "byrd_mail_server"),
        ("smtp://anna:s3cret@mail.example.com/path", "byrd@example.com", "byrd_mail_server"),
        ("smtp://mail.example.com", None, "byrd_mail_from"),
        ("smtp://mail.example.com", "Byrd", "byrd_mail_from"),
    ],
)
def test_a_server_or_sender_that_cannot_be_right_is_refused(server: Any, sender: Any, says: str) -> None:
    app = configured(server, sender)
    app.conf.byrd_rollback_stuck_hook = ["mailto:on-call@example.com"]
    with pytest.raises(ConfigurationError, match=says) as caught:
        hooks_of(app)
    assert "s3cret" not in str(caught.value)
