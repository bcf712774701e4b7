"""SAELens on multimodal sites: collect, train, load, splice, evaluate, look and steer."""

from integrations.sae_lens._fast import FastBatchTopK
from integrations.sae_lens._transcoder import BatchTopKTranscoder, BatchTopKTranscoderConfig
from integrations.sae_lens.collect import collect
from integrations.sae_lens.concepts import ConceptMatch, match_concepts
from integrations.sae_lens.splice import add_verbs, splice
from integrations.sae_lens.train import train

add_verbs()

__all__ = [
    "BatchTopKTranscoder",
    "BatchTopKTranscoderConfig",
    "ConceptMatch",
    "FastBatchTopK",
    "collect",
    "match_concepts",
    "splice",
    "train",
]
