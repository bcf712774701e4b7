"""One run with reads and edits: which call is which step, which rows are whose, what was seen."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mm_adapters._errors import InputError
from mm_adapters.hooks.wiring import Points
from mm_adapters.records.resolve import is_guided
from mm_adapters.records.spec import Guidance
from mm_adapters.runs.clock import Clock
from mm_adapters.runs.gradients import check_reads, gradients, scalar_of
from mm_adapters.runs.guided_rows import GuidedRows, nth_part
from mm_adapters.runs.indices import within
from mm_adapters.runs.joining import Value, by_call, of_calls, of_generation, of_loop
from mm_adapters.runs.kept_calls import KeptCalls
from mm_adapters.runs.lens import Call, Edit, Read, Run
from mm_adapters.runs.meter import Meter
from mm_adapters.runs.schedule import Schedule
from mm_adapters.runs.seen import Seen, check_edits, check_reads_fired
from mm_adapters.sites.site_map import SiteMap


class Session:
    """Puts a run's reads and edits on the points, and gathers what they gave.

    Reads see edits: of one site, edits come first.

    Args:
        model: The module or pipeline.
        sites: Its sites.
        points: Where their values pass.
        read: What is read.
        edit: What is edited.
        keep_graph: Whether gradients are wanted.
        guided: Whether a run under a guidance has unconditional parts; the model says so if this is None.
        generating: Whether the run is a generation, whose calls go on along the sequence.

    Raises: MissingSiteError, InputError for what cannot be asked of these sites.
    """

    def __init__(
        self,
        model: Any,
        sites: SiteMap,
        points: Points,
        read: Sequence[Read],
        edit: Sequence[Edit],
        keep_graph: bool,
        guided: Callable[[Guidance], bool] | None = None,
        generating: bool = False,
    ) -> None:
        for item in (*read, *edit):
            sites[item.site]  # Raises MissingSiteError before anything runs.
        twice = {r.site for r in read if sum(r.site == o.site for o in read) > 1}
        if twice:
            raise InputError(f"{', '.join(sorted(twice))}: read twice in one run; values are by site.")
        if keep_graph:
            check_reads(read)
        self.model = model
        self.sites = sites
        self.points = points
        self.read = read
        self.meters = [Meter(e) for e in edit]
        self.keep_graph = keep_graph
        self.generating = generating
        self.arguments: Mapping[str, Any] = {}
        self._guided = guided or self._asks_model
        self._schedules = {name: Schedule.of(model, sites.model_record, name) for name in sites.loops}
        self.clocks = {name: self._clock(name) for name in sites.towers}
        self.rows = GuidedRows(model, sites, self.clocks, self._guided)
        for item in (*read, *edit):
            self.rows.check(item.site, item.rows)
        self._position_axes = [self._position_axis(e) for e in edit]
        self.values: list[list[Value]] = [[] for _ in read]
        self._wholes: list[list[tuple[Tensor, Any]]] = [[] for _ in read]
        self._edits_seen = [Seen() for _ in edit]
        self._reads_seen = [Seen() for _ in read]
        self._kept = KeptCalls(read, self.values, self._reads_seen, self.meters, self._edits_seen)

    @contextmanager
    def attached(self, arguments: Mapping[str, Any] | None = None) -> Iterator[None]:
        """The run belongs inside. Whatever happens there, the model is left as it was.

        `arguments` are the run's, by name.
        """
        self.arguments = arguments or {}
        for item in self.asked:
            self.rows.check_guided(item.site, item.rows, self.arguments)
        towers = self._towers_used()
        with ExitStack() as stack:
            stack.callback(self.points.unwind)
            for name in self.sites_used():
                for hook in self.hooks(name):
                    self._on(stack, name, hook)
            for name in towers:
                schedule = self._schedules.get(name)
                if schedule is not None:
                    stack.enter_context(schedule.watched())
                # Put on last to be first in line: a site may be the tower's own input.
                handle = self._called(name).register_forward_pre_hook(
                    self.clocks[name].tick, prepend=True, with_kwargs=True
                )
                stack.callback(handle.remove)
            if not self.keep_graph:
                memory = self.points.call_memory
                stack.enter_context(self._kept.of(memory, self.sites.loops, self._called))
            yield

    @property
    def asked(self) -> list[Read | Edit]:
        """Everything that is read or edited."""
        return [*self.read, *(m.edit for m in self.meters)]

    def sites_used(self) -> list[str]:
        """The sites read or edited, each once."""
        return list(dict.fromkeys(i.site for i in (*(m.edit for m in self.meters), *self.read)))

    def hooks(self, site: str) -> Iterator[Callable[..., Tensor | None]]:
        """What is done with each value of a site, in order."""
        yield from (self._editor(i, m) for i, m in enumerate(self.meters) if m.edit.site == site)
        yield from (self._reader(i, item) for i, item in enumerate(self.read) if item.site == site)

    def calls_a_turn(self, tower: str) -> int:
        """How many calls of a tower guidance makes for one evaluation."""
        guidance = self.sites.loops.get(tower)
        parts = () if guidance is None else guidance.denoiser_calls
        return len(parts) if guidance is not None and parts and self._guided(guidance) else 1

    def result(
        self,
        output: Any,
        grad_of: Callable[[Any], Tensor] | None = None,
        *,
        optional: Collection[str] = (),
    ) -> Run:
        """The run's values, gradients and receipts. Reads of the sites in `optional` need not have come up.

        Raises: EditNeverFiredError, ReadNeverFiredError if an edit or a read, or a part of one, never came
        up; InputError for a scalar that has no gradient.
        """
        steps = {name: clock.n_steps for name, clock in self.clocks.items()}
        check_edits([m.edit for m in self.meters], self._edits_seen, self.sites, steps)
        needed = [i for i, r in enumerate(self.read) if self.values[i] or r.site not in optional]
        check_reads_fired(
            [self.read[i] for i in needed], [self._reads_seen[i] for i in needed], self.sites, steps
        )
        grads, unused = self._gradients(output, grad_of) if grad_of is not None else ({}, ())
        values: dict[str, Tensor] = {}
        calls: dict[str, tuple[Call, ...]] = {}
        for i in needed:
            item = self.read[i]
            values[item.site], of_site = self._joined(item, self.values[i])
            if of_site:
                calls[item.site] = of_site
        if self.keep_graph:
            values = {k: v.detach() for k, v in values.items()}
        receipts = tuple(m.receipt() for m in self.meters)
        return Run(
            output, values, grads, receipts, self._rows_seen(), self._guidance_numbers(), calls, unused
        )

    def _gradients(
        self, output: Any, grad_of: Callable[[Any], Tensor]
    ) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        scalar = scalar_of(grad_of, output)
        asked = [i for i, item in enumerate(self.read) if item.grad]
        of_reads = gradients(scalar, [[whole for whole, _ in self._wholes[i]] for i in asked])
        unused = [
            self.read[i].site for i, g in zip(asked, of_reads, strict=True) if all(x is None for x in g)
        ]
        if len(unused) == len(asked):
            raise InputError(
                f"What grad_of gives does not depend on {', '.join(unused[:5])}"
                f"{' and others' if len(unused) > 5 else ''}: it is computed from other parts of the output, "
                "or an edit cuts the way. Read a site that it depends on."
            )
        grads: dict[str, Tensor] = {}
        for i, of_read in zip(asked, of_reads, strict=True):
            item = self.read[i]
            parts = [
                Value((torch.zeros_like(whole) if g is None else g)[rows], v.call, v.part, v.n_before)
                for (whole, rows), g, v in zip(self._wholes[i], of_read, self.values[i], strict=True)
            ]
            grads[item.site] = self._joined(item, parts)[0]
        return grads, tuple(unused)

    def _joined(self, item: Read, values: list[Value]) -> tuple[Tensor, tuple[Call, ...]]:
        site = self.sites[item.site]
        tower = self.sites.towers[site.tower]
        if site.tower in self.sites.loops:
            return of_loop(site, values)
        if self.generating and tower.record.role == "language":
            calls = tuple(value.call for value in values)
            return (
                (of_generation(site, values), ()) if item.reduce is None else (by_call(site, values), calls)
            )
        return of_calls(site, values, packed=tower.record.packed and item.reduce is None), ()

    def _on(self, stack: ExitStack, site: str, hook: Callable[..., Tensor | None]) -> None:
        # Torch's own hook, not TransformerLens': only this handle is removed afterwards.
        point = self.points.by_name[site]
        handle = point.register_forward_hook(hook)
        stack.callback(point.refresh)
        stack.callback(handle.remove)

    def _editor(self, index: int, meter: Meter) -> Callable[..., Tensor | None]:
        edit, seen, axis = meter.edit, self._edits_seen[index], self._position_axes[index]
        clock = self.clocks[self.sites[edit.site].tower]

        def hook(point: Any, args: Any, value: Tensor) -> Tensor | None:
            rows = self._wanted_rows(edit, value, clock)
            if rows is None:
                return None
            if axis is None:
                seen.note(clock.call)
                if rows == slice(None):
                    return meter(value, clock.call)
                new = value.clone()
                new[rows] = meter(value[rows], clock.call)
                return new
            here = self._positions(edit, value.shape[axis], clock.n_before)
            if not here:
                return None
            seen.note(clock.call, [p + clock.n_before for p in here])
            at = torch.tensor(here, device=value.device)
            edited = value[rows].clone()
            edited.index_copy_(axis, at, meter(edited.index_select(axis, at), clock.call))
            if rows == slice(None):
                return edited
            new = value.clone()
            new[rows] = edited
            return new

        return hook

    def _reader(self, index: int, item: Read) -> Callable[..., Tensor | None]:
        clock, seen = self.clocks[self.sites[item.site].tower], self._reads_seen[index]
        fold = None if item.reduce is None else self._kept.fold(index)

        def hook(point: Any, args: Any, value: Tensor) -> Tensor | None:
            rows = self._wanted_rows(item, value, clock)
            if rows is None:
                return None
            seen.note(clock.call)
            # Of a model whose weights are frozen nothing is followed until the first read.
            fresh = self.keep_graph and not value.requires_grad and value.is_floating_point()
            value = value.detach().requires_grad_() if fresh else value
            part = value if rows == slice(None) else value[rows]
            if fold is not None:
                # A copy, for a reduce may write into what it is given.
                part = fold(part.clone() if rows == slice(None) else part, clock.call)
                if not isinstance(part, Tensor):
                    raise InputError(
                        f"The reduce of {item.site} returned a {type(part).__name__}. It returns a tensor."
                    )
            if self.keep_graph and item.grad:
                # The derivative is by the whole value, on which the output depends; then its rows are taken.
                self._wholes[index].append((value, rows))
            kept = part if self.keep_graph else part.detach()
            self.values[index].append(Value(kept, clock.call, clock.part, clock.n_before))
            return value if fresh else None

        return hook

    def _wanted_rows(self, asked: Read | Edit, value: Tensor, clock: Clock) -> slice | list[int] | None:
        call = clock.call
        if asked.steps is not None and call.step not in asked.steps:  # type: ignore[operator]
            return None
        if asked.calls is not None and call.order not in asked.calls:  # type: ignore[operator]
            return None
        return self.rows.of(asked.site, asked.rows, value.shape[0])

    def _positions(self, edit: Edit, n: int, n_before: int) -> list[int]:
        """Which of a call's `n` positions, behind so many, are edited."""
        assert edit.positions is not None
        if not self.generating and n_before == 0:
            return within(edit.site, tuple(edit.positions), n, "position")
        here = [p - n_before for p in edit.positions]
        return [p for p in here if 0 <= p < n]

    def _position_axis(self, edit: Edit) -> int | None:
        if edit.positions is None:
            return None
        axes = self.sites[edit.site].axes
        if "pos" not in axes:
            raise InputError(
                f"{edit.site} has no axis of positions: it is [{', '.join(axes)}]. Leave positions out, and "
                "let fn choose."
            )
        if self.generating and min(edit.positions) < 0:
            raise InputError(
                f"{edit.site}: position {min(edit.positions)} of a text that is still being written. Count "
                "from its start."
            )
        return axes.index("pos")

    def _called(self, tower: str) -> nn.Module:
        """The module whose calls are the tower's."""
        at = self.sites.towers[tower]
        return at.module.get_submodule(at.record.calls)

    def _clock(self, tower: str) -> Clock:
        guidance = self.sites.loops.get(tower)
        parts = () if guidance is None else guidance.denoiser_calls
        return Clock(self._schedules.get(tower), parts)

    def _towers_used(self) -> list[str]:
        wanted = {self.sites[item.site].tower for item in self.asked}
        return [name for name in self.sites.towers if name in wanted]

    def _asks_model(self, guidance: Guidance) -> bool:
        return is_guided(self.model, guidance, self.arguments)

    def _rows_seen(self) -> dict[str, dict[str, slice]]:
        by_tower = {name: self._rows_of(name, g) for name, g in self.sites.loops.items() if g is not None}
        return {name: rows for name, rows in by_tower.items() if rows}

    def _guidance_numbers(self) -> dict[str, float]:
        """What the run was guided by, by the pipeline's arguments."""
        taken = inspect.signature(type(self.model).__call__).parameters if self.sites.loops else {}
        names = {
            name
            for guidance in self.sites.loops.values()
            if guidance is not None
            for name in (*guidance.scale.split("|"), guidance.image_scale, guidance.rescale or "")
        }
        numbers = {n: self.arguments.get(n, taken[n].default) for n in sorted(taken.keys() & names)}
        return {name: float(value) for name, value in numbers.items() if isinstance(value, int | float)}

    def _rows_of(self, loop: str, guidance: Guidance) -> dict[str, slice]:
        if not guidance.denoiser_calls:
            parts = self.rows.parts(guidance)
            if parts == ("cond",):
                return {"cond": slice(None)}
        for item, values in zip(self.read, self.values, strict=True):
            whole = item.rows == "all" and item.reduce is None
            if values and whole and self.sites[item.site].tower == loop:
                n = values[0].tensor.shape[0]
                if guidance.denoiser_calls:
                    parts = guidance.denoiser_calls[: 1 + max(v.part for v in values)]
                    n *= len(parts)
                return {name: nth_part(k, n, len(parts)) for k, name in enumerate(parts)}
        return {}
