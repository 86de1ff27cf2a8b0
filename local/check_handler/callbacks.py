"""The kit's own receiver of callbacks, as the service will have one: signed, for its own reference, accepted once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from dispatcher.contract import MAX_ANSWER_BYTES, Outcome, Received, Reference, classify
from dispatcher.signatures import verify_callback
from local.check_handler.target import KitError, Sample
from qaes.domain.errors import ForbiddenError, InvalidInputError

WAIT_SECONDS = 20


class Receiver:
    """The callbacks that came, by reference."""

    def __init__(self, base: str, sample: Sample) -> None:
        self._base = base.rstrip("/")
        self._sample = sample
        self._outcomes: dict[str, Outcome] = {}
        self._changed = threading.Condition()

    def wait(self, reference: str) -> Outcome | None:
        """Return the outcome that a valid callback reported; None if none came in time."""
        with self._changed:
            self._changed.wait_for(lambda: reference in self._outcomes, WAIT_SECONDS)
            return self._outcomes.get(reference)

    def receive(self, path: str, headers: list[tuple[str, str]], body: bytes) -> int:
        """Return the HTTP status for a callback; 204 is the only one that counts."""
        parts = path.split("/")
        try:
            if parts[:2] != ["", "actions"] or parts[3:] != ["result"]:
                return 404
            reference = str(Reference.parse(parts[2]))
            verify_callback("POST", self._base + path, headers, body, self._sample.public_keys)
        except InvalidInputError:
            return 404
        except ForbiddenError:
            return 403
        outcome = classify("execute", Received(body), self._sample.terms)
        if outcome.kind not in {"done", "refused"}:
            return 422
        with self._changed:
            if reference in self._outcomes:
                return 409
            self._outcomes[reference] = outcome
            self._changed.notify_all()
        return 204


@contextmanager
def receiving(base: str, sample: Sample) -> Iterator[Receiver]:
    """Receive callbacks at `base`, an http URL of this machine with a port."""
    parts = urlsplit(base)
    if parts.scheme != "http" or parts.port is None:
        raise KitError("CALLBACK must be an http URL of this machine with a port, such as http://127.0.0.1:8099")
    receiver = Receiver(base, sample)

    class Handler(BaseHTTPRequestHandler):
        timeout = 10

        def log_message(self, *arguments: object) -> None:
            pass

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length", "0")
            size = int(length) if length.isdecimal() else MAX_ANSWER_BYTES + 1
            body = self.rfile.read(size) if size <= MAX_ANSWER_BYTES else b""
            self.send_response(receiver.receive(self.path, self.headers.items(), body))
            self.send_header("Content-Length", "0")
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", parts.port), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
