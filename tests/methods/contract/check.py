"""One case of the contract: a method, a family, an engine, and what must hold of them."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import mm_adapters as mm
from mm_adapters.tokens.layout import Role
from tests.methods.contract.families import Engine, Family, count_hooks, family
from tests.methods.contract.given import Given
from tests.methods.contract.method import Method, Reason
from tests.methods.contract.table import METHODS, OWN_REASONS

BY_NAME = {method.name: method for method in METHODS}


@dataclass(frozen=True)
class Outcome:
    """What came of a case: numbers by where they lie in the result, or the error that refused it.

    `forwards` counts the modules that ran; `hooks_left` the hooks that stayed; `moved` whether the model's
    own output is another than before.
    """

    numbers: Mapping[str, Tensor] = field(default_factory=dict)
    refusal: Exception | None = None
    forwards: int = 0
    hooks_left: int = 0
    moved: bool = False


@cache
def outcome(method: str, name: str, engine: Engine) -> Outcome:
    """Runs one case; an error that is no refusal is raised as it is."""
    row, tiny_family = BY_NAME[method], family(name)
    model = tiny_family.model(engine)
    before = tiny_family.output_before(engine)
    hooks = count_hooks(model.wrapped)
    numbers: Mapping[str, Tensor] = {}
    refusal: Exception | None = None
    torch.manual_seed(0)
    with TemporaryDirectory() as folder:
        given = Given(tiny_family, model, Path(folder), tiny_family.width(engine))
        with counting() as count, warnings.catch_warnings():
            # diffusers' InstructPix2Pix, of one picture for several prompts.
            warnings.filterwarnings("ignore", "You have passed", FutureWarning)
            try:
                given = replace(given, ready=row.before and row.before(model, given))
                count.n = 0
                numbers = numbers_of(row.call(model, given))
            except (mm.MissingSiteError, mm.InputError) as error:
                if not isinstance(error, mm.MissingSiteError) and own_reason(row, given, error) is None:
                    raise
                refusal = error.with_traceback(None)
    left = count_hooks(model.wrapped) - hooks + len(torch.overrides._get_current_function_mode_stack())
    # Of a refusal no module ran, so that there is nothing that could have moved it.
    moved = count.n > 0 and not torch.equal(tiny_family.output(engine), before)
    return Outcome(numbers, refusal, count.n, left, moved)


@dataclass
class Count:
    """How many modules ran."""

    n: int = 0


@contextmanager
def counting() -> Iterator[Count]:
    """Counts the forwards of all modules there are."""
    count = Count()

    def add(*_: Any) -> None:
        count.n += 1

    handle = torch.nn.modules.module.register_module_forward_pre_hook(add)
    try:
        yield count
    finally:
        handle.remove()


def numbers_of(value: Any, where: str = "") -> dict[str, Tensor]:
    """Every tensor and number in what a method gave, by where it lies; texts as their letters."""
    if isinstance(value, Tensor):
        return {where: value.detach().clone()}
    if isinstance(value, bool | int | float | np.number):
        return {where: torch.tensor(value, dtype=torch.float64)}
    if isinstance(value, str):
        return {where: torch.tensor([ord(c) for c in value])}
    if isinstance(value, np.ndarray):
        return {where: torch.as_tensor(value.copy())}
    if isinstance(value, Image.Image):
        return {where: torch.as_tensor(np.asarray(value).copy())}
    if dataclasses.is_dataclass(value):
        parts: Any = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    elif isinstance(value, Mapping):
        parts = value
    elif isinstance(value, Sequence | set | frozenset | Iterator):
        parts = dict(enumerate(value))
    else:
        return {}
    return {k: v for name, part in parts.items() for k, v in numbers_of(part, f"{where}.{name}").items()}


def given_of(name: str, engine: Engine) -> Given:
    """The inputs of a family, without a folder."""
    return Given(family(name), family(name).model(engine), Path(), 1)


def own_reason(method: Method, given: Given, error: Exception) -> Reason | None:
    """The reason of its own that the table has for this refusal."""
    return next((r for r in OWN_REASONS if r.covers(method.name, given, error)), None)


# A site or a part of one ("vision.blocks.0.attn.hook_v", "denoiser.*cross_attn.hook_pattern").
_SITE = re.compile(r"\b[a-z]\w*(?:\.[\w*]+)*\.(?:\*?[\w*]+\.)*hook_\w+")
_ROLE = re.compile(rf"The (\w+) tower's layout has no '({'|'.join(get_args(Role))})'")
_QUOTED = re.compile(r"'(\w+)'")


def what_is_missing(tiny_family: Family, model: Any, error: Exception) -> str | None:
    """What of the names in a refusal the record says that the model lacks; None if it lacks none of them.

    That is a site which the family lists as absent or does not have, a tower that there is not, or a role
    that no position of its layouts has.
    """
    message = str(error)
    for site in _SITE.findall(message):
        missing = _why_no_site(model, site)
        if missing is not None:
            return f"{site}: {missing}"
    for tower, role in _ROLE.findall(message):
        layout = model.layout(**layout_inputs(tiny_family)).get(tower)
        if layout is None or not any(layout.positions(role, row) for row in range(layout.n_rows)):
            return f"no position of {tower!r} is {role!r}"
    for quoted in _QUOTED.findall(message):
        if quoted not in model.towers and re.search(rf"no (?:tower|site) '{quoted}'", message):
            return f"no tower {quoted!r}"
    return None


def _why_no_site(model: Any, site: str) -> str | None:
    """Why there is no site of this name, or of this pattern; None if there is one."""
    if "*" in site:
        found = model.sites(site)
        present = [one for one in found if one.reason is None]
        return None if present else next((str(one.reason) for one in found), "no such site")
    try:
        model.check_site(site)
    except mm.MissingSiteError as error:
        _, is_absent, reason = str(error).partition(" is out of reach: ")
        return reason.rstrip(".") if is_absent else "no such site"
    return None


def layout_inputs(tiny_family: Family) -> dict[str, Any]:
    """What `model.layout` takes of a family's inputs."""
    inputs = tiny_family.inputs
    if "num_inference_steps" not in inputs:
        return inputs
    sizes = ("height", "width", "max_sequence_length")
    return {"text": inputs.get("prompt"), **{k: inputs[k] for k in sizes if k in inputs}}
