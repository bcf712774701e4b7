"""A map the size of SDXL's can be read where keeping it could not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_RUN = """
import resource, sys
import torch
from diffusers import UNet2DConditionModel
import mm_adapters as mm
torch.manual_seed(0)
# One block of SDXL's middle resolution: 64 x 64 positions, width 640, 10 heads, 77 words.
unet = UNet2DConditionModel(sample_size=64, block_out_channels=(640,), layers_per_block=1,
                            down_block_types=("CrossAttnDownBlock2D",), up_block_types=("UpBlock2D",),
                            mid_block_type=None, cross_attention_dim=2048, attention_head_dim=10).eval()
model = mm.HookedModel(unet)
inputs = {"sample": torch.randn(2, 4, 64, 64), "timestep": torch.tensor(3),
          "encoder_hidden_states": torch.randn(2, 77, 2048)}
site = "denoiser.blocks.0.cross_attn.hook_pattern"
read = [mm.Read(site, reduce=lambda p: p.mean(1))] if sys.argv[1] == "read" else []
run = model.run(inputs, read=read)
if read:
    assert run[site].shape == (1, 2, 4096, 77) or run[site].shape == (2, 4096, 77), run[site].shape
    assert model.sitemap[site].axes[1] == "head=10"
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_kilobytes(what: str) -> int:
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _RUN, what],
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    return int(done.stdout)


def test_an_sdxl_sized_cross_attention_is_read_in_less_than_1_5_gb_extra() -> None:
    assert peak_kilobytes("read") - peak_kilobytes("nothing") < 1.5e6
