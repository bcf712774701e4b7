"""SAELens on multimodal sites: collect, train, load, splice, evaluate, look and steer."""

from integrations.sae_lens._fast import FastBatchTopK
from integrations.sae_lens._transcoder import BatchTopKTranscoder, BatchTopKTranscoderConfig
from integrations.sae_lens._verbs import add_verbs
from integrations.sae_lens.cached import export_cached, import_cached
from integrations.sae_lens.collect import collect
from integrations.sae_lens.concepts import ConceptMatch, match_concepts
from integrations.sae_lens.evaluate import (
    SAEReport,
    answer_likelihood,
    evaluate,
    monosemanticity,
    noise_recovered,
    recovered,
    retrieval,
    zero_shot,
)
from integrations.sae_lens.load import CONVERTERS, load
from integrations.sae_lens.look import gallery, steer, top_images
from integrations.sae_lens.splice import splice
from integrations.sae_lens.train import train

add_verbs()

__all__ = [
    "CONVERTERS",
    "BatchTopKTranscoder",
    "BatchTopKTranscoderConfig",
    "ConceptMatch",
    "FastBatchTopK",
    "SAEReport",
    "answer_likelihood",
    "collect",
    "evaluate",
    "export_cached",
    "gallery",
    "import_cached",
    "load",
    "match_concepts",
    "monosemanticity",
    "noise_recovered",
    "recovered",
    "retrieval",
    "splice",
    "steer",
    "top_images",
    "train",
    "zero_shot",
]
