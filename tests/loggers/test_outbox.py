"""What is sent to a service by a thread: in order, again while the service is away, and kept when it stays away."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import threading
import time
import types
import weakref
from pathlib import Path

import pytest
import requests

from levin.loggers.outbox import Entry, Outbox, is_unreachable

ROOT = Path(__file__).parents[2]


class Service:
    """Takes what it is sent, unless it is told otherwise."""

    def __init__(self) -> None:
        self.taken: list = []
        self.num_asked = 0
        self.is_away = False
        self.gate = threading.Event()
        self.gate.set()

    def send(self, kind: str, payloads: list) -> None:
        self.num_asked += 1
        self.gate.wait(20)
        if self.is_away:
            raise ConnectionError("no route\nto host")
        if "bad" in payloads:
            raise ValueError("bad is no number")
        self.taken.append((kind, payloads))


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
def kept() -> list[Entry]:
    return []


def outbox(service: Service, kept: list[Entry], **options) -> Outbox:
    def keep(entries: list[Entry]) -> str:
        kept.extend(entries)
        return f"Kept {len(entries)}."

    return Outbox("svc", service.send, lambda error: isinstance(error, ConnectionError), keep, **options)


def test_what_has_nothing_to_send_is_kept_by_nobody(service, kept, monkeypatch):
    monkeypatch.setattr("levin.loggers.outbox._IDLE_S", 0.01)
    box = outbox(service, kept)
    for number in range(2):
        box.put("metrics", number).result(20)
        while box._worker is not None:
            time.sleep(0.001)
    gone = weakref.ref(box)
    del box
    deadline = time.monotonic() + 20
    while gone() is not None and time.monotonic() < deadline:  # the thread may be about to end
        gc.collect()
        time.sleep(0.001)
    assert gone() is None
    assert service.taken == [("metrics", [0]), ("metrics", [1])]


def test_neighbours_of_one_kind_go_together_and_in_order(service, kept):
    service.gate.clear()
    box = outbox(service, kept)
    box.put("metrics", 0)
    while service.num_asked == 0:
        time.sleep(0.001)
    for kind, payload in [("metrics", 1), ("metrics", 2), ("params", 3), ("metrics", 4)]:
        box.put(kind, payload)
    service.gate.set()
    box.close()
    assert service.taken == [("metrics", [0]), ("metrics", [1, 2]), ("params", [3]), ("metrics", [4])]
    box.put("metrics", 5)
    box.close()
    assert service.taken[-1] == ("metrics", [5]) and kept == []


def test_what_waited_is_sent_when_the_service_is_back(service, kept, caplog):
    caplog.set_level(logging.INFO, "levin")
    service.is_away = True
    box = outbox(service, kept)
    for number in range(5):
        box.put("metrics", number)
    while service.num_asked < 2:
        time.sleep(0.01)
    service.is_away = False
    box.close()
    assert [number for _, numbers in service.taken for number in numbers] == list(range(5)) and kept == []
    assert [record.message for record in caplog.records] == [
        "svc cannot be reached, training goes on and the values wait: ConnectionError: no route",
        "svc is back, what waited is sent.",
    ]


def test_a_service_that_stays_away_ends_nothing(service, kept, caplog):
    service.is_away = True
    box = outbox(service, kept)
    box.put("metrics", 1)
    while service.num_asked == 0:
        time.sleep(0.001)
    box.put("metrics", 2)
    began = time.monotonic()
    box.close()
    assert time.monotonic() - began < 1.0
    assert [entry.payload for entry in kept] == [1, 2] and service.num_asked == 2
    assert caplog.records[-1].message == "2 entries could not be sent to svc. Kept 2."
    service.is_away = False
    box.put("metrics", 3)
    box.close()
    assert service.taken == [("metrics", [3])] and len(kept) == 2


def test_a_service_that_hangs_has_the_time_of_an_entry(service, kept):
    service.gate.clear()
    box = outbox(service, kept)
    for number in range(3):
        box.put("metrics", number, limit_s=0.2)
    began = time.monotonic()
    box.close()
    assert 0.2 <= time.monotonic() - began < 2.0
    assert [entry.payload for entry in kept] == [0, 1, 2]
    service.gate.set()
    time.sleep(0.1)
    box.close()
    assert len(kept) == 3  # The thread that was left behind keeps and sends nothing more.
    assert sum(len(numbers) for _, numbers in service.taken) <= 3


def test_one_that_is_refused_does_not_take_its_neighbours_along(service, kept, caplog):
    service.gate.clear()
    box = outbox(service, kept)
    box.put("start", "first")
    sent = [box.put("metrics", payload) for payload in [1, "bad", 2, "bad", 3]]
    service.gate.set()
    box.close()
    assert service.taken == [("start", ["first"]), ("metrics", [1]), ("metrics", [2]), ("metrics", [3])] and kept == []
    assert [type(future.exception(0)) for future in sent] == [
        type(None),
        ValueError,
        type(None),
        ValueError,
        type(None),
    ]
    assert [record.message for record in caplog.records] == [
        "svc refused metrics 'bad': ValueError: bad is no number",
        "svc refused 2 entries.",
    ]


def test_after_each_close_it_begins_anew(service, kept, caplog):
    caplog.set_level(logging.INFO, "levin")
    box = outbox(service, kept)
    for _ in range(2):
        box.put("metrics", "bad")
        box.close()
        assert [record.message for record in caplog.records] == [
            "svc refused metrics 'bad': ValueError: bad is no number"
        ]
        caplog.clear()


def test_memory_is_bounded_and_nothing_is_lost(service, kept, caplog):
    service.gate.clear()
    box = outbox(service, kept, limit=10)
    for number in range(35):
        box.put("metrics", number)
    assert len(kept) in (20, 30)
    assert "svc does not keep up: 10 entries waited. Kept 10." in caplog.text
    service.gate.set()
    box.close()
    sent = [number for _, numbers in service.taken for number in numbers]
    assert sorted([*sent, *(entry.payload for entry in kept)]) == list(range(35))


def test_putting_takes_no_time(service, kept):
    service.gate.clear()
    box = outbox(service, kept)
    began = time.perf_counter()
    for number in range(1000):
        box.put("metrics", number)
    assert time.perf_counter() - began < 0.5
    service.gate.set()
    box.close()


@pytest.mark.parametrize("how", ["the end of the program", "a fork"])
def test_processes(how, tmp_path):
    program = f"""
import os, time
from levin.loggers.outbox import Outbox
def send(kind, payloads):
    time.sleep(0.2)
    with open({str(tmp_path / "sent")!r}, "a") as file:
        file.writelines(f"{{os.getpid() == parent}} {{payload}}\\n" for payload in payloads)
parent = os.getpid()
box = Outbox("svc", send, lambda error: False, str)
box.put("metrics", 1)
if {how == "a fork"} and os.fork() == 0:
    box.put("metrics", 2)
    box.close()
    os._exit(0)
elif {how == "a fork"}:
    os.wait()
"""
    subprocess.run(
        [sys.executable, "-c", program], check=True, timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT / "src")}
    )
    lines = sorted((tmp_path / "sent").read_text().splitlines())
    assert lines == (["False 2", "True 1"] if how == "a fork" else ["True 1"])


class Answer(Exception):
    """An error as packages around HTTP make them."""

    def __init__(self, status=None, status_code=None, cause=None):
        if status is not None:
            self.status = status
        if status_code is not None:
            self.response = types.SimpleNamespace(status_code=status_code)
        self.__cause__ = cause


@pytest.mark.parametrize(
    ("error", "is_away"),
    [
        (requests.ConnectionError(), True), (requests.ReadTimeout(), True), (ConnectionResetError(), True),
        (TimeoutError(), True), (ValueError(), False), (Answer(status=500), True), (Answer(status=499), False),
        (Answer(status=408), True), (Answer(status=429), True), (Answer(status=404), False), (Answer(status="500"), False),
        (Answer(status_code=503), True), (Answer(status_code=401), False), (Answer(cause=Answer(status_code=502)), True),
        (Answer(status=400, cause=ConnectionRefusedError()), True),
    ],
)  # fmt: skip
def test_a_service_that_cannot_answer_is_told_from_one_that_refuses(error, is_away):
    assert is_unreachable(error) is is_away
