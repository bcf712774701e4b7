"""peft, accelerate and pruning change the model's weights, and towers follow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils import prune

import mm_adapters as mm
from tests.neighbours import TOKENS, Logits, fresh, model, pictures


def test_lora_is_loaded_trained_and_merged_and_w_q_follows(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    llava = fresh("tiny-llava")
    config = LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers")
    tuned = get_peft_model(llava.wrapped, config)
    tower, before = llava.language, llava.language.W_Q.detach().clone()
    optimizer = torch.optim.SGD([p for p in tower.parameters() if p.requires_grad], lr=1.0)
    tower(TOKENS, return_type="loss").backward()
    optimizer.step()
    tower.zero_grad()
    tower(TOKENS, return_type="loss").backward()  # The first step moves lora_B alone, from zero.
    optimizer.step()
    loss = tower(TOKENS, return_type="loss").detach()
    trained = tower.W_Q.detach().clone()
    assert torch.equal(trained[0], before[0])
    assert (trained[1] - before[1]).abs().max() > 1e-4
    (projection,) = [
        m for n, m in tuned.named_modules() if n.endswith("language_model.layers.1.self_attn.q_proj")
    ]
    added = projection.get_delta_weight("default").T
    heads = added.unflatten(1, (tower.cfg.n_heads, -1)).transpose(0, 1)
    torch.testing.assert_close(trained[1] - before[1], heads, rtol=1e-4, atol=1e-6)
    tuned.save_pretrained(tmp_path / "adapter")
    other = fresh("tiny-llava")
    PeftModel.from_pretrained(other.wrapped, tmp_path / "adapter")
    torch.testing.assert_close(other.language.W_Q, trained)
    assert torch.equal(other.language(TOKENS, return_type="loss"), loss)
    merged = mm.wrap(tuned.merge_and_unload(), tokenizer=llava.tokenizer_of("language"))
    torch.testing.assert_close(merged.language.W_Q, trained)
    torch.testing.assert_close(tower.W_Q, trained)
    torch.testing.assert_close(merged.language(TOKENS, return_type="loss"), loss, rtol=1e-5, atol=1e-6)


@pytest.fixture
def accelerator() -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    yield lambda **options: Accelerator(cpu=True, **options)
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


@pytest.mark.parametrize("what", ["tower", "model"])
def test_accelerate_trains_it(what: str, accelerator: Any, tmp_path: Path) -> None:
    llava, plain = fresh("tiny-llava"), Logits(fresh("tiny-llava").wrapped)
    net = llava.language if what == "tower" else llava
    run = accelerator()
    for module in (net, plain):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        prepared, optimizer = run.prepare(module, optimizer)
        output = prepared(input_ids=TOKENS).logits if module is llava else prepared(TOKENS)
        run.backward(output.log_softmax(-1)[..., 5].mean())
        optimizer.step()
    theirs = dict(plain.llava.named_parameters())
    assert all(torch.equal(p, theirs[n]) for n, p in llava.named_parameters())
    start = dict(model("tiny-llava").named_parameters())
    assert any(not torch.equal(p, start[n]) for n, p in llava.named_parameters())
    assert run.unwrap_model(prepared) is plain
    run.save_model(net, tmp_path)
    again = fresh("tiny-llava")
    from safetensors.torch import load_file

    (again.language if what == "tower" else again).load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(again.language(TOKENS), llava.language(TOKENS))


def test_accelerate_mixed_precision(accelerator: Any) -> None:
    llava = fresh("tiny-llava")
    run = accelerator(mixed_precision="bf16")
    prepared = run.prepare(llava.language)
    with torch.no_grad():
        got = prepared(TOKENS)
        with torch.autocast("cpu", torch.bfloat16):
            want = model("tiny-llava").wrapped(input_ids=TOKENS).logits.float()
    assert torch.equal(got, want)
    _, cache = llava.language.run_with_cache(TOKENS)
    assert cache["q", 0].dtype == torch.bfloat16
    assert run.unwrap_model(prepared, keep_fp32_wrapper=False) is llava.language
    with torch.no_grad():
        assert torch.equal(llava.language(TOKENS), model("tiny-llava").language(TOKENS))


def test_pruned_weights_are_a_towers() -> None:
    clip = fresh("tiny-clip")
    linear = clip.wrapped.vision_model.encoder.layers[0].mlp.fc1
    prune.l1_unstructured(linear, "weight", amount=0.5)
    assert torch.equal(clip.vision.blocks[0].mlp.W_in, linear.weight.T)
    assert (clip.vision.W_in[0] == 0).float().mean() == 0.5
    with torch.no_grad():
        pruned = clip.vision(pictures())
        assert torch.equal(pruned, clip.wrapped.get_image_features(pictures()).pooler_output)
        assert not torch.equal(pruned, model("tiny-clip").vision(pictures()))
        prune.remove(linear, "weight")
        assert torch.equal(clip.vision(pictures()), pruned)


def test_a_part_is_not_pruned_where_it_would_change_nothing() -> None:
    with pytest.raises(mm.InputError, match=r"Prune or register it on the module of the model inside"):
        prune.l1_unstructured(fresh("tiny-clip").vision.blocks[0].mlp, "W_in", amount=0.5)
