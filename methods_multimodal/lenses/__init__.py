"""What the stream says at each layer, read with the model's own unembedding, or with what is made for it."""

from methods_multimodal.lenses.anomaly import AnomalyScores, anomaly_scores, trajectory
from methods_multimodal.lenses.attention_lens import AttentionLens, attention_lens, train_attention_lens
from methods_multimodal.lenses.clip_lens import clip_lens
from methods_multimodal.lenses.contextual_lens import box_iou, contextual_lens, grounding_box
from methods_multimodal.lenses.diffusion_lens import LayerPictures, diffusion_lens
from methods_multimodal.lenses.direct_attribution import LogitAttribution, attribute_logits, attribute_tokens
from methods_multimodal.lenses.early_exit import EarlyExit, best_constant, early_exit
from methods_multimodal.lenses.first_token import Separation, first_token_logits, separate, separation
from methods_multimodal.lenses.latent_lens import ContextualIndex, contextual_index, latent_lens
from methods_multimodal.lenses.logit_lens import logit_lens
from methods_multimodal.lenses.reading import LensReading, joined
from methods_multimodal.lenses.tuned_lens import TunedLens, train_tuned_lens, tuned_lens

__all__ = [
    "AnomalyScores",
    "AttentionLens",
    "ContextualIndex",
    "EarlyExit",
    "LayerPictures",
    "LensReading",
    "LogitAttribution",
    "Separation",
    "TunedLens",
    "anomaly_scores",
    "attention_lens",
    "attribute_logits",
    "attribute_tokens",
    "best_constant",
    "box_iou",
    "clip_lens",
    "contextual_index",
    "contextual_lens",
    "diffusion_lens",
    "early_exit",
    "first_token_logits",
    "grounding_box",
    "joined",
    "latent_lens",
    "logit_lens",
    "separate",
    "separation",
    "train_attention_lens",
    "train_tuned_lens",
    "trajectory",
    "tuned_lens",
]
