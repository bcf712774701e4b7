"""Probes find what is planted and nothing else; their rows are the ones that a loop over positions gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mm_adapters as mm
from methods_multimodal.probing import (
    Features,
    Place,
    ProbeSheet,
    probe,
    probe_features,
    read_features,
    split_rows,
)
from methods_multimodal.probing.sheet import Kind
from mm_adapters.zoo import measures, world

RNG = np.random.default_rng(0)
N = 240
SHAPES = RNG.integers(3, size=N)
NOTHING = RNG.integers(2, size=N)
TYPES = RNG.integers(12, size=N)


def planted() -> Features:
    """Two layers of noise; the second one holds `SHAPES` along three directions."""
    noise = torch.from_numpy(RNG.standard_normal((2, N, 10))).float()
    noise[1, np.arange(N), SHAPES] += 4.0
    return Features(
        {Place(f"text.blocks.{i}.hook_mlp_out", "mean").column: rows for i, rows in enumerate(noise)}
    )


LABELS = {"shape": SHAPES, "nothing": NOTHING}


def test_a_planted_variable_is_found_where_it_is_and_nothing_else_is() -> None:
    rows = planted()
    sheet = probe_features(rows, LABELS, types=TYPES.tolist(), twin=planted())
    assert sheet.kinds == ("task", "shuffled", "control", "twin")
    shape, _ = sheet.curve("shape", "mean")
    assert shape[1] > 0.95
    assert sheet.best_layer("shape", "mean") == 1
    assert sheet.selectivity[0, 1, 0, 0] > 0.4
    # Nothing else is found: each interval covers the rate of chance.
    expected: tuple[tuple[Kind, str, list[int], float], ...] = (
        ("task", "shape", [0], 1 / 3),
        ("task", "nothing", [0, 1], 1 / 2),
        ("shuffled", "shape", [0, 1], 1 / 3),
    )
    for kind, variable, layers, rate in expected:
        _, (low, high) = sheet.curve(variable, "mean", kind=kind)
        assert all(low[i] <= rate <= high[i] for i in layers), (kind, variable)
    above = sheet.above("shuffled", "shape", layer=1, role="mean")
    assert above.low > 0.4
    assert above.mean == pytest.approx(float(shape[1] - sheet.accuracy("shuffled")[0, 1, 0, 0]), abs=1e-6)


def test_accuracies_and_intervals_are_those_of_a_loop_over_rows() -> None:
    sheet = probe_features(planted(), LABELS)
    split = split_rows(N, 0)
    right = sheet.right[0, 0, 1, 0, 0].tolist()
    assert len(right) == len(split.test)
    share, n, z = sum(right) / len(right), len(right), 1.959963984540054
    middle = (share + z * z / 2 / n) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / 4 / n / n) ** 0.5
    values, (low, high) = sheet.curve("shape", "mean")
    assert float(values[1]) == pytest.approx(share)
    assert (float(low[1]), float(high[1])) == pytest.approx((middle - reach, middle + reach))
    commonest = np.bincount(SHAPES[split.train.numpy()]).argmax()
    assert float(sheet.guess[0]) == pytest.approx(np.mean(SHAPES[split.test.numpy()] == commonest))


def test_the_layer_is_chosen_without_the_test_rows() -> None:
    sheet = probe_features(planted(), LABELS)
    turned = ProbeSheet(**{**vars(sheet), "right": ~sheet.right})
    assert turned.best_layer("shape", "mean") == sheet.best_layer("shape", "mean") == 1


def test_a_record_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    sheet = probe_features(planted(), LABELS, name="planted")
    back = ProbeSheet.load(sheet.save(tmp_path / "sheet.safetensors"))
    assert torch.equal(back.right, sheet.right)
    assert (back.classes, back.sites, back.steps, back.model) == (sheet.classes, sheet.sites, (), "planted")


def pictures(n: int = 12) -> tuple[list[Any], list[str]]:
    scenes = [world.scene(i, "validation", kind="one") for i in range(n)]
    return measures.images_of(scenes), [scene.things[0].size for scene in scenes]


def test_roles_are_the_means_over_their_positions() -> None:
    model = mm.load("tiny-llava")
    images, _ = pictures(3)
    texts = ["<image>\nquestion: where is it? answer:", "<image>\nwhat shape? answer:", "<image>\nwhat?"]
    inputs = {"images": images, "text": texts}
    roles = ("mean", "last", "image", "word")
    site = "language.blocks.1.hook_resid_post"
    rows = read_features(model, [inputs], sites=[site], roles=roles)
    value, layout = model.run(inputs, read=[site])[site], model.layout(**inputs)["language"]
    for row in range(3):
        attended = [p for p, role in enumerate(layout.roles[row]) if role != "pad"]
        own = {"mean": attended, "last": attended[-1:]}
        own |= {role: [p for p in attended if layout.roles[row][p] == role] for role in ("image", "word")}
        for role in roles:
            slow = sum(value[row, p] for p in own[role]) / len(own[role])
            torch.testing.assert_close(rows.at(Place(site, role))[row], slow, rtol=1e-5, atol=1e-5)
    assert {len([r for r in row if r == "pad"]) > 0 for row in layout.roles} == {True, False}


def test_of_a_sampling_loop_rows_are_the_prompts_half_at_each_step() -> None:
    model = mm.load("tiny-sd")
    inputs = {
        "prompt": ["a red circle", "a star"],
        "num_inference_steps": 3,
        "seed": [0, 1],
        "guidance_scale": 3.0,
    }
    sites = ["denoiser.blocks.3.hook_resid_post", "denoiser.resnets.3.hook_out"]
    rows = read_features(model, [inputs], sites=sites, steps=[0, 2])
    run = model.run(inputs, read=sites)
    assert {place.step for place in rows.places} == {0, 2}
    for step in (0, 2):
        tokens, feature_map = (run[site][step, 2:] for site in sites)
        torch.testing.assert_close(
            rows.at(Place(sites[0], "mean", step)), tokens.mean(1), rtol=1e-5, atol=1e-6
        )
        own = rows.at(Place(sites[1], "mean", step))
        torch.testing.assert_close(own, feature_map.mean((2, 3)), rtol=1e-5, atol=1e-6)
    text = read_features(model, [inputs], sites=["text.blocks.3.hook_resid_post"], roles=("end",))
    value = model.run(inputs, read=["text.blocks.3.hook_resid_post"])["text.blocks.3.hook_resid_post"]
    end = [model.prompt_layout("text", inputs["prompt"]).positions("end", row)[0] for row in range(2)]
    torch.testing.assert_close(text.at(text.places[0]), torch.stack([value[i, p] for i, p in enumerate(end)]))


class Killed(Exception):
    """Stands in for a kill."""


def test_a_call_that_was_killed_goes_on_and_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from methods_multimodal.probing import streamed as module

    model = mm.load("tiny-clip")
    images, sizes = pictures(40)
    batches = [{"images": images[i : i + 10]} for i in range(0, 40, 10)]
    call: dict[str, Any] = {"labels": {"size": sizes}, "sites": "vision.blocks.*.hook_mlp_out", "twin": None}
    whole = probe(model, batches, **call)

    fits, fit = [], module.fit_probe

    def counted(*args: Any, **options: Any) -> Any:
        fits.append(options["head"])
        if len(fits) == 6:
            raise Killed
        return fit(*args, **options)

    monkeypatch.setattr(module, "fit_probe", counted)
    with pytest.raises(Killed):
        probe(model, batches, folder=tmp_path / "work", **call)
    runs = []
    monkeypatch.setattr(type(model), "run", lambda *args, **options: runs.append(1))
    again = probe(model, batches, folder=tmp_path / "work", **call)
    assert not runs
    assert len(fits) == 6 + 4  # Two of the eight fits were of places that were done: two places of two kinds.
    assert torch.equal(again.right, whole.right)
    with pytest.raises(mm.StoreError, match="labels"):
        probe(model, batches, folder=tmp_path / "work", **{**call, "labels": {"size": sizes[::-1]}})


@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        ({"labels": {"size": ["small"] * 39 + ["large"]}}, mm.InputError, "no training row is 'large'"),
        ({"labels": {"size": ["small"] * 40}}, mm.InputError, "two classes"),
        ({"labels": {"size": ["small", "large"] * 10}}, mm.InputError, "20 labels for 40 rows"),
        ({"labels": {}}, mm.InputError, "no variables"),
        ({"types": ["a"]}, mm.InputError, "one label for each row"),
        ({"roles": ["word"]}, mm.MissingSiteError, "no 'word' role: its positions are class, patch"),
        ({"sites": "vision.blocks.*.hook_nope"}, mm.MissingSiteError, "hook_nope"),
        ({"sites": "vision.blocks.0.attn.hook_pattern"}, mm.InputError, "no vector at each position"),
        ({"steps": [0]}, mm.InputError, "sampling loop"),
        ({"strengths": ()}, mm.InputError, "strength"),
        ({"head": "tree"}, mm.InputError, "No head 'tree'"),
    ],
)
def test_what_cannot_be_probed_is_refused_before_anything_runs(
    changed: dict[str, Any], error: type[Exception], match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mm.load("tiny-clip")
    images, sizes = pictures(40)
    monkeypatch.setattr(type(model), "run", lambda *args, **options: pytest.fail("it ran"))
    call: dict[str, Any] = {"labels": {"size": sizes}, "sites": "vision.blocks.*.hook_mlp_out", "twin": None}
    batches = [{"images": images[i : i + 20]} for i in (0, 20)]
    with pytest.raises(error, match=match):
        probe(model, batches, **(call | changed))


def test_a_row_is_not_both_learned_from_and_judged_on() -> None:
    split = split_rows(N, 3, groups=[i // 3 for i in range(N)])
    parts = [set((part // 3).tolist()) for part in (split.train, split.validation, split.test)]
    assert not parts[0] & parts[1]
    assert not (parts[0] | parts[1]) & parts[2]
    assert sum(len(part) for part in (split.train, split.validation, split.test)) == N
    twice = type(split)(split.train, split.validation, split.train[:5])
    with pytest.raises(mm.InputError, match="a row twice"):
        probe_features(planted(), LABELS, split=twice)
