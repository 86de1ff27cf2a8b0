"""An HTTP server on a port of this machine for a function's routes, in place of API Gateway."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Handle = Callable[[str, str, bytes, dict[str, str]], dict[str, Any]]
"""Method, path, body, headers → the function's response to API Gateway."""


@contextmanager
def serve(handle: Handle) -> Iterator[str]:
    """Serve `handle`; yield the address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
            # Lambda's only thread has an event loop; a thread of this server needs a new one.
            loop = asyncio.new_event_loop()
            asyncio.set_event_loop(loop)
            try:
                answer = handle(self.command, self.path, body, dict(self.headers))
            finally:
                asyncio.set_event_loop(None)
                loop.close()
            text: str = answer["body"]
            content = base64.b64decode(text) if answer.get("isBase64Encoded") else text.encode()
            self.send_response(answer["statusCode"])
            for name, value in (answer.get("headers") or {}).items():
                if name.lower() != "content-length":
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = _serve

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
