"""How the processes of a service are found and ended; no service is needed for it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from integrations.ndif.commands import state
from integrations.ndif.fork_server import Runner
from integrations.ndif.processes import MARK, end, mark, marked, new_run, parent_of
from tests.ndif.conftest import command

ROOT = Path(__file__).parents[2]

# A run whose processes are hard to end. Each of them can be found by TOKEN, which only this test knows.
RUN = """
import os, subprocess, sys, time
from pathlib import Path

from integrations.ndif.processes import Ended, end, guarded, mark, new_run

info, token = Path(sys.argv[1]), sys.argv[2]
run = new_run()

def start(script, env):
    subprocess.Popen(["sh", "-c", script], env={"PATH": os.environ["PATH"]} | env, start_new_session=True)

def serve():
    # A daemon: no mark, a session of its own, its parent gone, and it is not to be asked.
    start(f"trap '' TERM; sleep {token} & exit", {})
    # One that, when it is asked, leaves another.
    start(f"trap 'sleep {token} & exit' TERM; while :; do sleep 0.1; done", mark(run))
    start(f"sleep {token} & exit", mark(run))
    info.with_suffix(".new").write_text(f"{os.getppid()} {os.getpid()} {run}")
    info.with_suffix(".new").rename(info)
    try:
        while True:
            time.sleep(0.1)
    except Ended:
        return 7
    finally:
        end(run, 0.5, below=os.getpid())

raise SystemExit(guarded(run, serve, after=lambda: info.with_suffix(".after").touch()))
"""


def with_token(token: str) -> set[int]:
    pids = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if token.encode() in (entry / "cmdline").read_bytes():
                pids.add(int(entry.name))
        except OSError:
            continue
    return pids


@pytest.fixture
def run_of_its_own(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path, str]]:
    token = f"600.{time.time_ns()}{os.getpid()}"
    command = [sys.executable, "-c", RUN, str(tmp_path / "info"), token]
    guard = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)})
    yield guard, tmp_path / "info", token
    guard.kill()
    guard.wait()
    for pid in with_token(token):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("ended_by", ["asked", "the service killed", "the guard killed"])
def test_whatever_ends_first_every_process_of_a_run_ends(
    run_of_its_own: tuple[subprocess.Popen[bytes], Path, str], ended_by: str
) -> None:
    guard, info, token = run_of_its_own
    while not info.exists() or len(with_token(token)) != 5:  # These three, the service and its guard.
        assert guard.poll() is None
        time.sleep(0.05)
    pids = [int(p) for p in info.read_text().split()[:2]]
    assert pids[0] == guard.pid
    if ended_by == "asked":
        os.kill(pids[0], signal.SIGTERM)
    else:
        os.kill(pids[ended_by == "the service killed"], signal.SIGKILL)
    deadline = time.monotonic() + 60
    while left := with_token(token):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    codes = {"asked": 7, "the service killed": 128 + signal.SIGKILL, "the guard killed": -signal.SIGKILL}
    assert guard.wait() == codes[ended_by]
    assert info.with_suffix(".after").exists() == (ended_by != "the guard killed")


def test_every_process_with_a_runs_mark_is_found_and_ended() -> None:
    run = new_run()
    child = "import subprocess, sys, time; subprocess.Popen(['sleep', '600'], env={}); time.sleep(600)"
    first = subprocess.Popen([sys.executable, "-c", child], env=os.environ | {MARK: run})
    while len(pids := marked(run)) < 2:  # Its child has no mark.
        time.sleep(0.05)
    assert first.pid in pids
    (second,) = pids - {first.pid}
    assert parent_of(second) == first.pid
    end(run, timeout_s=0.0)
    first.wait()
    assert not marked(run)
    assert [parent_of(pid) for pid in pids] == [None, None]


def test_those_to_be_left_alone_are() -> None:
    run = new_run()
    one, other = (subprocess.Popen(["sleep", "600"], env=os.environ | mark(run)) for _ in range(2))
    end(run, timeout_s=10.0, but=[one.pid])
    try:
        assert marked(run) == {one.pid}
        assert parent_of(other.pid) is None
    finally:
        one.kill()
        one.wait()
        other.wait()


def test_a_zombie_counts_as_ended() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    try:
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # It has ended, and is not reaped.
        assert Path(f"/proc/{child}").exists()
        assert parent_of(child) is None
    finally:
        os.waitpid(child, 0)
    assert parent_of(os.getpid()) == os.getppid()


def test_what_is_left_of_a_service_killed_with_its_guard_is_ended_by_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MM_INTERP_NDIF_HOME", str(tmp_path))
    run, temp = new_run(), tmp_path / "ndif-temp"
    temp.mkdir()
    gone = subprocess.Popen(["true"])
    gone.wait()
    info = {
        "pid": gone.pid,
        "service": gone.pid,
        "run": run,
        "temp": str(temp),
        "address": "x",
        "ready": True,
    }
    (tmp_path / "service.json").write_text(json.dumps(info))
    left = subprocess.Popen(["sleep", "600"], env=os.environ | mark(run))
    assert state() is None
    assert "Ended what a killed service left" in command("down").stdout
    assert left.wait() == -signal.SIGTERM
    assert not list(tmp_path.iterdir())
    assert "No service is running" in command("down").stdout


def test_a_number_that_is_another_programs_by_now_is_no_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MM_INTERP_NDIF_HOME", str(tmp_path))
    info = {"run": "none", "temp": str(tmp_path / "none"), "address": "x", "ready": True}
    info |= {"pid": os.getpid(), "service": os.getppid()}
    (tmp_path / "service.json").write_text(json.dumps(info))
    assert state() is None
    assert command("status").returncode == 1


def test_a_runner_whose_parent_has_ended_is_given_to_no_job() -> None:
    parent = subprocess.Popen(["sleep", "60"])
    child = subprocess.Popen(["sleep", "60"])
    runner = Runner(child.pid, parent)
    try:
        assert not runner.orphaned
        parent.kill()
        parent.wait()
        assert runner.orphaned
        assert runner.poll() is None  # The kernel signals it after its parent has ended.
    finally:
        child.kill()
        child.wait()
    assert runner.poll() == 0
