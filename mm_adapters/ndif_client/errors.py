"""The errors between this machine and a service, each with what to do about it."""

from __future__ import annotations

import re

from nnsight.intervention.backends.remote import RemoteError

from mm_adapters import _errors


class ServiceDownError(RemoteError):
    """No service answers at the address."""


class AccessError(RemoteError):
    """The service wants a key, or another one."""


class VersionMismatchError(RemoteError):
    """The service runs another version of what both sides must agree on."""


class NotServedError(RemoteError):
    """The service does not have the model, and cannot get it."""


class JobLostError(RemoteError):
    """A job was accepted, and the service has no record of it any more."""


def down(host: str, reason: object) -> ServiceDownError:
    """The error for a host that does not answer."""
    return ServiceDownError(
        f"No NDIF service answers at {host} ({reason}). Start one on this machine with `mm-interp ndif up` "
        'and pass the address it prints: remote="http://...". Or set nnsight.CONFIG.API.HOST.'
    )


def refused(status: int, detail: object, host: str) -> RemoteError:
    """The error for a request that a service turned down."""
    text = str(detail)
    about_key = status in (401, 403) or (status == 400 and "API key" in text)
    if about_key:
        return AccessError(
            f"{host} turned the request down: {text} Set a key with nnsight.login(), or the environment "
            "variable NDIF_API_KEY."
        )
    if status == 400 and "version" in text:
        return VersionMismatchError(f"{host} turned the request down: {text}")
    if status == 503:
        return ServiceDownError(f"{host} cannot take jobs now: {text}")
    return RemoteError(f"{host} turned the request down ({status}): {text}")


_OURS = re.compile(r"^mm_adapters\._errors\.(\w+): (.*)", re.MULTILINE | re.DOTALL)


def failed(description: str, model_key: str, host: str) -> Exception:
    """The error for a job that the service reports as failed.

    One of this package's own is raised as what it is; the service's traceback comes with it.
    """
    *_, last = (None, *_OURS.finditer(description))  # The last one is the error.
    kind = getattr(_errors, last[1], None) if last else None
    if kind in (_errors.CheckpointError, _errors.UnknownFamilyError) and last:
        return NotServedError(f"{host} cannot serve {model_key}: {last[2].strip()}")
    if last and isinstance(kind, type) and issubclass(kind, Exception):
        error = kind(last[2].strip())
        error.add_note(f"In a job on {host}:\n{description.strip()}")
        return error
    # NDIF 0.1.2 says first what went wrong, then shows a traceback, which it cuts off.
    about, _, shown = description.strip().partition("Traceback")
    if about.startswith("Could not deploy") or ("deploy" in about.lower() and not shown):
        return NotServedError(
            f"{host} does not serve {model_key}: {about.strip()} print(nnsight.status()) lists what it has."
        )
    return RemoteError(description)
