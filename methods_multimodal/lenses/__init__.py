"""What the stream says at each layer, read with the model's own unembedding."""

from methods_multimodal.lenses.direct_attribution import LogitAttribution, attribute_logits, attribute_tokens
from methods_multimodal.lenses.logit_lens import LogitLens, logit_lens

__all__ = [
    "LogitAttribution",
    "LogitLens",
    "attribute_logits",
    "attribute_tokens",
    "logit_lens",
]
