"""A video's tokens and patches have the role image, and their frame, row and column."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import tiny_tokenizers as made_here
import tiny_vlm
import torch
from torch import Tensor

import mm_adapters as mm
from mm_adapters.tokens.layout import TokenLayout

IMAGE, VIDEO = 59, 60
QWENS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@cache
def model(name: str, engine: str = "hooked") -> Any:
    from tiny import letter_tokenizer

    return mm.wrap(getattr(tiny_vlm, name)().model, tokenizer=letter_tokenizer(64), engine=engine)


def qwen_inputs(name: str, *, image: bool) -> dict[str, Tensor]:
    """Two steps in time of 4 x 6 patches, so six tokens each; perhaps an image of 4 x 2 between two texts."""
    frames = [[61, *[VIDEO] * 6, 62]] * 2 if name == "qwen3_vl" else [[61, *[VIDEO] * 12, 62]]
    row = [7, 8, *frames[0], *(frames[1] if len(frames) > 1 else [])]
    row += [9, 61, *[IMAGE] * 2, 62] if image else []
    ids = torch.tensor([[*row, 10]])
    more = (
        {"pixel_values": tiny_vlm.noise(8, 96), "image_grid_thw": torch.tensor([[1, 4, 2]])} if image else {}
    )
    return more | {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": tiny_vlm.noise(48, 96),
        "video_grid_thw": torch.tensor([[2, 4, 6]]),
        "mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int(),
    }


def places(layout: TokenLayout, row: int = 0) -> list[tuple[Any, ...]]:
    at = layout.positions("image", row)
    return [
        (layout.image_index[row][p], layout.frame_of(p, row=row), *layout.patch_rc(p, row=row)) for p in at
    ]


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("name", QWENS)
def test_a_videos_tokens_count_frames_rows_and_columns(name: str, image: bool) -> None:
    inputs = qwen_inputs(name, image=image)
    layout = model(name).layout(**inputs)["language"]
    ids = inputs["input_ids"][0].tolist()
    assert layout.positions("image") == [i for i, token in enumerate(ids) if token in (IMAGE, VIDEO)]
    video = [(0, frame, r, c) for frame in range(2) for r in range(2) for c in range(3)]
    assert places(layout) == video + ([(1, None, r, 0) for r in range(2)] if image else [])
    assert layout.roles[0][:2] == ("word", "word")
    first = layout.position_of(1, 2, frame=1)
    assert layout.frame_of(first) == 1
    assert ids[first] == VIDEO
    top, left, bottom, right = layout.box(first)
    assert (top, bottom, right) == (0.5, 1.0, 1.0)
    assert left == pytest.approx(2 / 3)


@pytest.mark.parametrize("engine", ["hooked", "nnsight"])
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_a_patch_is_where_the_layout_of_the_tower_says(name: str, engine: str) -> None:
    """The tower's positions, told apart by what its patch embedding gave each of the processor's patches."""
    traced, inputs = model(name, engine), qwen_inputs(name, image=False)
    embedded: list[Tensor] = []
    handle = traced.wrapped.model.visual.patch_embed.register_forward_hook(
        lambda m, a, o: embedded.append(o.detach().clone())
    )
    seen = traced.run(inputs, read=["vision.hook_embed"])["vision.hook_embed"]
    handle.remove()
    assert torch.equal(seen[0].sort(0).values, embedded[0].sort(0).values)
    layout = traced.layout(**inputs)["vision"]
    # A processor cuts each frame into cells of 2 x 2, line by line.
    given = [
        (t, 2 * r + i, 2 * c + j)
        for t in range(2) for r in range(2) for c in range(3) for i in range(2) for j in range(2)
    ]  # fmt: skip
    for position in range(layout.n_pos):
        (patch,) = (embedded[0] == seen[0, position]).all(-1).nonzero().flatten().tolist()
        assert (layout.frame_of(position), *layout.patch_rc(position)) == given[patch]


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl"])
def test_a_token_is_of_the_cell_that_the_layout_says(name: str) -> None:
    """Without its blocks a vision tower's token holds one cell: brightened, that token alone moves."""
    wrapped, inputs = model(name).wrapped, qwen_inputs(name, image=True)
    tokens = model(name).layout(**inputs)["language"]
    outputs: list[Tensor] = []
    visual = wrapped.model.visual
    handles = [visual.merger.register_forward_hook(lambda m, a, o: outputs.append(o.detach().clone()))]
    handles += [block.register_forward_hook(lambda m, a, o: a[0]) for block in visual.blocks]
    brighter = inputs["pixel_values_videos"].clone()
    brighter[24 + 20 : 24 + 24] += 3.0  # The last of the second frame's six cells.
    with torch.no_grad():
        for given in (inputs, inputs | {"pixel_values_videos": brighter}):
            wrapped(**given)
    for handle in handles:
        handle.remove()
    before, after = (o for o in outputs if o.shape[0] == 12)
    moved = (after - before).abs().sum(-1).nonzero().flatten().tolist()
    of_video = [p for p in tokens.positions("image") if inputs["input_ids"][0, p] == VIDEO]
    assert [of_video[m] for m in moved] == [tokens.position_of(1, 2, frame=1)]


def test_llava_onevisions_frames_are_pooled_and_end_in_a_newline() -> None:
    case = tiny_vlm.llava_onevision()
    config = case.model.config
    side = -(-(config.vision_config.image_size // config.vision_config.patch_size) // 2)
    n, video = 2 * side * side + 1, config.video_token_id
    size = config.vision_config.image_size
    ids = torch.tensor([[7, *[video] * n, 8]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs |= {"pixel_values_videos": tiny_vlm.noise(1, 2, 3, size, size)}
    from tiny import letter_tokenizer

    wrapped = mm.wrap(case.model, tokenizer=letter_tokenizer(64))
    wrapped.run(inputs)  # As many tokens as it takes.
    layout = wrapped.layout(**inputs)["language"]
    assert [layout.frame_of(p) for p in layout.positions("image")] == [0] * side**2 + [1] * side**2
    assert layout.positions("newline") == [n]


@pytest.mark.parametrize("engine", ["hooked", "nnsight"])
def test_a_video_of_other_sizes_than_its_tokens_is_refused(engine: str) -> None:
    inputs = qwen_inputs("qwen2_vl", image=False)
    few = {k: v[:, :-4] for k, v in inputs.items() if v.ndim == 2 and v.shape == inputs["input_ids"].shape}
    with pytest.raises(mm.InputError, match="10 video tokens, and the videos take 12"):
        model("qwen2_vl", engine).run(inputs | few)


def test_a_family_that_does_not_say_how_videos_lie_says_so() -> None:
    case = tiny_vlm.molmo2()
    wrapped = mm.wrap(case.model, tokenizer=made_here.qwen())
    with pytest.raises(mm.InputError, match="does not say how the tokens of a video lie"):
        wrapped.layout(**case.inputs, pixel_values_videos=torch.zeros(1, 2))
