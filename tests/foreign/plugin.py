"""Run inside nnsight's own test suite: puts our classes where its tests look for nnsight's."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

# Before nnsight, whose `.save` on every object these cannot be imported after.
import anyio._core._sockets  # noqa: F401
import beartype  # noqa: F401
import nnsight
import pytest
from foreign.stand_ins import register_all
from nnsight.intervention.backends import remote
from nnsight.modeling import diffusion, transformers

from mm_adapters.ndif_client.backend import Dispatch
from mm_adapters.traced import TracedModel

_HERE = json.loads(os.environ.get("FOREIGN_CHECKPOINTS", "{}"))
_OUTCOMES = Path(os.environ["FOREIGN_OUTCOMES"])


_running: list[str] = []
_reached: set[str] = set()


def noted(self: Any, name: str) -> Any:
    """An attribute of a model; if there is one by now, the running test has reached it."""
    if "_is_made" in object.__getattribute__(self, "__dict__"):
        _reached.update(_running)
    return object.__getattribute__(self, name)


def from_here(cls: Any) -> None:
    """Has the class take a checkpoint of this machine for each name on the hub.

    The class itself, and no class derived from it: that one would be shipped in a job by its source.
    """
    made = cls.__init__

    @functools.wraps(made)
    def __init__(self: Any, wrapped: Any, *args: Any, **options: Any) -> None:
        made(self, _HERE.get(wrapped, wrapped) if isinstance(wrapped, str) else wrapped, *args, **options)
        self.__dict__["_is_made"] = True

    cls.__init__ = __init__


class Named:
    """What a backend asks of a model, of one that is known by its key only."""

    def __init__(self, key: str, env: Any) -> None:
        self.to_model_key = lambda: key
        self._remoteable_get_env = lambda: env or {}
        self.service_packages: dict[str, dict[str, str]] = {}


class Backend(Dispatch):
    """Ours, made as nnsight's tests make theirs: of a key."""

    def __init__(self, key: str, env: Any = None, **options: Any) -> None:
        super().__init__(Named(key, env), **options)  # type: ignore[arg-type]


class AsyncBackend(remote.AsyncRemoteBackend, Backend):
    """nnsight's way to wait, on our backend."""


ARE_THEIRS = os.environ.get("FOREIGN_CLASSES") == "theirs"
for kind in (transformers.TransformersModel, diffusion.DiffusionModel) if ARE_THEIRS else (TracedModel,):
    kind.__getattribute__ = noted  # type: ignore[method-assign]
    from_here(kind)
if not ARE_THEIRS:
    transformers.TransformersModel = diffusion.DiffusionModel = TracedModel  # type: ignore[misc]
    nnsight.VisionLanguageModel = nnsight.LanguageModel = TracedModel  # type: ignore[misc]
register_all()
if not ARE_THEIRS:
    remote.RemoteBackend, remote.AsyncRemoteBackend = Backend, AsyncBackend  # type: ignore[misc]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    _running[:] = [item.nodeid]
    return (yield)


@pytest.hookimpl
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.outcome != "passed" or report.when == "call":
        why = str(getattr(report.longrepr, "reprcrash", report.longrepr) or "")
        with _OUTCOMES.open("a", encoding="utf-8") as file:
            file_of, _, test = report.nodeid.partition("::")
            line = [f"{Path(file_of).name}::{test}", report.outcome, why[-600:], report.nodeid in _reached]
            file.write(json.dumps(line) + "\n")
