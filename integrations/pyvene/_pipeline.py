"""A diffusers pipeline as the one module that pyvene works on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import nn

from mm_adapters import Model

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

ModelLike: TypeAlias = "Model | nn.Module | DiffusionPipeline"


def host(model: ModelLike) -> Any:
    """The module pyvene is given: the model itself, or a pipeline's stand-in."""
    wrapped = getattr(model, "wrapped", model)
    return wrapped if isinstance(wrapped, nn.Module) else PipelineHost.of(wrapped)


class PipelineHost(nn.Module):
    """A pipeline as a module: what pyvene needs to call one. Its parts are found under their names."""

    def __init__(self, pipeline: Any) -> None:
        super().__init__()
        self.__dict__["pipeline"] = pipeline
        for name, part in pipeline.components.items():
            if isinstance(part, nn.Module):
                self.__dict__.setdefault("_modules", {})[name] = part

    @classmethod
    def of(cls, pipeline: Any) -> PipelineHost:
        """The same stand-in for the same pipeline; its class is the pipeline's own."""
        kind = _HOST_KINDS.setdefault(type(pipeline), type(f"{type(pipeline).__name__}Host", (cls,), {}))
        host = pipeline.__dict__.get("_mm_pyvene_host")
        if host is None:
            host = kind(pipeline)
            pipeline.__dict__["_mm_pyvene_host"] = host
        return host

    @property
    def config(self) -> Any:
        return SimpleNamespace(to_dict=dict)

    @property
    def device(self) -> Any:
        return self.__dict__["pipeline"].device

    def forward(self, **kwargs: Any) -> Any:
        return self.__dict__["pipeline"](**kwargs)

    def generate(self, **kwargs: Any) -> Any:
        return self.__dict__["pipeline"](**kwargs)


_HOST_KINDS: dict[type, type] = {}
