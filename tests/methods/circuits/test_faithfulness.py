"""Faithfulness of circuits: MIB's areas by hand, ends that are exact, random circuits of the same profile."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mm_adapters as mm
from methods_multimodal.circuits import (
    CircuitCheck,
    FaithfulnessCurve,
    Pairs,
    baseline_orders,
    check_circuit,
    circuit_nodes,
    faithfulness_curve,
    score_nodes,
)
from methods_multimodal.circuits.checks import random_circuits
from mm_adapters import InputError
from tests.quality.circuit_tasks import llava_pairs


@pytest.fixture(scope="module")
def llava() -> Any:
    return mm.load("tiny-llava")


@pytest.fixture(scope="module")
def pairs(llava: Any) -> list[Pairs]:
    return llava_pairs(llava, "colour", 6, batch=3)


def curve(values: list[float], n: int) -> FaithfulnessCurve:
    """A curve whose f at each size is as given."""
    f = torch.tensor(values)
    metric = torch.stack([4 * f - 3 + 0.5, 4 * f - 3 - 0.5], 1)  # Clean 1, empty -3 on average.
    clean, empty = torch.tensor([2.0, 0.0]), torch.tensor([-4.0, -2.0])
    return FaithfulnessCurve(metric, clean, empty, tuple(range(n + 1)), tuple(map(str, range(n))))


def test_areas_are_mibs_trapezoids_of_a_ratio_of_means() -> None:
    f = [0.0, 0.25, 0.5, 0.5, 1.0, 1.25, 1.0, 1.0, 1.0, 1.0, 1.0]
    found = curve(f, 10)
    torch.testing.assert_close(found.faithfulness, torch.tensor(f))
    # With ten parts MIB's ten shares keep 0, 0, 0, 0, 0, 0, 1, 2, 5 and 10 of them.
    x = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0]
    y = [0, 0, 0, 0, 0, 0, 0.25, 0.5, 1.25, 1.0]
    area = sum((b - a) * (p + q) / 2 for a, b, p, q in zip(x, x[1:], y, y[1:], strict=False))
    distance = sum(
        (b - a) * (abs(1 - p) + abs(1 - q)) / 2 for a, b, p, q in zip(x, x[1:], y, y[1:], strict=False)
    )
    assert found.cpr() == pytest.approx(area)
    assert found.cmd() == pytest.approx(distance)
    assert found.size_at(0.9) == 4
    logs = np.log(np.arange(1, 11)) / np.log(10)
    assert found.log_area() == pytest.approx(np.trapezoid(f[1:], logs))
    assert curve([1.0] * 11, 10).cpr() == pytest.approx(0.999)


def test_a_curve_ends_at_the_corrupted_and_the_clean_run(llava: Any, pairs: list[Pairs]) -> None:
    order = score_nodes(llava, pairs[:1]).order()
    found = faithfulness_curve(llava, pairs, order, sizes=[8])
    assert torch.equal(found.metric[0], found.empty)
    assert torch.equal(found.metric[-1], found.clean)
    assert found.sizes == (0, 2, 4, 8, 21, 43)
    low, high = found.interval("cpr")
    assert low < found.cpr() < high
    low, high = found.interval("faithfulness")
    assert (low <= found.faithfulness.numpy() + 1e-6).all()
    assert (found.faithfulness.numpy() <= high + 1e-6).all()
    worst = faithfulness_curve(llava, pairs, order[::-1], sizes=[8])
    assert worst.cpr() < found.cpr()


def test_a_circuit_is_checked_beside_random_ones_of_its_profile(llava: Any, pairs: list[Pairs]) -> None:
    graph = circuit_nodes(llava)
    order = score_nodes(llava, pairs[:1], method="exact").order()
    chosen = order[:18]
    found = check_circuit(llava, pairs[1:], chosen, n_random=5)
    assert found.faithfulness > 0.8 > found.completeness
    assert found.z > 0
    by_name = {node.name: node for node in graph}

    def profile(names: tuple[str, ...]) -> Counter[Any]:
        return Counter((by_name[n].tower, by_name[n].layer) for n in names)

    assert len(set(found.random_nodes)) == 5
    assert all(profile(names) == profile(chosen) for names in found.random_nodes)
    slow = faithfulness_curve(llava, pairs[1:], order, sizes=[18])
    assert torch.equal(slow.metric[slow.sizes.index(18)], found.kept)


def test_random_circuits_are_drawn_evenly(llava: Any) -> None:
    graph = circuit_nodes(llava)
    layer = [node for node in graph if node.tower == "language" and node.layer == 2]
    drawn = random_circuits(graph, layer[:2], 2000, seed=1)
    counts = Counter(node.name for one in drawn for node in one)
    assert len(counts) == 5
    assert all(abs(n - 800) < 100 for n in counts.values())  # Two of five, 2,000 times: 800 +- 22.


def test_baselines_hold_every_node_once(llava: Any) -> None:
    graph = circuit_nodes(llava)
    for order in baseline_orders(graph).values():
        assert sorted(order) == sorted(node.name for node in graph)
    assert baseline_orders(graph)["last layers"][3:5] == ("m3", "a3.h3")
    assert baseline_orders(graph)["attention"][-1] == "m3"


def test_records_are_saved(llava: Any, pairs: list[Pairs], tmp_path: Path) -> None:
    order = tuple(node.name for node in circuit_nodes(llava))
    found = faithfulness_curve(llava, pairs[:1], order, sizes=[])
    back = FaithfulnessCurve.load(found.save(tmp_path / "curve.safetensors"))
    assert torch.equal(back.metric, found.metric)
    assert (back.sizes, back.order) == (found.sizes, found.order)
    check = check_circuit(llava, pairs[:1], order[:2], n_random=1)
    loaded = CircuitCheck.load(check.save(tmp_path / "check.safetensors"))
    assert torch.equal(loaded.random, check.random)
    assert loaded.random_nodes == check.random_nodes


def test_wrong_orders_and_circuits_are_refused(llava: Any, pairs: list[Pairs]) -> None:
    names = [node.name for node in circuit_nodes(llava)]
    with pytest.raises(InputError, match="each of the 43 nodes once; this one holds 42"):
        faithfulness_curve(llava, pairs, names[1:])
    with pytest.raises(InputError, match="of 44 parts: the graph has 43"):
        faithfulness_curve(llava, pairs, names, sizes=[44])
    with pytest.raises(InputError, match="at least one node"):
        check_circuit(llava, pairs, [])
    with pytest.raises(InputError, match="no interval of 'z'"):
        curve([0.0, 1.0], 1).interval("z")
