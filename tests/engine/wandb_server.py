"""As much of a W&B server as a run needs, on the loopback, and as unhelpful as asked."""

from __future__ import annotations

import http.server
import json
import threading
import time
from contextlib import suppress
from typing import Any

RUN = {
    "id": "run", "name": "run0", "displayName": "a-run", "historyLineCount": 0,
    "project": {"id": "project", "name": "tests", "entity": {"id": "entity", "name": "me"}},
}  # fmt: skip


class Server(http.server.ThreadingHTTPServer):
    """``mode``: well, slow (three seconds an answer), hanging, or refusing (the key)."""

    daemon_threads = True

    def __init__(self, mode: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.mode = mode
        self.bodies: list[bytes] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def received(self, text: str) -> bool:
        return any(text.encode() in body for body in self.bodies)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.bodies.append(body)
        status, content = 200, {}
        match self.server.mode:
            case "hanging":
                time.sleep(600)
            case "slow":
                time.sleep(3)
            case "refusing":
                status, content = 401, {"errors": [{"message": "permission denied"}]}
        if status == 200 and self.path.startswith("/graphql"):
            bucket = {"bucket": RUN, "inserted": True}
            created: dict[str, Any] = {"runID": "run", "uploadHeaders": [], "files": []}
            content = {"data": {"viewer": {"entity": "me"}, "upsertBucket": bucket, "createRunFiles": created}}
        answer = json.dumps(content).encode()
        with suppress(ConnectionError):  # a client that has stopped waiting
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

    do_GET = do_POST = do_PUT = answer

    def log_message(self, *_: object) -> None: ...
