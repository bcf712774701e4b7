"""A record for a class that no family covers, read off the model: a start, to be checked."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

from mm_adapters.records.registry import find, key_of
from mm_adapters.records.spec import Tower
from mm_adapters.sites.draft_block import block_lines, has_attention, is_norm, is_rms

_HEAD = """from mm_adapters.families._parts import (
    attention,
    fused_attention,
    gated_mlp,
    mlp,
    norm,
    qkv_attention,
)
from mm_adapters.records import Input, ModelRecord, Output, Residual, Stack, Tower, TowerMount, register
"""
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
    if not isinstance(model, nn.Module):
        return _pipeline(model)
    towers = dict(_towers(model))
    if not towers:
        return ""
    if list(towers) == [""]:
        return "\n".join([_HEAD, *_tower(model, towers[""], "mine")])
    lines, model_record = [_HEAD], []
    for root, stacks in towers.items():
        module = model.get_submodule(root)
        role = _role(root, module)
        number = sum(m.strip().startswith(f'"{role}') for m in model_record)
        role += f"_{number + 1}" if number else ""
        if stacks:
            lines += _tower(module, stacks, f"mine_{role}", role.partition("_")[0])
        model_record.append(f'        "{role}": TowerMount("{root}"),')
    kind = "vlm" if any('"language"' in m for m in model_record) else "contrastive"
    token = getattr(getattr(model, "config", None), "image_token_id", None)
    end = "    })" if token is None else '    }, image_token="image_token_id")'
    advice = "# Check the roles, and add what is between. See TowerMount: run, project."
    return "\n".join([*lines, *_mounts(model, kind, model_record, end), advice])


def unnamed_block(model: Any) -> nn.Module | None:
    """One block of the largest tower that no family covers; None if there is none."""
    parts = [model] if isinstance(model, nn.Module) else list(_parts(model).values())
    blocks: list[nn.Module] = []
    for part in parts:
        for root, stacks in _towers(part) if find(Tower, part) is None else ():
            blocks += [part.get_submodule(".".join(p for p in (root, s) if p))[0] for s in stacks]  # type: ignore[index]
    return max(blocks, key=lambda b: sum(p.numel() for p in b.parameters()), default=None)


def _parts(pipeline: Any) -> dict[str, nn.Module]:
    """A pipeline's modules; none of one that was not built."""
    try:
        components: dict[str, Any] = pipeline.components
    except (AttributeError, TypeError, ValueError):
        return {}
    return {name: part for name, part in components.items() if isinstance(part, nn.Module)}


def _pipeline(pipeline: Any) -> str:
    parts = {name: part for name, part in _parts(pipeline).items() if name in _PIPELINE_ROLES}
    if not parts:
        return ""
    lines, model_record = [_HEAD.replace("import Input,", "import Guidance, Input,")], []
    for name, part in parts.items():
        role = _PIPELINE_ROLES[name]
        if find(Tower, part) is None:
            stacks = _stacks(part)
            lines += (
                _tower(part, stacks, f"mine_{role}", role)
                if stacks
                else [f"# {name} has no blocks that attend."]
            )
        model_record.append(f'        "{role}": TowerMount("{name}"),')
    end = '    }, loop="denoiser", guidance=Guidance())'
    return "\n".join([*lines, *_mounts(pipeline, "diffusion", model_record, end),
                      "# Check how the pipeline guides. See Guidance."])  # fmt: skip


def _mounts(model: Any, kind: str, model_record: list[str], end: str) -> list[str]:
    return [
        "register(",
        f'    ModelRecord("mine", "{kind}", ("{key_of(type(model))}",), {{',
        *model_record,
        end,
        ")",
    ]


def _towers(model: nn.Module) -> Iterator[tuple[str, list[str]]]:
    """Where towers hang, and the stacks of each that no family covers; "" is the model itself."""
    known = [name for name, m in model.named_modules() if name and find(Tower, m) is not None]
    known = [n for n in known if not any(n.startswith(f"{o}.") for o in known if o != n)]
    stacks = [s for s in _stacks(model) if not any(s.startswith(f"{n}.") for n in known)]
    if not known and len(stacks) <= 1:
        yield from [("", stacks)] if stacks else []
        return
    for root in sorted([*known, *stacks], key=[n for n, _ in model.named_modules()].index):
        if root in known:
            yield root, []
            continue
        others = [o for o in (*known, *stacks) if o != root]
        top = root
        while "." in top and not any(o.startswith(top.rpartition(".")[0] + ".") for o in others):
            top = top.rpartition(".")[0]
        yield top, [root.removeprefix(f"{top}.")]


def _stacks(model: nn.Module) -> list[str]:
    """Lists of modules of one class that attend, but those inside a block of another."""
    outermost: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{o}.") for o in outermost) or not isinstance(
            module, nn.ModuleList | nn.Sequential
        ):
            continue
        blocks = list(module)
        if blocks and len({type(b) for b in blocks}) == 1 and has_attention(blocks[0]):
            outermost.append(name)
    return outermost


def _role(root: str, module: nn.Module) -> str:
    record = find(Tower, module)
    if record is not None:
        return record.role
    if any(isinstance(m, nn.Conv2d | nn.Conv3d) for m in module.modules()):
        return "vision"
    return "language" if "language" in root or "decoder" in root else "text"


def _tower(module: nn.Module, stacks: list[str], name: str, role: str = "") -> list[str]:
    role = role or _role("", module)
    lines = ["register(", "    Tower(", f'        "{name}",', f'        "{role}",',
             f'        ("{key_of(type(module))}",),', "        {"]  # fmt: skip
    for number, stack in enumerate(stacks):
        label = "blocks" if number == 0 else f"blocks_{number + 1}"
        block = module.get_submodule(stack)[0]  # type: ignore[index]
        lines += [f'            "{label}": Stack(', f'                ("{stack}.*",),']
        lines += [f"                {line}" for line in block_lines(block)]
        lines += ["            ),"]
    lines += ["        },", *(f"        {line}" for line in _ends(module, stacks[0], role)), "    )", ")"]
    return lines


def _ends(module: nn.Module, stack: str, role: str) -> Iterator[str]:
    """What stands before and after the blocks, and the tables."""
    outside = {n: m for n, m in module.named_modules() if n and not n.startswith(f"{stack}.")}
    order = list(outside)
    before = [
        n for n in order if "embed" in n.rpartition(".")[2].lower() and order.index(n) < order.index(stack)
    ]
    if before:
        yield f'before={{"hook_embed": Output("{before[0]}")}},  # check: what the first block is given'
    norms = [n for n in order[order.index(stack) :] if is_norm(outside[n])]
    if norms:
        kind = ', kind="RMS"' if is_rms(outside[norms[0]]) else ""
        yield f'after=norm("{norms[0]}", "ln_final"{kind}),'
        if kind:
            yield 'norm="RMS",'
    takes = [p for p in inspect.signature(type(module).forward).parameters if p != "self"][:1]
    if takes and takes != ["pixel_values"]:
        yield f'takes="{takes[0]}",'
    yield 'gives="last_hidden_state",  # check: the attribute of its output that sums it up'
    parameters = [n for n, _ in module.named_parameters() if not n.startswith(f"{stack}.")]
    tables = ("weight", "embeddings", "embed", "embedding")
    position = next((n for n in parameters if "pos" in n.lower() and n.endswith(tables)), None)
    if position:
        yield f'position="{position}",'
    if role == "vision":
        patch = next((n for n, m in outside.items() if isinstance(m, nn.Conv2d | nn.Conv3d)), None)
        if patch:
            yield f'patch="{patch}",'
        n_class = sum(any(w in n.lower() for w in ("cls", "class_")) for n in parameters)
        yield f"n_class={min(n_class, 1)},  # check: how many tokens come before the patches"
    else:
        words = [n for n, m in outside.items() if isinstance(m, nn.Embedding) and "pos" not in n]
        if words:
            yield f'embed="{words[0]}.weight",'
        yield f"causal={role == 'language'},  # check"
