"""Online codes against a sum written out label by label, and what they do to planted and shuffled labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

import mm_adapters as mm
from methods_multimodal.probing import CodeLength, code_length, split_rows

RNG = np.random.default_rng(5)
IDS = RNG.integers(3, size=300)
CLEAR = torch.from_numpy(RNG.standard_normal((300, 5)) + 4 * np.eye(5)[IDS])
NOISE = torch.from_numpy(RNG.standard_normal((300, 5)))


def test_a_code_is_the_sum_over_labels_of_what_a_probe_of_the_labels_before_expects() -> None:
    coded = code_length(CLEAR, IDS, ends=(0.1, 0.5, 1.0), n_orders=1, strengths=[0.1])
    split = split_rows(300, 0, shares=(0.7, 0.2, 0.1))
    order = torch.cat([split.train, split.test]).numpy()
    order = order[np.random.default_rng([0, 3]).permutation(240)]
    assert coded.ends.tolist() == [24, 120, 240]
    assert float(coded.task[0, 0]) == pytest.approx(24 * np.log2(3))
    for block, (a, b) in enumerate(((24, 120), (120, 240)), start=1):
        x = CLEAR.numpy()
        mean, scale = x[order[:a]].mean(0), x[order[:a]].std(0)
        plain = LogisticRegression(C=0.1, tol=1e-3).fit((x[order[:a]] - mean) / scale, IDS[order[:a]])
        bits = 0.0
        for row in order[a:b]:
            p = plain.predict_proba(((x[row] - mean) / scale)[None])[0, IDS[row]]
            bits -= np.log2((a * p + 1 / 3) / (a + 1))
        assert float(coded.task[0, block]) == pytest.approx(bits, rel=1e-5)
    assert coded.bits_per_label[0, 2] == pytest.approx(float(coded.task[0, 2]) / 120)


def test_what_can_be_read_is_compressed_and_shuffled_labels_are_not() -> None:
    clear, noise = (code_length(rows, IDS, n_orders=3) for rows in (CLEAR, NOISE))
    assert clear.compression.low > 3
    for nothing in (clear.shuffled_compression, noise.compression):
        assert nothing.mean == pytest.approx(1.0, abs=0.1)
    assert clear.uniform == pytest.approx(np.log2(3))


def test_a_class_that_has_not_come_up_yet_has_a_code(tmp_path) -> None:
    ids = np.where(np.arange(300) < 292, IDS, 3)
    coded = code_length(CLEAR, ids, n_orders=2)
    assert bool(torch.isfinite(coded.task).all())
    back = CodeLength.load(coded.save(tmp_path / "code.safetensors"))
    assert torch.equal(back.task, coded.task)


def test_blocks_that_are_none_are_refused() -> None:
    for ends in ((), (0.5,), (0.5, 0.1, 1.0), (0.0, 1.0)):
        with pytest.raises(mm.InputError, match="rise from above 0 to 1"):
            code_length(CLEAR, IDS, ends=ends)
    with pytest.raises(mm.InputError, match="2 labels for 300 rows"):
        code_length(CLEAR, [0, 1])
