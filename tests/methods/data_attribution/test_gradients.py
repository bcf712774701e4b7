"""Per-example gradients beside a loop of backward passes."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from diffusers import DDPMScheduler
from tiny_attribution import pixel_unet
from torch import nn
from torch.nn import functional as F

from methods_multimodal.data_attribution import (
    Task,
    contrastive_task,
    denoiser_task,
    diffusion_examples,
    diffusion_task,
    module_task,
)
from methods_multimodal.data_attribution._layers import LayerCall, _has_windows, rule_for
from methods_multimodal.data_attribution.gradients import Gradients, per_example_gradients
from methods_multimodal.data_attribution.task import Batch, batch_of
from mm_adapters import InputError, wrap


def loop(task: Task, batch: Batch) -> dict[str, dict[str, torch.Tensor]]:
    """One backward pass for each measure and example, by the module's own parameters."""
    own = dict(task.module.named_parameters())
    found: dict[str, dict[str, list[torch.Tensor]]] = {
        m: {n: [] for n in task.parameters} for m in task.measures
    }
    for i in range(len(batch["index"])):
        for measure in task.measures:
            value = task.per_example({k: v[i : i + 1] for k, v in batch.items()})[measure][0]
            grads = torch.autograd.grad(value, [own[n] for n in task.parameters], materialize_grads=True)
            for name, grad in zip(task.parameters, grads, strict=True):
                found[measure][name].append(grad)
    return {m: {n: torch.stack(g) for n, g in per.items()} for m, per in found.items()}


def check(task: Task, batch: Batch, how: Any) -> None:
    made, expected = per_example_gradients(task, batch, mode=how, max_rows=6), loop(task, batch)
    for measure in task.measures:
        for name in task.parameters:
            a, b = made[measure][name], expected[measure][name]
            assert (a - b).norm() <= 1e-5 * b.norm() + 1e-7, (measure, name)


@pytest.mark.parametrize("how", ["layers", "vmap"])
def test_gradients_of_a_pixel_denoiser_equal_a_loop(how: str) -> None:
    task = denoiser_task(
        pixel_unet(), scheduler=DDPMScheduler(), timesteps=[5, 300, 800], measure=["loss", "output_norm"]
    )
    check(task, batch_of({"latents": torch.randn(3, 3, 8, 8)}, 0, 3), how)


@pytest.mark.parametrize("how", ["layers", "vmap"])
@pytest.mark.parametrize("engine", ["hooked", "nnsight"])
def test_gradients_of_a_pipeline_equal_a_loop_through_both_engines(engine: str, how: str) -> None:
    pipe = tiny.stable_diffusion().model
    examples = diffusion_examples(wrap(pipe), torch.rand(3, 3, 16, 16), ["a cat", "a dog", "cat"])
    batch = batch_of(examples, 0, 3)
    bare = denoiser_task(pipe.unet, pipe.scheduler, timesteps=2)
    expected = per_example_gradients(bare, batch, mode=how)["loss"]  # type: ignore[arg-type]
    task = diffusion_task(wrap(pipe, engine=engine), timesteps=2)
    check(task, batch, how)
    made = per_example_gradients(task, batch, mode=how)["loss"]  # type: ignore[arg-type]
    assert all(torch.equal(made[name], expected[name]) for name in bare.parameters)


def test_gradients_of_a_contrastive_pair_equal_a_loop() -> None:
    case = tiny.clip()
    task = contrastive_task(wrap(case.model), case.inputs, scale=10.0, parameters=["*mlp*", "*projection*"])
    batch = {**case.inputs, "index": torch.arange(2)}
    for how in ("layers", "loop"):
        check(task, batch, how)
    # A position's embedding is looked up once for all rows, so layers cannot tell rows apart there.
    everything = contrastive_task(wrap(case.model), case.inputs, scale=10.0)
    # Its code looks at the mask's values, so vmap cannot run it.
    assert Gradients(everything, batch).mode == "loop"
    check(everything, batch, "auto")


class Odd(nn.Module):
    """Every layer with a rule, one of them called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 8, padding_idx=0)
        self.mix = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
        self.wide = nn.Conv2d(6, 4, 3, padding="same", dilation=2, bias=False)
        self.groups = nn.GroupNorm(2, 4)
        self.tied = nn.Linear(8, 8, bias=False)
        self.use_tied = False

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.mix(torch.tanh(self.mix(self.words(ids))))
        x = x + F.linear(x, self.tied.weight.square()) if self.use_tied else x
        x = self.norm(self.tied(x))
        x = torch.tanh(self.conv(x.unflatten(1, (4, -1))))
        return torch.sin(3 * self.groups(self.wide(x))).mean((1, 2, 3))


CONVOLUTIONS: dict[str, dict] = {
    "windows": {"kernel_size": 3, "padding": 1},
    "point": {"kernel_size": 1},
    "not square, in groups": {"kernel_size": (1, 3), "padding": (0, 2), "dilation": (1, 2), "groups": 2},
    "same, in groups": {"kernel_size": (5, 3), "padding": "same", "groups": 4},
    "more padding than reach": {"kernel_size": 2, "padding": 3},
    "stride": {"kernel_size": 3, "padding": 1, "stride": 2},
    "wide margins": {"kernel_size": 7, "padding": 3},
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolutions_rule_equals_a_backward_pass_for_each_row(name: str) -> None:
    torch.manual_seed(0)
    out = 96 if name == "wide margins" else 8
    conv = nn.Conv2d(4, out, **CONVOLUTIONS[name]).double()
    given = torch.randn(6, 4, 7, 6, dtype=torch.float64)
    gradient = torch.randn_like(conv(given))
    seen = LayerCall(given, gradient)
    assert _has_windows(conv, seen) == (name not in ("stride", "wide margins"))
    rule = rule_for(conv)
    assert rule is not None
    found = rule(conv, seen, 2)  # Two examples of three rows each.
    for example in range(2):
        rows = slice(3 * example, 3 * example + 3)
        expected = torch.autograd.grad(conv(given[rows]), [conv.weight, conv.bias], gradient[rows])  # type: ignore[list-item]
        torch.testing.assert_close(found["weight"][example], expected[0])
        torch.testing.assert_close(found["bias"][example], expected[1])


def test_a_convolution_with_lopsided_padding_has_no_rule() -> None:
    assert rule_for(nn.Conv2d(4, 4, 2, padding="same")) is None
    assert rule_for(nn.Conv2d(4, 4, 2, padding="same", dilation=2)) is not None


def odd_task(net: nn.Module) -> Task:
    return module_task(net, {"square": lambda call, b: call(b["ids"])})


def test_every_rule_equals_a_loop_also_for_a_layer_called_twice() -> None:
    task, batch = odd_task(Odd().eval()), batch_of({"ids": torch.randint(0, 7, (5, 24))}, 0, 5)
    for how in ("layers", "vmap", "loop"):
        check(task, batch, how)


def test_weights_that_are_used_elsewhere_are_noticed() -> None:
    net = Odd().eval()
    net.use_tied = True
    task, batch = odd_task(net), batch_of({"ids": torch.randint(0, 7, (5, 24))}, 0, 5)
    assert Gradients(task, batch).mode == "vmap"
    check(task, batch, "auto")
    with pytest.raises(InputError, match="away from a backward pass"):
        Gradients(task, batch, mode="layers")


def test_gradients_of_a_checkpoint_are_those_of_a_module_with_its_weights() -> None:
    net, other = Odd().eval(), Odd().eval()
    batch = batch_of({"ids": torch.randint(0, 7, (3, 24))}, 0, 3)
    for how in ("layers", "vmap"):
        made = per_example_gradients(odd_task(net), batch, other.state_dict(), mode=how)["square"]  # type: ignore[arg-type]
        expected = per_example_gradients(odd_task(other), batch, mode=how)["square"]  # type: ignore[arg-type]
        assert all(torch.equal(made[n], expected[n]) for n in made)


def test_a_unit_mean_averages_directions() -> None:
    task = denoiser_task(pixel_unet(), scheduler=DDPMScheduler(), timesteps=[5, 300])
    batch = batch_of({"latents": torch.randn(2, 3, 8, 8)}, 0, 2)
    single = [denoiser_task(task.module, scheduler=DDPMScheduler(), timesteps=[t]) for t in (5, 300)]
    parts = [Gradients(s, batch).full(batch)[0]["loss"] for s in single]
    expected = torch.stack([F.normalize(p, dim=1) for p in parts]).mean(0)
    torch.testing.assert_close(Gradients(task, batch).unit(batch)[0]["loss"], expected, rtol=1e-4, atol=1e-6)


def test_a_module_in_training_is_refused() -> None:
    with pytest.raises(InputError, match="training mode"):
        Gradients(odd_task(Odd().train()), batch_of({"ids": torch.zeros(1, 24, dtype=torch.long)}, 0, 1))
