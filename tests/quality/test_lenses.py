"""A small part of `python -m tests.quality.lenses`, and the nulls it is made of."""

from __future__ import annotations

import numpy as np
import torch

import mm_adapters as mm
from methods_multimodal.lenses import box_iou
from mm_adapters.zoo import world
from tests.quality import lens_data as data
from tests.quality import lenses as quality
from tests.quality.lens_places import best_box


def number(line: quality.Line) -> float:
    return float(line.value.split()[0])


def test_the_last_layer_is_the_models_own_to_the_last_bit_under_both_engines() -> None:
    lines = quality.own_logits(4)
    assert [line.value for line in lines] == ["0", "0"]
    assert [line.what.split(":")[0] for line in lines] == ["hooked", "nnsight"]


def test_accuracy_grows_with_the_layers_and_stopping_early_beats_other_rows_stopping() -> None:
    *layers, stopped = quality.exits(24)
    assert number(layers[0]) < 0.1
    assert number(layers[-1]) > 0.85
    assert number(layers[1]) < number(layers[2])
    assert number(stopped) > number(layers[-1]) - 0.1


def test_a_question_alone_does_not_tell_whether_it_can_be_answered() -> None:
    texts, pictures, absent = quality.unanswerable(12, "test")
    assert texts[::2] == texts[1::2]
    assert absent.tolist() == [False, True] * 12
    assert sorted(p.tobytes() for p in pictures[::2]) != sorted(p.tobytes() for p in pictures[1::2])


def test_objects_lie_where_their_masks_say() -> None:
    mask = np.zeros((64, 64), bool)
    mask[9:17, 32:40] = True
    assert data.patch_box(mask) == (1, 4, 3, 5)
    share = data.covered(mask)
    assert float(share[1, 4]) == 7 / 8
    assert float(share.sum()) == 1
    scenes = data.two_shapes(4, "test")
    assert all(len({t.shape for t in s.things}) == 2 == len({t.colour for t in s.things}) for s in scenes)
    boxes = [data.patch_box(world.masks(s)[0]) for s in scenes]
    best = best_box(boxes)
    mean = np.mean([box_iou(best, box) for box in boxes])
    assert all(np.mean([box_iou(one, box) for box in boxes]) <= mean for one in boxes)


def test_an_answers_first_token_is_how_the_model_begins_it() -> None:
    model = mm.load("tiny-llava")
    asked = data.asked(model, 16, "test")
    logits = torch.cat([model.wrapped(**b).logits[:, -1].detach() for b in asked.batches])
    assert (logits.argmax(-1) == asked.answers).float().mean() > 0.8
