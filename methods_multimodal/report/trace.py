"""The report on one word: which layers and steps bring it into the picture?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from methods_multimodal.core.kept import Kept, kept
from methods_multimodal.cross_attention import (
    Case,
    Effects,
    Part,
    attribute_patching,
    correlation,
    grid,
    knock_out_words,
    patch_words,
    step_groups,
)
from methods_multimodal.cross_attention.metrics import Metric
from methods_multimodal.cross_attention.tracing import generate_checked, knockout_edits, patch_edits
from methods_multimodal.diffusion import to_array
from methods_multimodal.plots import effect_grid, effect_pairs, picture
from methods_multimodal.report._page import Report, new_page, rounded
from mm_adapters import Model


def trace_report(
    model: Model,
    prompt: str,
    word: str,
    other: str,
    metric: Metric,
    *,
    positions: str = "after",
    seeds: Sequence[int] = (0, 1, 2),
    steps: int = 20,
    n_groups: int = 3,
    model_name: str = "",
    unit: str = "metric",
    folder: str | Path | None = None,
    **options: Any,
) -> Report:
    """Patches `other` in the place of `word`, layer by layer and by groups of steps; and blocks the word.

    `metric` is of pictures and rises from the word to the other. It shows the exact effects with
    their intervals over seeds, and how well one gradient foretells them. With a `folder`, work is written
    down as it is done, and a run that was killed goes on.

    Raises: WordNotFoundError or InputError before anything runs.
    """
    changed = prompt.replace(word, other, 1)
    options |= {"num_inference_steps": steps}
    cases = [Case(prompt, word, changed, other, seed) for seed in seeds]
    parts = grid(model, steps=step_groups(steps, n_groups))
    made_of: dict[str, Any] = {"prompt": prompt, "word": word, "other": other, "positions": positions}
    made_of |= {
        "seeds": list(seeds),
        "steps": steps,
        "n_groups": n_groups,
        "options": options,
        "metric": metric,
    }
    with kept(folder, job="trace_report", models={"model": model}, **made_of) as work:
        exact, fast, blocked, shown = _measured(model, cases, metric, parts, positions, options, work)
    change = (exact.changed - exact.base).mean(1)
    pearson, spearman = correlation(fast.mean(1), change)
    page = new_page(14.5, 8.2, f"{model_name or model.name}: “{word}” to “{other}” in “{prompt}”")
    halves: Any = page.subfigures(2, 1, height_ratios=[3.0, 5.2])
    top, bottom = halves
    for ax, (title, image) in zip(top.subplots(1, len(shown)), shown, strict=True):
        picture(to_array(image), ax, title=title)
    left, right = bottom.subplots(1, 2, width_ratios=[2.2, 1])
    effect_grid(exact, left, title=f"patching the keys and values of “{word}” (positions: {positions})")
    effect_pairs(
        fast.mean(1),
        change,
        right,
        unit=unit,
        title=f"one gradient beside each patch: r {pearson:z.2f}, rank {spearman:z.2f}",
    )
    share, control = exact.share(), exact.control_share()
    best = share.mean.argsort(descending=True)[:3].tolist()
    numbers = {
        "model": model_name,
        "prompt": prompt,
        "word": word,
        "other": other,
        "positions": positions,
        "seeds": list(seeds),
        "steps": steps,
        "metric": unit,
        "parts": [str(p) for p in exact.parts],
        "share": rounded(share.mean),
        "low": rounded(share.low),
        "high": rounded(share.high),
        "control": [float(control.mean[0]), float(control.low[0]), float(control.high[0])],
        "blocked": float((blocked.goal - blocked.base).mean()),
        "blocked, a random word": float((blocked.control - blocked.base).mean()),
        "attribution": {"pearson": pearson, "spearman": spearman, "effects": rounded(fast.mean(1))},
    }
    lines = [f"{exact.parts[i]}: {_with(share, i)} of the whole effect" for i in best]
    lines += [
        f"a random other word: {_with(control, 0)}",
        f"blocking {word!r} moves the metric by {numbers['blocked']:+z.3f}, a random word by "
        f"{numbers['blocked, a random word']:+z.3f}",
        f"one gradient foretells the patches with r = {pearson:z.2f} (rank {spearman:z.2f})",
    ]
    return Report(page, numbers, tuple(lines))


def _measured(
    model: Model,
    cases: Sequence[Case],
    metric: Metric,
    parts: Sequence[Part],
    positions: str,
    options: dict[str, Any],
    work: Kept,
) -> tuple[Effects, Float[Tensor, "part case"], Effects, list[tuple[str, Tensor]]]:
    """The exact effects, the estimated ones, those of blocking, and the pictures shown."""
    exact = patch_words(
        model, cases, metric, parts, positions=positions, options=options, folder=work.inside("patched")
    )
    fast = attribute_patching(
        model, cases, metric, positions=positions, options=options, folder=work.inside("estimated")
    )
    blocked = knock_out_words(model, cases, metric, [Part()], options=options, folder=work.inside("blocked"))
    with work.calls(model):
        shown = work.tensors("pictures", lambda: {"": _pictures(model, cases[0], exact, positions, options)})
    best = exact.parts[int(exact.share().mean.argmax())]
    titles = [
        "the picture",
        f"with “{cases[0].other_word}”",
        f"patched at {best}",
        f"“{cases[0].word}” blocked",
    ]
    return exact, fast.of(parts), blocked, list(zip(titles, shown[""], strict=True))


def _pictures(model: Model, case: Case, exact: Effects, positions: str, options: dict[str, Any]) -> Tensor:
    """The picture, the other prompt's, the best part patched, and the word blocked."""
    best = exact.parts[int(exact.share().mean.argmax())]
    rows = [case.prompt, case.other, case.prompt, case.prompt]
    changes = [
        *patch_edits(model, case, 2, 1, best, positions=positions, options=options),
        *knockout_edits(model, case, 3, options=options),
    ]
    return generate_checked(model, rows, case.seed, changes, options)


def _with(share: Any, i: int) -> str:
    return f"{float(share.mean[i]):+z.2f} ({float(share.low[i]):+z.2f} to {float(share.high[i]):+z.2f})"
