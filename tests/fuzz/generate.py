"""The generator: a seed and a number give a call, always the same."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from tests.fuzz import (
    bad_indices,
    edits,
    entries,
    generation,
    gradients,
    misuse,
    options,
    pictures_and_texts,
    reads,
    together,
)
from tests.fuzz.call import Call
from tests.fuzz.models import ENGINES, subject
from tests.fuzz.subjects import Subject

KINDS = tuple(
    kind
    for module in (
        reads,
        edits,
        bad_indices,
        gradients,
        misuse,
        options,
        pictures_and_texts,
        entries,
        generation,
        together,
    )
    for kind in module.KINDS
)
SHARES = {
    "tiny-clip": 4, "tiny-llava": 4, "tiny-sd": 3, "flux": 1.5, "sd3": 1.5, "heun": 0.7, "qwen2-vl": 1,
    "blip-2": 1, "dinov2": 1, "siglip": 1,
}  # fmt: skip


def generate(seed: int, index: int) -> Call:
    """The call of this number."""
    rng = Random(f"{seed}/{index}")
    (name,) = rng.choices(list(SHARES), list(SHARES.values()))
    chosen: Subject = subject(name, rng.choice(ENGINES))
    fitting = [kind for kind in KINDS if kind.fits(chosen)]
    (kind,) = rng.choices(fitting, [k.weight for k in fitting])
    return replace(kind.make(rng, chosen), index=index)
