"""A site as an envoy, and the envoys of a model's modules, which refuse to be run remotely by themselves."""

from __future__ import annotations

from typing import Any

from nnsight.intervention.envoy import Envoy
from nnsight.intervention.eproperty import eproperty
from nnsight.intervention.interleaver import Mediator
from torch import Tensor

from mm_adapters._errors import InputError
from mm_adapters.hooks.point import tracked
from mm_adapters.nnsight_engine.interleaver import SiteInterleaver, refuse_remote
from mm_adapters.nnsight_engine.iteration import SiteTracer
from mm_adapters.nnsight_engine.points import TracedPoint
from mm_adapters.nnsight_engine.protocol import SiteModel
from mm_adapters.nnsight_engine.raw_values import raw_location, shown
from mm_adapters.nnsight_engine.scan import SiteScanner


class SiteEnvoy:
    """A site: `.output` is its value in a trace, to be saved, written into, or assigned.

    What is written into the value goes back into the model when the block moves on.
    """

    def __init__(self, model: SiteModel, point: TracedPoint) -> None:
        self.site = point.site
        self.path = point.path
        self.interleaver = model.interleaver
        self._model = model
        self._point = point
        self._version: int | None = None

    def __reduce__(self) -> Any:
        # As the model, a site is not shipped but looked up where the job runs.
        return type(self._model).envoy, (self._model, self.site.name)

    @property
    def output(self) -> Tensor:
        """The site's value, in TransformerLens' shape."""
        if not self._model.in_process:
            return self._from_sandbox()
        self._check_request()
        return self.value  # type: ignore[return-value]

    @output.setter
    def output(self, new: Tensor) -> None:
        if not self._model.in_process:
            served = self._from_sandbox()
            self._check(new, served)
            served.copy_(new)
            return
        self._check_request()
        served = Mediator.value(self._point.location)
        self._check(new, served)
        Mediator.swap(self._point.location, new.to(served.device, served.dtype))

    def _check(self, new: Any, served: Tensor) -> None:
        if not isinstance(new, Tensor) or new.shape != served.shape:
            what = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise InputError(f"{self.site.name} is {tuple(served.shape)} here and was set to {what}.")

    def _from_sandbox(self) -> Tensor:
        """The value in a service's sandbox, which sends back what is written into it.

        NDIF 0.1.2 (ray/sandbox/nns.py, writeback) sends back the object that it gave, and no other.
        """
        if self._model.on_stock_service:
            raw = Mediator.value(raw_location(self._model.path, self.site))
            return shown(self.site, raw, self._model.points.n_heads(self.site))
        served = Mediator.value(self._point.location)
        served.data = served.data.contiguous()
        return served

    def _check_request(self) -> None:
        if isinstance(self.interleaver, SiteInterleaver):
            self.interleaver.check_request(self._point)

    @eproperty(key="output")
    def value(self, served: Tensor) -> Any:
        """The value as a block gets it."""
        if tracked(served) or 0 in served.stride():
            # A copy: the block must not write into what autograd has kept.
            return served.clone()
        self._version = _version(served)
        return served

    @value.transform
    def value(self, view: Tensor, served: Tensor) -> Tensor:
        """The value as the model gets it back: the same object if nothing was written into it."""
        if view is not served:
            return view if tracked(served) or view._version else served
        unchanged = self._version is not None and self._version == _version(served)
        return served if unchanged else served.view_as(served)

    def __repr__(self) -> str:
        return f"SiteEnvoy({self.site})"


class TracedPart(Envoy):
    """A module of a TracedModel. It is traced and scanned here; only the whole model goes remote."""

    def trace(self, *args: Any, **kwargs: Any) -> Any:
        # nnsight 0.8.1 passes remote= on to the module, whose **kwargs swallow it: a local run.
        refuse_remote(self.path, kwargs)
        return super().trace(*args, tracer_cls=kwargs.pop("tracer_cls", SiteTracer), **kwargs)

    def scan(self, *args: Any, fn: Any = None, backend: Any = None, **kwargs: Any) -> SiteScanner:
        """As the whole model's: shapes without computing."""
        refuse_remote(self.path, kwargs)
        return SiteScanner(self, fn or "__call__", *args, backend=backend, **kwargs)

    def session(self, *args: Any, **kwargs: Any) -> Any:
        refuse_remote(self.path, kwargs)
        return super().session(*args, **kwargs)


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version
