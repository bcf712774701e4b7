"""Short text for what work was made from: weights, configurations, files, tensors, settings.

Equal text means equal content: of tensors every bit, of files every byte. What is slow is done fast, not
left out, so that a changed weight or picture is always seen.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mm_adapters._errors import InputError

_ROW = 1024  # Words of 8 bytes that become one.
_CHUNK_ROWS = 64  # What is mixed at once stays in a processor's cache.
_GPU_ROWS = 2**16
_FEW_BYTES = 16 * 2**10  # Of a small tensor SHA-256 takes every byte itself.
_WHOLE_FILE = 2**24  # A file up to so many bytes is read at once.
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
# Which of its adapters a layer uses, how strongly (peft), and a prompt adapter's share (diffusers).
_ADAPTERS = ("active_adapters", "disable_adapters", "merged_adapters", "scaling", "scale")
# Of a configuration, what says where it is from and not what is computed.
_NOT_CONFIG = ("transformers_version", "torch_dtype", "dtype", "name_or_path", "architectures")


def of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """A hash of tensors by name: shapes, dtypes and every bit, the same on each device.

    On the device it mixes words of 8 bytes, each with its position, row by row in exact integers, and
    SHA-256 takes the rows: several times as fast as SHA-256 of all, and nothing large leaves a GPU.
    """
    hashed = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        hashed.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        if tensor.is_meta:
            hashed.update(b"meta;")
        elif tensor.numel():
            few = tensor.numel() * tensor.element_size() <= _FEW_BYTES
            hashed.update((_bytes_of(tensor.cpu()) if few else _mixed(tensor).cpu()).numpy().data)
    return _short(hashed)


def of_module(module: nn.Module) -> dict[str, Any]:
    """What a module's numbers depend on: class, weights (with buffers), dtypes, configuration, adapters.

    The configuration is that of the whole, and of each layer its class and what it says of itself.
    """
    tensors = {f"weight {n}": p for n, p in module.named_parameters()}
    tensors |= {f"buffer {n}": b for n, b in module.named_buffers()}
    layers, adapters = hashlib.sha256(), []
    for name, layer in module.named_modules():
        tensors |= {f"weight {name}.{n}".replace(" .", " "): t for n, t in _elsewhere(layer).items()}
        layers.update(f"{name}:{type(layer).__name__}:{_ADDRESS.sub('', layer.extra_repr())};".encode())
        own, cls = vars(layer), type(layer)  # Asking a module for what it lacks takes long.
        if any(key in own or hasattr(cls, key) for key in _ADAPTERS):
            settings = [getattr(layer, key, None) for key in _ADAPTERS]
            # A model has methods of these names.
            adapters.append([name, *(None if callable(x) else _plain(x) for x in settings)])
    return {
        "class": type(module).__name__,
        "weights": of_tensors(tensors),
        "dtype": sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()}),
        "layers": _short(layers),
        "config": of_value(_config(getattr(module, "config", None))),
        "adapters": of_value(adapters),
    }


def _elsewhere(layer: nn.Module) -> dict[str, Tensor]:
    """A layer's weights that are not among its parameters: offloaded (accelerate), or packed."""
    found: dict[str, Tensor] = {}
    hook = vars(layer).get("_hf_hook")
    for one in getattr(hook, "hooks", (hook,)):
        kept = getattr(one, "weights_map", None)
        if kept is not None:
            found |= {n: kept[n] for n, p in layer.named_parameters(recurse=False) if p.is_meta}
    packed = getattr(layer, "weight", None)
    if callable(packed):  # A layer that torch quantised says its weight when it is called.
        weight = packed()
        if isinstance(weight, Tensor):
            found["weight"] = weight.dequantize() if weight.is_quantized else weight
    scales = getattr(getattr(packed, "quant_state", None), "absmax", None)
    if isinstance(scales, Tensor):  # Of bitsandbytes' four bits.
        found["scales"] = scales
    return found


def of_model(model: Any) -> dict[str, Any]:
    """What a `mm.Model`'s numbers depend on: each of its modules, a pipeline's schedule, its preparation."""
    wrapped = model.wrapped
    components = getattr(wrapped, "components", None)
    if isinstance(wrapped, nn.Module):
        facts = of_module(wrapped)
    else:
        modules = {n: m for n, m in (components or {}).items() if isinstance(m, nn.Module)}
        schedules = {n: m for n, m in (components or {}).items() if hasattr(m, "timesteps")}
        facts = {
            "class": type(wrapped).__name__,
            "parts": {n: of_module(m) for n, m in sorted(modules.items())},
            "schedule": {n: [type(s).__name__, of_value(_config(s.config))] for n, s in schedules.items()},
        }
    return facts | {"inputs": _preparation(model.preparer)}


def of_data(items: Any) -> str:
    """A hash of items (files, pictures, arrays, texts, mappings of such), in their order, by their content.

    A file's is read once in a process, as long as its size and times stay.

    Raises: InputError for what has no content that could be hashed.
    """
    hashed = hashlib.sha256()
    for item in items:
        if isinstance(item, Path):  # Most are, and there may be many thousands.
            hashed.update(_of_readable(item))
        else:
            _feed(hashed.update, item)
    return _short(hashed)


def of_value(value: Any) -> str:
    """A hash of one value of any of these kinds. Raises: InputError as `of_data`."""
    return of_data([value])


def of_file(path: str | os.PathLike[str]) -> str:
    """A hash of a file's bytes."""
    name = os.fspath(path)
    facts = os.stat(name)
    return _of_bytes_in(name, facts.st_size, facts.st_dev, facts.st_ino, facts.st_mtime_ns, facts.st_ctime_ns)


def _of_readable(path: str | os.PathLike[str]) -> bytes:
    """What a file is fed as. One that cannot be read is told by who reads it, or skipped."""
    try:
        return f"file64:{of_file(path)}".encode()
    except OSError as error:
        kind = type(error).__name__
        return f"unreadable file{len(kind)}:{kind}".encode()


@lru_cache(maxsize=2**20)
def _of_bytes_in(path: str, size: int, *facts: int) -> str:
    if size > _WHOLE_FILE:
        with open(path, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    # There may be many thousands of small ones: four calls of the system for each are all.
    hashed, opened = hashlib.sha256(), os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        while part := os.read(opened, size + 1):
            hashed.update(part)
            if len(part) == size:
                break
    finally:
        os.close(opened)
    return hashed.hexdigest()


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _mixed(tensor: Tensor) -> Tensor:
    """One word for each 1,024 words of a tensor's bytes, the last of them filled up with zeros."""
    raw = _bytes_of(tensor)
    if raw.data_ptr() % 8 or raw.storage_offset() % 8:
        raw = raw.clone()
    factors = _factors(raw.device)
    whole = len(raw) // (8 * _ROW) * (8 * _ROW)
    rows = raw[:whole].view(torch.int64).view(-1, _ROW)
    parts = [
        _fold(part, factors) for part in rows.split(_CHUNK_ROWS if raw.device.type == "cpu" else _GPU_ROWS)
    ]
    if whole < len(raw):
        last = raw.new_zeros(8 * _ROW)
        last[: len(raw) - whole] = raw[whole:]
        parts.append(_fold(last.view(torch.int64).view(1, _ROW), factors))
    return torch.cat(parts)


def _fold(rows: Tensor, factors: Tensor) -> Tensor:
    # Products and sums wrap round, exactly; the shifts let high bits reach low ones. In place, for speed.
    words = rows >> 29
    words.bitwise_xor_(rows).mul_(factors)
    return words.bitwise_xor_(words >> 32).sum(1)


@lru_cache(maxsize=8)
def _factors(device: torch.device) -> Tensor:
    """An odd factor for each place in a row."""
    draws = np.random.Generator(np.random.PCG64(20)).integers(0, 2**63 - 1, _ROW, np.int64)
    return torch.from_numpy(draws | 1).to(device)


def _feed(update: Callable[[bytes], Any], value: Any) -> None:
    """Feeds a value, with its kind and length before it, so that no two values read alike."""

    def put(kind: str, raw: bytes) -> None:
        update(f"{kind}{len(raw)}:".encode())
        update(raw)

    if isinstance(value, str):
        put("text", value.encode("utf-8", "surrogatepass"))
    elif isinstance(value, os.PathLike):
        update(_of_readable(value))
    elif value is None or isinstance(value, bool | int | float | complex):
        put("number", repr(value).encode())
    elif isinstance(value, bytes):
        put("bytes", value)
    elif isinstance(value, Tensor):
        put("tensor", of_tensors({"": value}).encode())
    elif isinstance(value, np.ndarray | np.generic):
        array = np.ascontiguousarray(value)
        put(f"array {array.dtype} {array.shape} ", array.tobytes())
    elif isinstance(value, Image.Image):
        put("picture", _pixels(value))
    elif isinstance(value, Mapping):
        pairs = sorted(value.items(), key=lambda pair: str(pair[0]))
        put("mapping", str(len(pairs)).encode())
        for key, inner in pairs:
            _feed(update, str(key))
            _feed(update, inner)
    elif isinstance(value, set | frozenset):
        _feed(update, sorted(value, key=str))
    elif isinstance(value, Sequence | range):
        put("sequence", str(len(value)).encode())
        for inner in value:
            _feed(update, inner)
    elif isinstance(value, nn.Module):
        _feed(update, of_module(value))
    elif hasattr(value, "wrapped") and hasattr(value, "preparer"):
        _feed(update, of_model(value))
    elif isinstance(value, partial):
        _feed(update, [value.func, value.args, value.keywords])
    elif isinstance(value, torch.Generator):
        _feed(update, value.get_state())
    elif isinstance(value, torch.dtype | torch.device):
        put("name", str(value).encode())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        put("record", type(value).__name__.encode())
        _feed(update, {f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    elif isinstance(value, type):
        put("class", f"{value.__module__}.{value.__qualname__}".encode())
    elif hasattr(value, "__wrapped__"):
        _feed(update, inspect.unwrap(value))
    elif hasattr(value, "__code__"):
        _feed(update, [value.__qualname__, value.__code__.co_code, _constants(value.__code__.co_consts)])
        _feed(update, [cell.cell_contents for cell in value.__closure__ or ()])
    elif callable(value) and type(value).__module__ in ("builtins", "torch"):  # A function made in C.
        put("function", _ADDRESS.sub("", repr(value)).encode())
    else:
        raise InputError(
            f"Stored work must say what it is of, and a {type(value).__name__} has no content that can be "
            "told from another's. Pass paths, pictures, tensors, texts or numbers, or do without the folder."
        )


def _constants(constants: Iterable[Any]) -> list[Any]:
    return [c.co_code if hasattr(c, "co_code") else c for c in constants]


def _pixels(image: Image.Image) -> bytes:
    """The pixels of a picture; one that is open and not read yet is read aside, and stays as it is."""
    aside = getattr(image, "filename", None) if getattr(image, "tile", None) else None
    if aside and Path(aside).is_file():
        with Image.open(aside) as opened:
            opened.seek(image.tell() if hasattr(image, "tell") else 0)
            return _pixels_of(opened)
    return _pixels_of(image)


def _pixels_of(image: Image.Image) -> bytes:
    palette = image.getpalette() if image.mode == "P" else None
    facts = [image.mode, image.size, palette, image.getexif().get(0x0112)]  # How it is turned.
    return json.dumps(facts, default=str).encode() + image.tobytes()


def _config(config: Any) -> Any:
    if config is None:
        return None
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    return _plain(config)


def _plain(value: Any) -> Any:
    """Plain data of a configuration, without private entries; objects as they print."""
    if isinstance(value, Mapping):
        known = {str(k): v for k, v in value.items()}
        return {k: _plain(v) for k, v in known.items() if not k.startswith("_") and k not in _NOT_CONFIG}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v) for v in (sorted(value, key=str) if isinstance(value, set | frozenset) else value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return _ADDRESS.sub("", f"{type(value).__name__} {value!r}")


def _preparation(inputs: Any) -> str | None:
    """Of what makes raw texts and images a model's arguments."""
    if inputs is None:
        return None
    facts: dict[str, Any] = {
        f.name: _plain(getattr(inputs, f.name)) for f in dataclasses.fields(inputs) if f.name in _OF_INPUTS
    }
    process = inputs.image_processor
    facts["images"] = _config(process) if hasattr(process, "to_dict") else _plain(process)
    words = inputs.tokenizer
    if words is not None:
        vocabulary = None
        if hasattr(words, "get_vocab"):  # As one text: it has tens of thousands of words.
            vocabulary = json.dumps(words.get_vocab(), sort_keys=True)
        side, length = (getattr(words, key, None) for key in ("padding_side", "model_max_length"))
        chat = getattr(words, "chat_template", None)
        facts["texts"] = [type(words).__name__, vocabulary, side, length, _plain(chat)]
    return of_value(facts)


_OF_INPUTS = ("context", "image_token", "image_prompt", "pad_to_context", "padding_side")


def _short(hashed: Any) -> str:
    return hashed.hexdigest()[:24]
