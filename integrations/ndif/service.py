"""Runs the parts of an NDIF as one: they start in order and end together, whatever ends first.

python -m integrations.ndif.service HOME PORT [--gpus N] [--sandbox N] [--dtype NAME]

`HOME/service.json` says where the service is while it is there. Linux only: leftovers are found by a mark
in /proc.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Collection, Iterator
from pathlib import Path
from types import FrameType

MARK = "MM_INTERP_NDIF_RUN"
READY_WITHIN_S = 600
RAY_TRIES = 3  # On a busy machine its parts give up on each other after 30 s.
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


class Ended(Exception):
    """Somebody asked the service to end."""


class Service:
    """The parts of one NDIF, each a process with a log of its own."""

    def __init__(self, home: Path, port: int, gpus: int, sandbox: int, dtype: str) -> None:
        self.home = home
        self.logs = home / "logs"
        self.bin = home / "env" / "bin"
        self.address = f"http://127.0.0.1:{port}"
        self.gpus = gpus
        self.parts: dict[str, subprocess.Popen[bytes]] = {}
        self.ports = free_ports(5) | {"api": port}
        self.temp = Path(tempfile.mkdtemp(prefix="ndif-"))  # Ray's sockets need a short path.
        ports = self.ports
        self.env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CUDA_VISIBLE_DEVICES")}
        if gpus and "CUDA_VISIBLE_DEVICES" in os.environ:
            self.env["CUDA_VISIBLE_DEVICES"] = os.environ["CUDA_VISIBLE_DEVICES"]
        self.env |= {
            MARK: str(os.getpid()),
            "PATH": f"{self.bin}{os.pathsep}{os.environ.get('PATH', '')}",
            "NDIF_REDIS_URL": f"redis://127.0.0.1:{ports['redis']}",
            "NDIF_OBJECT_STORE_URL": f"http://127.0.0.1:{ports['s3']}",
            "NDIF_API_PORT": str(port),
            "NDIF_RAY_ADDRESS": f"ray://127.0.0.1:{ports['client']}",
            "NDIF_DEFAULT_DTYPE": dtype,
            "NDIF_DEFAULT_PADDING_BIAS": "0",
            "NDIF_CONTROLLER_IMPORT_PATH": "integrations.ndif.actors.ControllerActor",
            "NDIF_MODEL_IMPORT_PATH": "integrations.ndif.actors.ModelActor",
            "NDIF_SANDBOX_POOL_SIZE": str(sandbox),
            "GRPC_ENABLE_FORK_SUPPORT": "0",  # NDIF's own start.sh says why.
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",  # Ray's own is 15: beside anything else a service would stand still.
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        }

    def start(self) -> None:
        """Starts the parts, each when those it needs are there.

        Raises: RuntimeError naming the part that failed and its log.
        """
        from integrations.ndif.environment import redis_server

        ports = {name: str(port) for name, port in self.ports.items()}
        shutil.rmtree(self.logs, ignore_errors=True)
        self.logs.mkdir(parents=True)
        redis = [redis_server(self.home / "env"), "--port", ports["redis"], "--bind", "127.0.0.1"]
        self._part("redis", *redis, "--save", "", "--appendonly", "no", "--dir", str(self.temp))
        self._part("s3", self._tool("moto_server"), "-H", "127.0.0.1", "-p", ports["s3"])
        for attempt in range(RAY_TRIES):
            try:
                self._start_ray()
                break
            except RuntimeError:
                if attempt == RAY_TRIES - 1 or self.parts["ray"].poll() is None:
                    raise
                end_marked(str(os.getpid()), patience_s=0.0, but={self.parts[n].pid for n in ("redis", "s3")})
                self.ports |= free_ports(3, ("gcs", "client", "dashboard"))
                self.env["NDIF_RAY_ADDRESS"] = f"ray://127.0.0.1:{self.ports['client']}"
        ports = {name: str(port) for name, port in self.ports.items()}
        controller = [self._tool("python"), "-m", "ndif.services.ray.deployments.controller.controller"]
        self._part("controller", *controller, RAY_ADDRESS=f"127.0.0.1:{ports['gcs']}")
        self._until(lambda: self.parts["controller"].poll() == 0, "controller")
        del self.parts["controller"]  # It leaves a Ray actor and ends.
        api = ["--config", "python:ndif.services.api.gunicorn_conf", "--bind", f"127.0.0.1:{ports['api']}"]
        self._part("api", self._tool("gunicorn"), *api, "ndif.services.api.app:app")
        self._until(lambda: answers(f"{self.address}/connected"), "api")

    def _start_ray(self) -> None:
        ports = self.ports
        self._part(
            "ray", self._tool("ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1",
            f"--port={ports['gcs']}", f"--ray-client-server-port={ports['client']}", "--num-cpus=2",
            f"--num-gpus={self.gpus or 1}", f"--resources={self._resources()}",
            "--object-store-memory=150000000", "--min-worker-port=25000", "--max-worker-port=25300",
            "--include-dashboard=true", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={ports['dashboard']}", f"--temp-dir={self.temp}",
        )  # fmt: skip
        for name in ("redis", "s3", "gcs", "client"):
            self._until(lambda port=ports[name]: is_open(port), name)

    def watch(self) -> None:
        """Returns never while every part is there. Raises: RuntimeError when one has ended."""
        while True:
            self._check()
            time.sleep(0.5)

    def stop(self) -> None:
        """Ends every process of this service."""
        for part in self.parts.values():
            with contextlib.suppress(ProcessLookupError):
                part.terminate()
        end_marked(str(os.getpid()), patience_s=5.0)
        shutil.rmtree(self.temp, ignore_errors=True)

    def _tool(self, name: str) -> str:
        return str(self.bin / name)

    def _resources(self) -> str:
        if self.gpus:
            command = [self._tool("python"), "-m", "ndif.services.ray.resources", "--head"]
            return subprocess.run(command, env=self.env, check=True, capture_output=True, text=True).stdout
        # A node without a GPU is passed over, so memory is called what the controller looks for.
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
        return json.dumps({"head": 10, "cuda_memory_bytes": memory, "cpu_memory_bytes": memory})

    def _part(self, name: str, *command: str, **env: str) -> None:
        with (self.logs / f"{name}.log").open("wb") as log:
            self.parts[name] = subprocess.Popen(
                command, env=self.env | env, stdout=log, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, preexec_fn=die_with_parent, cwd=self.temp,
            )  # fmt: skip

    def _until(self, done: object, what: str) -> None:
        assert callable(done)
        start = time.monotonic()
        while not done():
            self._check()
            if time.monotonic() - start > READY_WITHIN_S:
                raise RuntimeError(f"{what} was not ready after {READY_WITHIN_S} s; see {self.logs}.")
            time.sleep(0.2)

    def _check(self) -> None:
        for name, part in self.parts.items():
            if part.poll() and not (name == "controller" and part.returncode == 0):
                log = self.logs / f"{name}.log"
                tail = "\n".join(log.read_text(errors="replace").strip().splitlines()[-15:])
                raise RuntimeError(f"{name} ended with {part.returncode}; the end of {log}:\n{tail}")


def free_ports(
    n: int, names: tuple[str, ...] = ("redis", "s3", "gcs", "client", "dashboard")
) -> dict[str, int]:
    """Ports that nobody listens on, by what they are for."""
    names = names[:n]
    sockets = [socket.socket() for _ in names]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    found = {name: one.getsockname()[1] for name, one in zip(names, sockets, strict=True)}
    for one in sockets:
        one.close()
    return found


def is_open(port: int) -> bool:
    """Whether somebody listens on a port of this machine."""
    with socket.socket() as one:
        one.settimeout(1)
        return one.connect_ex(("127.0.0.1", port)) == 0


def answers(url: str) -> bool:
    """Whether a GET of the URL succeeds."""
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return reply.status == 200
    except (OSError, urllib.error.URLError):
        return False


def die_with_parent() -> None:
    """Run in a new child: it is killed when this process ends, however that happens."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def marked(run: str) -> Iterator[int]:
    """The processes of a run but this one: those that carry its mark, and what those started."""
    parents: dict[int, int] = {}
    found: set[int] = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
            status = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if status[0] == "Z":
            continue
        parents[int(entry.name)] = int(status[1])
        if f"{MARK}={run}".encode() in environment:
            found.add(int(entry.name))
    # A sandbox's runners are started with an environment of their own.
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    yield from found


def end_marked(run: str, patience_s: float, but: Collection[int] = ()) -> None:
    """Ends every process of a run, but those; ones that do not end when asked are killed."""
    start = time.monotonic()
    while pids := [pid for pid in marked(run) if pid not in but]:
        polite = time.monotonic() - start < patience_s
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGTERM if polite else signal.SIGKILL)
        time.sleep(0.2)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def reap_after(reader: int, run: str, temp: str, state: Path) -> None:
    """The life of the second process: ends what is left when the first has ended, even by SIGKILL."""
    while os.read(reader, 1):
        pass
    end_marked(run, patience_s=0.0)
    shutil.rmtree(temp, ignore_errors=True)
    state.unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("home", type=Path)
    parser.add_argument("port", type=int)
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument(
        "--sandbox", type=int, default=1, help="runners kept warm for jobs that are not trusted"
    )
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args(argv)

    def end(signum: int, frame: FrameType | None) -> None:
        raise Ended

    state = given.home / "service.json"
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    service = Service(given.home, given.port, given.gpus, given.sandbox, given.dtype)
    reader, writer = os.pipe()
    run = str(os.getpid())
    if os.fork() == 0:
        os.close(writer)
        os.setsid()
        reap_after(reader, run, str(service.temp), state)
        os._exit(0)
    os.close(reader)
    os.set_inheritable(writer, False)
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, end)
    told = {"pid": os.getpid(), "address": service.address, "logs": str(service.logs)}
    try:
        state.write_text(json.dumps(told | {"ready": False}), encoding="utf-8")
        service.start()
        state.write_text(json.dumps(told | {"ready": True}), encoding="utf-8")
        sys.stdout.write(f"READY {service.address}\n")
        sys.stdout.flush()
        service.watch()
    except Ended:
        return 0
    except RuntimeError as error:
        (given.home / "failed.txt").write_text(str(error), encoding="utf-8")
        sys.stderr.write(f"{error}\n")
        return 1
    finally:
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(signum, signal.SIG_IGN)
        service.stop()
        state.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    assert threading.active_count() == 1  # It forks.
    raise SystemExit(main())
