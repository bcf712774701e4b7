"""A sampling loop that was stopped goes on at its step, to the bits that it would have given."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import diffusers as df
import pytest
import tiny
import torch
from torch import Tensor, nn

import mm_adapters as mm
from mm_adapters.store import kept_calls
from tests.runs.watched import ENGINES

OUT, INNER = "denoiser.hook_out", "denoiser.blocks.0.hook_resid_post"
CASES = ("stable_diffusion", "flux", "stable_diffusion_3", "pixart", "deepfloyd_if", "kandinsky_3")
SCHEDULERS = {
    "ddim": df.DDIMScheduler,
    "ancestral": df.EulerAncestralDiscreteScheduler,  # Draws noise at each step.
    "heun": df.HeunDiscreteScheduler,
    "unipc": df.UniPCMultistepScheduler,
}


class Stopped(Exception):
    """In place of a kill."""


@contextlib.contextmanager
def computed(model: Any, stop_at: int | None = None) -> Iterator[list[int]]:
    """Counts the calls that the denoiser computes, by its first leaf; stops the run at one of them."""
    leaf = next(m for m in model.towers["denoiser"].module.modules() if not list(m.children()))
    calls: list[int] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(len(calls))
        if stop_at is not None and len(calls) > stop_at:
            raise Stopped

    handle = leaf.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def tensors(run: mm.Run) -> dict[str, Tensor]:
    images = run.output[0] if isinstance(run.output, tuple) else next(iter(run.output.values()))
    return {**run.values, "output": torch.as_tensor(images)}


def same(one: mm.Run, other: mm.Run) -> None:
    assert tensors(one).keys() == tensors(other).keys()
    assert all(torch.equal(value, tensors(other)[name]) for name, value in tensors(one).items())
    assert one.receipts == other.receipts
    assert one.calls == other.calls
    assert one.rows == other.rows


def stopped_and_gone_on(
    model: Any, inputs: Any, folder: Path, stop_at: int, **asked: Any
) -> tuple[mm.Run, int]:
    """The run that goes on, and how many calls it computes."""
    with computed(model, stop_at), pytest.raises(Stopped), kept_calls(model, folder):
        model.run(inputs, **asked)
    with computed(model) as calls, kept_calls(model, folder):
        run = model.run(inputs, **asked)
    assert not folder.exists(), "what was made of the calls is not stored inside"
    return run, len(calls)


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_stopped_loop_goes_on_at_its_step_bit_for_bit(tmp_path: Path, scheduler: str, engine: Any) -> None:
    case = tiny.CASES["stable_diffusion"]()
    case.model.scheduler = SCHEDULERS[scheduler]()
    model = mm.wrap(case.model, engine=engine)
    inputs = {"prompt": "a cat", "num_inference_steps": 5, "seed": 3, "output_type": "pt"}
    read = [
        OUT,
        mm.Read("denoiser.hook_in"),
        mm.Read(INNER, lambda x: x.mean(-1)),
        "text.blocks.0.hook_resid_pre",
    ]
    with computed(model) as calls:
        whole = model.run(inputs, read=read)
    run, n = stopped_and_gone_on(model, inputs, tmp_path / "calls", 3, read=read)
    assert n == len(calls) - 3
    same(run, whole)


@pytest.mark.parametrize("engine", ENGINES)
def test_edits_and_their_receipts_are_as_in_a_run_without_a_stop(tmp_path: Path, engine: Any) -> None:
    case = tiny.CASES["stable_diffusion"]()
    model = mm.wrap(case.model, engine=engine)
    inputs = {"prompt": "a cat", "num_inference_steps": 5, "seed": 3, "output_type": "pt"}
    edit = [
        mm.Edit(INNER, lambda x: x * 1.5, steps=[0, 2]),
        mm.Edit(INNER, lambda x: x + 1, steps=[1]),
        mm.Edit("denoiser.hook_in", lambda x: x * 1.01),
        mm.Edit("text.blocks.0.hook_resid_pre", lambda x: x * 0.9),
    ]
    whole = model.run(inputs, read=[OUT], edit=edit)
    plain = model.run(inputs, read=[OUT])
    assert not torch.equal(plain[OUT], whole[OUT])
    run, n = stopped_and_gone_on(model, inputs, tmp_path / "calls", 4, read=[OUT], edit=edit)
    assert n == 1
    same(run, whole)


@pytest.mark.parametrize("name", CASES)
def test_other_families_loops_go_on_too(tmp_path: Path, name: str) -> None:
    case = tiny.CASES[name]()
    model = mm.wrap(case.model)
    loop = model.record.loop or "denoiser"
    inputs = (
        {**case.inputs, "num_inference_steps": 3} if "num_inference_steps" in case.inputs else case.inputs
    )
    read = [f"{loop}.{model.record.sampling_of(loop).prediction}"]
    with computed(model) as calls:
        whole = model.run(inputs, read=read)
    run, n = stopped_and_gone_on(model, inputs, tmp_path / "calls", len(calls) - 1, read=read)
    assert n <= len(calls) // 2
    same(run, whole)


def test_what_a_loop_is_given_must_be_the_same_for_a_call_to_be_taken(tmp_path: Path) -> None:
    model = mm.wrap(tiny.CASES["stable_diffusion"]().model)
    inputs = {"prompt": "a cat", "num_inference_steps": 4, "seed": 3, "output_type": "pt"}
    for other in ({"prompt": "a dog"}, {"seed": 4}, {"num_inference_steps": 5}, {"guidance_scale": 2.0}):
        whole = model.run(inputs | other, read=[OUT])
        with computed(model, 2), pytest.raises(Stopped), kept_calls(model, tmp_path / "calls"):
            model.run(inputs, read=[OUT])
        with kept_calls(model, tmp_path / "calls"):
            same(model.run(inputs | other, read=[OUT]), whole)


def test_calls_that_another_reduce_was_given_are_computed_again(tmp_path: Path) -> None:
    model = mm.wrap(tiny.CASES["stable_diffusion"]().model)
    inputs = {"prompt": "a cat", "num_inference_steps": 4, "seed": 3, "output_type": "pt"}

    class Sum:
        total = torch.zeros(())

        def __call__(self, value: Tensor, call: mm.Call) -> Tensor:
            return self.add(self.part(value, call), call)

        def part(self, value: Tensor, call: mm.Call) -> Tensor:
            return value.sum()

        def add(self, part: Tensor, call: mm.Call) -> Tensor:
            self.total = self.total + part
            return part.new_zeros(0)

    whole = model.run(inputs, read=[INNER])[INNER]
    with computed(model, 2), pytest.raises(Stopped), kept_calls(model, tmp_path / "calls"):
        model.run(inputs, read=[mm.Read(INNER, lambda x: x.mean())])
    gathering = Sum()
    with computed(model) as calls, kept_calls(model, tmp_path / "calls"):
        model.run(inputs, read=[mm.Read(INNER, gathering)])
    assert len(calls) == 4
    assert torch.allclose(gathering.total, whole.sum(), rtol=1e-5)


def test_calls_that_are_damaged_are_computed_again(tmp_path: Path) -> None:
    model, folder = mm.wrap(tiny.CASES["stable_diffusion"]().model), tmp_path / "calls"
    inputs = {"prompt": "a cat", "num_inference_steps": 4, "seed": 3, "output_type": "pt"}
    whole = model.run(inputs, read=[OUT])
    with computed(model, 3), pytest.raises(Stopped), kept_calls(model, folder):
        model.run(inputs, read=[OUT])
    for file in sorted(folder.iterdir()):
        raw = bytearray(file.read_bytes())
        raw[-3] ^= 1
        file.write_bytes(raw)
    with computed(model) as calls, kept_calls(model, folder):
        same(model.run(inputs, read=[OUT]), whole)
    assert len(calls) == 4


def test_of_several_parts_the_one_that_was_stopped_goes_on(tmp_path: Path) -> None:
    model, folder = mm.wrap(tiny.CASES["stable_diffusion"]().model), tmp_path / "calls"
    parts = [{"prompt": "a cat", "num_inference_steps": 4, "seed": i, "output_type": "pt"} for i in range(3)]
    wholes = [model.run(part, read=[OUT]) for part in parts]

    def draw(numbers: Iterable[int]) -> list[mm.Run]:
        runs: list[mm.Run] = []
        with kept_calls(model, folder) as calls:
            for i in numbers:
                calls.begin(f"part {i}")
                runs.append(model.run(parts[i], read=[OUT]))
        return runs

    with computed(model, 6), pytest.raises(Stopped):
        draw(range(3))
    with computed(model) as counted:
        later = draw([1, 2])  # What was made of the first is stored elsewhere.
    for run, whole in zip(later, wholes[1:], strict=True):
        same(run, whole)
    assert len(counted) == 2 + 4


def test_a_denoiser_with_a_cache_computes_everything(tmp_path: Path) -> None:
    case = tiny.CASES["flux"]()
    model = mm.wrap(case.model)
    cache = df.FirstBlockCacheConfig(threshold=0.0)  # pyright: ignore[reportPrivateImportUsage]
    case.model.transformer.enable_cache(cache)
    read = ["text.blocks.0.hook_resid_pre"]  # With a cache the denoiser has no sites.
    with computed(model) as first:
        whole = model.run(case.inputs, read=read)
    run, n = stopped_and_gone_on(model, case.inputs, tmp_path / "calls", len(first) - 1, read=read)
    assert n == len(first)
    same(run, whole)


def test_gradients_are_of_the_whole_loop(tmp_path: Path) -> None:
    model = mm.wrap(tiny.CASES["stable_diffusion"]().model)
    inputs = {"prompt": "a cat", "num_inference_steps": 3, "seed": 3, "output_type": "pt"}

    def brightness(output: Any) -> Tensor:
        return output[0].mean()

    whole = model.run(inputs, read=[OUT], grad_of=brightness)
    with kept_calls(model, tmp_path / "calls"):
        run = model.run(inputs, read=[OUT], grad_of=brightness)
        assert not list((tmp_path / "calls").iterdir())
    assert torch.equal(run.grads[OUT], whole.grads[OUT])
    assert bool(run.grads[OUT].any())


@pytest.mark.parametrize("engine", ENGINES)
def test_word_maps_and_blocked_attention_gather_what_was_kept(tmp_path: Path, engine: Any) -> None:
    from methods_multimodal.cross_attention import word_maps
    from methods_multimodal.cross_attention.cases import Case
    from methods_multimodal.cross_attention.generation import generate_checked
    from methods_multimodal.cross_attention.tracing import knockout_edits

    model = mm.wrap(tiny.CASES["stable_diffusion"]().model, engine=engine)
    inputs = {"prompt": "a cat", "num_inference_steps": 4, "seed": 3, "output_type": "pt"}
    for keep in (("step",), ("step", "head"), ()):
        with kept_calls(model, tmp_path / "whole"):
            whole, _ = word_maps(model, inputs, keep=keep, spread=True)
        with computed(model, 3), pytest.raises(Stopped), kept_calls(model, tmp_path / "calls"):
            word_maps(model, inputs, keep=keep, spread=True)
        with computed(model) as calls, kept_calls(model, tmp_path / "calls"):
            maps, _ = word_maps(model, inputs, keep=keep, spread=True)
        assert len(calls) == 1
        assert maps.n_steps == whole.n_steps == 4
        assert torch.equal(maps.affinity, whole.affinity)
        assert all(torch.equal(m, whole.by_grid[grid]) for grid, m in maps.by_grid.items())
        plain, _ = word_maps(model, inputs, keep=keep, spread=True)
        for grid, m in plain.by_grid.items():
            torch.testing.assert_close(maps.by_grid[grid], m, rtol=1e-6, atol=1e-8)
    options = {"num_inference_steps": 4}
    blocked = knockout_edits(model, Case("a cat", "cat"), 0, options=options)
    whole_picture = generate_checked(model, ["a cat"], 3, blocked, options)
    with computed(model, 2), pytest.raises(Stopped), kept_calls(model, tmp_path / "calls"):
        generate_checked(model, ["a cat"], 3, blocked, options)
    with computed(model) as calls, kept_calls(model, tmp_path / "calls"):
        assert torch.equal(generate_checked(model, ["a cat"], 3, blocked, options), whole_picture)
    assert len(calls) == 2
