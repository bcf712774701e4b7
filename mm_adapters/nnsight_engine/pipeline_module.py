"""A diffusers pipeline as one torch module."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mm_adapters.checkpoints.fill_weights import load_weights_into


class PipelineModule(nn.Module):
    """A pipeline as a module: its parts are its children, calling it runs it.

    nnsight's own (modeling/diffusion.py, _PipelineModule) takes no pipeline that is already here.
    """

    def __init__(self, pipeline: Any) -> None:
        super().__init__()
        self.__dict__["pipeline"] = pipeline
        for name, part in pipeline.components.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)

    @property
    def pipeline(self) -> Any:
        """The pipeline that a call runs."""
        return self.__dict__["pipeline"]

    def take(self, pipeline: Any) -> None:
        """Runs another pipeline from now on, with the modules that are here, filled with its weights."""
        for name, part in pipeline.components.items():
            mine = self._modules.get(name)
            if mine is not None and isinstance(part, nn.Module):
                load_weights_into(mine, part)
                pipeline.register_modules(**{name: mine})
        self.__dict__["pipeline"] = pipeline

    def forward(self, *args: Any, seed: Any = None, differentiable: bool = False, **kwargs: Any) -> Any:
        pipe = self.pipeline
        if seed is not None and kwargs.get("generator") is None:
            device = next(self.parameters()).device
            many = isinstance(seed, list | tuple)
            made = [torch.Generator(device).manual_seed(int(s)) for s in (seed if many else [seed])]
            kwargs["generator"] = made if many else made[0]
        if differentiable:
            kwargs.setdefault("output_type", "pt")
            # Pipelines are decorated with no_grad; the plain function is underneath.
            call: Any = type(pipe).__call__
            return call.__wrapped__(pipe, *args, **kwargs)
        return pipe(*args, **kwargs)
