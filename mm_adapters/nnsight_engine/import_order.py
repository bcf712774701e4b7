"""What must be imported before nnsight is, so that a web service in the same process goes on working.

nnsight 0.8.1 (__init__.py, pymount) gives every object a `.save`, also the attribute sets of anyio, which
then refuses to define them: every FastAPI endpoint that is no coroutine fails. Those defined before are
not touched. Where nnsight is here already it is too late.
"""

import sys
from contextlib import suppress

if "nnsight" not in sys.modules:
    with suppress(ImportError):
        import anyio._core._sockets
        import anyio.streams.file
        import anyio.streams.tls  # noqa: F401
