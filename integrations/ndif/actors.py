"""The controller and the model actor that NDIF runs in place of its own, on a CPU or one GPU.

Imported by the service's processes only. NDIF takes both by name (NDIF_CONTROLLER_IMPORT_PATH,
NDIF_MODEL_IMPORT_PATH; its docs/developing/adding-a-model-actor.md). Ray ships a decorated class by
value and an undecorated base by name, so what is changed is in the bases.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import contextlib
import inspect
import os
import tempfile
from typing import Any

import ray
import torch
from ndif.services.ray.deployments.controller import controller
from ndif.services.ray.deployments.modeling.base import BaseModelDeployment
from ndif.services.ray.sandbox import host
from ndif.services.ray.sandbox import model as sandbox
from nnsight.modeling.mixins.remotable import Remotable

from integrations.ndif.fork_server import ForkServer

# NDIF 0.1.2 (deployments/modeling/base.py) synchronises CUDA after each job, whether it is there or not.
if not torch.cuda.is_available():
    torch.cuda.synchronize = torch.cuda.empty_cache = lambda *_, **__: None  # type: ignore[assignment]

_spawn = host.spawn


def spawn(*args: Any, **kwargs: Any) -> host.Sandbox:
    """NDIF 0.1.2 (ray/sandbox/host.py, spawn) gives a runner 30 s to import torch, and a busy machine takes
    longer; its socket is in /tmp, where a runner that is killed leaves it."""
    sandbox_process = _spawn(*args, **kwargs, timeout=300.0)
    path = os.path.join(tempfile.gettempdir(), os.path.basename(sandbox_process.path))
    with contextlib.suppress(OSError):  # On another file system it stays.
        os.rename(sandbox_process.path, path)
        sandbox_process.path = path
    return sandbox_process


host.spawn = spawn


def accept_trust_remote_code(name: str) -> None:
    """NDIF 0.1.2 (cluster/evaluator.py) passes trust_remote_code=; nnsight 0.8.1 reads it off the key."""
    method = getattr(Remotable, name).__func__
    if "trust_remote_code" in inspect.signature(method).parameters:
        return

    def without_it(cls: Any, *args: Any, trust_remote_code: bool = False, **kwargs: Any) -> Any:
        return method(cls, *args, **kwargs)

    setattr(Remotable, name, classmethod(without_it))


for _name in ("describe_checkpoint", "max_tp_size"):
    accept_trust_remote_code(_name)


class Controller(controller._ControllerActor):
    """NDIF's controller, imported through this module."""


class ForkingPool(host.Pool):
    """NDIF's pool of runners, which are forked from one process instead of started each by itself."""

    def __init__(self, *args: Any, model_key: str, trust_remote_code: bool, **kwargs: Any) -> None:
        self.fork_server = ForkServer(model_key, trust_remote_code, host.runner_env())
        super().__init__(*args, model_key=model_key, trust_remote_code=trust_remote_code, **kwargs)

    def acquire(self, timeout: float = 30.0) -> host.Sandbox:
        while True:
            sandbox_process = super().acquire(timeout)
            if sandbox_process.process.poll() is None and not sandbox_process.process.orphaned:
                return sandbox_process
            sandbox_process.stop()  # It has ended while it waited for a job.

    def _spawn(self) -> host.Sandbox:
        return host.Sandbox(*self.fork_server.fork(self.peers))  # type: ignore[arg-type]

    def close(self) -> None:
        super().close()
        self.fork_server.close()


class Deployment(sandbox.SandboxModelDeployment):
    """NDIF's sandboxing actor, which also serves from a CPU."""

    def open_pool(self, pool_size: int | None = None, peers: int = 1) -> None:
        if torch.cuda.is_available():
            return super().open_pool(pool_size, peers)
        size = sandbox.DEFAULT_POOL_SIZE if pool_size is None else pool_size
        trust = self.kwargs.get("trust_remote_code", False)
        self.pool = ForkingPool(size, peers=peers, model_key=self.model_key, trust_remote_code=trust)
        self.execution_sandbox = None

    def load_from_disk(self) -> Any:
        if torch.cuda.is_available():
            return super().load_from_disk()
        model = Remotable.from_model_key(self.model_key, dispatch=True, dtype=self.dtype_name)
        # nnsight 0.8.1 (modeling/diffusion.py, _load) passes dtype= on to where it is not heard.
        model._module.to(self.dtype).requires_grad_(False)
        return model

    async def to_cache(self) -> None:
        if torch.cuda.is_available():
            return await super().to_cache()
        await self.cancel("preempted")
        self.cached = True

    def from_cache(self, gpu_mem_bytes_by_id: dict[int, int]) -> None:
        if torch.cuda.is_available():
            return super().from_cache(gpu_mem_bytes_by_id)
        self.gpu_mem_bytes_by_id, self.cached = gpu_mem_bytes_by_id, False


assert issubclass(Deployment, BaseModelDeployment)


@ray.remote(num_cpus=0, num_gpus=0, max_restarts=-1, resources={"head": 1})
class ControllerActor(Controller):
    """What Ray runs."""


@ray.remote(num_cpus=0, max_restarts=2)
class ModelActor(Deployment):
    """What Ray runs, one for each model."""
