"""captum, pytorch-grad-cam and quantus on a tower and on a model: the numbers of the plain torch module."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.neighbours import TOKENS, Embeds, Logits, layer, model, needs, pictures

UNIT = 3


def tower() -> Any:
    return model("tiny-clip").vision


def tracked() -> Tensor:
    return pictures().clone().requires_grad_()


def plain() -> Embeds:
    return Embeds(model("tiny-clip").wrapped)


def test_captum_saliency_of_a_tower() -> None:
    attr = needs("captum.attr")
    ours, theirs = (attr.Saliency(m).attribute(tracked(), target=UNIT) for m in (tower(), plain()))
    assert torch.equal(ours, theirs)
    assert ours.abs().sum() > 1


def test_captum_saliency_of_the_whole_model() -> None:
    attr = needs("captum.attr")
    clip = model("tiny-clip")

    def score(call: Any) -> Any:
        return lambda x: call(input_ids=TOKENS, pixel_values=x).logits_per_image

    ours, theirs = (attr.Saliency(score(m)).attribute(tracked(), target=1) for m in (clip, clip.wrapped))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("method", ["LayerIntegratedGradients", "LayerGradCam", "LayerActivation"])
@pytest.mark.parametrize("where", ["a module of the model", "a hook point"])
def test_captum_at_a_layer(method: str, where: str) -> None:
    attr = needs("captum.attr")
    options: dict[str, Any] = {"target": UNIT}
    if method == "LayerIntegratedGradients":
        options |= {"n_steps": 4}
    elif method == "LayerGradCam":
        options |= {"attr_dim_summation": False}
    else:
        options = {}
    at = layer(1) if where == "a module of the model" else tower().blocks[1].hook_resid_post
    ours = getattr(attr, method)(tower(), at).attribute(pictures(), **options)
    theirs = getattr(attr, method)(plain(), layer(1)).attribute(pictures(), **options)
    ours, theirs = (x if isinstance(x, Tensor) else x[0] for x in (ours, theirs))
    assert torch.equal(ours, theirs)
    assert ours.abs().sum() > 0
    assert not layer(1)._forward_hooks


def test_captum_reads_a_pattern_that_no_module_has() -> None:
    attr = needs("captum.attr")
    got = attr.LayerActivation(tower(), tower().blocks[1].attn.hook_pattern).attribute(pictures())
    with torch.no_grad():
        want = tower().run_with_cache(pictures())[1]["pattern", 1]
    assert torch.equal(got, want)
    torch.testing.assert_close(got.sum(-1), torch.ones_like(got[..., 0]))


def test_captum_takes_a_language_tower() -> None:
    attr = needs("captum.attr")
    llava = model("tiny-llava")
    embedding = llava.wrapped.get_input_embeddings()
    target = (3, 7)  # The last position, a word.
    ours, theirs = (
        attr.LayerIntegratedGradients(m, embedding).attribute(TOKENS, target=target, n_steps=4)
        for m in (llava.language, Logits(llava.wrapped))
    )
    assert torch.equal(ours, theirs)
    assert ours.abs().sum() > 1e-3


@pytest.mark.parametrize("where", ["a module of the model", "a hook point"])
def test_grad_cam(where: str) -> None:
    cam = needs("pytorch_grad_cam")
    targets = needs("pytorch_grad_cam.utils.model_targets")
    side = int((tower().cfg.n_ctx - 1) ** 0.5)

    def on_a_grid(tokens: Tensor) -> Tensor:
        return tokens[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)

    at = layer(1) if where == "a module of the model" else tower().blocks[1].hook_resid_post
    maps = []
    for net, target in ((tower(), at), (plain(), layer(1))):
        with cam.GradCAM(net, [target], reshape_transform=on_a_grid) as grad_cam:
            maps.append(grad_cam(pictures(), [targets.ClassifierOutputTarget(UNIT)] * 2))
    assert np.array_equal(*maps)
    assert maps[0].max() > 0.5


@pytest.mark.filterwarnings("ignore")  # quantus' own, of its settings.
def test_a_metric_of_quantus() -> None:
    quantus = needs("quantus")
    saliency = needs("captum.attr").Saliency(plain()).attribute(tracked(), target=UNIT)
    attributions = saliency.detach().sum(1, keepdim=True).numpy()
    scores = []
    for net in (tower(), plain()):
        metric = quantus.PixelFlipping(
            features_in_step=256, perturb_baseline="black", disable_warnings=True, display_progressbar=False
        )
        call = {"x_batch": pictures().numpy(), "y_batch": np.array([UNIT, UNIT]), "a_batch": attributions}
        scores.append(np.array(metric(model=net, device="cpu", softmax=False, **call)))
    assert np.array_equal(*scores)
    assert np.ptp(scores[0]) > 0.1


def test_circuitsvis_draws_a_towers_patterns() -> None:
    cv = needs("circuitsvis")
    language = model("tiny-llava").language
    _, cache = language.run_with_cache(TOKENS)
    html = str(
        cv.attention.attention_patterns(
            tokens=language.to_str_tokens(TOKENS[0]), attention=cache["pattern", 0][0]
        )
    )
    first = cache["pattern", 0][0, 0, 3].tolist()
    assert f"{first[1]:.4f}"[:6] in html
    for word in language.to_str_tokens(TOKENS[0]):
        assert repr(word)[1:-1] in html
