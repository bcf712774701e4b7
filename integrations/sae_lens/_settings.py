"""The user's configs for SAELens' trainer, checked before any work."""

from __future__ import annotations

import dataclasses

import torch
from sae_lens import TopKTrainingSAEConfig, TrainingSAEConfig
from sae_lens.config import SAETrainerConfig

from integrations.sae_lens._fields import check_fields
from integrations.sae_lens._transcoder import BatchTopKTranscoderConfig
from mm_adapters import InputError

_NO_AUXILIARY = ("layer_norm", "constant_norm_rescale")


def trainer_config(config: SAETrainerConfig | None) -> SAETrainerConfig:
    """The user's config, or the default one. Raises: InputError for what SAELens' trainer does not take."""
    if config is None:
        return SAETrainerConfig(
            total_training_samples=2000 * 1024,
            train_batch_size_samples=1024,
            lr=1e-3,
            lr_end=1e-4,
            lr_warm_up_steps=50,
            lr_decay_steps=400,
            dead_feature_window=200,
            n_batches_for_norm_estimate=50,
        )
    if config.lr_end is None:
        raise InputError(
            "SAETrainerConfig.lr_end is None, which SAELens' trainer does not take. Set it: lr / 10 is what "
            "its runner sets; for a constant rate it is not used."
        )
    return dataclasses.replace(config)


def check(name: str, cfg: TrainingSAEConfig, trainer: SAETrainerConfig) -> None:
    """Raises: InputError for a config that cannot train at the site `name`, or on this device."""
    if not isinstance(cfg, TrainingSAEConfig):
        raise InputError(
            f"{type(cfg).__name__} is no training config. Pass one of SAELens' *TrainingSAEConfig."
        )
    check_fields(type(cfg), vars(cfg))
    check_fields(type(trainer), vars(trainer))
    if "->" in name and not isinstance(cfg, BatchTopKTranscoderConfig):
        raise InputError(f"{name} is a transcoder's: its config is a BatchTopKTranscoderConfig.")
    if "->" not in name and isinstance(cfg, BatchTopKTranscoderConfig):
        raise InputError(f"A transcoder is trained between two sites: 'IN -> OUT', not {name!r}.")
    if hasattr(cfg, "aux_loss_coefficient") and cfg.normalize_activations in _NO_AUXILIARY:
        raise InputError(
            f"normalize_activations={cfg.normalize_activations!r} and {cfg.architecture()} do not go "
            "together: SAELens' loss for dead latents stops with an error at the first one. Use "
            "'expected_average_only_in' or 'none'."
        )
    on_cpu = torch.device(trainer.device).type == "cpu"
    # Not its subclasses, which go backwards another way.
    if type(cfg) is TopKTrainingSAEConfig and on_cpu and _sparse_and_rescaled(cfg):
        raise InputError(
            "use_sparse_activations=True and rescale_acts_by_decoder_norm=True: SAELens' topk cannot go "
            "backwards through both on a CPU. Set one of them False."
        )
    if trainer.total_training_samples < trainer.train_batch_size_samples:
        raise InputError("total_training_samples is less than one batch.")


def _sparse_and_rescaled(cfg: TopKTrainingSAEConfig) -> bool:
    return cfg.use_sparse_activations and cfg.rescale_acts_by_decoder_norm
