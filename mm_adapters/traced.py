"""A multimodal model as an nnsight model, with the sites of this package in it, and the second Lens.

nnsight hands every module's input and output to one interleaver. Ours (`nnsight_engine.interleaver`)
derives the sites from them, with the readers that the TransformerLens engine uses too, and serves each as
a location like nnsight's own: blocks, edits, caches, several invokes and loops over steps work on sites as
on modules. Attention is opened up (scores, pattern) only where a request for it is pending or a run's hook
is active. No torch hook is put on the model; nnsight itself gives each module a forward of its own, which
does nothing outside a trace.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, no_type_check

import mm_adapters.nnsight_engine.import_order

# isort: split
import nnsight
import torch
from nnsight.modeling.mixins.remotable import CheckpointInfo, Remotable, bytes_per_element
from nnsight.tracing.tracer import WithBlockNotFoundError
from torch import Tensor, nn
from torch._guards import detect_fake_mode

import mm_adapters.nnsight_engine.task_classes  # noqa: F401
from mm_adapters._errors import InputError
from mm_adapters.checkpoints.open import open_checkpoint
from mm_adapters.checkpoints.origin import CheckpointRef
from mm_adapters.hooks.eager import eagerly, is_compiled, without_checkpoints
from mm_adapters.hooks.module_hooks import AttentionHook
from mm_adapters.hooks.wiring import Points
from mm_adapters.ndif_client.pending_run import PendingRun
from mm_adapters.ndif_client.remotable import ServedModel
from mm_adapters.nnsight_engine.adapters import Attached
from mm_adapters.nnsight_engine.batcher import RowBatcher
from mm_adapters.nnsight_engine.call_arguments import REMOTE_OPTIONS
from mm_adapters.nnsight_engine.calls import CallsModel
from mm_adapters.nnsight_engine.deep_copy import without_controllers
from mm_adapters.nnsight_engine.envoys import SiteEnvoy, TracedPart
from mm_adapters.nnsight_engine.interleaver import SiteInterleaver
from mm_adapters.nnsight_engine.invokes import Rows
from mm_adapters.nnsight_engine.iteration import SiteEditor, SiteTracer
from mm_adapters.nnsight_engine.lazy_weights import NamedModel, generated, generator_of, open_named
from mm_adapters.nnsight_engine.pipeline_module import PipelineModule
from mm_adapters.nnsight_engine.points import TracedPoint
from mm_adapters.nnsight_engine.ready_module import ready
from mm_adapters.nnsight_engine.recorder import Recorder
from mm_adapters.nnsight_engine.scan import SiteScanner, for_shapes, shapes_only
from mm_adapters.nnsight_engine.tokenizer_settings import set_up
from mm_adapters.records.spec import Guidance
from mm_adapters.runs.foreseen import check_foreseen
from mm_adapters.runs.gradients import check_grad_of, differentiable
from mm_adapters.runs.lens import Edit, Read, Run, as_edits, as_inputs, as_reads
from mm_adapters.runs.session import is_guided
from mm_adapters.runs.turns import Turns
from mm_adapters.sites.held import place
from mm_adapters.sites.not_in_checkpoint import random_note
from mm_adapters.sites.single_tower import callable_for
from mm_adapters.sites.site_map import SiteMap
from mm_adapters.sites.wrappers import inside

if TYPE_CHECKING:
    from mm_adapters.inputs.prepare import Inputs

_NOT_SET = object()


class TracedModel(CallsModel, NamedModel, ServedModel):
    """CLIP, LLaVA or Stable Diffusion for nnsight: its own paths, and every site by its name.

    `wrapped` is a module or a pipeline; it keeps its weights and its behaviour. It is called with its
    own arguments, or with raw `text=` and `images=`, or messages of a chat. A sampling loop takes `seed=`.

        with model.trace(text=["a red circle"], images=[image]):
            z = model.site("vision.blocks.3.attn.hook_z").save()
            model.site("vision.blocks.5.attn.hook_pattern")[:] = 0

    With `remote=True` a block, a session or a `run` goes to the NDIF service that nnsight is configured
    for (or `remote="http://..."`), if the model was loaded by a name.

    Args:
        wrapped: A module, a pipeline, or a name as `mm_adapters.load` takes. Of a name the weights are read
            when the model first runs.
        inputs: What prepares raw text and images.
        origin: The name that a service loads the checkpoint by.
        sites: The site map, if it is built.
        task: transformers' name of the task, for `pipe`.
        rename: Other names for modules, as nnsight's.
        envoys: Classes of your own for the envoys of some modules, as nnsight's: by the module's class or
            the end of its path.
        peft: An adapter to put into the model, as `load_adapter` takes it.
        tokenizer_kwargs: Attributes to set on the tokenizer (`{"padding_side": "right"}`).
        **named: A processor, tokenizer or image processor, as `mm_adapters.wrap` takes; `device` and `dtype`,
            to which a module that is here is moved and cast. Options of a name: those of
            `mm_adapters.load`, and nnsight's `dispatch=True`, which reads the weights at once.
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
        envoys: type | Mapping[Any, type] | None = None,
        peft: str | os.PathLike[str] | None = None,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        **named: Any,
    ) -> None:
        settings = dict(tokenizer_kwargs or {})
        is_named = isinstance(wrapped, str | os.PathLike)
        if is_named:
            checkpoint, self._unread = open_named(wrapped, **named)
            wrapped, inputs, origin, sites = checkpoint
        wrapped = inside(wrapped)
        if not is_named:
            inputs = ready(wrapped, named, inputs)
        set_up(getattr(inputs, "tokenizer", None), settings)
        module = wrapped if isinstance(wrapped, nn.Module) else PipelineModule(wrapped)
        self._attached = Attached()
        super().__init__(module, interleaver=SiteInterleaver(), envoys=envoys or TracedPart, rename=rename)
        self._inputs = inputs
        self._task = task
        self._own_envoys = envoys
        self.origin = origin
        self._loaded_as = None if origin is None else origin.name
        self.service_packages = {}
        self.automodel = named.get("automodel")
        self.generator = generator_of(self)
        self.sitemap = SiteMap(wrapped) if sites is None else sites
        engine = self.interleaver
        assert isinstance(engine, SiteInterleaver)
        self._points = Points(self.sitemap, lambda site: TracedPoint(site, engine))
        self._attach_sites(engine)
        self.load_adapter(peft)

    def _attach_sites(self, engine: SiteInterleaver) -> None:
        """The sites at the modules there are, in the interleaver, with the rows of each, and the turn."""
        module_hooks = self._points.module_hooks
        heads = {
            engine.envoys[id(t.module)].path: t.n_heads for t in module_hooks if isinstance(t, AttentionHook)
        }
        engine.attach_sites(self._points.by_name, module_hooks, self._loop_module())  # type: ignore[arg-type]
        paths = {at: envoy.path for at, envoy in engine.envoys.items()} | {-1: self.path}
        self.rows = Rows(self._module, self.sitemap, paths, heads)
        self._turns = Turns([self.wrapped, *(t.module for t in self.sitemap.towers.values())])

    def follow(self) -> None:
        """Maps the sites again if modules of the model were put in place of others."""
        if self.sitemap.follow(self.wrapped):
            self._wire_again(self._module)

    def stand_for(self, model: Any) -> None:
        """Traces another model of the same build from now on, in place of the one that it has."""
        self.sitemap.follow(model)
        if isinstance(self._module, PipelineModule):
            self._module.pipeline = model
            self._wire_again(self._module)
        else:
            self._wire_again(model)

    def _wire_again(self, module: nn.Module) -> None:
        if isinstance(module, PipelineModule):
            module.hold()
        self._update(module)
        self._points.wire()
        assert isinstance(self.interleaver, SiteInterleaver)
        self._attach_sites(self.interleaver)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """No other thread runs the model inside, and its sites are those of the modules that it has.

        Raises: ModelBusyError inside another run of this thread, or if another thread does not go on.
        """
        self._turns.check_free(self.interleaver, "A run was started")  # type: ignore[arg-type]
        with super().turn():
            yield

    @contextmanager
    def running(self) -> Iterator[None]:
        """The model's modules run inside: as they are written, if they were compiled."""
        modules = self.sitemap.modules
        eager = eagerly() if is_compiled(modules) else nullcontext()
        # A block that is cut off may leave the mode that it had set.
        with (
            torch.set_grad_enabled(torch.is_grad_enabled()),
            eager,
            without_checkpoints(modules),
            self._turns.running(self.interleaver),  # type: ignore[arg-type]
        ):
            yield

    @property
    def wrapped(self) -> Any:
        """The module or pipeline that is traced."""
        return self._module.pipeline if isinstance(self._module, PipelineModule) else self._module

    def __repr__(self) -> str:
        note = random_note(self.random_weights)
        return f"{super().__repr__()}{note and f'  # {note}'}"

    @property
    def points(self) -> Points:
        """The sites' points, which their values pass."""
        return self._points

    @property
    def device(self) -> torch.device | None:  # type: ignore[override]
        """Where the wrapped model computes: where its weights are, or are fetched to."""
        return place([self._module])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(p.dtype for p in self._module.parameters() if p.is_floating_point())

    def __deepcopy__(self, memo: dict[int, Any]) -> TracedModel:
        """A model with weights of its own. Raises: InputError if this one has edits, which name its parts."""
        if self._edits:
            raise InputError("This model has edits, which are its own. Copy it before they are made.")
        wrapped = without_controllers(self._module, self.wrapped, memo)
        inputs = copy.deepcopy(self._inputs, memo)
        names = {"rename": self._rename, "envoys": self._own_envoys}
        copied = TracedModel(wrapped, inputs=inputs, origin=self.origin, task=self._task, **names)
        copied.automodel, copied._unread = self.automodel, copy.copy(self._unread)
        copied._attached = Attached(self.peft)
        return copied

    def site(self, name: str, new: Any = _NOT_SET) -> Any:
        """In a trace: a site's value, which may be saved and written into; with `new`, sets it.

        Raises: MissingSiteError for a name that is no site; OutOfOrderError if it had run already.
        """
        envoy = self.envoy(name)
        if new is _NOT_SET:
            return envoy.output
        envoy.output = new
        return None

    def envoy(self, name: str) -> SiteEnvoy:
        """A site as an envoy, whose `.output` is read and assigned in a trace.

        Raises: MissingSiteError for a name that is no site.
        """
        self.check_site(name)
        return SiteEnvoy(self, self._points.by_name[name])

    def trace(self, *inputs: Any, fn: Any = None, tracer_cls: Any = None, **kwargs: Any) -> Any:
        """As nnsight's, with the model's own arguments, or raw text and images.

        The first may be given by position: text, pictures, messages of a chat, a dictionary. Of a model
        of images and texts one side may be given alone: then its tower is run, and `tracer.result` is
        the tower's output. A pipeline makes one step (of each of its loops), as nnsight's do, unless
        `num_inference_steps` is given; `differentiable=True` keeps the graph of its loop.
        """
        if self.kind == "diffusion" and fn is None:
            kwargs = self._one_step() | kwargs
        if kwargs.get("remote"):
            job = {k: kwargs.pop(k) for k in REMOTE_OPTIONS if k in kwargs}
            inputs, kwargs = (), self._for_another_machine(self.named(inputs, kwargs))
            if self.needs_own_inputs(job["remote"]):
                kwargs = self.arguments((), kwargs)
            kwargs |= job
        return super().trace(*inputs, fn=fn or self._forward, tracer_cls=tracer_cls or SiteTracer, **kwargs)

    def scan(self, *inputs: Any, fn: Any = None, **kwargs: Any) -> Any:
        """As nnsight's: shapes, without computing. A pipeline makes one step, as in `trace`.

        Raises: NotImplementedError for a pipeline whose code branches on values.
        """
        if kwargs.pop("remote", False):
            raise InputError("scan computes nothing and runs here. Leave remote out.")
        if self.kind == "diffusion" and fn is None:
            kwargs = self._one_step() | kwargs
        self.check_traced(fn or self._forward, inputs, kwargs)
        return SiteScanner(self, fn or self._forward, *inputs, **kwargs)

    def edit(self, *, inplace: bool = False, backend: Any = None) -> SiteEditor:
        """As nnsight's: a block that is kept, and run again in every later trace."""
        return SiteEditor(self, inplace=inplace, backend=backend)

    @no_type_check  # nnsight finds its `with` block by counting frames; a checker would add some.
    def generate(
        self, *inputs: Any, read: Iterable[str | Read] = (), edit: Iterable[Edit] = (), **kwargs: Any
    ) -> Any:
        """`with model.generate(...):` traces the wrapped model's generation, or a pipeline's loop with
        all its steps; called without `with` it runs it, and returns a `Run` if sites are read or edited.
        """
        fn = self._plain if self.kind == "diffusion" else self._generate
        if self.interleaver.interleaving:
            return fn(*inputs, **kwargs)
        # transformers' pipelines call the arguments of generate so.
        kwargs |= kwargs.pop("generate_kwargs", {})
        self.call_names("generate")  # Says so if the model generates nothing.
        reads, edits = as_reads(read), as_edits(edit)
        remote = {k: kwargs.pop(k) for k in REMOTE_OPTIONS if k in kwargs}
        if reads or edits:
            return self._recorded(self.named(inputs, kwargs), reads, edits, None, fn, **remote)
        tracer = self.trace(*inputs, fn=fn, **kwargs, **remote)
        try:
            tracer.capture()
            return tracer
        except WithBlockNotFoundError:
            pass  # What is raised below is not about the missing block.
        if remote.get("remote"):
            return self._recorded(self.named(inputs, kwargs), [], [], None, fn, **remote).output
        with self.turn(), self.running():
            return self.interleave(fn, *inputs, **kwargs)

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

        Args:
            inputs: The model's own arguments, or raw text and images. If they are one tower's alone (images
                of a CLIP, or of a VLM), that tower is run.
            read: The sites to read.
            edit: The edits to make.
            grad_of: A scalar function of the output, whose gradients at the read sites come back too.
            remote: Whether to run on a service, or its address. The functions of the reads and edits are
                sent along, by their source.
            blocking: Whether to wait for the service; if not, a `PendingRun` is returned.
            verbose: Whether nnsight prints what is sent.

        Raises: MissingSiteError, InputError before anything runs; EditNeverFiredError, ReadNeverFiredError
        if an edit or read, or a part of it, never came up.
        """
        job = {"remote": remote, "blocking": blocking, "verbose": verbose} if remote else {}
        check_grad_of(grad_of)
        asked = as_reads(read), as_edits(edit)
        return self._recorded(as_inputs(inputs), *asked, grad_of, self._plain, **job)

    def _recorded(
        self,
        arguments: dict[str, Any],
        reads: list[Read],
        edits: list[Edit],
        grad_of: Any,
        fn: Any,
        *,
        blocking: bool = True,
        **remote: Any,
    ) -> Run | PendingRun:
        if not remote:
            self.dispatch()  # A session looks at the pipeline that runs.
        self.follow()
        for item in (*reads, *edits):
            self.sitemap.check(item.site)  # Before anything runs, or is sent.
        self.check_traced(fn, (), arguments)
        generating = fn == self._generate
        if not remote:
            arguments = self.arguments((), arguments)
            check_foreseen(self, arguments, [*reads, *edits], generating=generating)
        if grad_of is not None and self.kind == "diffusion":
            arguments["differentiable"] = True
        if remote:
            arguments = self._for_another_machine(arguments)
            if self.needs_own_inputs(remote["remote"]):
                arguments = self.arguments((), arguments)
        if grad_of is None or remote:
            return self._traced_run(arguments, reads, edits, grad_of, fn, generating, blocking, remote)
        with differentiable(arguments, next(self._module.parameters())) as followed:
            return self._traced_run(followed, reads, edits, grad_of, fn, generating, blocking, remote)

    def _traced_run(
        self,
        arguments: dict[str, Any],
        reads: list[Read],
        edits: list[Edit],
        grad_of: Any,
        fn: Any,
        generating: bool,
        blocking: bool,
        remote: dict[str, Any],
    ) -> Run | PendingRun:
        run_fields: dict[str, Any] = {}
        tracer = super().trace(fn=fn, tracer_cls=SiteTracer, blocking=blocking, **remote)
        with tracer:
            recorder = Recorder(self, reads, edits, grad_of, arguments, generating)
            with tracer.invoke(**arguments):
                run_fields = nnsight.save(recorder.record(tracer))
            for site in recorder.followed:
                with tracer.invoke():
                    recorder.follow(site)
        return Run(**run_fields) if blocking else PendingRun(tracer.backend)

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

    def is_guided(self, arguments: Mapping[str, Any], guidance: Guidance) -> bool:
        """Whether a pipeline called with these arguments runs under classifier-free guidance."""
        return is_guided(self.wrapped, replace(guidance, flag=None), arguments)

    def _loop_module(self) -> nn.Module | None:
        for tower in self.sitemap.towers.values():
            if tower.name == self.sitemap.model_record.loop or tower.record.role == "language":
                return tower.module
        return None

    def _remoteable_class(self) -> type:
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
        max_memory: Any = None,
        **_: Any,
    ) -> Remotable:
        ref = CheckpointRef.parse(model_key)
        device = f"cuda:{device}" if isinstance(device, int) else device
        device = device if dispatch else "meta"
        placing = {"device_map": device_map, "max_memory": max_memory}
        task = ref.options.get("task")
        own = {k: v for k, v in ref.options.items() if k != "task"}
        options = {**own, **{k: v for k, v in placing.items() if dispatch and v is not None}}
        wrapped, inputs, origin, sites = open_checkpoint(ref.name, device, dtype, options)
        return TracedModel(wrapped, inputs=inputs, origin=origin, sites=sites, task=task)

    @classmethod
    def _remoteable_describe_checkpoint(cls, model_key: str, dtype: str) -> CheckpointInfo:
        module = cls._remoteable_from_model_key(model_key)._module
        n_params = sum(p.nelement() for p in module.parameters())
        n_elements = n_params + sum(b.nelement() for b in module.buffers())
        config = getattr(module, "config", None)
        revision = CheckpointRef.parse(model_key).options.get("revision")
        return CheckpointInfo(int(n_elements * bytes_per_element(dtype)) + 1, n_params, config, revision)
