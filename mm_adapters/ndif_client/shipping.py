"""Riding on a service that does not have this package: it serves its own model, and we bring our code.

The hosted service serves nnsight's model classes. There a job names the model as those do, and its
payload holds this package's source, which is put to work around the service's model when the payload
is opened. As a trusted job everything works as at home. In the service's sandbox the model is in another
process that has none of our code, so only sites that are a module's input or output can be reached.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnsight.intervention.interleaver import Interleaver
from nnsight.intervention.serialization import CustomCloudPickler

if TYPE_CHECKING:
    from mm_adapters.ndif_client.remotable import ServedModel

_LEFT_OUT = ("zoo", "hooked", "cli", "tl_engine")
# A service need not have jaxtyping, which only annotates.
_NO_JAXTYPING = "class Float:\n    def __class_getitem__(cls, key):\n        return object\n"


class ShippedSource:
    """Opens, on a service, as what `RequestModel.serialize` would have sent."""

    def __init__(self, inner: bytes, names: list[str]) -> None:
        self.content = sources(), inner, {name: ServiceObject(name) for name in names}

    def __reduce__(self) -> Any:
        return install_and_load, self.content


class ServiceObject:
    """Stands in a payload for what the service has under this name."""

    def __init__(self, name: str) -> None:
        self._persistent_id = name


class ReferenceRecorder(CustomCloudPickler):
    """A pickler that notes which of a service's objects are referred to."""

    names: dict[str, None]

    def persistent_id(self, obj: Any) -> Any:
        name = super().persistent_id(obj)
        if name is not None:
            self.names[name] = None
        return name


def payload_with_sources(tracer: Any, model: ServedModel, compress: bool) -> bytes:
    """A payload that brings this package along."""
    import io

    import zstandard
    from nnsight.intervention.serialization import dumps, reduce_block

    frame = tracer.info.frame
    block = reduce_block(tracer.node, frame.f_globals, dict(frame.f_locals))
    buffer = io.BytesIO()
    notes = ReferenceRecorder(buffer, protocol=4)
    notes.names = {"Interleaver": None, f"Module:{model.path}": None}
    notes.dump((tracer, block))
    if model.kind == "diffusion":  # type: ignore[attr-defined]
        notes.names["Pipeline"] = None
    notes.names.pop("TracedModel", None)
    data = dumps(ShippedSource(buffer.getvalue(), list(notes.names)))
    return zstandard.ZstdCompressor(level=6).compress(data) if compress else data


def sources() -> dict[str, str]:
    """The source of every module a traced model needs, by its path below this package's folder."""
    root = Path(__file__).parents[1]
    files = {}
    for path in sorted(root.rglob("*.py")):
        inner = path.relative_to(root)
        if inner.parts[0].removesuffix(".py") not in _LEFT_OUT:
            files[f"mm_adapters/{inner.as_posix()}"] = path.read_text(encoding="utf-8")
    return files | {"jaxtyping": _NO_JAXTYPING}


def install_and_load(files: dict[str, str], inner: bytes, held: dict[str, Any]) -> Any:
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
    if loaded is not None and getattr(loaded, "__shipped__", stamp) != stamp:
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

        mm_adapters.__dict__["__shipped__"] = stamp
    from mm_adapters.ndif_client.shipping import with_traced_model

    return loads(inner, with_traced_model(held))


def with_traced_model(held: dict[str, Any]) -> dict[str, Any]:
    """What a payload may refer to, with a TracedModel made of the service's model."""
    from mm_adapters.traced import TracedModel

    asked = held["Interleaver"]
    wrapped = held["Pipeline"] if "Pipeline" in held else held["Module:model"]
    model = TracedModel(wrapped)
    model.on_stock_service = True
    in_process = type(asked) is Interleaver
    return held | {"TracedModel": model, "Interleaver": model.interleaver if in_process else asked}
