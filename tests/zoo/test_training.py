"""A run that was killed continues to the result it would have had."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mm_adapters.zoo import _training, clip, tokenizer

KILLED_RUN = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_training import run
run(Path(sys.argv[1]), kill_at=5)
"""


def run(work: Path, *, kill_at: int | None = None, resume: bool = False) -> dict[str, torch.Tensor]:
    """Eight steps of tiny-clip on small batches; the process dies without warning at `kill_at`."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, words = clip.Student(clip.build(seed=1)), tokenizer.clip_tokenizer()
    schedule = _training.Schedule(steps=8, peak_rate=1e-3, warmup=2, average=0.9, checkpoint_every=2)

    def loss_at(step: int) -> torch.Tensor:
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return clip.loss(model, words, step + clip.SIMPLE_STEPS, seed=1, batch=6)

    _training.fit(model, loss_at, schedule, work / "run.safetensors", resume=resume)
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture
def _one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_one_thread")
def test_killed_run_resumes_to_the_same_weights_bit_for_bit(tmp_path):
    whole = run(tmp_path / "whole")
    here = Path(__file__)
    environment = {**os.environ, "PYTHONPATH": str(here.parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED_RUN, str(tmp_path / "killed"), str(here.parent)]
    died = subprocess.run(command, env=environment, capture_output=True)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    half = load_file(tmp_path / "killed" / "run.safetensors")
    assert not torch.equal(half["weight/clip.text_projection.weight"], whole["clip.text_projection.weight"])
    resumed = run(tmp_path / "killed", resume=True)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    state = [load_file(tmp_path / kind / "run.safetensors") for kind in ("whole", "killed")]
    assert all(torch.equal(state[0][name], state[1][name]) for name in state[0])


def test_average_and_frozen_weights(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 1))
    model[0].requires_grad_(False)
    frozen = model[0].weight.clone()
    seen: list[torch.Tensor] = []

    def loss_at(step: int) -> torch.Tensor:
        seen.append(model[1].weight.detach().clone())
        return model(torch.ones(2, 3) * step).square().mean()

    schedule = _training.Schedule(steps=4, peak_rate=0.1, warmup=1, average=0.999)
    _training.fit(model, loss_at, schedule, tmp_path / "run.safetensors")
    last = load_file(tmp_path / "run.safetensors")["weight/1.weight"]
    average = seen[0]
    for step, value in enumerate([*seen[1:], last]):
        keep = min(0.999, (1 + step) / (10 + step))
        average = keep * average + (1 - keep) * value
    assert torch.equal(model[0].weight, frozen)
    torch.testing.assert_close(model[1].weight.detach(), average)


def test_rate_warms_up_and_falls():
    schedule = _training.Schedule(steps=1000, peak_rate=1.0, warmup=100)
    rates = [schedule.rate(step) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01)
    assert max(rates) == pytest.approx(0.98, abs=0.02)
    assert rates.index(max(rates)) in range(95, 105)
    assert 0.02 <= rates[-1] < 0.021
