"""Every site of a model as a point, wired to the taps that feed it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from mm_adapters._sitemap import SiteMap, head_count, resolve
from mm_adapters._spec import Attention, Input, Norm, Output, Residual, Site
from mm_adapters._taps import (
    AttentionTap,
    Keep,
    NormReader,
    Point,
    Reader,
    ResidualReader,
    Side,
    Spread,
    Tap,
    View,
)


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
                self._feed(self._tap(site, "output"), reader, point)
            case Output() | Input():
                side: Side = "output" if isinstance(place, Output) else "input"
                n_heads = self._heads(site, place.heads)
                plain = n_heads is None and place.chunk is None
                reader = Reader(point) if plain else View(point, n_heads, place.chunk)
                self._feed(self._tap(site, side), reader, point)
            case Norm(value="normalized", kind=kind):
                scale = self.by_name[self._sibling(site, site.part.replace("normalized", "scale"))]
                reader = NormReader(scale, point, self._module(site), kind)
                self._feed(self._tap(site, "input"), Keep(reader, "source"), scale, point)
                self._feed(self._tap(site, "output"), reader, scale, point)
            case Norm():
                pass  # Wired with its partner, which comes after it.
            case Attention(value=value, heads=heads):
                tap = self._attention(site, heads)
                tap.points[value] = point
                if value == "rot_k":
                    tap.n_kv_heads = self._heads(site, heads) or tap.n_heads
                point.taps.append(tap)
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
            tap = self._tap(base.site, "input" if isinstance(base.site.place, Input) else "output")
            self._feed(tap, Keep(reader, "base"), point)
        point.taps.extend(t for t in base.taps if t not in point.taps)
        self._feed(self._tap(branch.site, "output"), reader, point)

    def _feed(self, tap: Tap, reader: Reader | Keep, *points: Point) -> None:
        tap.readers.append(reader)
        for point in points:
            if tap not in point.taps:
                point.taps.append(tap)

    def _tap(self, site: Site, side: Side) -> Tap:
        module = self._module(site)
        return self._taps.setdefault((id(module), side), Tap(module, side))

    def _attention(self, site: Site, heads: str) -> AttentionTap:
        module = self._module(site)
        key = (id(module), "inside")
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
        if where is None:
            return None
        tower = self._sites.towers[site.tower]
        owner = tower.module
        if site.stack is not None and site.layer is not None:
            owner = owner.get_submodule(tower.stacks[site.stack][site.layer])
        return head_count(owner, where)

    @staticmethod
    def _sibling(site: Site, part: str) -> str:
        return site.name.removesuffix(site.part) + part
