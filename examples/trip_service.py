"""What a trip is booked with: hotels, flights, payments and mails, as a small HTTP service that fails on command.

``PUT /hotels/KEY`` books, and books once however often it is asked with that key; ``GET`` tells whether it did, and
``DELETE`` cancels, as often as one likes.  It listens on loopback only, at a free port, and forgets all when it ends.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

#: The most that this bank pays.
FUNDS = 1000
#: What can go wrong: the request, how often, the answer (None: none at all), and whether it has its effect first.
FAILURES: dict[str, tuple[str, int, int | None, bool]] = {
    "flight": ("PUT /flights", 99, 409, False),
    "flight-answer": ("PUT /flights", 1, None, True),
    "mail": ("PUT /mails", 2, 503, False),
    "cancel": ("DELETE /flights", 2, 503, False),
}


@dataclass
class Service:
    """The world outside: what was booked, by its key, and what is to fail."""

    url: str
    booked: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: dict[str, tuple[int, int | None, bool]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fail(self, name: str) -> None:
        """Let something go wrong from now on: one of :data:`FAILURES`."""
        request, times, status, after = FAILURES[name]
        self.failures[request] = (times, status, after)

    def ledger(self) -> list[str]:
        """Return what the outside world has in its books, in the order in which it was booked."""
        return [f"{path.split('/')[1]}: {entry['what']}, {entry['state']}" for path, entry in self.booked.items()]

    def answer(self, method: str, path: str, body: dict[str, Any]) -> tuple[int | None, dict[str, Any]]:
        """Do what is asked; return the status and the body, or no status for an answer that is lost."""
        with self.lock:
            failing = f"{method} /{path.split('/')[1]}"
            times, status, after = self.failures.get(failing, (0, None, False))
            if times:
                self.failures[failing] = (times - 1, status, after)
                if after:
                    self.do(method, path, body)
                return status, {"error": f"{failing} is out of order"}
            return self.do(method, path, body)

    def do(self, method: str, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Do what is asked, once."""
        entry = self.booked.get(path)
        if method == "GET":
            return (200, entry) if entry and entry["state"] == "booked" else (404, {"error": "no such booking"})
        if method == "DELETE":
            if entry is None:
                return 404, {"error": "no such booking"}
            entry["state"] = "cancelled"
            return 200, entry
        if entry is None and body.get("amount", 0) > FUNDS:
            return 402, {"error": f"the bank refuses to pay {body['amount']}"}
        if entry is None:
            number = sum(known.startswith(path[:4]) for known in self.booked) + 1
            entry = self.booked[path] = {"number": number, "what": body["what"], "state": "booked"}
        return 200, entry


@contextmanager
def running() -> Iterator[Service]:
    """Run the service for as long as the block lasts."""

    class Handler(BaseHTTPRequestHandler):
        def serve(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length) or b"{}")
            status, found = service.answer(self.command, self.path, body)
            if status is None:
                self.close_connection = True  # it hangs up without a word
                return
            text = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: Any) -> None:
            pass

    for method in ("GET", "PUT", "DELETE"):
        setattr(Handler, f"do_{method}", Handler.serve)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        service = Service(f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield service
        finally:
            server.shutdown()
