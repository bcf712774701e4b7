"""Runs the parts of an NDIF as one: they start in order and end together, whatever ends first.

python -m integrations.ndif.service HOME PORT [--gpus N] [--sandbox N] [--dtype NAME]

`HOME/service.json` says where the service is while it is there. Linux only, as processes.py.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from integrations.ndif.processes import Ended, die_with_parent, end, guarded, mark, new_run

READY_WITHIN_S = 600
RAY_TRIES = 3  # On a busy machine its parts give up on each other after 30 s.
# Ray 2.60's raylet (node_manager.cc, WaitForDashboardAgentPorts) ends when its agents have not written down
# their ports after 15 s. They are given them, and here they are written down before: option, file.
AGENT_PORTS = {
    "dashboard-agent-grpc-port": "metrics_agent_port",
    "dashboard-agent-listen-port": "dashboard_agent_listen_port",
    "metrics-export-port": "metrics_export_port",
    "runtime-env-agent-port": "runtime_env_agent_port",
}
RAY_PORTS = ("gcs", "client", "dashboard", *AGENT_PORTS)
# A client's, or a shell's, that are not for the service's Python. Without its own bytecode each of its
# processes, a sandbox's runners too, would compile torch and all the rest again: most of what they cost.
# Proxies would stand between its parts, which are on one machine.
NOT_INHERITED = (
    "PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE", "CUDA_VISIBLE_DEVICES",
    "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "GRPC_PROXY",
)  # fmt: skip
# Another Ray's or another NDIF's settings.
OF_OTHERS = ("RAY_", "NDIF_", "REDIS_")
# A part that says one of these does not come up, though it may not end.
HOPELESS = (
    "Authentication token is missing or incorrect",
    "Address already in use",
    "No space left on device",
)


class Service:
    """The parts of one NDIF, each a process with a log of its own.

    Args:
        home: The folder of the environment and the logs.
        port: Where the service listens.
        gpus: How many it serves from; 0 is the CPU.
        sandbox: How many runners are kept warm for jobs that are not trusted.
        dtype: What weights are held in.
        run: The mark of its processes.
        temp: The folder of its temporary files.
    """

    def __init__(
        self, home: Path, port: int, gpus: int, sandbox: int, dtype: str, run: str, temp: Path
    ) -> None:
        self.home, self.run, self.temp = home, run, temp
        self.logs = home / "logs"
        self.bin = home / "env" / "bin"
        self.address = f"http://127.0.0.1:{port}"
        self.gpus = gpus
        self.parts: dict[str, subprocess.Popen[bytes]] = {}
        self.ports = free_ports("redis", "s3", *RAY_PORTS) | {"api": port}
        ports = self.ports
        self.env = inherited(os.environ)
        if gpus and "CUDA_VISIBLE_DEVICES" in os.environ:
            self.env["CUDA_VISIBLE_DEVICES"] = os.environ["CUDA_VISIBLE_DEVICES"]
        self.env |= mark(run) | {
            "TMPDIR": str(temp),
            "PATH": f"{self.bin}{os.pathsep}{os.environ.get('PATH', '')}",
            "NDIF_REDIS_URL": f"redis://:{self._secret('redis')}@127.0.0.1:{ports['redis']}",
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
            # Ray listens where it likes, so whoever has no token is refused; its own is in the user's home.
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self._secret_file("ray")),
            # The timeouts that can be set (ray_timeouts.py: one that cannot); Ray's own are 30 to 60 s.
            "RAY_agent_register_timeout_ms": "300000",
            "RAY_worker_register_timeout_seconds": "300",
            "RAY_gcs_server_port_wait_time_s": "300",
            "RAY_gcs_server_request_timeout_seconds": "300",
            "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "300",
            "RAY_NUM_REDIS_GET_RETRIES": "300",  # Once a second.
            "RAY_worker_niceness": "0",  # Ray's own is 15: beside anything else a service would hardly run.
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
        settings = self.temp / "redis.conf"  # Others can see a command line, but not into this folder.
        settings.write_text(
            f"port {ports['redis']}\nbind 127.0.0.1\nrequirepass {self._secret('redis')}\n"
            f'save ""\nappendonly no\ndir {self.temp}\n'
        )
        self._part("redis", redis_server(self.home / "env"), str(settings))
        self._part("s3", self._tool("moto_server"), "-H", "127.0.0.1", "-p", ports["s3"])
        for attempt in range(RAY_TRIES):
            try:
                self._start_ray()
                break
            except RuntimeError:
                if attempt == RAY_TRIES - 1 or self.parts["ray"].poll() is None:
                    raise
                stay = {self.parts[name].pid for name in ("redis", "s3")}
                end(self.run, timeout_s=0.0, below=os.getpid(), but=stay)
                self.ports |= free_ports(*RAY_PORTS)
                for session in self.temp.glob("session_2*"):
                    shutil.rmtree(session, ignore_errors=True)
                self.env["NDIF_RAY_ADDRESS"] = f"ray://127.0.0.1:{self.ports['client']}"
        ports = {name: str(port) for name, port in self.ports.items()}
        controller = [self._tool("python"), "-m", "ndif.services.ray.deployments.controller.controller"]
        self._part("controller", *controller, RAY_ADDRESS=f"127.0.0.1:{ports['gcs']}")
        self._until(lambda: self.parts["controller"].poll() == 0, "controller")
        del self.parts["controller"]  # It leaves a Ray actor and ends.
        api = ["--config", "python:ndif.services.api.gunicorn_conf", "--bind", f"127.0.0.1:{ports['api']}"]
        api += ["--no-control-socket"]  # It would be in the user's home, one for all services.
        self._part("api", self._tool("gunicorn"), *api, "ndif.services.api.app:app")
        self._until(lambda: answers(f"{self.address}/connected"), "api")

    def _start_ray(self) -> None:
        ports = self.ports
        self._part(
            "ray",
            self._tool("ray"),
            "start",
            "--head",
            "--block",
            "--node-ip-address=127.0.0.1",
            f"--port={ports['gcs']}",
            f"--ray-client-server-port={ports['client']}",
            "--num-cpus=2",
            f"--num-gpus={self.gpus or 1}",
            f"--resources={self._resources()}",
            "--object-store-memory=150000000",
            "--min-worker-port=25000",
            "--max-worker-port=25300",
            "--include-dashboard=true",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={ports['dashboard']}",
            f"--temp-dir={self.temp}",
            *(f"--{name}={ports[name]}" for name in AGENT_PORTS),
        )
        self._until(self._write_ports, "gcs")
        for name in ("redis", "s3", "gcs", "client"):
            self._until(lambda port=ports[name]: is_open(port), name)
        log = self.logs / "ray.log"  # Ray's ports are open before all of its parts run.
        self._until(lambda: "Ray runtime started" in log.read_text(errors="replace"), "ray")

    def _write_ports(self) -> bool:
        """Writes the agents' ports to their files; False while the node's name is not known."""
        nodes = list(self.temp.glob("session_2*/gcs_server_port_*"))
        for node in nodes:
            for option, name in AGENT_PORTS.items():
                new = node.with_name("port.new")
                new.write_text(str(self.ports[option]))
                new.rename(node.with_name(name + node.name.removeprefix("gcs_server_port")))
        return bool(nodes)

    def watch(self) -> None:
        """Does not return. Raises: RuntimeError when a part has ended."""
        while True:
            self._check()
            time.sleep(0.5)

    def stop(self) -> None:
        """Ends every process of this service."""
        end(self.run, timeout_s=5.0, below=os.getpid())

    def _secret_file(self, of: str) -> Path:
        """A file with a secret of this run, that no other user can read."""
        path = self.temp / f"{of}.secret"
        if not path.exists():
            path.touch(mode=0o600)
            path.write_text(secrets.token_hex(32))
        return path

    def _secret(self, of: str) -> str:
        return self._secret_file(of).read_text()

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
                command,
                env=self.env | env,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                preexec_fn=die_with_parent,
                cwd=self.temp,
            )

    def _until(self, done: object, what: str) -> None:
        assert callable(done)
        start = time.monotonic()
        while not done():
            self._check(starting=True)
            if time.monotonic() - start > READY_WITHIN_S:
                raise RuntimeError(f"{what} was not ready after {READY_WITHIN_S} s; see {self.logs}.")
            time.sleep(0.2)

    def _check(self, *, starting: bool = False) -> None:
        for name, part in self.parts.items():
            log = self.logs / f"{name}.log"
            said = (
                log.read_text(errors="replace").strip().splitlines()[-200:] if starting or part.poll() else []
            )
            if part.poll() and not (name == "controller" and part.returncode == 0):
                tail = "\n".join(said[-15:])
                raise RuntimeError(f"{name} ended with {part.returncode}; the end of {log}:\n{tail}")
            hopeless = next((line for line in said if any(sign in line for sign in HOPELESS)), None)
            if hopeless is not None:
                raise RuntimeError(f"{name} cannot start: {hopeless.strip()} ({log})")


def inherited(environment: Mapping[str, str]) -> dict[str, str]:
    """What of a user's environment is for the service: nothing of another Ray, of proxies, of a Python."""
    return {
        name: value
        for name, value in environment.items()
        if name.upper() not in NOT_INHERITED and not name.upper().startswith(OF_OTHERS)
    }


def free_ports(*names: str) -> dict[str, int]:
    """Free ports, by what they are for."""
    sockets = [socket.socket() for _ in names]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = {name: one.getsockname()[1] for name, one in zip(names, sockets, strict=True)}
    for one in sockets:
        one.close()
    return ports


def is_open(port: int) -> bool:
    """Whether a process listens on a port of this machine."""
    with socket.socket() as one:
        one.settimeout(1)
        return one.connect_ex(("127.0.0.1", port)) == 0


def answers(url: str) -> bool:
    """Whether a GET of the URL succeeds. No proxy is asked: the service is on this machine."""
    directly = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with directly.open(url, timeout=5) as reply:
            return reply.status == 200
    except (OSError, urllib.error.URLError):
        return False


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("home", type=Path)
    parser.add_argument("port", type=int)
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument(
        "--sandbox", type=int, default=1, help="runners kept warm for jobs that are not trusted"
    )
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args(argv)

    home, run = options.home, new_run()
    temp = Path(tempfile.mkdtemp(prefix="ndif-"))  # Ray's sockets need a short path.
    state = home / "service.json"

    def serve() -> int:
        service = Service(home, options.port, options.gpus, options.sandbox, options.dtype, run, temp)
        info = {"pid": os.getppid(), "service": os.getpid(), "run": run, "temp": str(temp)}
        info |= {"address": service.address, "logs": str(service.logs)}
        try:
            _write(state, info | {"ready": False})
            service.start()
            _write(state, info | {"ready": True})
            sys.stdout.write(f"READY {service.address}\n")
            sys.stdout.flush()
            service.watch()
        except Ended:
            return 0
        except RuntimeError as error:
            (home / "failed.txt").write_text(str(error), encoding="utf-8")
            sys.stderr.write(f"{error}\n")
            return 1
        finally:
            service.stop()
            if os.getppid() != info["pid"]:
                tidy()  # The guard, which would do it, is gone.
        return 0

    def tidy() -> None:
        shutil.rmtree(temp, ignore_errors=True)
        state.unlink(missing_ok=True)

    return guarded(run, serve, after=tidy)


def _write(path: Path, info: Mapping[str, object]) -> None:
    new = path.with_suffix(".new")
    new.write_text(json.dumps(info), encoding="utf-8")
    new.replace(path)


if __name__ == "__main__":
    assert threading.active_count() == 1  # It forks.
    raise SystemExit(main())
