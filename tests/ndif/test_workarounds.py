"""What is worked around upstream is still broken there; when one of these fails, its workaround can go."""

from __future__ import annotations

import inspect
import linecache
import os
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import beartype  # noqa: F401  Before nnsight, whose `.save` on every object it cannot be imported after.
import nnsight
import pytest
import tiny
import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from nnsight.intervention import batching, interleaver, serialization
from nnsight.intervention.backends import local
from nnsight.modeling import diffusion
from nnsight.modeling import transformers as nnsight_models
from nnsight.modeling.mixins.remotable import Remotable
from nnsight.tracing.tracer import WithBlockNotFoundError
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv

from integrations.ndif import environment
from mm_adapters import zoo
from mm_adapters.ndif_client.backend import by_value
from mm_adapters.nnsight_engine import task_classes
from mm_adapters.nnsight_engine.pipeline_module import PipelineModule
from mm_adapters.traced import TracedModel


def test_nnsight_runs_here_what_it_was_told_to_run_remotely() -> None:
    """mm_adapters/nnsight_engine/envoys.py, ndif_client/remotable.py; nnsight 0.8.1, envoy.py, trace.

    `remote=` is a keyword of the model's forward, which swallows it: of a child, and of a plain NNsight.
    """
    built = tiny.CASES["clip"]()
    theirs = nnsight.NNsight(built.model)
    out, whole = torch.empty(0), torch.empty(0)
    with theirs.vision_model.trace(built.inputs["pixel_values"], remote=True):
        out = theirs.vision_model.output.pooler_output.save()
    with theirs.trace(**built.inputs, remote=True):
        whole = theirs.output.logits_per_image.save()
    assert out.shape[0] == whole.shape[0] == 2  # There is no service: it was computed here, without an error.


@pytest.mark.parametrize("form", ["path", "class"])
def test_v1_nnsight_looks_for_flags_on_the_path_of_a_class(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mm_adapters/nnsight_engine/task_classes.py; nnsight 0.8.1, modeling/transformers.py.

    transformers 5.22 has the class in its table, 5.23 and newer its path.
    """
    from transformers import pipelines

    task = "image-text-to-text"
    entry = dict(pipelines.SUPPORTED_TASKS[task])
    cls = pipelines.ImageTextToTextPipeline
    entry["impl"] = cls if form == "class" else f"{cls.__module__}.{cls.__name__}"
    monkeypatch.setitem(pipelines.SUPPORTED_TASKS, task, entry)
    asks = types.SimpleNamespace(task=task)
    assert task_classes._theirs(asks) == ({"processor"} if form == "class" else set())
    assert nnsight_models.TransformersModel._loaded_preprocessors(asks) == {"processor"}
    unknown = nnsight_models.TransformersModel._loaded_preprocessors(types.SimpleNamespace(task="paint"))
    assert unknown == set(nnsight_models._PREPROCESSORS)
    folder = str(zoo.path("tiny-llava"))
    assert type(nnsight_models.TransformersModel(folder, task=task).processor).__name__ == "LlavaProcessor"


def test_v4_nnsight_breaks_anyios_attribute_sets() -> None:
    """mm_adapters/nnsight_engine/import_order.py; nnsight 0.8.1, __init__.py, pymount."""
    assert "is missing its type annotation" in fails_with("import nnsight, anyio._core._sockets")
    assert not fails_with(
        """
        import mm_adapters.traced
        import anyio.to_thread
        assert anyio.run(anyio.to_thread.run_sync, int) == 0
        """
    )
    assert not fails_with(
        """
        import mm_adapters.remote
        import anyio.streams.file, anyio.streams.tls, anyio.abc
        """
    )


def test_n1_nnsight_has_one_axis_of_rows_and_gives_all_rows_where_it_cannot_tell() -> None:
    """mm_adapters/nnsight_engine/batcher.py; nnsight 0.8.1, intervention/batching.py, _narrow_tensor."""
    theirs = batching.Batcher(None)
    theirs.invokes, theirs.total = [((), {}), ((), {})], 2
    doubled = torch.zeros(4, 3)  # As a denoiser's under guidance.
    assert theirs.narrow(doubled, [0, 1]).shape == (4, 3)


def test_diffusers_outputs_cannot_be_copied() -> None:
    """mm_adapters/nnsight_engine/batcher.py, _rebuilt; diffusers 0.42, utils/outputs.py, BaseOutput."""
    with pytest.raises(TypeError, match="missing 2 required positional arguments"):
        StableDiffusionPipelineOutput(images=[], nsfw_content_detected=None).copy()


def test_d1_nnsight_cannot_scan_a_pipeline() -> None:
    """mm_adapters/nnsight_engine/scan.py; nnsight 0.8.1, intervention/tracer.py, ScanningTracer."""
    pipe = tiny.CASES["stable_diffusion"]().model
    module = PipelineModule(pipe)
    with (
        pytest.raises(GuardOnDataDependentSymNode),
        FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()),
    ):
        module("a cat", num_inference_steps=1, output_type="latent")


def test_s1_a_class_that_nnsight_ships_by_its_source_loses_super() -> None:
    """mm_adapters/ndif_client/backend.py, by_reference; nnsight 0.8.1, intervention/serialization.py.

    So this package is named and not shipped where a service has it, and shipped as files where not.
    """
    name = "shipped_by_source"
    source = "class A:\n    def f(self): return 1\n\n\nclass B(A):\n    def f(self): return super().f()\n"
    module = types.ModuleType(name)
    module.__file__ = f"{name}.py"
    linecache.cache[module.__file__] = len(source), None, source.splitlines(True), module.__file__
    exec(compile(source, module.__file__, "exec"), module.__dict__)
    sys.modules[name] = module
    try:
        assert module.B().f() == 1
        with by_value(name):
            payload = serialization.dumps(module.B())
        unpickled = serialization.loads(payload, {})
        with pytest.raises(RuntimeError, match="__class__ cell not found"):
            unpickled.f()
    finally:
        del sys.modules[name], linecache.cache[module.__file__]


def test_s2_a_block_without_a_source_is_an_error_that_says_so() -> None:
    """Nothing is worked around: nnsight needs a block's text, and says so for our models too."""
    traced = TracedModel(tiny.CASES["clip"]().model)
    block = "with traced.trace(**inputs):\n    traced.output.save()\n"
    names = {"traced": traced, "inputs": tiny.CASES["clip"]().inputs}
    with pytest.raises((WithBlockNotFoundError, OSError), match=r"source|with"):
        exec(compile(block, "<stdin>", "exec"), names)


def fails_with(source: str) -> str:
    """What a Python of its own says on its error stream when it runs this and fails; "" if it does not."""
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(source)]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    return done.stderr if done.returncode else ""


def test_nnsight_drops_what_follows_a_loop_with_a_warning_only() -> None:
    """mm_adapters/nnsight_engine/iteration.py; nnsight 0.8.1, interleaver.py, dangling_unwind."""
    assert "was cut short" in inspect.getsource(interleaver.dangling_unwind)


def test_nnsights_simulation_hides_this_package() -> None:
    """mm_adapters/ndif_client/backend.py, LocalCopy; nnsight 0.8.1, intervention/backends/local.py."""
    assert "mm_adapters" not in local._SERVER_MODULES


def test_nnsights_pipelines_take_no_dtype_and_no_object() -> None:
    """mm_adapters/nnsight_engine/pipeline_module.py; nnsight 0.8.1, modeling/diffusion.py, _load."""
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
        ("ndif/services/ray/deployments/controller/cluster/evaluator.py", "trust_remote_code="),
        ("ndif/services/ray/deployments/modeling/base.py", "torch.cuda.synchronize()"),
        ("ndif/services/ray/sandbox/driver.py", "batcher = Batcher(self.model)"),
        ("ndif/services/ray/sandbox/host.py", "timeout: float = 30.0"),
        ("ndif/services/ray/sandbox/host.py", 'path = f"/tmp/sbx-'),
        ("ndif/services/ray/sandbox/host.py", 'argv = [python, "-m", "ndif.services.ray.sandbox.runner"'),
        ("ndif/services/ray/sandbox/nns.py", "def writeback("),
        ("ray/_private/node.py", "raylet_start_wait_time_s = 30"),
        ("ray/_private/services.py", "timeout_s: float = 30"),
        ("ray/core/src/ray/raylet/raylet", "WaitForDashboardAgentPorts"),
        ("ray/_raylet.so", "SPT_NOENV"),
    ],
)
def test_ndif_reads_as_it_did(service: str, file: str, text: str) -> None:
    """actors.py, fork_server.py, ray_timeouts.py, processes.py and service.py of integrations/ndif, and
    mm_adapters/ndif_client/remotable.py, name these places of NDIF 0.1.2 and Ray 2.60."""
    folder = environment.home() / "env"
    (path,) = folder.glob(f"lib/python*/site-packages/{file}")
    assert text.encode() in path.read_bytes()
