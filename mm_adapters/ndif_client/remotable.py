"""What makes a traced model one that runs remotely: its key, its environment, and how it travels.

A model is never shipped. A job names it by a key, and in the job's payload it is one reference, which
the service resolves to its own: sites, rows and processors are there already.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nnsight.intervention.batching import Batcher
from nnsight.modeling.mixins.remotable import CheckpointInfo, Remotable, bytes_per_element
from torch._guards import detect_fake_mode

from mm_adapters._errors import InputError
from mm_adapters.checkpoints.origin import CheckpointRef
from mm_adapters.ndif_client.stock_service import host_function
from mm_adapters.nnsight_engine.interleaver import SiteInterleaver

if TYPE_CHECKING:
    from nnsight.tracing.backend import Backend

MODEL = "TracedModel"


class Reference:
    """Stands in a payload for what the service has under this name."""

    def __init__(self, name: str) -> None:
        self._persistent_id = name


class ServedModel(Remotable):
    """A Remotable whose key is an `CheckpointRef`; without one it runs on this machine only."""

    origin: CheckpointRef | None = None
    on_stock_service = False  # Whether this is made of a model that a service without this package serves.

    @property
    def is_here(self) -> bool:
        """Whether blocks run in the model's own process; in a service's sandbox they do not."""
        return isinstance(self.interleaver, SiteInterleaver)

    @property
    def is_on_meta(self) -> bool:
        """Whether the weights have no values."""
        raise NotImplementedError

    def check_ready(self) -> None:
        raise NotImplementedError

    def interleave(self, fn: Any, *args: Any, batcher: Batcher | None = None, **kwargs: Any) -> Any:
        """As nnsight's. Raises: MetaDeviceError without weights; InputError for invokes in a sandbox."""
        if self.is_here:
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
            given = batcher.invokes[0][1] if batcher is not None and batcher.invokes else kwargs
            fn = host_function(self, fn if isinstance(fn, str) else fn.__name__, given)
        return super().interleave(fn, *args, batcher=batcher, **kwargs)

    def needs_own_inputs(self, remote: bool | str) -> bool:
        """Whether raw inputs must be prepared here: a service without this package cannot do it."""
        if remote == "local" or not remote or self.origin is None:
            return False
        from mm_adapters.ndif_client.backend import Dispatch

        return Dispatch(self, host=remote if isinstance(remote, str) else None).on_stock_service

    def _remote_backend(
        self, remote: bool | str, blocking: bool, job_id: str | None, verbose: bool
    ) -> Backend:
        from mm_adapters.ndif_client.backend import Dispatch, LocalCopy

        if remote == "local":
            return LocalCopy(self, verbose=verbose)
        host = remote if isinstance(remote, str) else None
        return Dispatch(self, host=host, blocking=blocking, job_id=job_id, verbose=verbose)

    def _remoteable_model_key(self) -> str:
        if self.origin is None:
            raise ValueError(
                "This model was made from an object, which a remote service cannot know, so it runs on "
                "this machine only. Leave remote out, or load it by a name: "
                "mm_adapters.load(name, engine='nnsight')."
            )
        return self.origin.key()

    def _remoteable_class(self) -> type:
        from mm_adapters.traced import TracedModel

        return TracedModel

    @classmethod
    def _remoteable_from_model_key(
        cls,
        model_key: str,
        *,
        dispatch: bool = False,
        device: Any = None,
        dtype: Any = None,
        device_map: Any = None,
        **_: Any,
    ) -> Remotable:
        from mm_adapters.loading import load

        if device_map is not None:
            raise NotImplementedError(
                "A TracedModel is served from one device; give its deployment one card."
            )
        origin = CheckpointRef.parse(model_key)
        device = f"cuda:{device}" if isinstance(device, int) else device
        place = device if dispatch else "meta"
        return load(origin.name, engine="nnsight", device=place, dtype=dtype, **origin.options)

    @classmethod
    def _remoteable_describe_checkpoint(cls, model_key: str, dtype: str) -> CheckpointInfo:
        model = cls._remoteable_from_model_key(model_key)
        sizes = [x.nelement() for x in (*model._module.parameters(), *model._module.buffers())]
        n_params = sum(p.nelement() for p in model._module.parameters())
        config = getattr(model._module, "config", None)
        revision = CheckpointRef.parse(model_key).options.get("revision")
        return CheckpointInfo(int(sum(sizes) * bytes_per_element(dtype)) + 1, n_params, config, revision)

    def _remoteable_get_env(self) -> dict[str, Any]:
        chosen = getattr(getattr(self._module, "config", None), "_attn_implementation", None)
        return {"attn_implementation": chosen} if chosen else {}

    def _remoteable_set_env(self, env: dict[str, Any] | None) -> None:
        chosen = (env or {}).get("attn_implementation")
        if chosen and chosen != self._remoteable_get_env().get("attn_implementation"):
            self._module.set_attn_implementation(chosen)  # type: ignore[operator]

    def _remoteable_persistent_objects(self) -> dict[str, Any]:
        return super()._remoteable_persistent_objects() | {MODEL: self}

    def __reduce__(self) -> Any:
        for envoy in self.modules():
            envoy._module._persistent_id = f"Module:{envoy.path}"
        self.interleaver._persistent_id = "Interleaver"  # type: ignore[attr-defined]
        edits = self._edits or None
        return (
            unpickle_model,
            (self.interleaver, Reference(MODEL), bool(edits)),
            edits,
            None,
            None,
            restore_edits,
        )

    def __copy__(self) -> Any:
        return self._shallow_copy()


def unpickle_model(interleaver: Any, model: Any, edited: bool) -> Any:
    """The model of a job where the job runs: the service's own, or a twin that is to have edits.

    In a sandbox the interleaver is one that asks the model's process.
    """
    if interleaver is model.interleaver and not edited:
        return model
    twin = model._shallow_copy()
    twin.__dict__["interleaver"] = interleaver
    return twin


def restore_edits(twin: Any, edits: list[Any]) -> None:
    """Gives a twin its edits, which may speak of the twin."""
    twin._edits = edits
