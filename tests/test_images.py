"""Every sort of picture becomes the same 8-bit RGB, or one clear error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mm_adapters._errors import InputError
from mm_adapters.inputs.images import SUFFIXES, image_files, to_rgb, to_rgb_list

RAMP = np.arange(12 * 10 * 3, dtype=np.uint8).reshape(12, 10, 3)
GRAY = RAMP[:, :, 0]


def pixels(image: Any) -> np.ndarray:
    made = to_rgb(image)
    assert made.mode == "RGB"
    return np.asarray(made)


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(RAMP),
        RAMP,
        RAMP.astype(np.float32) / 255,
        RAMP.astype(np.float64) / 255,
        RAMP.astype(np.uint16) * 257,
        torch.from_numpy(RAMP.copy()).permute(2, 0, 1),
        torch.from_numpy(RAMP / 255).permute(2, 0, 1),
        (torch.from_numpy(RAMP / 255).permute(2, 0, 1)).requires_grad_(),
        Image.fromarray(np.dstack([RAMP, np.full((12, 10), 255, np.uint8)])),
        np.dstack([RAMP, np.full((12, 10), 255, np.uint8)]),
        RAMP[::-1].copy()[::-1],  # A view with a negative stride.
    ],
    ids=lambda x: f"{type(x).__name__}-{getattr(x, 'dtype', getattr(x, 'mode', ''))}",
)
def test_the_same_picture_gives_the_same_pixels_however_it_is_held(image: Any) -> None:
    assert np.array_equal(pixels(image), RAMP)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_tensors_are_read_to_within_their_rounding(dtype: torch.dtype) -> None:
    made = pixels((torch.from_numpy(RAMP / 255).permute(2, 0, 1)).to(dtype))
    assert np.abs(made.astype(int) - RAMP).max() <= (1 if dtype == torch.bfloat16 else 0)


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(GRAY),
        Image.fromarray(np.dstack([GRAY, np.full_like(GRAY, 255)])),
        Image.fromarray(GRAY.astype(np.uint16) * 257),
        Image.fromarray(GRAY.astype(np.int32) * 257),
        Image.fromarray(GRAY.astype(np.float32) / 255),
        GRAY,
        GRAY[:, :, None],
        GRAY.astype(np.uint16) * 257,
        torch.from_numpy(GRAY.copy()),
        torch.from_numpy(GRAY.copy())[None],
    ],
    ids=lambda x: f"{type(x).__name__}-{list(x.shape) if hasattr(x, 'shape') else getattr(x, 'mode', '')}",
)
def test_gray_of_any_depth_is_repeated_over_the_channels(image: Any) -> None:
    assert np.array_equal(pixels(image), np.repeat(GRAY[:, :, None], 3, axis=2))


def test_sixteen_bits_are_scaled_and_not_cut() -> None:
    deep = Image.fromarray(np.array([[0, 257, 32896, 65535]], dtype=np.uint16))
    assert deep.mode == "I;16"
    assert pixels(deep)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_a_16_bit_png_file_keeps_its_contrast(tmp_path: Path) -> None:
    Image.fromarray(np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)).save(tmp_path / "d.png")
    made = pixels(tmp_path / "d.png")
    assert made.min() == 0
    assert made.max() == 255
    assert len(np.unique(made)) == 64


def test_transparent_pixels_are_laid_over_white() -> None:
    image = Image.new("RGBA", (3, 1))
    image.putpixel((0, 0), (200, 0, 0, 255))
    image.putpixel((1, 0), (200, 0, 0, 0))
    image.putpixel((2, 0), (200, 0, 0, 51))  # A fifth.
    assert pixels(image)[0].tolist() == [[200, 0, 0], [255, 255, 255], [244, 204, 204]]


def test_transparency_of_palette_and_gray_images_is_seen(tmp_path: Path) -> None:
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png", transparency=1)
    assert pixels(tmp_path / "p.png")[0].tolist() == [[10, 20, 30], [255, 255, 255]]
    gray = Image.fromarray(np.array([[7, 9]], dtype=np.uint8))
    gray.save(tmp_path / "l.png", transparency=9)
    assert pixels(tmp_path / "l.png")[0].tolist() == [[7, 7, 7], [255, 255, 255]]


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "La", "LAB"]
)
def test_a_white_image_of_every_mode_is_white(mode: str) -> None:
    through = {"RGBa": "RGBA", "La": "LA", "PA": "P"}.get(mode, mode)
    image = Image.new("RGB", (4, 3), "white").convert(through)
    image = image.convert(mode) if through != mode else image
    assert np.abs(pixels(image).astype(int) - 255).max() <= 1


def test_the_orientation_that_a_camera_noted_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # Turn by 90 degrees to view.
    Image.fromarray(RAMP).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(pixels(str(tmp_path / "turned.png")), np.rot90(RAMP, -1))


def test_the_callers_image_is_left_as_it_was() -> None:
    image = Image.new("RGBA", (2, 2), (1, 2, 3, 4))
    before = image.tobytes()
    to_rgb(image)
    assert image.mode == "RGBA"
    assert image.tobytes() == before


NAN = np.full((4, 4, 3), 0.5)
NAN[1, 2, 0] = np.nan


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (NAN, "1 values that are NaN or infinite"),
        (torch.full((3, 4, 4), torch.inf), "48 values that are NaN or infinite"),
        (np.zeros((0, 4, 3), np.uint8), r"empty: its shape is \[0, 4, 3\]"),
        (torch.zeros(3, 0, 4), "empty"),
        (Image.new("RGB", (0, 5)), "empty: 0 x 5"),
        (np.zeros((4, 4, 2), np.uint8), "1, 3 or 4 channels"),
        (np.zeros((3, 8, 9), np.uint8), r"channel-first: use array.transpose\(1, 2, 0\)"),
        (torch.zeros(8, 9, 3), r"Use tensor.permute\(2, 0, 1\)"),
        (torch.zeros(5), r"shape \[5\] is not an image"),
        (np.zeros((2, 4, 4, 3), np.uint8), "a batch"),
        (torch.zeros(2, 3, 4, 4), "a batch"),
        (np.full((4, 4, 3), 255.0), "0..1 and this one is 255..255"),
        (np.full((4, 4, 3), -0.5), "-0.5"),
        (torch.randn(3, 8, 8) * 2, "pixel_values"),
        (np.zeros((4, 4, 3), np.int64), "int64"),
        (np.zeros((4, 4), bool), "bool"),
        (Image.fromarray(np.full((2, 2), 70000, np.int32)), "70000"),
        (Image.fromarray(np.full((2, 2), 200, np.int32)), "8 or 16"),
        ("https://example.com/cat.png", "Download"),
        ("no/such/picture.png", "no file at no/such/picture.png"),
        (".", "a folder"),
        (None, "NoneType was given"),
        (3, "int was given"),
    ],
)
def test_what_is_no_picture_is_one_clear_error(image: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        to_rgb(image)


def test_a_truncated_or_foreign_file_is_named(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for name in ("whole.png", "whole.jpg"):
        Image.fromarray(noise).save(tmp_path / name)
        cut = tmp_path / f"cut-{name}"
        cut.write_bytes((tmp_path / name).read_bytes()[:2000])
        with pytest.raises(InputError, match=f"cut-{name} is truncated or corrupt"):
            to_rgb(cut)
        with Image.open(cut) as lazy, pytest.raises(InputError, match=f"cut-{name} is truncated"):
            to_rgb(lazy)
    (tmp_path / "words.png").write_text("not an image")
    with pytest.raises(InputError, match="not in an image format"):
        to_rgb(tmp_path / "words.png")


@pytest.mark.parametrize(
    "images", [RAMP, [RAMP], (RAMP,), RAMP[None], Image.fromarray(RAMP), (i for i in [RAMP])]
)
def test_one_image_or_several_make_a_list(images: Any) -> None:
    assert [np.asarray(i).tolist() for i in to_rgb_list(images)] == [RAMP.tolist()]


def test_a_batched_tensor_is_its_images() -> None:
    batch = torch.rand(3, 3, 5, 4)
    made = to_rgb_list(batch)
    assert [np.asarray(m).tolist() for m in made] == [pixels(b).tolist() for b in batch]


def test_the_bad_one_of_many_is_named_and_none_is_an_error() -> None:
    with pytest.raises(InputError, match=r"images\[1\]: .*int64"):
        to_rgb_list([RAMP, RAMP.astype(np.int64)])
    for empty in ([], torch.zeros(0, 3, 4, 4)):
        with pytest.raises(InputError, match="images is empty"):
            to_rgb_list(empty)


def test_the_images_of_a_folder_are_those_that_pillow_reads_in_order_of_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder"):
        image_files(tmp_path / "none")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InputError, match="holds no image"):
        image_files(tmp_path)
    image = Image.new("RGB", (4, 3), "red")
    for i, suffix in enumerate(SUFFIXES):
        image.save(tmp_path / f"{9 - i}{suffix.upper() if i % 2 else suffix}")
    image.save(tmp_path / "folder.png" / "0.png")
    here = image_files(tmp_path, recursive=False, verify=True)
    assert [p.name[0] for p in here] == [str(9 - i) for i in reversed(range(len(SUFFIXES)))]
    assert all(to_rgb(p).size == (4, 3) for p in here)
    assert image_files(tmp_path) == sorted([*here, tmp_path / "folder.png" / "0.png"])
    with pytest.raises(InputError, match=f"holds {len(SUFFIXES)} images, and at least 99 are needed"):
        image_files(tmp_path, recursive=False, min_images=99)
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    assert len(image_files(tmp_path, recursive=False)) == len(here) + 1
    with pytest.raises(InputError, match=r"a\.png is no picture that can be read"):
        image_files(tmp_path, recursive=False, verify=True)


def test_only_one_place_knows_how_image_files_are_called() -> None:
    root = Path(__file__).parents[1]
    for package in ("mm_adapters", "methods_multimodal", "integrations", "examples"):
        for path in (root / package).rglob("*.py"):
            if path != root / "mm_adapters" / "inputs" / "images.py":
                text = path.read_text("utf-8")
                assert '".jpeg"' not in text, path
                assert not ("iterdir()" in text and '".png"' in text), path


def test_the_image_files_of_a_folder_are_listed_by_name(tmp_path: Path) -> None:
    below = tmp_path / "below"
    below.mkdir()
    for path in (tmp_path / "b.PNG", tmp_path / "a.jpeg", below / "c.tiff", tmp_path / "notes.txt"):
        path.write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    assert image_files(tmp_path) == [tmp_path / "a.jpeg", tmp_path / "b.PNG", below / "c.tiff"]
    assert image_files(str(tmp_path), recursive=False) == [tmp_path / "a.jpeg", tmp_path / "b.PNG"]
    with pytest.raises(InputError, match=r"holds no image: nothing there ends in \.png"):
        image_files(tmp_path / "folder.png")
    with pytest.raises(InputError, match="There is no folder"):
        image_files(tmp_path / "a.jpeg")
