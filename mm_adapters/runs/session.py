"""One run with reads and edits: which call is which step, which rows are whose, what was seen."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from mm_adapters._errors import EditNeverFiredError, InputError
from mm_adapters.hooks.wiring import Points
from mm_adapters.records.resolve import is_guided
from mm_adapters.records.spec import Guidance
from mm_adapters.runs.lens import Edit, Read, Rows, Run
from mm_adapters.runs.meter import Meter
from mm_adapters.sites.site_map import SiteMap


class CallCounter:
    """Counts the calls of one tower within a run, and how many positions came before this call.

    Where guidance calls a denoiser once for each part, `part` is which one this is, and those calls
    are one step: the first call's text is the first part's.
    """

    def __init__(self, text: str | None = None) -> None:
        self.call = -1
        self.part = 0
        self.offset = 0
        self._text = text
        self._first: Any = None

    def tick(self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A forward pre-hook of the tower."""
        if self._text is not None:
            text = kwargs.get(self._text)
            self._first = text if self._first is None else self._first
            self.part = 0 if text is self._first else self.part + 1
        self.call += not self.part
        past = kwargs.get("past_key_values")
        self.offset = past.get_seq_length() if past is not None else 0

    @property
    def step(self) -> int:
        """The number of this call. A tower whose parts alone are called (a VQ model's encoder) has one."""
        return max(self.call, 0)


class Session:
    """Puts a run's reads and edits on the points, and gathers what they gave.

    Reads see edits: of one site, edits come first.
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
    ) -> None:
        for item in (*read, *edit):
            sites[item.site]  # Raises MissingSiteError before anything runs.
        twice = {r.site for r in read if sum(r.site == o.site for o in read) > 1}
        if twice:
            raise InputError(f"{', '.join(sorted(twice))}: read twice in one run; values are by site.")
        self.model = model
        self.sites = sites
        self.points = points
        self.read = read
        self.meters = [Meter(e) for e in edit]
        self.keep_graph = keep_graph
        self.arguments: Mapping[str, Any] = {}
        self._guided = guided or self._asks_model
        self.clocks = {
            name: CallCounter(guidance_text_argument(sites.loops.get(name))) for name in sites.towers
        }
        self.values_seen: dict[int, list[Tensor]] = {i: [] for i in range(len(read))}
        self.parts: dict[int, list[int]] = {i: [] for i in range(len(read))}

    @contextmanager
    def attached(self, arguments: Mapping[str, Any] | None = None) -> Iterator[None]:
        """The run belongs inside. Whatever happens there, the model is left as it was.

        `arguments` are the run's, by name.
        """
        self.arguments = arguments or {}
        with ExitStack() as stack:
            stack.callback(self.points.unwind)
            for name in self.sites_used():
                for hook in self.hooks(name):
                    self._on(stack, name, hook)
            for name in self._towers_used():
                tower = self.sites.towers[name]
                module = tower.module.get_submodule(tower.record.calls)
                # Put on last to be first in line: a site may be the tower's own input.
                handle = module.register_forward_pre_hook(
                    self.clocks[name].tick, prepend=True, with_kwargs=True
                )
                stack.callback(handle.remove)
            yield

    def sites_used(self) -> list[str]:
        """The sites read or edited, each once."""
        return list(dict.fromkeys(i.site for i in (*(m.edit for m in self.meters), *self.read)))

    def hooks(self, site: str) -> Iterator[Callable[..., Tensor | None]]:
        """What is done with each value of a site, in order."""
        yield from (self._editor(m) for m in self.meters if m.edit.site == site)
        yield from (self._reader(i, item) for i, item in enumerate(self.read) if item.site == site)

    def result(self, output: Any, grad_of: Callable[[Any], Tensor] | None = None) -> Run:
        """The run's values, gradients and receipts.

        Raises: EditNeverFiredError if an edit touched nothing.
        """
        receipts = tuple(m.receipt() for m in self.meters)
        idle = [r.site for r in receipts if not r.fired]
        if idle:
            raise EditNeverFiredError(
                f"The edit of {', '.join(idle)} never fired: this run did not reach it with "
                "the steps, rows and positions it names. Check them, or that the inputs use the tower."
            )
        grads = self._gradients(output, grad_of) if grad_of is not None else {}
        values = {
            r.site: self._join(i, r, self.values_seen[i])
            for i, r in enumerate(self.read)
            if self.values_seen[i]
        }
        if self.keep_graph:
            values = {k: v.detach() for k, v in values.items()}
        return Run(output, values, grads, receipts, self._rows_seen(), self._guidance_numbers())

    def _gradients(self, output: Any, grad_of: Callable[[Any], Tensor]) -> dict[str, Tensor]:
        scalar = grad_of(output)
        if scalar.numel() != 1:
            raise ValueError(f"grad_of gave a tensor of shape {tuple(scalar.shape)}; it gives a scalar.")
        flat = [x for i in self.values_seen for x in self.values_seen[i]]
        got = iter(torch.autograd.grad(scalar, flat, allow_unused=True)) if flat else iter(())
        grads: dict[str, Tensor] = {}
        for i, item in enumerate(self.read):
            own = [next(got) for _ in self.values_seen[i]]
            filled = [
                torch.zeros_like(x) if g is None else g for x, g in zip(self.values_seen[i], own, strict=True)
            ]
            if filled:
                grads[item.site] = self._join(i, item, filled)
        return grads

    def _join(self, index: int, item: Read, parts: list[Tensor]) -> Tensor:
        if self.sites[item.site].tower in self.sites.loops:
            steps = _by_step(parts, self.parts[index])
            shapes = {tuple(step.shape): None for step in steps}
            if len(shapes) > 1:
                listed = " and ".join(str(list(shape)) for shape in shapes)
                raise InputError(
                    f"{item.site} has the shapes {listed} at different steps: guidance adds or drops rows on "
                    "the way. Read steps= that are alike, or reduce them to one shape."
                )
            return torch.stack(steps)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _on(self, stack: ExitStack, site: str, hook: Callable[..., Tensor | None]) -> None:
        # Torch's own hook, not TransformerLens': only this handle is removed afterwards.
        point = self.points.by_name[site]
        handle = point.register_forward_hook(hook)
        stack.callback(point.refresh)
        stack.callback(handle.remove)

    def _editor(self, meter: Meter) -> Callable[..., Tensor | None]:
        edit = meter.edit
        clock = self.clocks[self.sites[edit.site].tower]

        def hook(point: Any, args: Any, value: Tensor) -> Tensor | None:
            rows = self._rows(edit.site, edit.rows, value.shape[0])
            if rows is None or not _wanted(edit.steps, clock.step):
                return None
            if edit.positions is None:
                if rows == slice(None):
                    return meter(value)
                new = value.clone()
                new[rows] = meter(value[rows])
                return new
            here = [p - clock.offset for p in edit.positions]
            here = [p for p in here if 0 <= p < value.shape[1]]
            if not here:
                return None
            new = value.clone()
            part = value[rows]
            edited = part.clone()
            edited[:, here] = meter(part[:, here])
            new[rows] = edited
            return new

        return hook

    def _reader(self, index: int, item: Read) -> Callable[..., Tensor | None]:
        clock = self.clocks[self.sites[item.site].tower]

        def hook(point: Any, args: Any, value: Tensor) -> Tensor | None:
            rows = self._rows(item.site, item.rows, value.shape[0])
            if rows is None or not _wanted(item.steps, clock.step):
                return None
            # Of a model whose weights are frozen nothing is followed until the first read.
            fresh = self.keep_graph and not value.requires_grad
            value = value.detach().requires_grad_() if fresh else value
            part = value if rows == slice(None) else value[rows]
            part = part if item.reduce is None else item.reduce(part)
            self.values_seen[index].append(part if self.keep_graph else part.detach())
            self.parts[index].append(clock.part)
            return value if fresh else None

        return hook

    def _towers_used(self) -> list[str]:
        wanted = {self.sites[i.site].tower for i in (*self.read, *(m.edit for m in self.meters))}
        return [name for name in self.sites.towers if name in wanted]

    def _rows(self, site: str, rows: Rows, n: int) -> Any | None:
        """What to index the batch with; None if this call has none of these rows."""
        if rows == "all":
            return slice(None)
        if not isinstance(rows, str):
            return rows if isinstance(rows, slice) else list(rows)
        tower = self.sites[site].tower
        guidance = self.sites.loops.get(tower, self.sites.model_record.guidance)
        if guidance is None:
            raise InputError(
                f"rows={rows!r} at {site}: {self.sites.family} has no classifier-free guidance there; "
                'give row numbers, a slice, or "all".'
            )
        if tower in self.sites.loops and guidance.denoiser_calls:
            return slice(None) if guidance.denoiser_calls[self.clocks[tower].part] == rows else None
        if tower in self.sites.loops:
            if not self._guided(guidance):
                return slice(None) if rows == "cond" else None
            if rows not in guidance.denoiser_rows:
                known = ", ".join(guidance.denoiser_rows)
                raise InputError(f"rows={rows!r} at {site}: {self.sites.family} has {known}, all.")
            return nth_part(guidance.denoiser_rows.index(rows), n, len(guidance.denoiser_rows))
        if tower.partition("_")[0] == "text":
            call = self.clocks[tower].call
            return slice(None) if guidance.text_calls[call : call + 1] == (rows,) else None
        return slice(None) if rows == "cond" else None

    def _asks_model(self, guidance: Guidance) -> bool:
        return is_guided(self.model, guidance, self.arguments)

    def _rows_seen(self) -> dict[str, dict[str, slice]]:
        found = {name: self._rows_of(name, g) for name, g in self.sites.loops.items() if g is not None}
        return {name: rows for name, rows in found.items() if rows}

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
        if not guidance.denoiser_calls and not self._guided(guidance):
            return {"cond": slice(None)}
        for i, item in enumerate(self.read):
            if self.sites[item.site].tower == loop and item.rows == "all" and item.reduce is None:
                n, parts = self.values_seen[i][0].shape[0], guidance.denoiser_rows
                if guidance.denoiser_calls:
                    parts = guidance.denoiser_calls[: 1 + max(self.parts[i])]
                    n *= len(parts)
                return {name: nth_part(k, n, len(parts)) for k, name in enumerate(parts)}
        return {}


def guidance_text_argument(guidance: Guidance | None) -> str | None:
    """The argument that tells the calls of one step apart, where guidance makes several."""
    return guidance.text if guidance is not None and guidance.denoiser_calls else None


def _by_step(values: list[Tensor], parts: list[int]) -> list[Tensor]:
    """Each step's values, the rows of its calls one after the other."""
    steps: list[list[Tensor]] = []
    for i, (value, part) in enumerate(zip(values, parts, strict=True)):
        if i and part > parts[i - 1]:
            steps[-1].append(value)
        else:
            steps.append([value])
    for step in steps:
        if len({value.shape[1:] for value in step}) > 1:
            shapes = " and ".join(str(list(value.shape)) for value in step)
            raise InputError(
                f"The calls of one step have {shapes}, for their prompts differ in length: "
                'read rows="cond" or rows="uncond", or reduce them to one shape.'
            )
    return [step[0] if len(step) == 1 else torch.cat(step) for step in steps]


def nth_part(which: int, n: int, parts: int) -> slice:
    """The `which`-th of `parts` equal runs of `n` rows."""
    size = n // parts
    return slice(which * size, (which + 1) * size)


def _wanted(steps: Any, call: int) -> bool:
    return steps is None or call in steps
