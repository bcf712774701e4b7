"""One tower of an unknown model as lines of a record: its stacks of blocks, and what stands around them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

from torch import nn

from mm_adapters.records.registry import find, key_of, records
from mm_adapters.records.spec import Tower
from mm_adapters.sites.draft_block import block_lines, has_attention, is_norm, is_rms


def opening(record: str, name: str, second: str, key: str) -> list[str]:
    """The first lines of a record of a class."""
    return [
        "register(",
        f"    {record}(",
        f'        "{name}",  # rename it as you like: the name of this record',
        f'        "{second}",',
        f'        ("{key}",),',
    ]


def name_of(cls: type) -> str:
    """A name for the record of a class, that no other record has."""
    name = re.sub(r"(Model|For[A-Z]\w*|Pipeline)$", "", cls.__name__).lower()
    name += "_classifier" * cls.__name__.endswith("ForImageClassification")
    return f"my_{name}" if name in {record.name for record in records()} else name


def towers(model: nn.Module) -> Iterator[tuple[str, list[str]]]:
    """Where towers hang, and the stacks of each that no family covers; "" is the model itself."""
    known = [name for name, m in model.named_modules() if name and find(Tower, m) is not None]
    known = [n for n in known if not any(n.startswith(f"{o}.") for o in known if o != n)]
    stacks = [s for s in stacks_of(model) if not any(s.startswith(f"{n}.") for n in known)]
    if not known and len(stacks) <= 1:
        yield from [("", stacks)] if stacks else []
        return
    names = [n for n, _ in model.named_modules()]
    for root in sorted([*known, *stacks], key=lambda path: names.index(path.replace("*", "0"))):
        if root in known:
            yield root, []
            continue
        others = [o for o in (*known, *stacks) if o != root]
        top = root.partition(".*.")[0]
        while "." in top and not any(o.startswith(top.rpartition(".")[0] + ".") for o in others):
            top = top.rpartition(".")[0]
        yield top, [root.removeprefix(f"{top}.")]


def stacks_of(model: nn.Module) -> list[str]:
    """Lists of modules of one class that attend, but those inside a block of another.

    A list of stages, each with a list of blocks in it, is one with a star in its path.
    """
    outermost: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{o}.") for o in outermost) or not _is_stack(module):
            continue
        outermost.append(name)
    return [_innermost(model, name) for name in outermost]


def _is_stack(module: nn.Module) -> bool:
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        return False
    blocks = list(module)
    return bool(blocks) and len({type(b) for b in blocks}) == 1 and has_attention(blocks[0])


def _innermost(model: nn.Module, stack: str) -> str:
    block = first_block(model, stack)
    inner = next((n for n, m in block.named_modules() if n and _is_stack(m)), None)
    return stack if inner is None else _innermost(model, f"{stack}.*.{inner}")


def first_block(model: nn.Module, stack: str) -> nn.Module:
    """The first block of a stack; a star in its path is the first stage."""
    return model.get_submodule(stack.replace("*", "0"))[0]  # type: ignore[index]


def role_of(root: str, module: nn.Module) -> str:
    """What a tower at a path is for, as far as its layers and its path tell."""
    record = find(Tower, module)
    if record is not None:
        return record.role
    if any(isinstance(m, nn.Conv2d | nn.Conv3d) for m in module.modules()):
        return "vision"
    return "language" if "language" in root or "decoder" in root else "text"


def tower_lines(module: nn.Module, stacks: list[str], name: str, role: str = "") -> list[str]:
    """A record of a tower, its blocks in `stacks`."""
    role = role or role_of("", module)
    lines = [*opening("Tower", name, role, key_of(type(module))), "        {"]
    for number, stack in enumerate(stacks):
        label = "blocks" if number == 0 else f"blocks_{number + 1}"
        lines += [f'            "{label}": Stack(', f'                ("{stack}.*",),']
        lines += [f"                {line}" for line in block_lines(first_block(module, stack))]
        lines += ["            ),"]
        lines += [f"            # {line}" for line in _between(module, stack)]
    lines += ["        },", *(f"        {line}" for line in _ends(module, stacks[0], role)), "    )", ")"]
    return lines


def _between(module: nn.Module, stack: str) -> list[str]:
    """What stands in a stage beside its blocks."""
    outer, _, inner = stack.rpartition(".*.")
    if not outer:
        return []
    stages = list(module.get_submodule(outer))  # type: ignore[arg-type]
    names = dict.fromkeys(name for stage in stages for name, _ in stage.named_children())
    beside = [f"{outer}.*.{name}" for name in names if name != inner.partition(".")[0]]
    advice = f"check: {', '.join(beside)} between stages: a stack of its own. See Stages."
    return [advice] if beside else []


def _ends(module: nn.Module, stack: str, role: str) -> Iterator[str]:
    """What stands before and after the blocks, and the tables."""
    stack = stack.partition(".*.")[0]
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
    gives = "last_hidden_state" if getattr(module, "pooler", None) is None else "pooler_output"
    yield f'gives="{gives}",  # check: the attribute of its output that sums it up'
    parameters = [n for n, _ in module.named_parameters() if not n.startswith(f"{stack}.")]
    tables = ("weight", "embeddings", "embed", "embedding")
    position = next((n for n in parameters if "pos" in n.lower() and n.endswith(tables)), None)
    if position:
        yield f'position="{position}",'
        if not position.endswith(".weight"):
            yield 'absent={"hook_pos_embed": "the position table is added without a module; see W_pos"},'
    if role == "vision":
        patch = next((n for n, m in outside.items() if isinstance(m, nn.Conv2d | nn.Conv3d)), None)
        if patch:
            yield f'patch="{patch}",'
        n_class = sum(any(w in n.lower() for w in ("cls", "class_")) for n in parameters)
        yield f"n_class={min(n_class, 1)},  # check: how many tokens come before the patches"
        if not n_class:
            yield 'pool="mean",  # check: how the summary is made of the patches'
    else:
        words = [n for n, m in outside.items() if isinstance(m, nn.Embedding) and "pos" not in n]
        if words:
            yield f'embed="{words[0]}.weight",'
        yield f"causal={role == 'language'},  # check"
