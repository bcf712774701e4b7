"""A family says where things are; nothing here knows any family, and nothing here does anything.

A path is dotted, from the module a record says. It may be several, with "|" between them: the first
that is there is meant, for a library moves its parts between versions and builds some only if its
configuration says so. A place may be several, in a tuple, in the same way. "module:attribute" is an
attribute of the module at a path.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mm_adapters.records.image_tokens import ImageTokens

Kind = Literal["contrastive", "vlm", "diffusion", "tower"]


@dataclass(frozen=True)
class Output:
    """What a module returns: its first tensor, or the `item`-th thing if it returns several.

    `heads` is "module:attribute", the number of heads the last axis is made of.
    `chunk` is (how many, which): the activation is one of several equal slices of the last axis.
    `like` names a site that fires earlier and has a row for every input, where this has one for all.
    `is_map` marks [batch, channel, height, width]; `axes` names others than the site's usual ones.
    `needs` is a path that must be there too. `in_place` says that the model goes on to change it in
    place: what is shown is a copy. `gain` is a parameter of the block (".tanh" at its end: its tanh) that
    multiplies what is returned before it joins the stream; the site shows the product. A block without
    it multiplies by nothing.
    """

    path: str
    heads: str | None = None
    chunk: tuple[int, int] | None = None
    reference_site: str | None = None
    is_map: bool = False
    item: int | None = None
    needs: str | None = None
    in_place: bool = False
    axes: tuple[str, ...] | None = None
    gain: str | None = None


@dataclass(frozen=True)
class Input:
    """What a module is given: its first tensor, or the `argument` of this name."""

    path: str
    heads: str | None = None
    chunk: tuple[int, int] | None = None
    is_map: bool = False
    argument: str | None = None
    needs: str | None = None
    axes: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Norm:
    """Inside a normalisation: `value` is its denominator ("scale") or the result before the affine map.

    `offset` is added to its weight before that multiplies: Gemma stores its gains less one.
    """

    path: str
    value: Literal["scale", "normalized"]
    kind: Literal["LN", "RMS"] = "LN"
    offset: float = 0.0


Inside = Literal["attn_scores", "pattern", "pattern_text", "rot_q", "rot_k", "q", "k", "v", "z"]


@dataclass(frozen=True)
class Attention:
    """Inside an attention module: what its softmax sees and gives, whichever kernel computes it.

    `rot_q`, `rot_k` are what the scores are made of (after rotary embedding and norms). `q`, `k`,
    `v`, `z` are for modules that keep their projections inside one fused call, or join two streams
    before they attend: they are what that call is given, and gives. `pattern_text` is the part of a
    joint pattern where image positions look at text; the tower's `joint` says which those are.
    A module may attend more than once, as to the words and then to a picture: `call` counts the times,
    from 0. `needs` is a path that must be there too.
    """

    path: str
    value: Inside
    heads: str
    call: int = 0
    needs: str | None = None


@dataclass(frozen=True)
class Residual:
    """The residual stream after a branch was added: no module returns it, its two terms are sites."""

    base: str
    branch: str


@dataclass(frozen=True)
class Stream:
    """The residual stream as a module is given it, when what it passes by is added on later.

    An edit reaches that module, and the stream where it comes out: the `item` that the module at
    `until` returns. For blocks that scale a branch before adding it, with no module that does so.
    """

    path: str
    until: str = ""
    item: int | None = None


@dataclass(frozen=True)
class Built:
    """What depends on how a module was built: the value beside the first attribute that is so.

    `cases` are (attribute of the tower's module, or of a part's block, what it equals, value); True and
    False stand for anything that counts as such.
    """

    cases: tuple[tuple[str, Any, Any], ...]
    otherwise: Any


Location = Output | Input | Norm | Attention | Residual | Stream
Parts = Mapping[str, Location | tuple[Location, ...] | Built]
Pool = Literal["first", "end", "last", "each", "mean", "attention", "none"]


@dataclass(frozen=True)
class Joint:
    """Text and image in one sequence: which comes first, and the argument of a block that is the text."""

    first: Literal["text", "image"]
    argument: str = "encoder_hidden_states"


@dataclass(frozen=True)
class Stages:
    """A grid of patches that is halved on the way, rounded up, and attends within windows (Swin).

    `merges` is the stack of modules that each halve it; they and the blocks are registered in the order
    they run. A block pads the grid below and at the right to whole windows of `window` patches a side, rolls
    it up and left by `shift` (two of its attributes), and in its `windowed` parts a row is one window.
    `rolls_larger_only`: not where the grid is as small as a window, down or across.
    """

    merges: str = "merges"
    windowed: str = "attn"
    window: str = "window_size"
    shift: str = "shift_size"
    rolls_larger_only: bool = False


@dataclass(frozen=True)
class Stack:
    """Modules that repeat. Globs are relative to the tower, in the order the modules run.

    Those that a glob finds and that lack `needs` are no members. `folded` are paths in a block where
    batch and position are one axis; its sites show them as two. `classes`: names of the only classes
    that the parts describe, where a tower may hold others.
    """

    paths: tuple[str, ...]
    parts: Parts
    needs: str | None = None
    folded: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tower:
    """One tower: its stacks, its own sites in running order, and what it lacks, with the reason.

    `takes` names the argument it is run with; `gives` the attribute of its output that summarises
    it ("" is the output itself). `final_norm` is applied to what `pool` picks, before `project`.
    `n_class` and `n_register` may be paths to the number. `calls` is the module whose calls are the
    tower's, if it is not the tower itself. `grids` is the argument that says how many rows and
    columns of patches each image has, where images come cut into patches.
    A `packed` tower lays the patches of all images end to end, without a batch axis: its sites show
    them as one row, and its patterns are blocks on a diagonal. One of `any_size` reads images of other
    sizes than its config names. `order` is that of its patches: line by line, end to end (all images
    in one row), by cells that are merged later, by windows of such cells, by tiles (all tiles of an
    image in one row), or another one at each stage. `images`: how they lie among words.
    """

    name: str
    role: str
    classes: tuple[str, ...]
    stacks: Mapping[str, Stack]
    before: Parts = field(default_factory=dict)
    after: Parts = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    norm: Literal["LN", "RMS"] | None = "LN"
    takes: str = "pixel_values"
    gives: str = "pooler_output"
    pool: Pool | Built = "first"
    embed: str | None = None
    position: str | None = None
    patch: str | None = None
    n_class: int | str | Built = 0
    n_register: int | str | Built = 0
    causal: bool = False
    calls: str = ""
    joint: Joint | None = None
    grids: str | None = None
    packed: bool = False
    any_size: bool = False
    order: Literal["lines", "end to end", "cells", "windows", "tiles"] | Stages = "lines"
    images: ImageTokens | None = None


@dataclass(frozen=True)
class TowerMount:
    """Where a tower hangs in a composite model, and how the composite runs it.

    `run` is the callable that runs this tower alone (a path from the model; "" is the model
    itself, None the mounted module), `gives` its summary, `project` the tensor that maps the
    pooled residual to that summary: a path, with ".T" if it must be transposed.
    """

    path: str
    tower: str | None = None
    run: str | None = None
    gives: str | None = None
    takes: str | None = None
    project: str | None = None


@dataclass(frozen=True)
class Guidance:
    """How a pipeline runs classifier-free guidance: what says so, which rows are which.

    `flag` is the pipeline's attribute, or None where only the argument `scale` says it, above one (of
    several with "|" between them: any).
    `denoiser_calls` is for pipelines that call the denoiser once for each part, in this order, and
    not with the parts as rows of one batch; such calls differ by their `text` argument.
    """

    flag: str | None = "do_classifier_free_guidance"
    denoiser_rows: tuple[str, ...] = ("uncond", "cond")
    text_calls: tuple[str, ...] = ("cond", "uncond")
    scale: str = "guidance_scale"
    denoiser_calls: tuple[str, ...] = ()
    text: str = "encoder_hidden_states"


@dataclass(frozen=True)
class ModelRecord:
    """A composite model: what kind it is and where its towers hang, in the order they run.

    `loop` is the tower that the sampling loop calls, guided by `guidance`. `more_loops` are towers that
    loops of their own call before or after it (a prior, a stage that makes the picture larger), and
    what is called once with a loop's rows; each with its guidance.
    `joint_text` are the text towers whose sequences, one after the other, are the text of a joint attention.
    `template` names the pipeline's attributes with the text around each prompt ("{}" is its place), and with
    how many tokens of it the denoiser does not see; such prompts are as long as the longest of them.
    `image_token` is the config's attribute with the token that stands for image features; `images`
    says how they lie there (its vision tower's `images` otherwise). `prompt` is what a text has in an
    image's place, with the processor's own attributes; None if the processor makes places itself.
    """

    name: str
    kind: Kind
    classes: tuple[str, ...]
    towers: Mapping[str, TowerMount]
    loop: str | None = None
    guidance: Guidance | None = None
    more_loops: Mapping[str, Guidance | None] = field(default_factory=dict)
    image_token: str | None = None
    images: ImageTokens | None = None
    prompt: str | None = "{image_token}"
    logit_scale: str | None = None
    joint_text: tuple[str, ...] = ()
    template: tuple[str, str] | None = None


@dataclass(frozen=True)
class Site:
    """One activation of one model: its name, the module it is read at, and how.

    `axes` are names, with the size where the model fixes it ("head=12"). `reason` is set if the
    model does not have it.
    """

    name: str
    tower: str
    stack: str | None
    layer: int | None
    part: str
    location: Location | None
    module: str
    axes: tuple[str, ...]
    reason: str | None = None

    def __str__(self) -> str:
        shown = f"absent: {self.reason}" if self.reason else f"[{', '.join(self.axes)}]"
        return f"{self.name:<44} {shown}"
