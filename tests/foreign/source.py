"""A library's own tests, from its source distribution in the package index; nothing of it is kept."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

import pytest


def fetch_tests(library: str, folder: Path) -> Path:
    """The `tests` of the version that is installed. Not its sources: those installed are to be tested.

    Raises: RuntimeError, with what pip said, if they cannot be fetched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem = library.replace("-", "_")
    fetch = ["download", "--quiet", "--no-deps", "--no-binary", library]
    command = [sys.executable, "-m", "pip", *fetch, "-d", str(folder), f"{library}=={version(library)}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = sorted(folder.glob(f"{stem}-*.tar.gz"))
    if not archives:
        raise RuntimeError(f"{library}'s own tests could not be fetched.\n{done.stderr[-500:]}")
    with tarfile.open(archives[0]) as tar:
        inside = [m for m in tar if m.name.split("/")[1:2] == ["tests"]]
        tar.extractall(folder, inside, filter="data")
    (unpacked,) = folder.glob(f"{stem}-*/tests")
    return unpacked


def fetch_or_skip(library: str, folder: Path) -> Path:
    """Those tests. Skips, loudly, only without a package index; in CI that is a failure."""
    try:
        return fetch_tests(library, folder)
    except RuntimeError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"{library.upper()}'S OWN TESTS WERE NOT RUN: {error}")
