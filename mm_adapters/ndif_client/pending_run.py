"""A run that a service has taken, and that is not waited for."""

from __future__ import annotations

from mm_adapters.ndif_client.backend import Dispatch
from mm_adapters.ndif_client.errors import JobLostError
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
            saved = self._job.wait(timeout_s)
        except JobLostError:
            if not resend:
                raise
            self._job.resend()
            saved = self._job.wait(timeout_s)
        return Run(**saved["run_fields"])  # As the block of `TracedModel.run` saves them.
