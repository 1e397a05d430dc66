"""A stand-in on loopback for the service of Lightning AI, which needs an account: what litlogger asks when it logs."""

from __future__ import annotations

import json
import re
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TEAMSPACE = {
    "projectId": "p",
    "id": "p",
    "name": "space",
    "displayName": "space",
    "ownerId": "o",
    "ownerType": "organization",
}


class LightningService(ThreadingHTTPServer):
    """Keeps the experiments of the teamspace ``org/space``.

    Args:
        port: Where it listens, 0 for any.
    """

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.streams: dict[str, dict[str, Any]] = {}
        self.values: defaultdict[str, list[tuple[int, float]]] = defaultdict(list)
        self.artifacts: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def answer(self, request: str, query: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """Return what is answered to a request, None for "not found"."""
        if request.startswith("GET /v1/memberships"):
            return {"memberships": [TEAMSPACE]}
        if request.startswith("GET /v1/orgs"):
            return {"id": "o", "name": "org"}
        if request == "GET /v1/projects/p":
            return TEAMSPACE
        if request == "GET /v1/metrics-streams":
            name = re.search(r"name=([^&]*)", query)
            return self.streams.get(name[1]) if name else None
        if request.endswith("/metrics-stream/create"):
            stream = {**body, "id": f"s-{body['name']}", "cloudspaceId": "", "workId": "", "clusterId": ""}
            return self.streams.setdefault(body["name"], stream)
        if found := re.fullmatch(r"PUT /v1/projects/p/metrics-stream/s-(.*)", request):
            self.streams[found[1]].update({key: value for key, value in body.items() if value is not None})
        elif request.startswith("PUT /v1/projects/p/logger-metrics/"):
            for metric in body["metrics"]:
                self.values[metric["name"]] += [(int(v["step"]), float(v["value"])) for v in metric["values"]]
        elif request.endswith("/logger-artifacts") and request.startswith("POST"):
            self.artifacts.append(body["path"])
        return {}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LightningService

    def _answer(self) -> None:
        path, _, query = self.path.partition("?")
        text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        answer = self.server.answer(f"{self.command} {path}", query, json.loads(text) if text else {})
        content = json.dumps(answer or {}).encode()
        self.send_response(404 if answer is None else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = _answer  # noqa: N815  (names of the base class)

    def log_message(self, *args: object) -> None:
        pass
