"""Which training examples made a model do what it does.

    task = diffusion_task(model, timesteps=10, measure=["loss", "output_norm"])
    store = featurise(task, diffusion_examples(model, images, captions), "gradients")
    queries = query_features(task, diffusion_examples(model, pictures, prompts))
    best = top_k(Trak("output_norm"), store, queries, 10)       # D-TRAK

Scores are [query, train]; positive is helpful.
"""

from methods_multimodal.data_attribution.contrastive import contrastive_task
from methods_multimodal.data_attribution.diffusion import diffusion_task
from methods_multimodal.data_attribution.encoding import diffusion_examples
from methods_multimodal.data_attribution.features import Features, featurise, query_features
from methods_multimodal.data_attribution.gradients import per_example_gradients
from methods_multimodal.data_attribution.kronecker import kronecker_scores
from methods_multimodal.data_attribution.projection import Projection
from methods_multimodal.data_attribution.scorers import (
    Cosine,
    DataInf,
    DiffusionReTrac,
    Dot,
    Scorer,
    TracIn,
    scores,
    top_k,
)
from methods_multimodal.data_attribution.task import Task, module_task
from methods_multimodal.data_attribution.trak import Trak

__all__ = [
    "Cosine",
    "DataInf",
    "DiffusionReTrac",
    "Dot",
    "Features",
    "Projection",
    "Scorer",
    "Task",
    "TracIn",
    "Trak",
    "contrastive_task",
    "diffusion_examples",
    "diffusion_task",
    "featurise",
    "kronecker_scores",
    "module_task",
    "per_example_gradients",
    "query_features",
    "scores",
    "top_k",
]
