"""PyTorch's own tools (torch.func, torch.export) and safetensors, on a tower and on a model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap

import mm_adapters as mm
from tests.hooked_opt import raw_opt
from tests.neighbours import TOKENS, Embeds, Logits, fresh, model, pictures

# torch has no batched form of its CPU kernel of attention, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")


def both(what: str) -> tuple[Any, nn.Module, Tensor]:
    """A tower, the plain module that computes the same, and what both are called with."""
    if what == "language":
        return model("tiny-llava").language, Logits(model("tiny-llava").wrapped), TOKENS
    return model("tiny-clip").vision, Embeds(model("tiny-clip").wrapped), pictures()


each = pytest.mark.parametrize("what", ["vision", "language"])


@each
def test_a_functional_call_with_other_weights(what: str) -> None:
    ours, theirs, x = both(what)
    other = {name: p.detach() * 1.1 for name, p in ours.named_parameters()}
    changed = copy.deepcopy(theirs)
    prefix = "llava." if what == "language" else "clip."
    with torch.no_grad():
        for name, p in changed.named_parameters():
            if (local := name.removeprefix(prefix)) in other:
                p.copy_(other[local])
        before = ours(x)
        assert torch.equal(functional_call(ours, other, (x,)), changed(x))
        assert not torch.equal(changed(x), before)
        assert torch.equal(ours(x), before)


def test_a_functional_call_of_the_model_with_a_weight_at_its_top() -> None:
    clip = model("tiny-clip")
    call = {"input_ids": TOKENS, "pixel_values": pictures()}
    weights = dict(clip.named_parameters())
    with torch.no_grad():
        before = clip(**call).logits_per_image
        for name in ("logit_scale", "visual_projection.weight"):
            other = {name: torch.rand_like(weights[name])}
            got, want = (functional_call(m, other, (), call).logits_per_image for m in (clip, clip.wrapped))
            assert torch.equal(got, want)
            assert not torch.equal(got, before)
        assert torch.equal(clip(**call).logits_per_image, before)


def test_per_sample_gradients_are_those_of_one_sample_at_a_time() -> None:
    ours, theirs, x = both("vision")
    weights = {n: p.detach() for n, p in ours.named_parameters()}

    def loss(params: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(ours, params, (row[None],)).pow(2).sum()

    got = vmap(grad(loss), in_dims=(None, 0))(weights, x)
    for i in range(len(x)):
        theirs.zero_grad()
        theirs(x[i : i + 1]).pow(2).sum().backward()
        for name, p in theirs.clip.named_parameters():
            if name in got:
                torch.testing.assert_close(got[name][i], p.grad, rtol=1e-3, atol=1e-4)
    theirs.zero_grad()


def test_jacobians_and_vmap() -> None:
    ours, theirs, x = both("vision")
    got, want = (jacrev(lambda row, m=m: m(row[None])[0, :8])(x[0]) for m in (ours, theirs))
    assert torch.equal(got, want)
    assert got.abs().sum() > 1
    torch.testing.assert_close(vmap(lambda row: ours(row[None])[0])(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_a_jacobian_through_hooks() -> None:
    ours, _, x = both("vision")
    value = ours.run_with_cache(x[:1])[1]["resid_post", 1].detach()

    def from_stream(v: Tensor) -> Tensor:
        return ours.run_with_hooks(x[:1], fwd_hooks=[("blocks.1.hook_resid_post", lambda _, hook: v)])[0, :4]

    got = jacrev(from_stream)(value)
    tracked = value.clone().requires_grad_()
    outputs = from_stream(tracked).unbind()
    want = torch.stack([torch.autograd.grad(y, tracked, retain_graph=True)[0] for y in outputs])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_what_is_exported_is_the_model_inside() -> None:
    clip = model("tiny-clip")
    call = {"input_ids": TOKENS, "pixel_values": pictures()}
    with torch.no_grad():
        program = torch.export.export(clip.wrapped, (), call).module()
        assert torch.equal(program(**call).logits_per_image, clip(**call).logits_per_image)
        for net, args, named in (
            (clip, (), call),
            (clip.vision, (pictures(),), {}),
            (model("tiny-llava").language, (TOKENS,), {}),
        ):
            with pytest.raises(mm.InputError, match=r"torch\.export\.export\(model\.wrapped"):
                torch.export.export(net, args, named)
        assert torch.equal(clip.vision(pictures()), Embeds(clip.wrapped)(pictures()))


@each
def test_safetensors_hold_a_towers_state(what: str, tmp_path: Path) -> None:
    ours, theirs, x = both(what)
    save_file(ours.state_dict(), tmp_path / "tower.safetensors")
    other = fresh("tiny-llava" if what == "language" else "tiny-clip").tower(what)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
        assert not torch.equal(other(x), theirs(x))
        assert not any(other.load_state_dict(load_file(tmp_path / "tower.safetensors")))
        assert torch.equal(other(x), theirs(x))


def test_safetensors_keep_tied_weights_tied(tmp_path: Path) -> None:
    ours, other = (mm.wrap(raw_opt(seed)) for seed in (0, 3))
    with pytest.raises(RuntimeError, match="share memory"):  # As of the wrapped model's own state.
        save_file(ours.language.state_dict(), tmp_path / "opt.safetensors")
    save_model(ours.language, str(tmp_path / "opt.safetensors"))
    with torch.no_grad():
        assert not torch.equal(other.language(TOKENS), ours.language(TOKENS))
        load_model(other.language, str(tmp_path / "opt.safetensors"))
        assert torch.equal(other.language(TOKENS), ours.language(TOKENS))
    assert other.wrapped.lm_head.weight is other.wrapped.model.decoder.embed_tokens.weight
    assert torch.equal(other.language.W_U, other.language.W_E.T)
