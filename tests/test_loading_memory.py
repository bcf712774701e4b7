"""Loading holds the weights once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
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


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux counts a process's peak")
def test_loading_does_not_hold_the_weights_twice(tmp_path: Path) -> None:
    sizes = {"large": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}, "small": {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}}  # fmt: skip
    for name, size in sizes.items():
        config = CLIPVisionConfig(**size, num_attention_heads=4, image_size=28, patch_size=14)
        with torch.device("meta"):
            model = CLIPVisionModel(config)
        model.to_empty(device="cpu").float().save_pretrained(tmp_path / name)
    kilobytes = (tmp_path / "large" / "model.safetensors").stat().st_size / 1024
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _RUN, tmp_path / "large", tmp_path / "small"],
        cwd=root, check=True, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(root)},
    )  # fmt: skip
    taken = int(done.stdout.split()[-1])
    assert 0.9 * kilobytes < taken < 1.5 * kilobytes
