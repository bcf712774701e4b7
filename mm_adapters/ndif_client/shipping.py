"""This package's source as a part of a job, for a service that does not have the package.

The hosted service serves nnsight's model classes. There a job names the model as those do, and its
payload holds this package's source, which is installed when the payload is opened and makes a TracedModel
of the service's model. As a trusted job everything works as on a service of one's own. In the service's
sandbox the model is in another process that has none of our code, so only sites that are a module's input
or output can be reached.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nnsight.intervention.interleaver import Interleaver
from nnsight.intervention.serialization import CustomCloudPickler

from mm_adapters.nnsight_engine.protocol import JobModel

_LEFT_OUT = ("zoo", "hooked", "cli", "tl_engine")
# A service need not have jaxtyping, which only annotates.
_NO_JAXTYPING = "class Float:\n    def __class_getitem__(cls, key):\n        return object\n"


class ShippedSource:
    """Unpickled on a service, it installs this package's source and is what `payload` unpickles to."""

    def __init__(self, payload: bytes, names: list[str]) -> None:
        self.arguments = sources(), payload, {name: ServiceObject(name) for name in names}

    def __reduce__(self) -> Any:
        return install_and_load, self.arguments


class ServiceObject:
    """A reference, in a payload, to an object that the service has under this name."""

    def __init__(self, name: str) -> None:
        self._persistent_id = name


class ReferenceRecorder(CustomCloudPickler):
    """A pickler that records which of a service's objects are referred to."""

    names: dict[str, None]

    def persistent_id(self, obj: Any) -> Any:
        name = super().persistent_id(obj)
        if name is not None:
            self.names[name] = None
        return name


def payload_with_sources(tracer: Any, model: JobModel, compress: bool) -> bytes:
    """A job's payload that holds this package's source."""
    import io

    import zstandard
    from nnsight.intervention.serialization import dumps, reduce_block

    frame = tracer.info.frame
    block = reduce_block(tracer.node, frame.f_globals, dict(frame.f_locals))
    buffer = io.BytesIO()
    recorder = ReferenceRecorder(buffer, protocol=4)
    recorder.names = {"Interleaver": None, f"Module:{model.path}": None}
    recorder.dump((tracer, block))
    if model.kind == "diffusion":
        recorder.names["Pipeline"] = None
    recorder.names.pop("TracedModel", None)
    data = dumps(ShippedSource(buffer.getvalue(), list(recorder.names)))
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


def install_and_load(files: dict[str, str], payload: bytes, service_objects: dict[str, Any]) -> Any:
    """Installs this package on a service, and unpickles a payload that uses it.

    It is shipped by its source to where this module is missing, so it uses no name of this module, and
    finds the package's by importlib once they are installed.
    """
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
        package: Any = importlib.import_module("mm_adapters")
        package.__shipped__ = stamp
    traced_model = importlib.import_module("mm_adapters.traced").TracedModel
    shipping = importlib.import_module("mm_adapters.ndif_client.shipping")
    return loads(payload, shipping.with_traced_model(service_objects, traced_model))


def with_traced_model(service_objects: dict[str, Any], traced_model: Any) -> dict[str, Any]:
    """The objects that a payload may refer to, with a TracedModel made of the service's model."""
    interleaver = service_objects["Interleaver"]
    pipeline = service_objects.get("Pipeline")
    model = traced_model(service_objects["Module:model"] if pipeline is None else pipeline)
    model.on_stock_service = True
    if type(interleaver) is Interleaver:  # Of the model's own process, not of a sandbox.
        interleaver = model.interleaver
    return service_objects | {"TracedModel": model, "Interleaver": interleaver}
