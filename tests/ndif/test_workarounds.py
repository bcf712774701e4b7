"""What is worked around upstream is still broken there; when one of these fails, its workaround can go."""

from __future__ import annotations

import inspect
from pathlib import Path

import beartype  # noqa: F401  Before nnsight, whose `.save` on every object it cannot be imported after.
import nnsight
import pytest
import tiny
import torch
from nnsight.intervention import interleaver
from nnsight.intervention.backends import local
from nnsight.modeling import diffusion
from nnsight.modeling.mixins.remotable import Remotable

from integrations.ndif import environment


def test_nnsight_runs_a_child_here_though_it_was_told_remote() -> None:
    """mm_adapters/_traced_site.py, TracedPart; nnsight 0.8.1, intervention/envoy.py, trace."""
    built = tiny.CASES["clip"]()
    theirs = nnsight.NNsight(built.model)
    out = torch.empty(0)
    with theirs.vision_model.trace(built.inputs["pixel_values"], remote=True):
        out = theirs.vision_model.output.pooler_output.save()
    assert out.shape[0] == 2  # There is no service: it was computed here, in silence.


def test_nnsight_drops_what_follows_a_loop_with_a_warning_only() -> None:
    """mm_adapters/_traced_engine.py, Steps; nnsight 0.8.1, intervention/interleaver.py, dangling_unwind."""
    assert "was cut short" in inspect.getsource(interleaver.dangling_unwind)


def test_nnsights_simulation_hides_this_package() -> None:
    """mm_adapters/_remote_backend.py, LocalCopy; nnsight 0.8.1, intervention/backends/local.py."""
    assert "mm_adapters" not in local._SERVER_MODULES


def test_nnsights_pipelines_take_no_dtype_and_no_object() -> None:
    """mm_adapters/_traced_batch.py, PipelineModule; nnsight 0.8.1, modeling/diffusion.py, _load."""
    source = inspect.getsource(diffusion.DiffusionModel._load)
    assert "torch_dtype" not in source
    assert "from_pretrained" in source


def test_nnsight_reads_trust_remote_code_off_the_key() -> None:
    """integrations/ndif/actors.py, accept_trust_remote_code; nnsight 0.8.1, modeling/mixins/remotable.py."""
    assert "trust_remote_code" not in inspect.signature(Remotable.describe_checkpoint).parameters


@pytest.mark.ndif
@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("ray/deployments/controller/cluster/evaluator.py", "trust_remote_code="),
        ("ray/deployments/modeling/base.py", "torch.cuda.synchronize()"),
        ("ray/sandbox/driver.py", "batcher = Batcher(self.model)"),
        ("ray/sandbox/host.py", "timeout: float = 30.0"),
        ("ray/sandbox/nns.py", "def writeback("),
    ],
)
def test_ndif_reads_as_it_did(service: str, file: str, text: str) -> None:
    """integrations/ndif/actors.py and mm_adapters/_traced_remote.py name these places of NDIF 0.1.2."""
    folder = environment.home() / "env"
    (found,) = folder.glob(f"lib/python*/site-packages/ndif/services/{file}")
    assert text in Path(found).read_text(encoding="utf-8")
