"""`mm-interp ndif up|down|status`: an NDIF service on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from integrations.ndif.environment import InstallError, ensure, home
from integrations.ndif.processes import end
from integrations.ndif.service import answers, is_open

DEFAULT_PORT = 18001

ndif = typer.Typer(no_args_is_help=True, help="Serve models to nnsight from this machine.")


def register(app: typer.Typer) -> None:
    """Adds `ndif` to the application; called through the entry point group `mm_interp.commands`."""
    app.add_typer(ndif, name="ndif")


@ndif.command()
def up(
    port: Annotated[int, typer.Option(help="Where the service listens.")] = DEFAULT_PORT,
    gpus: Annotated[int | None, typer.Option(help="How many to serve from; 0 is the CPU.")] = None,
    sandbox: Annotated[int, typer.Option(help="Processes kept warm for jobs that are not trusted.")] = 1,
    dtype: Annotated[str, typer.Option(help="What weights are held in.")] = "float32",
    python: Annotated[str | None, typer.Option(help="Which Python the service gets.")] = None,
    foreground: Annotated[bool, typer.Option(help="Stay, and end the service with Ctrl-C.")] = False,
) -> None:
    """Starts the service, in an environment of its own, and prints READY and its address."""
    if not sys.platform.startswith("linux"):
        _fail("The service runs on Linux only: its processes are service again through /proc.")
    while (running := state()) is not None and running["ending"]:
        time.sleep(0.2)
    if running is not None:
        if running["ready"]:
            typer.echo(f"READY {running['address']}")
            return
        _fail(f"A service is being started (process {running['pid']}). Wait, or end it: mm-interp ndif down.")
    tidy()
    if is_open(port):
        _fail(f"Something listens on port {port} already. Choose another: --port.")
    try:
        ensure(python, lambda line: typer.echo(line, err=True))
    except InstallError as error:
        _fail(str(error))
    command = [sys.executable, "-m", "integrations.ndif.service", str(home()), str(port)]
    command += ["--gpus", str(_gpus() if gpus is None else gpus), "--sandbox", str(sandbox), "--dtype", dtype]
    (home() / "failed.txt").unlink(missing_ok=True)
    root = str(Path(__file__).resolve().parents[2])
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    if foreground:
        os.execve(sys.executable, command, env)
    detached: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    started = subprocess.Popen(command, start_new_session=True, env=env, **detached)
    try:
        while not ((service := state()) and service["ready"]):
            if started.poll() is not None:
                reason = home() / "failed.txt"
                _fail(
                    reason.read_text(encoding="utf-8") if reason.is_file() else "The service did not start."
                )
            time.sleep(0.2)
    except BaseException:
        started.terminate()
        raise
    typer.echo(f"READY {service['address']}")
    typer.echo(
        f'Trace with remote="{service["address"]}", or set NDIF_HOST. End it: mm-interp ndif down.', err=True
    )


@ndif.command()
def down() -> None:
    """Ends the service and every process it started."""
    service = state()
    if service is None:
        typer.echo("Ended what a killed service left." if tidy() else "No service is running.")
        return
    with contextlib.suppress(ProcessLookupError, IndexError):
        os.kill(_alive(service)[0], signal.SIGTERM)
    while state() is not None:
        time.sleep(0.2)
    tidy()
    typer.echo("Ended.")


@ndif.command()
def status() -> None:
    """Says whether the service answers, and which models it holds; exit code 1 if there is none."""
    import httpx

    service = state()
    if service is None:
        typer.echo("No service is running.")
        raise typer.Exit(1)
    if not service["ready"] or not answers(f"{service['address']}/connected"):
        typer.echo(f"Not ready: {service['address']}; logs in {service['logs']}")
        raise typer.Exit(1)
    typer.echo(f"READY {service['address']}")
    reply = httpx.get(f"{service['address']}/status", timeout=60, trust_env=False).json()
    for deployment in reply.get("deployments", {}).values():
        where = f"{deployment.get('deployment_level')}, {deployment.get('application_state')}"
        typer.echo(f"{deployment.get('repo_id')}  {where}")


def state() -> dict[str, Any] | None:
    """What the running service says of itself, and whether it is ending; None if there is none."""
    service = _read_state()
    alive = _alive(service) if service else []
    if not service or not alive:
        return None
    ending = len(alive) < 2
    return service | {"ending": ending, "ready": service["ready"] and not ending}


def tidy() -> bool:
    """Ends what is left of a service that was killed together with its guard; whether there was one."""
    service = _read_state()
    if service is None or _alive(service):
        return False
    end(service["run"], timeout_s=1.0)
    shutil.rmtree(service["temp"], ignore_errors=True)
    (home() / "service.json").unlink(missing_ok=True)
    return True


def _read_state() -> dict[str, Any] | None:
    try:
        service = json.loads((home() / "service.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return service if {"pid", "service", "run", "temp"} <= service.keys() else None


def _alive(service: dict[str, Any]) -> list[int]:
    """The service's two first processes, the guard before what it guards; of them those that are there."""
    return [pid for pid in (service["pid"], service["service"]) if _is_service(pid)]


def _is_service(pid: int) -> bool:
    with contextlib.suppress(OSError):
        # After a crash of the machine the number may be anybody's.
        return b"integrations.ndif.service" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _fail(reason: str) -> None:
    typer.echo(f"mm-interp: {reason}", err=True)
    raise typer.Exit(1)
