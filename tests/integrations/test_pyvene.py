"""pyvene on CLIP, LLaVA and Stable Diffusion: its interventions do what ours do, and touch nobody's hooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers as df
import padded
import pytest
import pyvene as pv
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from tiny import CASES, Case

import mm_adapters as mm
from integrations import pyvene as mm_pv
from mm_adapters import CheckpointError, Edit, InputError, MissingSiteError

# A site, and the base and source rows of the case's two.
SITES = {
    "clip": "vision.blocks.1.hook_resid_post",
    "siglip": "vision.blocks.1.hook_mlp_out",
    "llava": "language.blocks.1.hook_resid_post",
    "llava_siglip_qwen": "language.blocks.1.hook_attn_out",
    "unet": "denoiser.blocks.1.hook_resid_post",
}


@pytest.fixture(params=sorted(SITES))
def case(request: pytest.FixtureRequest) -> tuple[Case, str]:
    return CASES[request.param](), SITES[request.param]


def swapped(case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    """The inputs, and the same with their two rows in the other order."""
    base = dict(case.inputs)
    return base, {k: v.flip(0) if isinstance(v, torch.Tensor) and v.ndim else v for k, v in base.items()}


def made(case: Case, site: str, kind: Any, **options: Any) -> mm_pv.MMIntervenableModel:
    one = mm_pv.intervention(case.model, site, kind, **options)
    return mm_pv.MMIntervenableModel(pv.IntervenableConfig([one]), case.model)


def test_an_interchange_is_what_our_own_edit_gives(case: tuple[Case, str]) -> None:
    model, site = case
    base, source = swapped(model)
    lens = mm.wrap(model.model)
    value = lens.run(source, read=[site])[site]
    positions = [1, 3]

    def put(here: torch.Tensor) -> torch.Tensor:
        return value[:, positions]

    want = model.head(lens.run(base, edit=[Edit(site, put, positions=positions)]).output)
    found = made(model, site, pv.VanillaIntervention, max_number_of_units=2)
    _, output = found(base, [source], mm_pv.units(positions, 2))
    torch.testing.assert_close(model.head(output), want, rtol=0, atol=1e-6)
    assert not torch.equal(model.head(output), model.head(model.model(**base)))


def hooks_of(model: Any) -> dict[str, list[int]]:
    return {n: [*m._forward_hooks, *m._forward_pre_hooks] for n, m in model.named_modules()}


def test_hooks_of_others_survive_and_the_model_is_as_before(case: tuple[Case, str]) -> None:
    model, site = case
    base, source = swapped(model)
    called = []
    handle = model.model.register_forward_hook(lambda *a: called.append(1))
    plain = model.head(model.model(**base))
    before = hooks_of(model.model)
    found = made(model, site, pv.VanillaIntervention)
    n = len(called)
    found(base, [source], {"sources->base": 1})
    assert len(called) == n + 2
    assert torch.equal(model.head(model.model(**base)), plain)
    assert hooks_of(model.model) == before
    assert all(p.requires_grad for p in model.model.parameters())
    handle.remove()


@pytest.mark.parametrize("name", ["clip_vision", "llava"])
def test_transformers_hidden_states_survive(name: str) -> None:
    case = CASES[name]()
    base, source = swapped(case)
    before = case.model(**base, output_hidden_states=True).hidden_states
    site = "vision.blocks.1.hook_resid_post" if name == "clip_vision" else SITES["llava"]
    made(case, site, pv.VanillaIntervention)(base, [source], {"sources->base": 1})
    after = case.model(**base, output_hidden_states=True).hidden_states
    assert len(after) == len(before) > 1
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_an_interrupted_call_leaves_no_hook() -> None:
    case = CASES["clip_vision"]()
    base, source = swapped(case)

    class Broken(pv.VanillaIntervention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            raise InterruptedError

    found = made(case, "vision.blocks.1.hook_resid_post", Broken)
    with pytest.raises(InterruptedError):
        found(base, [source], {"sources->base": 1})
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in case.model.modules())


@pytest.mark.parametrize("name", ["clip_vision", "llava"])
def test_a_call_interrupted_while_a_source_is_read_leaves_no_hook(name: str) -> None:
    case = CASES[name]()
    site = SITES.get(name, "vision.blocks.1.hook_resid_post")
    base, source = swapped(case)
    case.model(**base)  # transformers puts hooks of its own on a LLaVA at its first run.
    for kind in (pv.VanillaIntervention, pv.CollectIntervention):
        found = made(case, site, kind)
        before = hooks_of(case.model)
        *_, late = [m for m in case.model.modules() if isinstance(m, torch.nn.LayerNorm | torch.nn.Linear)]
        handle = late.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(InterruptedError))
        sources = None if kind is pv.CollectIntervention else [source]
        with pytest.raises(InterruptedError):
            found(base, sources, {"sources->base": 1} if sources else {"base": 1})
        handle.remove()
        assert hooks_of(case.model) == before
        case.model(**base)


THREE = {"clip_vision": "vision.blocks.1.hook_resid_post"} | {n: SITES[n] for n in ("llava", "unet")}
KINDS = {
    "rotated": (pv.RotatedSpaceIntervention, {}),
    "boundless": (pv.BoundlessRotatedSpaceIntervention, {}),
    "low rank": (pv.LowRankRotatedSpaceIntervention, {"low_rank_dimension": 4}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", THREE)
def test_das_learns_and_is_saved_and_loaded(kind: str, name: str, tmp_path: Path) -> None:
    case = CASES[name]()
    base, source = swapped(case)
    site = THREE[name]
    one, options = KINDS[kind]
    found = made(case, site, one, max_number_of_units=3, **options)
    whole = made(case, site, pv.VanillaIntervention, max_number_of_units=3)
    places = mm_pv.units([1, 2, 3], 2)
    want = case.head(whole(base, [source], places)[1]).detach()
    batch = {"base": base, "sources": [source], "unit_locations": places}
    before = {k: v.clone() for k, v in case.model.state_dict().items()}
    done = mm_pv.align(
        found,
        [batch] * 40,
        lambda out, _: (case.head(out) - want).square().mean(),
        lr=2e-2,
        temperature=(5.0, 0.5) if kind == "boundless" else None,
        progress=False,
    )
    assert done.losses[-1] < (1.0 if kind == "rotated" else 0.6) * done.losses[0] or done.losses[0] < 1e-9
    assert all(torch.equal(v, before[k]) for k, v in case.model.state_dict().items())
    found.save(tmp_path)
    again = mm_pv.MMIntervenableModel.load(tmp_path, case.model)
    assert torch.equal(
        case.head(again(base, [source], places)[1]), case.head(found(base, [source], places)[1])
    )
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".safetensors"]


def test_several_patches_share_one_subspace() -> None:
    case = CASES["clip_vision"]()
    one = made(
        case,
        "vision.blocks.1.hook_resid_post",
        pv.LowRankRotatedSpaceIntervention,
        max_number_of_units=5,
        low_rank_dimension=4,
    )
    assert sum(p.numel() for p in one.interventions.parameters()) == 32 * 4


def test_heads_are_units_too() -> None:
    case = CASES["clip_vision"]()
    base, source = swapped(case)
    lens = mm.wrap(case.model)
    site = "vision.blocks.1.attn.hook_z"
    value = lens.run(source, read=[site])[site]

    def put(here: torch.Tensor) -> torch.Tensor:
        here = here.clone()
        here[:, :, 2] = value[:, :, 2]
        return here

    want = case.head(lens.run(base, edit=[Edit(site, put)]).output)
    found = made(case, site, pv.VanillaIntervention, unit="h")
    _, output = found(base, [source], {"sources->base": 2})
    torch.testing.assert_close(case.head(output), want, rtol=0, atol=1e-6)


def test_zero_and_addition(case: tuple[Case, str]) -> None:
    model, site = case
    base, _ = swapped(model)
    lens = mm.wrap(model.model)
    want = model.head(lens.run(base, edit=[Edit(site, torch.zeros_like, positions=[2])]).output)
    _, output = made(model, site, pv.ZeroIntervention)(base, unit_locations={"base": 2})
    torch.testing.assert_close(model.head(output), want, rtol=0, atol=1e-6)
    width = lens.run(base, read=[site])[site].shape[-1]
    vector = torch.linspace(-1, 1, width)
    want = model.head(lens.run(base, edit=[Edit(site, lambda v: v + vector, positions=[2])]).output)
    one = made(model, site, pv.AdditionIntervention, source_representation=vector)
    _, output = one(base, unit_locations={"base": 2})
    torch.testing.assert_close(model.head(output), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", THREE)
def test_an_sae_intervention_without_a_change_changes_nothing_and_with_one_does(
    name: str, tmp_path: Path
) -> None:
    case = CASES[name]()
    base, source = swapped(case)
    site = THREE[name]
    width = mm.wrap(case.model).run(base, read=[site])[site].shape[-1]
    sae = StandardSAE(StandardSAEConfig(d_in=width, d_sae=2 * width))
    plain = case.head(case.model(**base))

    def run(change: Any) -> torch.Tensor:
        found = made(case, site, mm_pv.SAEIntervention(sae, change), max_number_of_units=4)
        return case.head(found(base, unit_locations={"base": [0, 1, 2, 3]})[1])

    torch.testing.assert_close(run(None), plain, rtol=0, atol=1e-5)
    assert (run(lambda acts: 2 * acts) - plain).abs().max() > 1e-3
    some = mm_pv.SAEInterchange(sae, list(range(2 * width)))
    found = made(case, site, some)
    # Not the first position: a decoder's start token is the same in base and source.
    moved = case.head(found(base, [source], {"sources->base": 3})[1])
    found.save(tmp_path)
    again = mm_pv.MMIntervenableModel.load(tmp_path, case.model)
    assert torch.equal(case.head(again(base, [source], {"sources->base": 3})[1]), moved)
    with pytest.raises(InputError, match="A function cannot be saved"):
        made(case, site, mm_pv.SAEIntervention(sae, torch.relu)).save(tmp_path)
    assert (moved - plain).abs().max() > 1e-4


def test_a_pipeline_is_intervened_on_in_some_steps_only() -> None:
    case = CASES["stable_diffusion"]()
    inputs = case.inputs | {"num_inference_steps": 3}
    inputs.pop("seed")
    fresh = lambda: inputs | {"generator": torch.Generator().manual_seed(0)}  # noqa: E731
    site = "denoiser.resnets.1.hook_out"
    lens = mm.wrap(case.model)
    want = lens.run(case.inputs | {"num_inference_steps": 3}, edit=[Edit(site, torch.zeros_like, steps=[1])])
    gate = mm_pv.StepGate(mm_pv.MapIntervention(pv.ZeroIntervention(embed_dim=32, keep_last_dim=True)), [1])
    found = made(case, site, gate)
    _, output = found.generate(fresh(), unit_locations=None)
    torch.testing.assert_close(case.head(output), case.head(want.output), rtol=0, atol=1e-5)
    assert gate.n_steps == 3
    plain = case.head(case.model(**fresh()))
    assert not torch.equal(case.head(output), plain)


def test_every_family_is_registered_from_its_record() -> None:
    for name in ("clip", "siglip", "open_clip", "llama", "llava_mistral", "unet"):
        model = CASES[name]().model
        missing = mm_pv.register(model)
        lens = mm.wrap(model)
        reach = [s for s in lens.sites() if not s.reason and mm_pv.component_of(s) not in missing]
        assert len(reach) > 10, name
        assert any(s.part == "hook_resid_post" for s in reach), name


def test_what_pyvene_cannot_reach_is_said(tmp_path: Path) -> None:
    model = CASES["clip"]().model
    with pytest.raises(MissingSiteError, match="nearest"):
        mm_pv.intervention(model, "vision.blocks.1.hook_resid_pots", pv.VanillaIntervention)
    with pytest.raises(InputError, match=r"Reach it with model\.run"):
        mm_pv.intervention(model, "vision.blocks.1.attn.hook_pattern", pv.VanillaIntervention)
    with pytest.raises(CheckpointError, match=r"no interventions\.json"):
        mm_pv.MMIntervenableModel.load(tmp_path, model)
    found = made(CASES["clip"](), SITES["clip"], pv.VanillaIntervention)
    with pytest.raises(InputError, match="anything to train"):
        mm_pv.align(found, [], lambda out, batch: out, progress=False)


# ---- what would be ignored -----------------------------------------------------------------------


class Zero(pv.ConstantSourceIntervention):
    def forward(self, base: Any, source: Any = None, subspaces: Any = None, **kwargs: Any) -> Any:
        return torch.zeros_like(base)


@pytest.mark.parametrize(
    ("rows", "zeroed"),
    [("all", [0, 1, 2]), (slice(1, 2), [1]), (slice(-1, None), [2]), ([0, -1], [0, 2]), ((1,), [1])],
)
def test_a_gate_acts_on_its_rows_in_its_steps(rows: Any, zeroed: list[int]) -> None:
    gate = mm_pv.StepGate(Zero(embed_dim=3), [1], rows=rows)
    base = torch.arange(1.0, 10).reshape(3, 3)
    want = base.clone()
    want[zeroed] = 0
    assert torch.equal(gate(base), base)
    assert torch.equal(gate(base), want)
    assert torch.equal(gate(base), base)


def sd_run(
    gate: Any, site: str = "denoiser.resnets.1.hook_out", scheduler: Any = None, **options: Any
) -> tuple[Any, Any, Any]:
    """A pipeline's picture with a gate, and what our own edits need to be compared with it."""
    case = CASES["stable_diffusion"]()
    case.model.scheduler = scheduler or case.model.scheduler
    inputs = {k: v for k, v in case.inputs.items() if k != "seed"} | {"num_inference_steps": 3} | options
    one = made(case, site, mm_pv.MapIntervention(gate))
    _, output = one.generate(inputs | {"generator": torch.Generator().manual_seed(0)}, unit_locations=None)
    return case, case.head(output), inputs | {"seed": 0}


@pytest.mark.parametrize("rows", ["cond", "uncond", "all"])
@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_a_gate_knows_the_parts_of_guidance_by_their_names(rows: str, scale: float) -> None:
    gate = mm_pv.StepGate(Zero(embed_dim=32), [0, 2], rows=rows)
    if rows == "uncond" and scale == 1.0:  # Nothing is unconditional.
        with pytest.raises(mm.EditNeverFiredError, match=r"steps \[0, 2\] with rows='uncond'"):
            sd_run(gate, guidance_scale=scale)
        return
    case, found, inputs = sd_run(gate, guidance_scale=scale)
    edit = Edit("denoiser.resnets.1.hook_out", torch.zeros_like, steps=[0, 2], rows=rows)  # type: ignore[arg-type]
    want = mm.wrap(case.model).run(inputs, edit=[edit])
    torch.testing.assert_close(found, case.head(want.output), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scheduler", [df.HeunDiscreteScheduler(), df.PNDMScheduler(skip_prk_steps=True)])
def test_a_gate_counts_the_schedulers_steps(scheduler: Any) -> None:
    case, found, inputs = sd_run(mm_pv.StepGate(Zero(embed_dim=32), [1]), scheduler=scheduler)
    edit = Edit("denoiser.resnets.1.hook_out", torch.zeros_like, steps=[1])
    want = mm.wrap(case.model).run(inputs, edit=[edit])
    torch.testing.assert_close(found, case.head(want.output), rtol=0, atol=1e-5)


def test_a_gate_that_cannot_act_is_said() -> None:
    zero = Zero(embed_dim=32)
    for options in (
        {"steps": []},
        {"steps": [-1]},
        {"steps": [0], "rows": []},
        {"steps": [0], "rows": ["a"]},
    ):
        with pytest.raises(InputError, match=r"steps=|rows="):
            mm_pv.StepGate(zero, **options)
    with pytest.raises(InputError, match=r"no option 'half'\. Did you mean 'rows'"):
        mm_pv.StepGate(zero, [0], half=slice(1, 2))
    with pytest.raises(InputError, match="known inside an MMIntervenableModel"):
        mm_pv.StepGate(zero, [0], rows="cond")(torch.ones(2, 3))
    with pytest.raises(InputError, match="the batch has 2 rows"):
        mm_pv.StepGate(zero, [0], rows=[2])(torch.ones(2, 3))
    with pytest.raises(InputError, match=r"'prior' at denoiser.* there is uncond, cond, all"):
        sd_run(mm_pv.StepGate(zero, [0], rows="prior"))
    with pytest.raises(mm.EditNeverFiredError, match=r"steps \[7\].*the run had 3 steps"):
        sd_run(mm_pv.StepGate(zero, [0, 7]))
    with pytest.raises(InputError, match="CollectIntervention does not work inside a StepGate"):
        mm_pv.StepGate(pv.CollectIntervention(embed_dim=32), [0])
    with pytest.raises(InputError, match="'cond' at vision"):
        made(CASES["clip"](), SITES["clip"], mm_pv.StepGate(zero, [0], rows="cond"))


def test_a_gate_counts_the_steps_of_each_run_anew() -> None:
    case = CASES["stable_diffusion"]()
    inputs = {k: v for k, v in case.inputs.items() if k != "seed"}
    one = made(case, "denoiser.resnets.1.hook_out", mm_pv.MapIntervention(mm_pv.StepGate(Zero(), [0])))
    outputs = [
        case.head(
            one.generate(inputs | {"generator": torch.Generator().manual_seed(0)}, unit_locations=None)[1]
        )
        for _ in range(2)
    ]
    assert torch.equal(*outputs)


def test_positions_of_a_pipeline_are_intervened_on_at_every_step() -> None:
    case = CASES["stable_diffusion"]()
    inputs = {k: v for k, v in case.inputs.items() if k != "seed"} | {"num_inference_steps": 3}
    site = "denoiser.blocks.1.hook_resid_post"
    want = mm.wrap(case.model).run(inputs | {"seed": 0}, edit=[Edit(site, torch.zeros_like, positions=[2])])
    one = made(case, site, pv.ZeroIntervention)
    n_rows = 2 * len(case.inputs["prompt"])
    generator = torch.Generator().manual_seed(0)
    _, output = one.generate(inputs | {"generator": generator}, unit_locations={"base": [[[2]] * n_rows]})
    torch.testing.assert_close(case.head(output), case.head(want.output), rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="use a StepGate"):
        one.generate(inputs, unit_locations=None, intervene_on_prompt=False)


def test_options_that_would_be_ignored_are_errors(tmp_path: Path) -> None:
    case, site = CASES["clip"](), SITES["clip"]
    base, source = swapped(case)
    sae = StandardSAE(StandardSAEConfig(d_in=32, d_sae=64))
    at = lambda kind, **options: mm_pv.intervention(case.model, site, kind, **options)  # noqa: E731
    with pytest.raises(InputError, match=r"no option 'low_rank_dim'\. Did you mean 'low_rank_dimension'"):
        at(pv.LowRankRotatedSpaceIntervention, low_rank_dim=4)
    with pytest.raises(InputError, match="is made already"):
        at(pv.VanillaIntervention(embed_dim=32), use_fast=True)
    with pytest.raises(InputError, match=r"set by the site: .* embed_dim=32"):
        at(pv.VanillaIntervention, embed_dim=31)
    with pytest.raises(InputError, match=r"unit='h': .* has pos"):
        at(pv.VanillaIntervention, unit="h")
    with pytest.raises(InputError, match="at least one"):
        at(pv.VanillaIntervention, max_number_of_units=0)
    with pytest.raises(InputError, match="latents 0 to 63"):
        mm_pv.SAEInterchange(sae, [64])
    with pytest.raises(InputError, match="no option 'latent'"):
        mm_pv.SAEIntervention(sae, latent=3)
    with pytest.raises(InputError, match="keep_last_dim is True"):
        mm_pv.SAEIntervention(sae, keep_last_dim=False)
    with pytest.raises(InputError, match="does not use subspace_partition"):
        mm_pv.SAEInterchange(sae, [0], subspace_partition=[[0, 4], [4, 32]])
    for kind in (mm_pv.SAEInterchange(sae, [0]), pv.BoundlessRotatedSpaceIntervention):
        with pytest.raises(InputError, match="takes no subspaces"):
            made(case, site, kind)(base, [source], {"sources->base": 1}, subspaces=[0])
    with pytest.raises(InputError, match=r"pyvene's forward: .*'subspace'"):
        made(case, site, pv.VanillaIntervention)(base, [source], {"sources->base": 1}, subspace=0)
    config = pv.IntervenableConfig([at(pv.VanillaIntervention)])
    with pytest.raises(InputError, match=r"no option 'fast'\. Did you mean 'use_fast'"):
        mm_pv.MMIntervenableModel(config, case.model, fast=True)
    with pytest.raises(InputError, match="no option 'save_to_hf_hub'"):
        mm_pv.MMIntervenableModel(config, case.model).save(tmp_path, save_to_hf_hub=True)
    with pytest.raises(InputError, match="no option 'from_huggingface_hub'"):
        mm_pv.MMIntervenableModel.load(tmp_path, case.model, from_huggingface_hub=True)
    linked = at(pv.VanillaIntervention)._replace(intervention_link_key=0)
    with pytest.raises(InputError, match="intervention_link_key cannot be saved"):
        mm_pv.MMIntervenableModel(pv.IntervenableConfig([linked]), case.model).save(tmp_path)
    with pytest.raises(InputError, match="2 positions are read at 1"):
        mm_pv.units([1, 2], 2, [3])
    with pytest.raises(InputError, match="count from 0"):
        mm_pv.units([-1], 2)


def test_what_training_would_ignore_is_an_error() -> None:
    case = CASES["clip"]()
    base, source = swapped(case)
    batch = {"base": base, "sources": [source], "unit_locations": mm_pv.units([1], 2)}
    rotated = made(case, SITES["clip"], pv.RotatedSpaceIntervention)
    boundless = made(case, SITES["clip"], pv.BoundlessRotatedSpaceIntervention)
    loss = lambda output, _: case.head(output).square().mean()  # noqa: E731
    for model, batches, options, said in (
        (rotated, [batch], {"temperature": (5.0, 1.0)}, "none of these interventions has one"),
        (rotated, [batch], {"boundary_weight": 1.0}, "has a boundary"),
        (boundless, iter([batch]), {"temperature": (5.0, 1.0)}, "over a known n_steps"),
        (boundless, [batch], {"n_steps": 2}, "n_steps=2 of 1 batches"),
        (boundless, iter([batch]), {"n_steps": 2}, "ended after 1"),
    ):
        with pytest.raises(InputError, match=said):
            mm_pv.align(model, batches, loss, progress=False, **options)  # type: ignore[arg-type]


def test_a_boundless_subspace_inside_a_wrapper_is_trained_as_one_outside() -> None:
    case = CASES["stable_diffusion"]()
    inner = pv.BoundlessRotatedSpaceIntervention(embed_dim=32, keep_last_dim=True)
    one = made(case, "denoiser.resnets.1.hook_out", mm_pv.MapIntervention(mm_pv.StepGate(inner, [0])))
    one.set_temperature(torch.tensor(0.25))
    assert float(inner.temperature.detach()) == 0.25
    assert {id(p) for p in one.get_trainable_parameters()} >= {id(p) for p in inner.parameters()}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llava", "gemma3", "llava_siglip_qwen"])
def test_a_location_below_zero_is_each_rows_own_last_token(name: str, side: str) -> None:
    case = CASES[name]()
    base = padded.ragged(name, side)
    source = {k: v.flip(0) for k, v in base.items()}
    ends = [[m.nonzero()[:, 0].tolist() for m in one["attention_mask"]] for one in (base, source)]
    block = case.model.model.language_model.layers[1]
    values: list[torch.Tensor] = []
    handle = block.register_forward_hook(lambda m, a, out: values.append(out.clone()))
    case.model(**source)
    handle.remove()
    # One number for all rows, before: it must not decide where later calls write.
    found = made(case, "language.blocks.1.hook_resid_post", pv.VanillaIntervention, max_number_of_units=2)
    found(base, [source], {"sources->base": 1})
    for back in ([1], [1, 2]):

        def put(module: Any, args: Any, out: torch.Tensor, back: list[int] = back) -> torch.Tensor:
            new = out.clone()
            for row in range(2):
                for n in back:
                    new[row, ends[0][row][-n]] = values[0][row, ends[1][row][-n]]
            return new

        handle = block.register_forward_hook(put)
        want = case.model(**base).logits
        handle.remove()
        negative = [-n for n in back]
        located = mm_pv.units(
            torch.tensor([[e[-n] for n in back] for e in ends[0]]),
            sources=torch.tensor([[e[-n] for n in back] for e in ends[1]]),
        )
        for places in (located, {"sources->base": negative if len(back) > 1 else negative[0]}):
            if places == {"sources->base": [-1, -2]}:  # pyvene takes two numbers for a source's and a base's.
                places = {"sources->base": ([[negative] * 2], [[negative] * 2])}
            _, output = found(base, [source], places)
            torch.testing.assert_close(output.logits, want, rtol=1e-5, atol=1e-5)
    model = mm.wrap(case.model)
    places = mm_pv.units(model.row_positions(base), sources=model.row_positions(source))
    assert places == {"sources->base": ([[[e[-1]] for e in ends[1]]], [[[e[-1]] for e in ends[0]]])}


def test_locations_that_no_row_has_are_refused_before_the_model_runs() -> None:
    case = CASES["llava"]()
    base = padded.ragged("llava", "right")
    site = "language.blocks.1.hook_resid_post"
    handle = case.model.register_forward_pre_hook(lambda *_: pytest.fail("The model ran."))
    with pytest.raises(InputError, match="row 1 attends to 8"):
        made(case, site, pv.VanillaIntervention)(base, [base], {"sources->base": -9})
    heads = made(case, "language.blocks.1.attn.hook_z", pv.VanillaIntervention, unit="h")
    with pytest.raises(InputError, match="of 'h' here are counted from 0"):
        heads(base, [base], {"sources->base": -1})
    handle.remove()
    vision = made(case, "vision.blocks.1.hook_resid_post", pv.VanillaIntervention)
    with pytest.raises(InputError, match="vision tower reads no text"):
        vision(base, [base], {"sources->base": -1})
    for positions, n_rows, said in (
        (torch.tensor([[1], [2]]), 3, "2 rows of positions for 3 rows"),
        (torch.tensor([1, -1]), None, "count from 0"),
        ([1], None, "count from 0"),
    ):
        with pytest.raises(InputError, match=said):
            mm_pv.units(positions, n_rows)
