"""TransformerLens' own bridge over a CLIP vision tower, which it has no adapter for: the peer."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import (
    AttentionBridge,
    BlockBridge,
    LinearBridge,
    MLPBridge,
    NormalizationBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.sources import build_bridge_from_module


class ClipVisionAdapter(ArchitectureAdapter):
    """The components of a CLIPVisionModel, in the bridge's terms."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.cfg.normalization_type = "LN"
        self.cfg.is_visual_model = True
        projections = {
            n: LinearBridge(name=f"{p}_proj") for n, p in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "out"))
        }
        block = {
            "ln1": NormalizationBridge(
                name="layer_norm1", config=self.cfg, use_native_layernorm_autograd=True
            ),
            "ln2": NormalizationBridge(
                name="layer_norm2", config=self.cfg, use_native_layernorm_autograd=True
            ),
            "attn": AttentionBridge(name="self_attn", config=self.cfg, submodules=projections),
            "mlp": MLPBridge(
                name="mlp",
                config=self.cfg,
                submodules={"in": LinearBridge(name="fc1"), "out": LinearBridge(name="fc2")},
            ),
        }
        self.component_mapping = {
            "embed_ln": GeneralizedComponent(name="pre_layrnorm"),
            "blocks": BlockBridge(name="encoder.layers", submodules=block),
            "ln_final": NormalizationBridge(
                name="post_layernorm", config=self.cfg, use_native_layernorm_autograd=True
            ),
        }


def bridge_of(model: nn.Module) -> Any:
    """A bridge over a copy of `model` (the bridge replaces modules in what it is given)."""
    ArchitectureAdapterFactory.register_adapter("ClipVisionPeer", ClipVisionAdapter)
    c: Any = model.config
    cfg = TransformerBridgeConfig(
        d_model=c.hidden_size,
        d_head=c.hidden_size // c.num_attention_heads,
        n_layers=c.num_hidden_layers,
        n_heads=c.num_attention_heads,
        n_ctx=1000,
        d_vocab=1,
        d_mlp=c.intermediate_size,
        architecture="ClipVisionPeer",
    )
    bridge = build_bridge_from_module(copy.deepcopy(model), "ClipVisionPeer", tl_config=cfg)
    return bridge.eval()
