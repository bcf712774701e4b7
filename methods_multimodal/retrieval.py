"""Images that are alike in what one head means: in colour, say, whatever their shape."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from methods_multimodal._record import Record
from methods_multimodal.ablation import Component, outputs
from methods_multimodal.decomposition import Decomposition
from mm_adapters import InputError


@dataclass(frozen=True)
class Retrieved(Record):
    """The images nearest to each query, best first, by one component's output."""

    images: Int[Tensor, "query rank"]
    similarity: Float[Tensor, "query rank"]
    component: str


def retrieve(
    found: Decomposition,
    component: Component,
    *,
    like: Float[Tensor, "query width"] | Decomposition | None = None,
    texts: Float[Tensor, "query width"] | None = None,
    n: int = 10,
) -> Retrieved:
    """The images whose output of one component is most like the query's.

    `like` are images, decomposed too: by the cosine of the component's outputs, less their mean over
    `found`. `texts` are unit vectors: by how far the output lies along the text, less their mean.

    Source: Gandelsman et al. 2024, arXiv 2310.05916, section 5 (image retrieval by a head).
    Raises: InputError unless either images or texts are the query.
    """
    if (like is None) == (texts is None):
        raise InputError("Ask with images (like=) or with texts (texts=), one of the two.")
    own = outputs(found, component)
    mean = own.mean(0)
    centred = own - mean
    if texts is not None:
        directions = texts - texts.mean(0) if len(texts) > 1 else texts
        similarity = directions.to(centred) @ centred.T
    else:
        assert like is not None
        asked = outputs(like, component) if isinstance(like, Decomposition) else like
        sides = [torch.nn.functional.normalize(x, dim=1) for x in (asked - mean, centred)]
        similarity = sides[0] @ sides[1].T
    best = similarity.topk(min(n, len(own)), dim=1)
    return Retrieved(best.indices.cpu(), best.values.cpu(), str(component))
