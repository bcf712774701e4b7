"""Which training examples made a model do what it does.

    task = diffusion_task(model, timesteps=10, measure=["loss", "output_norm"])
    store = featurise(task, diffusion_examples(model, images, captions), "gradients")
    queries = query_features(task, diffusion_examples(model, pictures, prompts))
    best = top_k(Trak("output_norm"), store, queries, 10)       # D-TRAK

Scores are [query, train]; positive is helpful.
"""

from methods_multimodal.data_attribution.contrastive import contrastive_task
from methods_multimodal.data_attribution.counterfactual import LeftOut, leave_out, tail_patch, top
from methods_multimodal.data_attribution.diffusion import denoiser_task, diffusion_task
from methods_multimodal.data_attribution.encoding import diffusion_examples
from methods_multimodal.data_attribution.evaluation import (
    Chosen,
    Estimate,
    choose_damping,
    detection,
    duplicates,
    linear_datamodeling_score,
    source_recall,
)
from methods_multimodal.data_attribution.features import Features, featurise, query_features
from methods_multimodal.data_attribution.gradients import per_example_gradients
from methods_multimodal.data_attribution.journey import Journey, Trajectory, journey_trak, trajectory
from methods_multimodal.data_attribution.kronecker import kronecker_scores
from methods_multimodal.data_attribution.metagradient import (
    AdamW,
    Training,
    metagradients,
    weighted_mean,
)
from methods_multimodal.data_attribution.projection import Projection
from methods_multimodal.data_attribution.retrieval import (
    LinearMap,
    Nearest,
    fit_linear_map,
    image_features,
    nearest,
    pixel_features,
    similarity,
)
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
from methods_multimodal.data_attribution.unlearning import fisher_diagonal, unlearning_scores

__all__ = [
    "AdamW",
    "Chosen",
    "Cosine",
    "DataInf",
    "DiffusionReTrac",
    "Dot",
    "Estimate",
    "Features",
    "Journey",
    "LeftOut",
    "LinearMap",
    "Nearest",
    "Projection",
    "Scorer",
    "Task",
    "TracIn",
    "Training",
    "Trajectory",
    "Trak",
    "choose_damping",
    "contrastive_task",
    "denoiser_task",
    "detection",
    "diffusion_examples",
    "diffusion_task",
    "duplicates",
    "featurise",
    "fisher_diagonal",
    "fit_linear_map",
    "image_features",
    "journey_trak",
    "kronecker_scores",
    "leave_out",
    "linear_datamodeling_score",
    "metagradients",
    "module_task",
    "nearest",
    "per_example_gradients",
    "pixel_features",
    "query_features",
    "scores",
    "similarity",
    "source_recall",
    "tail_patch",
    "top",
    "top_k",
    "trajectory",
    "unlearning_scores",
    "weighted_mean",
]
