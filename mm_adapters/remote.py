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
from mm_adapters.runs.lens import Run


class PendingRun:
    """A `run(..., remote=True, blocking=False)` that a service has taken.

    `id` finds it again from another process: `mm_adapters.remote.resume(model, id)`.
    """

    def __init__(self, job: Dispatch) -> None:
        self._job = job

    @property
    def id(self) -> str:
        """The service's name for the job."""
        return str(self._job.job_id)

    def result(self, timeout_s: float | None = None, *, resend: bool = True) -> Run:
        """Waits for the run. If the service has lost the job it is sent once more, unless `resend=False`.

        Raises: JobLostError if it is lost and cannot be sent again; TimeoutError, and the job goes on.
        """
        try:
            found = self._job.wait(timeout_s)
        except JobLostError:
            if not resend:
                raise
            self._job.resend()
            found = self._job.wait(timeout_s)
        return Run(**found["found"])


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
