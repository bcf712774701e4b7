"""Tasks of contrastive models: how well a picture and its caption fit, each pair by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from methods_multimodal.data_attribution._parameters import select
from methods_multimodal.data_attribution.task import Batch, Call, Task
from mm_adapters import InputError, Model
from mm_adapters.store import of_tensors

_MEASURES = ("loss", "similarity")


def contrastive_task(
    model: Model,
    reference: Batch,
    *,
    measure: str | Sequence[str] = "loss",
    parameters: str | Sequence[str] = "all",
    scale: float = 100.0,
) -> Task:
    """A task of a model of images and texts, one row a pair.

    "loss" is the contrastive loss of one pair among `reference` pairs (the model's own tensors:
    "pixel_values", "input_ids", ...), whose embeddings are held as they are now: so the loss of a
    pair does not depend on its batch. `scale` is the inverse temperature, held too. "similarity"
    is the pair's cosine.

    Raises: MissingSiteError for a model without images or texts; InputError for an unknown measure, or an
    output without embeddings.
    """
    model.check_tower("vision")
    model.check_tower("text")
    module = model.wrapped
    names = [measure] if isinstance(measure, str) else list(measure)
    unknown = [n for n in names if n not in _MEASURES]
    if unknown or not names:
        raise InputError(f"There is no measure {unknown}; there is {', '.join(_MEASURES)}.")
    with torch.no_grad():
        images, texts = (e.detach() for e in _embeddings(module, reference))

    def values(call: Call, rows: Batch) -> dict[str, Tensor]:
        image, text = _embeddings(call, rows)
        pair = (image * text).sum(1, keepdim=True)
        among = [torch.cat([pair, side @ others.T], 1) for side, others in ((image, texts), (text, images))]
        loss = sum(-F.log_softmax(scale * scores, 1)[:, 0] for scores in among)
        assert isinstance(loss, Tensor)
        measured = {"loss": loss / 2, "similarity": pair[:, 0]}
        return {name: measured[name] for name in names}

    about = {"module": type(module).__name__, "measures": names, "scale": scale, "n_draws": 1}
    about["reference"] = of_tensors({"images": images, "texts": texts})
    return Task(module, select(module, parameters), tuple(names), 1, lambda b, _: b, values, about)


def _embeddings(call: Call, rows: Batch) -> tuple[Tensor, Tensor]:
    """The unit embeddings of each row's image and text."""
    out = call(**{name: value for name, value in rows.items() if name != "index"})
    if isinstance(out, Mapping) and "image_features" in out:  # open_clip's.
        images, texts = out.get("image_features"), out.get("text_features")
    elif isinstance(out, tuple) and not hasattr(out, "image_embeds"):  # Its other way.
        images, texts = out[:2]
    else:
        images, texts = getattr(out, "image_embeds", None), getattr(out, "text_embeds", None)
    if images is None or texts is None:
        raise InputError(f"{type(out).__name__} has no embeddings of images and texts to compare.")
    return F.normalize(images.float(), dim=-1), F.normalize(texts.float(), dim=-1)
