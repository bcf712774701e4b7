"""A multimodal model as a TransformerLens object, untouched underneath, and the default Lens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

from mm_adapters._errors import InputError, ModelStateError
from mm_adapters.hooks.eager import eagerly, is_compiled, without_checkpoints
from mm_adapters.hooks.wiring import Points
from mm_adapters.inputs.call_names import RAW, Call, parameters_of, refuse_unknown
from mm_adapters.inputs.generators import seeded
from mm_adapters.inputs.pipeline_call import check_run, settled
from mm_adapters.runs.base_model import BaseModel
from mm_adapters.runs.foreseen import check_foreseen
from mm_adapters.runs.gradients import check_grad_of, differentiable
from mm_adapters.runs.lens import Edit, Read, Run, as_edits, as_inputs, as_reads
from mm_adapters.runs.session import Session
from mm_adapters.runs.turns import Turns, in_turn
from mm_adapters.sites.held import place
from mm_adapters.sites.not_in_checkpoint import random_note
from mm_adapters.sites.single_tower import callable_for
from mm_adapters.sites.site_map import SiteMap
from mm_adapters.tl_engine.cache import ModelCache
from mm_adapters.tl_engine.counted_hooks import CountedHooks, check_cached, check_device, names_of
from mm_adapters.tl_engine.hook_point import SitePoint
from mm_adapters.tl_engine.hung_points import hang, hung_values
from mm_adapters.tl_engine.named_hooks import NamedHooks
from mm_adapters.tl_engine.tower import HookedTower
from mm_adapters.tl_engine.wrapped_members import WrappedMembers

if TYPE_CHECKING:
    from mm_adapters.inputs.prepare import Inputs


class HookedModel(WrappedMembers, BaseModel, NamedHooks, HookedRootModule):
    """CLIP, LLaVA or Stable Diffusion with TransformerLens' hooks, cache and towers.

    Calling it calls the wrapped model: with that model's own arguments, or with raw `text=` and
    `images=`. A diffusion pipeline is called with a prompt and its own options, and `seed=`; the
    values of its sampling loop carry a leading axis of calls.

    `model.vision`, `model.text`, `model.language`, ... are TransformerLens models of one tower.
    """

    def __init__(
        self,
        wrapped: Any,
        *,
        inputs: Inputs | None = None,
        sites: SiteMap | None = None,
        loaded_as: str | None = None,
    ) -> None:
        super().__init__()
        self.sitemap = SiteMap(wrapped) if sites is None else sites
        # Not registered: the wrapped model keeps its parameters, its keys and its hooks to itself.
        self.__dict__["wrapped"] = self.sitemap.model
        self.__dict__["inputs"] = inputs
        self._loaded_as = loaded_as
        self.share_members(as_module(self.wrapped))
        self.points = Points(self.sitemap, SitePoint)
        self._hang_towers()
        self.eval()

    wrapped: Any
    inputs: Inputs | None

    @property
    def _inputs(self) -> Inputs | None:  # type: ignore[override]
        return self.inputs

    def follow(self) -> None:
        """Maps the sites again if modules of the model were put in place of others.

        Hooks stay on the sites whose names stay.

        Raises: ModelStateError if a site that has hooks is no more.
        """
        if not self.sitemap.follow():
            return
        before = dict(self.points.by_name)
        self.points.wire()
        self._hang_towers()
        gone = [
            name
            for name, point in before.items()
            if name not in self.points.by_name and (point.has_hooks() or point.live)
        ]
        if gone:
            raise ModelStateError(
                f"The model was changed, and it has no {', '.join(gone[:3])} any more, where hooks are on. "
                "They are off now. model.sites('*') lists the sites that there are."
            )

    @contextmanager
    def running(self) -> Iterator[None]:
        """The model's modules run inside: as they are written, if a hook is active."""
        watched = self.points.are_live
        checkpoints = without_checkpoints(self.sitemap.modules) if watched else nullcontext()
        with self._turns.running(self.points), self.eagerly(), checkpoints:
            yield

    def tower(self, name: str) -> HookedTower:
        """One tower as a TransformerLens model."""
        self.check_tower(name)
        tower = getattr(self, name)
        assert isinstance(tower, HookedTower)
        return tower

    @property
    def device(self) -> torch.device:
        """Where the wrapped model computes: where its weights are, or are fetched to."""
        device = place(self._modules_wrapped())
        assert device is not None
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the wrapped model's weights."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    @in_turn
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the wrapped model; raw `text` and `images` are prepared first."""
        self.check_no_export()
        self.check_ready()
        arguments = self._arguments(self._by_name(args, kwargs))
        alone = self.kind == "contrastive"  # Of images or texts alone, their tower is run, as in `run`.
        call = callable_for(self.wrapped, self.sitemap, arguments) if alone else self.wrapped
        with self.running():
            return call(**arguments)

    @in_turn
    def generate(
        self,
        *,
        read: Iterable[str | Read] = (),
        edit: Iterable[Edit] = (),
        fwd_hooks: Sequence[tuple[Any, Callable[..., Any]]] = (),
        **kwargs: Any,
    ) -> Any:
        """The wrapped model's `generate` (a pipeline's call), with raw inputs, hooks and edits at each step.

        Returns its token ids; a `Run` whose output they are if anything is read or edited. A language
        tower's values are joined along the sequence, each position's from the call that computed it last;
        what is reduced is [call, ...], and `Run.calls` says which. A step is a call.
        """
        self.check_ready()
        session = self._session(read, edit, generating=True)
        arguments = self._arguments(kwargs, "generate")
        check_foreseen(self, arguments, session.asked, generating=True)
        call = self.wrapped if self.sitemap.model_record.loop is not None else self.wrapped.generate
        hooks = self.hooks(fwd_hooks=list(fwd_hooks))
        with torch.no_grad(), hooks, session.attached(arguments), self.running():
            output = call(**arguments)
        return session.result(output) if session.asked else output

    @in_turn
    def run(
        self,
        inputs: Mapping[str, Any],
        *,
        read: Iterable[str | Read] = (),
        edit: Iterable[Edit] = (),
        grad_of: Callable[[Any], Tensor] | None = None,
    ) -> Run:
        """One forward (for a pipeline, one sampling loop), with sites read and edited.

        Where the inputs are one tower's alone (images of a CLIP, or of a VLM), that tower is run.
        `grad_of` is a scalar function of the output; its gradients at the read sites come back too.

        Raises: MissingSiteError, InputError before anything runs; EditNeverFiredError, ReadNeverFiredError
        if an edit or read, or a part of it, never came up.
        """
        self.check_ready()
        check_grad_of(grad_of)
        session = self._session(read, edit, keep_graph=grad_of is not None)
        arguments = self._arguments(as_inputs(inputs))
        check_foreseen(self, arguments, session.asked)
        if grad_of is None:
            with torch.no_grad(), session.attached(arguments), self.running():
                output = self._call(arguments, differentiable=False)
            return session.result(output)
        with differentiable(arguments, next(self.parameters())) as followed:
            with session.attached(followed), self.running():
                output = self._call(followed, differentiable=True)
            return session.result(output, grad_of)

    @in_turn
    def run_with_cache(self, *args: Any, return_cache_object: bool = True, **kwargs: Any) -> Any:
        """As TransformerLens': the output and an ActivationCache, by full site name.

        Through a sampling loop every value is [call, batch, ...]. Raises: ReadNeverFiredError for a name that
        had no value; what a function filters need not have one.
        """
        check_device(kwargs.get("device"))
        remove = kwargs.get("remove_batch_dim", False)
        if self.sitemap.model_record.loop is not None:
            output, values = self._cache_loop(*args, **kwargs)
        else:
            output, values = super().run_with_cache(*args, **kwargs)
            check_cached(kwargs.get("names_filter"), values)
        cache = ModelCache(values, self, has_batch_dim=not remove) if return_cache_object else values
        return output, cache

    @in_turn
    def run_with_hooks(self, *args: Any, fwd_hooks: Any = (), **kwargs: Any) -> Any:
        """As TransformerLens'. Raises: ReadNeverFiredError if a hook was never called."""
        counted = CountedHooks(fwd_hooks)
        output = super().run_with_hooks(*args, fwd_hooks=counted.hooks, **kwargs)
        counted.check()
        return output

    @in_turn
    def get_caching_hooks(self, names_filter: Any = None, *args: Any, **kwargs: Any):
        """As TransformerLens'. Raises: MissingSiteError for a name that is no site."""
        self.check_names(names_filter)
        return super().get_caching_hooks(names_filter, *args, **kwargs)

    def add_hook(self, name: Any, *args: Any, **kwargs: Any) -> None:
        """As TransformerLens'. Raises: MissingSiteError for a name that is no site."""
        self.check_names(name)
        super().add_hook(name, *args, **kwargs)

    @contextmanager
    def hooks(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """As TransformerLens'; an interrupted forward leaves nothing standing.

        No other thread runs the model inside.
        """
        with self.turn(), super().hooks(*args, **kwargs) as hooked, self.eagerly():
            try:
                yield hooked
            finally:
                self.points.unwind()

    def embed(self, *, text: Any = None, images: Any = None, **unknown: Any) -> Tensor:
        """Un-normalised embeddings in the joint space, [row, d_joint], of texts or of images.

        Raises: InputError if not one of the two is given; MissingSiteError without such a tower.
        """
        refuse_unknown("embed", unknown, RAW)
        if (text is None) == (images is None):
            raise InputError("embed takes text or images, one of the two.")
        name = "text" if images is None else "vision"
        tower = self.tower(name)
        ready = self.prepare(text=text, images=images)
        takes = self.sitemap.model_record.towers[name].takes or self.sitemap.towers[name].record.takes
        return tower(ready.pop(takes), return_type="embeds", **ready)

    def check_names(self, names: Any, tower: str = "") -> None:
        """Raises: MissingSiteError if a name (or one of a list) is no site; filters pass."""
        if callable(names) or names is None:
            return
        prefix = f"{tower}." if tower else ""
        for name in names_of(names):
            full = prefix + name.removeprefix(prefix)
            if full not in self.hook_dict:
                self.sitemap[full]

    def hang_points(self, site: str, points: Mapping[str, HookPoint]) -> None:
        """Hangs points under a site's, instead of those that hang there. Who hangs them calls them.

        "SITE.NAME" is in `hook_dict`, a name for hooks and caches, until another call leaves it out.

        Raises: MissingSiteError for a site that there is not.
        """
        hang(self, self.check_site(site).name, points)

    def extra_repr(self) -> str:
        return random_note(self.random_weights)

    # The wrapped model is not a registered child, so these say so.
    def train(self, mode: bool = True):
        for module in self._modules_wrapped():
            module.train(mode)
        return super().train(mode)

    def to(self, *args: Any, **kwargs: Any):
        self.wrapped.to(*args, **kwargs)
        self.refresh_configs()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        # What half, bfloat16, double, float, cuda and cpu go through.
        for module in self._modules_wrapped():
            module._apply(fn, recurse)
        self.refresh_configs()
        return self

    def refresh_configs(self) -> None:
        """Tells each tower's `cfg` where its weights are now, and in which dtype."""
        for tower in map(self.tower, self.tower_names):
            parameter = next((p for p in tower.parameters() if p.is_floating_point()), None)
            if parameter is not None:
                tower.cfg.device, tower.cfg.dtype = str(parameter.device), parameter.dtype

    def renamed(self) -> None:
        """Names its points anew, after towers have got some or lost them: a point has its tower's name."""
        self.setup()
        for name in self.sitemap.towers:
            getattr(self, name).setup()

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        for module in self._modules_wrapped():
            yield from module.named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        for module in self._modules_wrapped():
            yield from module.named_buffers(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's; of a pipeline, its parts' behind their names."""
        return as_module(self.wrapped).state_dict(*args, **kwargs)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As the wrapped model's, under the names of `state_dict`."""
        return as_module(self.wrapped).load_state_dict(state_dict, strict=strict, assign=assign)

    def __reduce__(self) -> Any:
        # A copy is wrapped anew: it has no hooks, and its sites are those of the copied modules.
        modes = [m.training for module in self._modules_wrapped() for m in module.modules()]
        kept = {name: self.tower(name).own_state() for name in self.tower_names}
        return _wrapped_again, (
            type(self),
            self.wrapped,
            self.inputs,
            self.sitemap,
            self._loaded_as,
            modes,
            kept,
        )

    def _enable_hook_with_name(self, name: str, hook: Callable[..., Any], dir: Any) -> None:
        self.check_names(name)
        super()._enable_hook_with_name(name, hook, dir)

    def _hang_towers(self) -> None:
        """Its towers, and the turn that is taken for a run of them."""
        for name in [n for n in self._modules if n not in self.sitemap.towers]:
            del self._modules[name]
        for name, mounted in self.sitemap.towers.items():
            if name in self._modules:
                getattr(self, name).move(mounted, self.points)
            else:
                self.add_module(name, HookedTower(self, mounted, self.points))
        self.renamed()
        self._turns = Turns([self.wrapped, *(t.module for t in self.sitemap.towers.values())])

    def eagerly(self) -> AbstractContextManager[None]:
        """Inside, what was compiled runs as it is written, if a hook is active."""
        return eagerly() if self.points.are_live and is_compiled(self.sitemap.modules) else nullcontext()

    def _modules_wrapped(self) -> list[nn.Module]:
        if isinstance(self.wrapped, nn.Module):
            return [self.wrapped]
        return [m for m in self.wrapped.components.values() if isinstance(m, nn.Module)]

    def _session(
        self,
        read: Iterable[str | Read],
        edit: Iterable[Edit],
        *,
        keep_graph: bool = False,
        generating: bool = False,
    ) -> Session:
        asked = as_reads(read), as_edits(edit)
        return Session(self.wrapped, self.sitemap, self.points, *asked, keep_graph, generating=generating)

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """A call's arguments by name; a pipeline's first is its prompt."""
        own = self.call_names().own
        if self.sitemap.model_record.loop is not None:
            own = tuple(parameters_of(type(self.wrapped).__call__))
        if len(args) > len(own):
            raise InputError(f"{len(args)} arguments were given by position; there are {', '.join(own)}.")
        named = dict(zip(own, args, strict=False))
        for name in named.keys() & kwargs.keys():
            raise InputError(f"{name} was given twice: by position, and as {name}=. Give it once.")
        return named | kwargs

    def _arguments(self, kwargs: dict[str, Any], call: Call = "forward") -> dict[str, Any]:
        self.check_call(kwargs, call)
        arguments = self.call_arguments(kwargs)
        if self.sitemap.model_record.loop is None:
            return arguments
        arguments = settled(self.wrapped, arguments)
        check_run(self.wrapped, arguments)
        seed = arguments.pop("seed", None)
        return arguments if seed is None else {**arguments, "generator": seeded(seed, self.device)}

    def _call(self, arguments: dict[str, Any], differentiable: bool) -> Any:
        if differentiable and self.sitemap.model_record.loop is not None:
            arguments.setdefault("output_type", "pt")
            # Pipelines are decorated with no_grad; the plain function is underneath.
            plain: Any = type(self.wrapped).__call__
            return plain.__wrapped__(self.wrapped, **arguments)
        return callable_for(self.wrapped, self.sitemap, arguments)(**arguments)

    def _cache_loop(
        self,
        *args: Any,
        names_filter: Any = None,
        device: Any = None,
        remove_batch_dim: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, dict[str, Tensor]]:
        self.check_ready()
        self.check_names(names_filter)
        keep = names_filter if callable(names_filter) else _among(names_filter)
        move = (lambda value: value.to(device)) if device else None
        session = self._session([Read(n, move) for n in self.sitemap.sites if keep(n)], ())
        with session.attached(kwargs), hung_values(self, keep, move) as hung:
            output = self.forward(*args, **kwargs)
        named = set(names_of(names_filter))
        values = dict(session.result(output, optional=self.sitemap.sites.keys() - named).values) | hung
        check_cached(names_filter, values)
        if remove_batch_dim:
            looped = {k for k in values if k.partition(".")[0] in self.sitemap.loops}
            values = {k: v[:, 0] if k in looped else v[0] for k, v in values.items()}
        return output, values


def as_module(wrapped: Any) -> nn.Module:
    """A module, or a pipeline's modules under their names."""
    if isinstance(wrapped, nn.Module):
        return wrapped
    parts = {name: part for name, part in wrapped.components.items() if isinstance(part, nn.Module)}
    return nn.ModuleDict(parts)


def _wrapped_again(
    cls: type[HookedModel],
    wrapped: Any,
    inputs: Inputs | None,
    sites: SiteMap,
    loaded_as: str | None,
    modes: list[bool],
    kept: dict[str, dict[str, Any]],
) -> HookedModel:
    model = cls(wrapped, inputs=inputs, sites=sites, loaded_as=loaded_as)
    modules = [m for module in model._modules_wrapped() for m in module.modules()]
    for module, mode in zip(modules, modes, strict=True):
        module.training = mode
    for name, state in kept.items():
        model.tower(name).set_state(state)
    return model


def _among(names: str | Sequence[str] | None) -> Callable[[str], bool]:
    if names is None:
        return lambda name: True
    names_wanted = {names} if isinstance(names, str) else set(names)
    return lambda name: name in names_wanted
