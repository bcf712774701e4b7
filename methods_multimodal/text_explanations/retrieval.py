"""Images that are alike in what one head means: in colour, say, whatever their shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from methods_multimodal.core.record import Record
from methods_multimodal.text_explanations.ablation import Component, outputs
from methods_multimodal.text_explanations.decomposition import Decomposition
from mm_adapters import InputError


@dataclass(frozen=True)
class Retrieved(Record):
    """The images nearest to each query, best first, by what some components write."""

    images: Int[Tensor, "query rank"]
    similarity: Float[Tensor, "query rank"]
    components: tuple[str, ...]


def retrieve(
    decomposed: Decomposition,
    components: Component | Sequence[Component],
    *,
    images: Float[Tensor, "query width"] | Decomposition | None = None,
    texts: Float[Tensor, "query width"] | None = None,
    n: int = 10,
) -> Retrieved:
    """The images in which some components, together, write what is most like the query.

    `images` are queries, decomposed too: by the cosine of what the components write, less its mean over
    `decomposed`. `texts` are unit vectors: by how far it lies along the text, less the texts' mean. Heads
    that share a meaning often each hold a part of its values: `rank_components` finds them all.

    Source: Gandelsman et al. 2024, arXiv 2310.05916, section 5 (image retrieval by a head); several
    components as in Balasubramanian et al. 2024, arXiv 2406.01583, section 5.
    Raises: InputError unless either images or texts are the query, or if no component is named.
    """
    if (images is None) == (texts is None):
        raise InputError("Ask with images (images=) or with texts (texts=), one of the two.")
    which = [components] if isinstance(components, Component) else list(components)
    if not which:
        raise InputError("Name a component to retrieve by.")

    def together(of: Decomposition) -> Tensor:
        return torch.stack([outputs(of, c) for c in which]).sum(0)

    written = together(decomposed)
    mean = written.mean(0)
    centred = written - mean
    if texts is not None:
        directions = texts - texts.mean(0) if len(texts) > 1 else texts
        similarity = directions.to(centred) @ centred.T
    else:
        assert images is not None
        queries = together(images) if isinstance(images, Decomposition) else images
        sides = [torch.nn.functional.normalize(x, dim=1) for x in (queries - mean, centred)]
        similarity = sides[0] @ sides[1].T
    best = similarity.topk(min(n, len(written)), dim=1)
    return Retrieved(best.indices.cpu(), best.values.cpu(), tuple(str(c) for c in which))
