"""Which rows of a call are whose: numbers, slices, and the parts of classifier-free guidance by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mm_adapters._errors import InputError
from mm_adapters.records.resolve import is_guided_by, may_perturb
from mm_adapters.records.spec import Guidance
from mm_adapters.runs.clock import Clock
from mm_adapters.runs.indices import Rows, rows_among
from mm_adapters.sites.site_map import SiteMap


class GuidedRows:
    """The rows of one run's calls.

    Args:
        model: The module or pipeline.
        sites: Its sites.
        clocks: The run's clocks, by tower.
        guided: Whether a run under this guidance has unconditional parts.
    """

    def __init__(
        self,
        model: Any,
        sites: SiteMap,
        clocks: Mapping[str, Clock],
        guided: Callable[[Guidance], bool],
    ) -> None:
        self._model = model
        self._sites = sites
        self._clocks = clocks
        self._guided = guided

    def check(self, site: str, rows: Rows) -> None:
        """Raises: InputError for a name that no part of this site's guidance has."""
        if not isinstance(rows, str) or rows == "all":
            return
        guidance = self._guidance(site)
        if guidance is None:
            raise InputError(
                f"rows={rows!r} at {site}: {self._sites.family} has no classifier-free guidance there; "
                'give row numbers, a slice, or "all".'
            )
        extra = ("perturbed",) if may_perturb(self._model, guidance) else ()
        known = dict.fromkeys((*guidance.denoiser_rows, *extra, *guidance.denoiser_calls))
        if rows not in known:
            raise InputError(f"rows={rows!r} at {site}: {self._sites.family} has {', '.join(known)}, all.")

    def check_guided(self, site: str, rows: Rows, arguments: Mapping[str, Any]) -> None:
        """Raises: InputError if a run with these arguments will have no such part, as far as they tell."""
        guidance = self._guidance(site)
        if guidance is None or rows in ("all", "cond", "perturbed") or not isinstance(rows, str):
            return
        if is_guided_by(self._model, guidance, arguments) is False:
            raise InputError(
                f"rows={rows!r} at {site}: this run is not guided, so all its rows are conditional. "
                f"Raise {guidance.scale.split('|')[0]}, or leave rows out."
            )

    def of(self, site: str, rows: Rows, n: int) -> slice | list[int] | None:
        """What to index a call's `n` rows with; None if this call has none of these rows.

        Raises: InputError naming rows that are not there.
        """
        if rows == "all":
            return slice(None)
        if not isinstance(rows, str):
            return rows_among(site, rows if isinstance(rows, slice) else tuple(rows), n)
        tower = self._sites[site].tower
        clock, guidance = self._clocks[tower], self._guidance(site)
        assert guidance is not None
        if tower not in self._sites.loops:
            if tower.partition("_")[0] == "text":
                return slice(None) if guidance.text_calls[clock.turn :][:1] == (rows,) else None
            return slice(None) if rows == "cond" else None
        if not clock.is_guidance:
            return None
        if guidance.denoiser_calls:
            return slice(None) if guidance.denoiser_calls[clock.part] == rows else None
        parts = self.parts(guidance)
        if rows not in parts:
            return None
        if n % len(parts) or (clock.n_rows and n % clock.n_rows):
            raise InputError(
                f"rows={rows!r} at {site}: it has {n} rows and the denoiser was called with {clock.n_rows}, "
                "so the parts of guidance are not apart here. Read all rows."
            )
        return nth_part(parts.index(rows), n, len(parts))

    def parts(self, guidance: Guidance) -> tuple[str, ...]:
        """The parts of one batch of the denoiser, in order."""
        guided = guidance.denoiser_rows if self._guided(guidance) else ("cond",)
        perturbed = guidance.perturbed is not None and getattr(self._model, guidance.perturbed, False)
        return (*guided, "perturbed") if perturbed else guided

    def _guidance(self, site: str) -> Guidance | None:
        tower = self._sites[site].tower
        return self._sites.loops.get(tower, self._sites.model_record.guidance)


def nth_part(which: int, n: int, parts: int) -> slice:
    """The `which`-th of `parts` equal runs of `n` rows."""
    size = n // parts
    return slice(which * size, (which + 1) * size)
