"""Run inside TransformerLens' own test suite: serves its models, and notes what each test came to."""

from __future__ import annotations

import gc
import json
import os
import signal
from pathlib import Path
from typing import Any

# Before anything imports nnsight, which puts `.save` on every object: these cannot be imported after.
import anyio._core._sockets  # noqa: F401
import beartype  # noqa: F401
import pytest
import torch
from foreign.transformer_lens import factories, reach

from transformer_lens import ActivationCache, HookedTransformer
from transformer_lens.model_bridge import TransformerBridge

_WHOSE = os.environ["FOREIGN_CLASSES"]
_OUTCOMES = Path(os.environ["FOREIGN_OUTCOMES"])
_SECONDS = 60

factories.install(_WHOSE, os.environ["FOREIGN_TOKENIZER"])
if _WHOSE == "ours":
    from mm_adapters.tl_engine.tower import HookedTower

    reach.notice(HookedTower)
else:
    reach.notice(HookedTransformer, TransformerBridge)
reach.notice(ActivationCache, owner="model")


def pytest_collection_finish() -> None:
    """Their tests collect garbage hundreds of times; what is imported by now need not be looked at."""
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: Any, request: pytest.FixtureRequest) -> Any:
    """A test that takes what a fixture made of a served model reaches it, in later tests too."""
    before, reach.touched = reach.touched, False
    try:
        return (yield)
    finally:
        fixturedef.reaches = reach.touched
        reach.touched = before or reach.touched


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    reach.touched = False
    torch.manual_seed(0)
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(_SECONDS)
    try:
        return (yield)
    finally:
        signal.alarm(0)


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"The test took more than {_SECONDS} seconds.")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: Any) -> Any:
    report = yield
    fixtures = item._fixtureinfo.name2fixturedefs.values() if hasattr(item, "_fixtureinfo") else ()
    report.reaches = reach.touched or any(getattr(f[-1], "reaches", False) for f in fixtures)
    return report


def pytest_runtest_logreport(report: Any) -> None:
    """One line for each test: what came of it, whether it reached a served model, and what it says."""
    if report.when == "call" or report.outcome != "passed":
        _note(report, report.reaches)


def pytest_collectreport(report: Any) -> None:
    """A file that cannot be imported counts as one test."""
    if report.outcome == "failed":
        _note(report, False)


def _note(report: Any, reaches: bool) -> None:
    crash = getattr(report.longrepr, "reprcrash", None)
    why = crash.message if crash is not None else str(report.longrepr or "")
    where = f"{Path(crash.path).name}:{crash.lineno}" if crash is not None else ""
    line = [
        report.nodeid,
        report.outcome,
        reaches,
        why[:1000],
        where,
        round(getattr(report, "duration", 0), 2),
    ]
    with _OUTCOMES.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
