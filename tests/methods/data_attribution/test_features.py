"""Stores of gradient features: what they hold, and what happens when something goes wrong."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import save_file
from tiny_attribution import denoiser, pictures, pixel_unet
from torch import Tensor

from methods_multimodal.data_attribution import _signs, denoiser_task, module_task
from methods_multimodal.data_attribution.features import featurise, query_features
from methods_multimodal.data_attribution.gradients import per_example_gradients
from methods_multimodal.data_attribution.projection import Projection, _Dense
from methods_multimodal.data_attribution.task import Task, batch_of
from mm_adapters import InputError, StoreError
from mm_adapters.store import Store, read_document, write_document
from tests.benchmarks._memory import peak


def flat(task: Task, n: int, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    found = per_example_gradients(task, batch_of(pictures(n), 0, n), state)
    return {m: torch.cat([g.flatten(1) for g in per.values()], 1) for m, per in found.items()}


@pytest.mark.parametrize("kind", ["rademacher", "normal", "sparse", "traker"])
def test_a_projection_is_one_matrix_that_keeps_dot_products(kind: str) -> None:
    n, dim = 600, 400
    project = Projection(kind, dim, seed=3).on(n, torch.device("cpu"))  # type: ignore[arg-type]
    matrix = project(torch.eye(n), 0)
    gradients = torch.randn(7, n)
    torch.testing.assert_close(project(gradients, 0), gradients @ matrix, rtol=1e-4, atol=1e-4)
    # Rows have length one (in expectation), and two of them are as orthogonal as chance has it.
    gram = matrix @ matrix.T
    assert abs(float(gram.diagonal().mean()) - 1) < 0.02
    off = gram - torch.diag(gram.diagonal())
    assert 0.8 < float(off.std()) * math.sqrt(dim) < 1.2
    again = Projection(kind, dim, seed=3).on(n, torch.device("cpu"))(gradients, 0)  # type: ignore[arg-type]
    other = Projection(kind, dim, seed=4).on(n, torch.device("cpu"))(gradients, 0)  # type: ignore[arg-type]
    assert torch.equal(again, project(gradients, 0))
    assert not torch.allclose(other, again, atol=0.5)


def test_dot_products_of_the_default_are_as_near_as_those_of_a_dense_matrix() -> None:
    n, dim = 20_000, 500
    scale = torch.logspace(0, -2, n)  # Gradients are small almost everywhere.
    gradients = torch.randn(64, n) * scale
    exact, far = gradients @ gradients.T, {}
    for kind in (Projection().kind, "rademacher"):
        made = [
            Projection(kind, dim, seed=seed).on(n, torch.device("cpu"))(gradients, 0) for seed in range(4)
        ]  # type: ignore[arg-type]
        far[kind] = torch.stack([m @ m.T - exact for m in made]).square().mean().sqrt()
    assert Projection().kind == "sparse"
    assert far["sparse"] < 1.05 * far["rademacher"]


@pytest.mark.parametrize("kind", ["rademacher", "normal"])
def test_a_matrix_that_is_not_kept_is_made_again_the_same(kind: str) -> None:
    n, dim = 5000, 2000  # More than one block.
    gradients = torch.randn(2, n)
    kept = Projection(kind, dim).on(n, torch.device("cpu"))(gradients, 0)  # type: ignore[arg-type]
    made = Projection(kind, dim, memory=0).on(n, torch.device("cpu"))(gradients, 0)  # type: ignore[arg-type]
    assert torch.equal(kept, made)


def test_sums_that_are_looked_up_are_those_of_the_matrix_and_take_no_memory() -> None:
    n, dim = 5000, 1999
    gradients = torch.randn(40, n)  # More than one table's.
    found: list[torch.Tensor] = []
    project = Projection("rademacher", dim, seed=5).on(n, torch.device("cpu"))
    assert peak(lambda: found.append(project(gradients, 0))) < n * dim * 4 / 5
    pieces = [*_signs.pieces(n, dim, 5)]
    matrix = torch.cat([_signs.as_matrix(piece) for piece in pieces])[:n]
    assert matrix.unique().tolist() == [-1, 1]
    torch.testing.assert_close(found[0], gradients @ matrix / math.sqrt(dim), rtol=1e-4, atol=1e-4)
    # As on a card, where it is a matrix.
    on_a_card = _Dense(n, dim, 5, torch.device("cpu"), "rademacher", memory=0)
    torch.testing.assert_close(found[0], on_a_card(gradients, 0), rtol=1e-4, atol=1e-4)


def test_a_store_holds_each_measure_at_each_checkpoint(tmp_path: Path) -> None:
    task = denoiser(measure=["loss", "output_norm"])
    other = pixel_unet(7).state_dict()
    save_file(other, tmp_path / "later.safetensors")
    points = [task.module.state_dict(), tmp_path / "later.safetensors"]
    projection = Projection("rademacher", 32)
    store = featurise(
        task, pictures(5), tmp_path / "s", projection=projection, checkpoints=points, batch_size=2
    )
    rows = store.rows()
    for k, state in enumerate((None, other)):
        expected = flat(task, 5, state)
        values = task.per_example(batch_of(pictures(5), 0, 5), state)
        for measure in task.measures:
            project = projection.on(expected[measure].shape[1], torch.device("cpu"))
            torch.testing.assert_close(
                rows[f"{measure}@{k}"], project(expected[measure], k), rtol=1e-3, atol=1e-5
            )
            torch.testing.assert_close(
                rows[f"value.{measure}@{k}"], values[measure].detach(), rtol=1e-4, atol=1e-5
            )
    queries = query_features(task, pictures(5), projection=projection, checkpoints=points, batch_size=2)
    assert all(torch.equal(queries.columns[n], rows[n]) for n in queries.columns)
    again = type(queries).load(queries.save(tmp_path / "q"))
    assert again.about == queries.about
    assert all(torch.equal(again.columns[n], rows[n]) for n in queries.columns)


def test_examples_may_be_read_one_by_one(tmp_path: Path) -> None:
    whole = pictures(5)
    each = [{"latents": whole["latents"][i]} for i in range(5)]
    projection = Projection("sparse", 64)
    a = featurise(denoiser(), whole, tmp_path / "a", projection=projection, batch_size=2).rows()
    b = featurise(denoiser(), each, tmp_path / "b", projection=projection, batch_size=2).rows()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_factored_features_are_each_layers_gradient_between_two_projections(tmp_path: Path) -> None:
    task = denoiser()
    projection = Projection("factored", 16)
    store = featurise(task, pictures(3), tmp_path / "s", projection=projection)
    rows, grads = store.rows()["loss@0"], per_example_gradients(task, batch_of(pictures(3), 0, 3))["loss"]
    seen = 0
    for path, start, stop in store.about["blocks"]:
        weight = grads[f"{path}.weight"].flatten(2)
        if f"{path}.bias" in grads:
            weight = torch.cat([weight, grads[f"{path}.bias"][..., None]], 2)
        for which, axis in ((0, 2), (1, 1)):
            side = projection.side(weight.shape[axis], path, which, torch.device("cpu"))
            if side is not None:
                weight = torch.tensordot(weight, side, ([axis], [0])).movedim(-1, axis)
        torch.testing.assert_close(rows[:, start:stop], weight.flatten(1), rtol=1e-3, atol=1e-5)
        seen += stop - start
    assert seen == rows.shape[1]
    assert len(store.about["blocks"]) > 20


_KILLED = """
import sys
from tiny_attribution import denoiser, pictures
from methods_multimodal.data_attribution.features import featurise
from methods_multimodal.data_attribution.projection import Projection
task = denoiser()
asked = task.rows
def rows(batch, draws):
    if len(batch["index"]) == 2 and len(draws) == 2:
        print(batch["index"].tolist(), flush=True)
    return asked(batch, draws)
object.__setattr__(task, "rows", rows)
featurise(task, pictures(24), sys.argv[1], projection=Projection(dim=64), batch_size=2,
          shard_bytes=1000, progress=False)
"""


def _start(folder: Path) -> subprocess.Popen[str]:
    root = Path(__file__).parents[3]
    environment = os.environ | {"PYTHONPATH": f"{root}:{root / 'tests'}"}
    return subprocess.Popen(
        [sys.executable, "-c", _KILLED, str(folder)],
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_kill_9_in_the_middle_leaves_the_same_store_and_repeats_one_shard_at_most(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    first = _start(whole)
    first.communicate()
    assert first.returncode == 0
    process = _start(killed)
    manifest = killed / "manifest.json"
    limit = time.monotonic() + 120
    while time.monotonic() < limit:
        if manifest.is_file() and len(json.loads(manifest.read_text())["shards"]) >= 2:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = json.loads(manifest.read_text())
    assert not done["complete"]
    stored = sum(s["rows"] for s in done["shards"])
    assert stored >= 4
    again = _start(killed)
    said, _ = again.communicate()
    assert again.returncode == 0
    # The first two are looked at to choose how; then nothing that was stored is made again.
    made = [tuple(json.loads(line)) for line in said.splitlines()]
    assert made.count((0, 1)) <= 2
    assert [m for m in made if m != (0, 1)] == [(i, i + 1) for i in range(stored, 24, 2)]
    files = sorted(p.name for p in whole.iterdir())
    assert files == sorted(p.name for p in killed.iterdir())
    assert all((whole / f).read_bytes() == (killed / f).read_bytes() for f in files)


def test_a_full_disk_is_one_error_and_what_was_stored_stays(tmp_path: Path) -> None:
    """A limit on file size stands in for a full disk: the same OSError at the same place."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    asked = {"projection": Projection("rademacher", 256), "batch_size": 2, "shard_bytes": 2500}
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3500, hard))
        with pytest.raises(StoreError, match="make room and run again"):
            featurise(denoiser(), pictures(8), tmp_path / "s", **asked | {"shard_bytes": 5000})  # type: ignore[arg-type]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    store = featurise(denoiser(), pictures(8), tmp_path / "s", **asked | {"shard_bytes": 5000})  # type: ignore[arg-type]
    assert len(store) == 8


def test_a_cut_shard_is_found_before_anything_is_made(tmp_path: Path) -> None:
    asked = {"projection": Projection("rademacher", 64), "batch_size": 2, "shard_bytes": 1000}
    store = featurise(denoiser(), pictures(8), tmp_path, **asked)  # type: ignore[arg-type]
    cut = sorted(tmp_path.glob("*.safetensors"))[1]
    cut.write_bytes(cut.read_bytes()[:-40])
    with pytest.raises(StoreError, match=cut.name):  # Also in a store that was finished.
        featurise(denoiser(), pictures(8), tmp_path, **asked)  # type: ignore[arg-type]
    manifest = read_document(tmp_path / "manifest.json")
    write_document(tmp_path / "manifest.json", manifest | {"complete": False})
    for _ in range(2):
        with pytest.raises(StoreError, match=cut.name):
            featurise(denoiser(), pictures(8), tmp_path, **asked)  # type: ignore[arg-type]
    with pytest.raises(StoreError, match=cut.name):
        Store(store.folder, partial=True)


def test_a_store_of_something_else_is_not_gone_on_with(tmp_path: Path) -> None:
    asked = {"projection": Projection("rademacher", 64), "batch_size": 2}
    featurise(denoiser(), pictures(4), tmp_path, **asked)  # type: ignore[arg-type]
    others = {
        "weights": (denoiser(1), pictures(4), {}),
        "task": (_reseeded(), pictures(4), {}),
        "projection": (denoiser(), pictures(4), {"projection": Projection("rademacher", 64, seed=1)}),
        "data": (denoiser(), {"latents": torch.zeros(4, 3, 8, 8)}, {}),
        "parameters": (denoiser(parameters="conv_in*"), pictures(4), {}),
        "columns": (denoiser(), pictures(4), {"dtype": torch.bfloat16}),
    }
    for key, (task, examples, more) in others.items():
        with pytest.raises(StoreError, match=f"work of something else: {key}"):
            featurise(task, examples, tmp_path, **asked | more)  # type: ignore[arg-type]


def _reseeded() -> Task:
    return denoiser_task(pixel_unet(), scheduler=DDPMScheduler(), timesteps=[5, 300], seed=1)


def test_features_that_do_not_fit_their_dtype_or_are_not_finite_are_refused(tmp_path: Path) -> None:
    net = torch.nn.Linear(3, 1).eval()
    task = module_task(net, {"f": lambda call, b: call(b["x"])[:, 0] * b["by"]}, "weight")
    x = torch.randn(4, 3)
    small = {"x": x, "by": torch.full((4,), 1e-9)}
    none = Projection("none")
    with pytest.raises(InputError, match="too small for torch"):
        featurise(task, small, tmp_path / "a", projection=none, dtype=torch.float16)
    kept = featurise(task, small, tmp_path / "b", projection=none, dtype=torch.bfloat16).rows()["f@0"]
    torch.testing.assert_close(kept.float(), x * 1e-9, rtol=1e-2, atol=0)
    with pytest.raises(InputError, match=r"not finite for examples \[2\]"):
        featurise(task, {"x": x, "by": torch.tensor([1, 1, torch.inf, 1])}, tmp_path / "c", projection=none)
