"""A job that is not trusted has a process of its own, in which no job ran before it."""

# ruff: noqa: SIM117  A traced block stands alone.
from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nnsight
import pytest
import torch
from nnsight.intervention.backends.remote import RemoteError
from zoo_inputs import INPUTS

from integrations.ndif.commands import state
from integrations.ndif.processes import marked
from mm_adapters.ndif_client.backend import Dispatch

Load = Callable[[str], Any]
CLIP = INPUTS["tiny-clip"]

pytestmark = pytest.mark.ndif


@pytest.fixture(autouse=True)
def _not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Dispatch, "trusted", False)


def job(load: Load, service: str) -> tuple[list[int], list[float]]:
    """Its process, that one's parent and how many jobs it has seen; and what it draws."""
    model = load("tiny-clip")
    numbers, drawn = [], []
    with model.trace(**CLIP, remote=service):
        system = __import__("os")
        torch.jobs_seen = getattr(torch, "jobs_seen", 0) + 1
        numbers = nnsight.save([system.getpid(), system.getppid(), torch.jobs_seen])
        drawn = nnsight.save([*torch.rand(2).tolist(), *__import__("numpy").random.rand(2).tolist()])
    return numbers, drawn


def test_each_job_has_a_fresh_process_of_its_own_and_draws_for_itself(service: str, load: Load) -> None:
    (one, parent, n_jobs), drawn = job(load, service)
    (other, same_parent, n_jobs_later), drawn_later = job(load, service)
    assert one != other
    assert parent == same_parent
    assert b"integrations.ndif.fork_server" in Path(f"/proc/{parent}/cmdline").read_bytes()
    assert n_jobs == n_jobs_later == 1
    assert not set(drawn) & set(drawn_later)
    info = state()
    assert info is not None
    assert parent in marked(info["run"])


def test_a_process_that_dies_fails_its_own_job_and_no_other(service: str, load: Load) -> None:
    model = load("tiny-clip")
    with pytest.raises(RemoteError):
        with model.trace(**CLIP, remote=service):
            __import__("os").kill(__import__("os").getpid(), 9)
    (_, fork_server, n_jobs), _ = job(load, service)
    assert n_jobs == 1
    handle = os.pidfd_open(fork_server)
    os.kill(fork_server, signal.SIGKILL)
    assert select.select([handle], [], [], 60)[0]  # Its memory goes first, its children then.
    os.close(handle)
    again = [job(load, service)[0] for _ in range(2)]  # The one that was ready for the first is gone too.
    assert all(parent != fork_server and n_jobs == 1 for _, parent, n_jobs in again)
