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
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, no_type_check

import mm_adapters.nnsight_engine.import_order  # noqa: F401

# isort: split
import nnsight
import torch
from nnsight.tracing.tracer import WithBlockNotFoundError
from torch import Tensor, nn
from torch._guards import detect_fake_mode

from mm_adapters.checkpoints.origin import CheckpointRef
from mm_adapters.hooks.module_hooks import AttentionHook
from mm_adapters.hooks.wiring import Points
from mm_adapters.inputs.images import opened
from mm_adapters.nnsight_engine.batcher import RowBatcher
from mm_adapters.nnsight_engine.call_arguments import REMOTE_OPTIONS, by_name
from mm_adapters.nnsight_engine.envoys import SiteEnvoy, TracedPart
from mm_adapters.nnsight_engine.interleaver import SiteInterleaver
from mm_adapters.nnsight_engine.invokes import Rows, combine, combine_prompts, n_prompts
from mm_adapters.nnsight_engine.iteration import SiteEditor, SiteTracer
from mm_adapters.nnsight_engine.lazy_weights import NamedModel, generated, generator_of, open_named
from mm_adapters.nnsight_engine.pipeline_module import PipelineModule
from mm_adapters.nnsight_engine.points import TracedPoint
from mm_adapters.nnsight_engine.recorder import Recorder
from mm_adapters.nnsight_engine.scan import SiteScanner, for_shapes, shapes_only
from mm_adapters.records.spec import Guidance
from mm_adapters.runs.base_model import BaseModel
from mm_adapters.runs.lens import Edit, Read, Run, as_read
from mm_adapters.runs.session import is_guided
from mm_adapters.sites.single_tower import callable_for
from mm_adapters.sites.site_map import SiteMap

if TYPE_CHECKING:
    from mm_adapters.inputs.prepare import Inputs
    from mm_adapters.remote import PendingRun

_RAW = ("text", "images")
_KEEP = object()


class TracedModel(BaseModel, NamedModel):
    """CLIP, LLaVA or Stable Diffusion for nnsight: its own paths, and every site by its name.

    `wrapped` is a module or a pipeline; it keeps its weights and its behaviour. It is called with its
    own arguments, or with raw `text=` and `images=`, or messages of a chat. A sampling loop takes `seed=`.

        with model.trace(text=["a red circle"], images=[image]):
            z = model.site("vision.blocks.3.attn.hook_z").save()
            model.site("vision.blocks.5.attn.hook_pattern")[:] = 0

    `wrapped` may also be a name, as `mm_adapters.load` takes, with its options (device, dtype, revision,
    automodel) and nnsight's own: the weights are then read when the model first runs, or at once with
    `dispatch=True`. `rename` gives modules other names, `task` is transformers' for `pipe`.

    With `remote=True` a block, a session or a `run` goes to the NDIF service that nnsight is configured
    for (or `remote="http://..."`), if the model was loaded by a name; `origin` is that name.
    """

    _batcher_class = RowBatcher

    def __init__(
        self,
        wrapped: Any,
        *,
        inputs: Inputs | None = None,
        origin: CheckpointRef | None = None,
        sites: SiteMap | None = None,
        task: str | None = None,
        rename: Mapping[Any, Any] | None = None,
        **named: Any,
    ) -> None:
        if isinstance(wrapped, str | os.PathLike):
            found = open_named(wrapped, **named)
            wrapped, inputs, origin = found.model, found.inputs, found.origin
            self._unread = found.unread
        elif named:
            raise TypeError(f"{', '.join(named)}: of use with a name only, and the model is here already.")
        module = wrapped if isinstance(wrapped, nn.Module) else PipelineModule(wrapped)
        super().__init__(module, interleaver=SiteInterleaver(), envoys=TracedPart, rename=rename)
        self._inputs = inputs
        self._task = task
        self.origin = origin
        self._loaded_as = None if origin is None else origin.name
        self.automodel = named.get("automodel")
        self.generator = generator_of(self)
        self.sitemap = SiteMap(wrapped) if sites is None else sites
        engine = self.interleaver
        assert isinstance(engine, SiteInterleaver)
        self._points = Points(wrapped, self.sitemap, lambda site: TracedPoint(site, engine))
        module_hooks = self._points.module_hooks
        heads = {
            engine.envoys[id(t.module)].path: t.n_heads for t in module_hooks if isinstance(t, AttentionHook)
        }
        engine.serve(self._points.by_name, module_hooks, self._loop_module())  # type: ignore[arg-type]
        paths = {at: envoy.path for at, envoy in engine.envoys.items()} | {-1: self.path}
        self.rows = Rows(module, self.sitemap, paths, heads)

    @property
    def wrapped(self) -> Any:
        """The module or pipeline this was made of."""
        return self._module.pipeline if isinstance(self._module, PipelineModule) else self._module

    @property
    def points(self) -> Points:
        """Where the sites' values pass."""
        return self._points

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(p.dtype for p in self._module.parameters() if p.is_floating_point())

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

    def trace(self, *inputs: Any, fn: Any = None, tracer_cls: Any = None, **kwargs: Any) -> Any:
        """As nnsight's, with the model's own arguments, or raw text and images.

        The first may be given by position: text, pictures, messages of a chat, a dictionary. Of a model
        of images and texts one side may be given alone: then its tower is run, and `tracer.result` is
        what that gives. A pipeline makes one step (of each of its loops), as nnsight's do, unless
        `num_inference_steps` is given; `differentiable=True` keeps the graph of its loop.
        """
        if self.kind == "diffusion" and fn is None:
            kwargs = self._one_step() | kwargs
        if kwargs.get("remote"):
            job = {k: kwargs.pop(k) for k in REMOTE_OPTIONS if k in kwargs}
            inputs, kwargs = (), self._opened(self.named(inputs, kwargs))
            if self.needs_own_inputs(job["remote"]):
                kwargs = self.arguments((), kwargs)
            kwargs |= job
        return super().trace(*inputs, fn=fn or self._forward, tracer_cls=tracer_cls or SiteTracer, **kwargs)

    def scan(self, *inputs: Any, fn: Any = None, **kwargs: Any) -> Any:
        """As nnsight's: shapes, without computing. A pipeline makes one step, as in `trace`.

        Raises: NotImplementedError for a pipeline whose code branches on values.
        """
        if kwargs.pop("remote", False):
            raise ValueError("scan computes nothing and runs here. Leave remote out.")
        if self.kind == "diffusion" and fn is None:
            kwargs = self._one_step() | kwargs
        return SiteScanner(self, fn or self._forward, *inputs, **kwargs)

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
        # transformers' pipelines call the arguments of generate so.
        kwargs |= kwargs.pop("generate_kwargs", {})
        reads, edits = list(read), list(edit)
        remote = {k: kwargs.pop(k) for k in REMOTE_OPTIONS if k in kwargs}
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
        if not inputs:
            return dict(kwargs)
        return by_name(self.kind, self._takes(), self.processor or self.tokenizer, inputs, kwargs)

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
        if not remote:
            self.dispatch()  # A session looks at the pipeline that runs.
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

    def _one_step(self) -> dict[str, int]:
        """A pipeline's own words for one step; one of several loops has several."""
        return {name: 1 for name in self._takes() if name.endswith("num_inference_steps")}

    def _takes(self) -> list[str]:
        """The names that a call of the wrapped model or pipeline takes, in its order."""
        called = self.wrapped.__call__ if self.kind == "diffusion" else type(self.wrapped).forward
        return [name for name in inspect.signature(called).parameters if name != "self"]

    def _plain(self, *args: Any, **kwargs: Any) -> Any:
        if self.kind == "diffusion" and detect_fake_mode() is not None:
            with shapes_only(self.wrapped):
                return self._module(*args, **for_shapes(kwargs))
        if args or self.kind == "diffusion":
            return self._module(*args, **kwargs)
        return callable_for(self._module, self.sitemap, kwargs)(**kwargs)

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        return generated(self, args, kwargs)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._plain(*args, **kwargs)

    def _batch_size(self, *inputs: Any, **kwargs: Any) -> int:
        if inputs or any(kwargs.get(k) is not None for k in (*_RAW, "pipe")):
            return 1
        if self.kind == "diffusion":
            return n_prompts(kwargs, by_text="prompt" in self._takes())
        return int(any(isinstance(v, Tensor) for v in kwargs.values()))

    def _batch(self, invokes: list[Any], fn: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = [self._in_dtype(arguments) for _, arguments in invokes]
        if len(given) < 2:
            return (), dict(given[0]) if given else {}
        if self.kind == "diffusion":
            return (), combine_prompts(given)
        tokenizer = getattr(self._inputs, "tokenizer", None)
        config = getattr(self.wrapped, "config", None)
        pad = getattr(tokenizer, "pad_token_id", None)
        pad = getattr(config, "pad_token_id", None) if pad is None else pad
        left = self.kind == "vlm" and getattr(tokenizer, "padding_side", "right") == "left"
        return (), combine(given, 0 if pad is None else pad, left)

    def is_guided(self, arguments: Mapping[str, Any], guidance: Guidance) -> bool:
        """Whether a pipeline called with these arguments runs under classifier-free guidance."""
        return is_guided(self.wrapped, replace(guidance, flag=None), arguments)

    def _in_dtype(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Pixels in the dtype of the weights, which a sandbox that prepared them does not know."""
        floats = [k for k, v in arguments.items() if isinstance(v, Tensor) and v.dtype == torch.float32]
        if not floats or self.kind == "diffusion" or (dtype := self.dtype) == torch.float32:
            return arguments
        return arguments | {k: arguments[k].to(dtype) for k in floats}

    def _loop_module(self) -> nn.Module | None:
        for tower in self.sitemap.towers.values():
            if tower.name == self.sitemap.model_record.loop or tower.record.role == "language":
                return tower.module
        return None

    def _is_own(self, name: str, value: Any) -> bool:
        # open_clip's own argument is called text too, and is a tensor of tokens.
        return name == "text" and isinstance(value, Tensor)
