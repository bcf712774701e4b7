"""The part of the segmentation table that takes seconds: the named object, against attention alone."""

from __future__ import annotations

from tests.quality.segmentation import METHODS, table


def test_contributions_find_the_object_a_text_names_where_attention_cannot() -> None:
    wanted = ("contributions of patches", "raw attention", "attention rollout")
    scores = table("two", 40, {name: METHODS[name] for name in wanted})
    ours = scores["contributions of patches"].mean_iou
    assert ours >= 0.70
    assert ours >= scores["raw attention"].mean_iou + 0.1
    assert ours >= scores["attention rollout"].mean_iou + 0.1


def test_grad_cam_is_in_the_table() -> None:
    (scores,) = table("two", 8, {"Grad-CAM": METHODS["Grad-CAM"]}).values()
    assert 0.4 < scores.mean_iou < 0.85
