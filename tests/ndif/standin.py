"""A stand-in for NDIF: its wire protocol on the loopback, one process, no Ray, no Redis, no S3.

python tests/ndif/standin.py PORT [--key KEY] [--nnsight-at-least VERSION] [--without PACKAGE]

Trusted jobs only, one at a time. `--without` is a package that a stock service does not have: it cannot
be imported here, unless a job brings it along. `POST /drop` breaks every websocket, `POST /forget` loses
every job.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import io
import json
import linecache
import os
import sys
import threading
import traceback
import uuid
from pathlib import Path
from typing import Any

# Before nnsight, whose `.save` on every object these cannot be imported after.
import anyio._core._sockets
import anyio.streams.memory
import anyio.streams.tls  # noqa: F401
import torch
import uvicorn
import zstandard
from fastapi import FastAPI, Form, Header, HTTPException, Response, UploadFile, WebSocket
from nnsight.modeling.mixins.remotable import Remotable
from nnsight.ndif import get_local_env
from nnsight.schema.request import RequestModel
from nnsight.schema.response import ResponseModel, Status
from nnsight.tracing.globals import BLOCKS, SOURCES
from nnsight.tracing.tracer import _saves, dec, inc
from nnsight.tracing.util import clean_traceback
from packaging.version import Version
from starlette.websockets import WebSocketDisconnect

INLINE_BYTES = 2**20  # NDIF's cap is 8 MiB; a smaller one is met by smaller tests.
app = FastAPI()
models: dict[str, Any] = {}
sockets: dict[str, WebSocket] = {}
answers: dict[str, str] = {}
blobs: dict[str, bytes] = {}
background: set[asyncio.Task[None]] = set()
lock = threading.Lock()
options = argparse.Namespace(port=0, key=None, nnsight_at_least=None, without=None)


def execute(envelope: dict[str, Any], blob: bytes) -> bytes:
    """Runs one job against the model it names and gives what it saved."""
    with lock:
        key = envelope["model_key"]
        if key not in models:
            models[key] = Remotable.from_model_key(key, dispatch=True, dtype="float32")
            # nnsight 0.8.1 (modeling/diffusion.py, _load) passes dtype= on to where it is not heard.
            models[key]._module.float().requires_grad_(False)
        model = models[key]
        model._remoteable_set_env(envelope["env"])
        caches: tuple[dict[Any, Any], ...] = (linecache.cache, SOURCES, BLOCKS)
        before = [dict(c) for c in caches]
        try:
            objects = model._remoteable_persistent_objects()
            tracer = RequestModel.deserialize(blob, objects, compress=envelope["compress"])
            inc()
            try:
                tracer.execute(tracer.info.code)
                saved = {k: v for k, v in tracer.info.frame.f_locals.items() if id(v) in _saves()}
            finally:
                dec()
        finally:
            for cache, earlier in zip(caches, before, strict=True):
                cache.clear()
                cache.update(earlier)
            model.interleaver.cancel()
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    return (
        zstandard.ZstdCompressor(3).compress(buffer.getvalue()) if envelope["compress"] else buffer.getvalue()
    )


async def job(name: str, envelope: dict[str, Any], blob: bytes) -> None:
    async def say(status: Status, about: str = "", data: Any = None) -> None:
        answer = ResponseModel(id=name, status=status, description=about, data=data)
        socket = sockets.get(envelope.get("session_id") or "")
        inline = isinstance(data, bytes)
        if socket is not None:
            await (
                socket.send_bytes(answer.pickle()) if inline else socket.send_text(answer.model_dump_json())
            )
        elif not envelope.get("session_id"):
            answers[name] = answer.model_dump_json()

    try:
        await say(Status.QUEUED, "queued")
        await say(Status.RUNNING, "running")
        out = await asyncio.to_thread(execute, envelope, blob)
        if envelope.get("session_id") and len(out) <= INLINE_BYTES:
            await say(Status.COMPLETED, "done", out)
        else:
            blobs[name] = out
            await say(Status.COMPLETED, "done", f"http://127.0.0.1:{options.port}/blob/{name}")
    except BaseException as error:  # noqa: BLE001  Whatever a job raises is its answer.
        shown = traceback.format_exception(type(error), error, clean_traceback(error.__traceback__))
        await say(Status.ERROR, "".join(shown))


@app.post("/request")
async def request(
    blob: UploadFile,
    data: str = Form(...),
    key: str | None = Header(default=None, alias="ndif-api-key"),
    nnsight_version: str = Header(default="0"),
) -> Any:
    if options.key is not None and key != options.key:
        raise HTTPException(401 if not key else 403, "Missing or invalid API key.")
    if options.nnsight_at_least and Version(nnsight_version) < Version(options.nnsight_at_least):
        raise HTTPException(400, f"Client nnsight version {nnsight_version} is below the minimum supported.")
    name = uuid.uuid4().hex
    task = asyncio.create_task(job(name, json.loads(data), await blob.read()))
    background.add(task)
    task.add_done_callback(background.discard)
    return json.loads(
        ResponseModel(id=name, status=Status.RECEIVED, description="received").model_dump_json()
    )


@app.websocket("/subscribe")
async def subscribe(socket: WebSocket) -> None:
    await socket.accept()
    name = uuid.uuid4().hex
    sockets[name] = socket
    await socket.send_json({"session_id": name})
    try:
        while True:
            await socket.receive_text()
    except (WebSocketDisconnect, RuntimeError):
        sockets.pop(name, None)


@app.get("/response/{name}")
def response(name: str) -> Response:
    if name not in answers:
        raise HTTPException(404, "no such job")
    return Response(answers[name], media_type="application/json")


@app.get("/blob/{name}")
def blob(name: str) -> Response:
    return Response(blobs[name], media_type="application/octet-stream")


@app.post("/drop")
async def drop() -> None:
    for name, socket in list(sockets.items()):
        sockets.pop(name, None)
        await socket.close()


@app.post("/forget")
def forget() -> None:
    answers.clear()
    blobs.clear()


@app.get("/env")
def env() -> Any:
    info = get_local_env()
    info["packages"].pop(options.without, None)
    return info


@app.get("/status")
def status() -> Any:
    level = {"deployment_level": "HOT", "application_state": "RUNNING"}
    return {"deployments": {k: {"model_key": k, **json.loads(k.split(":", 1)[1]), **level} for k in models}}


@app.get("/ping")
@app.get("/connected")
def ping() -> str:
    return "pong"


def hide(name: str) -> None:
    """Makes a package be found nowhere but where a job puts it."""
    root = str(Path(__file__).parents[2])
    sys.path[:] = [p for p in sys.path if p and os.path.abspath(p) != root]
    sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in str(getattr(f, "__name__", "")).lower()]
    assert importlib.util.find_spec(name) is None, f"{name} is still found"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("--key")
    parser.add_argument("--nnsight-at-least")
    parser.add_argument("--without")
    parser.parse_args(namespace=options)
    if options.without:
        hide(options.without)
    torch.set_num_threads(1)
    uvicorn.run(app, host="127.0.0.1", port=options.port, log_level="warning")
