"""What tiny-sd's training knows of its pictures, and what its denoiser is given to learn from."""

import numpy as np
import torch

from mm_adapters.zoo import _training, sd, world


def test_places_are_labelled_with_the_shape_that_is_drawn_there():
    scenes = [sd.training_scene(i) for i in range(40)]
    texts = ["a " + " and a ".join(t.shape for t in scene.things) for scene in scenes]
    shown = sd.what_is_shown(scenes, texts, 16).numpy()
    for scene, labels in zip(scenes, shown, strict=True):
        drawn = world.index_map(scene, 64)
        for row, column in zip(*np.nonzero(labels < len(world.SHAPES)), strict=True):
            # Within the object's radius, so near its pixels: a ring has a hole, a star has gaps.
            near = drawn[max(0, 4 * row - 10) : 4 * row + 14, max(0, 4 * column - 10) : 4 * column + 14]
            named = {scene.things[i - 1].shape for i in np.unique(near) if i}
            assert world.SHAPES[labels[row, column]] in named
        ground = labels == len(world.SHAPES)
        covered = (drawn != 0).reshape(16, 4, 16, 4).mean((1, 3))
        assert covered[ground].mean() < 0.05


def test_a_shape_that_the_caption_leaves_out_is_not_asked_for():
    scene = sd.training_scene(0)
    labels = sd.what_is_shown([scene, scene], ["a red object", f"a {scene.things[0].shape}"], 8)
    assert (labels[0] == sd.UNNAMED).any()
    assert not (labels[1] == sd.UNNAMED).any()
    assert torch.equal(labels[0] == sd.UNNAMED, labels[1] == world.SHAPES.index(scene.things[0].shape))


def test_heads_leave_the_denoiser_as_it_is():
    unet = sd.build(seed=1)
    student = sd.Student(unet)
    noisy, times, states = torch.randn(2, 4, 16, 16), torch.tensor([3, 900]), torch.randn(2, 32, 128)
    with torch.no_grad():
        velocity, named = student(noisy, times, states)
        assert torch.equal(velocity, unet(noisy, times, states).sample)
    assert [tuple(scores.shape) for scores in named] == [(2, 9, 8, 8), (2, 9, 16, 16)]
    assert not unet.mid_block._forward_hooks
    assert not any(key.startswith("heads") for key in unet.state_dict())


def test_the_second_part_has_short_captions_two_objects_and_textures():
    numbers = range(sd.N_FIRST, sd.N_FIRST + 200)
    scenes = [sd.training_scene(i) for i in numbers]
    texts = [sd.training_caption(scene, i) for scene, i in zip(scenes, numbers, strict=True)]
    assert sum(len(s.things) == 2 for s in scenes) == 100
    assert {t.texture for s in scenes for t in s.things} == set(world.TEXTURES)
    short = [t for t in texts if len(t.split()) <= 4]
    assert 30 < len(short) < 100
    for scene, text in zip(scenes, texts, strict=True):
        said = set(text.split())
        shown = {w for t in scene.things for w in (t.shape, t.colour, t.texture, t.size)}
        assert not said & (set(world.SHAPES) | set(world.TEXTURES) | set(world.SIZES)) - shown
        assert not said & set(world.COLOURS) - shown
    first = [sd.training_scene(i) for i in range(200)]
    assert sum(len(s.things) == 2 for s in first) == 25


def test_three_rows_of_four_are_of_the_second_part(monkeypatch):
    monkeypatch.setattr(sd, "N_FIRST", 6)
    latents = torch.arange(10.0)[:, None, None, None].expand(10, 4, 16, 16)
    data = sd.Encoded(latents, torch.zeros(10, 32, 8), torch.zeros(32, 8), torch.ones(10, 1, 16, 16), ())
    met: list[int] = []

    class Noising:
        config = sd.scheduler().config

        def add_noise(self, rows, noise, times):
            met.extend(rows[:, 0, 0, 0].long().tolist())
            return rows

        def get_velocity(self, rows, noise, times):
            return rows

    class Student:
        def __call__(self, noisy, times, states):
            return noisy, []

    for step in range(20):
        assert float(sd.loss(Student(), Noising(), data, step, 0)) == 0
    assert sum(i >= 6 for i in met) == 3 * len(met) // 4
    assert set(met) == set(range(10))


def test_heads_name_the_colour_too_where_they_are_asked_to():
    scene = sd.training_scene(3)
    thing = scene.things[0]
    labels = sd.what_is_shown([scene], [f"a {thing.colour} object"], 16, "colour")
    assert set(labels.unique().tolist()) == {list(world.COLOURS).index(thing.colour), len(world.COLOURS)}
    student = sd.Student(sd.build(seed=1), ("shape", "colour"))
    _, named = student(torch.randn(1, 4, 16, 16), torch.tensor([3]), torch.randn(1, 32, 128))
    assert [tuple(x.shape) for x in named] == [(1, 9, 8, 8)] * 2 + [(1, 9, 16, 16)] * 2


def test_a_processor_without_bfloat16_trains_in_float32(monkeypatch):
    monkeypatch.setattr(_training, "_has_bfloat16", lambda: False)
    q = torch.randn(5, 8)
    with _training.mixed():
        assert (q @ q.mT).dtype == torch.float32


def test_mixed_precision_keeps_attention_in_float32(monkeypatch):
    monkeypatch.setattr(_training, "_has_bfloat16", lambda: True)
    seen: dict[str, torch.dtype] = {}
    real = torch.nn.functional.scaled_dot_product_attention
    q = torch.randn(1, 2, 5, 8)
    with _training.mixed():
        product = q @ q.mT
        seen["product"] = product.dtype
        attended = torch.nn.functional.scaled_dot_product_attention(q.bfloat16(), q.bfloat16(), q.bfloat16())
        seen["attention"] = attended.dtype
    assert seen == {"product": torch.bfloat16, "attention": torch.float32}
    torch.testing.assert_close(attended, real(*[q.bfloat16().float()] * 3))
