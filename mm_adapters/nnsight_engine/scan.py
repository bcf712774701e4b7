"""A pipeline's sampling loop on tensors that have shapes and no values.

Schedulers read values (which timestep is this?), so nnsight 0.8.1 cannot scan a pipeline. Here the
timesteps are real, and a step returns what a real one does: a sample of the shape of the one before.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, SimpleNamespace
from typing import Any

from nnsight.intervention.tracer import ScanningTracer
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from mm_adapters.nnsight_engine.iteration import Steps

_REAL = ("set_timesteps",)
_SAME_SHAPE = ("scale_model_input", "add_noise", "scale_noise")


class SiteScanner(ScanningTracer):
    """nnsight's scanning tracer, with loops over steps that end when the run does, one at a time."""

    def execute(self, code: CodeType) -> None:
        envoy: Any = self.envoy
        model = envoy.root
        with model.turn(), model.running():
            super().execute(code)

    @property
    def iter(self) -> Steps:
        return Steps()


@contextmanager
def shapes_only(pipeline: Any) -> Iterator[None]:
    """Inside, the pipeline's scheduler makes real timesteps, and of samples only the shape.

    Raises: NotImplementedError if the pipeline's own code branches on a value.
    """
    real = pipeline.scheduler
    with unset_fake_temporarily():
        twin = copy.deepcopy(real)
    for name in _REAL:
        _replace(twin, name, _outside)
    for name in _SAME_SHAPE:
        _replace(twin, name, _unchanged)
    _replace(twin, "step", _stepped)
    pipeline.scheduler = twin
    try:
        yield
    except (GuardOnDataDependentSymNode, DataDependentOutputException) as error:
        raise NotImplementedError(
            f"A {type(pipeline).__name__} cannot be scanned with these arguments: its code branches on a "
            "value (is the prompt too long, and cut?). Scan a part: `model.unet.scan(sample, timestep, ...)`."
        ) from error
    finally:
        pipeline.scheduler = real


def for_shapes(arguments: dict[str, Any]) -> dict[str, Any]:
    """A pipeline's arguments without a seed and without PIL pictures as output, which both need values."""
    output_type = "latent" if arguments.get("output_type") == "latent" else "pt"
    without_seed = {k: v for k, v in arguments.items() if k not in ("seed", "generator")}
    return without_seed | {"output_type": output_type}


def _replace(scheduler: Any, name: str, make: Any) -> None:
    method = getattr(scheduler, name, None)
    if method is not None:
        # Pipelines look at the signatures of a scheduler's methods.
        setattr(scheduler, name, functools.wraps(method)(make(method)))


def _outside(method: Any) -> Any:
    def called(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return method(*args, **kwargs | ({"device": "cpu"} if "device" in kwargs else {}))

    return called


def _unchanged(method: Any) -> Any:
    return lambda sample, *args, **kwargs: sample


def _stepped(method: Any) -> Any:
    def called(
        output: Tensor, timestep: Any, sample: Tensor, *args: Any, return_dict: bool = True, **_: Any
    ) -> Any:
        new = sample.clone()
        return _Step(prev_sample=new, pred_original_sample=new) if return_dict else (new, new)

    return called


class _Step(SimpleNamespace):
    """As diffusers' outputs, whose entries have numbers too."""

    def __getitem__(self, index: int) -> Any:
        return list(vars(self).values())[index]
