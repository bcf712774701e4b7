"""A small part of `python -m tests.quality.dissection`, and that what is named is what matters."""

from __future__ import annotations

import pytest

import mm_adapters as mm
from tests.quality import dissection as quality


def test_units_that_tell_colours_matter_for_colours_and_those_of_shapes_for_shapes() -> None:
    found = quality.causal(600, n_sets=4)
    whole, random = found["nothing"], found["random units"]
    lost = {name: {c: whole[c] - found[name][c] for c in whole} for name in ("colour units", "shape units")}
    assert lost["colour units"]["colour"] > lost["colour units"]["shape"]
    assert lost["shape units"]["shape"] > lost["shape units"]["colour"] + 0.1
    # Against random sets of the same size.
    assert lost["colour units"]["colour"] > whole["colour"] - random["colour"] + 0.03
    assert lost["shape units"]["shape"] > whole["shape"] - found["worst random"]["shape"] + 0.1


def test_units_without_a_meaning_are_detectors_at_the_chance_rate() -> None:
    found = quality.at_random(160)
    assert found["share with p <= 0.05, shuffled"] == pytest.approx(0.05, abs=0.03)
    assert found["detectors, shuffled"] <= 0.01


@pytest.mark.parametrize(
    ("name", "site"),
    [("tiny-clip", "vision.blocks.3.mlp.hook_post"), ("tiny-sd", "denoiser.resnets.4.hook_out")],
)
def test_names_hold_on_pictures_that_did_not_name(
    name: str, site: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(quality.SITES, name, [site])
    rows = quality.table(name, 128 if name == "tiny-sd" else 192, mm.load(name), steps=4)
    for row in rows:
        assert row["detectors"] >= row["units"] / 2
        assert row["AUROC"] >= row["one name for all"] + 0.05
