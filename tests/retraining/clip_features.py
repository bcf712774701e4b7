"""What tiny-clip makes of the study's pictures, as it was when what it names was left out and trained again.

    python -m tests.retraining.clip_features [MODEL]

writes `clip.safetensors` anew, with the tiny-clip of today or with MODEL. Then `tests.retraining.subsets` has
to make the runs without what it names again: the shipped ones are of the features that lie here.
"""

from __future__ import annotations

import sys

from safetensors.torch import load_file, save_file
from torch import Tensor

import mm_adapters as mm
from methods_multimodal.data_attribution.retrieval import enlarged, image_features, similarity
from tests.retraining.pictures import Pictures, faded_pictures, faded_queries
from tests.retraining.truth import FOLDER, Truth

FILE = FOLDER / "clip.safetensors"


def cosines(study: str) -> Tensor:
    """Of a study's queries with its training pictures, [query, picture]; `study` is "truth" or "faded"."""
    found = load_file(FILE)
    return similarity(*(found[f"{study}.{part}"].float() for part in ("queries", "training")))


def studies() -> dict[str, tuple[Pictures, Pictures]]:
    """Queries and training pictures, by the study's name."""
    truth = Truth.read()
    return {
        "truth": (truth.queries(), truth.training()),
        "faded": (faded_queries(), faded_pictures()),
    }


def main(model: str = "tiny-clip") -> None:
    judge, made = mm.load(model), {}
    for study, (queries, training) in studies().items():
        for part, pictures in (("queries", queries), ("training", training)):
            features = image_features(judge, enlarged((pictures.images + 1) / 2, 64))
            made[f"{study}.{part}"] = features.half().contiguous()
    save_file(made, FILE)


if __name__ == "__main__":
    main(*sys.argv[1:])
