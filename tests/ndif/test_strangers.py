"""The service lets nobody in, lives by settings of its own, and says at once which part cannot start."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from integrations.ndif.commands import state
from integrations.ndif.environment import home
from integrations.ndif.loopback import on_loopback
from integrations.ndif.processes import marked
from integrations.ndif.service import free_ports, inherited

ROOT = Path(__file__).parents[2]
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the service runs on Linux only")
# A user's own Ray, and a proxy that answers nobody.
FOREIGN = {
    "RAY_ADDRESS": "192.0.2.77:6379",
    "RAY_AUTH_MODE": "disabled",
    "RAY_AUTH_TOKEN": "another",
    "RAY_AUTH_TOKEN_PATH": "/nowhere/token",
    "RAY_TMPDIR": "/nowhere/ray",
    "http_proxy": "http://127.0.0.1:9",
    "HTTPS_PROXY": "http://127.0.0.1:9",
    "NDIF_API_KEY": "another",
}


def listening(pids: set[int]) -> set[str]:
    """Where processes listen, "address:port"."""
    said = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True, check=True).stdout
    found = set()
    for line in said.splitlines():
        if {int(pid) for pid in re.findall(r"pid=(\d+)", line)} & pids:
            address, _, port = line.split()[3].rpartition(":")
            found.add(f"{address.strip('[]').removeprefix('::ffff:')}:{port}")
    return found


# -- without a service ---------------------------------------------------------------------------


def test_a_socket_for_all_interfaces_is_on_the_loopback() -> None:
    import socket

    assert on_loopback(("0.0.0.0", 80), socket.AF_INET) == ("127.0.0.1", 80)
    assert on_loopback(("", 0), socket.AF_INET) == ("127.0.0.1", 0)
    assert on_loopback(("::", 80, 0, 0), socket.AF_INET6) == ("::1", 80, 0, 0)
    assert on_loopback(("192.0.2.2", 80), socket.AF_INET) == ("192.0.2.2", 80)
    assert on_loopback("/tmp/socket", socket.AF_UNIX) == "/tmp/socket"


def test_nothing_of_another_ray_or_a_proxy_is_inherited() -> None:
    kept = {"HOME": "/home/me", "HF_HOME": "/models", "PATH": "/bin"}
    assert inherited(FOREIGN | kept | {"PYTHONPATH": "/src", "no_proxy": "*"}) == kept


SCRIPTS = {
    "moto_server": "sleep 60",
    "ray": "sleep 60",
    "redis-server": "sleep 60",
    "python": "sleep 60",
}


@LINUX
@pytest.mark.parametrize(
    ("part", "script", "says"),
    [("redis-server", "echo no memory; exit 3", r"redis ended with 3; .*\n.*no memory"),
     ("moto_server", "echo Address already in use; sleep 60", "s3 cannot start: Address already in use"),
     ("ray", "echo Authentication token is missing or incorrect; sleep 60", "ray cannot start: Auth"),
     ("ray", "echo the last words; exit 1", r"ray ended with 1; .*\n.*the last words")],
)  # fmt: skip
def test_a_part_that_cannot_start_is_said_in_seconds(
    part: str, script: str, says: str, tmp_path: Path
) -> None:
    programs = tmp_path / "env" / "bin"
    programs.mkdir(parents=True)
    for name, does in (SCRIPTS | {part: script}).items():
        (programs / name).write_text(f"#!/bin/sh\n{does}\n")
        (programs / name).chmod(0o755)
    env = os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    port = free_ports("one")["one"]
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "integrations.ndif.service", str(tmp_path), str(port)],
        env=env, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert time.monotonic() - start < 20
    assert done.returncode == 1
    assert re.search(says, done.stderr), done.stderr
    assert re.search(says, (tmp_path / "failed.txt").read_text())


# -- with one ------------------------------------------------------------------------------------


@pytest.mark.ndif
def test_a_stranger_is_refused_at_every_socket(service: str) -> None:
    info = state()
    assert info is not None
    sockets = listening(marked(info["run"]))
    assert f"127.0.0.1:{service.rpartition(':')[2]}" in sockets
    own = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=True).stdout.split()[0]
    open_to_others = {s.replace("*", own) for s in sockets if not s.startswith("127.0.0.1:")}
    assert not any(s.startswith(("0.0.0.0:", "::")) for s in open_to_others)
    python = str(home() / "env" / "bin" / "python")
    done = subprocess.run(
        [python, str(ROOT / "tests/ndif/stranger.py"), *sorted(open_to_others)],
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    answers: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        answers |= json.loads(line)
    assert answers.keys() == open_to_others
    for address, said in answers.items():
        codes = {said} if isinstance(said, str) else set(said.values())
        assert codes in ({"HTTP 401"}, {"UNAUTHENTICATED"}), (address, said)
    # Ray's own: its store of names, two of its nodes' servers, its workers, its clients' server.
    methods = {method for said in answers.values() if isinstance(said, dict) for method in said}
    assert {m.split("/")[1].rpartition(".")[2] for m in methods} >= {
        "NodeInfoGcsService", "NodeManagerService", "ObjectManagerService", "CoreWorkerService",
        "RayletDriver",
    }  # fmt: skip


@pytest.mark.ndif
def test_a_strangers_task_is_not_run(service: str, tmp_path: Path) -> None:
    info = state()
    assert info is not None
    own = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=True).stdout.split()[0]
    open_to_others = {s for s in listening(marked(info["run"])) if s.startswith(f"{own}:")}
    program = (
        "import ray, sys\n"
        "ray.init(f'ray://{sys.argv[1]}')\n"
        "print(ray.get(ray.remote(lambda: 'RAN').remote()))\n"
    )
    python = str(home() / "env" / "bin" / "python")
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "RAY_CLIENT_RECONNECT_GRACE_PERIOD": "0"}
    assert open_to_others
    for address in open_to_others:
        done = subprocess.run(
            [python, "-c", program, address],
            env=env,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode != 0
        assert "RAN" not in done.stdout


@pytest.mark.ndif
def test_a_service_starts_beside_another_ray_whatever_the_users_settings_are(
    service: str, tmp_path: Path
) -> None:
    mine = tmp_path / "home" / ".ray"
    mine.mkdir(parents=True)
    (mine / "auth_token").write_text("a token of the user's own Ray")
    second = tmp_path / "ndif"
    second.mkdir()
    (second / "env").symlink_to(home() / "env", target_is_directory=True)
    env = os.environ | FOREIGN | {"HOME": str(mine.parent), "MM_INTERP_NDIF_HOME": str(second)}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-c", "from integrations.ndif.commands import ndif; ndif()"]
    port = str(free_ports("one")["one"])
    up = [*call, "up", "--port", port, "--gpus", "0", "--sandbox", "0"]
    try:
        done = subprocess.run(up, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert f"READY http://127.0.0.1:{port}" in done.stdout
        status = subprocess.run([*call, "status"], env=env, capture_output=True, text=True, check=False)
        assert status.returncode == 0, status.stdout + status.stderr
    finally:
        subprocess.run([*call, "down"], env=env, capture_output=True, check=False)
    assert [path.name for path in mine.iterdir()] == ["auth_token"]
    assert (mine / "auth_token").read_text() == "a token of the user's own Ray"
