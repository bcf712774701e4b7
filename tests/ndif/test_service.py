"""The real service: starts, serves many at once, and ends without a trace; also when it is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from zoo_inputs import INPUTS

import mm_adapters as mm
from integrations.ndif import environment
from integrations.ndif.commands import state
from integrations.ndif.service import MARK, end_marked, marked
from mm_adapters import remote

ROOT = Path(__file__).parents[2]
SITE = "vision.blocks.1.attn.hook_z"


def ndif(*words: str) -> subprocess.CompletedProcess[str]:
    call = "from integrations.ndif.commands import ndif; ndif()"
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", call, *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


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
    assert ndif("status").returncode == 1
    assert "No service is running" in ndif("down").stdout
    # What a killed machine left behind is no service.
    (tmp_path / "service.json").write_text(json.dumps({"pid": os.getpid(), "address": "x", "ready": True}))
    assert state() is None


@pytest.mark.xfail(reason="an ended child that nobody has waited for is still listed", strict=False)
def test_every_process_with_a_runs_mark_is_found_and_ended() -> None:
    run = f"test-{os.getpid()}"
    child = "import subprocess, sys, time; subprocess.Popen(['sleep', '600'], env={}); time.sleep(600)"
    first = subprocess.Popen([sys.executable, "-c", child], env=os.environ | {MARK: run})
    while len(found := set(marked(run))) < 2:  # Its child has no mark.
        time.sleep(0.05)
    assert first.pid in found
    end_marked(run, patience_s=0.0)
    first.wait()
    assert not set(marked(run))
    assert not any(Path(f"/proc/{pid}").exists() for pid in found)


# -- with one ------------------------------------------------------------------------------------


@pytest.mark.ndif
def test_fifty_jobs_of_five_clients_are_answered_and_none_mixed_up(service: str) -> None:
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests/ndif/client.py"), service]
    started = [[*command, str(c), "10"] for c in range(5)]
    clients = [subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True) for words in started]
    told = [json.loads(c.communicate(timeout=600)[0].strip().splitlines()[-1]) for c in clients]
    assert [t["answered"] for t in told] == [10] * 5
    assert not [wrong for t in told for wrong in t["wrong"]]
    assert len({name for t in told for name in t["ids"]}) == 50


@pytest.mark.ndif
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["asked", "killed"])
def test_a_service_that_ends_leaves_nothing_and_loses_no_job_silently(
    service: str, how: signal.Signals
) -> None:
    found = state()
    assert found is not None
    address, run = found["address"], str(found["pid"])
    model = mm.load("tiny-clip", engine="nnsight")
    here = model.run(INPUTS["tiny-clip"], read=[SITE])[SITE]

    def send(scale: float) -> Any:
        slow = [mm.Edit(SITE, lambda z: __import__("time").sleep(0.2) or z * scale)]
        return model.run(INPUTS["tiny-clip"], read=[SITE], edit=slow, remote=address, blocking=False)

    send(1.0).result(300.0)  # The model is there.
    jobs = {float(s): send(float(s)) for s in range(2, 8)}
    processes = set(marked(run))
    assert len(processes) > 10
    os.kill(int(run), how)
    deadline = time.monotonic() + 60
    while (left := set(marked(run))) or state() is not None:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
    assert not any(Path(f"/proc/{pid}").exists() for pid in processes)
    with pytest.raises(remote.ServiceDownError):
        jobs[2.0]._job.poll()
    port = address.rpartition(":")[2]
    assert f"READY {address}" in ndif("up", "--port", port, "--gpus", "0").stdout
    outcomes = []
    for scale, job in jobs.items():
        job._job.grace_s = 5.0
        try:
            got = job.result(300.0, resend=False)[SITE]
            outcomes.append("result")
        except remote.JobLostError:
            got = job.result(300.0)[SITE]
            outcomes.append("lost, said so, and sent again")
        torch.testing.assert_close(got, here * scale, rtol=1e-4, atol=1e-5)
    assert len(outcomes) == len(jobs)
    assert f"READY {address}" in ndif("status").stdout
