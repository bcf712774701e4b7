"""Leaving out what scorers name where captions say little: `tests.retraining.subsets` made the file once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.retraining.faded import Faded, named
from tests.retraining.model import losses, model_of
from tests.retraining.pictures import N_FADED, Pictures, faded_pictures, faded_queries, training_pictures
from tests.retraining.subsets import SEEDS
from tests.retraining.truth import FOLDER


@pytest.fixture(scope="module")
def faded() -> Faded:
    return Faded.read()


def told(pictures: Pictures) -> float:
    """The share of the pixels' variance that follows linearly from which words a caption has."""
    words = sorted({word for said in pictures.said for word in said})
    has = torch.tensor([[float(word in said) for word in words] for said in pictures.said])
    pixels = pictures.images.flatten(1)
    pixels = pixels - pixels.mean(0)
    left = pixels - has @ torch.linalg.lstsq(has, pixels, driver="gelsd").solution
    return 1 - float(left.square().sum() / pixels.square().sum())


def test_captions_tell_less_of_these_pictures() -> None:
    assert told(training_pictures()) > 0.8
    assert told(faded_pictures()) < 0.5


def test_the_shipped_file_is_small_and_its_losses_are_those_of_its_model(faded: Faded) -> None:
    assert (FOLDER / "faded.safetensors").stat().st_size < 1.5e6
    assert faded.left_out.full.shape == (N_FADED, len(SEEDS))
    found = losses(model_of(faded.weights), faded_queries())
    torch.testing.assert_close(found, faded.left_out.full[:, 0], rtol=1e-3, atol=1e-5)


def test_what_was_left_out_is_what_the_scorers_name(faded: Faded) -> None:
    again, shipped = named(faded.weights), faded.left_out.removed
    assert set(shipped) == set(again) == {"D-TRAK", "CLIP", "random"}
    for method, rows in shipped.items():
        for one, other in zip(rows.tolist(), again[method].tolist(), strict=True):
            assert len(set(one) & set(other)) >= 0.9 * len(one), method


def test_a_run_made_again_is_the_run_that_was_shipped(faded: Faded) -> None:
    """One query's, in a process of its own without the checks that slow training down."""
    query = 2  # One whose loss seeds agree on: another processor rounds otherwise, as another seed at worst.
    program = (
        "import torch; torch.set_num_threads(1)\n"
        "from tests.retraining.faded import Faded\n"
        "from tests.retraining.model import losses, train\n"
        "from tests.retraining.pictures import N_TRAIN, faded_pictures, faded_queries\n"
        "shipped = Faded.read()\n"
        f"gone = set(shipped.left_out.removed['D-TRAK'][{query}].tolist())\n"
        "model = train(faded_pictures(), sorted(set(range(N_TRAIN)) - gone))\n"
        f"print(float(losses(model, faded_queries())[{query}]))\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shipped, full = faded.left_out.without["D-TRAK"][query, 0], faded.left_out.full[query, 0]
    assert abs(float(done.stdout) - float(shipped)) < 0.25 * float(shipped - full)


@pytest.mark.parametrize("than", ["CLIP", "random"])
def test_without_what_dtrak_names_the_loss_rises_more(faded: Faded, than: str) -> None:
    assert faded.left_out.rise("D-TRAK").low > 0
    assert faded.left_out.rise("D-TRAK", than=than).low > 0
