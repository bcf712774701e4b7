"""The rows of the table of dictionaries, on rows whose detectors are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mm_adapters.zoo import world
from tests.quality import sae_table
from tests.quality.sae_table import Draw, Row

N, WIDTH = 2000, 24


def planted() -> Draw:
    """Each coordinate but the last eight is high where one value is true, the labels being independent."""
    lots = torch.Generator().manual_seed(0)
    truth = torch.rand(N, WIDTH - 8, generator=lots) < 0.3
    rows = 0.1 * torch.randn(N, WIDTH, generator=lots)
    rows[:, : WIDTH - 8] += truth.float()
    return Draw(rows, truth, [f"value {i}" for i in range(WIDTH - 8)])


def test_neurons_find_what_lies_along_neurons_and_others_do_not() -> None:
    data = planted()
    centre = data.rows.mean(0)
    assert data.share(sae_table.neurons(centre)) == 1.0
    assert data.shuffled(0).share(sae_table.neurons(centre)) == 0.0
    assert data.share(sae_table.directions(0, centre)) < 0.3
    turned = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1))).Q
    rotated = Draw(data.rows @ turned, data.truth, data.names)
    assert rotated.share(sae_table.neurons(rotated.rows.mean(0))) < 0.3


def test_a_probe_that_is_told_the_labels_finds_them_in_any_basis() -> None:
    data = planted()
    turned = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1))).Q
    rotated = Draw(data.rows @ turned, data.truth, data.names)
    assert rotated.share(sae_table.probe(rotated.rows[:800], data.truth[:800])) == 1.0


def test_components_and_rows_as_dictionary_project_centred_rows() -> None:
    data = planted()
    rows = data.rows + 3.0
    made = sae_table.principal_components(rows)(rows)
    assert made.shape == (N, 2 * WIDTH)
    assert made[:, :WIDTH].square().sum(0) + made[:, WIDTH:].square().sum(0) == pytest.approx(
        torch.linalg.svdvals(rows - rows.mean(0)).square(), rel=1e-3
    )
    as_rows = sae_table.rows_as_dictionary(0, rows)
    assert torch.equal(as_rows(rows), sae_table.rows_as_dictionary(0, rows)(rows))
    assert (as_rows(rows.mean(0, keepdim=True)) < 1e-4).all()


def test_an_interval_holds_the_errors_of_seeds_and_of_draws() -> None:
    shares = np.array([[0.5, 0.7], [0.6, 0.8], [0.7, 0.9]])
    row = Row("a", shares)
    errors = np.var([0.6, 0.7, 0.8], ddof=1) / 3 + np.var([0.6, 0.8], ddof=1) / 2
    assert row.mean() == pytest.approx(0.7)
    assert row.half_width() == pytest.approx(1.96 * errors**0.5)
    assert Row("b", shares[:1]).half_width() == pytest.approx(1.96 * (np.var([0.5, 0.7], ddof=1) / 2) ** 0.5)
    assert row.line() == "| a | 70% ± 23% | 50% to 90% | 3 x 2 |"


def test_most_scenes_that_saes_are_trained_on_have_a_large_object() -> None:
    scenes = sae_table.training_scenes(400)
    small = sum(s.things[0].size == "small" for s in scenes)
    assert 40 < small < 80
    assert {s.things[0].size for s in scenes} == set(world.SIZES)
