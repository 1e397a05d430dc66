"""What stands between levin and a service: a proxy on loopback that can be slow, deaf or gone, and servers."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

from tests.distributed import _free_port


class Proxy:
    """Passes on what comes to ``port``.

    ``delay_s`` holds every piece up; ``is_deaf`` takes connections and answers nothing; after ``num_bytes`` pieces are
    cut. ``stop`` refuses connections, until ``start``.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = _free_port()
        self.delay_s = 0.0
        self.is_deaf = False
        self.num_bytes_left: float = float("inf")
        self._listener: socket.socket | None = None
        self._open: list[socket.socket] = []
        self.start()

    def start(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=64)
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def stop(self) -> None:
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        self.cut()

    def cut(self) -> None:
        """End the connections that are open."""
        while self._open:
            with contextlib.suppress(OSError):
                self._open.pop().shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self.target)) as server:
            self._open += [client, server]
            with contextlib.suppress(OSError):
                while True:
                    for source in select.select([client, server], [], [])[0]:
                        piece = source.recv(1 << 16)
                        if not piece:
                            return
                        time.sleep(self.delay_s)
                        if self.is_deaf:
                            continue
                        if source is client:
                            self.num_bytes_left -= len(piece)
                            if self.num_bytes_left < 0:
                                return
                        (server if source is client else client).sendall(piece)


@contextlib.contextmanager
def running(command: list[str], url: str, log: Path, limit_s: float = 120.0, **environment: str) -> Iterator[None]:
    """Start a server and wait until ``url`` answers; all its processes end afterwards."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env={**os.environ, **environment}, start_new_session=True
        )
    try:
        deadline = time.monotonic() + limit_s
        while not _answers(url):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            pass
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _answers(url: str) -> bool:
    try:
        urlopen(url, timeout=2).close()
    except HTTPError:
        return True
    except (URLError, OSError):
        return False
    return True
