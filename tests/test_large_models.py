"""Models whose weights are spread over the memory and the disk, or packed: the same numbers in every tool."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mm_adapters as mm
from mm_adapters import zoo
from mm_adapters.traced import TracedModel
from mm_adapters.zoo import sample_images

ENGINES = ("hooked", "nnsight")
MAPS: dict[str, dict[str, Any]] = {
    "tiny-clip": {
        "memory": {"": "cpu"},
        "disk": {"": "disk"},
        "auto": "auto",
        "shards": {
            "text_model": "cpu", "vision_model.embeddings": "disk", "vision_model.pre_layrnorm": "cpu",
            "vision_model.encoder.layers.0": "cpu", "vision_model.encoder.layers.1": "disk",
            "vision_model.encoder.layers.2": "disk", "vision_model.encoder.layers.3": "cpu",
            "vision_model.post_layernorm": "disk", "visual_projection": "disk", "text_projection": "cpu",
            "logit_scale": "cpu",
        },
    },
    "tiny-llava": {
        "memory": "cpu",
        "disk": {"": "disk"},
        "auto": "auto",
        "shards": {
            "model.vision_tower": "disk", "model.multi_modal_projector": "cpu",
            "model.language_model.embed_tokens": "cpu", "model.language_model.rotary_emb": "cpu",
            **{f"model.language_model.layers.{i}": ("disk", "cpu")[i % 2] for i in range(4)},
            "model.language_model.norm": "disk", "lm_head": "cpu",
        },
    },
}  # fmt: skip
CASES = [(name, where) for name, maps in MAPS.items() for where in maps]
SITES = {
    "tiny-clip": ("vision.blocks.1.attn.hook_pattern", "vision.blocks.2.mlp.hook_post", "vision.hook_embed"),
    "tiny-llava": (
        "vision.blocks.1.hook_resid_post", "projector.hook_out", "language.blocks.2.attn.hook_pattern",
        "language.blocks.0.attn.hook_q",
    ),
}  # fmt: skip
each_engine = pytest.mark.parametrize("engine", ENGINES)
quiet = pytest.mark.filterwarnings("ignore:.*offload.*:UserWarning", "ignore:.*device_map keys:UserWarning")


@cache
def plain(name: str) -> mm.HookedModel:
    return mm.load(name, device="cpu")


def inputs(name: str) -> dict[str, Any]:
    images = sample_images()
    pictures = [images["red_circle"], images["blue_square"]]
    if name == "tiny-clip":
        return plain(name).prepare(text=["a red circle", "a blue square"], images=pictures)
    return plain(name).prepare(text=["<image> what shape is it?"] * 2, images=pictures)


def answer(output: Any) -> Tensor:
    return output.logits_per_image if hasattr(output, "logits_per_image") else output.logits


def spread(name: str, where: str, folder: Path, engine: str) -> Any:
    return mm.load(name, engine=engine, device_map=MAPS[name][where], offload_folder=str(folder))


@quiet
@each_engine
@pytest.mark.parametrize(("name", "where"), CASES)
def test_a_spread_model_reads_edits_and_has_gradients_as_the_whole_one(
    name: str, where: str, engine: str, tmp_path: Path
) -> None:
    model = spread(name, where, tmp_path, engine)
    parameters = dict(model.wrapped.named_parameters())
    assert any(p.is_meta for p in parameters.values()) == (where in ("disk", "shards"))
    edit = mm.Edit(SITES[name][0], lambda x: 1.3 * x)
    asked = {"read": SITES[name], "grad_of": lambda out: answer(out).float().sum()}
    for edits in ([], [edit]):
        want = plain(name).run(inputs(name), edit=edits, **asked)
        got = model.run(inputs(name), edit=edits, **asked)
        assert torch.equal(answer(got.output), answer(want.output))
        for site in SITES[name]:
            assert torch.equal(got[site], want[site]), site
            assert torch.equal(got.grads[site], want.grads[site]), site
    assert {n for n, p in model.wrapped.named_parameters() if p.is_meta} == {
        n for n, p in parameters.items() if p.is_meta
    }


@quiet
@pytest.mark.parametrize("name", MAPS)
def test_weights_on_the_disk_are_those_of_the_whole_model(name: str, tmp_path: Path) -> None:
    model = spread(name, "disk", tmp_path, "hooked")
    for tower in model.towers:
        if tower == "projector":
            continue
        for weight in ("W_Q", "W_O", "b_V", "W_out"):
            got, want = (getattr(m.tower(tower), weight) for m in (model, plain(name)))
            assert torch.equal(got, want), (tower, weight)
    last = [*model.towers][-1]
    _, cache_of = model.tower(last).run_with_cache(
        inputs(name)["input_ids"], names_filter="blocks.1.hook_resid_post"
    )
    _, wanted = (
        plain(name)
        .tower(last)
        .run_with_cache(inputs(name)["input_ids"], names_filter="blocks.1.hook_resid_post")
    )
    assert torch.equal(cache_of["blocks.1.hook_resid_post"], wanted["blocks.1.hook_resid_post"])


@quiet
@pytest.mark.parametrize("name", MAPS)
def test_a_traced_model_of_a_name_is_spread_when_it_first_runs(name: str, tmp_path: Path) -> None:
    model = TracedModel(name, device_map=MAPS[name]["shards"], offload_folder=str(tmp_path))
    site = SITES[name][0]
    with model.edit() as (_, edited):
        edited.site(site)[:] = 0
    assert not model.dispatched
    pairs = []
    for traced in (model, mm.load(name, engine="nnsight", device="cpu")):
        with traced.trace(**inputs(name)) as tracer:
            value = traced.site(site).save()
            output = tracer.result.save()
        pairs.append((value, answer(output)))
    assert torch.equal(pairs[0][0], pairs[1][0])
    assert torch.equal(pairs[0][1], pairs[1][1])
    want = plain(name).run(inputs(name), read=[site])
    assert model.dispatched
    assert any(p.is_meta for p in model.wrapped.parameters())
    assert edited.wrapped is not model.wrapped
    zeroed = edited.run(inputs(name), read=[site])
    assert edited.wrapped is model.wrapped
    assert not zeroed[site].any()
    emptied = plain(name).run(inputs(name), edit=[mm.Edit(site, torch.zeros_like)]).output
    assert torch.equal(answer(zeroed.output), answer(emptied))
    assert torch.equal(answer(model.run(inputs(name)).output), answer(want.output))


# -- diffusers ------------------------------------------------------------------------------------

CALL: dict[str, Any] = {"prompt": "a red circle", "num_inference_steps": 2, "seed": 3, "output_type": "pt"}
DENOISER = ("denoiser.blocks.0.cross_attn.hook_pattern", "denoiser.hook_out")


@quiet
@each_engine
def test_a_pipeline_takes_a_part_that_is_spread(engine: str, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(
        f"{zoo.path('tiny-sd')}/unet", device_map={"": "disk"}, offload_folder=str(tmp_path)
    )
    assert all(p.is_meta for p in unet.parameters())
    model = mm.load("tiny-sd", engine=engine, unet=unet)
    edit = [mm.Edit(DENOISER[0], lambda x: 0.5 * x)]
    for edits in ([], edit):
        want = plain("tiny-sd").run(CALL, read=DENOISER, edit=edits)
        got = model.run(CALL, read=DENOISER, edit=edits)
        for site in DENOISER:
            assert torch.equal(got[site], want[site]), site
        assert torch.equal(got.output.images, want.output.images)


@quiet
@each_engine
def test_one_model_of_diffusers_is_spread(engine: str, tmp_path: Path) -> None:
    folder = f"{zoo.path('tiny-sd')}/unet"
    blocks = (
        "conv_in",
        "time_embedding",
        "down_blocks",
        "mid_block",
        "up_blocks",
        "conv_norm_out",
        "conv_out",
    )
    where = dict(zip(blocks, ["cpu", "cpu", "disk", "disk", "cpu", "disk", "cpu"], strict=True))
    model = mm.load(folder, engine=engine, device_map=where, offload_folder=str(tmp_path))
    assert sum(p.is_meta for p in model.wrapped.parameters()) > 10
    whole = mm.load(folder, device="cpu")
    config = whole.wrapped.config
    call = {
        "sample": torch.randn(1, config.in_channels, config.sample_size, config.sample_size),
        "timestep": torch.tensor([7]),
        "encoder_hidden_states": torch.randn(1, 5, config.cross_attention_dim),
    }
    got, want = (m.run(call, read=DENOISER[:1], grad_of=lambda out: out.sample.sum()) for m in (model, whole))
    assert torch.equal(got.output.sample, want.output.sample)
    assert torch.equal(got[DENOISER[0]], want[DENOISER[0]])
    assert torch.equal(got.grads[DENOISER[0]], want.grads[DENOISER[0]])


@each_engine
def test_a_whole_pipeline_on_one_device(engine: str) -> None:
    model = mm.load("tiny-sd", engine=engine, device_map="cpu")
    want = plain("tiny-sd").run(CALL, read=DENOISER)
    assert torch.equal(model.run(CALL, read=DENOISER)[DENOISER[0]], want[DENOISER[0]])


# -- What is refused ------------------------------------------------------------------------------

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "two places": ("tiny-clip", {"device": "cpu", "device_map": "auto"}, "both say where the weights go"),
    "no module": ("tiny-clip", {"device_map": {"vision_tower": "cpu"}}, "'vision_tower'.*vision_model"),
    "no device": ("tiny-clip", {"device_map": {"": "gpu"}}, "no device 'gpu' here"),
    "no strategy": ("tiny-clip", {"device_map": "automatic"}, "no device 'automatic' here"),
    "no map": ("tiny-clip", {"device_map": {}}, r"\{'': 'cpu'\}"),
    "no place": ("tiny-clip", {"device_map": {"": None}}, "None is no place"),
    "meta": ("tiny-clip", {"device_map": "meta"}, "pass device='meta'"),
    "a pipeline's map": ("tiny-sd", {"device_map": {"unet": "cpu"}}, "'balanced'.*load\\(name, unet=part"),
    "a pipeline's strategy": ("tiny-sd", {"device_map": "auto"}, "'balanced'"),
    "open_clip": ("open_clip:ViT-B-32", {"device_map": "cpu"}, "does not take device_map="),
}


@pytest.mark.parametrize(("name", "options", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("lazy", [False, True])
def test_a_map_that_places_nothing_is_refused_before_weights_are_read(
    name: str, options: dict[str, Any], message: str, lazy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import DiffusionPipeline
    from transformers import PreTrainedModel

    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("Weights were read before the error.")

    for cls in (DiffusionPipeline, PreTrainedModel):
        monkeypatch.setattr(cls, "from_pretrained", classmethod(read))
    with pytest.raises(mm.InputError, match=message):
        TracedModel(name, **options) if lazy else mm.load(name, **options)


@quiet
def test_nan_on_the_disk_is_found(tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(zoo.path("tiny-clip"), tmp_path / "copy"))
    weights = load_file(folder / "model.safetensors")
    weights["text_projection.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(mm.CheckpointError, match=r"text_projection\.weight holds NaN"):
        mm.load(folder, device_map={"": "disk"}, offload_folder=str(tmp_path / "off"))


# -- Packed weights -------------------------------------------------------------------------------


@each_engine
@pytest.mark.parametrize("name", ["tiny-llava", "tiny-sd/unet"])
def test_a_quantization_config_reaches_the_library_with_where_to_compute(
    name: str, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import ModelMixin
    from transformers import PreTrainedModel

    shipped, _, part = name.partition("/")
    folder = f"{zoo.path(shipped)}/{part}" if part else str(zoo.path(shipped))
    given: list[dict[str, Any]] = []
    base: Any = ModelMixin if part else PreTrainedModel
    read = base.from_pretrained.__func__

    def from_pretrained(cls: Any, *args: Any, quantization_config: Any = None, **options: Any) -> Any:
        given.append({"quantization_config": quantization_config, **options})
        return read(cls, *args, **options)

    monkeypatch.setattr(base, "from_pretrained", classmethod(from_pretrained))
    config = object()
    mm.load(folder, engine=engine, device="cpu", quantization_config=config)
    (options,) = given
    assert options["quantization_config"] is config
    assert options["device_map"] == {"": torch.device("cpu")}


@each_engine
def test_int8_weights_read_and_edit_as_the_librarys_own_model_does(engine: str) -> None:
    """Against transformers' own model with the same packed weights, and plain hooks on it."""
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import LlavaForConditionalGeneration, TorchAoConfig

    def config() -> Any:
        return TorchAoConfig(quantization.Int8WeightOnlyConfig())

    folder, site = str(zoo.path("tiny-llava")), "language.blocks.1.hook_resid_post"
    theirs = LlavaForConditionalGeneration.from_pretrained(
        folder, quantization_config=config(), device_map={"": "cpu"}, dtype=torch.float32
    )
    model = mm.load(folder, engine=engine, quantization_config=config())
    fc = model.wrapped.model.language_model.layers[0].mlp.up_proj.weight
    assert type(fc) not in (torch.Tensor, torch.nn.Parameter)
    if engine == "hooked":
        own = theirs.model.language_model.layers[1].self_attn.q_proj.weight.dequantize()
        heads = own.unflatten(0, (model.language.cfg.n_heads, -1)).mT
        assert torch.equal(model.language.blocks[1].attn.W_Q, heads)
    call, kept = inputs("tiny-llava"), []
    block = theirs.model.language_model.layers[1]
    handle = block.register_forward_hook(lambda m, a, out: kept.append(out) or 1.5 * out)
    with torch.no_grad():
        edited = theirs(**call).logits
        handle.remove()
        logits = theirs(**call).logits
        run = model.run(call, read=[site])
        assert torch.equal(run[site], kept[0])
        assert torch.equal(run.output.logits, logits)
        assert torch.equal(model.run(call, edit=[mm.Edit(site, lambda x: 1.5 * x)]).output.logits, edited)
        assert not torch.equal(logits, plain("tiny-llava").run(call).output.logits)


@pytest.mark.filterwarnings("ignore")  # torchao's own.
def test_a_pipelines_part_is_packed() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    from diffusers import PipelineQuantizationConfig, TorchAoConfig

    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    model = mm.load("tiny-sd", quantization_config=PipelineQuantizationConfig(quant_mapping={"unet": config}))
    packed = [p for p in model.wrapped.unet.parameters() if type(p) is not torch.nn.Parameter]
    assert packed
    got, want = (m.run(CALL, read=DENOISER)[DENOISER[1]] for m in (model, plain("tiny-sd")))
    assert not torch.equal(got, want)
    assert torch.nn.functional.cosine_similarity(got.flatten(), want.flatten(), 0) > 0.99


def test_a_packed_pipeline_whose_text_encoder_lacks_a_weight_is_refused(tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(zoo.path("tiny-sd"), tmp_path / "copy"))
    file = folder / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    name = next(n for n in weights if n.endswith("mlp.fc1.weight"))
    del weights[name]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(mm.CheckpointError, match="lacks 1 weight"):  # Before diffusers is asked.
        mm.load(folder, quantization_config=object())


def test_a_service_spreads_a_model_of_a_key_and_the_key_says_nothing_of_it(tmp_path: Path) -> None:
    name, site = "tiny-llava", SITES["tiny-llava"][0]
    here = spread(name, "shards", tmp_path, "nnsight")
    key = here.to_model_key()
    assert key == mm.load(name, engine="nnsight").to_model_key()
    assert "device_map" not in key
    served = TracedModel.from_model_key(key, dispatch=True, dtype="float32", device_map={"": "disk"})
    assert all(p.is_meta for p in served.wrapped.parameters())
    want = plain(name).run(inputs(name), read=[site])
    assert torch.equal(served.run(inputs(name), read=[site])[site], want[site])
