"""Any picture a user may hold, as the 8-bit RGB image that image processors are made for.

Public: `to_rgb`, `to_rgb_list`, `image_files`, `readable_files`, `open_image`, `SUFFIXES`.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from mm_adapters._errors import InputError

ImageLike: TypeAlias = "Image.Image | str | os.PathLike[str] | np.ndarray | Tensor"

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_ACCEPTED = (
    "Accepted: a PIL image, the path of an image file, a numpy array [height, width] or "
    "[height, width, channel], or a torch tensor [channel, height, width]"
)
# What Pillow's readers raise for files that are cut or damaged: SyntaxError for broken chunks of a PNG.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    struct.error,
)
_ROUNDING = 1e-4  # How far outside 0..1 a float may lie, as resizing leaves it, before it is an error.


def to_rgb(image: Any) -> Image.Image:
    """The image in mode RGB, upright (its EXIF orientation is applied), 8 bits a channel.

    Gray is repeated over the channels; 16-bit gray is scaled (65535 -> 255), never cut; transparent
    pixels are laid over white, as a web page shows them; of an animation the first frame is taken.
    Floats in 0..1 are rounded to 8 bits: to keep a tensor exact, or differentiable, pass the model
    its `pixel_values` instead.

    Raises: InputError if it is no image, cannot be read, is empty, or its numbers or shape do not
    say how they are meant.
    """
    if isinstance(image, str | os.PathLike):
        return _from_file(os.fspath(image))
    if isinstance(image, Image.Image):
        return _from_pil(image)
    if isinstance(image, Tensor):
        return _from_tensor(image)
    if isinstance(image, np.ndarray):
        return _from_array(image)
    raise InputError(f"An image was expected and {type(image).__name__} was given. {_ACCEPTED}.")


def to_rgb_list(images: Any) -> list[Image.Image]:
    """Each image as `to_rgb` gives it; one image alone, or a batched array or tensor, will do too.

    Raises: InputError if there is none, or naming the one that `to_rgb` refuses.
    """
    many = as_list(images)
    if not many:
        raise InputError("images is empty. Pass at least one image, or leave images out.")
    return [_numbered(i, image) if len(many) > 1 else to_rgb(image) for i, image in enumerate(many)]


def image_files(
    folder: str | os.PathLike[str], *, recursive: bool = True, verify: bool = False, min_images: int = 1
) -> list[Path]:
    """The image files in a folder, in order of name: those that end as `SUFFIXES` say.

    `recursive`: also those in its folders, and so on. `verify`: each is opened, so that a broken file is
    named before anything is computed.

    Raises: InputError if there is no such folder, it has fewer images than `min_images`, or a broken one.
    """
    where = Path(folder)
    if not where.is_dir():
        raise InputError(f"There is no folder {where}. Pass a folder of images.")
    inside = where.rglob("*") if recursive else where.iterdir()
    files = sorted(path for path in inside if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise InputError(f"{where} holds no image: nothing there ends in {', '.join(SUFFIXES)}.")
    if len(files) < min_images:
        raise InputError(f"{where} holds {len(files)} images, and at least {min_images} are needed.")
    for path in files if verify else ():
        try:
            with Image.open(path) as image:
                image.verify()
        except _DAMAGE:
            raise InputError(f"{path} is no picture that can be read. Remove or replace it.") from None
    return files


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """The image in a file, open and whole, to be closed by who asked.

    Raises: InputError naming the file if there is none, it is no image, or it is damaged.
    """
    image = None
    try:
        image = Image.open(path)
        image.load()
        return image
    except FileNotFoundError:
        raise InputError(f"There is no file at {path}. Pass the path of an image file.") from None
    except UnidentifiedImageError:
        raise InputError(f"{path} is not in an image format that Pillow reads.") from None
    except Image.DecompressionBombError as error:
        raise InputError(f"{path} is too large to open: {error}") from None
    except _DAMAGE as error:
        if image is not None:
            image.close()
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} is truncated or corrupt: {reason}. Get the file again.") from None


def readable_files(
    files: Sequence[Path], *, skip_unreadable: bool, min_images: int = 1
) -> tuple[list[Path], list[tuple[Path, str]]]:
    """The files whose pixels can be read, and of the others why not.

    With `skip_unreadable` each is read through, else they are taken as they are: who reads them will say.

    Raises: InputError if fewer than `min_images` can be read.
    """
    if not skip_unreadable:
        return list(files), []
    good: list[Path] = []
    bad: list[tuple[Path, str]] = []
    for path in files:
        try:
            to_rgb(path)
        except (InputError, OSError) as error:
            bad.append((path, str(error)))
        else:
            good.append(path)
    if len(good) < min_images:
        raise InputError(
            f"Of {len(files)} images {len(good)} can be read, and at least {min_images} are needed. "
            f"{bad[0][0]}: {bad[0][1]}"
        )
    return good, bad


def opened(images: Any) -> Any:
    """The same, nested as it is, with a picture in place of each path: another machine has no such file."""
    if isinstance(images, str | os.PathLike):
        return _from_file(os.fspath(images))
    if isinstance(images, list | tuple):
        return [opened(image) for image in images]
    return images.cpu() if isinstance(images, Tensor) else images


def as_list(images: Any) -> list[Any]:
    """A list of what was given, whether it was one image or several; nothing is converted."""
    if isinstance(images, np.ndarray | Tensor):
        return list(images) if images.ndim == 4 else [images]
    if isinstance(images, str | os.PathLike | Image.Image) or not isinstance(images, Iterable):
        return [images]
    return list(images)


def _numbered(index: int, image: Any) -> Image.Image:
    try:
        return to_rgb(image)
    except InputError as error:
        raise InputError(f"images[{index}]: {error}") from None


def _from_file(path: str) -> Image.Image:
    if "://" in path:
        raise InputError(f"{path} is an address. Download the image and pass the file's path.")
    if not Path(path).is_file():
        kind = "a folder" if Path(path).is_dir() else "no file"
        raise InputError(f"There is {kind} at {path}. Pass the path of an image file.")
    with open_image(path) as image:
        return _from_pil(image)


def _from_pil(image: Image.Image) -> Image.Image:
    if 0 in image.size:
        raise InputError(f"The image is empty: {image.width} x {image.height} pixels.")
    try:
        image.load()
    except _DAMAGE as error:
        name = getattr(image, "filename", "") or "The image"
        raise InputError(f"{name} is truncated or corrupt: {error}. Get the file again.") from None
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        return _from_array(_checked_depth(image))
    if image.mode == "La":  # Pillow converts it to nothing else.
        image = image.convert("LA")
    if image.has_transparency_data or image.mode == "RGBa":
        over = image.convert("RGBA")
        white = Image.new("RGBA", over.size, "white")
        return Image.alpha_composite(white, over).convert("RGB")
    return image.convert("RGB")


def _checked_depth(image: Image.Image) -> np.ndarray:
    values = np.asarray(image)
    if image.mode == "F":
        return values
    low, high = int(values.min()), int(values.max())
    # Mode I holds 32 bits and says nothing of the depth meant: it is 16, unless the values deny it.
    if low < 0 or high > 65535 or (image.mode == "I" and 0 < high <= 255):
        raise InputError(
            f"The image is in mode {image.mode} with values {low}..{high}, which may be 8 or 16 "
            'bits. Convert it: image.convert("L") for 8 bits, image.convert("I;16") for 16.'
        )
    return values.astype(np.uint16)


def _from_tensor(tensor: Tensor) -> Image.Image:
    shape = list(tensor.shape)
    if tensor.ndim == 4:
        raise InputError(f"One image was expected and a batch {shape} was given. Pass its items.")
    if tensor.ndim not in (2, 3) or (tensor.ndim == 3 and shape[0] not in (1, 3, 4)):
        hint = " Use tensor.permute(2, 0, 1)." if tensor.ndim == 3 and shape[2] in (1, 3, 4) else ""
        raise InputError(
            f"A tensor of shape {shape} is not an image: a torch image is [channel, height, width] "
            f"with 1, 3 or 4 channels.{hint}"
        )
    tensor = tensor.detach().cpu()
    tensor = tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
    array = tensor.numpy()
    return _from_array(array if array.ndim == 2 else np.moveaxis(array, 0, -1))


def _from_array(array: np.ndarray) -> Image.Image:
    shape = list(array.shape)
    if array.ndim == 4:
        raise InputError(f"One image was expected and a batch {shape} was given. Pass its items.")
    if array.ndim not in (2, 3) or (array.ndim == 3 and shape[2] not in (1, 3, 4)):
        hint = ""
        if array.ndim == 3 and shape[0] in (1, 3, 4):
            hint = " It looks channel-first: use array.transpose(1, 2, 0)."
        raise InputError(
            f"An array of shape {shape} is not an image: a numpy image is [height, width] or "
            f"[height, width, channel] with 1, 3 or 4 channels.{hint}"
        )
    if array.size == 0:
        raise InputError(f"The image is empty: its shape is {shape}.")
    values = _to_8_bits(array)
    gray = values.ndim == 3 and values.shape[2] == 1
    return _from_pil(Image.fromarray(values[:, :, 0] if gray else values))


def _to_8_bits(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        return np.round(array / 257.0).astype(np.uint8)
    if array.dtype.kind != "f":
        raise InputError(
            f"An image of {array.dtype} was given; whole numbers must be uint8 (0..255) or uint16 "
            "(0..65535), fractions in 0..1. Convert it, for example image.astype(numpy.uint8)."
        )
    if not np.isfinite(array).all():
        count = int((~np.isfinite(array)).sum())
        raise InputError(f"The image has {count} values that are NaN or infinite. Replace them.")
    low, high = float(array.min()), float(array.max())
    if low < -_ROUNDING or high > 1 + _ROUNDING:
        raise InputError(
            f"An image of fractions must lie in 0..1 and this one is {low:.4g}..{high:.4g}. Divide "
            "it by its maximum, convert 0..255 to uint8, or pass normalised values to the model as "
            "pixel_values."
        )
    return np.round(array.clip(0, 1) * 255).astype(np.uint8)
