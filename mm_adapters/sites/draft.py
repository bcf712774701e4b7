"""A record for a class that no family covers, read off the model: a start, to be checked."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from mm_adapters.records.registry import find, key_of
from mm_adapters.records.spec import Tower
from mm_adapters.sites.draft_text import as_file
from mm_adapters.sites.draft_tower import (
    first_block,
    name_of,
    opening,
    role_of,
    stacks_of,
    tower_lines,
    towers,
)

_PIPELINE_ROLES = {
    "unet": "denoiser", "transformer": "denoiser", "prior": "denoiser", "vae": "vae", "vqvae": "vae",
    "movq": "vae", "text_encoder": "text", "text_encoder_2": "text_2", "text_encoder_3": "text_3",
    "image_encoder": "vision",
}  # fmt: skip


def draft(model: Any) -> str:
    """Python that registers a record of `model` and of each of its towers that no family covers.

    What cannot be read off a model, and is guessed, is marked "check". "" if no stack of blocks that
    attend is found in it, and no tower that is known.
    """
    lines = _module(model) if isinstance(model, nn.Module) else _pipeline(model)
    return as_file(lines) if lines else ""


def outline(model: Any, kind: type) -> str:
    """The same where nothing can be read off a model: a record with its paths left open."""
    cls = type(model)
    if kind is Tower:
        stacks = '{"blocks": Stack(("path.to.blocks.*",), {"hook_resid_post": Output("")})}'
        start = opening("Tower", name_of(cls), "vision", key_of(cls))
        return as_file([*start, f"        {stacks},", "    )", ")"])
    mounts = {"vision": 'TowerMount("path.to.vision")', "text": 'TowerMount("path.to.text")'}
    return as_file(_model_record(cls, "contrastive", mounts))


def _module(model: nn.Module) -> list[str]:
    by_root = dict(towers(model))
    if not by_root:
        return []
    if list(by_root) != [""]:
        return _joined(model, by_root) if len(by_root) != 1 else _headed(model, *by_root.popitem())
    prefix = getattr(model, "base_model_prefix", "")
    body = getattr(model, prefix, None) if prefix else None
    if isinstance(body, nn.Module):  # It has a class of its own, and may be loaded without this head.
        return _headed(model, prefix, stacks_of(body))
    return tower_lines(model, by_root[""], name_of(type(model))) + _classifiers(type(model), prefix)


def _headed(model: nn.Module, root: str, stacks: list[str]) -> list[str]:
    """A tower at `root`, and the model that is no more than a head on it."""
    body = model.get_submodule(root)
    role = role_of(root, body)
    heads = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.startswith(f"{root}.")]
    lines = tower_lines(body, stacks, name_of(type(body)), role) if stacks else []
    return lines + _model_record(type(model), "tower", {role: _head(root, *heads[-1:])})


def _head(root: str, *heads: str) -> str:
    project = "".join(f', project="{name}.weight.T"' for name in heads)
    return f'TowerMount("{root}", run="", gives="logits"{project}),  # check: what it gives, and its head'


def _classifiers(cls: type, prefix: str) -> list[str]:
    """Records of the image classifiers that the file of this class makes of it."""
    there = vars(sys.modules[cls.__module__]).values() if prefix else ()
    heads = [
        other
        for other in there
        if isinstance(other, type)
        and other.__name__.endswith("ForImageClassification")
        and getattr(other, "base_model_prefix", None) == prefix
    ]
    mounts = {"vision": _head(prefix, "classifier")}
    return [line for other in heads for line in _model_record(other, "tower", mounts)]


def _joined(model: nn.Module, by_root: Mapping[str, list[str]]) -> list[str]:
    """Several towers, and where they hang."""
    lines: list[str] = []
    mounts: dict[str, str] = {}
    for root, stacks in by_root.items():
        module = model.get_submodule(root)
        role = role_of(root, module)
        same = sum(name.partition("_")[0] == role for name in mounts)
        name = f"{role}_{same + 1}" if same else role
        if stacks:
            lines += tower_lines(module, stacks, f"{name_of(type(model))}_{name}", role)
        mounts[name] = f'TowerMount("{root}")'
    kind = "vlm" if "language" in mounts else "contrastive"
    token = getattr(getattr(model, "config", None), "image_token_id", None)
    more = [] if token is None else ['image_token="image_token_id"']
    advice = "# Check the roles, and add what is between. See TowerMount: run, project."
    return [*lines, *_model_record(type(model), kind, mounts, more), advice]


def unnamed_block(model: Any) -> nn.Module | None:
    """One block of the largest tower that no family covers; None if there is none."""
    parts = [model] if isinstance(model, nn.Module) else list(_parts(model).values())
    blocks: list[nn.Module] = []
    for part in parts:
        for root, stacks in towers(part) if find(Tower, part) is None else ():
            blocks += [first_block(part, ".".join(p for p in (root, s) if p)) for s in stacks]
    return max(blocks, key=lambda b: sum(p.numel() for p in b.parameters()), default=None)


def _parts(pipeline: Any) -> dict[str, nn.Module]:
    """A pipeline's modules; none of one that was not built."""
    try:
        components: dict[str, Any] = pipeline.components
    except (AttributeError, TypeError, ValueError):
        return {}
    return {name: part for name, part in components.items() if isinstance(part, nn.Module)}


def _pipeline(pipeline: Any) -> list[str]:
    parts = {name: part for name, part in _parts(pipeline).items() if name in _PIPELINE_ROLES}
    if not parts:
        return []
    lines: list[str] = []
    for name, part in parts.items():
        if find(Tower, part) is not None:
            continue
        role, stacks = _PIPELINE_ROLES[name], stacks_of(part)
        own = f"{name_of(type(pipeline))}_{role}"
        lines += tower_lines(part, stacks, own, role) if stacks else [f"# {name} has no blocks that attend."]
    mounts = {_PIPELINE_ROLES[name]: f'TowerMount("{name}")' for name in parts}
    more = ['loop="denoiser"', "guidance=Guidance()"]
    return [
        *lines,
        *_model_record(type(pipeline), "diffusion", mounts, more),
        "# Check how the pipeline guides. See Guidance.",
    ]


def _model_record(cls: type, kind: str, mounts: Mapping[str, str], more: Sequence[str] = ()) -> list[str]:
    towers_at = []
    for role, mount in mounts.items():
        code, comma, comment = mount.partition(",  # ")
        towers_at.append(f'            "{role}": {code},' + (f"  # {comment}" if comma else ""))
    return [
        *opening("ModelRecord", name_of(cls), kind, key_of(cls)),
        "        {",
        *towers_at,
        "        },",
        *(f"        {one}," for one in more),
        "    )",
        ")",
    ]
