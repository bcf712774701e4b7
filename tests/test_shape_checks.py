"""The shapes that modules declare are checked in the tests."""

from __future__ import annotations

import re

import jaxtyping
import pytest
import torch
from conftest import ROOT, with_shapes

from methods_multimodal.data_attribution.retrieval import pixel_features


def test_a_wrong_shape_is_refused() -> None:
    assert pixel_features(torch.zeros(2, 3, 4, 4)).shape == (2, 48)
    with pytest.raises(jaxtyping.TypeCheckError, match="images"):
        pixel_features(torch.zeros(3, 4, 4))


def test_every_module_that_declares_a_shape_is_checked() -> None:
    named = with_shapes()
    assert len(named) > 60
    declare = re.compile(r"^(from|import) jaxtyping\b", re.MULTILINE)
    for package in ("mm_adapters", "methods_multimodal"):
        for path in (ROOT / package).rglob("*.py"):
            if declare.search(path.read_text()):
                assert ".".join(path.relative_to(ROOT).with_suffix("").parts) in named
