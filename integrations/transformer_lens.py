"""Families of this package as architectures of TransformerLens' own TransformerBridge.

The entry points of the group `transformer_lens.architectures` name one adapter for each class here,
made from the family's record. TransformerLens' loader by name does not look at entry points (3.9,
model_bridge/sources/transformers.py), so a model is built first and then bridged: `bridge(model)`.
"""

from __future__ import annotations

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

from mm_adapters._registry import by_name
from mm_adapters._sitemap import SiteMap
from mm_adapters._spec import Place, Tower

# Class in transformers: the record that says where its parts are.
RECORDS = {
    "CLIPVisionModel": "clip_vision",
    "SiglipVisionModel": "siglip_vision",
    "MetaClip2VisionModel": "metaclip2_vision",
    "AltCLIPVisionModel": "altclip_vision",
    "ChineseCLIPVisionModel": "chinese_clip_vision",
    "Dinov2Model": "dinov2",
}


class RecordAdapter(ArchitectureAdapter):
    """TransformerLens' description of an image tower, read off the family's record."""

    record_name = ""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.cfg.normalization_type = "LN"
        self.cfg.is_visual_model = True
        record = by_name(Tower, self.record_name)
        (stack,) = record.stacks.values()
        paths = {name: _path(place) for name, place in stack.parts.items()}
        attention, mlp = paths["attn.hook_pattern"], paths["mlp.hook_post"].rpartition(".")[0]
        linear = {"q": "attn.hook_q", "k": "attn.hook_k", "v": "attn.hook_v", "o": "attn.hook_z"}
        inner = {"in": "mlp.hook_pre", "out": "mlp.hook_post"}
        inside: Any = _linears(linear, paths, attention), _linears(inner, paths, mlp)
        block = {
            "ln1": self._norm(paths["ln1.hook_scale"]),
            "attn": AttentionBridge(name=attention, config=self.cfg,
                                    submodules=inside[0]),
            "ln2": self._norm(paths["ln2.hook_scale"]),
            "mlp": MLPBridge(name=mlp, config=self.cfg, submodules=inside[1]),
        }  # fmt: skip
        self.component_mapping = {
            # After CLIP's first norm, so that what the blocks add sums to the stream.
            "embed_ln": GeneralizedComponent(name=_path(record.before["hook_embed"])),
            "blocks": BlockBridge(name=stack.paths[0].removesuffix(".*"), submodules=block),
            "ln_final": self._norm(_path(record.after["ln_final.hook_scale"])),
        }

    def _norm(self, path: str) -> NormalizationBridge:
        return NormalizationBridge(name=path, config=self.cfg, use_native_layernorm_autograd=True)


def adapter(architecture: str) -> type[RecordAdapter]:
    """The adapter of one class of `RECORDS`."""
    return type(f"{architecture}Adapter", (RecordAdapter,), {"record_name": RECORDS[architecture]})


def __getattr__(name: str) -> Any:  # An entry point is this module and a class's name.
    if name in RECORDS:
        return adapter(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def bridge(model: nn.Module) -> Any:
    """A TransformerBridge over an image tower. The bridge replaces modules of `model`: give it a copy.

    Raises: ValueError if TransformerLens has no adapter for its class and neither has this package.
    """
    architecture = type(model).__name__
    if architecture not in RECORDS:
        raise ValueError(
            f"There is no adapter here for {architecture}; there is {', '.join(RECORDS)}. "
            "TransformerLens has its own for others: TransformerBridge.boot_transformers(...)."
        )
    # First what is installed: TransformerLens warns of an entry point whose name is taken.
    ArchitectureAdapterFactory.discover_entry_points()
    ArchitectureAdapterFactory.register_adapter(architecture, adapter(architecture))
    (tower,) = SiteMap(model).towers.values()
    (blocks,) = tower.stacks.values()
    c: Any = model.config
    cfg = TransformerBridgeConfig(
        d_model=c.hidden_size,
        d_head=c.hidden_size // c.num_attention_heads,
        n_layers=len(blocks),
        n_heads=c.num_attention_heads,
        n_ctx=1000,
        d_vocab=1,
        d_mlp=getattr(c, "intermediate_size", None) or 4 * c.hidden_size,
        architecture=architecture,
    )
    return build_bridge_from_module(model, architecture, tl_config=cfg).eval()


def _path(place: Place | tuple[Place, ...]) -> str:
    # Records put where the newest version of a library has it first.
    one = place[0] if isinstance(place, tuple) else place
    return getattr(one, "path", "").split("|")[0]


def _linears(names: dict[str, str], paths: dict[str, str], owner: str) -> dict[str, LinearBridge]:
    return {name: LinearBridge(name=paths[site].removeprefix(f"{owner}.")) for name, site in names.items()}
