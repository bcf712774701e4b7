"""A multimodal model as an nnsight model, with the sites of this package in it, and the second Lens.

nnsight hands every module's input and output to one interleaver. Ours (`_traced_engine`) derives the
sites from them, with the readers that the TransformerLens engine uses too, and serves each as a
location like nnsight's own: blocks, edits, caches, several invokes and loops over steps work on
sites as on modules. Attention is opened up (scores, pattern) only where a block or a run waits for
it. No torch hook is put on the model; nnsight itself gives each module a forward of its own, which
does nothing outside a trace.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, no_type_check

import nnsight
import torch
from nnsight.tracing.tracer import WithBlockNotFoundError
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from mm_adapters._alone import runner
from mm_adapters._errors import InputError, MetaDeviceError
from mm_adapters._images import opened
from mm_adapters._lens import Edit, Read, Run, as_read
from mm_adapters._origin import Origin
from mm_adapters._points import Points
from mm_adapters._sitemap import SiteMap, SiteTable
from mm_adapters._taps import AttentionTap
from mm_adapters._traced_batch import PipelineModule, Rows, combine, combine_prompts, n_prompts
from mm_adapters._traced_engine import SiteEditor, SiteInterleaver, SiteTracer
from mm_adapters._traced_points import TracedPoint
from mm_adapters._traced_record import Recorder
from mm_adapters._traced_remote import ServedModel
from mm_adapters._traced_rows import RowBatcher
from mm_adapters._traced_site import SiteEnvoy, TracedPart

if TYPE_CHECKING:
    from mm_adapters._inputs import Inputs
    from mm_adapters.remote import PendingRun

_RAW = ("text", "images")
_REMOTE = ("remote", "blocking", "job_id", "verbose")
_KEEP = object()


class TracedModel(ServedModel):
    """CLIP, LLaVA or Stable Diffusion for nnsight: its own paths, and every site by its name.

    `wrapped` is a module or a pipeline; it keeps its weights and its behaviour. It is called with its
    own arguments, or with raw `text=` and `images=`. A sampling loop takes `seed=`.

        with model.trace(text=["a red circle"], images=[image]):
            z = model.site("vision.blocks.3.attn.hook_z").save()
            model.site("vision.blocks.5.attn.hook_pattern")[:] = 0

    With `remote=True` a block, a session or a `run` goes to the NDIF service that nnsight is configured
    for (or `remote="http://..."`), if the model was loaded by a name; `origin` is that name.
    """

    _batcher_class = RowBatcher

    def __init__(self, wrapped: Any, *, inputs: Inputs | None = None, origin: Origin | None = None) -> None:
        module = wrapped if isinstance(wrapped, nn.Module) else PipelineModule(wrapped)
        super().__init__(module, interleaver=SiteInterleaver(), envoys=TracedPart)
        self._wrapped = wrapped
        self._inputs = inputs
        self.origin = origin
        self.sitemap = SiteMap(wrapped)
        engine = self.interleaver
        assert isinstance(engine, SiteInterleaver)
        self._points = Points(wrapped, self.sitemap, lambda site: TracedPoint(site, engine))
        taps = self._points.taps
        heads = {engine.envoys[id(t.module)].path: t.n_heads for t in taps if isinstance(t, AttentionTap)}
        engine.serve(self._points.by_name, taps, self._loop_module())  # type: ignore[arg-type]
        paths = {at: envoy.path for at, envoy in engine.envoys.items()} | {-1: self.path}
        self.rows = Rows(wrapped, self.sitemap, paths, heads)

    @property
    def wrapped(self) -> Any:
        """The module or pipeline this was made of."""
        return self._wrapped

    @property
    def points(self) -> Points:
        """Where the sites' values pass."""
        return self._points

    @property
    def kind(self) -> str:
        """ "contrastive", "vlm", "diffusion" or "tower"."""
        return self.sitemap.mounts.kind

    @property
    def tower_names(self) -> list[str]:
        """The towers' names, in the order they run."""
        return list(self.sitemap.towers)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(p.dtype for p in self._module.parameters() if p.is_floating_point())

    def sites(self, pattern: str = "*") -> SiteTable:
        """The sites whose names match a glob, with axes; and what is absent there, with the reason."""
        return SiteTable(self.sitemap.find(pattern))

    def site(self, name: str, new: Any = _KEEP) -> Any:
        """In a trace: a site's value, which may be saved and written into; or sets it to `new`.

        Raises: MissingSiteError for a name that is no site; OutOfOrderError if it had run already.
        """
        envoy = self.envoy(name)
        if new is _KEEP:
            return envoy.output
        envoy.output = new
        return None

    def envoy(self, name: str) -> SiteEnvoy:
        """A site as an envoy, whose `.output` is read and assigned in a trace.

        Raises: MissingSiteError for a name that is no site.
        """
        self.sitemap[name]
        return SiteEnvoy(self, self._points.by_name[name])

    def prepare(self, *, text: Any = None, images: Any = None) -> dict[str, Any]:
        """Raw text and images as the wrapped model's own arguments, on its device, in its dtype."""
        if self._inputs is None:
            raise InputError(
                "This model came without a processor, so it cannot take raw text or images. "
                "Pass one: mm_adapters.wrap(model, processor=...), or give the model's own arguments."
            )
        with unset_fake_temporarily():  # In a scan the inputs are real, so that they can be made.
            ready = self._inputs.prepare(text=text, images=images)
            return {k: self._placed(v) if isinstance(v, Tensor) else v for k, v in ready.items()}

    def tokenizer_of(self, tower: str) -> Any:
        """The tokenizer of a text tower, or None."""
        suffix = tower.removeprefix("text") if tower.startswith("text") else ""
        own = getattr(self._wrapped, f"tokenizer{suffix}", None)
        return own if own is not None else getattr(self._inputs, "tokenizer", None)

    def check_ready(self) -> None:
        """Raises: MetaDeviceError if the weights have no values."""
        if self.device is not None and self.device.type == "meta":
            raise MetaDeviceError(
                "This model is on the meta device: its sites can be listed, but it has no weights to run. "
                "Load it without device='meta'."
            )

    def trace(self, *inputs: Any, fn: Any = None, tracer_cls: Any = None, **kwargs: Any) -> Any:
        """As nnsight's, with the model's own arguments, or raw text and images.

        Of a model of images and texts one side may be given alone: then its tower is run, and
        `tracer.result` is what that gives. A pipeline makes one step, as nnsight's do, unless
        `num_inference_steps` is given; `differentiable=True` keeps the graph of its loop.
        """
        if self.kind == "diffusion" and fn is None:
            kwargs.setdefault("num_inference_steps", 1)
        if kwargs.get("remote"):
            kwargs = self._opened(kwargs)
            if self.needs_own_inputs(kwargs["remote"]):
                job = {k: kwargs.pop(k) for k in _REMOTE if k in kwargs}
                inputs, kwargs = (), self.arguments(inputs, kwargs) | job
        return super().trace(*inputs, fn=fn or self._forward, tracer_cls=tracer_cls or SiteTracer, **kwargs)

    def scan(self, *inputs: Any, fn: Any = None, **kwargs: Any) -> Any:
        """As nnsight's: shapes, without computing.

        Raises: NotImplementedError for a pipeline: its schedulers branch on values.
        """
        if self.kind == "diffusion":
            raise NotImplementedError(
                "A whole pipeline cannot be scanned: its scheduler branches on values. Scan a part, "
                "`model.unet.scan(sample, timestep, encoder_hidden_states=...)`."
            )
        if kwargs.pop("remote", False):
            raise ValueError("scan computes nothing and runs here. Leave remote out.")
        return super().scan(*inputs, fn=fn or self._forward, **kwargs)

    def edit(self, *, inplace: bool = False, backend: Any = None) -> SiteEditor:
        """As nnsight's: a block that is kept, and run again in every later trace."""
        return SiteEditor(self, inplace=inplace, backend=backend)

    @no_type_check  # nnsight finds its `with` block by counting frames; a checker would add some.
    def generate(self, *inputs: Any, read: Iterable[str | Read] = (), edit: Iterable[Edit] = (),
                 **kwargs: Any) -> Any:  # fmt: skip
        """`with model.generate(...):` traces the wrapped model's generation, or a pipeline's loop with
        all its steps; called without `with` it runs it, and gives a `Run` if sites are read or edited.
        """
        fn = self._plain if self.kind == "diffusion" else self._generate
        if self.interleaver.interleaving:
            return fn(*inputs, **kwargs)
        reads, edits = list(read), list(edit)
        remote = {k: kwargs.pop(k) for k in _REMOTE if k in kwargs}
        if reads or edits:
            return self._recorded(self.named(inputs, kwargs), reads, edits, None, fn, **remote)
        tracer = self.trace(*inputs, fn=fn, **kwargs, **remote)
        try:
            tracer.capture()
        except WithBlockNotFoundError:
            if remote.get("remote"):
                return self._recorded(self.named(inputs, kwargs), [], [], None, fn, **remote).output
            return self.interleave(fn, *inputs, **kwargs)
        return tracer

    def run(
        self,
        inputs: Mapping[str, Any],
        *,
        read: Iterable[str | Read] = (),
        edit: Iterable[Edit] = (),
        grad_of: Callable[[Any], Tensor] | None = None,
        remote: bool | str = False,
        blocking: bool = True,
        verbose: bool = False,
    ) -> Any:
        """One forward (for a pipeline, one sampling loop), with sites read and edited: a `Run`.

        Where the inputs are one tower's alone (images of a CLIP, or of a VLM), that tower is run.
        `grad_of` is a scalar function of the output; its gradients at the read sites come back too.
        With `remote` the functions of the reads and edits are sent along, by their source; with
        `blocking=False` what comes back is a `PendingRun`.

        Raises: MissingSiteError before anything runs; EditNeverFiredError if an edit touched nothing.
        """
        job = {"remote": remote, "blocking": blocking, "verbose": verbose} if remote else {}
        return self._recorded(dict(inputs), list(read), list(edit), grad_of, self._plain, **job)

    def named(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """One call's arguments by name, raw text and images as they are."""
        kwargs = dict(kwargs)
        if inputs and self.kind != "diffusion" and _is_text(inputs[0]):
            kwargs["text"], inputs = inputs[0], inputs[1:]
        return kwargs | dict(zip(self._argument_names(), inputs, strict=False))

    def arguments(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """One call's arguments, by name, with raw text and images prepared."""
        kwargs = self.named(inputs, kwargs)
        raw = {k: kwargs.pop(k) for k in _RAW if kwargs.get(k) is not None and not self._is_own(k, kwargs[k])}
        return {**self.prepare(**raw), **kwargs} if raw else kwargs

    def _recorded(
        self,
        arguments: dict[str, Any],
        read: list[str | Read],
        edit: list[Edit],
        grad_of: Any,
        fn: Any,
        *,
        blocking: bool = True,
        **remote: Any,
    ) -> Run | PendingRun:
        reads = [as_read(item) for item in read]
        for item in (*reads, *edit):
            self.sitemap[item.site]  # Raises MissingSiteError before anything runs, or is sent.
        if grad_of is not None and self.kind == "diffusion":
            arguments["differentiable"] = True
        if remote:
            arguments = self._opened(arguments)
            if self.needs_own_inputs(remote["remote"]):
                arguments = self.arguments((), arguments)
        found: dict[str, Any] = {}
        tracer = super().trace(fn=fn, tracer_cls=SiteTracer, blocking=blocking, **remote)
        with tracer:
            recorder = Recorder(self, reads, edit, grad_of, arguments)
            with tracer.invoke(**arguments):
                found = nnsight.save(recorder.record(tracer))
            for site in recorder.followed:
                with tracer.invoke():
                    recorder.follow(site)
        if blocking:
            return Run(**found)
        from mm_adapters.remote import PendingRun

        return PendingRun(tracer.backend)

    def _opened(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Arguments as another machine can take them: pictures for paths, tensors on the CPU."""
        out = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in arguments.items()}
        if out.get("images") is not None:
            out["images"] = opened(out["images"])
        return out

    def _plain(self, *args: Any, **kwargs: Any) -> Any:
        if args or self.kind == "diffusion":
            return self._module(*args, **kwargs)
        return runner(self._module, self.sitemap, kwargs)(**kwargs)

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        return self._module.generate(*args, **kwargs)  # type: ignore[operator]

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._plain(*args, **kwargs)

    def _batch_size(self, *inputs: Any, **kwargs: Any) -> int:
        if inputs or any(kwargs.get(k) is not None for k in _RAW):
            return 1
        if self.kind == "diffusion":
            return n_prompts(kwargs)
        return int(any(isinstance(v, Tensor) for v in kwargs.values()))

    def _batch(self, invokes: list[Any], fn: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = [self._in_dtype(arguments) for _, arguments in invokes]
        if len(given) < 2:
            return (), dict(given[0]) if given else {}
        if self.kind == "diffusion":
            return (), combine_prompts(given)
        tokenizer = getattr(self._inputs, "tokenizer", None)
        config = getattr(self._wrapped, "config", None)
        pad = getattr(tokenizer, "pad_token_id", None)
        pad = getattr(config, "pad_token_id", None) if pad is None else pad
        left = self.kind == "vlm" and getattr(tokenizer, "padding_side", "right") == "left"
        return (), combine(given, 0 if pad is None else pad, left)

    def is_guided(self, arguments: Mapping[str, Any]) -> bool:
        """Whether a pipeline called with these arguments runs under classifier-free guidance."""
        default = inspect.signature(self._wrapped.__call__).parameters.get("guidance_scale")
        scale = arguments.get("guidance_scale", default.default if default else 1.0)
        return self.sitemap.mounts.guidance is not None and scale > 1

    def _in_dtype(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Pixels in the dtype of the weights, which a sandbox that prepared them does not know."""
        if self.kind == "diffusion" or self.dtype == torch.float32:
            return arguments
        floats = {k: v for k, v in arguments.items() if isinstance(v, Tensor) and v.dtype == torch.float32}
        return arguments | {k: v.to(self.dtype) for k, v in floats.items()}

    def _loop_module(self) -> nn.Module | None:
        for tower in self.sitemap.towers.values():
            if tower.name == self.sitemap.mounts.loop or tower.record.role == "language":
                return tower.module
        return None

    def _argument_names(self) -> list[str]:
        called = self._wrapped.__call__ if self.kind == "diffusion" else type(self._wrapped).forward
        return [n for n in inspect.signature(called).parameters if n != "self"]

    def _is_own(self, name: str, value: Any) -> bool:
        # open_clip's own argument is called text too, and is a tensor of tokens.
        return name == "text" and isinstance(value, Tensor)

    def _placed(self, x: Tensor) -> Tensor:
        # On the meta device there is nothing to compute with, but a job to send.
        device = (
            torch.device("cpu") if self.device is not None and self.device.type == "meta" else self.device
        )
        return x.to(device, self.dtype if x.is_floating_point() else None)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list | tuple) and bool(value) and all(isinstance(v, str) for v in value)
    )
