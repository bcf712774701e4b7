"""The three kinds of models that states are tried on: where the library keeps a block and its attention."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
import zoo_inputs
from torch import Tensor, nn

import mm_adapters as mm


@dataclass(frozen=True)
class Kind:
    """A model of the zoo. `block`, `attention` and `out` are paths in the library's own model."""

    zoo: str
    tower: str
    layer: int
    block: str
    attention: str
    query: str
    out: str
    heads: int

    @property
    def prefix(self) -> str:
        """The names of the block's sites begin so."""
        return f"{self.tower}.blocks.{self.layer}"

    def module(self, raw: Any, path: str = "") -> nn.Module:
        """The library's module at a path inside the block."""
        return attrgetter(".".join(filter(None, (self.block, path))))(raw)

    def fresh(self) -> Any:
        """A model of its own, as the library loads it."""
        return copy.deepcopy(_loaded(self.zoo).wrapped)

    def inputs(self) -> dict[str, Any]:
        """What the model is run with, prepared."""
        given = zoo_inputs.INPUTS[self.zoo]
        if self.zoo == "tiny-sd":
            return given | {"num_inference_steps": 1, "output_type": "latent"}
        return _loaded(self.zoo).prepare(**given)

    def before(self) -> Seen:
        """What is seen in the model as it is loaded."""
        return _seen_before(self)


KINDS = {
    "contrastive": Kind(
        "tiny-clip", "vision", 1, "vision_model.encoder.layers.1", "self_attn", "q_proj", "out_proj", 4
    ),
    "vlm": Kind(
        "tiny-llava", "language", 1, "model.language_model.layers.1", "self_attn", "q_proj", "o_proj", 4
    ),
    "diffusion": Kind(
        "tiny-sd",
        "denoiser",
        2,
        "unet.mid_block.attentions.0.transformer_blocks.0",
        "attn1",
        "to_q",
        "to_out.0",
        2,
    ),
}


@functools.cache
def _loaded(name: str) -> Any:
    return mm.load(name, device="cpu")


@functools.cache
def _seen_before(kind: Kind) -> Seen:
    return watch(kind, _loaded(kind.zoo).wrapped)


@dataclass(frozen=True)
class Seen:
    """What plain hooks on the library's model saw in one run, and what it gave."""

    query: Tensor
    z: Tensor
    resid: Tensor
    output: Tensor
    halved: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.query, self.z, self.resid))


def watch(kind: Kind, raw: Any) -> Seen:
    """The queries, what the attention's output projection is given, and the block's output, by plain hooks;
    the model's output, and its output with the block's halved."""
    attention = kind.module(raw, kind.attention)
    kept: dict[str, Tensor] = {}
    hooks: dict[nn.Module, Callable[..., Any]] = {
        attention.get_submodule(kind.query): lambda m, a, o: kept.update(q=o),
        attention.get_submodule(kind.out): lambda m, a, o: kept.update(z=a[0]),
        kind.module(raw): lambda m, a, o: kept.update(resid=_first(o)),
    }
    with _hooked(hooks):
        output = call(kind, raw)
    with _hooked({kind.module(raw): lambda m, a, o: o / 2 if isinstance(o, Tensor) else (o[0] / 2, *o[1:])}):
        halved = call(kind, raw)
    query, z = (kept[n].unflatten(-1, (kind.heads, -1)) for n in "qz")
    return Seen(query, z, kept["resid"], output, halved)


def call(kind: Kind, raw: Any) -> Tensor:
    """The output of the library's model, called as its own users do."""
    inputs = kind.inputs()
    seed = inputs.pop("seed", None)
    if seed is not None:
        inputs["generator"] = torch.Generator().manual_seed(seed)
        raw.set_progress_bar_config(disable=True)
    with torch.no_grad():
        return numbers(raw(**inputs))


def numbers(output: Any) -> Tensor:
    """The tensor of a model's output that the whole model makes."""
    for name in ("logits_per_image", "logits", "images"):
        if getattr(output, name, None) is not None:
            return torch.as_tensor(getattr(output, name))
    raise AssertionError(type(output))


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@contextmanager
def _hooked(hooks: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
