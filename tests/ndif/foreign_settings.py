"""The tests of the real service, for a user who has another Ray: it runs, with a token and settings.

    MM_INTERP_NDIF_HOME=/where/it/is python -m tests.ndif.foreign_settings [pytest's arguments]

HOME is a folder with a token file of another Ray; RAY_ADDRESS, RAY_AUTH_MODE, RAY_AUTH_TOKEN,
RAY_AUTH_TOKEN_PATH, RAY_TMPDIR and others name that Ray, or nothing; the proxies lead nowhere. The other Ray
runs meanwhile, of the service's own installation. Prints which of the user's files changed; the exit status
is 1 for that too.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from integrations.ndif.environment import ensure
from integrations.ndif.processes import end, new_run
from integrations.ndif.service import free_ports

ROOT = Path(__file__).parents[2]
TOKEN = hashlib.sha256(b"a token of the user's own Ray").hexdigest()
NOWHERE = "http://127.0.0.1:9"  # Where nothing listens.
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")


def say(line: str) -> None:
    """A line for whoever waits, before those of the tests."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def users_home(folder: Path) -> Path:
    """A home in which Ray was used with a token."""
    (folder / ".ray").mkdir(parents=True)
    token = folder / ".ray" / "auth_token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    return folder


def of_another_ray(address: str, folder: Path) -> dict[str, str]:
    """A user's settings: each is of the other Ray, or of nothing that there is."""
    other_token = folder / "other_token"
    other_token.write_text("another token")
    settings = {
        "RAY_ADDRESS": address,
        "RAY_AUTH_MODE": "disabled",
        "RAY_AUTH_TOKEN": "the token in the environment",
        "RAY_AUTH_TOKEN_PATH": str(other_token),
        "RAY_TMPDIR": str(folder / "ray_tmp"),
        "RAY_NAMESPACE": "of-the-user",
        "RAY_REDIS_ADDRESS": "127.0.0.1:9",
        "RAY_NODE_IP_ADDRESS": "192.0.2.1",
        "REDIS_PASSWORD": "of-the-user",
        "NDIF_RAY_ADDRESS": "ray://127.0.0.1:9",
    }
    return settings | {form: NOWHERE for name in PROXIES for form in (name, name.upper())}


@contextmanager
def other_ray(installed: Path, home: Path, folder: Path) -> Iterator[str]:
    """A Ray as a user starts it, with the token in the home folder; its address."""
    ports = free_ports("gcs", "client", "dashboard")
    command = [str(installed / "bin" / "ray"), "start", "--head", "--block", "--num-cpus=1"]
    command += [f"--port={ports['gcs']}", f"--ray-client-server-port={ports['client']}"]
    command += [f"--dashboard-port={ports['dashboard']}", f"--temp-dir={folder / 'other_ray'}"]
    kept = {k: v for k, v in os.environ.items() if not k.upper().startswith(("RAY_", "PYTHON", "VIRTUAL"))}
    env = kept | {"HOME": str(home), "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
    log = folder / "other_ray.log"
    with log.open("wb") as out:
        # Not the mark of our own runs, which changes what Ray does: its processes are found by their parents.
        process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT)
    try:
        address, start = f"127.0.0.1:{ports['gcs']}", time.monotonic()
        while "Ray runtime started" not in log.read_text(errors="replace"):
            if process.poll() is not None or time.monotonic() - start > 180:
                raise RuntimeError(f"the other Ray did not start:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.5)
        say(f"another Ray runs at {address}")
        yield address
        if process.poll() is not None:
            raise RuntimeError(f"the other Ray ended meanwhile:\n{log.read_text(errors='replace')[-2000:]}")
    finally:
        end(new_run(), 10.0, below=process.pid)
        process.terminate()
        process.wait()


def contents(home: Path) -> Mapping[str, str]:
    """The user's files of Ray."""
    return {str(p.relative_to(home)): p.read_text() for p in (home / ".ray").rglob("*") if p.is_file()}


def main(argv: Sequence[str]) -> int:
    installed = Path(ensure())
    with tempfile.TemporaryDirectory(prefix="foreign-") as top:
        folder = Path(top)
        home, ndif = users_home(folder / "home"), folder / "ndif"
        ndif.mkdir()
        (ndif / "env").symlink_to(installed, target_is_directory=True)
        before = contents(home)
        with other_ray(installed, home, folder) as address:
            env = os.environ | of_another_ray(address, folder) | {"HOME": str(home)}
            env |= {"MM_INTERP_NDIF_HOME": str(ndif), "PYTHONPATH": str(ROOT)}
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "ndif"]
            done = subprocess.run([*command, *(argv or ["tests/ndif"])], env=env, cwd=ROOT, check=False)
        changed = contents(home) != before
        tmp = (folder / "ray_tmp").exists()
        say(f"the user's files of Ray {'CHANGED' if changed else 'are as they were'}")
        say(f"the user's RAY_TMPDIR {'WAS USED' if tmp else 'was not used'}")
    return int(done.returncode != 0 or changed or tmp)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
