"""Saved interventions are data: what they say calls nothing and leads nowhere, and what is wrong is named."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pyvene as pv
import torch
from safetensors.torch import load_file, save_file

import mm_adapters as mm
from integrations import pyvene as mm_pv
from mm_adapters import CheckpointError

SITE = "vision.blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def model() -> Any:
    return mm.load("tiny-clip", device="cpu")


@pytest.fixture
def saved(model: Any, tmp_path: Path) -> Path:
    one = mm_pv.intervention(model, SITE, pv.LowRankRotatedSpaceIntervention, low_rank_dimension=4)
    mm_pv.MMIntervenableModel(pv.IntervenableConfig([one]), model).save(tmp_path / "saved")
    return tmp_path / "saved"


def change(folder: Path, by: Callable[[dict[str, Any]], Any], keep_sum: bool = False) -> None:
    """Edits the JSON as a stranger would: its checksum is taken out."""
    file = folder / "interventions.json"
    document = json.loads(file.read_text())
    by(document)
    if not keep_sum:
        document.pop("crc32", None)
    file.write_text(json.dumps(document))


def is_intervention(name: str) -> bool:
    kind = getattr(pv, name)
    return inspect.isclass(kind) and issubclass(kind, pv.Intervention)


def test_no_name_of_pyvene_is_called_but_an_intervention(
    model: Any, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every other callable is replaced by one that notes its call, at each place where it can be reached."""
    called: list[str] = []
    names = [name for name in dir(pv) if not is_intervention(name)]
    assert sum(callable(getattr(pv, name)) for name in names) > 30
    for name in names:
        if callable(getattr(pv, name)) and not name.startswith("__") and name not in _OURS:
            monkeypatch.setattr(pv, name, lambda *a, _name=name, **k: called.append(_name))
    for name in [*names, "__class__", "os.system", "create_directory.__call__", "", None, 3, ["create_gpt2"]]:
        change(saved, lambda d, name=name: d["interventions"][0].update({"class": name, "options": {}}))
        with pytest.raises(CheckpointError, match="no intervention known here"):
            mm_pv.MMIntervenableModel.load(saved, model)
    assert called == []


# What loading itself uses.
_OURS = ("RepresentationConfig", "IntervenableConfig", "IntervenableModel")

WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "an option that none declares": (lambda e: e["options"].update(nonsense=1), "option 'nonsense'"),
    "a constructor's option": (lambda e: e["options"].update(source_representation=[1.0]), "the option"),
    "a flag that is a text": (lambda e: e["options"].update(keep_last_dim="yes"), "keep_last_dim is 'yes'"),
    "a width below zero": (lambda e: e["options"].update(embed_dim=-5), "embed_dim is -5"),
    "a width for all memory": (lambda e: e["options"].update(embed_dim=10**15), "embed_dim is 1000"),
    "another width": (lambda e: e["options"].update(embed_dim=64), "embed_dim is 64"),
    "another rank": (lambda e: e["options"].update(low_rank_dimension=5), "rotate_layer"),
    "options in a list": (lambda e: e.update(options=[1]), "options are an object"),
    "a partition of texts": (lambda e: e["options"].update(subspace_partition=["a"]), "subspace_partition"),
    "a layer that is a text": (lambda e: e.update(layer="../1"), "layer is '../1'"),
    "a layer below zero": (lambda e: e.update(layer=-1), "layer is -1"),
    "no unit": (lambda e: e.pop("unit"), r"lacks \['unit'\]"),
    "another key": (lambda e: e.update(path="/etc"), "'path'"),
    "an SAE that it does not take": (lambda e: e.update(sae="sae_0"), "has no SAE"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_no_intervention_has_is_named(model: Any, saved: Path, name: str) -> None:
    by, message = WRONG[name]
    change(saved, lambda d: by(d["interventions"][0]))
    with pytest.raises(CheckpointError, match=message):
        mm_pv.MMIntervenableModel.load(saved, model)


@pytest.mark.parametrize(
    "place", ["../elsewhere", "/etc", "sae_0/../../elsewhere", "sae_1", ".", "", None, "sae_x"]
)
def test_an_sae_lies_in_the_folder_or_nowhere(model: Any, tmp_path: Path, place: Any) -> None:
    from sae_lens import SAE, StandardSAE, StandardSAEConfig

    sae = StandardSAE(StandardSAEConfig(d_in=128, d_sae=16))
    sae.save_model(tmp_path / "elsewhere")
    one = mm_pv.intervention(model, SITE, mm_pv.SAEInterchange, sae=sae, latents=[1])
    mm_pv.MMIntervenableModel(pv.IntervenableConfig([one]), model).save(tmp_path / "saved")
    mm_pv.MMIntervenableModel.load(tmp_path / "saved", model)
    (tmp_path / "saved" / "sae_1").symlink_to(tmp_path / "elsewhere")
    change(tmp_path / "saved", lambda d: d["interventions"][0].update(sae=place))
    read: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SAE, "load_from_disk", lambda *a, **k: read.append(a))
        with pytest.raises(CheckpointError, match="may only be in a folder"):
            mm_pv.MMIntervenableModel.load(tmp_path / "saved", model)
    assert read == []


def test_a_file_that_is_not_as_it_was_written_is_named(model: Any, saved: Path) -> None:
    change(saved, lambda d: d["interventions"][0].update(layer=2), keep_sum=True)
    with pytest.raises(CheckpointError, match=r"interventions\.json is damaged.*take its \"crc32\" out"):
        mm_pv.MMIntervenableModel.load(saved, model)
    change(saved, lambda d: None)  # Edited on purpose.
    assert mm_pv.MMIntervenableModel.load(saved, model)
    weights = saved / "interventions.safetensors"
    tensors = load_file(weights)
    for spoil, message in (
        (lambda t: t.float().fill_(float("nan")), "NaN"),
        (lambda t: t.to(torch.int32), "int32"),
        (lambda t: t[:, :2].contiguous(), r"\[128, 2\]"),
    ):
        # The orthogonal matrix itself and what it is made from.
        save_file(
            {k: spoil(v) if v.ndim == 2 and v.shape[1] == 4 else v for k, v in tensors.items()}, weights
        )
        with pytest.raises(CheckpointError, match=message):
            mm_pv.MMIntervenableModel.load(saved, model)
    weights.unlink()
    with pytest.raises(CheckpointError, match="no file"):
        mm_pv.MMIntervenableModel.load(saved, model)
