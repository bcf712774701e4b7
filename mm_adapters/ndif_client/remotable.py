"""A traced model that runs remotely: its key, its environment, and how it is pickled.

A model is never shipped. A job names it by a key, and in the job's payload it is one reference, which
the service resolves to its own, with sites, rows and processors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nnsight.intervention.batching import Batcher
from nnsight.modeling.mixins.remotable import Remotable
from torch._guards import detect_fake_mode

from mm_adapters._errors import InputError
from mm_adapters.checkpoints.origin import CheckpointRef
from mm_adapters.ndif_client.backend import Dispatch, LocalCopy
from mm_adapters.ndif_client.stock_service import host_function
from mm_adapters.nnsight_engine.interleaver import SiteInterleaver
from mm_adapters.runs.base_model import BaseModel

if TYPE_CHECKING:
    from nnsight.tracing.backend import Backend

MODEL = "TracedModel"


class Reference:
    """A reference, in a payload, to an object that the service has under this name."""

    def __init__(self, name: str) -> None:
        self._persistent_id = name

    def __reduce__(self) -> Any:
        """Raises: InputError: who pickles a job never comes here, for it takes the name."""
        raise InputError(
            "A traced model is not pickled. Copy it with copy.deepcopy; to keep it, save what it wraps "
            "(model.wrapped.save_pretrained(folder)) and load that: mm_adapters.load(folder, "
            "engine='nnsight')."
        )


class ServedModel(BaseModel, Remotable):
    """A Remotable whose key is a `CheckpointRef`; without one it runs on this machine only.

    `on_stock_service` says that it is made of the model of a service without this package.
    `service_packages` are what each service has installed, by its address.
    """

    origin: CheckpointRef | None = None
    task: str | None
    peft: str | None
    load_adapter: Any
    on_stock_service = False
    service_packages: dict[str, dict[str, str]]

    @property
    def in_process(self) -> bool:
        """Whether blocks run in the model's own process; in a service's sandbox they do not."""
        return isinstance(self.interleaver, SiteInterleaver)

    def interleave(self, fn: Any, *args: Any, batcher: Batcher | None = None, **kwargs: Any) -> Any:
        """As nnsight's. Raises: MetaDeviceError without weights; InputError for invokes in a sandbox."""
        if self.in_process:
            if self.is_on_meta and detect_fake_mode() is None:
                self.dispatch()
                self.check_ready()
        elif batcher is not None and batcher.batching:
            # NDIF 0.1.2 (ray/sandbox/driver.py, _assemble) makes nnsight's plain Batcher whatever the
            # model's is, and each invoke would be given rows that are not its own.
            raise InputError(
                "This service runs blocks in a sandbox, which cannot tell the rows of "
                f"{len(batcher.invokes)} invokes apart. Trace the inputs one by one, or all in one invoke."
            )
        elif self.on_stock_service:
            arguments = batcher.invokes[0][1] if batcher is not None and batcher.invokes else kwargs
            fn = host_function(self, fn if isinstance(fn, str) else fn.__name__, arguments)
        return super().interleave(fn, *args, batcher=batcher, **kwargs)

    def needs_own_inputs(self, remote: bool | str) -> bool:
        """Whether raw inputs must be prepared here: a service without this package cannot do it."""
        if remote == "local" or not remote or self.origin is None:
            return False
        return Dispatch(self, host=remote if isinstance(remote, str) else None).on_stock_service

    def _remote_backend(
        self, remote: bool | str, blocking: bool, job_id: str | None, verbose: bool
    ) -> Backend:
        if remote == "local":
            return LocalCopy(self, verbose=verbose)
        host = remote if isinstance(remote, str) else None
        return Dispatch(self, host=host, blocking=blocking, job_id=job_id, verbose=verbose)

    def _remoteable_model_key(self) -> str:
        if self.origin is None:
            raise InputError(
                "This model was made from an object, which a remote service cannot know, so it runs on "
                "this machine only. Leave remote out, or load it by a name: "
                "mm_adapters.load(name, engine='nnsight')."
            )
        return self.origin.key(task=self.task)

    @property
    def attn_implementation(self) -> str | None:
        """The attention that the model's modules run with ("sdpa", "eager", ...); None if it names none.

        A job runs with that of the model here, whatever the service's had before.
        """
        return getattr(getattr(self._module, "config", None), "_attn_implementation", None)

    def _remoteable_get_env(self) -> dict[str, Any]:
        env = {"attn_implementation": self.attn_implementation, "peft": self.peft}
        return {k: v for k, v in env.items() if v is not None}

    def _remoteable_set_env(self, env: dict[str, Any] | None) -> None:
        wanted = env or {}
        self.load_adapter(wanted.get("peft"))
        implementation = wanted.get("attn_implementation")
        if implementation is None or implementation == self.attn_implementation:
            return
        self._module.set_attn_implementation(implementation)  # type: ignore[operator]
        if self.attn_implementation != implementation:
            raise InputError(
                f"{type(self._module).__name__} cannot switch its attention to {implementation!r}, and keeps "
                f"{self.attn_implementation!r}. Load it with attn_implementation={implementation!r}."
            )

    def _remoteable_persistent_objects(self) -> dict[str, Any]:
        return super()._remoteable_persistent_objects() | {MODEL: self}

    def __reduce__(self) -> Any:
        for envoy in self.modules():
            envoy._module._persistent_id = f"Module:{envoy.path}"
        self.interleaver._persistent_id = "Interleaver"  # type: ignore[attr-defined]
        edits = self._edits or None
        return (
            unpickle_model,
            (Reference(MODEL), self.interleaver, bool(edits)),
            edits,
            None,
            None,
            restore_edits,
        )

    def __copy__(self) -> Any:
        return self._shallow_copy()


def unpickle_model(model: Any, interleaver: Any, edited: bool) -> Any:
    """The model of a job where the job runs: the service's own, or a copy of it that is to have edits.

    In a sandbox the interleaver is one that asks the model's process.
    """
    if interleaver is model.interleaver and not edited:
        return model
    copied = model._shallow_copy()
    copied.interleaver = interleaver
    return copied


def restore_edits(copied: Any, edits: list[Any]) -> None:
    """Gives a copy its edits, which may refer to the copy."""
    copied._edits = edits
