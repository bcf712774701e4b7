"""Each report says and shows what it did when its page was last looked at.

After a change that is meant, or other weights, draw them again
(`python -m tests.methods.reports.pages FOLDER`) and look.
"""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

import mm_adapters as mm
from methods_multimodal.report import contrastive_report, diffusion_report, vlm_report, words_report
from methods_multimodal.report._page import as_seen, rounded, spread, strongest, windows
from mm_adapters import InputError
from mm_adapters.zoo import sample_images
from tests.methods.plots.shown import differences
from tests.methods.reports.pages import PAGES, SHOWN, model, shown

WANTED = json.loads(SHOWN.read_text())


@pytest.mark.parametrize("name", PAGES)
def test_a_report_says_what_it_did(name: str) -> None:
    assert differences(shown(PAGES[name]()), WANTED[name], name, rel=0.02, abs=2e-3) == []


def test_no_page_is_left_over() -> None:
    assert WANTED.keys() == PAGES.keys()


def test_a_report_of_nothing_is_refused() -> None:
    sd, llava, clip = (model(name) for name in ("tiny-sd", "tiny-llava", "tiny-clip"))
    image = sample_images()["red_circle"]
    for report in (diffusion_report, words_report):
        for prompt, steps in ((" ", 2), ("a red circle", 0)):
            with pytest.raises(InputError, match=f"not {prompt!r}, {steps}"):
                report(sd, prompt, steps=steps)
    for images, question in (([image], "what?"), ([image, image], " ")):
        with pytest.raises(InputError, match=re.escape(f"there are {len(images)}, {question!r}")):
            vlm_report(llava, images, question)
    for images, texts in (([image], ["a"]), ([image] * 3, ["a"]), ([image] * 2, [])):
        with pytest.raises(InputError, match=f"there are {len(images)} and {len(texts)}"):
            contrastive_report(clip, images, texts)


def test_layers_are_all_or_six_from_the_first_to_the_last() -> None:
    assert [spread(n) for n in (1, 6)] == [[0], [0, 1, 2, 3, 4, 5]]
    assert [spread(n) for n in (7, 12)] == [[0, 1, 2, 4, 5, 6], [0, 2, 4, 7, 9, 11]]
    assert spread(9, 3) == [0, 4, 8]


def test_windows_hold_each_patch_once_and_no_more_than_so_many() -> None:
    layout = model("tiny-clip").layout(images=[sample_images()["red_circle"]])["vision"]
    members, grid = windows(layout)
    assert (grid, members[:3], len(members)) == ((8, 8), [[1], [2], [3]], 64)
    members, grid = windows(layout, 16)
    assert grid == (4, 4)
    assert members[1] == [3, 4, 11, 12]
    members, grid = windows(layout, 15)  # Windows of 3 x 3; the last are smaller.
    assert (grid, members[2], members[8]) == ((3, 3), [7, 8, 15, 16, 23, 24], [55, 56, 63, 64])


def test_the_strongest_are_the_largest_in_size() -> None:
    table = torch.tensor([[0.5, -3.0, 1.0], [2.0, 0.0, -0.25]])
    assert strongest(table) == [(0, 1, -3.0), (1, 0, 2.0), (0, 2, 1.0)]
    assert strongest(table, 1) == [(0, 1, -3.0)]
    assert rounded(torch.tensor([[-1e-9, 1 / 3]]), 3) == [[0.0, 0.333]]


def test_pixels_are_shown_as_the_processor_was_given_them() -> None:
    clip = model("tiny-clip")
    picture = sample_images()["red_circle"]
    (prepared,) = clip.prepare(images=[picture])["pixel_values"]
    seen = as_seen(clip, prepared)
    from PIL import Image

    with Image.open(picture) as opened:
        wanted = np.asarray(opened.convert("RGB").resize((64, 64), Image.Resampling.BICUBIC), np.int64)
    assert seen.shape == (64, 64, 3)
    assert abs(seen.astype(np.int64) - wanted).max() <= 2
    without = mm.HookedModel(clip.wrapped)
    plain = as_seen(without, torch.tensor([-1.0, 0.0, 3.0]).expand(3, 1, 3))
    assert plain[0, :, 0].tolist() == [0, 64, 255]
