"""Adapters of PEFT in a traced model: what they compute, where sites are, and how they go in and out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import beartype  # noqa: F401  Before nnsight, whose `.save` on every object it cannot be imported after.
import nnsight
import pytest
import tiny
import torch
from nnsight.modeling.mixins.remotable import Remotable

import mm_adapters as mm
from mm_adapters.traced import TracedModel

peft: Any = pytest.importorskip("peft")

# A model, the layers that an adapter changes, and a site behind them.
CASES = {
    "clip": (["q_proj", "fc2"], "vision.blocks.1.hook_mlp_out"),
    "llava": (["v_proj", "up_proj"], "language.blocks.0.mlp.hook_pre"),
    "opt_lm": (["k_proj"], "language.blocks.1.attn.hook_k"),
}


def saved(folder: Path, name: str, seed: int = 0, **settings: Any) -> tuple[str, str, Any]:
    """A model's folder, an adapter's, and PEFT's own wrapper of both."""
    base = str(folder / "base")
    model = tiny.CASES[name]().model
    model.save_pretrained(base)
    targets, _ = CASES[name]
    torch.manual_seed(seed)
    lora = peft.LoraConfig(target_modules=targets, r=2, **settings)
    wrapped = peft.get_peft_model(type(model).from_pretrained(base), lora)
    for key, weight in wrapped.named_parameters():
        if "lora_B" in key:  # Zero at first, so that the adapter changes nothing.
            torch.nn.init.normal_(weight)
    adapter = str(folder / f"adapter{seed}")
    wrapped.save_pretrained(adapter)
    return base, adapter, wrapped.eval()


def logits(output: Any) -> torch.Tensor:
    return output.logits_per_image if "logits_per_image" in output else output.logits


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("when", ["at load", "at load, at once", "later", "on a module that is here"])
def test_it_computes_what_pefts_wrapper_does_at_sites_too(tmp_path: Path, name: str, when: str) -> None:
    base, adapter, theirs = saved(tmp_path, name)
    inputs, site = tiny.CASES[name]().inputs, CASES[name][1]
    if when == "on a module that is here":
        model = TracedModel(type(theirs.get_base_model()).from_pretrained(base), peft=adapter)
    else:
        model = TracedModel(
            base, dispatch="once" in when, device="cpu", peft=adapter if "load" in when else None
        )
    model.load_adapter(adapter)  # Again, or now.
    assert model.peft == adapter
    run = model.run(inputs, read=[site])
    with torch.no_grad():
        assert torch.equal(logits(run.output), logits(theirs(**inputs)))
    by_the_other_engine = mm.wrap(theirs).run(inputs, read=[site])
    assert torch.equal(run[site], by_the_other_engine[site])
    plain = TracedModel(base, dispatch=True, device="cpu").run(inputs, read=[site])
    assert not torch.allclose(run[site], plain[site], atol=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_what_is_taken_out_leaves_the_model_as_it_was(tmp_path: Path, name: str) -> None:
    base, adapter, _ = saved(tmp_path, name)
    _, other, theirs = saved(tmp_path, name, seed=1)
    inputs, site = tiny.CASES[name]().inputs, CASES[name][1]
    model = TracedModel(base, dispatch=True, device="cpu")
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    paths, trained = ([e.path for e in model.modules()], [p.requires_grad for p in model.parameters()])
    before = model.run(inputs, read=[site])
    model.load_adapter(adapter)
    assert {e.path for e in model.modules()} > set(paths)
    model.load_adapter(other)
    with torch.no_grad():
        assert torch.equal(logits(model.run(inputs).output), logits(theirs(**inputs)))
    model.load_adapter(None)
    assert model.peft is None
    assert [e.path for e in model.modules()] == paths
    assert [p.requires_grad for p in model.parameters()] == trained
    after = model.run(inputs, read=[site])
    assert torch.equal(after[site], before[site])
    assert torch.equal(logits(after.output), logits(before.output))


def test_an_adapters_dropout_is_off_in_a_model_in_eval_mode(tmp_path: Path) -> None:
    base, adapter, theirs = saved(tmp_path, "opt_lm", lora_dropout=0.9)
    model = TracedModel(base, dispatch=True, device="cpu", peft=adapter)
    assert not any(module.training for module in model._module.modules())
    inputs = tiny.CASES["opt_lm"]().inputs
    with torch.no_grad():
        assert torch.equal(model.run(inputs).output.logits, theirs(**inputs).logits)


def test_a_block_reads_and_writes_inside_an_adapter(tmp_path: Path) -> None:
    base, adapter, _ = saved(tmp_path, "opt_lm")
    inputs = tiny.CASES["opt_lm"]().inputs
    model = TracedModel(base, device="cpu", peft=adapter)
    layer = model.model.decoder.layers[0].self_attn.k_proj
    with torch.no_grad(), model.trace(**inputs):
        layer.lora_B.default.output[:] = 0
        silent = model.site("language.blocks.0.attn.hook_k").save()
    model.load_adapter(None)
    plain = model.run(inputs, read=["language.blocks.0.attn.hook_k"])
    assert torch.equal(silent, plain["language.blocks.0.attn.hook_k"])


def test_copies_and_edited_models_have_the_adapter(tmp_path: Path) -> None:
    base, adapter, theirs = saved(tmp_path, "opt_lm")
    inputs = tiny.CASES["opt_lm"]().inputs
    model = TracedModel(base, device="cpu")
    with model.edit() as (_, edited):
        edited.model.decoder.layers[1].output[:] = 0
    model.load_adapter(adapter)  # Before the weights are read: by the copy, here.
    assert edited.peft == adapter
    assert (
        not edited.run(inputs, read=["language.blocks.1.hook_resid_post"])
        .values["language.blocks.1.hook_resid_post"]
        .any()
    )
    with torch.no_grad():
        want = theirs(**inputs).logits
    assert torch.equal(model.run(inputs).output.logits, want)
    twin = copy.deepcopy(model)
    model.load_adapter(None)
    assert twin.peft == adapter
    assert torch.equal(twin.run(inputs).output.logits, want)


def test_what_is_no_such_adapter_is_refused_and_the_model_runs_as_before(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base, adapter, theirs = saved(tmp_path, "opt_lm")
    inputs = tiny.CASES["opt_lm"]().inputs
    model = TracedModel(base, dispatch=True, device="cpu")
    want = model.run(inputs).output.logits
    weights = load_file(f"{adapter}/adapter_model.safetensors")
    save_file(
        {k.replace("layers.0", "layers.7"): v for k, v in weights.items()},
        f"{adapter}/adapter_model.safetensors",
    )
    with pytest.raises(mm.InputError, match="did not attach"):
        model.load_adapter(adapter)
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    peft.get_peft_model(tiny.CASES["opt_lm"]().model, prompt).save_pretrained(tmp_path / "prompt")
    with pytest.raises(mm.InputError, match="cannot be attached"):
        model.load_adapter(tmp_path / "prompt")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "adapter_config.json").write_text((Path(adapter) / "adapter_config.json").read_text())
    torch.save(weights, pickled / "adapter_model.bin")
    with pytest.raises(mm.CheckpointError, match=r"no adapter_model.safetensors.*safetensors only"):
        model.load_adapter(pickled)
    with pytest.raises(mm.CheckpointError, match="no adapter 'some/nowhere'"):
        model.load_adapter("some/nowhere")
    assert model.peft is None
    assert torch.equal(model.run(inputs).output.logits, want)
    with pytest.raises(mm.InputError, match="came with an adapter"):
        TracedModel(theirs).load_adapter(adapter)
    with pytest.raises(mm.InputError, match="load_lora_weights"):
        mm.load("tiny-sd", engine="nnsight").load_adapter(adapter)


def test_a_job_brings_its_adapter_and_its_attention_and_no_more(tmp_path: Path) -> None:
    base, adapter, theirs = saved(tmp_path, "opt_lm")
    inputs = tiny.CASES["opt_lm"]().inputs
    client = TracedModel(base, peft=adapter, attn_implementation="eager")
    assert client._remoteable_get_env() == {"attn_implementation": "eager", "peft": adapter}
    service = Remotable.from_model_key(client.to_model_key(), dispatch=True, device="cpu")
    assert isinstance(service, TracedModel)
    assert (service.peft, service.attn_implementation) == (None, "sdpa")
    service._remoteable_set_env(client._remoteable_get_env())
    assert (service.peft, service.attn_implementation) == (adapter, "eager")
    theirs.get_base_model().set_attn_implementation("eager")
    with torch.no_grad():
        assert torch.equal(service.run(inputs).output.logits, theirs(**inputs).logits)
    service._remoteable_set_env({})
    assert (service.peft, service.attn_implementation) == (None, "eager")  # An older client names none.
    with pytest.raises(ValueError, match="bogus"):
        service._remoteable_set_env({"attn_implementation": "bogus"})
    with client.trace(**inputs, remote="local"):
        here = nnsight.save(client.output.logits)
    with torch.no_grad():
        assert torch.equal(here, theirs(**inputs).logits)
