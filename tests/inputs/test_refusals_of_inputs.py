"""What cannot be meant is refused with its numbers; one step inside, it passes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mm_adapters import InputError
from mm_adapters.inputs.generation import check_generation
from mm_adapters.inputs.image_counts import check_images
from mm_adapters.inputs.images import open_image, opened, readable_files, to_rgb
from mm_adapters.inputs.numbers import check_finite
from mm_adapters.inputs.pipeline_call import check_options
from mm_adapters.inputs.prepared import _check_mask
from mm_adapters.records.image_tokens import Square
from mm_adapters.runs.indices import whole_numbers
from mm_adapters.storage.documents import read_mapping, read_text


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "red.png"
    Image.new("RGB", (4, 3), "red").save(path)
    return path


# --- pictures -----------------------------------------------------------------------------------


def test_a_picture_that_is_not_there_is_named(tmp_path: Path, picture: Path) -> None:
    gone = tmp_path / "gone.png"
    with pytest.raises(InputError, match=rf"^There is no file at {re.escape(str(gone))}\. Pass the path"):
        open_image(gone)
    with open_image(picture) as image:
        assert (image.size, image.getpixel((0, 0))) == ((4, 3), (255, 0, 0))


def test_a_picture_of_more_pixels_than_pillow_opens_is_named(
    picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)  # 12 are more than twice as many.
    with pytest.raises(InputError, match=rf"^{re.escape(str(picture))} is too large to open: .*12 pixels"):
        open_image(picture)


@pytest.fixture
def five(tmp_path: Path) -> list[Path]:
    """Pictures, of which the second and the last cannot be read."""
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for path in paths:
        Image.new("RGB", (4, 3), "red").save(path)
    paths[1].write_bytes(b"no picture")
    paths[4].unlink()
    return paths


def test_files_that_cannot_be_read_are_told_apart(five: list[Path]) -> None:
    good, bad = readable_files(five, skip_unreadable=True, min_images=3)
    assert good == [five[0], five[2], five[3]]
    assert [path for path, _ in bad] == [five[1], five[4]]
    assert "is not in an image format" in bad[0][1]
    assert "There is no file" in bad[1][1]
    assert readable_files(five, skip_unreadable=False, min_images=9) == (five, [])


def test_too_few_readable_files_are_an_error_with_the_first_reason(five: list[Path]) -> None:
    says = rf"^Of 5 images 3 can be read, and at least 4 are needed\. {re.escape(str(five[1]))}: .*format"
    with pytest.raises(InputError, match=says):
        readable_files(five, skip_unreadable=True, min_images=4)


def test_pictures_for_another_machine_are_opened_nested_as_they_are(picture: Path) -> None:
    tensor, image = torch.zeros(3, 2, 2), Image.new("RGB", (1, 1))
    first, (second, third), fourth = opened([str(picture), (tensor, image), picture])
    assert np.array_equal(np.asarray(first), np.asarray(to_rgb(picture)))
    assert np.array_equal(np.asarray(fourth), np.asarray(to_rgb(picture)))
    assert second.device.type == "cpu"
    assert torch.equal(second, tensor)
    assert third is image


def test_a_tensor_for_another_machine_comes_off_its_device() -> None:
    fake = torch.zeros(2, device="meta")
    with pytest.raises(NotImplementedError, match="no data"):  # It was asked to come to the CPU.
        opened(fake)


# --- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([1, "a"], r"scale\[1\]='a' is str"),
        ((0.5, float("nan")), r"scale\[1\]=nan\. Pass a finite"),
        ([[1, 2], [3, float("inf")]], r"scale\[1\]\[1\]=inf"),
        (None, "scale=None is NoneType. Pass a number"),
        (torch.tensor(float("inf")), "scale=inf"),
    ],
)
def test_one_of_several_numbers_is_named_by_its_place(value: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        check_finite("scale", value)


@pytest.mark.parametrize(
    "value", [1, -0.5, [1, 2.5], (3,), [], np.float32(1), torch.tensor(2), torch.ones(2)]
)
def test_finite_numbers_pass(value: Any) -> None:
    check_finite("scale", value)


def test_a_million_numbers_are_the_most() -> None:
    assert len(whole_numbers("steps", range(1_000_000))) == 1_000_000
    with pytest.raises(InputError, match=r"^steps: more than 1,000,000 numbers were given"):
        whole_numbers("steps", range(1_000_001))


def test_a_schedule_is_a_list_of_numbers() -> None:
    class Pipeline:
        def __call__(self, timesteps: Any = None, sigmas: Any = None) -> None: ...

    pipeline: Any = Pipeline()
    for value in (5, "5", [], (), np.zeros(0), torch.zeros(0)):
        with pytest.raises(InputError, match=rf"^sigmas={re.escape(repr(value))}: pass a list of numbers"):
            check_options(pipeline, {"sigmas": value})
    with pytest.raises(InputError, match=r"timesteps\[1\]='b' is str"):
        check_options(pipeline, {"timesteps": [3, "b"]})
    for given in ([3, 1], (3,), np.array([2.0]), torch.tensor([1])):
        check_options(pipeline, {"timesteps": given})
    pipeline.scheduler = SimpleNamespace(set_timesteps=lambda n, timesteps=None: None)
    check_options(pipeline, {"timesteps": [3, 1]})
    with pytest.raises(InputError, match="SimpleNamespace takes no sigmas of your own"):
        check_options(pipeline, {"sigmas": [3, 1]})


# --- image tokens and masks ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_tokens", "rows", "size", "fits"),
    [
        (4, 1, (28, 28), True),
        (8, 2, (28, 28), True),
        (9, 2, (28, 28), False),  # Not as many for each.
        (7, 1, (28, 28), False),  # No grid, with or without a token more.
        (14, 2, (28, 28), False),
        (10, 2, (28, 28), True),
        (5, 1, (28, 28), True),  # A class token first.
        (8, 1, (28, 56), True),
        (8, 1, (28, 28), False),  # 2 x 4 is no square's grid.
    ],
)
def test_image_tokens_are_a_grid_for_each_picture(n_tokens: int, rows: int, size: Any, fits: bool) -> None:
    pixels = torch.zeros(rows, 3, *size)
    if fits:
        check_images(Square(), SimpleNamespace(), {}, n_tokens, pixels)
        return
    says = f"There are {n_tokens} image tokens for {rows} pictures of {size[0]} x {size[1]} pixels"
    with pytest.raises(InputError, match=says):
        check_images(Square(), SimpleNamespace(), {}, n_tokens, pixels)


@pytest.mark.parametrize(
    ("strategy", "n_class", "n_wanted"), [("default", 1, 4), ("full", 1, 5), ("full", 0, 4)]
)
def test_llavas_projector_says_how_many_tokens_a_picture_takes(
    strategy: str, n_class: int, n_wanted: int
) -> None:
    config = SimpleNamespace(
        vision_feature_select_strategy=strategy, vision_config=SimpleNamespace(patch_size=14)
    )
    check_images(Square(), config, {}, 2 * n_wanted, torch.zeros(2, 3, 28, 28), n_class)
    for n in (2 * n_wanted - 1, 2 * n_wanted + 1):
        with pytest.raises(
            InputError, match=f"There are {n} image tokens, and the images take {2 * n_wanted}"
        ):
            check_images(Square(), config, {}, n, torch.zeros(2, 3, 28, 28), n_class)


@pytest.mark.parametrize(
    ("mask", "pixels", "fits"),
    [
        ((2, 8, 6), (2, 3, 8, 6), True),
        ((2, 1, 8, 6), (2, 3, 8, 6), True),
        ((2, 6, 8), (2, 3, 8, 6), False),
        ((2, 8, 5), (2, 3, 8, 6), False),
        ((2, 7, 6), (2, 3, 8, 6), False),
        ((5,), (2, 3, 8, 6), True),  # Of patches cut beforehand.
        ((2, 5), (2, 5, 12), True),
    ],
)
def test_a_mask_has_an_entry_for_each_pixel(mask: Any, pixels: Any, fits: bool) -> None:
    given = {"pixel_attention_mask": torch.ones(mask)}, torch.zeros(pixels)
    if fits:
        _check_mask(*given)
        return
    says = f"pixel_attention_mask is {list(mask)} for pictures of {list(pixels)}. Pass one entry"
    with pytest.raises(InputError, match=re.escape(says)):
        _check_mask(*given)


# --- generation ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"num_beams": 1, "num_return_sequences": 2},
            "LlamaForCausalLM cannot generate so: .*num_return_seq",
        ),
        ({"max_new_tokens": 0}, "max_new_tokens=0: pass a whole number from 1 up"),
        ({"min_new_tokens": -1}, "min_new_tokens=-1: pass a whole number from 0 up"),
        ({"temperature": 0}, "temperature=0: pass a number above 0"),
        ({"top_p": 1.5}, r"top_p=1.5: it is a probability, from 0 to 1"),
        ({"top_p": -0.1}, r"top_p=-0.1: it is a probability"),
    ],
)
def test_options_that_mean_nothing_are_refused_before_a_generation(
    options: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        check_generation(decoder(), options)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2, "num_return_sequences": 2},
        {"max_new_tokens": 1, "min_new_tokens": 0},
        {"temperature": 0.1, "top_p": 1.0, "do_sample": True},
        {"top_p": 0.0, "do_sample": True},
    ],
)
def test_options_that_a_generation_takes_pass(options: dict[str, Any]) -> None:
    model = decoder()
    before = model.generation_config.to_dict()
    check_generation(model, options)
    assert model.generation_config.to_dict() == before


def decoder() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**size, vocab_size=10, pad_token_id=0))


# --- files that a user writes -------------------------------------------------------------------


def a_folder(path: Path) -> None:
    path.mkdir()


def of_bytes(raw: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(raw)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "^There is no file {path}.$"),
        (a_folder, "^{path} cannot be read: Is a directory.$"),
        (of_bytes(b"\xff{}"), r"^{path} is no text in UTF-8 \(invalid start byte\)"),
        (of_bytes(b"{\0}"), "^{path} is no text in UTF-8: it holds zero bytes"),
        (of_bytes(b"{"), "^{path} is not valid JSON: Expecting property name"),
        (of_bytes(b"[1]"), "^{path} holds a list in JSON, and an object was expected"),
    ],
)
def test_a_users_file_that_is_no_object_is_named(
    make: Callable[[Path], Any], says: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.json"
    make(path)
    with pytest.raises(InputError, match=says.replace("{path}", re.escape(str(path)))):
        read_mapping(path)


def test_a_users_file_is_read_with_and_without_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for mark in (b"", b"\xef\xbb\xbf"):
        path.write_bytes(mark + '{"ä": 1}'.encode())
        assert read_mapping(path) == {"ä": 1}
        assert read_text(path) == '{"ä": 1}'
