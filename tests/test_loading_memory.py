"""Loading holds the weights once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

_RUN = """
import re, sys
from pathlib import Path
import torch
from transformers import CLIPVisionModel
import mm_adapters as mm
import mm_adapters.hooked, mm_adapters.loading

def kilobytes(what):
    return int(re.search(what + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

mm.load(sys.argv[2], device="cpu")  # What loading anything costs, once.
Path("/proc/self/clear_refs").write_text("5")  # The peak is counted from here on.
before = kilobytes("VmHWM")
kept = mm.load(sys.argv[1], device="cpu")
for weight in kept.wrapped.parameters():  # They may be mapped from the file, and come when they are used.
    weight.sum()
print(kilobytes("VmHWM") - before)
"""

_OPEN_CLIP = _RUN.replace(
    "import mm_adapters as mm", "import mm_adapters as mm, open_clip; open_clip.add_model_config(sys.argv[3])"
)
counted = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux counts a process's peak"
)


def taken(script: str, *args: str | Path) -> int:
    """The kilobytes that a script's load took at its peak."""
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *args],
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    return int(done.stdout.split()[-1])


@counted
def test_loading_does_not_hold_the_weights_twice(tmp_path: Path) -> None:
    sizes = {
        "large": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12},
        "small": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1},
    }
    for name, size in sizes.items():
        config = CLIPVisionConfig(**size, num_attention_heads=4, image_size=28, patch_size=14)
        with torch.device("meta"):
            model = CLIPVisionModel(config)
        model.to_empty(device="cpu").float()
        for weight in model.parameters():
            torch.nn.init.constant_(weight, 0.5)
        model.save_pretrained(tmp_path / name)
    kilobytes = (tmp_path / "large" / "model.safetensors").stat().st_size / 1024
    assert 0.9 * kilobytes < taken(_RUN, tmp_path / "large", tmp_path / "small") < 1.5 * kilobytes


@counted
def test_open_clip_holds_them_once_beside_the_mapped_file(tmp_path: Path) -> None:
    # It fills weights it has made from the file, whose pages count while it is mapped and can be dropped.
    for name, width, layers in (("small", 64, 1), ("large", 768, 8)):
        config = {
            "embed_dim": 64,
            "vision_cfg": {
                "image_size": 28, "patch_size": 14, "width": width, "layers": layers, "head_width": 32},
            "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 64, "heads": 2, "layers": 1},
        }  # fmt: skip
        (tmp_path / f"memory-{name}.json").write_text(json.dumps(config))
        save_file(open_clip.CLIP(**config).state_dict(), tmp_path / f"{name}.safetensors")
    names = [f"open_clip:memory-{n}/{tmp_path / n}.safetensors" for n in ("large", "small")]
    kilobytes = (tmp_path / "large.safetensors").stat().st_size / 1024
    beside = taken(_OPEN_CLIP, *names, tmp_path) - kilobytes
    assert 0.9 * kilobytes < beside < 1.2 * kilobytes
