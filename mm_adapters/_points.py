"""Every site of a model as a point, wired to the taps that feed it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from mm_adapters._attention import in_call
from mm_adapters._readers import (
    Carry,
    Copy,
    Gain,
    Keep,
    Length,
    NormReader,
    Point,
    Reader,
    ResidualReader,
    Spread,
    StreamReader,
    Text,
    View,
)
from mm_adapters._settle import head_count
from mm_adapters._sitemap import SiteMap, resolve
from mm_adapters._spec import Attention, Input, Norm, Output, Residual, Site, Stream
from mm_adapters._taps import AttentionTap, Side, Slot, Tap


class Points:
    """The points of one model by site name, and the taps behind them.

    `make` builds a point: a SitePoint for TransformerLens, or what another engine has in its place.
    """

    def __init__(self, model: Any, sites: SiteMap, make: Callable[[Site], Any]) -> None:
        self._model = model
        self._sites = sites
        self._taps: dict[tuple[int, Side], Tap] = {}
        self._residuals: dict[str, ResidualReader] = {}
        self.by_name: dict[str, Any] = {site.name: make(site) for site in sites}
        for site in sites:
            self._wire(site, self.by_name[site.name])

    @property
    def taps(self) -> list[Tap]:
        """Every tap, in the order the sites come in."""
        return list(self._taps.values())

    def n_heads(self, site: Site) -> int | None:
        """How many heads a module's input or output is made of; None where heads are not apart."""
        assert isinstance(site.place, Input | Output)
        return self._heads(site, site.place.heads)

    def unwind(self) -> None:
        """Takes down what an interrupted forward left standing in attention modules."""
        for tap in self._taps.values():
            if isinstance(tap, AttentionTap):
                tap.unwind()

    def _wire(self, site: Site, point: Point) -> None:
        place = site.place
        match place:
            case Output(like=str() as like):
                reader = Spread(point)
                first = self._tap(self.by_name[self._sibling(site, like)].site, "output")
                self._feed(first, Keep(reader, "like"), point)
                self._feed(self._tap(site, "output"), reader, point, slot=_slot(place))
            case Output() | Input():
                side: Side = "output" if isinstance(place, Output) else "input"
                n_heads = self._heads(site, place.heads)
                gain = self._gain(site, place) if isinstance(place, Output) else None
                plain = n_heads is None and place.chunk is None and gain is None
                reader = Reader(point) if plain else View(point, n_heads, place.chunk, gain)
                if isinstance(place, Output) and place.in_place:
                    reader = Copy(point)
                self._feed(self._tap(site, side), reader, point, slot=_slot(place))
            case Norm(value="normalized", kind=kind, offset=offset):
                scale = self.by_name[self._sibling(site, site.part.replace("normalized", "scale"))]
                reader = NormReader(scale, point, self._module(site), kind, offset)
                self._feed(self._tap(site, "input"), Keep(reader, "source"), scale, point)
                self._feed(self._tap(site, "output"), reader, scale, point)
            case Norm():
                pass  # Wired with its partner, which comes after it.
            case Attention(value=value, heads=heads, call=call):
                tap = self._attention(site, heads)
                tap.points[in_call(value, call)] = point
                tap.n_calls = max(tap.n_calls, call + 1)
                if value in ("k", "v", "rot_k"):
                    tap.n_kv_heads = self._heads(site, heads) or tap.n_heads
                point.taps.append(tap)
                if value == "pattern_text":
                    self._wire_text(site, point, tap)
            case Stream(until=until, item=item):
                reader = StreamReader(point)
                self._feed(self._tap(site, "input"), reader, point)
                end = self._tap_at(self._owner(site).get_submodule(until), "output", site)
                # The skip joins before the block's own sites.
                self._feed(end, Carry(reader, "moved"), point, slot=item, first=not until)
            case Residual():
                self._wire_residual(site, point, place)
            case None:
                raise AssertionError(f"{site.name} has no place.")

    def _wire_residual(self, site: Site, point: Point, place: Residual) -> None:
        reader = self._residuals[site.name] = ResidualReader(point)
        base = self.by_name[self._sibling(site, place.base)]
        branch = self.by_name[self._sibling(site, place.branch)]
        if base.site.name in self._residuals:
            self._residuals[base.site.name].kept_for.append(reader)
        else:
            tap = self._tap(base.site, "input" if isinstance(base.site.place, Input | Stream) else "output")
            self._feed(tap, Keep(reader, "base"), point, slot=_slot(base.site.place))
        point.taps.extend(t for t in base.taps if t not in point.taps)
        assert getattr(branch.site.place, "gain", None) is None, "A gained branch takes Stream."
        self._feed(self._tap(branch.site, "output"), reader, point, slot=_slot(branch.site.place))

    def _wire_text(self, site: Site, point: Point, tap: AttentionTap) -> None:
        joint = self._sites.towers[site.tower].record.joint
        assert joint is not None, f"{site.name}: its tower has no `joint`."
        tap.text, tap.text_first = Text(point), joint.first == "text"
        given = self._tap_at(self._owner(site), "input", site)
        self._feed(given, Length(tap.text, "n_text"), point, slot=joint.argument)

    def _feed(
        self, tap: Tap, reader: Reader | Keep, *points: Point, slot: Slot = None, first: bool = False
    ) -> None:
        tap.add(reader, slot, first=first)
        for point in points:
            point.taps.extend(t for t in (tap.unfolds, tap) if t is not None and t not in point.taps)

    def _tap(self, site: Site, side: Side) -> Tap:
        tap = self._tap_at(self._module(site), side, site)
        if site.stack is not None and tap.unfolds is None and not isinstance(site.place, Residual | None):
            stack = self._sites.towers[site.tower].record.stacks[site.stack]
            if site.place.path in stack.folded:
                tap.unfolds = self._tap_at(self._owner(site), "input", site)
                tap.unfolds.add(Keep(tap, "block_input"), first=True)
        return tap

    def _tap_at(self, module: nn.Module, side: Side, site: Site) -> Tap:
        packed = self._sites.towers[site.tower].record.packed
        return self._taps.setdefault((id(module), side), Tap(module, side, packed))

    def _attention(self, site: Site, heads: str) -> AttentionTap:
        module = self._module(site)
        key: tuple[int, Side] = (id(module), "inside")
        if key not in self._taps:
            count = self._heads(site, heads)
            assert count is not None
            self._taps[key] = AttentionTap(module, count)
        tap = self._taps[key]
        assert isinstance(tap, AttentionTap)
        return tap

    def _module(self, site: Site) -> nn.Module:
        return resolve(self._model, site.module)

    def _heads(self, site: Site, where: str | None) -> int | None:
        return None if where is None else head_count(self._owner(site), where)

    def _owner(self, site: Site) -> nn.Module:
        """The repeated module a site belongs to, or its tower."""
        tower = self._sites.towers[site.tower]
        if site.stack is None or site.layer is None:
            return tower.module
        return tower.module.get_submodule(tower.stacks[site.stack][site.layer])

    def _gain(self, site: Site, place: Output) -> Gain | None:
        name = (place.gain or "").removesuffix(".tanh")
        if not isinstance(getattr(self._owner(site), name, None), Tensor):
            return None  # Built without one, it may be the number 1.
        return Gain(self._owner(site), name, squash=str(place.gain).endswith(".tanh"))

    @staticmethod
    def _sibling(site: Site, part: str) -> str:
        return site.name.removesuffix(site.part) + part


def _slot(place: Any) -> Slot:
    """Which of the things a module is given or returns a place means."""
    return place.item if isinstance(place, Output) else place.argument if isinstance(place, Input) else None
