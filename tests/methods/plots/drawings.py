"""Every plot, drawn from numbers written out here; `python -m tests.methods.plots.drawings FOLDER` draws."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from methods_multimodal import plots
from methods_multimodal.circuits import EdgeScores, FaithfulnessCurve, NodeScores
from methods_multimodal.cross_attention import Effects, WordChanges, WordMaps
from methods_multimodal.data_attribution import Estimate
from methods_multimodal.dissection.concepts import Concepts
from methods_multimodal.lenses.direct_attribution import LogitAttribution
from methods_multimodal.lenses.reading import LensReading
from methods_multimodal.neurons import NeuronAblation
from methods_multimodal.patching import CausalTrace, HeadImportance, InformationFlow
from methods_multimodal.patching.activation_patching import ActivationPatching
from methods_multimodal.plots import data_attribution, dissection
from methods_multimodal.probing import CodeLength, IntrinsicProbe, ModalityShares, ProbeSheet, PromptProbe
from methods_multimodal.relevance.attention_maps import HeadMaps
from methods_multimodal.text_explanations.name_heads import HeadNames
from methods_multimodal.text_explanations.segmentation import Segmentation
from methods_multimodal.text_explanations.spurious import Groups
from tests.methods.plots.shown import of_figure

SHOWN = Path(__file__).with_name("shown.json")
DRAWINGS: dict[str, Callable[[], Axes | Figure]] = {}


def drawing(draw: Callable[[], Axes | Figure]) -> Callable[[], Axes | Figure]:
    DRAWINGS[draw.__name__] = draw
    return draw


def table(*shape: int) -> torch.Tensor:
    """Numbers of both signs, no two alike."""
    n = int(np.prod(shape))
    return ((torch.arange(n) * 7 % n).float() / n - 0.35).reshape(shape)


def pixels(height: int = 6, width: int = 9) -> np.ndarray:
    return (np.arange(height * width * 3) * 5 % 256).astype(np.uint8).reshape(height, width, 3)


def probes(steps: tuple[int, ...] = ()) -> ProbeSheet:
    """Two variables at three layers and two roles; right more often the later the layer."""
    shape = (4, 2, 3, 2, max(1, len(steps)), 20)
    kind, variable, layer, role, step, row = torch.meshgrid(*map(torch.arange, shape), indexing="ij")
    right = row < torch.where(kind == 0, 4 + 6 * layer + 3 * role - 2 * variable + step, 4 + kind - variable)
    places = shape[:-1]
    return ProbeSheet(
        right=right,
        validation=table(*places).abs(),
        strength=torch.ones(places[1:]),
        guess=torch.tensor([0.25, 0.125]),
        kinds=("task", "shuffled", "control", "twin"),
        variables=("size", "shape"),
        classes=(("large", "small"), ("circle", "square")),
        sites=tuple(f"vision.blocks.{i}.hook_resid_post" for i in range(3)),
        roles=("class", "patch"),
        steps=steps,
        head="linear",
        model="tiny-clip",
    )


@drawing
def probe_sheet() -> Axes:
    return plots.probe_sheet(probes(), role="patch")


@drawing
def probe_steps() -> Axes:
    return plots.probe_steps(probes((0, 5)), "size")


@drawing
def probe_curve() -> Axes:
    return plots.probe_curve(probes(), "shape")


@drawing
def code_curve() -> Axes:
    ends = torch.tensor([2, 8, 32, 128])
    task = torch.tensor([[4.0, 8.0, 20.0, 30.0], [4.0, 7.0, 22.0, 40.0]])
    return plots.code_curve(
        CodeLength(task, 2.0 * torch.tensor([[2.0, 6.0, 24.0, 96.0]] * 2), ends, 2.0, "shape", "linear")
    )


@drawing
def dimension_curve() -> Axes:
    right = torch.arange(10)[None] < torch.tensor([4, 7, 8, 9])[:, None]
    random = torch.tensor([[0.2, 0.3, 0.3, 0.4], [0.3, 0.2, 0.4, 0.4]])
    information = torch.tensor([0.2, 0.8, 1.0, 1.1])
    return plots.dimension_curve(
        IntrinsicProbe(torch.tensor([17, 3, 60, 8]), right, information, random, random, 1.5, 0.25, "shape")
    )


@drawing
def token_shares() -> Axes:
    values = torch.tensor([0.1, 2.0, 1.5, -0.4, 0.2, 1.0])
    is_text = torch.tensor([True, True, True, False, False, False])
    names = ("a", "red", "circle", "square 0, 0", "square 0, 1", "square 1, 0")
    item, ends = torch.zeros(6, dtype=torch.long), (torch.tensor([4.4]), torch.tensor([0.0]))
    return plots.token_shares(ModalityShares(values, values.abs() / 5, item, is_text, *ends, names))


@drawing
def answer_table() -> Axes:
    scores = torch.eye(3)[[0, 0, 1, 1, 2, 0]]
    return plots.answer_table(
        PromptProbe(scores, torch.tensor([0, 0, 1, 1, 2, 2]), ("red", "green", "blue"), "cosine")
    )


@drawing
def heatmap_plain() -> Axes:
    return plots.heatmap(table(3, 4).abs(), unit="attention weight")


@drawing
def heatmap_signed() -> Axes:
    return plots.heatmap(
        table(2, 3), unit="logit", signed=True, rows=["a", "b"], columns=["x", "y", "z"], write="+z.2f",
        label_rows="layer", label_columns="head", title="a title",
    )  # fmt: skip


@drawing
def heatmap_limited() -> Axes:
    values = torch.tensor([[-0.001, 0.4], [0.9, 2.0]])
    return plots.heatmap(values, unit="share", limit=1.0, write=".1f", rows=[str(i) for i in range(2)])


@drawing
def heatmap_of_zeros() -> Axes:
    return plots.heatmap(torch.zeros(2, 2), unit="share", write=".0%")


@drawing
def heatmap_long() -> Axes:
    names = [str(i) for i in range(33)]
    return plots.heatmap(table(17, 33), unit="x", signed=True, rows=names[:17], columns=names)


def heads(n_layers: int = 2, n_heads: int = 3) -> LogitAttribution:
    return LogitAttribution(
        embed=torch.tensor([[0.5, -0.25]]),
        heads=table(1, 2, n_layers, n_heads),
        attn_bias=table(1, 2, n_layers),
        mlps=table(1, 2, n_layers),
        bias=torch.tensor([[0.125, -0.5]]),
        logit=torch.tensor([[1.5, -0.75]]),
        texts=("a red circle", "a blue star"),
    )


@drawing
def head_shares() -> Axes:
    return plots.head_shares(heads(), text=1)


@drawing
def head_shares_written() -> Axes:
    return plots.head_shares(heads(10, 16))


@drawing
def head_shares_many() -> Axes:
    return plots.head_shares(heads(7, 23))


@drawing
def mlp_shares() -> Axes:
    return plots.mlp_shares(heads(), text=1)


def lens_reading(logits: torch.Tensor, where: str) -> LensReading:
    n, layers, _ = logits.shape
    names = ("embedding", *(f"layer {i}" for i in range(layers - 1)))
    total = logits.logsumexp(-1)
    return LensReading(logits, total, "logit", "logit", names, (), tuple(range(n)), (2,) * n, where=where)


NODES = (
    "v.input",
    "v.a0.h0",
    "v.a0.h1",
    "v.m0",
    "p",
    "input",
    "a0.h0",
    "a0.h1",
    "m0",
    "c1.h0",
    "c1.h1",
    "m1",
)


def node_scores() -> NodeScores:
    scores = table(2, len(NODES))
    return NodeScores(
        scores, torch.ones(2), torch.zeros(2), torch.zeros(2), NODES, "integrated", 4, forwards=6, backwards=4
    )


@drawing
def circuit_map() -> Axes:
    return plots.circuit_map(node_scores(), circuit=("v.input", "p", "m1"), unit="logit difference")


@drawing
def circuit_map_with_edges() -> Axes:
    names = ("v.input->v.a0.h1<q>", "v.m0->p", "p->a0.g0<k>", "a0.h1->m0", "m1->logits", "v.a9.h9->v.m9")
    edges = EdgeScores(table(2, 6), torch.ones(2), torch.zeros(2), names, 0)
    return plots.circuit_map(node_scores(), edges=edges, n_edges=5, title="the largest edges")


@drawing
def faithfulness_lines() -> Axes:
    metric = torch.tensor([[0.0, 0.5], [0.25, 1.0], [0.75, 1.25], [1.0, 1.5]])
    curve = FaithfulnessCurve(metric, metric[-1], metric[0], (0, 1, 2, 3), ("a", "b", "c"))
    flat = FaithfulnessCurve(metric[[0, 0, 0, 3]], metric[-1], metric[0], (0, 1, 2, 3), ("c", "b", "a"))
    return plots.faithfulness_lines({"integrated": curve, "random": flat}, title="a question")


@drawing
def lens_table() -> Axes:
    logits = torch.tensor([[4.0, 1.0, 0.0, -1.0], [0.0, 0.5, 0.25, 0.75], [0.1, 0.0, 3.0, 1.0]])[None]
    return plots.lens_table(lens_reading(logits, "the last position"), lambda i: f" w{i}", k=3)


@drawing
def lens_table_at_a_position() -> Axes:
    logits = torch.stack([torch.zeros(2, 5), torch.tensor([[0.0, 1, 2, 3, 4], [4.0, 3, 2, 1, 9]])])
    return plots.lens_table(lens_reading(logits, "position 2"), lambda i: "abcde"[i], row=1)


def patch_reading() -> LensReading:
    """Cosines of two candidates at the four patches of one image, after two layers."""
    scores = table(4, 2, 2)
    places = ((0, 0), (0, 1), (1, 0), (1, 1))
    names = ("embedding", "layer 0")
    entries: Any = ((0,) * 4, tuple(range(4)), places, (2, 2))
    return LensReading(scores, None, "CLIP", "cosine", names, ("a cat", "a dog"), *entries)


@drawing
def lens_maps() -> Axes:
    return plots.lens_maps(patch_reading(), 1)


@drawing
def lens_candidates() -> Axes:
    return plots.lens_candidates(patch_reading(), row=2)


@drawing
def lens_sheet() -> Figure:
    logits = torch.tensor([[4.0, 1.0, 0.0], [0.0, 0.5, 0.75]])[None]
    last = lens_reading(logits, "the last position")
    return plots.lens_sheet(last, patch_reading(), [0], pixels(), lambda i: "xyz"[i], caption="what is it?")


def patched(axis: str, n_layers: int, n_units: int) -> ActivationPatching:
    return ActivationPatching(
        patched=torch.stack([torch.zeros(n_layers, n_units), table(n_layers, n_units)]),
        clean=torch.tensor([1.0, 2.0]),
        corrupted=torch.tensor([0.0, 0.5]),
        site="language.blocks.{}.attn.hook_z",
        axis=axis,
        layers=tuple(range(1, n_layers + 1)),
        units=tuple((2 * i, 2 * i + 1) for i in range(n_units)),
    )


@drawing
def patch_effects() -> Axes:
    return plots.patch_effects(patched("head", 2, 3), row=1)


@drawing
def patch_effects_of_positions() -> Axes:
    return plots.patch_effects(patched("position", 3, 54), row=1, title="mine")


@drawing
def patch_effects_written() -> Axes:
    return plots.patch_effects(patched("position", 10, 16), row=1)


def traced(into: str, n_windows: int) -> CausalTrace:
    windows = tuple((i,) if into == "corrupted" else (i, i + 1) for i in range(n_windows))
    clean, corrupted = torch.tensor([2.0, 3.0]), torch.tensor([-1.0, 0.5])
    patched = table(2, n_windows, 3) + corrupted[:, None, None]
    names = ("image", "question", "last")
    of = (windows, "hook_mlp_out", "language", into, "another picture")
    return CausalTrace(patched, clean, corrupted, names, *of)


@drawing
def trace_grid() -> Axes:
    return plots.trace_grid(traced("corrupted", 4))


@drawing
def trace_grid_of_the_clean_run() -> Axes:
    return plots.trace_grid(traced("clean", 60), title="mine")


@drawing
def flow_lines() -> Axes:
    flows = (("image", "question"), ("question", "last"), ("image", "last"))
    windows = tuple((i, i + 1) for i in range(4))
    record = InformationFlow(table(3, 4, 5), table(5), table(3, 4, 5).abs(), flows, windows, "language")
    return plots.flow_lines(record, unit="logit gap")


@drawing
def head_importance_grid() -> Axes:
    return plots.head_importance_grid(HeadImportance(table(2, 3, 4), (1, 2), "language"))


@drawing
def neuron_ablations() -> Axes:
    others, norms = (((0, 2),),) * 3, table(3).abs()
    values = (table(6), table(6) - 1, table(3, 6))
    record = NeuronAblation(*values, ((0, 1),), others, 2.0, norms, table(3, 6) + 0.1, "language")
    return plots.neuron_ablations({"one gradient": record, "most active": record}, unit="log odds")


def head_maps() -> HeadMaps:
    return HeadMaps(table(2, 2, 3, 2, 2).abs(), "last token", (1, 4))


@drawing
def mosaic() -> Axes:
    return plots.mosaic(head_maps(), row=1)


@drawing
def mosaic_titled() -> Axes:
    return plots.mosaic(head_maps(), title="mine")


@drawing
def tiles() -> Axes:
    return plots.tiles(table(3, 2, 4).abs(), names=["a", "b", "c"], unit="attention weight", title="three")


@drawing
def tiles_signed() -> Axes:
    return plots.tiles(table(2, 2, 2), names=["a", "b"], unit="logit", signed=True)


@drawing
def overlay() -> Axes:
    return plots.overlay(table(2, 3), pixels(), unit="attention weight", title="over")


@drawing
def overlay_signed() -> Axes:
    return plots.overlay(table(2, 3), pixels(), unit="logit", signed=True, smooth=True)


@drawing
def text_map() -> Axes:
    record = Segmentation(table(2, 3, 2, 4), torch.zeros(2, 3, dtype=torch.long), (2, 4))
    return plots.text_map(record, pixels(), image=1, text=2, title="a star")


def word_maps(n_steps: int = 3) -> WordMaps:
    """Two prompts with a picture each; the second has a word less."""
    attention = table(n_steps, 1, 2, 2, 3, 4, 4).abs() / 4
    attention[:, :, :, 1, 2] = 0
    return WordMaps(
        by_grid={"4x4": attention},
        words=(("a", "red", "cat"), ("blue", "dog")),
        n_tokens=((1, 1, 1), (1, 1)),
        layers=((0,),),
        stages=(("all",),),
        latent=(4, 4),
        n_steps=n_steps,
        affinity=torch.eye(16).expand(2, 16, 16).clone(),
        affinity_grid=(4, 4),
    )


@drawing
def word_lines() -> Axes:
    return plots.word_lines(word_maps(), image=0)


@drawing
def word_lines_with_a_legend_beside() -> Figure:
    figure = Figure(figsize=(6, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    plots.word_lines(word_maps(), left, image=1, legend=right)
    return figure


@drawing
def word_map() -> Axes:
    return plots.word_map(word_maps(), "cat", pixels(), image=0)


@drawing
def word_map_with_its_edge() -> Axes:
    return plots.word_map(word_maps(), "dog", pixels(), image=1, recipe="daam", threshold=0.5)


@drawing
def word_map_with_a_note() -> Axes:
    return plots.word_map(word_maps(), "red", pixels(), note="like that to a: +0.50")


def word_changes() -> WordChanges:
    return WordChanges(
        changed=table(2, 6, 9).abs(),
        picture=torch.zeros(3, 6, 9),
        blocked=torch.zeros(2, 3, 6, 9),
        words=("a", "cat"),
        text=True,
    )


@drawing
def word_change() -> Axes:
    return plots.word_change(word_changes(), "cat")


@drawing
def word_change_on_a_scale_of_its_page() -> Axes:
    return plots.word_change(word_changes(), "a", limit=1.0, note="rank with its map +0.50")


@drawing
def film_strip() -> Axes:
    return plots.film_strip(word_maps(9), "red", n_frames=4)


@drawing
def film_strip_of_few() -> Axes:
    return plots.film_strip(word_maps(2), "dog", image=1)


@drawing
def film_strip_of_one() -> Axes:
    return plots.film_strip(word_maps(4), "red", n_frames=1)


def effects(heads_too: bool = False, n_layers: int = 2) -> Effects:
    places = [((i,), (1,) if heads_too else ()) for i in range(n_layers)] + [
        ((), (0, 1) if heads_too else ())
    ]
    spans = ((0, 1, 2), (3,), ())
    pieces = [(layers, of, steps) for layers, of in places for steps in spans]
    n = len(pieces)
    return Effects(
        changed=(torch.arange(n)[:, None] * 0.13 % 1.4 - 0.3).expand(n, 4)
        + torch.tensor([0.0, 0.1, 0.05, -0.1]),
        base=torch.tensor([0.0, 0.1, 0.0, -0.1]),
        goal=torch.tensor([1.0, 1.2, 0.9, 1.0]),
        control=torch.zeros(n, 4),
        layers=tuple(p[0] for p in pieces),
        heads=tuple(p[1] for p in pieces),
        steps=tuple(p[2] for p in pieces),
        what="a word's keys",
        metric="redness",
        control_of=("the same, turned",) * 4,
        by_construction=tuple(piece == ((), (0, 1) if heads_too else (), ()) for piece in pieces),
    )


@drawing
def effect_grid() -> Axes:
    return plots.effect_grid(effects())


@drawing
def effect_grid_of_heads() -> Axes:
    return plots.effect_grid(effects(heads_too=True), title="mine", level=0.5)


@drawing
def effect_grid_without_room() -> Axes:
    return plots.effect_grid(effects(n_layers=26))


@drawing
def effect_pairs() -> Axes:
    fast, exact = torch.tensor([[0.1, -0.4], [0.2, 0.3]]), torch.tensor([[0.2, -0.1], [0.0, 0.9]])
    return plots.effect_pairs(fast, exact, unit="redness", title="pairs")


def named(n_texts: int = 4) -> HeadNames:
    n = 2 * n_texts * 2
    return HeadNames(
        texts=("red", "blue", "ring", "star"),
        groups=("colour", "colour", "shape", "shape"),
        chosen=torch.tensor([[[0, 1, 2, 3]], [[3, 2, -1, -1]]]),
        variance_explained=table(2, 1, n_texts).abs(),
        variance=torch.tensor([[0.25], [0.125]]),
        null_share=torch.tensor([[0.1], [0.2]]),
        p_value=torch.tensor([[0.01], [0.5]]),
        top_images=(torch.arange(n) % 5).reshape(2, 1, n_texts, 2),
        scores=table(2, 1, n_texts, 2),
        top_files=tuple((i, f"{i}.png") for i in range(5)),
        n_images=5,
    )


@drawing
def head_table() -> Figure:
    figure = Figure(figsize=(7, 3), layout="constrained")
    plots.head_table(
        named(),
        lambda i: Image.new("RGB", (4, 4), (40 * i, 0, 9)),
        figure.add_subplot(),
        heads=[(1, 0), (0, 0)],
    )
    return figure


@drawing
def group_bars() -> Axes:
    groups = {
        "before": Groups(torch.tensor([0.5, 0.9, 0.75]), torch.tensor([3, 4, 5]), 0.7),
        "after": Groups(torch.tensor([0.6, 0.8, 0.0]), torch.tensor([3, 4, 0]), 0.65),
    }
    return plots.group_bars(groups)


@drawing
def group_bars_named() -> Axes:
    record = {"before": Groups(torch.tensor([0.5, 0.9]), torch.tensor([3, 4]), 0.7)}
    return plots.group_bars(record, names=["land", "water"])


@drawing
def picture() -> Axes:
    return plots.picture(pixels(2, 3), title="a title", caption="a caption")


@drawing
def sources() -> Figure:
    scores = torch.tensor([0.1, -0.9, 0.5, 0.0, 1.8])
    captions = [f"a long caption of picture number {i}" for i in range(5)]
    return data_attribution.sources(
        pixels(),
        scores,
        lambda i: np.full((2, 2, 3), i),
        n=2,
        title="a query that is long enough",
        captions=captions,
    )  # fmt: skip


@drawing
def sources_of_few() -> Figure:
    return data_attribution.sources(pixels(), torch.tensor([0.0, 0.0]), lambda i: np.full((2, 2, 3), i))


def estimate(mean: float) -> Estimate:
    return Estimate(mean, mean - 0.1, mean + 0.2, torch.tensor([mean]))


@drawing
def score_bars() -> Axes:
    return data_attribution.score_bars({"a": estimate(0.5), "b": estimate(-0.2)}, title="scorers")


@drawing
def score_bars_of_groups() -> Axes:
    pairs = {name: (estimate(m), estimate(m / 2)) for name, m in (("a", 0.4), ("b", 0.1), ("c", 0.3))}
    return data_attribution.score_bars(pairs, groups=("new", "drawn"), unit="rank")


@drawing
def detectors() -> Axes:
    concepts = Concepts(("red", "ring", "blue", "star"), ("colour", "shape", "colour", "shape"))
    return dissection.detectors(["star", "red", "red", "blue", "ring", "star"], [0, 1, 2, 3, 5], concepts)


@drawing
def detectors_of_many() -> Axes:
    names = tuple(f"c{i}" for i in range(34))
    concepts = Concepts(names, tuple("odd" if i % 2 else "even" for i in range(34)))
    units = [names[i % 34] for i in range(34 + 20)]
    return dissection.detectors(units, range(len(units)), concepts, title="mine")


@drawing
def no_detectors() -> Axes:
    return dissection.detectors(["red"], [], Concepts(("red",), ("colour",)))


@drawing
def activation_histogram() -> Axes:
    values = table(40) ** 2
    return dissection.activation_histogram(values, shown=values > 0.2, name="a star", title="unit 3")


@drawing
def activation_histogram_without_a_concept() -> Axes:
    return dissection.activation_histogram(table(12), shown=np.zeros(12, bool), name="x")


def figure_of(name: str) -> Figure:
    """One drawing's figure."""
    drawn: Any = DRAWINGS[name]()
    return drawn if isinstance(drawn, Figure) else drawn.figure


def main(folder: Path) -> None:
    """Draws all into a folder, and writes what they show."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = {}
    for name in DRAWINGS:
        figure = figure_of(name)
        shown[name] = of_figure(figure)
        figure.savefig(folder / f"{name}.png", dpi=60)
    lines = (f"{json.dumps(name)}: {json.dumps(what)}" for name, what in shown.items())
    SHOWN.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
