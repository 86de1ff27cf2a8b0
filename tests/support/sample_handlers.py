"""An HTTPS handler in memory that keeps the contract, and handlers that each break it in one way."""

from __future__ import annotations

import http.client
import json
import select
import socket
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from dispatcher.signatures import REQUEST_COMPONENTS, _Lines, _Message, verify
from qaes.domain.errors import ForbiddenError

Answer = tuple[int, dict[str, Any]]


def refused(code: str) -> Answer:
    return 422, {"status": "refused", "error": {"code": code, "message": f"Refused: {code}."}}


class SampleHandler:
    """Fulfils the contract. `effects` counts its effects for each reference."""

    def __init__(self, keys: dict[str, Ed25519PublicKey]) -> None:
        self.keys = keys
        self.records: dict[str, dict[str, Any]] = {}
        self.effects: Counter[str] = Counter()
        self.lock = threading.Lock()

    def receive(self, url: str, headers: list[tuple[str, str]], body: bytes, connection: socket.socket) -> Answer:
        request = json.loads(body)
        if not self.is_genuine(url, headers, body):
            return 401, {}
        if not self.is_mine(request):
            return refused("unknown_action")
        if request["mode"] == "dry_run":
            return self.dry_run(request)
        return self.decide(request, connection)

    def decide(self, request: dict[str, Any], connection: socket.socket) -> Answer:
        with self.lock:
            record = self.records.get(request["reference"])
            if record is None:
                if request["mode"] == "query":
                    return self.unknown(request)
                if self.is_late(request):
                    return refused("late")
                record = self.act(request)
            return self.repeat(record, request)

    def is_genuine(self, url: str, headers: list[tuple[str, str]], body: bytes) -> bool:
        try:
            return bool(verify(_Message("POST", url, _Lines(headers)), body, self.keys, REQUEST_COMPONENTS))
        except ForbiddenError:
            return False

    def is_mine(self, request: dict[str, Any]) -> bool:
        return bool(request["action"] == "refund_customer")

    def is_late(self, request: dict[str, Any]) -> bool:
        return datetime.now(UTC) >= datetime.fromisoformat(request["deadline"])

    def content(self, request: dict[str, Any]) -> Any:
        return [request[name] for name in ("action", "parameters", "plan_hash", "step_hash")]

    def unknown(self, request: dict[str, Any]) -> Answer:
        return 404, {"status": "not_found"}

    def result(self) -> dict[str, Any]:
        return {"refund_id": str(uuid.uuid4())}

    def act(self, request: dict[str, Any]) -> dict[str, Any]:
        self.effects[request["reference"]] += 1
        record = {"content": self.content(request), "result": self.result()}
        self.records[request["reference"]] = record
        return record

    def repeat(self, record: dict[str, Any], request: dict[str, Any]) -> Answer:
        if record["content"] != self.content(request):
            return 409, {"status": "conflict"}
        return 200, {"status": "done", "result": record["result"]}

    def dry_run(self, request: dict[str, Any]) -> Answer:
        return 200, {"status": "done", "result": {"would_refund": request["parameters"]["amount"]}}


class IgnoresDeadline(SampleHandler):
    def is_late(self, request: dict[str, Any]) -> bool:
        return False


class RefusesWhatIsLate(SampleHandler):
    """Denies its completed effects too: the dispatcher would assume no effect."""

    def decide(self, request: dict[str, Any], connection: socket.socket) -> Answer:
        return refused("late") if self.is_late(request) else super().decide(request, connection)


class TrustsAnyone(SampleHandler):
    def is_genuine(self, url: str, headers: list[tuple[str, str]], body: bytes) -> bool:
        return True


class ForgetsToCheckTheBody(SampleHandler):
    """Verifies the signature over the headers, and not that the digest is the body's."""

    def is_genuine(self, url: str, headers: list[tuple[str, str]], body: bytes) -> bool:
        from http_message_signatures import HTTPMessageVerifier, MappingKeyResolver, algorithms

        resolver = MappingKeyResolver(public_keys=self.keys, private_keys={})
        verifier = HTTPMessageVerifier(signature_algorithm=algorithms.ED25519, key_resolver=resolver)
        try:
            return bool(verifier.verify(_Message("POST", url, _Lines(headers)), require_components=REQUEST_COMPONENTS))
        except Exception:  # noqa: BLE001 every failure is one here
            return False


class ComparesHashesOnly(SampleHandler):
    def content(self, request: dict[str, Any]) -> Any:
        return [request["plan_hash"], request["step_hash"]]


class ActsInDryRun(SampleHandler):
    def dry_run(self, request: dict[str, Any]) -> Answer:
        with self.lock:
            record = self.records.get(request["reference"]) or self.act(request)
        return 200, {"status": "done", "result": record["result"]}


class ActsInDryRunWithoutRecord(SampleHandler):
    """Only the count of its effects shows it."""

    def dry_run(self, request: dict[str, Any]) -> Answer:
        self.effects[request["reference"]] += 1
        return super().dry_run(request)


class ChecksThenActs(SampleHandler):
    """Looks for a record and acts, without a lock between the two."""

    def decide(self, request: dict[str, Any], connection: socket.socket) -> Answer:
        record = self.records.get(request["reference"])
        if record is None and request["mode"] == "execute" and not self.is_late(request):
            time.sleep(0.1)
            return self.repeat(self.act(request), request)
        return super().decide(request, connection)


class AbortsWithItsClient(SampleHandler):
    """Acts, and keeps no record if the client is gone: as a web framework that cancels a request."""

    def decide(self, request: dict[str, Any], connection: socket.socket) -> Answer:
        known = request["reference"] in self.records
        answer = super().decide(request, connection)
        if not known and request["mode"] == "execute":
            closed, _, _ = select.select([connection], [], [], 0.2)  # at once if the client is gone
            if closed and connection.recv(1, socket.MSG_PEEK) == b"":
                self.records.pop(request["reference"], None)
        return answer


class RefusesUnknownQueries(SampleHandler):
    def unknown(self, request: dict[str, Any]) -> Answer:
        return refused("unknown_reference")


class ActsForAnyAction(SampleHandler):
    def is_mine(self, request: dict[str, Any]) -> bool:
        return True


class ReturnsAnotherResult(SampleHandler):
    def result(self) -> dict[str, Any]:
        return {"refund": 7}


class RefusesDuplicates(SampleHandler):
    def repeat(self, record: dict[str, Any], request: dict[str, Any]) -> Answer:
        status, answer = super().repeat(record, request)
        if status == 200 and request["mode"] == "execute" and record.get("reported"):
            return refused("duplicate")
        record["reported"] = True
        return status, answer


class Accepts(SampleHandler):
    """Accepts a request, finishes it a little later, and calls back at `callback_base`."""

    callback_base = ""

    def repeat(self, record: dict[str, Any], request: dict[str, Any]) -> Answer:
        status, answer = super().repeat(record, request)
        if status == 200 and "thread" not in record:
            record["thread"] = threading.Thread(target=self._finish, args=(record, request["reference"]), daemon=True)
            record["thread"].start()
        if status == 200 and not record.get("finished"):
            return 202, {"status": "accepted"}
        return status, answer

    def _finish(self, record: dict[str, Any], reference: str) -> None:
        time.sleep(0.05)
        record["finished"] = True
        if self.callback_base:
            self.call_back(reference, json.dumps({"status": "done", "result": record["result"]}).encode())

    def call_back(self, reference: str, body: bytes) -> None:
        url = f"{self.callback_base}/actions/{reference}/result"
        self.statuses = [*getattr(self, "statuses", []), post(url, self.sign(url, body), body)]

    def sign(self, url: str, body: bytes) -> dict[str, str]:
        from tests.dispatcher.test_signatures import callback

        return dict(callback(url=url, body=body))


class CallsBackTwice(Accepts):
    def call_back(self, reference: str, body: bytes) -> None:
        super().call_back(reference, body)
        super().call_back(reference, body)


class CallsBackForAnotherReference(Accepts):
    def sign(self, url: str, body: bytes) -> dict[str, str]:
        return super().sign(url.replace(".0.1/", ".0.2/"), body)


class CallsBackWithAnotherResult(Accepts):
    def call_back(self, reference: str, body: bytes) -> None:
        super().call_back(reference, json.dumps({"status": "done", "result": {"refund_id": "another"}}).encode())


def post(url: str, headers: dict[str, str], body: bytes) -> int:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=5)
    try:
        connection.request("POST", parts.path, body, headers)
        return connection.getresponse().status
    finally:
        connection.close()


@contextmanager
def serve(handler: SampleHandler) -> Iterator[str]:
    """Serve a handler on loopback; gives its URL."""

    class Http(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            url = f"http://{self.headers['Host']}{self.path}"
            status, answer = handler.receive(url, self.headers.items(), body, self.connection)
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            """A client that is gone is a part of these tests."""

    server = Quiet(("127.0.0.1", 0), Http)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/refund"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
