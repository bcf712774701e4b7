"""Sends a traced block to an NDIF service and returns what it saved; no job is lost silently.

nnsight's backend, with what it leaves out: the service is checked before anything is sent, each failure
has its own error, and a job outlives its connection. A blocking job waits on a websocket. If that breaks
the job is sent again, as one whose result the service keeps until it is fetched; a job is therefore run
at least once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import httpx
import websocket
from cloudpickle.cloudpickle import _PICKLE_BY_VALUE_MODULES
from nnsight.intervention.backends.local import LocalSimulationBackend
from nnsight.intervention.backends.remote import _REFRESH, RemoteBackend, RemoteError
from nnsight.ndif import pull_env
from nnsight.schema.request import RequestModel
from nnsight.schema.response import Status

from mm_adapters.ndif_client.errors import (
    JobLostError,
    ServiceDownError,
    VersionMismatchError,
    down,
    failed,
    refused,
)
from mm_adapters.ndif_client.no_proxy import directly
from mm_adapters.ndif_client.shipping import install_and_load, payload_with_sources
from mm_adapters.ndif_client.stock_service import stock_service_key
from mm_adapters.nnsight_engine.protocol import JobModel

OURS = ("mm_adapters", "methods_multimodal", "integrations")
_LOST = (websocket.WebSocketException, ConnectionError)
_TIMEOUT = httpx.Timeout(10.0, read=600.0)


class Envelope(RequestModel):
    """What is sent beside a payload. `trusted` is NDIF's: False asks for the sandbox, None leaves it open."""

    trusted: bool | None = None

    def metadata(self) -> str:
        return self.model_dump_json(exclude_none=True)


class Dispatch(RemoteBackend):
    """A job for a service: sent when its block ends, waited for or polled.

    `reconnect_timeout_s` is how long a service that has taken a job may not answer; `grace_s` how long an
    accepted job may be without any status.
    """

    reconnect_timeout_s = 60.0
    grace_s = 20.0
    trusted: bool | None = None

    def __init__(self, model: JobModel, **options: Any) -> None:
        super().__init__(model.to_model_key(), env=model._remoteable_get_env(), **options)
        self._model = model
        self._sent: tuple[RequestModel, bytes] | None = None
        self._accepted_s = time.monotonic()

    def request(self, request: RequestModel, tracer: Any) -> Any:
        """Sends a blocking job and waits. Raises: as the errors of `ndif_client.errors` say."""
        blob = self._serialize(tracer)
        request = self._envelope()
        try:
            return self._await(request, blob)
        except _LOST as error:
            self._log(f"the connection was lost ({error!r}); the job is sent again, to be polled")
        self._sent = request.model_copy(update={"session_id": ""}), blob
        self._until_up()
        self.resend()
        return self.wait()

    def submit(self, tracer: Any) -> None:
        """Sends a job without waiting for it; `poll` or `wait` for its result."""
        self.meta = None  # Of the job before.
        blob = self._serialize(tracer)
        self._sent = self._envelope(), blob
        self.resend()

    def resend(self) -> str:
        """Sends the job, again if need be, and gives its id. Raises: JobLostError if it is not here."""
        if self._sent is None:
            raise JobLostError(
                f"Job {self.job_id} was sent by another process, so it cannot be sent again here."
            )
        response = self._post(*self._sent)
        self.job_id, self.status, self._accepted_s = response.id, response.status, time.monotonic()
        self.display.update(response)
        return response.id

    def poll(self, tracer: Any = None) -> Any:
        """The saved values of a job that has ended, None of one that has not.

        Raises: JobLostError if the service no longer knows it; ServiceDownError if none answers.
        """
        headers = {"ndif-api-key": self.api_key} if self.api_key else None
        reply = self._get(f"/response/{self.job_id}", headers)
        if reply.status_code == 404:
            waited = time.monotonic() - self._accepted_s
            if self.status not in (None, Status.RECEIVED) or waited > self.grace_s:
                raise JobLostError(
                    f"{self.host} has no record of job {self.job_id}, which it had taken. It was probably "
                    "started anew meanwhile. Send the job again: .resend()."
                )
            return None
        if reply.status_code >= 400:
            raise refused(reply.status_code, _detail(reply), self.host)
        response = self.parse(reply.text)
        self.status = response.status
        return self.handle(response)

    def wait(self, timeout_s: float | None = None, *, every_s: float = 0.1) -> Any:
        """Polls until the job has ended. Raises: as `poll`; TimeoutError, and the job goes on."""
        start = answered = time.monotonic()
        while True:
            try:
                saved = self.poll()
                answered = time.monotonic()
            except ServiceDownError:
                if time.monotonic() - answered > self.reconnect_timeout_s:
                    raise
                saved = None
            if saved is not None:
                return saved
            if timeout_s is not None and time.monotonic() - start > timeout_s:
                raise TimeoutError(f"Job {self.job_id} has not ended after {timeout_s:g} s; it goes on.")
            time.sleep(every_s)

    def note(self, response: Any) -> bool:
        if response.status == Status.ERROR:
            self.display.update(response)
            self.meta = response.meta if response.meta is not None else self.meta
            raise failed(response.description, self.model_key, self.host)
        return super().note(response)

    def download_result(self, url: Any) -> Any:
        """As nnsight's. A service on this machine keeps its results here too."""
        with directly(url if isinstance(url, str) else None):
            return super().download_result(url)

    def _envelope(self) -> Envelope:
        return Envelope(model_key=self.model_key, compress=self.compress, env=self.env, trusted=self.trusted)

    def _await(self, request: RequestModel, blob: bytes) -> Any:
        key = {"ndif-api-key": self.api_key} if self.api_key else None
        try:
            with directly(self.host):
                url = f"{self.ws_host}/subscribe"
                connection = websocket.create_connection(url, header=key, timeout=10)
        except (OSError, websocket.WebSocketException) as error:
            raise down(self.host, error) from error
        try:
            connection.settimeout(_REFRESH if self.display.enabled else None)
            request.session_id = json.loads(_message(connection))["session_id"]
            first = self._post(request, blob)
            self.display.update(first)
            while True:
                try:
                    response = self.parse(_message(connection))
                except websocket.WebSocketTimeoutException:
                    self.display.refresh()
                    continue
                result = self.handle(response)
                if response.status == Status.COMPLETED:
                    return result
        finally:
            with suppress(OSError, websocket.WebSocketException):
                connection.close()
            connection.shutdown()  # One that broke is not closed by close().

    def _until_up(self) -> None:
        start = time.monotonic()
        while True:
            try:
                reply = self._get("/connected")
                if reply.status_code < 400:
                    return
                error: ServiceDownError = ServiceDownError(f"{self.host} answers {reply.status_code}.")
            except ServiceDownError as caught:
                error = caught
            if time.monotonic() - start > self.reconnect_timeout_s:
                waited_s = self.reconnect_timeout_s
                error.add_note(f"The connection broke in the middle of a job, {waited_s:g} s ago.")
                raise error
            time.sleep(0.5)

    def _post(self, request: RequestModel, blob: bytes) -> Any:
        try:
            with directly(self.host):
                return super()._post(request, blob)
        except RemoteError as error:
            cause = error.__cause__
            if isinstance(cause, httpx.HTTPStatusError):
                raise refused(cause.response.status_code, _detail(cause.response), self.host) from cause
            raise down(self.host, cause) from cause

    def _get(self, path: str, headers: dict[str, str] | None = None) -> httpx.Response:
        try:
            with directly(self.host):
                return httpx.get(f"{self.host}{path}", headers=headers, timeout=_TIMEOUT)
        except httpx.TransportError as error:
            raise down(self.host, error) from error

    def _serialize(self, tracer: Any) -> bytes:
        check_service(self._packages(), self.host)
        pull_env()
        if self.on_stock_service:
            self.model_key = stock_service_key(self._model)
            with by_reference(("mm_adapters",)), by_value(install_and_load.__module__):
                blob = payload_with_sources(tracer, self._model, self.compress)
        else:
            with by_reference(OURS):
                blob = RequestModel.serialize(tracer, self.compress)
        self._log(f"payload: {len(blob):,} bytes")
        return blob

    @property
    def on_stock_service(self) -> bool:
        """Whether the service does not have this package, so that it must be sent along."""
        return "mm_adapters" not in self._packages()

    def _packages(self) -> dict[str, str]:
        """What the service has installed; asked once for a model and host."""
        packages = self._model.service_packages
        if self.host not in packages:
            reply = self._get("/env")
            if reply.status_code >= 400:
                raise refused(reply.status_code, _detail(reply), self.host)
            packages[self.host] = reply.json().get("packages", {})
        return packages[self.host]


class LocalCopy(LocalSimulationBackend):
    """`remote="local"`: the block is serialised, deserialised without this machine's files, and run here.

    nnsight's own (intervention/backends/local.py) hides every module but a few; this package is not hidden,
    for a service has it.
    """

    def __call__(self, tracer: Any) -> None:
        pull_env()
        with by_reference(OURS):
            super().__call__(tracer)

    def _hide_local_modules(self) -> dict[str, Any]:
        import sys

        hidden = super()._hide_local_modules()
        for name in [n for n in hidden["modules"] if n.partition(".")[0] in OURS]:
            sys.modules[name] = hidden["modules"].pop(name)
        return hidden


@contextmanager
def by_reference(names: tuple[str, ...]) -> Iterator[None]:
    """These packages are named and not shipped: nnsight ships every one that runs from a checkout."""
    removed = {m for m in _PICKLE_BY_VALUE_MODULES if m.partition(".")[0] in names}
    _PICKLE_BY_VALUE_MODULES.difference_update(removed)
    try:
        yield
    finally:
        _PICKLE_BY_VALUE_MODULES.update(removed)


@contextmanager
def by_value(name: str) -> Iterator[None]:
    """One module's functions are shipped, by their source."""
    _PICKLE_BY_VALUE_MODULES.add(name)
    try:
        yield
    finally:
        _PICKLE_BY_VALUE_MODULES.discard(name)


def check_service(packages: dict[str, str], host: str) -> None:
    """Raises: VersionMismatchError if a service has another nnsight, or another of this package."""
    theirs = packages.get("nnsight", "")
    if theirs.split(".")[:2] != version("nnsight").split(".")[:2]:
        raise VersionMismatchError(
            f"{host} runs nnsight {theirs or '(none)'} and here is {version('nnsight')}: a block cannot be "
            "sent from one to the other. Install the same, up to the second number."
        )
    theirs, ours = packages.get("mm_adapters", ""), own_version()
    if theirs not in ("", "local", ours) and ours != "local":
        raise VersionMismatchError(
            f"{host} has mm-interp {theirs} and here is {ours}. Sites and shipped models may differ between "
            f"them: pip install mm-interp=={theirs}"
        )


def own_version() -> str:
    """This package's version, "local" if it is not installed."""
    try:
        return version("mm-interp")
    except PackageNotFoundError:
        return "local"


def _message(connection: Any) -> Any:
    message = connection.recv()
    if not message:
        raise websocket.WebSocketConnectionClosedException("the service closed the connection")
    return message


def _detail(reply: httpx.Response) -> Any:
    try:
        body = reply.json()
    except ValueError:
        return reply.text
    return body.get("detail", body) if isinstance(body, dict) else body
