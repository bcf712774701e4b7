"""The pages of heads and of units: names from files and users stay text, whatever is in them."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import jinja2
import pytest
import torch
from PIL import Image

from methods_multimodal.dissection.concepts import Concepts
from methods_multimodal.dissection.scores import Chance, Faithfulness
from methods_multimodal.dissection.survey import Named, Survey
from methods_multimodal.report._html import render
from methods_multimodal.report.dissection import write_page
from methods_multimodal.report.heads import write_heads
from methods_multimodal.text_explanations.head_effects import HeadEffects
from methods_multimodal.text_explanations.name_heads import HeadNames

ROOT = Path(__file__).parents[2]
TEMPLATES = ROOT / "methods_multimodal" / "report" / "templates"
SCRIPT = "<script>document.title = 'owned'</script>"
HOSTILE = (
    SCRIPT,
    '"><img src=x onerror="document.title=1">',
    "' onmouseover='alert(1)",
    "{{ 7 * 7 }}{% raw %}",
    "</style></title><b>",
    "&lt;script&gt; & ünïcode",
)


class Seen(HTMLParser):
    """Tags, words and attributes, as a browser takes them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.texts).split())


def picture_of(number: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (number * 20, 0, 0))


def head_names(strings: tuple[str, ...]) -> HeadNames:
    """Two layers of one head; the second has nothing to say."""
    return HeadNames(
        texts=strings,
        groups=tuple(reversed(strings)),
        chosen=torch.tensor([[[0, 1, 2, 3, 4, 5]], [[-1] * 6]]),
        variance_explained=torch.linspace(0.1, 0.6, 6).repeat(2, 1, 1).reshape(2, 1, 6),
        variance=torch.tensor([[0.25], [1.5]]),
        null_share=torch.tensor([[0.1], [0.0]]),
        p_value=torch.tensor([[0.01], [1.0]]),
        top_images=torch.arange(12).reshape(1, 1, 6, 2).repeat(2, 1, 1, 1),
        scores=torch.linspace(-1e-9, 1.1, 12).reshape(1, 1, 6, 2).repeat(2, 1, 1, 1),
        top_files=tuple((i, strings[i % 6]) for i in range(12)),
        n_images=12,
        unreadable=((strings[0], strings[1]),),
    )


def units(strings: tuple[str, ...], *, faithful: bool) -> Survey:
    """Six units, each named after a string, by two methods that differ on the last."""
    q = torch.tensor([0.001, 0.001, 0.001, 0.001, 0.9, 0.9])
    chance = Chance(torch.ones(6), q, q, 199)
    check = Faithfulness(torch.full((6,), 0.75), torch.full((6,), 0.5), strings[2]) if faithful else None
    ours = Named("ours", strings, torch.linspace(-1e-6, 1, 6), chance, check, torch.full((6,), -1e-6))
    other = replace(ours, method=strings[0], names=(*strings[:5], strings[0]))
    activations = torch.rand(9, 6, generator=torch.Generator().manual_seed(0))
    concepts = Concepts(strings, ("concept",) * 6)
    return Survey(strings[1], concepts, (ours, other), activations, activations.topk(3, 0).indices.T, None)


def dissected(survey: Survey, folder: Path, model: str) -> str:
    maps = {u: [(int(i), torch.rand(4, 4)) for i in survey.top[u]] for u in range(6)}
    pictures = [picture_of(i) for i in range(9)]
    page, _, _ = write_page(survey, folder, model=model, pictures=pictures, maps=maps, thresholds=None)
    return page.read_text("utf-8")


def test_hostile_names_of_heads_files_and_models_are_text(tmp_path: Path) -> None:
    page, numbers = write_heads(head_names(HOSTILE), picture_of, SCRIPT, tmp_path)
    seen = Seen(page.read_text("utf-8"))
    assert "script" not in seen.tags
    assert not [name for name, _ in seen.attributes if name.startswith("on")]
    assert seen.attributes.count(("role", "img")) == 12
    for string in HOSTILE:
        assert " ".join(string.split()) in seen.words
    tips = [value for name, value in seen.attributes if name == "title"]
    assert tips[1] == f"{Path(HOSTILE[1]).name}: +0.1000"
    assert f"What the heads of {SCRIPT} say" in seen.texts
    assert "49" not in seen.words
    assert json.loads(numbers.read_text("utf-8"))["heads"][0]["texts"][0]["text"] == SCRIPT


@pytest.mark.parametrize("faithful", [True, False], ids=["with masks", "without"])
def test_hostile_names_of_units_sites_and_methods_are_text(tmp_path: Path, faithful: bool) -> None:
    seen = Seen(dissected(units(HOSTILE, faithful=faithful), tmp_path, SCRIPT))
    assert "script" not in seen.tags
    assert not [name for name, _ in seen.attributes if name.startswith("on")]
    for string in HOSTILE:
        assert " ".join(string.split()) in seen.words
    assert "49" not in seen.words
    assert seen.tags.count("img") == 1 + 6 * 4


def test_the_page_of_heads_says_every_text_with_its_share_and_images(tmp_path: Path) -> None:
    names = ("red", "blue", "ring", "star", "left", "top")
    page, _ = write_heads(head_names(names), picture_of, "tiny", tmp_path)
    seen = Seen(page.read_text("utf-8"))
    assert seen.words.index("Layer 1") < seen.words.index("Layer 0")
    assert (
        "head 1.0 150.00% not named, p 1.00 at random 0% It does not vary along any of the texts."
        in seen.words
    )
    pairs = enumerate(zip(names, reversed(names), strict=True), start=1)
    wanted = " ".join(f"{name} {group} {10 * i}%" for i, (name, group) in pairs)
    assert f"head 0.0 25.00% named, p 0.01 at random 10% {wanted}" in seen.words
    assert [v for n, v in seen.attributes if n == "style"] == ["width:100.0%", "width:25.0%"]
    tips = [v for n, v in seen.attributes if n == "title"]
    assert tips == [f"{names[i % 6]}: {i / 10:+.4f}" for i in range(12)]
    assert [v for n, v in seen.attributes if n == "aria-label"] == tips
    assert "Images that could not be read red: blue" in seen.words
    assert "http" not in page.read_text("utf-8")


def test_the_page_of_units_says_every_number(tmp_path: Path) -> None:
    names = ("red", "blue", "ring", "star", "left", "top")
    seen = Seen(dissected(units(names, faithful=True), tmp_path, "tiny"))
    assert seen.words.count("blue of tiny") == 2  # The title and the heading.
    assert "6 units, 9 pictures that name them and others that check the names, 6 concepts." in seen.words
    assert "ours 4 – – 0.750 – +0.000 0.500 (ring) red 4 – – 0.750 – +0.000 0.500 (ring)" in seen.words
    assert "give the same name: ours and red 83%." in seen.words
    for unit, name in enumerate(names):
        score = f"{unit / 5:.3f} q {0.001 if unit < 4 else 0.9:.3f} AUROC 0.75"
        other = names[0] if unit == 5 else name
        assert f"unit {unit}: {name} ours {name} {score} red {other} {score}" in seen.words
    plain = Seen(dissected(units(names, faithful=False), tmp_path, "tiny")).words
    assert "ours 4 – – – – +0.000 – red" in plain
    assert not re.search(r"AUROC 0|\bNone\b", plain)
    table = (tmp_path / "units.csv").read_text("utf-8")
    assert "-0.0," not in table


def test_the_page_of_heads_sets_the_direct_path_beside_the_whole_effect(tmp_path: Path) -> None:
    names = ("red", "blue", "ring", "star", "left", "top")
    record = replace(head_names(names), unread=(1, 4))
    plain = Seen(write_heads(record, picture_of, "tiny", tmp_path)[0].read_text("utf-8")).words
    assert "Names describe the direct path only" in plain
    assert "was not measured here" in plain
    assert "1 of 2 heads are named" in plain
    assert "2 of 6 texts as it does random letters ('blue', 'left')" in plain
    assert "blue left 20% (not read)" in plain
    effects = HeadEffects(
        texts=names,
        groups=("colour", "colour", "shape", "shape", "position", "position"),
        direct=torch.tensor([[[3.0, 1, 0, 0, 0, 0]], [[0.0, 0, 1, 2, 0, 0]]]),
        total=torch.tensor([[[0.0, 0, 0, 0, 1, 4]], [[0.0, 0, 1, 2, 0, 0]]]),
        variance=torch.ones(6),
        correlation=torch.tensor([[0.25], [0.75]]),
        size=torch.tensor([[4.0], [1.0]]),
        n_images=7,
    )
    page, numbers = write_heads(record, picture_of, "tiny", tmp_path, effects)
    seen = Seen(page.read_text("utf-8")).words
    assert "from 7 images" in seen
    assert "direct red ; total top ; correlation +0.25: it acts through later layers" in seen
    assert "direct star ; total star ; correlation +0.75 Layer 0" in seen
    first = json.loads(numbers.read_text("utf-8"))["heads"][0]
    assert first["effects"]["total"] == "top"
    assert first["named"] is True
    assert first["p_value"] == 0.01


def test_the_page_of_units_sets_counts_beside_those_of_random_weights(tmp_path: Path) -> None:
    names = ("red", "blue", "ring", "star", "left", "top")
    found = units(names, faithful=True)
    other = units(names, faithful=True)
    random = replace(other, methods=tuple(replace(m, scores=m.scores - 0.35) for m in other.methods))
    seen = Seen(dissected(replace(found, twins=(random,)), tmp_path, "tiny")).words
    # Of scores 0, 0.2, ... 1 two are above 0.65, the largest of the random ones.
    assert "ours 4 4 2 (score 0.650) 0.750 0.750 +0.000 0.500 (ring)" in seen
    assert seen.count("above random weights") == 2 * 2
    assert seen.count("as random weights") == 4 * 2
    rows = json.loads((tmp_path / "units.json").read_text("utf-8"))["units"]
    assert [row["ours_above_random"] for row in rows] == [False] * 4 + [True] * 2


def test_a_template_that_asks_for_what_it_is_not_given_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError):
        render("heads.html", title="x")


def test_templates_ship_with_the_package_and_none_marks_a_value_as_safe() -> None:
    globs = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    shipped = {p for g in globs["methods_multimodal"] for p in (ROOT / "methods_multimodal").glob(g)}
    templates = [*TEMPLATES.rglob("*")]
    assert templates
    assert set(templates) <= shipped
    for path in templates:
        text = path.read_text("utf-8")
        assert not re.search(r"\bsafe\b|autoescape|Markup", text), path
        # As in the code: a format that shows a sign drops that of zero.
        assert not re.search(r"\{:\+(?!z)", text), path
