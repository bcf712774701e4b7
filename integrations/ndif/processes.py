"""The processes of one run: how they are found, and how all of them end, whatever ends first.

Linux only. A process of a run carries its mark in /proc/PID/environ, or descends from one that does. While
the run's two first processes live no process can leave the run: both adopt orphans.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Callable, Collection
from pathlib import Path

MARK = "MM_INTERP_NDIF_RUN"
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


class Ended(Exception):
    """The run was asked to end."""


def new_run() -> str:
    """A name for a run that no other has had on this machine."""
    return f"{os.getpid()}-{time.time_ns()}"


def mark(run: str) -> dict[str, str]:
    """The environment by which a process is known to be of a run.

    Ray 2.60 (includes/setproctitle.pxi) wipes the environment of the processes it renames out of /proc,
    so that those whose parent ended first (its two agents, of a raylet) could not be found. SPT_NOENV
    lets it stand.
    """
    return {MARK: run, "SPT_NOENV": "1"}


def marked(run: str, below: int | None = None) -> set[int]:
    """The processes of a run but this one: those with its mark, and those under them or under `below`."""
    parents: dict[int, int] = {}
    pids: set[int] = set()
    for entry in Path("/proc").iterdir():
        pid = int(entry.name) if entry.name.isdigit() else None
        parent = None if pid is None or pid == os.getpid() else parent_of(pid)
        if pid is None or parent is None:
            continue
        parents[pid] = parent
        with contextlib.suppress(OSError):
            if f"{MARK}={run}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                pids.add(pid)
    roots = set() if below is None else {below}
    # A sandbox's runners are started with an environment of their own.
    while more := {pid for pid, parent in parents.items() if parent in pids | roots} - pids:
        pids |= more
    return pids


def parent_of(pid: int) -> int | None:
    """A process's parent; None if it has ended, also as a zombie, whose parent has not waited for it."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if status[0] in "ZX" else int(status[1])


def end(run: str, timeout_s: float, *, below: int | None = None, but: Collection[int] = ()) -> None:
    """Ends every process of a run and those under `below`, except `but`; returns when none is left.

    Each is asked once, also one that appears meanwhile; those left after `timeout_s` are killed.
    """
    start, asked = time.monotonic(), set()
    while left := marked(run, below) - set(but):
        kill = time.monotonic() - start >= timeout_s
        for pid in left if kill else left - asked:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if kill else signal.SIGTERM)
        asked |= left
        time.sleep(0.1)
        while below == os.getpid() and _reap():  # Elsewhere another process waits for them.
            pass


def guarded(run: str, body: Callable[[], int], after: Callable[[], None]) -> int:
    """Runs `body` in a child and returns its exit code, when every process that came of it has ended.

    Either of the two may be killed. This one adopts the processes that its child leaves behind, and ends
    them; the child is asked to end (Ended is raised in it) when this one is asked to, or is gone. `after` is
    called last.
    """
    guard = os.getpid()
    _adopt_orphans()
    # Signals are taken by sigwait below, so that none is lost between the fork and the loop.
    signal.pthread_sigmask(signal.SIG_BLOCK, {*_ENDING, signal.SIGCHLD})
    child = os.fork()
    if child == 0:
        _adopt_orphans()
        for signum in _ENDING:
            signal.signal(signum, _raise_ended)
        die_with_parent(signal.SIGTERM)
        if os.getppid() != guard:
            raise SystemExit(1)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {*_ENDING, signal.SIGCHLD})
        raise SystemExit(body())
    code = None
    while code is None:
        if signal.sigwait({*_ENDING, signal.SIGCHLD}) != signal.SIGCHLD:
            os.kill(child, signal.SIGTERM)
        while ended := _reap():
            if ended[0] == child:
                code = ended[1] if ended[1] >= 0 else 128 - ended[1]  # As a shell says it.
    end(run, timeout_s=1.0, below=guard)
    after()
    return code


def die_with_parent(signum: signal.Signals = signal.SIGKILL) -> None:
    """Run in a new child: it gets the signal when its parent ends, however that happens."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signum, 0, 0, 0)


def _adopt_orphans() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _raise_ended(signum: int, frame: object) -> None:
    for each in _ENDING:
        signal.signal(each, signal.SIG_IGN)  # Once: what it leads to is not to be interrupted.
    raise Ended


def _reap() -> tuple[int, int] | None:
    """A child that has ended, and its exit code; None if there is none."""
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return None
    return (pid, os.waitstatus_to_exitcode(status)) if pid else None
