"""Every site of a model as a point, wired to the module hooks that feed it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from mm_adapters.hooks.attention import in_call
from mm_adapters.hooks.kept import CarryResidual, Keep, KeepInput, KeepLength
from mm_adapters.hooks.module_hooks import AttentionHook, ModuleHook, Side, Slot
from mm_adapters.hooks.point import Point
from mm_adapters.hooks.readers import (
    Copy,
    ExpandBatch,
    Gain,
    NormReader,
    Reader,
    ResidualReader,
    StreamReader,
    TextLength,
    View,
)
from mm_adapters.hooks.set_aside import hooks_set_aside, values_set_aside
from mm_adapters.records.resolve import head_count
from mm_adapters.records.spec import Attention, Input, Norm, Output, Residual, Site, Stream
from mm_adapters.sites.site_map import SiteMap, resolve

_LIVE = attrgetter("live")


class Points:
    """The points of one model by site name, and the module hooks that feed them.

    `make` builds a point: a SitePoint for TransformerLens, a TracedPoint for nnsight.
    """

    def __init__(self, sites: SiteMap, make: Callable[[Site], Any]) -> None:
        self._sites = sites
        self._make = make
        self._module_hooks: dict[tuple[int, Side], ModuleHook] = {}
        self._residuals: dict[str, ResidualReader] = {}
        self._extra: dict[str, Site] = {}
        self.by_name: dict[str, Any] = {}
        # What keeps the calls of sampling loops, if anything does: `runs.kept_calls`.
        self.call_memory: Any = None
        self.wire()

    def wire(self) -> None:
        """Wires every site to the modules there are now; a point whose name stays keeps its hooks."""
        for module_hook in self._module_hooks.values():
            module_hook.close()
        before, self.by_name = self.by_name, {}
        self._module_hooks, self._residuals = {}, {}
        sites = [*self._sites, *self._extra.values()]
        for site in sites:
            point = before.get(site.name)
            if point is None:
                point = self._make(site)
            else:
                point.move(site)
            self.by_name[site.name] = point
        for site in sites:
            self._wire(site, self.by_name[site.name])
        for point in self.by_name.values():
            point.refresh()

    def add(self, site: Site) -> Any:
        """The point of a site that the map of sites does not list: a copy of what passes there."""
        if site.name not in self.by_name:
            self._extra[site.name] = site
            self.by_name[site.name] = self._make(site)
            self._wire(site, self.by_name[site.name])
        return self.by_name[site.name]

    def drop(self, name: str) -> None:
        """Takes away a site that was added, with its hooks."""
        if self._extra.pop(name, None) is not None:
            self.by_name.pop(name).remove_hooks("both", including_permanent=True)

    @property
    def module_hooks(self) -> list[ModuleHook]:
        """Every module hook, in the order the sites come in."""
        return list(self._module_hooks.values())

    @property
    def are_live(self) -> bool:
        """Whether a hook is active on any."""
        return True in map(_LIVE, self.by_name.values())

    def n_heads(self, site: Site) -> int | None:
        """How many heads a module's input or output holds; None where heads are not apart."""
        assert isinstance(site.location, Input | Output)
        return self._heads(site, site.location.heads)

    def unwind(self) -> None:
        """Leaves the attention interceptors that an interrupted forward has not left."""
        for module_hook in self._module_hooks.values():
            if isinstance(module_hook, AttentionHook):
                module_hook.unwind()

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Inside, the model is as if no hook were active, so that it can be run in the middle of a run."""
        modules = {id(m): m for t in self._sites.towers.values() for m in t.module.modules()}
        with ExitStack() as stack:
            stack.enter_context(values_set_aside(self.module_hooks))
            for point in self.by_name.values():
                if point.live:
                    stack.enter_context(point.set_aside())
            stack.enter_context(hooks_set_aside(modules.values()))
            yield

    def _wire(self, site: Site, point: Point) -> None:
        location = site.location
        match location:
            case Output(reference_site=str() as reference_site):
                reader = ExpandBatch(point)
                first = self._hook_of(self.by_name[self._sibling(site, reference_site)].site, "output")
                self._feed(first, KeepInput(reader, reader.kept), point)
                self._feed(self._hook_of(site, "output"), reader, point, slot=_slot(location))
            case Output() | Input():
                side: Side = "output" if isinstance(location, Output) else "input"
                n_heads = self._heads(site, location.heads)
                gain = self._gain(site, location) if isinstance(location, Output) else None
                plain = n_heads is None and location.chunk is None and gain is None
                reader = Reader(point) if plain else View(point, n_heads, location.chunk, gain)
                if site.name in self._extra or (isinstance(location, Output) and location.in_place):
                    reader = Copy(point)
                self._feed(self._hook_of(site, side), reader, point, slot=_slot(location))
            case Norm(value="normalized", kind=kind, offset=offset):
                scale = self.by_name[self._sibling(site, site.part.replace("normalized", "scale"))]
                reader = NormReader(scale, point, self._module(site), kind, offset)
                self._feed(self._hook_of(site, "input"), KeepInput(reader, reader.kept), scale, point)
                self._feed(self._hook_of(site, "output"), reader, scale, point)
            case Norm():
                pass  # Wired with its partner, which comes after it.
            case Attention(value=value, heads=heads, call=call):
                module_hook = self._attention(site, heads)
                module_hook.points[in_call(value, call)] = point
                module_hook.n_calls = max(module_hook.n_calls, call + 1)
                if value in ("k", "v", "rot_k"):
                    module_hook.n_kv_heads = self._heads(site, heads) or module_hook.n_heads
                point.module_hooks.append(module_hook)
                if value == "pattern_text":
                    self._wire_text(site, point, module_hook)
            case Stream(until=until, item=item):
                reader = StreamReader(point)
                self._feed(self._hook_of(site, "input"), reader, point)
                end = self._hook_at(self._owner(site).get_submodule(until), "output", site)
                # The skip joins before the block's own sites.
                self._feed(end, CarryResidual(reader, reader.moved), point, slot=item, first=not until)
            case Residual():
                self._wire_residual(site, point, location)
            case None:
                raise AssertionError(f"{site.name} has no location.")

    def _wire_residual(self, site: Site, point: Point, location: Residual) -> None:
        reader = self._residuals[site.name] = ResidualReader(point)
        base = self.by_name[self._sibling(site, location.base)]
        branch = self.by_name[self._sibling(site, location.branch)]
        if base.site.name in self._residuals:
            self._residuals[base.site.name].next_in_stream.append(reader)
        else:
            module_hook = self._hook_of(
                base.site, "input" if isinstance(base.site.location, Input | Stream) else "output"
            )
            self._feed(module_hook, KeepInput(reader, reader.kept), point, slot=_slot(base.site.location))
        point.module_hooks.extend(t for t in base.module_hooks if t not in point.module_hooks)
        assert getattr(branch.site.location, "gain", None) is None, "A gained branch takes Stream."
        self._feed(self._hook_of(branch.site, "output"), reader, point, slot=_slot(branch.site.location))

    def _wire_text(self, site: Site, point: Point, module_hook: AttentionHook) -> None:
        joint = self._sites.towers[site.tower].record.joint
        assert joint is not None, f"{site.name}: its tower has no `joint`."
        text = TextLength(point)
        module_hook.text, module_hook.text_first = text, joint.first == "text"
        block_input = self._hook_at(self._owner(site), "input", site)
        self._feed(block_input, KeepLength(text, text.n_text), point, slot=joint.argument)

    def _feed(
        self,
        module_hook: ModuleHook,
        reader: Reader | Keep[Any],
        *points: Point,
        slot: Slot = None,
        first: bool = False,
    ) -> None:
        module_hook.add(reader, slot, first=first)
        for point in points:
            point.module_hooks.extend(
                t for t in (module_hook.unfolds, module_hook) if t is not None and t not in point.module_hooks
            )

    def _hook_of(self, site: Site, side: Side) -> ModuleHook:
        module_hook = self._hook_at(self._module(site), side, site)
        if (
            site.stack is not None
            and module_hook.unfolds is None
            and not isinstance(site.location, Residual | None)
        ):
            stack = self._sites.towers[site.tower].record.stacks[site.stack]
            if site.location.path in stack.folded:
                module_hook.unfolds = self._hook_at(self._owner(site), "input", site)
                module_hook.unfolds.add(KeepInput(module_hook, module_hook.block_input), first=True)
        return module_hook

    def _hook_at(self, module: nn.Module, side: Side, site: Site) -> ModuleHook:
        packed = self._sites.towers[site.tower].record.packed
        key: tuple[int, Side] = (id(module), side)
        if key not in self._module_hooks:
            self._module_hooks[key] = self._at_home(ModuleHook(module, side, packed), site)
        return self._module_hooks[key]

    def _attention(self, site: Site, heads: str) -> AttentionHook:
        module = self._module(site)
        key: tuple[int, Side] = (id(module), "inside")
        if key not in self._module_hooks:
            count = self._heads(site, heads)
            assert count is not None
            self._module_hooks[key] = self._at_home(AttentionHook(module, count), site)
        module_hook = self._module_hooks[key]
        assert isinstance(module_hook, AttentionHook)
        return module_hook

    def _at_home(self, module_hook: Any, site: Site) -> Any:
        above, _, name = site.module.rpartition(".")
        owner = resolve(self._sites.model, above)
        tower = self._sites.towers[site.tower].module
        if module_hook.module is self._module(site):
            module_hook.home = name, owner if isinstance(owner, nn.Module) else tower, tower
        return module_hook

    def _module(self, site: Site) -> nn.Module:
        return resolve(self._sites.model, site.module)

    def _heads(self, site: Site, where: str | None) -> int | None:
        return None if where is None else head_count(self._owner(site), where)

    def _owner(self, site: Site) -> nn.Module:
        """The repeated module a site belongs to, or its tower."""
        tower = self._sites.towers[site.tower]
        if site.stack is None or site.layer is None:
            return tower.module
        return tower.module.get_submodule(tower.stacks[site.stack][site.layer])

    def _gain(self, site: Site, location: Output) -> Gain | None:
        name = (location.gain or "").removesuffix(".tanh")
        if not isinstance(getattr(self._owner(site), name, None), Tensor):
            return None  # Built without one, it may be the number 1.
        return Gain(self._owner(site), name, squash=str(location.gain).endswith(".tanh"))

    @staticmethod
    def _sibling(site: Site, part: str) -> str:
        return site.name.removesuffix(site.part) + part


def _slot(location: Any) -> Slot:
    """Which of a module's arguments or outputs a location means."""
    return (
        location.item
        if isinstance(location, Output)
        else location.argument
        if isinstance(location, Input)
        else None
    )
