"""pyvene on multimodal models: every family registered from its record, and nobody's hooks deleted.

model = mm.load("tiny-llava")
site = "language.blocks.2.hook_resid_post"
config = pyvene.IntervenableConfig([intervention(model, site, pyvene.RotatedSpaceIntervention)])
found = MMIntervenableModel(config, model.wrapped)
found({"input_ids": ...}, [{...}], {"sources->base": 7})
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyvene as pv
import torch
from pyvene.models import intervenable_modelcard as card
from pyvene.models.constants import CONST_INPUT_HOOK, CONST_OUTPUT_HOOK
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from mm_adapters import CheckpointError, InputError
from mm_adapters._sitemap import SiteMap, head_count
from mm_adapters._spec import Input, Output, Site

_HOOKS = {Input: CONST_INPUT_HOOK, Output: CONST_OUTPUT_HOOK}


def register(model: Any) -> dict[str, str]:
    """Tells pyvene where this model's sites are; returns component -> reason for those it cannot reach.

    A component is a site's name with %s for the layer, "vision.blocks.%s.hook_resid_post", which a
    representation's `layer` fills. What is a module's input or output is registered; what this
    package computes inside a module (normalised values, scores, patterns) pyvene has no hook for.
    `model` is a HookedModel, a TracedModel, or what they wrap. Calling it twice changes nothing.
    """
    wrapped = getattr(model, "wrapped", model)
    sites = SiteMap(wrapped)
    target = host(model)
    modules, dimensions, missing = {}, {}, {}
    for site in sites:
        name, path = component_of(site), _path(site, wrapped)
        place = site.place
        if not isinstance(place, Input | Output) or place.chunk is not None:
            missing[name] = "pyvene reads what a module is given or returns; this is computed inside one"
            continue
        if path is None:
            missing[name] = "its module is not part of the model that pyvene is given"
            continue
        entry: tuple[Any, ...] = (path, _HOOKS[type(place)])
        width = _width(sites, site, wrapped)
        if place.heads is not None:
            owner = sites.towers[site.tower].module
            if site.stack is not None and site.layer is not None:
                owner = owner.get_submodule(sites.towers[site.tower].stacks[site.stack][site.layer])
            heads = head_count(owner, place.heads)
            entry = (*entry, (card.split_head_and_permute, heads))
            width = None if width is None else width // heads
        # Blocks of one stack may lie under several paths: then each layer is a component of its own.
        if "%s" not in path or (name in modules and modules[name][0] != path):
            name = site.name
        modules[name] = entry
        dimensions[name] = (str(width),) if width is not None else ()
    kind = type(target)
    card.type_to_module_mapping[kind] = card.type_to_module_mapping.get(kind, {}) | modules
    card.type_to_dimension_mapping[kind] = card.type_to_dimension_mapping.get(kind, {}) | {
        k: v for k, v in dimensions.items() if v
    }
    return missing


def host(model: Any) -> Any:
    """The module pyvene is given: the model itself, or a pipeline's stand-in."""
    wrapped = getattr(model, "wrapped", model)
    return wrapped if isinstance(wrapped, nn.Module) else PipelineHost.of(wrapped)


def component_of(site: Site) -> str:
    """The site's name with %s for its layer."""
    if site.layer is None:
        return site.name
    return f"{site.tower}.{site.stack}.%s.{site.part}"


def intervention(
    model: Any,
    site: str,
    kind: type[pv.Intervention] | Any,
    *,
    unit: str = "pos",
    max_number_of_units: int = 1,
    **options: Any,
) -> Any:
    """A representation config: this kind of intervention at this site.

    Several units (patches, heads) share one subspace (`keep_last_dim`): pyvene's own default lays
    them side by side, so that a subspace of 17 patches would have 17 times the width.

    Raises: MissingSiteError for an unknown site; InputError for one that pyvene cannot reach.
    """
    wrapped = getattr(model, "wrapped", model)
    sites = SiteMap(wrapped)
    found = sites[site]
    missing = register(model)
    table = card.type_to_module_mapping[type(host(model))]
    name = component_of(found)
    if name in missing:
        raise InputError(f"{site}: {missing[name]}. Reach it with model.run(edit=...).")
    name = site if site in table else name
    width = _width(sites, found, wrapped)
    if found.place is not None and getattr(found.place, "heads", None) and unit in ("h", "h.pos"):
        width = int(card.type_to_dimension_mapping[type(host(model))][name][0])
    if width is None:
        raise InputError(f"{site}: its width is not known before it runs; use a site of a block.")
    made = kind
    kind = BoundlessPositions if kind is pv.BoundlessRotatedSpaceIntervention else kind
    if isinstance(kind, type):
        made = kind(embed_dim=width, keep_last_dim=True, **options)
        made.keep_last_dim = True
    return pv.RepresentationConfig(
        layer=found.layer or 0,
        component=name,
        unit=unit,
        max_number_of_units=max_number_of_units,
        intervention=made,
    )


def units(positions: Sequence[int], n_rows: int, sources: Sequence[int] | None = None) -> dict[str, Any]:
    """`unit_locations` for these positions of every row, read at `sources` (None: the same positions).

    pyvene's shorthand takes a list of two positions for a source's and a base's.
    """
    into, out = list(positions), list(positions if sources is None else sources)
    return {"sources->base": ([[out] * n_rows], [[into] * n_rows])}


class MMIntervenableModel(pv.IntervenableModel):
    """pyvene's IntervenableModel that takes off its own hooks and no others'.

    pyvene 0.1.8 removes every forward hook of every submodule at the start and end of each call
    (modeling_utils.remove_forward_hooks); transformers 5 captures hidden states with such hooks, so
    that a LLaVA would be broken for good, and a user's hooks are gone.
    """

    def __init__(self, config: Any, model: Any, **kwargs: Any) -> None:
        register(model)
        self._own: list[Any] = []
        super().__init__(config, host(model), **kwargs)

    def disable_model_gradients(self) -> None:
        """The model's weights take no gradient during a call; they are not frozen for good."""
        self.model_has_grad = False

    def _remove_forward_hooks(self) -> None:
        """Takes off what an interrupted call of ours left, and nothing else."""
        for handlers in self._own:
            handlers.remove()
        self._own.clear()

    def _intervention_getter(self, *args: Any, **kwargs: Any) -> Any:
        handlers = super()._intervention_getter(*args, **kwargs)
        self._own.append(handlers)
        return handlers

    def _intervention_setter(self, *args: Any, **kwargs: Any) -> Any:
        handlers = super()._intervention_setter(*args, **kwargs)
        self._own.append(handlers)
        return handlers

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As pyvene's; an interrupted call leaves no hook behind."""
        try:
            with nullcontext() if self.model_has_grad else _frozen(self.model):
                return super().forward(*args, **kwargs)
        finally:
            self._remove_forward_hooks()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As pyvene's; of a pipeline the whole sampling loop, whose inputs may be lists of prompts."""
        if args and isinstance(args[0], Mapping):
            args = ({k: _Rows(v) if isinstance(v, list) else v for k, v in args[0].items()}, *args[1:])
        if isinstance(self.model, PipelineHost):
            # Else pyvene passes by the first step, and takes no location for the location 0.
            kwargs.setdefault("intervene_on_prompt", True)
        try:
            with nullcontext() if self.model_has_grad else _frozen(self.model):
                return super().generate(*args, **kwargs)
        finally:
            self._remove_forward_hooks()

    def _output_validation(self) -> None:
        # A sampling loop calls each getter and setter once a step.
        if not isinstance(self.model, PipelineHost):
            super()._output_validation()

    def save(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Writes the interventions as safetensors and JSON: their class, place, options and weights."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        entries = []
        for i, (key, one) in enumerate(self.interventions.items()):
            place = self.representations[key]
            if not hasattr(pv, type(one).__name__) and type(one).__name__ not in _OWN:
                raise InputError(f"A {type(one).__name__} cannot be saved; save what is inside it.")
            if getattr(one, "change", None) is not None:
                raise InputError("A function cannot be saved, so an SAEIntervention with a change cannot be.")
            state = {f"{i}.{k}": v.detach().contiguous().clone() for k, v in _state(one).items()}
            tensors |= state
            entries.append(
                {
                    "class": type(one).__name__,
                    "module": type(one).__module__,
                    "layer": place.layer,
                    "component": place.component,
                    "unit": place.unit,
                    "max_number_of_units": place.max_number_of_units,
                    "options": _options(one),
                }
            )
            sae: Any = getattr(one, "sae", None)
            if sae is not None:
                sae.save_model(folder / f"sae_{i}")
                entries[-1] |= {"sae": f"sae_{i}", "latents": getattr(one, "latents", None)}
        save_file(tensors, folder / "interventions.safetensors")
        document = {"format": "mm_interp.pyvene/1", "mode": self.mode, "interventions": entries}
        (folder / "interventions.json").write_text(json.dumps(document, indent=1))

    @staticmethod
    def load(load_directory: str | Path, model: Any, *args: Any, **kwargs: Any) -> MMIntervenableModel:
        """What `save` wrote, on a model of the same family.

        Raises: CheckpointError if the folder has none, or an intervention of no known class.
        """
        folder = Path(load_directory)
        if not (folder / "interventions.json").is_file():
            raise CheckpointError(f"{folder} has no interventions.json. Is it the right folder?")
        document = json.loads((folder / "interventions.json").read_text())
        tensors = load_file(folder / "interventions.safetensors")
        configs = []
        for i, entry in enumerate(document["interventions"]):
            kind = getattr(pv, entry["class"], None) or _OWN.get(entry["class"])
            if kind is None:
                raise CheckpointError(
                    f"{folder} has an intervention {entry['class']!r}, which nobody here knows."
                )
            inside: list[Any] = []
            if "sae" in entry:
                from sae_lens import SAE

                inside = [SAE.load_from_disk(folder / entry["sae"])]
                inside += [] if entry["latents"] is None else [entry["latents"]]
            one = kind(*inside, **entry["options"])
            own = {k.removeprefix(f"{i}."): v for k, v in tensors.items() if k.startswith(f"{i}.")}
            _restore(one, own)
            keys = ("layer", "component", "unit", "max_number_of_units")
            configs.append(pv.RepresentationConfig(**{k: entry[k] for k in keys}, intervention=one))
        return MMIntervenableModel(pv.IntervenableConfig(configs, mode=document["mode"]), model)


class _Rows(list):
    """A list that says how many rows it has as a tensor does: pyvene asks its first input."""

    @property
    def shape(self) -> tuple[int]:
        return (len(self),)


class SAEIntervention(pv.SourcelessIntervention):
    """Replaces a value by an SAE's reconstruction with its latents changed, plus what it does not explain.

    `change` gets the latents, [..., latent], and returns them; with a source they are the source's
    where `latents` says.
    """

    def __init__(self, sae: Any, change: Callable[[Tensor], Tensor] | None = None, **kwargs: Any) -> None:
        super().__init__(**{"embed_dim": sae.cfg.d_in, "keep_last_dim": True} | kwargs)
        self.keep_last_dim = True
        self.sae, self.change = sae, change

    def forward(self, base: Tensor, source: Any = None, subspaces: Any = None, **kwargs: Any) -> Tensor:
        acts = self.sae.encode(base)
        new = acts if self.change is None else self.change(acts)
        return (base + self.sae.decode(new) - self.sae.decode(acts)).to(base.dtype)


class SAEInterchange(pv.VanillaIntervention):
    """Sets some of an SAE's latents to what they are in the source; the rest of the value stays."""

    def __init__(self, sae: Any, latents: Sequence[int], **kwargs: Any) -> None:
        super().__init__(**{"embed_dim": sae.cfg.d_in, "keep_last_dim": True} | kwargs)
        self.keep_last_dim = True
        self.sae, self.latents = sae, list(latents)

    def forward(self, base: Tensor, source: Any, subspaces: Any = None, **kwargs: Any) -> Tensor:
        acts, wanted = self.sae.encode(base), self.sae.encode(source)
        new = acts.clone()
        new[..., self.latents] = wanted[..., self.latents]
        return (base + self.sae.decode(new) - self.sae.decode(acts)).to(base.dtype)


class BoundlessPositions(pv.BoundlessRotatedSpaceIntervention):
    """pyvene's boundless subspace, of several positions at once: theirs takes one vector a row."""

    def forward(self, base: Tensor, source: Tensor, subspaces: Any = None, **kwargs: Any) -> Tensor:
        new = super().forward(base.flatten(0, -2), source.flatten(0, -2), subspaces, **kwargs)
        return new.reshape(base.shape)


class MapIntervention(nn.Module):
    """Gives an intervention a UNet's map, [batch, channel, height, width], as [batch, position, channel]."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.trainable = getattr(inner, "trainable", False)
        self.is_source_constant = inner.is_source_constant
        self.keep_last_dim, self.use_fast = True, False
        self.interchange_dim = None

    def forward(self, base: Tensor, source: Any = None, subspaces: Any = None, **kwargs: Any) -> Tensor:
        rows = lambda x: None if x is None else x.flatten(2).transpose(1, 2)  # noqa: E731
        new = self.inner(rows(base), rows(source), subspaces)
        return new.transpose(1, 2).reshape(base.shape)


class StepGate(nn.Module):
    """Lets an intervention act in some steps of a sampling loop, on the conditional rows if asked.

    Counts its calls: one a step. `reset` before each run, or use `MMIntervenableModel` anew.
    """

    def __init__(self, inner: Any, steps: Iterable[int], half: slice | None = None) -> None:
        super().__init__()
        self.inner, self.steps = inner, frozenset(steps)
        # nn.Module's methods have this name too.
        self.__dict__["half"] = half
        self.trainable = getattr(inner, "trainable", False)
        self.is_source_constant = inner.is_source_constant
        self.keep_last_dim, self.use_fast = True, False
        self.interchange_dim = None
        self.step = 0

    def reset(self) -> None:
        self.step = 0

    def forward(self, base: Tensor, source: Any = None, subspaces: Any = None, **kwargs: Any) -> Tensor:
        now, self.step = self.step, self.step + 1
        return self.inner(base, source, subspaces) if now in self.steps else base


class PipelineHost(nn.Module):
    """A pipeline as a module: what pyvene needs to call one. Its parts are found under their names."""

    def __init__(self, pipeline: Any) -> None:
        super().__init__()
        self.__dict__["pipeline"] = pipeline
        for name, part in pipeline.components.items():
            if isinstance(part, nn.Module):
                self.__dict__.setdefault("_modules", {})[name] = part

    @classmethod
    def of(cls, pipeline: Any) -> PipelineHost:
        """The same stand-in for the same pipeline; its class is the pipeline's own."""
        kind = _HOST_KINDS.setdefault(type(pipeline), type(f"{type(pipeline).__name__}Host", (cls,), {}))
        held = pipeline.__dict__.get("_mm_pyvene_host")
        if held is None:
            held = kind(pipeline)
            pipeline.__dict__["_mm_pyvene_host"] = held
        return held

    @property
    def config(self) -> Any:
        return SimpleNamespace(to_dict=dict)

    @property
    def device(self) -> Any:
        return self.__dict__["pipeline"].device

    def forward(self, **kwargs: Any) -> Any:
        return self.__dict__["pipeline"](**kwargs)

    def generate(self, **kwargs: Any) -> Any:
        return self.__dict__["pipeline"](**kwargs)


_HOST_KINDS: dict[type, type] = {}
_OWN = {c.__name__: c for c in (BoundlessPositions, SAEIntervention, SAEInterchange)}


@dataclass(frozen=True)
class Alignment:
    """How training an alignment went: the loss of each step."""

    losses: tuple[float, ...]


def align(
    model: MMIntervenableModel,
    batches: Iterable[Mapping[str, Any]],
    loss: Callable[[Any, Mapping[str, Any]], Tensor],
    *,
    lr: float = 1e-2,
    temperature: tuple[float, float] | None = None,
    n_steps: int | None = None,
    boundary_weight: float = 0.0,
    progress: bool = True,
) -> Alignment:
    """Trains the interventions (DAS): pyvene's own loop knows token ids only, this one any inputs.

    A batch is {"base", "sources", "unit_locations", ...}; `loss(output, batch)` is of the
    counterfactual output. The wrapped model's weights do not change. `temperature`: from and to,
    falling geometrically, for boundless subspaces, with `boundary_weight` times their size added.

    Source: Geiger et al. 2023, arXiv 2303.02536; Wu et al. 2023, arXiv 2305.08809.
    """
    parameters = [p for one in model.interventions.values() for p in one.parameters() if p.requires_grad]
    if not parameters:
        raise InputError("None of these interventions has anything to train.")
    optimizer = torch.optim.Adam(parameters, lr=lr)
    losses = []
    listed: Iterable[Mapping[str, Any]] = batches
    total = n_steps or (len(batches) if isinstance(batches, Sequence) else None)
    with _frozen(model.model), tqdm(listed, total=total, desc="DAS", disable=not progress) as bar:
        for step, batch in enumerate(bar):
            if temperature is not None and total:
                start, stop = temperature
                model.set_temperature(torch.tensor(start * (stop / start) ** (step / max(total - 1, 1))))
            _, output = model(
                batch["base"], batch["sources"], batch["unit_locations"], subspaces=batch.get("subspaces")
            )
            value = loss(output, batch)
            for one in model.interventions.values():
                bounds = getattr(one, "intervention_boundaries", None)
                if boundary_weight and bounds is not None:
                    value = value + boundary_weight * bounds.sum()
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses.append(float(value.detach()))
            bar.set_postfix(loss=f"{losses[-1]:.3g}")
            if n_steps is not None and step + 1 >= n_steps:
                break
    return Alignment(tuple(losses))


@torch.no_grad()
def interchange_accuracy(
    model: MMIntervenableModel,
    batches: Iterable[Mapping[str, Any]],
    right: Callable[[Any, Mapping[str, Any]], Tensor],
) -> float:
    """How often the counterfactual output is right, by `right(output, batch)` -> bool [row]."""
    found = [
        right(model(b["base"], b["sources"], b["unit_locations"], subspaces=b.get("subspaces"))[1], b).float()
        for b in batches
    ]
    return float(torch.cat(found).mean())


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """The model's weights take no gradient inside, and are as they were afterwards."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    for p, _ in before:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p, wanted in before:
            p.requires_grad_(wanted)


def _path(site: Site, wrapped: Any) -> str | None:
    """The module's path as pyvene writes it: with [i] for lists, and %s for the layer."""
    parts = site.module.split(".")
    out = ""
    for part in parts:
        out += f"[{part}]" if part.isdigit() else f".{part}" if out else part
    if site.layer is not None and out.count("[") == 1 and f"[{site.layer}]" in out:
        before, _, after = out.partition("[")
        return f"{before}[%s]{after.partition(']')[2]}"
    return out or None


def _width(sites: SiteMap, site: Site, wrapped: Any) -> int | None:
    """The size of the site's last axis (of a map, its channels), from the weights beside it."""
    place = site.place
    module = attrgetter(site.module)(wrapped) if site.module else wrapped
    side = "out" if isinstance(place, Output) else "in"
    order = (f"{side}_features", f"{side}_channels", "embedding_dim", "embed_dim", "hidden_size")
    for name in order:
        if isinstance(value := vars(module).get(name), int):
            return value
    if isinstance(module, nn.LayerNorm):
        return int(module.normalized_shape[-1])
    # A block, an attention, an MLP: as wide as the stream its parts read.
    inner = [m for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    if isinstance(place, Output) and inner:
        last = inner[-1]
        return last.out_features if isinstance(last, nn.Linear) else last.out_channels
    if inner:
        first = inner[0]
        return first.in_features if isinstance(first, nn.Linear) else first.in_channels
    return None


def _state(one: Any) -> dict[str, Tensor]:
    own = one.state_dict().items()
    return {k: v for k, v in own if isinstance(v, Tensor) and not k.startswith("sae.")}


def _restore(one: Any, state: dict[str, Tensor]) -> None:
    """Loads weights; an orthogonal rotation is set through its own parametrization."""
    missing = set(_state(one)) - set(state)
    known = {k: v for k, v in state.items() if k in one.state_dict()}
    if missing:
        raise CheckpointError(f"{type(one).__name__} lacks the weights {sorted(missing)}.")
    one.load_state_dict(known, strict=False)
    if "source_representation" in state:
        one.set_source_representation(state["source_representation"])


def _options(one: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"keep_last_dim": bool(one.keep_last_dim)}
    if getattr(one, "embed_dim", None) is not None:
        found["embed_dim"] = int(one.embed_dim)
    layer = getattr(one, "rotate_layer", None)
    if isinstance(one, pv.LowRankRotatedSpaceIntervention) and layer is not None:
        found["low_rank_dimension"] = int(layer.weight.shape[-1])
    return found


__all__ = [
    "Alignment",
    "BoundlessPositions",
    "MMIntervenableModel",
    "MapIntervention",
    "SAEInterchange",
    "SAEIntervention",
    "StepGate",
    "align",
    "component_of",
    "interchange_accuracy",
    "intervention",
    "register",
    "units",
]
