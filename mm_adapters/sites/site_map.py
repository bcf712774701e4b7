"""A model, seen through its family: every site, and the module it is read at."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase, translate
from typing import Any

from torch import nn

from mm_adapters._errors import MissingSiteError
from mm_adapters.records.registry import by_name, find
from mm_adapters.records.resolve import first_path, head_count, resolve_parts, resolve_record
from mm_adapters.records.spec import (
    Attention,
    Input,
    Location,
    ModelRecord,
    Output,
    Residual,
    Site,
    Stack,
    Tower,
)
from mm_adapters.sites.lookup import lookup, unknown
from mm_adapters.sites.module_tree import ModuleTree
from mm_adapters.sites.tower_view import TowerView
from mm_adapters.sites.wrappers import inside

_TOKEN = ("batch", "pos", "d_model")
_AXES: dict[str, tuple[str, ...]] = {
    "hook_q": ("batch", "pos", "head", "d_head"),
    "hook_k": ("batch", "pos", "head", "d_head"),
    "hook_v": ("batch", "pos", "head", "d_head"),
    "hook_z": ("batch", "pos", "head", "d_head"),
    "hook_rot_q": ("batch", "pos", "head", "d_head"),
    "hook_rot_k": ("batch", "pos", "head", "d_head"),
    "hook_attn_scores": ("batch", "head", "query", "key"),
    "hook_pattern": ("batch", "head", "query", "key"),
    "hook_pattern_text": ("batch", "head", "image", "text"),
    "hook_scale": ("batch", "pos", "1"),
    "hook_pooled": ("batch", "d_model"),
    "hook_pre": ("batch", "pos", "d_mlp"),
    "hook_pre_linear": ("batch", "pos", "d_mlp"),
    "hook_post": ("batch", "pos", "d_mlp"),
}
_MAP = ("batch", "channel", "height", "width")


class SiteMap:
    """Every site of one model, by name, in the order they run.

    Raises: UnknownFamilyError if no family covers the model or one of its towers.
    """

    def __init__(self, model: Any) -> None:
        self.model = model = inside(model)
        self.model_record = lookup(model)
        self.family = self.model_record.name
        # The towers that sampling loops call, each with how it is guided.
        self.loops = dict(self.model_record.more_loops)
        if self.model_record.loop is not None:
            self.loops = {self.model_record.loop: self.model_record.guidance} | self.loops
        self.towers: dict[str, TowerView] = {}
        self.sites: dict[str, Site] = {}
        self.absent: dict[str, Site] = {}
        for name, mount in self.model_record.towers.items():
            # A pipeline may leave a component out, and those of one family differ in what they take.
            component = mount.path.partition(".")[0]
            if self.model_record.loop is not None and getattr(model, component, None) is None:
                continue
            module = resolve(model, mount.path)
            record = by_name(Tower, mount.tower) if mount.tower else find(Tower, module)
            path = mount.path
            inner = find(ModelRecord, module) if record is None else None
            if inner is not None and len(inner.towers) == 1:  # A tower with a projection around it.
                (within,) = inner.towers.values()
                path, module = f"{path}.{within.path}", resolve(module, within.path)
                record = find(Tower, module)
            if record is None:
                raise unknown(module, Tower)
            stacks = {s: _stack_paths(stack, module) for s, stack in record.stacks.items()}
            parts = {
                s: [resolve_parts(record.stacks[s].parts, module.get_submodule(p)) for p in paths]
                for s, paths in stacks.items()
            }
            ends = resolve_parts(record.before, module), resolve_parts(record.after, module)
            settled = resolve_record(record, module)
            tower = TowerView(name, settled, mount, module, path, stacks, parts, *ends, model)
            self.towers[name] = tower
            for site in _tower_sites(tower):
                if site.reason is None:
                    self.sites[site.name] = site
                elif not any(fnmatchcase(present, site.name) for present in self.sites):
                    # A family's reason is for those of its models that were built without the site.
                    self.absent[site.name] = site
        mounts = (mount.path.partition(".")[0] for mount in self.model_record.towers.values())
        self._tree = ModuleTree(model, mounts)

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """Every module of the model, as it was when the sites were mapped."""
        return self._tree.modules

    def follow(self, model: Any = None) -> bool:
        """Reads the model again if modules in it were put in place of others; returns whether it did.

        `model` is one that stands for it from now on.
        """
        if (model is None or model is self.model) and self._tree.is_whole():
            return False
        # Changed as a whole, so that one that cannot be read leaves this as it was.
        vars(self).update(vars(SiteMap(self.model if model is None else model)))
        return True

    def __getitem__(self, name: str) -> Site:
        return self.check(name)

    def check(self, name: str) -> Site:
        """The site of this name. Raises: MissingSiteError with the reason, or the nearest names."""
        if name in self.sites:
            return self.sites[name]
        raise self.missing(name)

    def tower(self, name: str) -> TowerView:
        """The tower of this name. Raises: MissingSiteError naming those there are."""
        if name in self.towers:
            return self.towers[name]
        raise self.missing(name)

    def missing(self, name: str) -> MissingSiteError:
        """The error for a name that is no site: why, or the nearest names."""
        for pattern, site in self.absent.items():
            if fnmatchcase(name, pattern):
                return MissingSiteError(f"{self.family}: {name} is out of reach: {site.reason}.")
        near = difflib.get_close_matches(name, self.sites, n=4, cutoff=0.5)
        hint = f"The nearest are {', '.join(near)}" if near else f"Towers: {', '.join(self.towers)}"
        return MissingSiteError(
            f"{self.family}: no site {name!r}. {hint}. model.sites('*') lists all {len(self.sites)}."
        )

    def find(self, pattern: str = "*") -> list[Site]:
        """Sites whose name matches the glob, then absent ones it touches."""
        present = [s for n, s in self.sites.items() if fnmatchcase(n, pattern)]
        gone = [s for n, s in self.absent.items() if fnmatchcase(n, pattern)]
        return present + gone

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites.values())

    def __len__(self) -> int:
        return len(self.sites)


class SiteTable(tuple[Site, ...]):
    """Sites, one a line when printed: name and axes, or why it is absent."""

    def __repr__(self) -> str:
        return "\n".join(map(str, self)) or "no sites"

    __str__ = __repr__


def resolve(model: Any, path: str) -> Any:
    """What stands at a dotted path; "" is the model itself. Works for modules and pipelines."""
    for name in path.split(".") if path else ():
        model = inside(getattr(model, name))
    return model


def _tower_sites(tower: TowerView) -> Iterator[Site]:
    record = tower.record
    yield from (_site(tower, None, None, part, location) for part, location in tower.before.items())
    for stack_name, paths in tower.stacks.items():
        for layer, path in enumerate(paths):
            for part, location in tower.parts[stack_name][layer].items():
                yield _site(tower, stack_name, layer, part, location, path)
    yield from (_site(tower, None, None, part, location) for part, location in tower.after.items())
    for part, reason in record.absent.items():
        yield Site(f"{tower.name}.{part}", tower.name, None, None, part, None, "", (), reason)


def _site(
    tower: TowerView,
    stack: str | None,
    layer: int | None,
    part: str,
    location: Location,
    path: str = "",
) -> Site:
    local = part if stack is None else f"{stack}.{layer}.{part}"
    inner = "" if isinstance(location, Residual) else location.path
    module = ".".join(p for p in (tower.path, path, inner) if p)
    owner = tower.module.get_submodule(path)
    return Site(
        f"{tower.name}.{local}",
        tower.name,
        stack,
        layer,
        part,
        location,
        module,
        _axes(owner, part, location),
    )


def _axes(owner: nn.Module, part: str, location: Location) -> tuple[str, ...]:
    leaf = part.rpartition(".")[2]
    if isinstance(location, Output | Input) and location.axes is not None:
        return location.axes
    if isinstance(location, Output | Input) and location.is_map:
        axes = _MAP
    elif leaf in _AXES:
        axes = _AXES[leaf]
    else:
        axes = _TOKEN
    heads = location.heads if isinstance(location, Output | Input | Attention) else None
    if heads is None:
        return axes
    count = head_count(owner, heads)
    return tuple(f"head={count}" if a == "head" else a for a in axes)


def _stack_paths(stack: Stack, module: nn.Module) -> list[str]:
    names = [name for name, _ in module.named_modules()]
    paths: list[str] = []
    for glob in stack.paths:
        match = re.compile(translate(glob)).match
        paths += [n for n in names if n.count(".") == glob.count(".") and match(n)]
    for block in map(module.get_submodule, paths if stack.classes else ()):
        if type(block).__name__ not in stack.classes:
            raise unknown(block, Tower)
    if stack.needs is None:
        return paths
    return [n for n in paths if first_path(module.get_submodule(n), stack.needs) is not None]
