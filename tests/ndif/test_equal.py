"""What comes back from a service is what this machine computes, for each kind of model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nnsight
import pytest
import torch
from zoo_inputs import INPUTS

import mm_adapters as mm
from mm_adapters.ndif_client.backend import Dispatch

Load = Callable[[str], Any]


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def same_run(a: mm.Run, b: mm.Run) -> None:
    assert set(a.values) == set(b.values) != set()
    for site, value in a.values.items():
        torch.testing.assert_close(value, b[site], rtol=1e-5, atol=1e-5, msg=site)
    assert [r.site for r in a.receipts] == [r.site for r in b.receipts]
    for one, other in zip(a.receipts, b.receipts, strict=True):
        assert one.fired == other.fired > 0
        assert one.moved == pytest.approx(other.moved, rel=1e-4)
        assert one.moved > 0
    assert a.rows == b.rows


def test_a_run_of_clip(host: str, load: Load) -> None:
    model = load("tiny-clip")
    read = [
        "vision.blocks.1.attn.hook_pattern",
        "vision.blocks.2.hook_resid_mid",
        "text.blocks.0.attn.hook_z",
        mm.Read("text.blocks.1.hook_resid_post", reduce=lambda x: x.mean(1)),
    ]
    edit = [
        mm.Edit("vision.blocks.0.attn.hook_pattern", lambda p: p.flip(-1)),
        mm.Edit("text.blocks.0.hook_resid_pre", lambda x: x * 2, positions=[1]),
    ]
    here = model.run(INPUTS["tiny-clip"], read=read, edit=edit)
    there = model.run(INPUTS["tiny-clip"], read=read, edit=edit, remote=host)
    same_run(here, there)
    close(here.output.logits_per_image, there.output.logits_per_image)
    plain = model.run(INPUTS["tiny-clip"]).output.logits_per_image
    assert (there.output.logits_per_image - plain).abs().max() > 1e-3


def test_a_block_of_clip(host: str, load: Load) -> None:
    model = load("tiny-clip")
    inputs = INPUTS["tiny-clip"]
    z, layer, out = (torch.empty(0),) * 3
    with torch.no_grad(), model.trace(**inputs):
        z = model.site("vision.blocks.1.attn.hook_z").save()
        model.site("vision.blocks.2.attn.hook_pattern")[:] = 0
        layer = model.vision_model.encoder.layers[2].output.save()
        out = model.output.logits_per_image.save()
    expected = z, layer, out
    with model.trace(**inputs, remote=host):
        z = model.site("vision.blocks.1.attn.hook_z").save()
        model.site("vision.blocks.2.attn.hook_pattern")[:] = 0
        layer = model.vision_model.encoder.layers[2].output.save()
        out = model.output.logits_per_image.save()
    for a, b in zip(expected, (z, layer, out), strict=True):
        close(a.detach(), b.detach())


def test_images_alone_and_texts_alone(host: str, load: Load) -> None:
    model = load("tiny-clip")
    for part, site in (
        ("images", "vision.blocks.1.hook_resid_post"),
        ("text", "text.blocks.1.hook_resid_post"),
    ):
        inputs = {part: INPUTS["tiny-clip"][part]}
        there = torch.empty(0)
        with model.trace(**inputs, remote=host):
            there = model.site(site).detach().save()
        close(model.run(INPUTS["tiny-clip"], read=[site])[site], there)


def test_a_forward_of_llava(host: str, load: Load) -> None:
    model = load("tiny-llava")
    read = ["vision.blocks.0.attn.hook_z", "projector.hook_out", "language.blocks.1.attn.hook_pattern"]
    edit = [mm.Edit("language.blocks.0.attn.hook_z", lambda x: x * 0)]
    here = model.run(INPUTS["tiny-llava"], read=read, edit=edit)
    there = model.run(INPUTS["tiny-llava"], read=read, edit=edit, remote=host)
    same_run(here, there)
    close(here.output.logits, there.output.logits)


def test_a_generation_of_llava(host: str, load: Load) -> None:
    model = load("tiny-llava")
    options = INPUTS["tiny-llava"] | {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    read = [
        "vision.blocks.0.hook_resid_post",
        mm.Read("language.blocks.1.hook_resid_post", lambda x: x[:, -1:]),
    ]
    edit = [mm.Edit("language.blocks.0.attn.hook_z", lambda x: x * 3, positions=[2, 11])]
    here = model.generate(**options, read=read, edit=edit)
    there = model.generate(**options, read=read, edit=edit, remote=host)
    assert torch.equal(here.output, there.output)
    same_run(here, there)
    assert torch.equal(model.generate(**options, remote=host), model.generate(**options))


def test_each_step_of_stable_diffusion(host: str, load: Load) -> None:
    model = load("tiny-sd")
    block = next(s.removesuffix("hook_q") for s in model.sitemap.sites if s.endswith("cross_attn.hook_q"))
    pattern = f"{block}hook_pattern"
    read = [
        f"{block}hook_q",
        f"{block}hook_k",
        f"{block}hook_v",
        mm.Read(pattern, rows="cond"),
        "vae.hook_out",
    ]
    read = [r for r in read if not isinstance(r, str) or r in model.sitemap.sites]
    edit = [mm.Edit("denoiser.hook_out", lambda x: x * 0.5, steps=[1])]
    here = model.run(INPUTS["tiny-sd"], read=read, edit=edit)
    there = model.run(INPUTS["tiny-sd"], read=read, edit=edit, remote=host)
    assert here[f"{block}hook_q"].shape[0] == 2
    same_run(here, there)
    close(here.output.images, there.output.images)


def test_a_block_over_the_steps(host: str, load: Load) -> None:
    model = load("tiny-sd")
    inputs = INPUTS["tiny-sd"] | {"num_inference_steps": 3}
    here, there = model.run(inputs, read=["denoiser.hook_out"])["denoiser.hook_out"], []
    after = 0
    with model.generate(**inputs, remote=host) as tracer:
        there = nnsight.save([])
        for _ in tracer.iter[:]:
            there.append(model.site("denoiser.hook_out").detach().clone())
        after = nnsight.save(len(there))
    assert after == 3  # What follows the loop is run.
    close(here, torch.stack(there))


def test_a_session_carries_one_trace_into_the_next(host: str, load: Load) -> None:
    model = load("tiny-clip")
    inputs, site = INPUTS["tiny-clip"], "vision.blocks.2.hook_resid_post"
    images = {"images": inputs["images"][::-1], "text": inputs["text"]}
    out = torch.empty(0)
    with model.session(remote=host):
        with model.trace(**images):
            other = model.site(site).save()
        with model.trace(**inputs):
            model.site(site, other)
            out = model.output.logits_per_image.detach().save()
    close(model.run(images).output.logits_per_image, out)


def test_stored_edits_travel(host: str, load: Load) -> None:
    model = load("tiny-clip")
    site = "vision.blocks.1.attn.hook_z"
    with model.edit() as (_, edited):
        edited.site(site)[:] = 0
    here = model.run(INPUTS["tiny-clip"], edit=[mm.Edit(site, torch.zeros_like)]).output.logits_per_image
    close(here, edited.run(INPUTS["tiny-clip"], remote=host).output.logits_per_image)
    there = model.run(INPUTS["tiny-clip"], remote=host).output.logits_per_image
    assert (here - there).abs().max() > 1e-3  # The next job does not have them.


def test_gradients(host: str, load: Load) -> None:
    model = load("tiny-clip")
    names = ["vision.blocks.1.attn.hook_pattern", "vision.blocks.2.hook_resid_mid"]

    def total(output: Any) -> torch.Tensor:
        return output.logits_per_image.sum()

    if Dispatch.trusted is False:
        with pytest.raises(nnsight.intervention.backends.remote.RemoteError, match="no gradients"):
            model.run(INPUTS["tiny-clip"], read=names, grad_of=total, remote=host)
        return
    here = model.run(INPUTS["tiny-clip"], read=names, grad_of=total)
    there = model.run(INPUTS["tiny-clip"], read=names, grad_of=total, remote=host)
    assert here.grads[names[0]].abs().max() > 0
    for name in names:
        torch.testing.assert_close(here.grads[name], there.grads[name], rtol=1e-4, atol=1e-6)


def test_several_invokes_have_their_own_rows_or_are_refused(host: str, load: Load) -> None:
    model = load("tiny-clip")
    texts, images = INPUTS["tiny-clip"]["text"], INPUTS["tiny-clip"]["images"]
    site = "vision.blocks.1.hook_resid_post"
    rows: list[torch.Tensor] = []

    def traced() -> None:
        with model.trace(remote=host) as tracer:
            with tracer.invoke(text=texts, images=images[:1]):
                one = model.site(site).detach().save()
            with tracer.invoke(text=texts[:1], images=images):
                two = model.site(site).detach().save()
        rows.extend([one, two])

    if Dispatch.trusted is False:
        with pytest.raises(mm.InputError, match="cannot tell the rows of 2 invokes apart"):
            traced()
        return
    traced()
    both = model.run({"text": texts, "images": images}, read=[site])[site]
    close(rows[0], both[:1])
    close(rows[1], both)


def test_a_client_without_weights(host: str) -> None:
    model = mm.load("tiny-clip", engine="nnsight", device="meta")
    site = "vision.blocks.1.attn.hook_z"
    with pytest.raises(mm.MetaDeviceError):
        model.run(INPUTS["tiny-clip"], read=[site])
    there = model.run(INPUTS["tiny-clip"], read=[site], remote=host)
    close(mm.load("tiny-clip").run(INPUTS["tiny-clip"], read=[site])[site], there[site])
