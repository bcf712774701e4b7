"""Scorers against what retraining found: `python -m tests.retraining.subsets` made the file once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from methods_multimodal.data_attribution.counterfactual import LeftOut
from methods_multimodal.data_attribution.evaluation import source_recall, spearman
from methods_multimodal.data_attribution.scorers import scores
from methods_multimodal.data_attribution.trak import Trak
from tests.retraining import subsets
from tests.retraining.model import losses, train
from tests.retraining.scores import BEGIN, END, README, Subject, compare, named, table
from tests.retraining.truth import FOLDER, Truth


@pytest.fixture(scope="module")
def truth() -> Truth:
    return Truth.read()


@pytest.fixture(scope="module")
def subject(truth: Truth, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject(truth, tmp_path_factory.mktemp("subject"))


@pytest.fixture(scope="module")
def compared(subject: Subject) -> dict:
    return compare(subject)


@pytest.fixture(scope="module")
def planted(truth: Truth, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject(truth, tmp_path_factory.mktemp("planted"), planted=True)


def left_out(truth: Truth) -> LeftOut:
    rows = list(subsets.LEFT_OUT_QUERIES)
    removed = {name: value.long() for name, value in truth.removed.items() if name != "random"}
    return LeftOut(truth.full.T[rows], truth.without, removed)


def test_the_shipped_files_are_small_and_belong_to_this_script(truth: Truth) -> None:
    assert (FOLDER / "truth.safetensors").stat().st_size < 1.5e6
    assert (FOLDER / "model.safetensors").stat().st_size < 1e6
    assert torch.equal(truth.subsets, subsets.subsets())
    assert truth.subsets.sum(1).unique().tolist() == [128]


def test_the_shipped_losses_are_those_of_the_shipped_model(truth: Truth) -> None:
    found = losses(truth.model(), truth.queries())
    torch.testing.assert_close(found, truth.full[0], rtol=1e-3, atol=1e-5)
    found = losses(truth.model(planted=True), truth.queries(planted=True))
    torch.testing.assert_close(found, truth.planted[0], rtol=1e-3, atol=1e-5)


def test_a_run_made_again_is_the_run_that_was_shipped(truth: Truth, tmp_path: Path) -> None:
    """One subset, in a process of its own without the checks that slow training down."""
    program = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from pathlib import Path\n"
        "from safetensors.torch import save_file\n"
        "from tests.retraining import subsets\n"
        "from tests.retraining.truth import Truth\n"
        "work = Path(sys.argv[1])\n"
        "save_file({'images': Truth.read().drawn}, work / 'drawn-full-0.safetensors')\n"
        "job = next(j for j in subsets.jobs() if j.name == 'half-3')\n"
        "subsets.run([job], work)\n"
        "subsets.run([job], work)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=root, env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    from safetensors.torch import load_file

    again = load_file(tmp_path / "half-3.safetensors")["queries"]
    # Another processor rounds otherwise, and 1000 steps carry that on; another subset differs tenfold.
    apart = (again - truth.losses[3]).abs().mean()
    others = (truth.losses - truth.losses[3]).abs().mean(1)
    assert apart < 0.5 * others[others > 0].min()


def test_subsets_change_the_losses_more_than_the_seed_does(truth: Truth) -> None:
    first, again = (x.double() / truth.full.mean(0) for x in (truth.losses[: len(truth.again)], truth.again))
    apart = (first - first.mean(0)) - (again - again.mean(0))
    by_seed = apart.var(0) / 2
    held_out = slice(0, first.shape[1] // 2)
    assert first.var(0)[held_out].mean() > 1.5 * by_seed[held_out].mean()
    assert spearman(first, again)[held_out].mean() > 0.3


@pytest.mark.parametrize(
    "name", ["raw pixels", "CLIP features", "gradient cosine", "TRAK", "D-TRAK", "EKFAC"]
)
def test_intervals_on_held_out_pictures_are_above_zero(compared: dict, name: str) -> None:
    assert compared[name][0].low > 0


@pytest.mark.xfail(strict=True, reason="-0.00 (-0.09 to 0.09): the small model's drawings are rough")
def test_the_interval_of_dtrak_on_drawn_pictures_is_above_zero(compared: dict) -> None:
    assert compared["D-TRAK"][1].low > 0


@pytest.mark.parametrize("name", ["TRAK", "EKFAC"])
def test_intervals_on_drawn_pictures_are_above_zero(compared: dict, name: str) -> None:
    assert compared[name][1].low > 0


def test_dtrak_is_at_least_twice_as_good_as_pixels_and_no_worse_than_trak(compared: dict) -> None:
    dtrak = compared["D-TRAK"][0].mean
    assert dtrak >= 2 * compared["raw pixels"][0].mean
    assert dtrak >= compared["TRAK"][0].mean


@pytest.mark.xfail(
    strict=True,
    reason="1.76 times: 0.61 and 0.35. tiny-clip was trained on this world. With 50 timesteps and 2048 "
    "features, 0.61 (on 56 subsets, where tiny-clip has 0.33)",
)
def test_dtrak_is_at_least_twice_as_good_as_clip(compared: dict) -> None:
    assert compared["D-TRAK"][0].mean >= 2 * compared["CLIP features"][0].mean


def test_planted_pictures_taught_the_model_their_background(truth: Truth) -> None:
    """Retrained without them, the model is worse at every picture with that background."""
    with_sources, without = truth.planted
    assert (without[:16] > 1.2 * with_sources[:16]).all()


def test_planted_sources_are_recalled_by_dtrak(planted: Subject) -> None:
    sources = subsets.planted_sources().repeat(2, 1)
    found = scores(Trak(measure="output_norm", damping=10.0), planted.store, planted.features)
    recall = source_recall(found, sources)
    assert recall[:16].mean() >= 0.8
    assert recall[16:].mean() >= 0.8


def test_planted_sources_are_recalled_by_ekfac(planted: Subject) -> None:
    """Influence on the denoiser's output, as in D-TRAK; of its loss, less than half are found."""
    recall = source_recall(planted.ekfac("output_norm"), subsets.planted_sources().repeat(2, 1))
    assert recall[:16].mean() >= 0.8


def test_planted_sources_are_recalled_by_unlearning(planted: Subject) -> None:
    made = planted.unlearning("cross_attention_kv")(1.0)
    recall = source_recall(made, subsets.planted_sources().repeat(2, 1))
    assert recall[:16].mean() >= 0.8
    assert recall[16:].mean() >= 0.8


def test_what_was_left_out_is_what_the_scorers_name(truth: Truth) -> None:
    again = named(truth)
    for method, rows in truth.removed.items():
        for one, other in zip(rows.tolist(), again[method].tolist(), strict=True):
            assert len(set(one) & set(other)) >= 0.9 * len(one), method


@pytest.mark.parametrize("other", ["CLIP", "random"])
def test_without_what_dtrak_names_the_loss_rises_more(truth: Truth, other: str) -> None:
    found = left_out(truth)
    assert found.rise("D-TRAK").low > 0
    assert found.rise("D-TRAK", than=other).low > 0


def test_the_table_in_the_readme_is_what_is_found(compared: dict) -> None:
    shown = README.read_text().split(BEGIN)[1].split(END)[0].strip().splitlines()
    assert len(shown) == len(compared) + 2

    def numbers(line: str) -> list[float]:
        import re

        return [float(x) for x in re.findall(r"-?\d\.\d\d", line)]

    for old, new in zip(shown[2:], table(compared).splitlines()[2:], strict=True):
        assert old.split("|")[1] == new.split("|")[1]
        # Two hundredths: sums are made in another order elsewhere.
        assert numbers(old) == pytest.approx(numbers(new), abs=0.021), (
            "python -m tests.retraining.scores --readme"
        )


def test_training_is_a_function_of_its_seed(truth: Truth, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.retraining.model.STEPS", 3)
    known = truth.training()
    one, same, other = (train(known, range(40), seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)
