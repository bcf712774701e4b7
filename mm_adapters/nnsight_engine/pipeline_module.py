"""A diffusers pipeline as one torch module."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._guards import detect_fake_mode

from mm_adapters.checkpoints.fill_weights import load_weights_into
from mm_adapters.inputs.generators import seeded
from mm_adapters.inputs.pipeline_call import check_run, settled
from mm_adapters.sites.held import place
from mm_adapters.sites.wrappers import inside


class PipelineModule(nn.Module):
    """A pipeline as a module: its parts are its children, calling it runs it.

    nnsight's own (modeling/diffusion.py, _PipelineModule) takes no pipeline that is already here.
    """

    def __init__(self, pipeline: Any) -> None:
        super().__init__()
        self.pipeline = pipeline  # What a call runs.
        self.hold()

    def hold(self) -> None:
        """Has the pipeline's parts as they are now for children."""
        self._modules.clear()
        for name, part in self.pipeline.components.items():
            if isinstance(part, nn.Module):
                self.add_module(name, inside(part))

    def take(self, pipeline: Any) -> None:
        """Runs another pipeline from now on, with the modules that are here, filled with its weights."""
        for name, part in pipeline.components.items():
            module = self._modules.get(name)
            if module is not None and isinstance(part, nn.Module):
                load_weights_into(module, part)
                pipeline.register_modules(**{name: module})
        self.pipeline = pipeline

    def forward(self, *args: Any, seed: Any = None, differentiable: bool = False, **kwargs: Any) -> Any:
        pipe = self.pipeline
        if detect_fake_mode() is None:
            given = kwargs if seed is None else {**kwargs, "seed": seed}
            kwargs = {k: v for k, v in settled(pipe, given).items() if k != "seed"}
            check_run(pipe, given)
        if seed is not None:
            kwargs["generator"] = seeded(seed, place(self.children()) or torch.device("cpu"))
        if differentiable:
            kwargs.setdefault("output_type", "pt")
            # Pipelines are decorated with no_grad; the plain function is underneath.
            call: Any = type(pipe).__call__
            return call.__wrapped__(pipe, *args, **kwargs)
        return pipe(*args, **kwargs)
