"""Changes of a model one by one, beyond the table: what is added, taken out, read through the weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from model_state import stays
from torch import Tensor, nn

import mm_adapters as mm
from mm_adapters.runs.turns import Turns
from tests.states.kinds import KINDS, call, numbers, watch

ENGINES = ("hooked", "nnsight")
both = pytest.mark.parametrize("engine", ENGINES)


def wrapped(name: str, engine: str = "hooked") -> tuple[Any, Any]:
    raw = KINDS[name].fresh()
    return raw, mm.wrap(raw, engine=engine)


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def seen_at(module: nn.Module, run: Callable[[], Any]) -> Tensor:
    """What a module gives in a run, by a plain hook."""
    kept: list[Tensor] = []
    handle = module.register_forward_hook(lambda m, a, o: kept.append(first(o)))
    run()
    handle.remove()
    return kept[0]


def test_a_hook_that_stays_moves_to_the_module_that_is_there_now() -> None:
    (raw, model), (plain, _) = wrapped("contrastive"), wrapped("contrastive")
    kind, site = KINDS["contrastive"], "vision.blocks.1.hook_resid_post"
    plain.vision_model.encoder.layers[1] = copy.deepcopy(plain.vision_model.encoder.layers[3])
    model.add_hook(site, lambda v, hook: v / 2, is_permanent=True)
    layers = raw.vision_model.encoder.layers
    old, layers[1] = layers[1], copy.deepcopy(layers[3])
    with torch.no_grad():
        assert torch.equal(numbers(model(**kind.inputs())), watch(kind, plain).halved)
        assert not old._forward_hooks
        model.reset_hooks(including_permanent=True)
        assert torch.equal(numbers(model(**kind.inputs())), call(kind, plain))


def test_a_site_that_is_no_more_is_missing_and_its_hook_is_told() -> None:
    raw, model = wrapped("contrastive")
    model.add_hook("vision.blocks.3.hook_resid_post", lambda v, hook: v * 0)
    raw.vision_model.encoder.layers = raw.vision_model.encoder.layers[:2]
    with pytest.raises(mm.ModelStateError, match=r"no vision\.blocks\.3\.hook_resid_post any more"):
        model(**KINDS["contrastive"].inputs())
    with torch.no_grad():
        assert torch.equal(numbers(model(**KINDS["contrastive"].inputs())), call(KINDS["contrastive"], raw))
    with pytest.raises(mm.MissingSiteError, match=r"vision\.blocks\.3"):
        model.run(KINDS["contrastive"].inputs(), read=["vision.blocks.3.hook_resid_post"])
    assert model.vision.cfg.n_layers == len(model.vision.blocks) == 2
    assert model.vision.W_Q.shape[0] == 2


@both
def test_layers_that_are_added_have_sites(engine: str) -> None:
    raw, model = wrapped("vlm", engine)
    kind, layers = KINDS["vlm"], raw.model.language_model.layers
    n = len(layers)
    layers.append(copy.deepcopy(layers[0]))
    layers[n].self_attn.layer_idx = n
    raw.config.text_config.num_hidden_layers = n + 1
    site = f"language.blocks.{n}.hook_resid_post"
    run = model.run(kind.inputs(), read=[site])
    assert torch.equal(run[site], seen_at(layers[n], lambda: call(kind, raw)))
    assert torch.equal(numbers(run.output), call(kind, raw))


@both
def test_a_part_taken_out_of_a_pipeline_is_missing_and_comes_back(engine: str) -> None:
    raw, model = wrapped("diffusion", engine)
    kind, encoder = KINDS["diffusion"], raw.text_encoder
    with torch.no_grad():
        embedded = raw.encode_prompt("a red circle", "cpu", 1, True)
    given = {k: v for k, v in kind.inputs().items() if k != "prompt"}
    given |= {"prompt_embeds": embedded[0], "negative_prompt_embeds": embedded[1]}
    right = call(kind, raw)
    raw.text_encoder = None
    assert "text" not in model.towers
    assert torch.equal(numbers(model.run(given, read=["denoiser.hook_out"]).output), right)
    with pytest.raises(mm.MissingSiteError, match=r"text\.hook_embed"):
        model.run(given, read=["text.hook_embed"])
    raw.text_encoder = encoder
    run = model.run(kind.inputs(), read=["text.blocks.0.hook_resid_post"])
    assert torch.equal(numbers(run.output), right)
    assert run["text.blocks.0.hook_resid_post"].shape[-1] == encoder.config.hidden_size


def test_a_part_of_no_family_is_named_before_anything_runs() -> None:
    raw, model = wrapped("diffusion")
    raw.unet = nn.Identity()
    with pytest.raises(mm.UnknownFamilyError, match="Identity"):
        model.run(KINDS["diffusion"].inputs())


@both
@pytest.mark.parametrize("part", ["ln1.hook_scale", "ln2.hook_normalized", "attn.hook_pattern"])
def test_norms_and_patterns_are_edited_where_weights_are_offloaded(engine: str, part: str) -> None:
    import accelerate

    kind, site = KINDS["contrastive"], f"vision.blocks.1.{part}"
    raw, model = wrapped("contrastive", engine)
    edit = [mm.Edit(site, lambda v: v * 0.5)]
    right = model.run(kind.inputs(), edit=edit)
    accelerate.cpu_offload(raw, execution_device=torch.device("cpu"))
    run = model.run(kind.inputs(), edit=edit)
    assert torch.equal(numbers(run.output), numbers(right.output))
    weights = model.towers["vision"].weights(1).names("ln1")
    assert weights["w"]().device.type == "cpu"
    assert model.towers["vision"].projection.device.type == "cpu"


def test_a_layer_that_torch_compiled_is_put_in_place_is_read() -> None:
    raw, model = wrapped("contrastive")
    kind, site = KINDS["contrastive"], "vision.blocks.1.attn.hook_z"
    right = model.run(kind.inputs(), read=[site])
    layers = raw.vision_model.encoder.layers
    layers[1].mlp = torch.compile(layers[1].mlp, backend="eager")  # type: ignore[assignment]
    call(kind, raw)
    run = model.run(kind.inputs(), read=[site, "vision.blocks.1.mlp.hook_post"])
    assert torch.equal(run[site], right[site])
    assert torch.equal(numbers(run.output), numbers(right.output))


def test_hooks_are_in_force_where_the_compiled_model_itself_is_called() -> None:
    raw, model = wrapped("contrastive")
    kind, site = KINDS["contrastive"], "vision.blocks.1.hook_resid_post"
    right = watch(kind, raw).halved
    raw.vision_model.encoder.layers[1].compile(backend="eager")
    call(kind, raw)
    with model.hooks(fwd_hooks=[(site, lambda v, hook: v / 2)]):
        assert torch.equal(call(kind, raw), right)
    with model.vision.hooks(fwd_hooks=[("blocks.1.hook_resid_post", lambda v, hook: v / 2)]):
        assert torch.equal(call(kind, raw), right)


@both
@pytest.mark.filterwarnings("ignore")
def test_adapters_on_what_maps_to_the_output_are_in_its_weights(engine: str) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    raw, model = wrapped("contrastive", engine)
    targets = ["visual_projection", "out_proj", "fc2"]
    inject_adapter_in_model(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), raw).eval()

    def by_hand(layer: Any) -> Tensor:
        added = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        return layer.base_layer.weight + layer.scaling["default"] * added

    tower = model.towers["vision"]
    block = raw.vision_model.encoder.layers[2]
    torch.testing.assert_close(tower.projection, by_hand(raw.visual_projection).T)
    torch.testing.assert_close(tower.weights(2).names("mlp")["W_out"](), by_hand(block.mlp.fc2).T)
    w_o = by_hand(block.self_attn.out_proj).unflatten(1, (4, -1)).permute(1, 2, 0)
    torch.testing.assert_close(tower.weights(2).names("attn")["W_O"](), w_o)
    torch.testing.assert_close(
        tower.weights(2).names("attn")["b_O"](), block.self_attn.out_proj.base_layer.bias, atol=1e-6, rtol=0
    )


@pytest.mark.filterwarnings("ignore")
def test_adapters_on_words_are_in_the_table_of_embeddings() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    raw, model = wrapped("vlm")
    config = LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False)
    inject_adapter_in_model(config, raw).eval()
    table = raw.get_input_embeddings()
    with torch.no_grad():
        right = table(torch.arange(table.base_layer.num_embeddings))
    torch.testing.assert_close(model.language.W_E, right)
    assert not torch.allclose(model.language.W_E, table.base_layer.weight)
    for layer in (m for m in raw.modules() if hasattr(m, "base_layer")):
        layer.enable_adapters(False)
    assert torch.equal(model.language.W_E, table.base_layer.weight)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_that_drops_values_out_is_asked_for_its_weight_without() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    raw, model = wrapped("contrastive")
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, lora_dropout=0.5)
    inject_adapter_in_model(config, raw).train()
    with stays(model, lambda: torch.zeros(1)):
        one, other = model.vision.W_Q, model.vision.W_Q
    assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore")
def test_a_learned_prompt_before_the_model_s_own_is_refused() -> None:
    from peft import PromptTuningConfig, TaskType, get_peft_model

    raw, _ = wrapped("vlm")
    given = {"num_layers": 2, "token_dim": 128, "num_attention_heads": 4, "num_transformer_submodules": 1}
    tuned = get_peft_model(raw, PromptTuningConfig(TaskType.CAUSAL_LM, num_virtual_tokens=3, **given))
    with pytest.raises(mm.ModelStateError, match=r"get_base_model\(\)"):
        mm.wrap(tuned)


class Stored(nn.Module):
    """A projection whose weight is in no tensor, and that does not say how wide it is."""

    def __init__(self, real: nn.Linear) -> None:
        super().__init__()
        self.real = [real]

    def forward(self, x: Tensor) -> Tensor:
        return self.real[0](x)


def test_a_weight_that_cannot_be_had_is_refused_and_its_site_is_read() -> None:
    raw, model = wrapped("contrastive")
    kind, block = KINDS["contrastive"], raw.vision_model.encoder.layers[2].mlp
    right = model.run(kind.inputs(), read=["vision.blocks.2.mlp.hook_pre"])
    block.fc1 = Stored(block.fc1)
    run = model.run(kind.inputs(), read=["vision.blocks.2.mlp.hook_pre"])
    assert torch.equal(run["vision.blocks.2.mlp.hook_pre"], right["vision.blocks.2.mlp.hook_pre"])
    with pytest.raises(mm.ModelStateError, match="Stored stores its weight as no one tensor"):
        model.towers["vision"].weights(2).names("mlp")["W_in"]()


@both
def test_gradients_are_those_of_the_edited_run_where_blocks_are_checkpointed(engine: str) -> None:
    kind, site = KINDS["diffusion"], "denoiser.blocks.2.hook_resid_post"
    raw, model = wrapped("diffusion", engine)
    ask: dict[str, Any] = {
        "read": ["denoiser.blocks.1.hook_resid_post"],
        "edit": [mm.Edit(site, lambda v: v * v)],
        "grad_of": lambda out: torch.as_tensor(out.images).square().sum(),
    }
    right = model.run(kind.inputs(), **ask)
    raw.unet.enable_gradient_checkpointing()
    run = model.run(kind.inputs(), **ask)
    at = ask["read"][0]
    assert right.grads[at].abs().max() > 0
    torch.testing.assert_close(run.grads[at], right.grads[at])
    assert raw.unet.mid_block.gradient_checkpointing


def test_a_cache_of_blocks_is_refused() -> None:
    from diffusers.hooks import FirstBlockCacheConfig

    raw = tiny.CASES["flux"]().model
    model = mm.wrap(raw)
    raw.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.2))
    with pytest.raises(mm.ModelStateError, match=r"disable_cache\(\)"):
        model.run({"prompt": "a cat"}, read=["denoiser.hook_out"])


def test_a_copy_takes_turns_of_its_own_with_whoever_wraps_what_it_copied() -> None:
    _, model = wrapped("contrastive")
    twin = copy.deepcopy(model)
    of_twin = Turns([twin.wrapped])._turns[0]
    assert of_twin in twin._turns._turns
    assert of_twin not in model._turns._turns


@pytest.mark.filterwarnings("ignore")
def test_adapters_on_torch_s_own_attention_are_in_its_weights() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    case = tiny.CASES["open_clip"]()
    raw, model = case.model.eval(), mm.wrap(case.model)
    config = LoraConfig(r=2, target_modules=["attn"], init_lora_weights=False)
    inject_adapter_in_model(config, raw).eval()
    parts = ("ln1.hook_normalized", "attn.hook_q", "attn.hook_z", "hook_attn_out")

    def read() -> list[Tensor]:
        run = model.run({"image": case.inputs["image"]}, read=[f"vision.blocks.0.{part}" for part in parts])
        return [run[f"vision.blocks.0.{part}"] for part in parts]

    x, q, _, out = read()
    layer, attn = raw.visual.transformer.resblocks[0], model.vision.blocks[0].attn
    with torch.no_grad():
        asked = torch.einsum("bnd,hdk->bnhk", x * layer.ln_1.weight + layer.ln_1.bias, attn.W_Q) + attn.b_Q
        right = seen_at(layer.attn, lambda: raw(**case.inputs))
    torch.testing.assert_close(asked, q, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out, right, atol=1e-5, rtol=1e-5)
    with pytest.raises(mm.ModelStateError, match="merge_and_unload"):
        _ = attn.W_O
    layer.attn.merge()
    *_, z, out = read()
    with torch.no_grad():
        given = torch.einsum("bnhk,hkd->bnd", z, attn.W_O) + attn.b_O
    torch.testing.assert_close(given, out, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_projection_that_is_trained_beside_an_adapter_is_the_one_that_runs() -> None:
    from peft import LoraConfig, get_peft_model

    raw, _ = wrapped("contrastive")
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["visual_projection"])
    tuned = get_peft_model(raw, config).eval()
    model = mm.wrap(tuned)
    with torch.no_grad():
        raw.visual_projection.modules_to_save["default"].weight.mul_(2)
    right = raw.visual_projection.modules_to_save["default"].weight.T
    assert torch.equal(model.towers["vision"].projection, right)
    run = model.run(KINDS["contrastive"].inputs())
    assert torch.equal(numbers(run.output), call(KINDS["contrastive"], tuned))
