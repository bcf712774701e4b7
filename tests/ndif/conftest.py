"""Services to send jobs to: the stand-in, always, and a real NDIF for tests marked `ndif`."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import beartype  # noqa: F401  Before nnsight, whose `.save` on every object it cannot be imported after.
import nnsight
import pytest
import torch

import mm_adapters as mm
from integrations.ndif.service import answers, free_ports
from mm_adapters.ndif_client.backend import Dispatch

ROOT = Path(__file__).parents[2]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def ends_the_service(item: pytest.Item) -> bool:
        marker = item.get_closest_marker("ndif")
        return marker is not None and marker.kwargs.get("ends_it", False)

    for item in items:
        if item.get_closest_marker("ndif"):
            item.add_marker(pytest.mark.xdist_group("ndif"))  # One service, so one worker.
    items.sort(key=ends_the_service)  # Last, so that no other test meets what they break.


class Standin:
    """One stand-in process."""

    def __init__(self, *options: str) -> None:
        self.port = free_ports("one")["one"]
        self.options = options
        self.host = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-W", "ignore", str(ROOT / "tests/ndif/standin.py"), str(self.port)]
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen([*command, *self.options], env=env)
        start = time.monotonic()
        while not answers(f"{self.host}/ping"):
            assert self.process.poll() is None, "the stand-in ended"
            assert time.monotonic() - start < 180
            time.sleep(0.1)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def post(self, path: str) -> None:
        urllib.request.urlopen(urllib.request.Request(f"{self.host}{path}", method="POST"), timeout=10)


@pytest.fixture(autouse=True)
def _no_logging_and_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(nnsight.CONFIG.APP, "REMOTE_LOGGING", False)
    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", None)


@pytest.fixture(scope="session")
def standin() -> Iterator[Standin]:
    server = Standin()
    yield server
    server.kill()


@pytest.fixture
def make_standin() -> Iterator[Callable[..., Standin]]:
    servers: list[Standin] = []

    def make(*options: str) -> Standin:
        servers.append(Standin(*options))
        return servers[-1]

    yield make
    for server in servers:
        server.kill()


@pytest.fixture(scope="session")
def installed() -> Iterator[list[str]]:
    """An NDIF that can be started, and why it could not be. Skips, loudly, only where it cannot be installed;
    in CI that is a failure."""
    from integrations.ndif.commands import state
    from integrations.ndif.environment import InstallError, ensure

    os.environ.setdefault("MM_INTERP_NDIF_HOME", str(ROOT / ".ndif"))
    if not sys.platform.startswith("linux"):
        pytest.skip("NO REAL SERVICE WAS TESTED: NDIF runs on Linux only.")
    try:
        ensure()
    except InstallError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"NO REAL SERVICE WAS TESTED: NDIF could not be installed.\n{error}")
    ours = state() is None
    yield []
    if ours:
        command("down")


@pytest.fixture
def service(installed: list[str]) -> str:
    """The address of a real NDIF: one for all tests, and another if a test before has left it broken."""
    from integrations.ndif.commands import state

    assert not installed, installed[0]
    info = state()
    if info is None or not info["ready"] or not answers(f"{info['address']}/connected"):
        command("down")
        done = command("up", "--port", str(free_ports("one")["one"]), "--gpus", "0")
        if done.returncode:
            installed.append(done.stdout + done.stderr)
        assert not installed, installed[0]
        info = state()
    assert info is not None
    return info["address"]


def command(*words: str) -> subprocess.CompletedProcess[str]:
    """`mm-interp ndif ...`, in a process of its own."""
    call = "from integrations.ndif.commands import ndif; ndif()"
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", call, *words], env=env, capture_output=True, text=True, check=False
    )


@pytest.fixture(
    params=[
        "standin",
        pytest.param("trusted", marks=pytest.mark.ndif),
        pytest.param("sandbox", marks=pytest.mark.ndif),
    ]
)
def host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a service: the stand-in, or a real NDIF that trusts our jobs, or does not."""
    if request.param == "standin":
        return request.getfixturevalue("standin").host
    monkeypatch.setattr(Dispatch, "trusted", request.param == "trusted")
    return request.getfixturevalue("service")


@pytest.fixture(scope="session")
def load() -> Callable[[str], Any]:
    """Models of the zoo as nnsight's, each loaded once."""
    from functools import cache

    return cache(lambda name: mm.load(name, engine="nnsight"))
