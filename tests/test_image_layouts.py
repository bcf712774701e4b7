"""Where each image token lies in its image: a bright square, and the positions that see it.

The images go through the libraries' own processors and models. Vision blocks are kept from mixing
positions (their attention writes nothing), so a token moves only if its own pixels do; which those
are is what the layout says, and what it is checked against.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import tiny_vlm
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

import mm_adapters as mm
from mm_adapters.layouts import of_model
from mm_adapters.tokens.layout import TokenLayout

I = tiny_vlm.IMAGE  # noqa: E741
BREAK, END, WHOLE, COLUMN = 50, 51, 52, 53
MARKS = {(r, c): 20 + 4 * r + c for r in range(1, 4) for c in range(1, 4)}


@cache
def tokenizer() -> Any:
    names = {f"w{i}": i for i in range(64)}
    special = {I: "<image>", BREAK: "[IMG_BREAK]", END: "[IMG_END]", WHOLE: "<global-img>"}
    special |= {COLUMN: "<im_col>"}
    special |= {0: "<pad>", 1: "<s>"}
    special |= {i: f"<row_{r}_col_{c}>" for (r, c), i in MARKS.items()}
    names = {special.get(i, name): i for name, i in names.items()}
    made = Tokenizer(models.WordLevel(names, unk_token="w63"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>")


@dataclass(frozen=True)
class Setting:
    """A tiny model, what its processor makes of images, and a row of tokens for each."""

    model: Callable[[], tiny_vlm.Case]
    process: Callable[[list[Image.Image]], dict[str, Any]]
    tokens: Callable[[mm.HookedModel, dict[str, Any]], list[list[int]]]
    sizes: tuple[tuple[int, int], ...] = ((16, 16),)
    tower: str = "language"


def features(model: mm.HookedModel, inputs: dict[str, Any]) -> list[list[int]]:
    """As many image tokens for each image as the model makes features of it."""
    takes = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask", "rows", "cols")}
    with torch.no_grad():
        got = model.wrapped.get_image_features(**takes).pooler_output
    counts = [len(part) for part in got] if isinstance(got, list | tuple) else [got.shape[1]] * len(got)
    return [[61, *[I] * n, 62] for n in counts]


def lines(patch: int) -> Callable[[mm.HookedModel, dict[str, Any]], list[list[int]]]:
    """A break after each line of image tokens, an end after the last, as Pixtral's processor has them."""

    def make(model: mm.HookedModel, inputs: dict[str, Any]) -> list[list[int]]:
        rows = []
        for h, w in inputs["image_sizes"].tolist():
            one = ([I] * (w // patch) + [BREAK]) * (h // patch)
            rows.append([*one[:-1], END])
        return rows

    return make


def marked(model: mm.HookedModel, inputs: dict[str, Any]) -> list[list[int]]:
    """Each tile after its mark, line by line, then the whole, as Idefics3's processor has them."""
    rows = []
    for down, across in zip(inputs["rows"], inputs["cols"], strict=True):
        row = []
        for r in range(1, down + 1):
            row += [t for c in range(1, across + 1) for t in (61, MARKS[r, c], *[I] * 4)] + [54]
        rows.append([*row, 61, WHOLE, *[I] * 4, 61])
    return rows


def two_views(model: mm.HookedModel, inputs: dict[str, Any]) -> list[list[int]]:
    """The whole, then the finer view, a token after each line, as Molmo 2's processor has them."""
    rows = []
    for rows_of, columns, down, across in inputs["image_grids"].tolist():
        views = [([I] * width + [COLUMN]) * height for height, width in ((rows_of, columns), (down, across))]
        rows.append([61, *views[0], 62, 61, *views[1], 62])
    return rows


def _clean(batch: Any, *drop: str) -> dict[str, Any]:
    return {k: v for k, v in dict(batch).items() if k not in drop}


def _plain(make: Any, side: int) -> Callable[[list[Image.Image]], dict[str, Any]]:
    process = make(size={"height": side, "width": side}, do_convert_rgb=True)
    return lambda images: _clean(process(images, return_tensors="pt"), "num_crops")


def _anyres(make: Any) -> Callable[[list[Image.Image]], dict[str, Any]]:
    pins = [[8, 16], [16, 8], [16, 16]]
    process = make(
        size={"height": 8, "width": 8} if "Onevision" in make.__name__ else {"shortest_edge": 8},
        crop_size={"height": 8, "width": 8},
        image_grid_pinpoints=pins,
    )
    keep = ("pixel_values", "image_sizes")
    return lambda images: {k: v for k, v in process(images, return_tensors="pt").items() if k in keep}


def _finer(make: Callable[[], tiny_vlm.Case]) -> Callable[[], tiny_vlm.Case]:
    """With patches half as wide, so that padding is whole patches."""

    def build() -> tiny_vlm.Case:
        was = dict(tiny_vlm.VISION)
        tiny_vlm.VISION["patch_size"] = 2
        try:
            return make()
        finally:
            tiny_vlm.VISION.update(was)

    return build


def _qwen(make: Any, **more: Any) -> Callable[[list[Image.Image]], dict[str, Any]]:
    process = make(
        patch_size=4,
        temporal_patch_size=2,
        merge_size=2,
        size={"shortest_edge": 16, "longest_edge": 4096},
        **more,
    )
    return lambda images: _clean(process(images, return_tensors="pt"))


def _idefics3(images: list[Image.Image]) -> dict[str, Any]:
    process = hf.Idefics3ImageProcessor(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    out = process([[i] for i in images], return_tensors="pt", return_row_col_info=True)
    return _clean(out) | {"rows": [r[0] for r in out["rows"]], "cols": [c[0] for c in out["cols"]]}


def _molmo2(images: list[Image.Image]) -> dict[str, Any]:
    process = hf.Molmo2ImageProcessor(
        size={"height": 16, "width": 16}, patch_size=4, overlap_margins=[1, 1], max_crops=4
    )
    return _clean(process(images, return_tensors="pt"), "image_num_crops")


def _pixtral(patch: int) -> Callable[[list[Image.Image]], dict[str, Any]]:
    process = hf.PixtralImageProcessor(size={"longest_edge": 16}, patch_size=patch)
    return lambda images: _clean(process(images, return_tensors="pt"))


def _types(inputs: dict[str, Any], name: str) -> None:
    inputs[name] = (inputs["input_ids"] == I).int()


def _shrunk() -> tiny_vlm.Case:
    """Four tiles are more than it takes: their features are scaled to fewer places."""
    case = _finer(tiny_vlm.llava_onevision)()
    case.model.config.vision_aspect_ratio = "anyres_max_2"
    return case


SETTINGS: dict[str, Setting] = {
    "llava": Setting(tiny_vlm.llava_square, _plain(hf.SiglipImageProcessor, 8), features),
    "llava_next": Setting(_finer(tiny_vlm.llava_next), _anyres(hf.LlavaNextImageProcessor), features,
                          ((8, 16), (16, 6), (16, 16))),
    "llava_onevision": Setting(_finer(tiny_vlm.llava_onevision), _anyres(hf.LlavaOnevisionImageProcessor),
                               features, ((8, 16), (16, 6))),
    "llava_onevision, shrunk": Setting(_shrunk, _anyres(hf.LlavaOnevisionImageProcessor), features,
                                       ((16, 16), (16, 14))),
    "qwen2_vl": Setting(tiny_vlm.qwen2_vl, _qwen(hf.Qwen2VLImageProcessor), features, ((16, 24), (32, 8))),
    "qwen2_5_vl": Setting(tiny_vlm.qwen2_5_vl, _qwen(hf.Qwen2VLImageProcessor), features,
                          ((40, 24), (16, 32))),
    "qwen3_vl": Setting(tiny_vlm.qwen3_vl, _qwen(hf.Qwen2VLImageProcessor), features, ((16, 24), (32, 8))),
    "molmo2": Setting(tiny_vlm.molmo2, _molmo2, two_views, ((16, 32), (24, 16))),
    "paligemma": Setting(tiny_vlm.paligemma, _plain(hf.SiglipImageProcessor, 8), features),
    "gemma3": Setting(tiny_vlm.gemma3, _plain(hf.Gemma3ImageProcessor, 16), features),
    "idefics3": Setting(tiny_vlm.idefics3, _idefics3, marked, ((32, 32), (32, 16))),
    "pixtral": Setting(tiny_vlm.pixtral, _pixtral(4), lines(4), ((16, 8), (8, 12))),
    "mistral3": Setting(tiny_vlm.mistral3, _pixtral(8), lines(8), ((16, 8), (8, 16))),
}  # fmt: skip


def picture(size: tuple[int, int], square: tuple[int, int] | None) -> Image.Image:
    """Gray, with a bright square of 4 x 4 pixels at this (row, column)."""
    pixels = np.full((*size, 3), 90, np.uint8)
    if square is not None:
        pixels[square[0] : square[0] + 4, square[1] : square[1] + 4] = 255
    return Image.fromarray(pixels)


def prepared(name: str, model: mm.HookedModel, images: list[Image.Image]) -> dict[str, Any]:
    inputs = SETTINGS[name].process(images)
    rows = [[1, *row, 5, 9] for row in SETTINGS[name].tokens(model, inputs)]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    inputs = {k: v for k, v in inputs.items() if k not in ("rows", "cols")}
    inputs |= {"input_ids": ids, "attention_mask": (ids != 0).long()}
    if "image_grid_thw" in inputs or "image_grids" in inputs:
        _types(inputs, "mm_token_type_ids")
    if name == "gemma3":
        _types(inputs, "token_type_ids")
    return inputs


@cache
def hooked(name: str) -> mm.HookedModel:
    return mm.wrap(SETTINGS[name].model().model, tokenizer=tokenizer())


def change(name: str, squares: list[tuple[int, int]]) -> tuple[Tensor, dict[str, TokenLayout]]:
    """How far each position [row, pos] moves with the squares, and what the layout says it is."""
    model, setting = hooked(name), SETTINGS[name]
    deaf = [
        mm.Edit(str(s.name), torch.zeros_like)
        for s in model.sitemap
        if s.tower == "vision" and s.part == "hook_attn_out"
    ]
    site = f"{setting.tower}.hook_embed"
    seen = []
    for spots in ([None] * len(squares), squares):
        pictures = [picture(size, spot) for size, spot in zip(setting.sizes, spots, strict=True)]
        inputs = prepared(name, model, pictures)
        seen.append(model.run(inputs, read=[site], edit=deaf)[site])
    return (seen[1] - seen[0]).norm(dim=-1), model.layout(**inputs)


def overlaps(box: tuple[float, ...], size: tuple[int, int], square: tuple[int, int], blur: float) -> bool:
    top, left, bottom, right = box[0] * size[0], box[1] * size[1], box[2] * size[0], box[3] * size[1]
    return (
        top < square[0] + 4 + blur
        and bottom > square[0] - blur
        and left < square[1] + 4 + blur
        and right > square[1] - blur
    )


@pytest.mark.parametrize("name", [n for n in SETTINGS if not n.startswith(tiny_vlm.LACKING)])
@pytest.mark.parametrize("corner", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_the_positions_that_move_are_those_whose_boxes_hold_the_square(
    name: str, corner: tuple[int, int]
) -> None:
    sizes = SETTINGS[name].sizes
    squares = [((h - 4) * corner[0], (w - 4) * corner[1]) for h, w in sizes]
    moved, layouts = change(name, squares)
    layout = layouts[SETTINGS[name].tower]
    for row, (size, square) in enumerate(zip(sizes, squares, strict=True)):
        places = [p for p in range(layout.n_pos) if layout.patches[row][p] is not None]
        assert places
        views = {bool(layout.tile_of(p, row=row)) for p in places}
        for tiled in views:
            view = [p for p in places if bool(layout.tile_of(p, row=row)) == tiled]
            grid = layout.grids[row][view[0]]
            assert grid is not None
            best = max(view, key=lambda p: float(moved[row, p]))
            assert moved[row, best] > 1e-3
            assert overlaps(layout.box(best, row=row), size, square, 0), (row, layout.box(best, row=row))
            blur = 2 * max(size[0] / grid[0], size[1] / grid[1])  # Scaling reaches past a patch's edge.
            for p in view:
                if not overlaps(layout.box(p, row=row), size, square, blur):
                    assert moved[row, p] < 0.05 * moved[row, best], (row, layout.box(p, row=row))
        still = [p for p in range(layout.n_pos) if layout.roles[row][p] not in ("image", "pad")]
        assert moved[row, still].max() < 1e-6  # Newlines, marks and words say nothing of pixels.


def seen_by_vision(name: str, inputs: dict[str, Any], site: str) -> Tensor:
    """A vision tower's states with its blocks kept from mixing positions."""
    model = hooked(name) if name in SETTINGS else wrapped(name)[1]
    deaf = [
        mm.Edit(s.name, torch.zeros_like)
        for s in model.sitemap
        if s.tower == "vision" and s.part == "hook_attn_out"
    ]
    return model.run(inputs, read=[site], edit=deaf)[site]


@cache
def wrapped(name: str) -> tuple[Any, mm.HookedModel]:
    import tiny

    case = tiny.CASES[name]()
    return case, mm.wrap(case.model, tokenizer=tokenizer())


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "pixtral"])
def test_packed_vision_towers_keep_patches_where_the_layout_says(name: str) -> None:
    model, sizes = hooked(name), SETTINGS[name].sizes
    squares = [(h - 4, w - 4) for h, w in sizes]
    blank = prepared(name, model, [picture(size, None) for size in sizes])
    layout = model.layout(**blank)["vision"]
    assert layout.n_rows == 1
    for image, (size, square) in enumerate(zip(sizes, squares, strict=True)):
        pictures = [picture(s, square if i == image else None) for i, s in enumerate(sizes)]
        lit = prepared(name, model, pictures)
        last = f"vision.blocks.{1}.hook_resid_post"
        moved = (seen_by_vision(name, lit, last) - seen_by_vision(name, blank, last)).norm(dim=-1)[0]
        assert len(moved) == layout.n_pos
        for p in range(layout.n_pos):
            here = layout.image_index[0][p] == image and overlaps(layout.box(p), size, square, 0)
            assert (moved[p] > 1e-4) == here, (p, layout.box(p))


def test_an_image_in_tiles_is_one_row_in_mllama() -> None:
    case, model = wrapped("mllama")
    layout = model.layout(**case.inputs)["vision"]
    blank = case.inputs
    side, tiles = 2, ((0, 1), (0,))
    # Image 0 was cut in two side by side; image 1 is whole, and its second tile is padding.
    for image, tile in [(0, 0), (0, 1), (1, 0)]:
        for r in range(side):
            for c in range(side):
                pixels = blank["pixel_values"].clone()
                pixels[image, 0, tile, :, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4] += 3
                lit = blank | {"pixel_values": pixels}
                site = "vision.hook_embed"
                moved = (seen_by_vision("mllama", lit, site) - seen_by_vision("mllama", blank, site)).norm(
                    dim=-1
                )
                (row, pos), *more = (moved > 1e-4).nonzero().tolist()
                assert not more
                assert row == image
                assert layout.roles[row][pos] == "patch"
                assert layout.patch_rc(pos, row=row) == (r, c + side * tile)
                assert layout.tile_of(pos, row=row) == (tile + 1 if len(tiles[image]) > 1 else 0)
    assert layout.roles[1].count("patch") == 4
    assert layout.roles[0].count("class") == 2
    words = model.layout(**case.inputs)["language"]
    assert [words.roles[row].count("image") for row in (0, 1)] == [1, 1]


@pytest.mark.parametrize(
    ("name", "tower", "count"),
    [
        ("blip_2", "language", 3),
        ("blip_2_t5", "language", 3),
        ("instructblip", "language", 3),
        ("idefics2", "language", 3),
        ("kosmos2", "language", 3),
    ],
)
def test_queries_are_named_and_have_no_patch(name: str, tower: str, count: int) -> None:
    case, model = wrapped(name)
    layout = model.layout(**case.inputs)[tower]
    out = [(s.tower, s.part) for s in model.sitemap if s.part == "hook_out" and s.tower == "projector"]
    assert out
    features = model.run(case.inputs, read=["projector.hook_out"])["projector.hook_out"]
    assert features.shape[-2] == count
    embed = "hook_embed" if "language.hook_embed" in model.sitemap.sites else "encoder.0.hook_resid_pre"
    site = f"language.{embed}"
    plain = model.run(case.inputs, read=[site])[site]
    other = model.run(case.inputs, read=[site], edit=[mm.Edit("projector.hook_out", lambda x: x + 1)])[site]
    moved = (other - plain).norm(dim=-1) > 1e-5
    for row in range(layout.n_rows):
        assert layout.positions("query", row) == moved[row].nonzero().flatten().tolist()
        assert all(layout.patches[row][p] is None for p in layout.positions("query", row))
    with pytest.raises(ValueError, match="'query', which has no patch"):
        layout.patch_rc(layout.positions("query")[0])


def test_tiles_without_marks_are_counted_and_lie_nowhere_known() -> None:
    case, model = wrapped("internvl")
    found = model.layout(**case.inputs)
    layout, vision = found["language"], found["vision"]
    # Each of four squares of pixels becomes one token; the whole comes last.
    for number, (row, pos, tile) in enumerate([(0, 2, 1), (0, 3, 2), (0, 4, 0), (1, 2, 0)]):
        pixels = case.inputs["pixel_values"].clone()
        pixels[number, :, 4:, :4] += 3
        site = "language.hook_embed"
        lit = seen_by_vision("internvl", case.inputs | {"pixel_values": pixels}, site)
        moved = (lit - seen_by_vision("internvl", case.inputs, site)).norm(dim=-1)
        assert (moved > 1e-5).nonzero().tolist() == [[row, pos]]
        assert layout.tile_of(pos, row=row) == tile
        assert vision.tiles[number][0] == tile
        assert vision.image_index[number][0] == (0 if number < 3 else 1)
    with pytest.raises(ValueError, match="tile 1, of no known place"):
        layout.box(2)
    assert layout.box(4) == (0, 0, 1, 1)


def test_codes_lie_in_lines_that_end() -> None:
    case, model = wrapped("emu3")
    layout = model.layout(**case.inputs)["language"]
    sizes = case.inputs["image_sizes"].tolist()
    with torch.no_grad():
        codes = model.wrapped.model.get_image_features(
            case.inputs["pixel_values"], case.inputs["image_sizes"]
        )
    names = model.wrapped.model.vocabulary_mapping
    for row, tokens in enumerate(codes.image_tokens):
        places = [p for p in range(layout.n_pos) if layout.roles[row][p] in ("image", "newline")]
        told = [t for line in names.convert_img2bpe(tokens) for t in line.tolist()]
        assert len(places) == len(told)
        for p, token in zip(places, told, strict=True):
            assert (layout.roles[row][p] == "newline") == (token == names.eol_token_id)
            if layout.roles[row][p] == "image":
                r, c = layout.patch_rc(p, row=row)
                assert names.img2bpe[int(tokens[r, c])] == token
        assert layout.grids[row][places[0]] == (sizes[row][0] // 2, sizes[row][1] // 2)


def test_codes_of_a_square_image_are_line_by_line() -> None:
    case, model = wrapped("chameleon")
    layout = model.layout(**case.inputs)["language"]
    core = model.wrapped.model
    with torch.no_grad():
        codes = core.vqmodel.encode(case.inputs["pixel_values"], return_dict=True).image_tokens
        words = core.get_input_embeddings()(core.vocabulary_mapping.convert_img2bpe(codes))
    down = model.run(case.inputs, read=["vision.hook_latent"])["vision.hook_latent"].shape[-2]
    words = words.unflatten(0, (2, down, -1))  # A code for each place of the latent map.
    embed = model.run(case.inputs, read=["language.hook_embed"])["language.hook_embed"]
    for row in (0, 1):
        for p in layout.positions("image", row):
            r, c = layout.patch_rc(p, row=row)
            assert torch.equal(embed[row, p], words[row, r, c])


def test_a_mean_of_all_patches_stands_before_them_in_florence2() -> None:
    case, model = wrapped("florence2")
    layout = model.layout(**case.inputs)["text"]
    assert layout.grid == (2, 2)
    # What the words' tower reads, before it normalises.
    was = model.run(case.inputs, read=["projector.hook_out"])["projector.hook_out"]
    first = layout.positions("image")[0]
    assert layout.patches[0][first] is None
    for p in layout.positions("image")[1:]:
        r, c = layout.patch_rc(p)

        def lit(x: Tensor, r: int = r, c: int = c) -> Tensor:
            return torch.stack(
                [
                    x[0].index_put(
                        (torch.arange(len(x[0])), *map(torch.tensor, (r, c))),
                        torch.tensor(5.0),
                        accumulate=True,
                    ),
                    x[1],
                ]
            )

        edit = [mm.Edit("projector.hook_in", lit)]
        now = model.run(case.inputs, read=["projector.hook_out"], edit=edit)["projector.hook_out"]
        moved = (now - was).norm(dim=-1)[0] > 1e-4
        assert [first + int(i) for i in moved.nonzero()] == [first, p]


def test_patches_of_janus_are_line_by_line() -> None:
    case, model = wrapped("janus")
    layout = model.layout(**case.inputs)["language"]
    site = "language.hook_embed"
    for p in layout.positions("image"):
        r, c = layout.patch_rc(p)
        pixels = case.inputs["pixel_values"].clone()
        pixels[0, :, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4] += 3
        lit = seen_by_vision("janus", case.inputs | {"pixel_values": pixels}, site)
        moved = (lit - seen_by_vision("janus", case.inputs, site)).norm(dim=-1) > 1e-5
        assert moved.nonzero().tolist() == [[0, p]]


@pytest.mark.parametrize("name", ["idefics2", "idefics3"])
def test_pictures_that_are_padding_are_no_rows_of_a_vision_tower(name: str) -> None:
    case = tiny_vlm.CASES[name]()
    model = mm.HookedModel(case.model)
    pixels = case.inputs["pixel_values"].abs() + 0.1

    def rows(given: Tensor) -> int:
        prepared = case.inputs | {"pixel_values": given}
        layout = of_model._vision(model.wrapped, model.sitemap, model.towers["vision"], prepared, None)
        assert layout is not None
        return len(layout.roles)

    n = len(pixels) * pixels.shape[1]
    assert rows(pixels) == n
    padded = torch.cat([pixels, torch.zeros_like(pixels[:, :1])], 1)
    assert rows(padded) == n
    padded[0, -1, 0, 0, 0] = 1.0  # A picture that is black but for a pixel is one.
    assert rows(padded) == n + 1
