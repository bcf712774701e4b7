"""TransformerLens' description of a model, read off the family's record and the model itself."""

from __future__ import annotations

import functools
import inspect
import itertools
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

from torch import nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import LinearBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from integrations.transformer_lens._classes import is_list
from integrations.transformer_lens._components import (
    MLP,
    Attention,
    Block,
    Inner,
    NormPart,
    Part,
    Unembedding,
    bare,
)
from mm_adapters import HookedModel, InputError, TowerView
from mm_adapters.records import Input, Location, Norm, Output

_NAMES = {"vision": "vision_encoder", "projector": "vision_projector"}  # As TransformerLens calls them.
_QKVO = {"q": "hook_q", "k": "hook_k", "v": "hook_v", "o": "hook_z"}
_PLAIN = {"in": "hook_pre", "out": "hook_post"}
_GATED = {"gate": "hook_pre", "in": "hook_pre_linear", "out": "hook_post"}
_SIZES = (
    "d_model", "d_head", "n_heads", "n_key_value_heads", "n_layers", "n_ctx", "d_mlp", "d_vocab",
    "d_vocab_out", "gated_mlp", "attn_only", "uses_rms_norm", "positional_embedding_type",
    "normalization_type",
)  # fmt: skip


class RecordAdapter(ArchitectureAdapter):
    """What a TransformerBridge asks of a model, from the paths that the model's family finds in it.

    A bridge has one stack of blocks: the language tower's, or of a model that is one tower that one's.
    """

    # The sites' own patterns are there, whichever kernel the model attends with.
    supports_hf_output_attentions = False
    supports_compatibility_mode = False

    def prepare_model(self, hf_model: Any) -> None:
        """Finds the model's parts, before the bridge puts its components in their places.

        Raises: InputError for a model whose tower has no blocks with heads.
        """
        self._hooked = HookedModel(hf_model)
        towers = self._hooked.towers
        root = towers.get("language") or next(iter(towers.values()))
        self._root = root.name
        words, embedded = root.record.embed, root.before.get("hook_embed")
        self._words_are_a_part = words is not None and not (
            isinstance(embedded, Output) and embedded.path == words.removesuffix(".weight")
        )
        self._configure(root, several=len(towers) > 1)
        _take_first(hf_model, "pixel_values" if self.cfg.is_visual_model else "input_ids")
        components = self._top(root)
        components |= {
            _NAMES.get(name, name): self._container(tower)
            for name, tower in towers.items()
            if tower is not root
        }
        # A part first, then what it is a part of.
        self.component_mapping = dict(
            sorted(components.items(), key=lambda item: -str(item[1].name).count("."))
        )

    def hook_name(self, site: str) -> str:
        """A site's name in the bridge: "vision_encoder.blocks.3.hook_resid_post"."""
        tower, _, local = site.partition(".")
        if tower != self._root:
            return f"{_NAMES.get(tower, tower)}.{local}"
        # A bridge's hook_embed is what its embedding of words gives, before positions or an image.
        return "hook_full_embed" if local == "hook_embed" and self._words_are_a_part else local

    def setup_hook_compatibility(self, bridge: Any) -> None:
        """Attaches every site's point where its name says."""
        for module in bridge.modules():
            if isinstance(module, Attention):  # Before: it would transpose points that are right.
                module.setup_hook_compatibility()
        for site, point in self._hooked.points.by_name.items():
            name = self.hook_name(site)
            if name == "hook_embed" and name in bridge.hook_dict:
                continue  # The same value, by TransformerLens' own point.
            _attach(bridge, name, point)
        bridge.clear_hook_registry()
        bridge._initialize_hook_registry()

    def _configure(self, root: TowerView, several: bool) -> None:
        sizes = self._hooked.tower(root.name).cfg
        if not sizes.d_model:
            name = type(root.module).__name__
            raise InputError(f"{name} has no one stack of blocks with heads, and a bridge needs one.")
        known = {f.name for f in fields(self.cfg)}
        for name in (n for n in _SIZES if n in known):
            setattr(self.cfg, name, getattr(sizes, name))
        self.cfg.is_multimodal = several
        self.cfg.is_visual_model = root.role == "vision"

    def _top(self, root: TowerView) -> dict[str, GeneralizedComponent]:
        components = self._inside(root, root.path)
        head = (root.mount.project or "").removesuffix(".weight.T")
        modules = dict(self._hooked.wrapped.named_modules(remove_duplicate=False))
        if root.role == "language" and head in modules:
            components["unembed"] = bare(Unembedding(head, config=self.cfg))
        return components

    def _container(self, tower: TowerView) -> GeneralizedComponent:
        inside = self._inside(tower, "")
        ends = [
            location
            for name, location in (tower.before | tower.after).items()
            if name in ("hook_in", "hook_out")
        ]
        if ends and all(map(_path, ends)):  # Its module's own input and output are none of them.
            return bare(Inner(tower.path, submodules=inside), keep=())
        return GeneralizedComponent(tower.path, submodules=inside)

    def _inside(self, tower: TowerView, prefix: str) -> dict[str, GeneralizedComponent]:
        """A tower's embedding, blocks and last norm, where it has them."""
        components: dict[str, GeneralizedComponent] = {}
        if tower.record.embed is not None:
            components["embed"] = GeneralizedComponent(
                _join(prefix, tower.record.embed.removesuffix(".weight"))
            )
        ends = {} if tower.record.embed is not None else {"embed": "hook_embed"}
        if "hook_full_embed" in tower.before and ends:
            # After CLIP's first norm, so that what the blocks add sums to the stream.
            ends = {"embed": "hook_full_embed", "embed_ln": "hook_embed"}
        for name, site in ends.items():
            if isinstance(location := tower.before.get(site), Output):
                components[name] = GeneralizedComponent(_join(prefix, location.path))
        if "ln_final.hook_scale" in tower.after:
            path = _join(prefix, _path(tower.after["ln_final.hook_scale"]))
            components["ln_final"] = bare(NormPart(path, config=self.cfg))
        for name, stack in tower.record.stacks.items():
            if is_list(stack) and tower.stacks[name]:
                path = _join(prefix, stack.paths[0].removesuffix(".*"))
                components[name] = bare(Block(path, submodules=self._block(tower, name)))
        return components

    def _block(self, tower: TowerView, stack: str) -> dict[str, GeneralizedComponent]:
        """What TransformerLens looks for in a block: norms, attentions, MLPs."""
        blocks = tower.parts[stack]
        locations = {part: location for block in blocks for part, location in block.items()}
        components: dict[str, GeneralizedComponent] = {}
        for part in dict.fromkeys(name.rpartition(".")[0] for name in locations):
            of_part = {
                leaf: location
                for name, location in locations.items()
                if (leaf := name.removeprefix(f"{part}.")) != name
            }
            if isinstance(norm := of_part.get("hook_scale"), Norm):
                components[part] = bare(NormPart(norm.path, config=self.cfg))
            elif "hook_z" in of_part:
                components[part] = self._attention(tower, of_part)
            elif "hook_post" in of_part and (
                linear := _linears(of_part, _GATED if "hook_pre_linear" in of_part else _PLAIN)
            ):
                components[part] = bare(MLP(linear[0], config=self.cfg, submodules=linear[1]))
        for part, component in components.items():
            component.optional = not all(any(n.startswith(f"{part}.") for n in block) for block in blocks)
        return components

    def _attention(self, tower: TowerView, locations: dict[str, Location]) -> GeneralizedComponent:
        linear = _linears(locations, _QKVO)
        if linear is not None:
            return bare(Attention(linear[0], config=self._heads(tower), submodules=linear[1]))
        return GeneralizedComponent(_path(locations["hook_pattern"]))

    def _heads(self, tower: TowerView) -> Any:
        if tower.name == self._root:
            return self.cfg
        sizes = self._hooked.tower(tower.name).cfg
        return SimpleNamespace(
            **{n: getattr(sizes, n) for n in ("n_heads", "n_key_value_heads", "d_head", "d_model")}
        )


def _attach(bridge: nn.Module, name: str, point: HookPoint) -> None:
    *path, leaf = name.split(".")
    owner: Any = bridge
    for step in path:
        # Not add_module: a component answers for what the module under it has.
        owner = owner._modules.setdefault(step, Part())
    if (
        leaf in owner._modules
    ):  # The bridge's point of this name is a module's input or output: the same value.
        return
    setattr(owner, leaf, point)


def _join(prefix: str, path: str) -> str:
    return ".".join(p for p in (prefix, path) if p)


def _path(location: Location) -> str:
    return getattr(location, "path", "")


def _linears(locations: dict[str, Location], sites: dict[str, str]) -> tuple[str, dict[str, Any]] | None:
    """The module that holds the projections whose inputs or outputs these sites are, and each of them.

    None if they are slices of one projection's output, or lie in the block itself.
    """
    paths = {
        name: location.path
        for name, site in sites.items()
        if isinstance(location := locations.get(site), Input | Output) and location.path
    }
    steps = zip(*(path.split(".")[:-1] for path in paths.values()), strict=False)
    shared = [same[0] for same in itertools.takewhile(lambda each: len(set(each)) == 1, steps)]
    if not shared or len(set(paths.values())) < len(paths):
        return None
    owner = ".".join(shared)
    return owner, {name: LinearBridge(path.removeprefix(f"{owner}.")) for name, path in paths.items()}


def _take_first(model: nn.Module, name: str) -> None:
    """Lets a model be called as TransformerBridge.forward (3.9) calls it: tokens first, pixels by name."""
    plain = model.forward
    names = list(inspect.signature(plain).parameters)
    if names[0] == name or (name in names and name == "pixel_values"):
        return

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if len(args) == 1:
            args, kwargs = (), {name: args[0], **kwargs}
        if name not in names and name in kwargs:
            kwargs[names[0]] = kwargs.pop(name)
        return plain(*args, **kwargs)

    model.forward = forward
