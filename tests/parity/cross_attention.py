"""What daam 0.2.0 and attention-map-diffusers 1.0.0 say of tiny random pipelines, written to a table.

pip install --no-deps --target PEERS daam==0.2.0 spacy==3.8.18 attention-map-diffusers==1.0.0
PYTHONPATH=PEERS python -m tests.parity.cross_attention

Neither is a dependency: daam pins a diffusers from 2023, and runs on ours only without its pins.
`tests/methods/cross_attention/test_parity.py` compares with the table, so it needs no peer.
"""

from __future__ import annotations

import argparse
import sys
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

TABLE = Path(__file__).with_name("cross_attention.safetensors")
PROMPT = "a big cat"
INPUTS: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 7.5, "output_type": "latent"}


def pipeline() -> Any:
    """A tiny Stable Diffusion whose latents are 64 x 64, which is what daam counts from."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import tiny
    from diffusers import UNet2DConditionModel

    built = tiny.stable_diffusion().model
    settings = tiny._UNET | {
        "sample_size": 64,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    }
    built.unet = tiny.seeded(lambda: UNet2DConditionModel(**settings))
    built.text_encoder = tiny.seeded(lambda: _text_encoder(tiny))
    built.tokenizer = tiny.letter_tokenizer(77)
    return built


def _text_encoder(tiny: Any) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    longer = {"max_position_embeddings": 77, "bos_token_id": 52, "eos_token_id": 53}
    return CLIPTextModel(CLIPTextConfig(**tiny._TEXT | longer))


def sampled(maps: Tensor) -> Tensor:
    """Every fourth row and column: enough to differ, little to keep."""
    return maps[..., ::4, ::4].contiguous()


def ask_daam(pipe: Any) -> Tensor:
    """daam's heat maps, [token, 64, 64], start and end among the tokens."""
    # It imports a language model's package for its command line alone.
    for name in ("spacy", "spacy.tokens"):
        if name not in sys.modules:
            module: Any = types.ModuleType(name)
            module.tokens = types.SimpleNamespace(Token=object)
            module.Token = object
            sys.modules[name] = module
    from daam import trace

    pipe.vae_scale_factor = 8  # What it takes for granted.
    with torch.no_grad(), trace(pipe) as tracer:
        pipe(PROMPT, height=512, width=512, generator=torch.Generator().manual_seed(0), **INPUTS)
        return tracer.compute_global_heat_map().heat_maps.float()


def small_pipeline() -> Any:
    """A tiny Stable Diffusion with latents of 8 x 8, whose every record is small.

    In float64: what one processor rounds otherwise than another is then far below what is compared.
    """
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import tiny

    return tiny.stable_diffusion().model.to(torch.float64)


def ask_records(pipe: Any) -> dict[str, Tensor]:
    """attention-map-diffusers' records, by layer and step: [head, every fourth pixel, token] of
    the conditional row."""
    from attention_map_diffusers import AttentionCapture

    with torch.no_grad():
        capture = AttentionCapture(
            pipe, relations=["image->text"], timesteps="all", heads="all", max_capture_bytes=None
        )
        with capture:
            pipe(PROMPT, height=16, width=24, generator=torch.Generator().manual_seed(0), **INPUTS)
    found: dict[str, Tensor] = {}
    for record in capture.records:
        scale = record.scale or record.q.shape[-1] ** -0.5
        pattern = (record.q @ record.k.mT * scale).softmax(-1)
        # The unconditional row comes first.
        found[f"{record.layer_id}/{record.step_index}"] = pattern[-1, :, ::4].float().contiguous()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="daam,records")
    only = parser.parse_args().only.split(",")
    table = load_file(TABLE) if TABLE.exists() else {}
    if "records" in only:
        found = ask_records(small_pipeline())
        print({k: tuple(v.shape) for k, v in found.items()})
        table = {k: v for k, v in table.items() if k == "daam"} | found
    if "daam" in only:
        heat = ask_daam(pipeline())
        print("daam", tuple(heat.shape), float(heat.max()))
        table["daam"] = sampled(heat)
    save_file(table, TABLE)


if __name__ == "__main__":
    main()
