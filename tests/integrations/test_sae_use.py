"""SAEs in a model: splicing, loading, evaluating, looking, steering."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig, TrainingSAE
from sae_lens.training.activations_store import ActivationsStore
from safetensors.torch import save_file
from tiny import CASES

import mm_adapters as mm
from integrations import sae_lens as mm_sae
from mm_adapters import CheckpointError, InputError, MissingSiteError
from mm_adapters.store import Store

SITE = "vision.blocks.1.hook_resid_post"


def sae_at(site: str, d_in: int, d_sae: int = 64, **metadata: Any) -> Any:
    torch.manual_seed(3)
    made = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=d_sae))
    made.cfg.metadata.hook_name = site
    for key, value in metadata.items():
        setattr(made.cfg.metadata, key, value)
    return made


PLACES = {
    "clip": SITE,
    "siglip": "vision.blocks.1.attn.hook_z",
    "llava": "projector.hook_out",
    "llava_mistral": "language.blocks.1.hook_mlp_out",
    "unet": "denoiser.resnets.1.hook_out",
    "stable_diffusion": "denoiser.blocks.1.hook_resid_post",
}


def width(lens: Any, case: Any, site: str) -> int:
    value = lens.run(case.inputs, read=[site])[site]
    axes = lens.sitemap[site].axes
    if axes[1] == "channel":
        return value.shape[-3]
    return value.shape[-1] * (value.shape[-2] if axes[2].startswith("head") else 1)


@pytest.mark.parametrize("name", PLACES)
def test_a_splice_with_the_error_term_changes_nothing_and_without_it_does(name: str) -> None:
    case = CASES[name]()
    lens = mm.wrap(case.model)
    site = PLACES[name]
    sae = sae_at(site, width(lens, case, site))
    plain = case.head(lens.run(case.inputs).output)
    run = lens.run(case.inputs, edit=mm_sae.splice(lens, sae, use_error_term=True))
    assert (case.head(run.output) - plain).abs().max() <= 1e-5
    run = lens.run(case.inputs, edit=mm_sae.splice(lens, sae))
    assert (case.head(run.output) - plain).abs().max() > 1e-3
    # SAELens' verbs compute the error term SAELens' way.
    inputs = {k: v for k, v in case.inputs.items() if k != "seed"}
    fresh = (lambda: inputs | {"seed": 0}) if name == "stable_diffusion" else (lambda: inputs)
    call = lens.wrapped if name != "stable_diffusion" else None
    if call is not None:
        spliced = lens.run_with_saes(saes=[sae], use_error_term=True, **fresh())
        assert (case.head(spliced) - plain).abs().max() <= 1e-5
        spliced = lens.run_with_saes(saes=[sae], **fresh())
        assert torch.equal(case.head(spliced), case.head(run.output))
    assert not lens.acts_to_saes


def test_both_engines_splice_alike() -> None:
    case = CASES["clip"]()
    lenses = [mm.wrap(case.model), mm.wrap(case.model, engine="nnsight")]
    sae = sae_at(SITE, 32)
    change = lambda acts: acts * 1.5  # noqa: E731
    outputs = [
        case.head(lens.run(case.inputs, edit=mm_sae.splice(lens, sae, change=change)).output)
        for lens in lenses
    ]
    assert torch.equal(outputs[0], outputs[1])


def test_an_update_and_a_transcoder_are_spliced_between_two_sites() -> None:
    case = CASES["clip_vision"]()
    lens = mm.wrap(case.model)
    plain = case.head(lens.run(case.inputs).output)
    block = "vision.blocks.1."
    sae = sae_at(f"{block}hook_resid_post", 32, hook_name_minus=f"{block}hook_resid_pre")
    read = [f"{block}hook_resid_pre", f"{block}hook_resid_post"]
    run = lens.run(case.inputs, read=read)
    made = run[read[0]] + sae(run[read[1]] - run[read[0]])
    want = case.head(lens.run(case.inputs, edit=[mm.Edit(read[1], lambda v: made)]).output)
    found = case.head(lens.run(case.inputs, edit=mm_sae.splice(lens, sae)).output)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-6)
    found = case.head(lens.run(case.inputs, edit=mm_sae.splice(lens, sae, use_error_term=True)).output)
    assert (found - plain).abs().max() <= 1e-5
    transcoder = sae_at(f"{block}ln2.hook_normalized", 32, hook_name_out=f"{block}hook_mlp_out")
    value = lens.run(case.inputs, read=[f"{block}ln2.hook_normalized"])[f"{block}ln2.hook_normalized"]
    edit = mm.Edit(f"{block}hook_mlp_out", lambda v: transcoder(value))
    want = case.head(lens.run(case.inputs, edit=[edit]).output)
    found = case.head(lens.run(case.inputs, edit=mm_sae.splice(lens, transcoder)).output)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-6)
    found = case.head(lens.run_with_saes(saes=[transcoder], **case.inputs))
    torch.testing.assert_close(found, want, rtol=0, atol=1e-6)


def test_saelens_verbs_cache_hook_and_restore() -> None:
    case = CASES["clip"]()
    model = mm.wrap(case.model)
    sae = sae_at(SITE, 32)
    _, cache = model.run_with_cache(**case.inputs)
    plain = model(**case.inputs)
    out, spliced = model.run_with_cache_with_saes(saes=[sae], **case.inputs)
    acts = spliced[f"{SITE}.hook_sae_acts_post"]
    assert torch.equal(acts, sae.encode(cache[SITE]))
    assert torch.equal(spliced[SITE], sae(cache[SITE]))
    assert torch.equal(spliced[f"{SITE}.hook_sae_output"], spliced[SITE])

    def zero(acts: torch.Tensor, hook: Any) -> torch.Tensor:
        return torch.zeros_like(acts)

    hooks = [(f"{SITE}.hook_sae_acts_post", zero)]
    hooked = model.run_with_hooks_with_saes(saes=[sae], fwd_hooks=hooks, **case.inputs)
    bias = mm.Edit(SITE, lambda v: sae.b_dec.detach().expand_as(v).clone())
    want = case.head(model.run(case.inputs, edit=[bias]).output)
    torch.testing.assert_close(case.head(hooked), want, rtol=0, atol=1e-6)
    model.add_sae(sae)
    assert list(model.acts_to_saes) == [SITE]
    other = sae_at(SITE, 32, 96)
    with model.saes([other]):
        assert model.acts_to_saes[SITE] is other
    assert model.acts_to_saes[SITE] is sae
    torch.testing.assert_close(case.head(model(**case.inputs)), case.head(out), rtol=0, atol=1e-5)
    model.reset_saes()
    assert torch.equal(case.head(model(**case.inputs)), case.head(plain))
    assert not any(point._forward_hooks for point in model.points.by_name.values())


def test_an_sae_of_patches_leaves_the_class_token_alone(clip: Any, images: list[Any]) -> None:
    sae = sae_at(SITE, 128)
    texts = ["a red circle"]
    _, plain = clip.run_with_cache(text=texts, images=images[:2], names_filter=SITE)
    _, cache = clip.run_with_cache_with_saes(
        text=texts, images=images[:2], saes=[sae], tokens="patch", names_filter=SITE
    )
    assert torch.equal(cache[SITE][:, 0], plain[SITE][:, 0])
    assert torch.equal(cache[SITE][:, 1:], sae(plain[SITE])[:, 1:])


def test_what_does_not_fit_is_said() -> None:
    case = CASES["clip"]()
    model = mm.wrap(case.model)
    with pytest.raises(MissingSiteError, match="nearest"):
        model.run_with_saes(saes=[sae_at("vision.blocks.1.hook_resid_pots", 32)], **case.inputs)
    with pytest.raises(InputError, match="has 32 numbers a position and this SAE takes 33"):
        model.run_with_saes(saes=[sae_at(SITE, 33)], **case.inputs)
    assert not model.acts_to_saes
    with pytest.raises(InputError, match="no hook_name"):
        mm_sae.splice(model, sae_at("", 32))
    with pytest.raises(InputError, match="latents 0 to 63"):
        mm_sae.steer(model, sae_at(SITE, 32), 64, "add")
    with pytest.raises(InputError, match="'add', 'ablate' or 'clamp'"):
        mm_sae.steer(model, sae_at(SITE, 32), 0, "kill")  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["add", "clamp", "ablate"])
def test_steering_moves_the_site_along_the_latents_direction(how: Any) -> None:
    case = CASES["clip"]()
    model = mm.wrap(case.model)
    sae = sae_at(SITE, 32)
    value = model.run(case.inputs, read=[SITE])[SITE]
    acts = sae.encode(value)[..., 7:8]
    moved = model.run(case.inputs, read=[SITE], edit=mm_sae.steer(model, sae, 7, how, 2.0))[SITE]
    by = {"add": 2.0, "clamp": 2.0 - acts, "ablate": -acts}[how]
    torch.testing.assert_close(moved, value + by * sae.W_dec[7], rtol=0, atol=1e-5)


# ---- files of others -----------------------------------------------------------------------------


def weights(d: int = 6, n: int = 20) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    return {
        "enc": torch.randn(n, d),
        "b_enc": torch.randn(n),
        "dec": torch.randn(d, n),
        "b_dec": torch.randn(d),
    }


def topk(pre: torch.Tensor, k: int) -> torch.Tensor:
    top = pre.topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())


def write(
    folder: Path, state: dict[str, torch.Tensor], config: dict[str, Any], name: str = "config.json"
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "weights.safetensors")
    (folder / name).write_text(json.dumps(config))
    return folder


def test_public_formats_give_what_their_own_code_gives(tmp_path: Path) -> None:
    w = weights()
    x = torch.randn(9, 6)
    centred = (x - w["b_dec"]) @ w["enc"].T + w["b_enc"]
    relu = centred.relu() @ w["dec"].T + w["b_dec"]
    few = topk(centred, 4) @ w["dec"].T + w["b_dec"]
    own = {"W_enc": w["enc"].T, "b_enc": w["b_enc"], "W_dec": w["dec"].T, "b_dec": w["b_dec"]}
    unbox = {
        "encoder.weight": w["enc"],
        "decoder.weight": w["dec"],
        "pre_bias": w["b_dec"],
        "latent_bias": w["b_enc"],
    }
    sparsify = {
        "encoder.weight": w["enc"],
        "encoder.bias": w["b_enc"],
        "W_dec": w["dec"].T,
        "b_dec": w["b_dec"],
    }
    named = {"encoder.weight": w["enc"][None], "encoder.bias": w["b_enc"][None],
             "decoder.weight": w["dec"][None],
             "pre_encoder_bias._bias_reference": w["b_dec"][None]}  # fmt: skip
    cases = {
        "vit_prisma": (own, {"hook_point": "blocks.9.hook_mlp_out"}, relu),
        "patch_sae": (own, {"block_layer": 11}, relu),
        "discover_then_name": (named, {}, relu),
        "sdxl_unbox": (unbox, {"k": 4}, few),
        "saeuron": (sparsify, {"k": 4}, few),
    }
    assert set(cases) == set(mm_sae.CONVERTERS)
    for name, (state, config, want) in cases.items():
        folder = write(tmp_path / name, state, config)
        sae = mm_sae.load(folder)
        torch.testing.assert_close(sae(x), want, rtol=1e-5, atol=1e-5, msg=name)
        assert sae.cfg.metadata.source.replace("-", "_").lower() in (name, "patchsae", "discover_then_name")
        sae.save_model(tmp_path / "again" / name)
        torch.testing.assert_close(mm_sae.load(tmp_path / "again" / name)(x), sae(x))
    prisma = mm_sae.load(tmp_path / "vit_prisma")
    assert prisma.cfg.metadata.hook_name == "vision.blocks.9.hook_mlp_out"
    assert mm_sae.load(
        tmp_path / "saeuron", site="denoiser.blocks.4.hook_resid_post"
    ).cfg.metadata.hook_name == ("denoiser.blocks.4.hook_resid_post")


def test_a_checkpoint_is_loaded_as_what_it_is(tmp_path: Path) -> None:
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=6, d_sae=20, k=3))
    sae.save_model(tmp_path / "checkpoint")
    sae.save_inference_model(tmp_path / "finished")
    assert isinstance(mm_sae.load(tmp_path / "checkpoint"), TrainingSAE)
    assert not isinstance(mm_sae.load(tmp_path / "finished"), TrainingSAE)
    with pytest.raises(CheckpointError, match="is a finished SAE"):
        mm_sae.load(tmp_path / "finished", cls=TrainingSAE)
    with pytest.raises(CheckpointError, match="is a training checkpoint"):
        mm_sae.load(tmp_path / "checkpoint", cls=SAE)
    with pytest.raises(CheckpointError, match="no folder"):
        mm_sae.load(tmp_path / "nothing")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "sae.pt").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="a pickle, which can run code"):
        mm_sae.load(tmp_path / "pickled")
    with pytest.raises(CheckpointError, match="no SAE known here"):
        mm_sae.load(write(tmp_path / "odd", {"a": torch.zeros(2)}, {}))


def test_cached_activations_go_to_saelens_and_back(clip: Any, images: list[Any], tmp_path: Path) -> None:
    store = mm_sae.collect(clip, SITE, images[:6], tmp_path / "s", batch_size=4, progress=False)
    data = mm_sae.export_cached(store, SITE, tmp_path / "hf", context_size=65)
    theirs = ActivationsStore(
        model=None,
        dataset=None,
        streaming=False,
        hook_name=SITE,
        hook_head_index=None,
        context_size=65,
        d_in=128,
        n_batches_in_buffer=4,
        total_training_tokens=390,
        store_batch_size_prompts=2,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        train_batch_size_tokens=65,
        cached_activations_path=str(data),
    )
    batch = next(theirs)
    rows = store.rows()[SITE]
    known = {row.numpy().tobytes() for row in rows}
    assert all(row.numpy().tobytes() in known for row in batch.reshape(-1, 128))
    again = mm_sae.import_cached(data, tmp_path / "back")
    assert torch.equal(again.rows()[SITE], rows)
    with pytest.raises(InputError, match="no multiple of context_size=64"):
        mm_sae.export_cached(store, SITE, tmp_path / "no", context_size=64)


# ---- collecting ----------------------------------------------------------------------------------


def test_rows_are_those_of_the_chosen_tokens_and_say_where_from(
    clip: Any, images: list[Any], tmp_path: Path
) -> None:
    value = clip.run({"images": images[:5], "text": ["."]}, read=[SITE])[SITE]
    for tokens, positions in (("class", [0]), ("patch", list(range(1, 65))), ("all", list(range(65)))):
        store = mm_sae.collect(
            clip, SITE, images[:5], tmp_path / tokens, tokens=tokens, batch_size=2, progress=False
        )
        rows = store.rows()
        want = value[rows["item"].long(), rows["position"].long()]
        torch.testing.assert_close(rows[SITE], want, rtol=0, atol=1e-5)
        assert sorted(set(rows["position"].tolist())) == positions
    with pytest.raises(InputError, match="no position that is 'word'"):
        mm_sae.collect(clip, SITE, images[:5], tmp_path / "word", tokens="word", progress=False)


def test_of_a_sampling_loop_the_conditional_rows_of_the_chosen_steps_are_taken(tmp_path: Path) -> None:
    case = CASES["stable_diffusion"]()
    lens = mm.wrap(case.model)
    place = "denoiser.resnets.1.hook_out"
    inputs = {"num_inference_steps": 3, "output_type": "pt"}
    store = mm_sae.collect(
        lens,
        place,
        ["a cat", "a dog"],
        tmp_path / "s",
        steps=[0, 2],
        inputs=inputs,
        batch_size=1,
        progress=False,
    )
    rows = store.rows()
    for item, prompt in enumerate(["a cat", "a dog"]):
        run = lens.run(inputs | {"prompt": [prompt], "seed": [item]}, read=[mm.Read(place, rows="cond")])
        for step in (0, 2):
            here = (rows["item"] == item) & (rows["step"] == step)
            want = run[place][step][0].flatten(1).T
            torch.testing.assert_close(rows[place][here], want, rtol=0, atol=1e-5)
    assert set(rows["step"].tolist()) == {0, 2}


# ---- evaluating ----------------------------------------------------------------------------------


@torch.no_grad()
def test_scores_are_those_of_the_definitions(clip: Any, images: list[Any]) -> None:
    sae = sae_at(SITE, 128, 200)
    report = mm_sae.evaluate(clip, sae, images[:7], tokens=["class", "patch"], batch_size=3)
    x = clip.run({"images": images[:7], "text": ["."]}, read=[SITE])[SITE]
    for scores, rows in ((report.overall, x.flatten(0, 1)), (report.by_role["class"], x[:, 0])):
        acts = sae.encode(rows)
        left = (rows - sae.decode(acts)).square().sum() / (rows - rows.mean(0)).square().sum()
        assert scores.n_rows == len(rows)
        assert scores.explained == pytest.approx(1 - float(left), rel=1e-4)
        assert scores.l0 == pytest.approx(float((acts > 0).sum(-1).float().mean()))
        assert scores.dead == pytest.approx(float((acts == 0).all(0).float().mean()))


def test_a_perfect_sae_recovers_everything_and_zeros_nothing(clip: Any, images: list[Any]) -> None:
    sae = sae_at(SITE, 128, 256)
    with torch.no_grad():  # x = relu(x) - relu(-x)
        eye = torch.eye(128)
        sae.W_enc.copy_(torch.cat([eye, -eye], 1))
        sae.W_dec.copy_(torch.cat([eye, -eye]))
        sae.b_enc.zero_()
    inputs = {"text": ["a picture on a white background", "a picture on a black background"]}
    plain = clip.run({"images": images[:12]} | inputs).output.logits_per_image.argmax(-1)
    report = mm_sae.evaluate(clip, sae, images[:12], inputs=inputs, score=mm_sae.zero_shot(plain.tolist()))
    assert report.overall.explained == pytest.approx(1, abs=1e-5)
    assert report.recovered is not None
    assert report.recovered.plain == report.recovered.sae == 1
    assert report.recovered.of_zero == 1
    assert report.recovered.zero < 1
    assert "recovered of zeros" in str(report)


def test_noise_is_recovered_by_a_perfect_sae_at_each_step() -> None:
    case = CASES["stable_diffusion"]()
    lens = mm.wrap(case.model)
    place = "denoiser.blocks.1.hook_resid_post"
    n = width(lens, case, place)
    inputs = {"num_inference_steps": 2, "output_type": "pt"}
    sae = sae_at(place, n, 2 * n)
    rough = mm_sae.noise_recovered(lens, sae, ["a cat"], [0, 1], inputs=inputs)
    with torch.no_grad():
        eye = torch.eye(n)
        sae.W_enc.copy_(torch.cat([eye, -eye], 1))
        sae.W_dec.copy_(torch.cat([eye, -eye]))
    found = mm_sae.noise_recovered(lens, sae, ["a cat"], [0, 1], inputs=inputs)
    assert list(found) == [0, 1]
    assert all(v > 0.999 for v in found.values())
    assert all(rough[s] < found[s] for s in found)


def test_monosemanticity_equals_the_sum_over_pairs() -> None:
    acts, points = torch.rand(12, 3), torch.randn(12, 5)
    acts[:, 2] = 0
    acts[4, 2] = 1
    found = mm_sae.monosemanticity(acts, points)
    unit = points / points.norm(dim=-1, keepdim=True)
    for k in range(2):
        a = (acts[:, k] - acts[:, k].min()) / (acts[:, k].max() - acts[:, k].min())
        pairs = [
            (float(a[i] * a[j]), float(unit[i] @ unit[j])) for i in range(12) for j in range(12) if i != j
        ]
        want = sum(r * s for r, s in pairs) / sum(r for r, _ in pairs)
        assert float(found[k]) == pytest.approx(want, rel=1e-4)
    assert torch.isnan(found[2])


def test_a_planted_concept_is_found_and_chance_is_low() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(400, 3, generator=generator) < 0.3
    acts = torch.rand(400, 50, generator=generator) * (torch.rand(400, 50, generator=generator) < 0.3)
    acts[:, 11] = truth[:, 0] * 2.0 + 0.1 * torch.rand(400, generator=generator)
    acts[:, 31] = truth[:, 1].float()
    match = mm_sae.match_concepts(acts, truth, ["a", "b", "c"])
    assert match.latent[:2] == (11, 31)
    assert match.f1[:2] == (1.0, 1.0)
    assert match.f1[2] < 0.6
    assert max(match.chance) < 0.6
    assert match.share() == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="never: true of all or of no image"):
        mm_sae.match_concepts(acts, torch.zeros(400, 1, dtype=torch.bool), ["never"])


# ---- looking -------------------------------------------------------------------------------------


def test_top_images_are_those_of_one_big_pass(clip: Any, images: list[Any], tmp_path: Path) -> None:
    sae = sae_at(SITE, 128)
    found = mm_sae.top_images(clip, sae, images, [2, 9], n=4, words=["red", "blue", "green"], batch_size=5)
    x = clip.run({"images": images, "text": ["."]}, read=[SITE])[SITE]
    acts = sae.encode(x[:, 1:])
    for latent, one in zip([2, 9], found, strict=True):
        order = acts[..., latent].amax(1).topk(4).indices
        assert one.items == tuple(order.tolist())
        torch.testing.assert_close(one.maps, acts[order, :, latent].unflatten(1, (8, 8)), rtol=0, atol=1e-4)
        assert one.share_active == pytest.approx(float((acts[..., latent] > 0).float().mean()), abs=1e-6)
        assert sorted(one.words) == ["blue", "green", "red"]
    figure = mm_sae.gallery(found[0], images)
    figure.savefig(tmp_path / "g.png")
    labels = [axis.get_ylabel() for axis in figure.axes] + [axis.get_xlabel() for axis in figure.axes]
    assert "activation" in labels
    assert np.asarray(plt.imread(tmp_path / "g.png")).std() > 0.05
    plt.close(figure)


def test_the_command_trains_and_says_what_is_wrong(images: list[Any], tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from mm_adapters.cli import build

    folder = tmp_path / "images"
    folder.mkdir()
    for i, image in enumerate(images[:8]):
        image.save(folder / f"{i}.png")
    config = tmp_path / "sae.yaml"
    config.write_text(
        "architecture: batchtopk\nd_in: 128\nd_sae: 256\nk: 8\n"
        "trainer: {total_training_samples: 2560, train_batch_size_samples: 128, lr_end: 0.0001}\n"
    )

    point = EntryPoint("integrations", "integrations.commands:register", "mm_interp.commands")
    app = build([point])
    base = ["sae", "train", "--model", "tiny-clip", "--images", str(folder), "--tokens", "patch"]
    done = CliRunner().invoke(
        app, [*base, "--site", SITE, "--config", str(config), "--out", str(tmp_path / "o")]
    )
    assert done.exit_code == 0, done.output
    assert "256 latents" in done.output
    assert mm_sae.load(tmp_path / "o" / "sae").cfg.metadata.token_kind == "patch"
    config.write_text("architecture: batchtop\n")
    done = CliRunner().invoke(
        app, [*base, "--site", SITE, "--config", str(config), "--out", str(tmp_path / "p")]
    )
    assert done.exit_code == 2
    assert "there is abstopk, batchtopk" in done.output
    config.write_text("architecture: batchtopk\nd_inn: 3\n")
    done = CliRunner().invoke(
        app, [*base, "--site", SITE, "--config", str(config), "--out", str(tmp_path / "p")]
    )
    assert done.exit_code == 2
    assert "no 'd_inn'; it has" in done.output


def test_a_collected_store_is_resumed(clip: Any, images: list[Any], tmp_path: Path) -> None:
    class Dying:
        def __init__(self, inner: Any, runs: int) -> None:
            self.inner, self.left = inner, runs

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def run(self, *args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise InterruptedError
            return self.inner.run(*args, **kwargs)

    options = {"batch_size": 4, "tokens": "class", "progress": False}
    mm_sae.collect(clip, SITE, images[:20], tmp_path / "whole", **options)
    with pytest.raises(InterruptedError):
        mm_sae.collect(Dying(clip, 3), SITE, images[:20], tmp_path / "cut", **options)
    mm_sae.collect(clip, SITE, images[:20], tmp_path / "cut", **options)
    a, b = (Store(tmp_path / n).rows() for n in ("whole", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a)
