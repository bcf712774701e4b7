"""Runners for jobs that are not trusted, each forked from one process that has imported what they need.

NDIF 0.1.2 (ray/sandbox/host.py, Pool) gives each job a Python of its own, which first imports torch and
nnsight and builds the model without weights: ten seconds of a processor. Here that is done once for each
model, by a process that runs no block; a job still gets a process of its own, in which no job ran before.

Used only without a GPU: a process that has initialised CUDA cannot be forked.

python -m integrations.ndif.fork_server MODEL_KEY TRUST_REMOTE_CODE: reads "SOCKET PEERS" and answers "PID".
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import gc
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import uuid

from integrations.ndif.processes import MARK, die_with_parent

WARM_WITHIN_S = 300.0
# A runner inherits these too, by which the service finds its processes and their files.
_INHERITED = (MARK, "SPT_NOENV", "TMPDIR")


class Runner:
    """A forked process, with what NDIF asks of a subprocess.Popen."""

    def __init__(self, pid: int, parent: subprocess.Popen[bytes]) -> None:
        self.pid, self.parent = pid, parent
        try:
            self.handle: int | None = os.pidfd_open(pid)
        except ProcessLookupError:
            self.handle = None  # It has ended already.

    @property
    def orphaned(self) -> bool:
        """Whether its parent has ended, so that it has ended too, or is about to."""
        return self.parent.poll() is not None

    def poll(self) -> int | None:
        """None while it runs."""
        if self.handle is not None and select.select([self.handle], [], [], 0.0)[0]:
            os.close(self.handle)
            self.handle = None
        return 0 if self.handle is None else None

    def wait(self, timeout: float | None = None) -> int:
        """Returns when it has ended. Raises: subprocess.TimeoutExpired."""
        if self.handle is not None and not select.select([self.handle], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired("runner", timeout or 0.0)
        self.poll()
        return 0

    def terminate(self) -> None:
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        self._send(signal.SIGKILL)

    def _send(self, signum: signal.Signals) -> None:
        if self.poll() is None:
            assert self.handle is not None
            signal.pidfd_send_signal(self.handle, signum)


class ForkServer:
    """The process that runners of one model are forked from, started again if it should end."""

    def __init__(self, model_key: str, trust_remote_code: bool, env: dict[str, str]) -> None:
        self.command = [sys.executable, "-m", "integrations.ndif.fork_server", model_key]
        self.command.append(str(int(trust_remote_code)))
        inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        # As NDIF's: a block's sets are in the order that its host's are in.
        self.env = env | inherited | {"PYTHONHASHSEED": "0"}
        self.lock = threading.Lock()
        self.process = self._start()

    def fork(self, peers: int) -> tuple[str, Runner]:
        """A new runner and the socket it listens on.

        Raises: RuntimeError if the process could not be made, or its imports take too long.
        """
        path = os.path.join(tempfile.gettempdir(), f"sbx-{uuid.uuid4().hex[:12]}.sock")
        with self.lock:
            pid = self._ask(f"{path} {peers}\n")
            if not pid:
                self.close()  # A late answer would be taken for the next one's.
                self.process = self._start()
                pid = self._ask(f"{path} {peers}\n")
        if not pid:
            raise RuntimeError(f"no runner within {WARM_WITHIN_S} s: {' '.join(self.command)}")
        return path, Runner(int(pid), self.process)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()

    def _ask(self, line: str) -> bytes:
        """The server's answer to a line; empty if it has ended or takes too long."""
        requests, answers = self.process.stdin, self.process.stdout
        assert requests is not None
        assert answers is not None
        try:
            requests.write(line.encode())
        except BrokenPipeError:
            return b""
        return answers.readline() if select.select([answers], [], [], WARM_WITHIN_S)[0] else b""

    def _start(self) -> subprocess.Popen[bytes]:
        pipe = subprocess.PIPE
        return subprocess.Popen(self.command, env=self.env, bufsize=0, stdin=pipe, stdout=pipe)


def main(model_key: str, trust_remote_code: str) -> None:
    """Forks a runner for each line of stdin, until it is closed: then the model's actor has ended."""
    answers = os.dup(1)
    os.dup2(2, 1)  # An import may print, and that is no answer.
    import numpy as np
    import torch
    from ndif.services.ray.sandbox import nns, runner

    try:
        nns.load_meta_model(model_key, trust_remote_code=trust_remote_code == "1")
    except Exception as error:  # noqa: BLE001  As NDIF's: what a block names of the model is then None.
        sys.stderr.write(f"fork server: no model without weights for {model_key!r}: {error!r}\n")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # The kernel reaps the runners.
    gc.collect()
    gc.freeze()  # A collection in a runner leaves these pages shared.
    while line := sys.stdin.buffer.readline():
        path, peers = line.decode().split()
        listening = runner.Runner(path, peers=int(peers))
        here = os.getpid()
        pid = os.fork()
        if pid:
            listening.socket.close()
            os.write(answers, f"{pid}\n".encode())
            continue
        die_with_parent()
        if os.getppid() != here:
            os._exit(1)
        os.close(answers)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        # Two jobs that draw are to draw differently.
        torch.seed()
        np.random.seed()
        listening.serve()


if __name__ == "__main__":
    main(*sys.argv[1:])
