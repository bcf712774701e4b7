"""The part of the segmentation table that takes seconds: the named object, against attention alone."""

from __future__ import annotations

from methods_multimodal.text_explanations.segmentation import SegmentationScores
from tests.quality.segmentation import METHODS, Row, interval, table


def test_contributions_find_the_object_a_text_names_where_attention_cannot() -> None:
    wanted = ("contributions of patches", "raw attention", "attention rollout")
    scores = {name: row.scores[0] for name, row in table("two", 40, {n: METHODS[n] for n in wanted}).items()}
    ours = scores["contributions of patches"].mean_iou
    assert ours >= 0.70
    assert ours >= scores["raw attention"].mean_iou + 0.1
    assert ours >= scores["attention rollout"].mean_iou + 0.1


def test_what_knows_less_marks_less_of_the_object_and_what_is_told_its_colour_more() -> None:
    ours, told = "contributions of patches", "told more: the colour's pixels"
    names = [name for name in METHODS if "null" in name or name in (ours, told)]
    rows = table("two", 40, {name: METHODS[name] for name in names})
    share = {name: row.scores[0].foreground_iou for name, row in rows.items()}
    assert share["null: nothing marked"] == 0
    assert share[told] > share[ours]
    for name in ("null: the other object's text", "null: random weights", "null: the middle"):
        assert share[name] < share[ours] - 0.4


def test_a_difference_is_taken_draw_by_draw() -> None:
    first, other = (
        Row(n, tuple(SegmentationScores(0.9, 0.5, v, 0.7) for v in values))
        for n, values in (("a", (0.5, 0.7, 0.6)), ("b", (0.4, 0.6, 0.5)))
    )
    assert other.line(first).endswith("| 0.100 ± 0.000 |")
    assert first.line(first).endswith("|  |")
    half = 4.302653 * 0.1 / 3**0.5
    assert interval(first.of("foreground_iou")) == f"0.600 ± {half:.3f}"


def test_grad_cam_is_in_the_table() -> None:
    (row,) = table("two", 8, {"Grad-CAM": METHODS["Grad-CAM"]}).values()
    assert 0.4 < row.scores[0].mean_iou < 0.85
