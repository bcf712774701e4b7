"""The report on one word: at which layers and steps is it read, and what changes when it is blocked?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from methods_multimodal.core.kept import Kept, kept
from methods_multimodal.cross_attention import (
    Attribution,
    Case,
    Effects,
    Interval,
    Part,
    attribute_patching,
    correlation,
    grid,
    knock_out_words,
    patch_words,
    step_groups,
)
from methods_multimodal.cross_attention.generation import generate_checked
from methods_multimodal.cross_attention.metrics import Metric
from methods_multimodal.cross_attention.tracing import knockout_edits, patch_edits
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

    Every effect has its interval over seeds and its matched control's. What everything patched at once gives
    is told apart: with positions="after" and a causal text encoder it is the other prompt's picture, by
    construction.

    Args:
        model: a pipeline that attends to words.
        prompt: what is drawn.
        word: of the prompt; `other` is put in its place.
        metric: of pictures; it rises from the word to the other.
        positions: where the word is read: "word", "after", or a later word.
        seeds: a picture each; intervals are over them.
        steps: the sampler's; they are patched in `n_groups` groups.
        model_name: for the title.
        unit: what the metric is.
        folder: where work is written down as it is done; a run that was killed goes on there.
        options: the pipeline's.

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
        exact, whole, fast, blocked, shown = _measured(model, cases, metric, parts, positions, options, work)
    estimates = fast.of(parts)
    added = f"they add up to {fast.completeness:.0%} of the whole effect"
    poor = "" if fast.sizes_are_trusted else ": read no sizes"
    change = (exact.changed - exact.base).mean(1)
    pearson, spearman = correlation(estimates.mean(1), change)
    title = f"{model_name or model.name}: where “{word}” is read in “{prompt}” (given “{other}” there)"
    page = new_page(14.5, 8.6, title)
    share, control, above = exact.share(), exact.control_share(), exact.above_control()
    all_share, all_control = whole.share(), whole.control_share()
    best = share.mean.argsort(descending=True)[:3].tolist()
    shift, other_shift = blocked.shift(), blocked.control_shift()
    control_words = sorted(set(filter(None, blocked.control_of)))
    if whole.by_construction[0]:
        everything = "everything patched at once is the same as drawing the other prompt, by construction"
    else:
        everything = f"everything patched at once: {_with(all_share, 0)}; its control {_with(all_control, 0)}"
    if control_words:
        instead = f"its control ({', '.join(control_words)}) by {_with(other_shift, 0, 3)}"
    else:
        instead = f"no other word of the prompt has as many tokens as “{word}”, so there is no control"
    controls = f"control: {exact.control_of[0]}"
    blocking = f"blocking “{word}” moves the metric by {_with(shift, 0, 3)}; {instead}"
    page.supxlabel(f"{controls}; {everything}\n{blocking}", fontsize=9)
    halves: Any = page.subfigures(2, 1, height_ratios=[3.0, 5.2])
    top, bottom = halves
    for ax, (title, image) in zip(top.subplots(1, len(shown)), shown, strict=True):
        picture(to_array(image), ax, title=title)
    left, right = bottom.subplots(1, 2, width_ratios=[2.2, 1])
    effect_grid(exact, left, title=f"patching the keys and values of “{word}” (positions: {positions})")
    effect_pairs(
        estimates.mean(1),
        change,
        right,
        unit=unit,
        title=f"estimates by gradients: r {pearson:z.2f}, rank {spearman:z.2f}\n{added}{poor}",
    )
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
        "control": {
            "is": exact.control_of[0],
            "share": rounded(control.mean),
            "low": rounded(control.low),
            "high": rounded(control.high),
            "above": rounded(above.mean),
            "above, low": rounded(above.low),
            "above, high": rounded(above.high),
        },
        "everything": {
            "by construction": whole.by_construction[0],
            "share": _bounds(all_share),
            "control": _bounds(all_control),
        },
        "blocked": {
            "shift": _bounds(shift),
            "control": _bounds(other_shift) if control_words else None,
            "control is": control_words,
        },
        "attribution": {
            "pearson": pearson,
            "spearman": spearman,
            "completeness": fast.completeness,
            "effects": rounded(estimates.mean(1)),
        },
    }
    lines = [
        f"{exact.parts[i]}: {_with(share, i)} of the whole effect; its control {_with(control, i)}"
        for i in best
    ]
    lines += [
        f"{controls}; the best three are chosen of {len(parts)} parts",
        everything,
        blocking,
        f"estimates by gradients beside the patches: r = {pearson:z.2f} (rank {spearman:z.2f})",
        f"{added}{poor}",
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
) -> tuple[Effects, Effects, Attribution, Effects, list[tuple[str, Tensor]]]:
    """The exact effects, that of everything, the estimated ones, that of blocking, and the pictures shown."""
    exact = patch_words(
        model, cases, metric, parts, positions=positions, options=options, folder=work.inside("patched")
    )
    whole = patch_words(
        model, cases, metric, positions=positions, options=options, folder=work.inside("everything")
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
    return exact, whole, fast, blocked, list(zip(titles, shown[""], strict=True))


def _pictures(model: Model, case: Case, exact: Effects, positions: str, options: dict[str, Any]) -> Tensor:
    """The picture, the other prompt's, the best part patched, and the word blocked."""
    best = exact.parts[int(exact.share().mean.argmax())]
    rows = [case.prompt, case.other, case.prompt, case.prompt]
    changes = [
        *patch_edits(model, case, 2, 1, best, positions=positions, options=options),
        *knockout_edits(model, case, 3, options=options),
    ]
    return generate_checked(model, rows, case.seed, changes, options)


def _with(of: Interval, i: int, digits: int = 2) -> str:
    mean, low, high = (f"{float(x[i]):+z.{digits}f}" for x in (of.mean, of.low, of.high))
    return f"{mean} ({low} to {high})"


def _bounds(of: Interval) -> list[float]:
    """The mean of the only part, and its bounds."""
    return [float(of.mean[0]), float(of.low[0]), float(of.high[0])]
