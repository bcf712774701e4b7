"""Models, towers and caches in other processes: spawned, forked, and in the workers of a DataLoader."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing import get_context
from torch.utils.data import DataLoader, Dataset

import mm_adapters as mm
from tests.neighbours import TOKENS, fresh, model, pictures

# The second process is forked while this one has threads of torch.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
METHODS = ("spawn", "fork")


@pytest.fixture(autouse=True)
def _our_tests_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A spawned process imports this module by its name, and site-packages has a `tests` too (kronfluence's).

    If it does not find it, it ends, and `Process.start` writes to it for ever.
    """
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))


def answers(clip: Any, tower: Any, cache: Any, pixels: Tensor) -> dict[str, Tensor]:
    """What a process computes with what it was sent."""
    torch.set_num_threads(1)
    with torch.no_grad():
        run = clip.run({"pixel_values": pixels}, read=["vision.blocks.1.attn.hook_pattern"])
        return {
            "pattern": run["vision.blocks.1.attn.hook_pattern"],
            "tower": tower(TOKENS),
            "W_Q": tower.W_Q,
            "cached": cache["resid_post", 1],
            "decomposed": cache.decompose_resid(),
        }


def _work(pipe: Any, *sent: Any) -> None:
    # By value: a tensor's shared memory would go with this process.
    pipe.send_bytes(pickle.dumps({k: v.numpy() for k, v in answers(*sent).items()}))


@pytest.mark.parametrize("method", METHODS)
def test_a_process_computes_the_same(method: str) -> None:
    clip, tower = model("tiny-clip"), model("tiny-llava").language
    with torch.no_grad():
        _, cache = tower.run_with_cache(TOKENS)
        sent = (clip, tower, cache, pictures())
        want = answers(*sent)
        context = get_context(method)
        here, there = context.Pipe()
        process = context.Process(target=_work, args=(there, *sent))
        process.start()
        assert here.poll(120), "The process said nothing."
        got = pickle.loads(here.recv_bytes())
        process.join(30)
    assert process.exitcode == 0
    assert {k: torch.equal(torch.from_numpy(got[k]), v) for k, v in want.items()} == dict.fromkeys(want, True)


class Embedded(Dataset[Tensor]):
    """A dataset that has a model in it."""

    def __init__(self, tower: Any) -> None:
        self.tower, self.pictures = tower, pictures()

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> Tensor:
        torch.set_num_threads(1)
        with torch.no_grad():
            return self.tower.run_with_cache(self.pictures[i % 2][None])[1]["resid_post", 1][0].clone()


@pytest.mark.parametrize("method", METHODS)
def test_a_dataset_with_a_model_in_it_is_read_by_workers(method: str) -> None:
    torch.set_num_threads(1)
    data = Embedded(model("tiny-clip").vision)
    loader = DataLoader(
        data, batch_size=2, num_workers=1 if method == "spawn" else 2, multiprocessing_context=method
    )
    got = torch.cat(list(loader))
    assert torch.equal(got, torch.stack([data[i] for i in range(4)]))


def test_a_traced_model_is_copied_and_not_pickled() -> None:
    traced = fresh("tiny-clip", engine="nnsight")
    call, site = {"pixel_values": pictures()}, "vision.blocks.1.attn.hook_pattern"
    with pytest.raises(mm.InputError, match=r"A traced model is not pickled.*save_pretrained"):
        pickle.dumps(traced)
    twin = copy.deepcopy(traced)
    again = mm.wrap(pickle.loads(pickle.dumps(fresh("tiny-clip").wrapped)), engine="nnsight")
    want = traced.run(call, read=[site])[site]
    assert torch.equal(twin.run(call, read=[site])[site], want)
    assert torch.equal(again.run(call, read=[site])[site], want)
