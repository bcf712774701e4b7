"""The real service: starts, serves many at once, and ends without a trace; also when it is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from zoo_inputs import INPUTS

import mm_adapters as mm
from integrations.ndif import environment
from integrations.ndif.commands import state
from integrations.ndif.processes import marked, parent_of
from mm_adapters import remote
from tests.ndif.conftest import command

ROOT = Path(__file__).parents[2]


# -- without a service ---------------------------------------------------------------------------


def test_the_newest_python_that_ndif_declares_is_found_wherever_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def python(version: str) -> str:
        path = tmp_path / f".pyenv/versions/{version}.1/bin/python{version}"
        path.parent.mkdir(parents=True)
        path.write_text(f"#!/bin/sh\necho {version.replace('.', ' ')}\n")
        path.chmod(0o755)
        return str(path)

    monkeypatch.setattr(environment.shutil, "which", lambda name: None)
    monkeypatch.setattr(environment.Path, "home", lambda: tmp_path)
    monkeypatch.delenv("PYENV_ROOT", raising=False)
    monkeypatch.setattr(environment.sys, "executable", str(tmp_path / "none"))
    assert environment.interpreter() == (str(tmp_path / "none"), False)
    older, newer = python("3.12"), python("3.13")
    assert environment.interpreter() == (newer, True)
    assert environment.interpreter(older) == (older, True)
    with pytest.raises(environment.InstallError, match="is no Python"):
        environment.interpreter(str(tmp_path / "nothing"))


def test_what_a_client_and_a_service_must_share_is_pinned() -> None:
    pins = environment._pins()
    assert f"torch=={torch.__version__.partition('+')[0]}" in pins
    assert any(p.startswith("nnsight==0.8.") for p in pins)
    assert any(p.startswith("transformers==") for p in pins)


def test_without_a_service_status_and_down_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MM_INTERP_NDIF_HOME", str(tmp_path))
    assert command("status").returncode == 1
    assert "No service is running" in command("down").stdout


# -- with one ------------------------------------------------------------------------------------


@contextmanager
def clients(service: str, *more: str) -> Iterator[subprocess.Popen[str]]:
    """Five, each of which sends ten jobs."""
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-W", "ignore", str(ROOT / "tests/ndif/client.py"), service, "5", "10", *more]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(words, env=env, text=True, **pipes) as started:
        try:
            yield started
        finally:
            started.kill()  # Of no effect where it has ended.


def reports(sending: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """Each client's report of its jobs."""
    out = sending.communicate("\n", timeout=900)[0]
    assert sending.returncode == 0
    return json.loads(out.strip().splitlines()[-1])


@pytest.mark.ndif
def test_fifty_jobs_of_five_clients_are_answered_and_none_mixed_up(service: str) -> None:
    with clients(service) as sending:
        reported = reports(sending)
    assert [t["answered"] for t in reported] == [10] * 5
    assert not [wrong for t in reported for wrong in t["wrong"]]
    assert len({name for t in reported for name in t["ids"]}) == 50


@pytest.mark.ndif(ends_it=True)
@pytest.mark.parametrize("ended_by", ["asked", "killed"])
def test_a_service_that_ends_leaves_nothing_and_loses_no_job_silently(service: str, ended_by: str) -> None:
    info = state()
    assert info is not None
    address = info["address"]
    model = mm.load("tiny-clip", engine="nnsight", device="meta")
    model.run(INPUTS["tiny-clip"], remote=address)  # The model is there.
    with clients(address, "2") as sending:
        assert sending.stdout is not None
        assert sending.stdout.readline() == "accepted\n"
        raylet, others = named("raylet/raylet", info["run"]), named("ray::", info["run"])
        processes = {info["pid"], info["service"], *marked(info["run"])}
        assert len(raylet) == 1
        assert len(others) > 3
        assert len(processes) > 10
        # In the middle: two jobs of each are answered, eight are not asked after yet.
        if ended_by == "killed":
            # Ray's agents carry other names and no longer have a parent that leads to the service.
            os.kill(*raylet, signal.SIGKILL)
            os.kill(info["service"], signal.SIGKILL)
        else:
            os.kill(info["pid"], signal.SIGTERM)
        deadline = time.monotonic() + 60
        while (left := [pid for pid in processes if parent_of(pid) is not None]) or state() is not None:
            assert time.monotonic() < deadline, left
            time.sleep(0.2)
        assert not marked(info["run"])
        assert not Path(info["temp"]).exists()
        with pytest.raises(remote.ServiceDownError):
            model.run(INPUTS["tiny-clip"], remote=address)
        started = command("up", "--port", address.rpartition(":")[2], "--gpus", "0")
        assert f"READY {address}" in started.stdout, started.stderr
        reported = reports(sending)
    for t in reported:
        # None is silent: what was lost was said to be, and sent again.
        assert t["answered"] + t["lost"] == 10
        assert t["answered"] >= 2
        assert not t["wrong"]
    assert sum(t["lost"] for t in reported) > 0
    assert len({name for t in reported for name in t["ids"]}) == 50
    assert f"READY {address}" in command("status").stdout


def named(name: str, run: str) -> list[int]:
    """The processes of a run whose command line says so."""
    return [pid for pid in marked(run) if name in Path(f"/proc/{pid}/cmdline").read_text(errors="replace")]
