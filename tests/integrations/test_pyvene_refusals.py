"""Saved interventions and weights come back as they were or not at all; what pyvene's members do by hand."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pyvene as pv
import torch
from pyvene.models.mlp.modelings_mlp import MLPConfig, MLPForClassification
from sae_lens import StandardSAE, StandardSAEConfig
from safetensors.torch import load_file, save_file
from tiny import CASES

from integrations import pyvene as mm_pv
from integrations.pyvene import representation
from integrations.pyvene.gates import StepGate
from integrations.pyvene.model import sites_of
from mm_adapters import CheckpointError, InputError, UnknownFamilyError

SITE = "vision.blocks.1.hook_resid_post"


@pytest.fixture
def clip() -> Any:
    return CASES["clip"]().model


def made(model: Any, *kinds: Any, **options: Any) -> mm_pv.MMIntervenableModel:
    ones = [mm_pv.intervention(model, SITE, kind, **options) for kind in kinds]
    return mm_pv.MMIntervenableModel(pv.IntervenableConfig(ones), model)


def change(folder: Path, **values: Any) -> None:
    """Edits the JSON as a stranger would: its checksum is taken out."""
    file = folder / "interventions.json"
    document = json.loads(file.read_text())
    entry = document["interventions"][0]
    for name, value in values.items():
        if name in ("format", "mode", "interventions"):
            document[name] = value
        else:
            entry["options" if name == "rank" else name] = (
                entry["options"] | {"low_rank_dimension": value} if name == "rank" else value
            )
    document.pop("crc32", None)
    file.write_text(json.dumps(document))


@pytest.mark.parametrize("partition", [[[0, 4], [4, 32]], [[0, 2], [2, 4]], [[0, 2, 9], [5, 6]], [[3]]])
def test_parts_of_a_subspace_come_back_as_they_were(clip: Any, tmp_path: Path, partition: Any) -> None:
    found = made(clip, pv.VanillaIntervention, subspace_partition=partition)
    found.save(tmp_path)
    again = mm_pv.MMIntervenableModel.load(tmp_path, clip)
    (one,), (other,) = found.interventions.values(), again.interventions.values()
    expected = [list(range(*part)) if len(part) == 2 else part for part in partition]
    assert one.subspace_partition == other.subspace_partition == expected
    base, source = torch.randn(2, 1, 32), torch.randn(2, 1, 32)
    new = other(base, source, subspaces=[[0], [0]])
    assert torch.equal(new[..., expected[0]], source[..., expected[0]])
    kept = [i for i in range(32) if i not in expected[0]]
    assert torch.equal(new[..., kept], base[..., kept])


def test_an_index_of_a_subspace_is_less_than_the_width(clip: Any, tmp_path: Path) -> None:
    made(clip, pv.VanillaIntervention, subspace_partition=[[0, 4]]).save(tmp_path)
    options = {"keep_last_dim": True, "embed_dim": 32}
    change(tmp_path, options=options | {"subspace_partition": [[1, 31], []]})
    (one,) = mm_pv.MMIntervenableModel.load(tmp_path, clip).interventions.values()
    assert one.subspace_partition == [[1, 31], []]
    change(tmp_path, options=options | {"subspace_partition": [[1], [32, 2]]})
    with pytest.raises(CheckpointError, match="subspace_partition has the index 32, not less than embed_dim"):
        mm_pv.MMIntervenableModel.load(tmp_path, clip)
    for bad in ([[-1]], [[10**6]], [[1.0]], [[True]], [3], {"a": [1]}):
        change(tmp_path, options=options | {"subspace_partition": bad})
        with pytest.raises(CheckpointError, match=r"subspace_partition is .*, which it cannot be"):
            mm_pv.MMIntervenableModel.load(tmp_path, clip)


def test_a_constant_source_comes_back(clip: Any, tmp_path: Path) -> None:
    vector = torch.randn(32)
    found = made(clip, pv.AdditionIntervention, source_representation=vector)
    found.save(tmp_path)
    (one,) = mm_pv.MMIntervenableModel.load(tmp_path, clip).interventions.values()
    assert torch.equal(one.source_representation, vector)
    assert one.is_source_constant
    base = torch.randn(2, 1, 32)
    torch.testing.assert_close(one(base.clone(), None), base + vector)
    weights = tmp_path / "interventions.safetensors"
    tensors = load_file(weights)
    broken = vector.clone()
    broken[3] = float("nan")
    for bad in (broken, vector.int()):
        save_file(tensors | {"0.source_representation": bad}, weights)
        with pytest.raises(CheckpointError, match="source_representation holds what is no finite fraction"):
            mm_pv.MMIntervenableModel.load(tmp_path, clip)


_WRONG_ENTRIES: list[Any] = [
    (
        {"format": "mm_interp.pyvene/2"},
        "has the format 'mm_interp.pyvene/2'; this reads 'mm_interp.pyvene/1'",
    ),
    ({"mode": "both"}, "interventions.json: mode is parallel or serial, and interventions a list"),
    ({"interventions": {}}, "interventions.json: mode is parallel or serial, and interventions a list"),
    ({"interventions": [3]}, "intervention 0 is a int, not an object"),
    ({"latents": ["a"]}, r"latents are numbers, not \['a'\]"),
    ({"latents": [1, "a"]}, r"latents are numbers, not \[1, 'a'\]"),
    ({"latents": [True]}, r"latents are numbers, not \[True\]"),
    ({"latents": 3}, "latents are numbers, not 3"),
    ({"latents": [16]}, "a SAEInterchange cannot be made with .*latents 0 to 15"),
]


def test_an_entry_that_cannot_be_is_named(clip: Any, tmp_path: Path) -> None:
    for values, told in _WRONG_ENTRIES:
        sae = StandardSAE(StandardSAEConfig(d_in=32, d_sae=16))
        made(clip, mm_pv.SAEInterchange(sae, [1, 15])).save(tmp_path)
        (one,) = mm_pv.MMIntervenableModel.load(tmp_path, clip).interventions.values()
        assert list(one.latents) == [1, 15]
        change(tmp_path, **values)
        with pytest.raises(CheckpointError, match=told):
            mm_pv.MMIntervenableModel.load(tmp_path, clip)


def test_an_sae_that_cannot_be_loaded_names_its_folder(clip: Any, tmp_path: Path) -> None:
    made(clip, mm_pv.SAEInterchange(StandardSAE(StandardSAEConfig(d_in=32, d_sae=16)), [1])).save(tmp_path)
    config = tmp_path / "sae_0" / "cfg.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architecture": "gpt"}))
    with pytest.raises(CheckpointError, match=f"^{tmp_path / 'sae_0'} holds no SAE that can be loaded: "):
        mm_pv.MMIntervenableModel.load(tmp_path, clip)


def test_a_rank_is_at_most_the_width(clip: Any, tmp_path: Path) -> None:
    made(clip, pv.LowRankRotatedSpaceIntervention, low_rank_dimension=32).save(tmp_path)
    mm_pv.MMIntervenableModel.load(tmp_path, clip)
    change(tmp_path, rank=33)
    with pytest.raises(CheckpointError, match="low_rank_dimension is 33, more than embed_dim"):
        mm_pv.MMIntervenableModel.load(tmp_path, clip)
    weights = tmp_path / "interventions.safetensors"
    change(tmp_path, rank=32)
    tensors = load_file(weights)
    lost = sorted(k for k in tensors if "rotate" in k)[0]
    save_file({k: v for k, v in tensors.items() if k != lost}, weights)
    told = rf"a LowRankRotatedSpaceIntervention lacks the weights \['{lost.partition('.')[2]}'\]"
    with pytest.raises(CheckpointError, match=told):
        mm_pv.MMIntervenableModel.load(tmp_path, clip)


def test_what_is_no_intervention_of_pyvene_or_ours_is_not_saved(clip: Any, tmp_path: Path) -> None:
    gate = StepGate(pv.VanillaIntervention(embed_dim=32, keep_last_dim=True), [0])
    with pytest.raises(InputError, match=r"^A StepGate cannot be saved; save what is inside it"):
        made(clip, gate).save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_learned_weights_come_back_into_the_same_interventions(clip: Any, tmp_path: Path) -> None:
    kinds = (pv.RotatedSpaceIntervention, pv.VanillaIntervention)
    found, other = made(clip, *kinds), made(clip, *kinds)
    rotated = [next(iter(one.interventions.values())) for one in (found, other)]
    assert not torch.equal(*(one.rotate_layer.weight for one in rotated))
    with pytest.raises(CheckpointError, match=r"has no weights\.safetensors\. Is it the right folder\?$"):
        other.load_intervention(tmp_path)
    found.save_intervention(tmp_path)
    stored = load_file(tmp_path / "weights.safetensors")
    assert not [name for name in stored if name.startswith("model.")]
    other.load_intervention(tmp_path)
    torch.testing.assert_close(*(one.rotate_layer.weight for one in rotated), rtol=0, atol=1e-6)
    name = next(iter(stored))
    save_file({k: v for k, v in stored.items() if k != name}, tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"has the weights .*, and what trains here is "):
        other.load_intervention(tmp_path)


def test_the_model_s_own_weights_are_saved_where_they_train(clip: Any, tmp_path: Path) -> None:
    found = made(clip, pv.VanillaIntervention)
    assert found.count_parameters(include_model=True) == 0
    found.enable_model_gradients()
    n = sum(p.numel() for p in found.model.parameters())
    assert found.count_parameters(include_model=True) == n
    assert found.count_parameters() == 0
    found.save_intervention(tmp_path / "without", include_model=False)
    assert load_file(tmp_path / "without" / "weights.safetensors") == {}
    found.save_intervention(tmp_path / "with")
    before = {k: v.clone() for k, v in found.model.state_dict().items()}
    with torch.no_grad():
        for p in found.model.parameters():
            p.zero_()
    found.load_intervention(tmp_path / "with")
    assert all(torch.equal(v, before[k]) for k, v in found.model.state_dict().items())


def test_parameters_that_are_shared_count_once_and_gradients_are_cleared(clip: Any) -> None:
    found = made(
        clip, pv.LowRankRotatedSpaceIntervention, pv.LowRankRotatedSpaceIntervention, low_rank_dimension=4
    )
    one, other = found.interventions.values()
    assert found.count_parameters() == 2 * 4 * 32
    other.rotate_layer = one.rotate_layer
    assert found.count_parameters() == 4 * 32
    for clear in (found.zero_grad, found.set_zero_grad):
        for p in [*one.parameters(), *clip.parameters()]:
            p.grad = torch.ones_like(p)
        clear()
        assert all(p.grad is None for p in one.parameters())
        assert all(p.grad is not None for p in clip.parameters())
    with pytest.raises(InputError, match=r"^train_alignment .*\. Train with integrations\.pyvene\.align, or"):
        found.train_alignment()


def test_a_boundary_is_weighed_into_the_loss(clip: Any) -> None:
    inputs = CASES["clip"]().inputs
    batch = {"base": inputs, "sources": [inputs], "unit_locations": mm_pv.units([1], 2)}
    losses = []
    for weight in (0.0, 3.0):
        found = made(clip, pv.BoundlessRotatedSpaceIntervention)
        (one,) = found.interventions.values()
        boundary = float(one.intervention_boundaries.detach().sum())
        loss = lambda output, _: output.image_embeds.sum() * 0 + 2  # noqa: E731
        done = mm_pv.align(found, [batch] * 2, loss, boundary_weight=weight, progress=False, lr=0.1)
        losses.append(done.losses)
        moved = float(one.intervention_boundaries.detach().sum())
        assert moved == pytest.approx(boundary - (0.2 if weight else 0), abs=1e-3)
    assert boundary > 0
    assert losses[0] == (2, 2)
    assert losses[1] == pytest.approx((2 + 3 * boundary, 2 + 3 * (boundary - 0.1)), abs=1e-3)


_ROWS_OF_CALLS: list[Any] = [
    ("cond", True, ("cond", "uncond"), 0, [0, 1, 2, 3]),
    ("cond", True, ("cond", "uncond"), 1, []),
    ("uncond", True, ("cond", "uncond"), 1, [0, 1, 2, 3]),
    ("uncond", True, ("cond", "uncond"), 0, []),
    ("uncond", True, ("cond", "uncond"), 2, []),
    ("cond", True, (), 0, [2, 3]),
    ("uncond", True, (), 0, [0, 1]),
    ("cond", False, (), 0, [0, 1, 2, 3]),
    ("uncond", False, ("cond", "uncond"), 0, []),
    ("all", True, (), 0, [0, 1, 2, 3]),
    (slice(1, 3), True, (), 0, [1, 2]),
    ([-1, 0, 3], True, (), 0, [0, 3]),
    ([-4], True, (), 0, [0]),
]


def test_a_gate_s_rows_of_a_call() -> None:
    for rows, guided, calls, part, chosen in _ROWS_OF_CALLS:
        gate = StepGate(pv.VanillaIntervention(embed_dim=2), [0], rows=rows)
        guidance: Any = SimpleNamespace(denoiser_calls=calls, denoiser_rows=("uncond", "cond"))
        gate.attach("denoiser.x", guidance, lambda guided=guided: guided)
        assert gate._rows_of(part, 4) == chosen
        assert gate._calls_a_step() == (2 if calls and guided else 1)


def test_a_gate_s_rows_are_in_the_batch() -> None:
    for row in (4, -5):
        with pytest.raises(InputError, match=rf"^rows=\[{row}\]: the batch has 4 rows"):
            StepGate(pv.VanillaIntervention(embed_dim=2), [0], rows=[row])._rows_of(0, 4)
    with pytest.raises(InputError, match=r"^rows='cond' is known inside an MMIntervenableModel"):
        StepGate(pv.VanillaIntervention(embed_dim=2), [0], rows="cond")._rows_of(0, 4)


def test_a_width_that_is_not_known_is_refused(clip: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(representation, "width_of", lambda site, model: None)
    with pytest.raises(InputError, match=f"^{SITE}: its width is not known before it runs; use a site of"):
        mm_pv.intervention(clip, SITE, pv.VanillaIntervention)


def test_as_many_positions_are_read_as_written() -> None:
    assert mm_pv.units([1, 2], 2, [3, 4]) == {"sources->base": ([[[3, 4]] * 2], [[[1, 2]] * 2])}
    for sources in (torch.tensor([1, 2, 3]), torch.tensor([1])):
        with pytest.raises(InputError, match=f"^{len(sources)} rows of positions for 2 rows"):
            mm_pv.units(torch.tensor([1, 2]), sources=sources)


def test_a_module_of_no_family_is_pyvene_s_own() -> None:
    module = MLPForClassification(MLPConfig(h_dim=4, n_layer=2, num_classes=2, pdrop=0.0))
    assert sites_of(module) is None
    with pytest.raises(UnknownFamilyError):
        sites_of(SimpleNamespace())  # type: ignore[arg-type]
    clip = CASES["clip"]().model
    assert sites_of(clip) is not None
    found = made(clip, pv.VanillaIntervention)
    found.disable_model_gradients()
    assert all(p.requires_grad for p in clip.parameters())
    own = {
        "layer": 0,
        "component": "block_output",
        "unit": "pos",
        "intervention_type": pv.VanillaIntervention,
    }
    whole = mm_pv.MMIntervenableModel(pv.IntervenableConfig(own), module, use_fast=True)
    module.train()
    whole.disable_model_gradients()
    assert not any(p.requires_grad for p in module.parameters())
    assert not module.training
    one = {"base->base": (None, [[[0], [0]]])}
    several = {"base->base": (None, [[[0], [1]]])}
    slow = mm_pv.MMIntervenableModel(pv.IntervenableConfig(own), module)
    for given, fast in ((one, True), (several, False), (one, True)):
        slow._broadcast_unit_locations(2, given)
        assert slow.use_fast is fast
        whole._broadcast_unit_locations(2, given)
        assert whole.use_fast is True
    slow.is_model_stateless, slow.use_fast = False, None
    slow._broadcast_unit_locations(2, several)
    assert slow.use_fast is None
