"""Jobs on an NDIF service: to wait for one, and to come back to one later, from anywhere."""

from __future__ import annotations

from typing import Any

import mm_adapters.nnsight_engine.import_order  # noqa: F401

# isort: split
from mm_adapters.ndif_client.backend import Dispatch
from mm_adapters.ndif_client.errors import (
    AccessError,
    JobLostError,
    NotServedError,
    ServiceDownError,
    VersionMismatchError,
)
from mm_adapters.ndif_client.pending_run import PendingRun


def resume(model: Any, job_id: str, *, host: str | None = None) -> PendingRun:
    """A run that was sent earlier, perhaps by another process; `host` as in `remote=`."""
    return PendingRun(Dispatch(model, host=host, blocking=False, job_id=job_id))


__all__ = [
    "AccessError",
    "JobLostError",
    "NotServedError",
    "PendingRun",
    "ServiceDownError",
    "VersionMismatchError",
    "resume",
]
