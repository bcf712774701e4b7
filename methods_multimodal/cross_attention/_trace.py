"""Runs of a trace: for each case its picture, its goal, and a picture and its control for each part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from methods_multimodal.core.kept import kept
from methods_multimodal.cross_attention._measuring import Drawing, check_work, measure_parts
from methods_multimodal.cross_attention._rows import RowEdit
from methods_multimodal.cross_attention._sites import text_attention
from methods_multimodal.cross_attention.cases import Case, Part, is_whole, n_heads_of, select_layers
from methods_multimodal.cross_attention.effects import Effects
from methods_multimodal.cross_attention.generation import generate_checked
from methods_multimodal.cross_attention.metrics import Metric
from mm_adapters import InputError, Model

# The edits of one row, by a case's number, the part and the row.
Change = Callable[[int, Part, int], list[RowEdit]]


@dataclass(frozen=True)
class Trace:
    """What is traced: pictures, each with a word in question, and the parts that are changed one at a time.

    Attributes:
        model: Draws.
        cases: The pictures.
        metric: Gives a number for each picture.
        parts: What is changed.
        batch: Rows of a run.
        options: The pipeline's.
        folder: Where runs are written down.
    """

    model: Model
    cases: Sequence[Case]
    metric: Metric
    parts: Sequence[Part]
    batch: int
    options: Mapping[str, Any] | None
    folder: str | Path | None

    def effects(
        self,
        what: str,
        change: Change,
        control: Change,
        named: Mapping[int, str],
        *,
        goals: Sequence[str] | None = None,
        settings: Mapping[str, Any],
    ) -> Effects:
        """The effects of an intervention.

        Args:
            what: Its name.
            change: A part's edits.
            control: Those of its control.
            named: What the control of a case is; a case that is not there has none.
            goals: The prompts whose pictures are the goals; None for the picture with everything changed.
            settings: What else stored work is made with.
        """
        check_work(self.cases, self.parts, self.batch)
        attention = text_attention(self.model)
        n_steps = (self.options or {}).get("num_inference_steps")
        for part in self.parts:
            if n_steps is not None and part.steps and not 0 <= min(part.steps) <= max(part.steps) < n_steps:
                raise InputError(f"{part}: the run has the steps 0 to {n_steps - 1}.")
            select_layers(attention, part)
        for i in range(len(self.cases)):  # Every mistake in a word comes up here.
            change(i, self.parts[0], 0)
        n_heads = max(n_heads_of(self.model, layer) for layer in attention)

        def drawing_of(i: int) -> Drawing:
            prompt = self.cases[i].prompt
            ends = [] if goals else change(i, Part(), 1)

            def draw(chunk: Sequence[int]) -> Tensor:
                row_edits, rows = list(ends), [prompt, goals[i] if goals else prompt]
                for edits_of in (change, control) if i in named else (change,):
                    for p in chunk:
                        row_edits += edits_of(i, self.parts[p], len(rows))
                        rows.append(prompt)
                return generate_checked(self.model, rows, self.cases[i].seed, row_edits, self.options)

            return Drawing(draw, named.get(i, ""))

        made_of: dict[str, Any] = {"options": dict(self.options or {}), "controls": "by part", **settings}
        made_of |= {"cases": list(self.cases), "parts": list(self.parts), "metric": self.metric}
        with kept(self.folder, job=what, models={"model": self.model}, **made_of) as work:
            return measure_parts(
                self.model,
                self.cases,
                self.parts,
                self.metric,
                [drawing_of(i) for i in range(len(self.cases))],
                what=what,
                batch=self.batch,
                whole=[is_whole(part, attention, n_heads, n_steps) for part in self.parts],
                work=work,
            )
