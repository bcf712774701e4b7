"""One site as nnsight's users read and write it, and nnsight's envoys with the holes stopped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nnsight.intervention.envoy import Envoy
from nnsight.intervention.eproperty import eproperty
from nnsight.intervention.interleaver import Mediator
from nnsight.intervention.tracer import ScanningTracer
from torch import Tensor

from mm_adapters.nnsight_engine.interleaver import SiteInterleaver
from mm_adapters.nnsight_engine.points import TracedPoint, tracked
from mm_adapters.nnsight_engine.raw_values import raw_location, shown

if TYPE_CHECKING:
    from mm_adapters.traced import TracedModel


class SiteEnvoy:
    """A site: `.output` is its value in a trace, to be saved, written into, or assigned.

    What is written into the value goes back into the model when the block moves on.
    """

    def __init__(self, model: TracedModel, point: TracedPoint) -> None:
        self.site = point.site
        self.path = point.path
        self.interleaver = model.interleaver
        self._model = model
        self._point = point
        self._version: int | None = None

    def __reduce__(self) -> Any:
        # As the model, a site is not shipped but found again where the job runs.
        return type(self._model).envoy, (self._model, self.site.name)

    @property
    def output(self) -> Tensor:
        """The site's value, in TransformerLens' shape."""
        if not self._model.is_here:
            return self._from_afar()
        self._ask()
        return self.value  # type: ignore[return-value]

    @output.setter
    def output(self, new: Tensor) -> None:
        if not self._model.is_here:
            was = self._from_afar()
            self._check(new, was)
            was.copy_(new)
            return
        self._ask()
        was = Mediator.value(self._point.location)
        self._check(new, was)
        Mediator.swap(self._point.location, new.to(was.device, was.dtype))

    def _check(self, new: Any, was: Tensor) -> None:
        if not isinstance(new, Tensor) or new.shape != was.shape:
            got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise ValueError(f"{self.site.name} is {tuple(was.shape)} here and was set to {got}.")

    def _from_afar(self) -> Tensor:
        """The value in a service's sandbox, where what is written into it goes back by itself.

        NDIF 0.1.2 (ray/sandbox/nns.py, writeback) sends back the very object that it gave.
        """
        if self._model.on_stock_service:
            raw = Mediator.value(raw_location(self._model.path, self.site))
            return shown(self.site, raw, self._model.points.n_heads(self.site))
        served = Mediator.value(self._point.location)
        served.data = served.data.contiguous()
        return served

    def _ask(self) -> None:
        if isinstance(self.interleaver, SiteInterleaver):
            self.interleaver.ask(self._point)

    @eproperty(key="output")
    def value(self, served: Tensor) -> Any:
        """What a block is given."""
        if tracked(served) or 0 in served.stride():
            # Its own copy: what autograd has kept must not be written into.
            return served.clone()
        self._version = _version(served)
        return served

    @value.transform
    def value(self, view: Tensor, served: Tensor) -> Tensor:
        """What goes back: the same object if nothing was written, for the model not to notice."""
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
        self._refuse(kwargs)
        return super().trace(*args, **kwargs)

    def scan(self, *args: Any, fn: Any = None, backend: Any = None, **kwargs: Any) -> ScanningTracer:
        """As the whole model's: shapes without computing."""
        self._refuse(kwargs)
        return ScanningTracer(self, fn or "__call__", *args, backend=backend, **kwargs)

    def session(self, *args: Any, **kwargs: Any) -> Any:
        self._refuse(kwargs)
        return super().session(*args, **kwargs)

    def _refuse(self, kwargs: dict[str, Any]) -> None:
        if kwargs.pop("remote", False):
            raise ValueError(
                f"{self.path} is a part of a model, and NDIF runs whole models. Trace the model, "
                "`with model.trace(..., remote=True):`, and read this part inside."
            )


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version
