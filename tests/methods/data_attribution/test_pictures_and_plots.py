"""Training pictures are read as they lie; plots show the numbers they are given."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.container import BarContainer, ErrorbarContainer
from PIL import Image

from methods_multimodal.data_attribution import Estimate
from methods_multimodal.data_attribution.pictures import read_pictures
from methods_multimodal.plots.data_attribution import score_bars, sources
from mm_adapters import InputError
from mm_adapters.zoo.sd import N_TRAINING, training_example


def folder(at: Path, n: int = 3) -> Path:
    for i in range(n):
        Image.new("RGB", (12, 8), (10 * i, 0, 0)).save(at / f"{i}.png")
    return at


def test_the_zoos_pictures_are_those_tiny_sd_was_trained_on() -> None:
    found = read_pictures("zoo:5")
    pixels, caption = training_example(3)
    assert np.array_equal(np.asarray(found.image(3)), pixels)
    assert found.captions[3] == caption
    assert len(found.images(16)) == 5
    with pytest.raises(InputError, match=str(N_TRAINING)):
        read_pictures("zoo:99999")


def test_captions_come_from_a_table_or_from_files_beside(tmp_path: Path) -> None:
    folder(tmp_path)
    rows = [{"file_name": f"{i}.png", "text": f"picture {i}"} for i in range(2)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match=r"1 of 3 pictures have no caption \(2.png\)"):
        read_pictures(tmp_path)
    (tmp_path / "2.txt").write_text("picture 2\n")
    found = read_pictures(tmp_path)
    assert found.captions == ("picture 0", "picture 1", "picture 2")
    assert found.image(2, 6).size == (6, 6)
    assert found.image(2).getpixel((0, 0)) == (20, 0, 0)


def test_folders_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="zoo:256"):
        read_pictures(tmp_path / "none")
    with pytest.raises(InputError, match="holds no image"):
        read_pictures(tmp_path)
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    with pytest.raises(InputError, match="holds 1 images, and at least 2 are needed"):
        read_pictures(tmp_path)
    folder(tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png"}')
    with pytest.raises(InputError, match=r"metadata.jsonl, line 1"):
        read_pictures(tmp_path)
    (tmp_path / "metadata.jsonl").unlink()
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text("a")
    (tmp_path / "1.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"1.png is no picture"):
        read_pictures(tmp_path)


def test_the_first_pictures_are_the_highest_and_the_lowest_scores() -> None:
    scores = torch.tensor([0.1, -0.9, 0.5, 0.0, 1.8])
    figure = sources(np.zeros((4, 4, 3)), scores, lambda i: np.full((4, 4, 3), i), n=2, title="a query")
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == ["a query", "+1.00", "+0.28", "-0.50", "+0.00"]
    shown = [int(ax.images[0].get_array()[0, 0, 0]) for ax in figure.axes[1:]]
    assert shown == [4, 2, 1, 3]


def test_bars_are_means_and_whiskers_intervals() -> None:
    one, other = (Estimate(m, m - 0.1, m + 0.2, torch.tensor([m])) for m in (0.5, 0.2))
    ax = score_bars({"a": (one, other), "b": (other, one)}, groups=("new", "drawn"))
    bars = [c for c in ax.containers if isinstance(c, BarContainer)]
    assert [[float(bar.get_width()) for bar in c] for c in bars] == [[0.5, 0.2], [0.2, 0.5]]
    whiskers = next(c for c in ax.containers if isinstance(c, ErrorbarContainer))[2][0]
    assert whiskers.get_segments()[0][:, 0].tolist() == pytest.approx([0.4, 0.7])
