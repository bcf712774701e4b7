"""What a model is besides its answers: weights, hooks, modes, and the output on a fixed input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from tests.fuzz.subjects import Subject


def parts(wrapped: Any) -> dict[str, nn.Module]:
    """The modules of a model, or of a pipeline's components."""
    if isinstance(wrapped, nn.Module):
        return {"": wrapped}
    return {k: v for k, v in wrapped.components.items() if isinstance(v, nn.Module)}


def modules(wrapped: Any) -> Iterator[tuple[str, nn.Module]]:
    for name, part in parts(wrapped).items():
        yield from part.named_modules(prefix=name)


class State:
    """A model as it was before the calls."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.given = subject.draw(Random(1)).ours
        if subject.is_pipeline:
            self.given = self.given | {"num_inference_steps": 1}
        self.output = self._output()
        self.weights = {name: value.detach().clone() for name, value in self._tensors()}
        self.form = self._form()

    def changed(self) -> list[str]:
        """What is no more as it was, in words; nothing if the model is bit-identical."""
        came = modes()
        restore_modes()
        form = self._form()
        came += [f"{k}: {self.form.get(k)} -> {form.get(k)}" for k in self.form.keys() | form.keys()
                 if self.form.get(k) != form.get(k)][:3]  # fmt: skip
        now = dict(self._tensors())
        came += [f"{n} changed" for n, v in self.weights.items() if n not in now or not _same(v, now[n])][:3]
        try:
            output = self._output()
        except Exception as error:  # noqa: BLE001
            return [*came, f"the next run fails: {type(error).__name__}: {error}"[:160]]
        if not _same(output, self.output):
            came.append("the output on a fixed input is another")
        return came

    def _output(self) -> Tensor:
        torch.manual_seed(0)
        return self.subject.head(self.subject.model.run(self.given).output).detach().clone()

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, part in parts(self.subject.model.wrapped).items():
            for key, value in (*part.named_parameters(), *part.named_buffers()):
                yield f"{name}.{key}", value

    def _form(self) -> dict[str, Any]:
        form: dict[str, Any] = {}
        for name, module in modules(self.subject.model.wrapped):
            hooks = tuple(
                sum(_is_ours(hook) for hook in getattr(module, f"_{kind}_hooks").values())
                for kind in ("forward_pre", "forward", "backward_pre", "backward")
            )
            form[f"hooks of {name}"] = hooks
            form[f"mode of {name}"] = (module.training, id(module), type(module).__name__)
            processor = getattr(module, "processor", None)
            if processor is not None:
                form[f"processor of {name}"] = type(processor).__name__
            config = getattr(module, "config", None)
            if hasattr(config, "_attn_implementation"):
                form[f"attention of {name}"] = config._attn_implementation  # type: ignore[union-attr]
            for key, weight in module.named_parameters(recurse=False):
                form[f"gradient of {name}.{key}"] = (weight.requires_grad, weight.grad is None)
        points = getattr(self.subject.model, "hook_dict", {})
        form["hooks on points"] = sum(len(p._forward_hooks) + len(p._backward_hooks) for p in points.values())
        return form


def _is_ours(hook: Any) -> bool:
    # transformers puts hooks of its own on when hidden states are first asked for, and leaves them.
    module = getattr(getattr(hook, "__func__", hook), "__module__", None) or ""
    return module.partition(".")[0] not in ("transformers", "diffusers", "accelerate")


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b))


def modes() -> list[str]:
    """The modes of torch that a call left switched."""
    left = []
    if not torch.is_grad_enabled():
        left.append("gradients are off")
    if torch.is_inference_mode_enabled():
        left.append("inference mode is on")
    if torch.get_default_dtype() != torch.float32:
        left.append("the default dtype is another")
    if len(torch_module._global_forward_hooks) + len(torch_module._global_forward_pre_hooks):
        left.append("torch has hooks for every module")
    return left


def restore_modes() -> None:
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)


@contextmanager
def counted(wrapped: Any) -> Iterator[list[str]]:
    """The modules of a model that run, in order."""
    names = {id(module): name for name, module in modules(wrapped)}
    ran: list[str] = []

    def note(module: nn.Module, args: Any) -> None:
        if id(module) in names and len(ran) < 10:
            ran.append(names[id(module)] or type(module).__name__)

    handle = torch_module.register_module_forward_pre_hook(note)
    try:
        yield ran
    finally:
        handle.remove()
