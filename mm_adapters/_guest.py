"""Riding on a service that does not have this package: it serves its own model, and we bring our code.

The hosted service serves nnsight's model classes. There a job names the model as those do, and its
payload holds this package's source, which is put to work around the service's model when the payload
is opened. As a trusted job everything works as at home. In the service's sandbox the model is in another
process that has none of our code, so only sites that are a module's input or output can be reached.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnsight.intervention.interleaver import Interleaver
from nnsight.intervention.serialization import CustomCloudPickler

from mm_adapters._alone import alone
from mm_adapters._errors import AttentionUnreachableError, MissingSiteError
from mm_adapters._spec import Input, Output
from mm_adapters._taps import _first_tensor, _place_of

if TYPE_CHECKING:
    from torch import Tensor

    from mm_adapters._spec import Site
    from mm_adapters._traced_remote import ServedModel
    from mm_adapters.traced import TracedModel

TASKS = {"contrastive": "zero-shot-image-classification", "vlm": "image-text-to-text"}
_LEFT_OUT = ("zoo", "hooked", "cli")
# A service need not have jaxtyping, which only annotates.
_NO_JAXTYPING = "class Float:\n    def __class_getitem__(cls, key):\n        return object\n"


def guest_key(model: TracedModel) -> str:
    """The key under which a stock service serves the same checkpoint.

    Raises: ValueError if it serves none of this kind.
    """
    from mm_adapters import zoo

    origin = model.origin
    assert origin is not None
    name = str(zoo.path(origin.name)) if origin.name in zoo.NAMES else origin.name
    about: dict[str, Any] = {"repo_id": name, "revision": origin.options.get("revision")}
    if "automodel" in origin.options:
        raise ValueError(
            f"A service without mm-interp makes of {origin.name} the pipeline that it names, not a "
            f"{origin.options['automodel']}. Serve it yourself: mm-interp ndif up."
        )
    if model.kind == "diffusion":
        return f"nnsight.modeling.diffusion.DiffusionModel:{json.dumps(about)}"
    if model.kind not in TASKS or name.startswith("open_clip:"):
        raise ValueError(
            f"A service without mm-interp cannot serve {origin.name}: nnsight has no class for a "
            f"{model.kind} of {model.sitemap.family}. Serve it yourself: mm-interp ndif up."
        )
    return (
        f"nnsight.modeling.transformers.TransformersModel:{json.dumps(about | {'task': TASKS[model.kind]})}"
    )


class _Parcel:
    """Opens, on a service, as what `RequestModel.serialize` would have sent."""

    def __init__(self, inner: bytes, names: list[str]) -> None:
        self.content = sources(), inner, {name: _Held(name) for name in names}

    def __reduce__(self) -> Any:
        return open_parcel, self.content


class _Held:
    """Stands in a payload for what the service has under this name."""

    def __init__(self, name: str) -> None:
        self._persistent_id = name


class _Notes(CustomCloudPickler):
    """A pickler that notes which of a service's objects are referred to."""

    names: dict[str, None]

    def persistent_id(self, obj: Any) -> Any:
        name = super().persistent_id(obj)
        if name is not None:
            self.names[name] = None
        return name


def parcel(tracer: Any, model: ServedModel, compress: bool) -> bytes:
    """A payload that brings this package along."""
    import io

    import zstandard
    from nnsight.intervention.serialization import dumps, reduce_block

    frame = tracer.info.frame
    block = reduce_block(tracer.node, frame.f_globals, dict(frame.f_locals))
    buffer = io.BytesIO()
    notes = _Notes(buffer, protocol=4)
    notes.names = {"Interleaver": None, f"Module:{model.path}": None}
    notes.dump((tracer, block))
    if model.kind == "diffusion":  # type: ignore[attr-defined]
        notes.names["Pipeline"] = None
    notes.names.pop("TracedModel", None)
    data = dumps(_Parcel(buffer.getvalue(), list(notes.names)))
    return zstandard.ZstdCompressor(level=6).compress(data) if compress else data


def sources() -> dict[str, str]:
    """The source of every module a traced model needs, by its path below this package's folder."""
    root = Path(__file__).parent
    files = {}
    for path in sorted(root.rglob("*.py")):
        inner = path.relative_to(root)
        if inner.parts[0].removesuffix(".py") not in _LEFT_OUT and not inner.name.startswith("_tower"):
            files[f"mm_adapters/{inner.as_posix()}"] = path.read_text(encoding="utf-8")
    return files | {"jaxtyping": _NO_JAXTYPING}


def open_parcel(files: dict[str, str], inner: bytes, held: dict[str, Any]) -> Any:
    """Runs on the service, where this module is not; shipped by its source, it needs nothing of it."""
    import atexit
    import importlib.util
    import shutil
    import sys
    import tempfile
    from pathlib import Path

    from nnsight.intervention.serialization import loads

    stamp = str(hash(tuple(sorted(files.items()))))
    loaded = sys.modules.get("mm_adapters")
    if loaded is not None and getattr(loaded, "__parcel__", stamp) != stamp:
        for name in [n for n in sys.modules if n.partition(".")[0] == "mm_adapters"]:
            del sys.modules[name]
        loaded = None
    if loaded is None and importlib.util.find_spec("mm_adapters") is None:
        folder = tempfile.mkdtemp(prefix="mm_adapters-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        for name, text in files.items():
            if name == "jaxtyping":
                continue
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        sys.path.append(folder)
        if importlib.util.find_spec("jaxtyping") is None:
            Path(folder, "jaxtyping.py").write_text(files["jaxtyping"], encoding="utf-8")
        importlib.invalidate_caches()
        import mm_adapters

        mm_adapters.__dict__["__parcel__"] = stamp
    from mm_adapters._guest import settle

    return loads(inner, settle(held))


def settle(held: dict[str, Any]) -> dict[str, Any]:
    """What a payload may refer to, with a TracedModel made of the service's model."""
    from mm_adapters.traced import TracedModel

    asked = held["Interleaver"]
    wrapped = held["Pipeline"] if "Pipeline" in held else held["Module:model"]
    model = TracedModel(wrapped)
    model.is_guest = True
    in_process = type(asked) is Interleaver
    return held | {"TracedModel": model, "Interleaver": model.interleaver if in_process else asked}


def host_function(model: ServedModel, name: str, arguments: dict[str, Any]) -> str:
    """What a stock service calls the function that we call `name`; its sandbox is told a name only."""
    kind = model.kind  # type: ignore[attr-defined]
    if kind == "diffusion" or name == "_generate":
        return "generate"
    if name == "_forward" and kind == "contrastive":
        tower = alone(model.sitemap, arguments)  # type: ignore[attr-defined]
        return (tower.mount.run if tower else None) or "_call"
    return "_call" if name in ("_forward", "_plain") else name


def raw_location(root: str, site: Site) -> str:
    """Where nnsight itself hands over what a site is made of.

    Raises: AttentionUnreachableError or MissingSiteError if a site is not a module's input or output.
    """
    where = "This service does not have mm-interp and runs blocks in a sandbox, where only a module's input "
    where += "or output can be reached. Serve the model yourself: mm-interp ndif up."
    if isinstance(site.place, Output | Input) and not getattr(site.place, "like", None):
        side = "output" if isinstance(site.place, Output) else "input"
        return f"{root}.{site.module}.{side}" if site.module else f"{root}.{side}"
    if site.part.endswith(("hook_pattern", "hook_attn_scores")):
        raise AttentionUnreachableError(f"{site.name} is inside a fused call. {where}")
    raise MissingSiteError(f"{site.name} is computed from several values. {where}")


def shown(site: Site, raw: Any, n_heads: int | None) -> Tensor:
    """The part of a raw value that a site shows; what is written into it is in the raw value too."""
    place = site.place
    assert isinstance(place, Output | Input)
    if isinstance(place, Input):
        args, kwargs = raw
        if kwargs.get("past_key_values") is not None:
            # It would be sent back as a copy, and the model would go on with the one it has.
            raise MissingSiteError(
                f"{site.name} is read beside a key-value cache, which this service's sandbox cannot "
                "hand over. Read what the block before gives, or serve the model yourself: mm-interp ndif up."
            )
        slot = place.argument if place.argument in kwargs else _first_tensor(args, kwargs)
        x = args[slot] if isinstance(slot, int) else kwargs[slot]
    else:
        if place.gain is not None:
            raise MissingSiteError(
                f"{site.name} is a branch times a parameter, which this service's sandbox cannot hand over."
            )
        at = _place_of(raw, place.item)
        x = raw if at is None else raw[at]
    x.data = x.data.contiguous()
    if place.chunk is not None:
        x = x.chunk(place.chunk[0], dim=-1)[place.chunk[1]]
    return x if n_heads is None else x.unflatten(-1, (n_heads, -1))
