"""A transcoder that can be trained: SAELens has the finished ones only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import register_sae_training_class
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.batchtopk_sae import BatchTopK
from sae_lens.saes.sae import (
    SAEConfig,
    TrainCoefficientConfig,
    TrainingSAE,
    TrainingSAEConfig,
    TrainStepInput,
    TrainStepOutput,
)
from sae_lens.saes.transcoder import JumpReLUTranscoderConfig
from torch import Tensor, nn

from mm_adapters import InputError

ARCHITECTURE = "batchtopk_transcoder"


@dataclass
class BatchTopKTranscoderConfig(TrainingSAEConfig):
    """Predicts one site from another through `k` active latents a row, on average over the batch.

    Trained by SAELens' trainer on rows [d_in + d_out]: input, then output. Saved as SAELens'
    jumprelu_transcoder. Source: Dunefsky et al. 2024, arXiv 2406.11944; Bussmann et al. 2024,
    arXiv 2412.06410.
    """

    d_out: int = 768
    k: float = 32
    topk_threshold_lr: float = 0.01
    apply_b_dec_to_input: bool = False

    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    def __post_init__(self) -> None:
        if self.apply_b_dec_to_input or self.normalize_activations != "none":
            raise InputError(
                "A transcoder's decoder bias is of another site than its input: set "
                "apply_b_dec_to_input=False and normalize_activations='none'."
            )
        super().__post_init__()

    def get_inference_config_class(self) -> type[SAEConfig]:
        return JumpReLUTranscoderConfig


class BatchTopKTranscoder(TrainingSAE[BatchTopKTranscoderConfig]):
    """The training class of `BatchTopKTranscoderConfig`."""

    b_enc: nn.Parameter
    topk_threshold: Tensor

    def __init__(self, cfg: BatchTopKTranscoderConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        self.register_buffer("topk_threshold", torch.tensor(0.0, dtype=torch.double, device=cfg.device))

    def initialize_weights(self) -> None:
        super().initialize_weights()
        options = {"dtype": self.dtype, "device": self.device}
        self.b_enc = nn.Parameter(torch.zeros(self.cfg.d_sae, **options))
        directions = torch.empty(self.cfg.d_sae, self.cfg.d_out, **options)
        nn.init.kaiming_uniform_(directions)
        size = self.cfg.decoder_init_norm or 0.1
        self.W_dec = nn.Parameter(directions / directions.norm(dim=-1, keepdim=True) * size)
        self.b_dec = nn.Parameter(torch.zeros(self.cfg.d_out, **options))

    def get_activation_fn(self) -> Callable[[Tensor], Tensor]:
        return BatchTopK(self.cfg.k)

    def process_sae_in(self, sae_in: Tensor) -> Tensor:
        return self.hook_sae_input(sae_in.to(self.dtype))

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pre = self.hook_sae_acts_pre(self.process_sae_in(x) @ self.W_enc + self.b_enc)
        return self.hook_sae_acts_post(self.activation_fn(pre * self.W_dec.norm(dim=-1))), pre

    def decode(self, feature_acts: Tensor) -> Tensor:
        out = (feature_acts / self.W_dec.norm(dim=-1)) @ self.W_dec + self.b_dec
        return self.hook_sae_recons(out)

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        rows = step_input.sae_in
        source, target = rows.split([self.cfg.d_in, self.cfg.d_out], dim=-1)
        acts, pre = self.encode_with_hidden_pre(source)
        out = self.decode(acts)
        loss = (out - target).square().sum(-1).mean()
        with torch.no_grad():
            positive = acts[acts > 0]
            if len(positive):
                rate = self.cfg.topk_threshold_lr
                self.topk_threshold = (1 - rate) * self.topk_threshold + rate * positive.min().double()
        return TrainStepOutput(
            sae_in=target,
            sae_out=out,
            feature_acts=acts,
            hidden_pre=pre,
            loss=loss,
            losses={"mse_loss": loss},
        )

    def calculate_aux_loss(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return {}

    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        return {}

    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        norms = self.W_dec.detach().norm(dim=-1).clamp(min=1e-8)
        threshold = state_dict.pop("topk_threshold").item()
        state_dict["W_enc"] = (state_dict["W_enc"] * norms).contiguous()
        state_dict["b_enc"] = state_dict["b_enc"] * norms
        state_dict["W_dec"] = state_dict["W_dec"] / norms[:, None]
        state_dict["threshold"] = torch.ones_like(self.b_enc.detach()) * threshold


if ARCHITECTURE not in SAE_TRAINING_CLASS_REGISTRY:
    register_sae_training_class(ARCHITECTURE, BatchTopKTranscoder, BatchTopKTranscoderConfig)
