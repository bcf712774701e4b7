"""The states that a model may be in, and what is right in each: numbers, or which error."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mm_adapters import ModelStateError
from tests.states.kinds import KINDS, Kind

SCALE, RANK = 2.0, 2


@dataclass(frozen=True)
class Refusal:
    """What may not be read in a state, and what the error says to do."""

    parts: tuple[str, ...]
    says: str
    error: type[Exception] = ModelStateError
    tower: str | None = None


@dataclass(frozen=True)
class State:
    """A state of a model, and how a user brings it about.

    `put` changes a library's model, or gives another one that holds it. `as_before`: it computes as it did.
    `weight` is the query matrix [out, in] that it multiplies with then, by hand.
    """

    name: str
    how: str
    put: Callable[[Kind, Any], Any]
    as_before: bool = False
    weight: Callable[[Kind, Any], Tensor] | None = None
    refusal: Refusal | None = None
    kinds: tuple[str, ...] = tuple(KINDS)
    why_not: str = ""
    atol: float = 0.0
    off_weight: float = field(default=1e-6)


def _query(kind: Kind, raw: Any) -> Any:
    return kind.module(raw, f"{kind.attention}.{kind.query}")


def _changed_part(kind: Kind, raw: Any, make: Callable[[nn.Module], Any]) -> Any:
    """A model with another thing for its whole, or in a pipeline for its denoiser."""
    if isinstance(raw, nn.Module):
        return make(raw)
    raw.unet = make(raw.unet)
    return raw


def _with_lora(kind: Kind, raw: Any) -> Any:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=RANK, lora_alpha=int(SCALE * RANK), target_modules=[kind.query, "fc1", "o_proj"])
    target = raw if isinstance(raw, nn.Module) else raw.unet
    inject_adapter_in_model(config, target).eval()
    torch.manual_seed(0)
    for name, p in target.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.05)
    return raw


def _lora_layers(raw: Any) -> list[Any]:
    model = raw if isinstance(raw, nn.Module) else raw.unet
    return [m for m in model.modules() if hasattr(m, "base_layer")]


def _off(kind: Kind, raw: Any) -> Any:
    for layer in _lora_layers(_with_lora(kind, raw)):
        layer.enable_adapters(False)
    return raw


def _merged(kind: Kind, raw: Any) -> Any:
    for layer in _lora_layers(_with_lora(kind, raw)):
        layer.merge()
    return raw


def _base(kind: Kind, raw: Any) -> Tensor:
    return _query(kind, raw).base_layer.weight


def _added(kind: Kind, raw: Any) -> Tensor:
    layer = _query(kind, raw)
    return layer.base_layer.weight + SCALE * layer.lora_B["default"].weight @ layer.lora_A["default"].weight


def _peft(kind: Kind, raw: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(
        r=RANK, lora_alpha=int(SCALE * RANK), target_modules=[kind.query], init_lora_weights=False
    )
    return _changed_part(kind, raw, lambda m: get_peft_model(m, config).eval())


def _unloaded(kind: Kind, raw: Any) -> Any:
    tuned = _peft(kind, raw)
    if isinstance(tuned, nn.Module):
        return tuned.merge_and_unload()
    raw.unet = raw.unet.merge_and_unload()
    return raw


def _other_attention(kind: Kind, raw: Any) -> Any:
    block = kind.module(raw)
    other = copy.deepcopy(block.get_submodule(kind.attention))
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.25)
    setattr(block, kind.attention, other)
    return raw


def _other_part(kind: Kind, raw: Any) -> Any:
    """Another tower in place of the one that is read."""
    above = kind.block.partition(".")[0]
    if kind.zoo == "tiny-llava":
        raw.model.language_model = _louder(raw.model.language_model)
    else:
        setattr(raw, above, _louder(getattr(raw, above)))
    return raw


def _louder(module: nn.Module) -> nn.Module:
    other = copy.deepcopy(module)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.05)
    return other


def _compiled_in_place(kind: Kind, raw: Any) -> Any:
    kind.module(raw).compile(backend="eager")
    return raw


def _repeated(kind: Kind, raw: Any) -> Any:
    raw.unet.compile_repeated_blocks(backend="eager")
    return raw


class Packed(nn.Linear):
    """A linear whose weight is stored two values a byte, as 4-bit libraries do."""

    def __init__(self, real: nn.Linear) -> None:
        super().__init__(real.in_features, real.out_features, real.bias is not None)
        self.real, self.bias = real, real.bias
        packed = torch.zeros(real.weight.numel() // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.real(x)


def _packed(kind: Kind, raw: Any) -> Any:
    attention = kind.module(raw, kind.attention)
    setattr(attention, kind.query, Packed(attention.get_submodule(kind.query)))  # type: ignore[arg-type]
    return raw


def _int8(kind: Kind, raw: Any) -> Any:
    quantised = torch.ao.quantization.quantize_dynamic

    def small(module: nn.Module) -> nn.Module:
        return quantised(module, {nn.Linear}, dtype=torch.qint8, inplace=True)

    return _changed_part(kind, raw, small)


def _models(raw: Any) -> list[nn.Module]:
    return [raw] if isinstance(raw, nn.Module) else [raw.text_encoder, raw.unet, raw.vae]


def _cpu_offload(kind: Kind, raw: Any) -> Any:
    import accelerate

    for module in _models(raw):
        accelerate.cpu_offload(module, execution_device=torch.device("cpu"))
    return raw


def _disk_offload(kind: Kind, raw: Any) -> Any:
    import accelerate

    for module in _models(raw):
        accelerate.disk_offload(module, tempfile.mkdtemp(), execution_device=torch.device("cpu"))
    return raw


def _model_offload(kind: Kind, raw: Any) -> Any:
    import accelerate

    hook = None
    for module in _models(raw):  # What pipe.enable_model_cpu_offload does, which asks for a GPU.
        _, hook = accelerate.cpu_offload_with_hook(module, torch.device("cpu"), prev_module_hook=hook)
    return raw


def _sliced(kind: Kind, raw: Any) -> Any:
    raw.enable_attention_slicing(1)
    return raw


def _fused(kind: Kind, raw: Any) -> Any:
    raw.fuse_qkv_projections()
    return raw


def _tiled(kind: Kind, raw: Any) -> Any:
    raw.vae.enable_tiling()
    return raw


ONLY_PIPELINES = "a method of pipelines"
STATES = (
    State("as loaded", "", lambda k, raw: raw, as_before=True),
    State("LoRA active", "`add_adapter`, `load_lora_weights`", _with_lora, weight=_added, atol=1e-5),
    State("LoRA switched off", "`disable_adapters`, `disable_lora`", _off, weight=_base, as_before=True),
    State("LoRA merged", "`merge_adapter`, `fuse_lora`", _merged, weight=_base),
    State("LoRA merged and unloaded", "`merge_and_unload`", _unloaded),
    State("PeftModel", "`get_peft_model`", _peft, weight=_added, atol=1e-5),
    State("a module replaced", "`layer.self_attn = other`", _other_attention),
    State("a tower replaced", "`pipe.unet = other`", _other_part),
    State("compiled in place", "`module.compile()`", _compiled_in_place, as_before=True),
    State(
        "repeated blocks compiled",
        "`compile_repeated_blocks()`",
        _repeated,
        as_before=True,
        kinds=("diffusion",),
        why_not="a method of diffusers' models",
    ),
    State(
        "compiled",
        "`torch.compile(model)`",
        lambda k, raw: _changed_part(k, raw, lambda m: torch.compile(m, backend="eager")),
        as_before=True,
    ),
    State(
        "DataParallel",
        "`nn.DataParallel(model)`",
        lambda k, raw: nn.DataParallel(raw),
        as_before=True,
        kinds=("contrastive", "vlm"),
        why_not="a pipeline takes none",
    ),
    State("4-bit weights, packed", "bitsandbytes and the like", _packed, as_before=True),
    State("dynamic int8", "`quantize_dynamic`", _int8, off_weight=0.01),
    State("offloaded to the CPU", "`cpu_offload`, sequential", _cpu_offload, as_before=True),
    State("offloaded part by part", "`enable_model_cpu_offload`", _model_offload, as_before=True),
    State("offloaded to disk", "`disk_offload`, `device_map`", _disk_offload, as_before=True),
    State(
        "attention sliced",
        "`enable_attention_slicing`",
        _sliced,
        as_before=True,
        kinds=("diffusion",),
        why_not=ONLY_PIPELINES,
        refusal=Refusal(("attn.hook_pattern", "attn.hook_attn_scores"), "disable_attention_slicing"),
        atol=1e-5,
    ),
    State(
        "projections fused",
        "`fuse_qkv_projections`",
        _fused,
        as_before=True,
        kinds=("diffusion",),
        why_not=ONLY_PIPELINES,
        refusal=Refusal(("attn.hook_q", "attn.hook_v"), "unfuse_qkv_projections"),
        atol=1e-5,
    ),
    State(
        "autoencoder in tiles",
        "`enable_vae_tiling`",
        _tiled,
        as_before=True,
        kinds=("diffusion",),
        why_not=ONLY_PIPELINES,
        refusal=Refusal(("resnets.0.hook_out",), "disable_tiling", tower="vae"),
    ),
)
