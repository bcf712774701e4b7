"""The vocabulary of a family's record. A record only says where things are; it runs no code.

A path is dotted and starts at the module that the record is about. Several paths may be given with "|"
between them: the first that exists is used, because a library moves its parts between versions and
builds some parts only if the configuration says so. Several locations may be given in a tuple, with the
same meaning. "module:attribute" is an attribute of the module at a path.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mm_adapters.records.image_tokens import ImageTokens, VideoTokens
from mm_adapters.records.stages import Stages

Kind = Literal["contrastive", "vlm", "diffusion", "tower"]


@dataclass(frozen=True)
class Output:
    """What a module returns.

    Args:
        path: The module, from the block (in a stack) or from the tower.
        heads: "module:attribute": the number of heads that the last axis is made of.
        chunk: (how many, which): the activation is one of several equal slices of the last axis.
        reference_site: A site that runs earlier and has a row for every input, where this one is computed
            once for all rows.
        is_map: The axes are [batch, channel, height, width].
        item: Which item, if the module returns several; None is its first tensor.
        needs: A path that must exist too.
        in_place: The model changes the tensor in place afterwards, so the site shows a copy.
        axes: The axes' names, if they are not the site's usual ones.
        gain: A parameter of the block (with ".tanh" at its end: its tanh) that multiplies what is returned
            before it joins the stream; the site shows the product. A block without it multiplies by nothing.
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
    """What a module is given: its first tensor, or the `argument` of this name. The rest as in `Output`."""

    path: str
    heads: str | None = None
    chunk: tuple[int, int] | None = None
    is_map: bool = False
    argument: str | None = None
    needs: str | None = None
    axes: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Norm:
    """Inside a normalisation: its denominator ("scale"), or its result before the affine map ("normalized").

    `offset` is added to the weight before it multiplies: Gemma stores its gains less one.
    """

    path: str
    value: Literal["scale", "normalized"]
    kind: Literal["LN", "RMS"] = "LN"
    offset: float = 0.0


Inside = Literal["attn_scores", "pattern", "pattern_text", "rot_q", "rot_k", "q", "k", "v", "z"]


@dataclass(frozen=True)
class Attention:
    """Inside an attention module: what its softmax is given and gives, whichever kernel computes it.

    `rot_q` and `rot_k` are what the scores are computed from (after rotary embedding and norms). `q`, `k`,
    `v` and `z` are for modules that keep their projections inside one fused call, or that join two streams
    before they attend: they are what that call is given and returns. `pattern_text` is the part of a
    joint pattern where image positions attend to text; the tower's `joint` says which positions those are.

    Args:
        path: The attention module.
        value: Which of them.
        heads: "module:attribute": its number of heads.
        call: Which of the module's attention calls, from 0: some attend to words first, then to a picture.
        needs: A path that must exist too.
    """

    path: str
    value: Inside
    heads: str
    call: int = 0
    needs: str | None = None


@dataclass(frozen=True)
class Residual:
    """The residual stream after a branch was added: no module returns it; both terms are sites."""

    base: str
    branch: str


@dataclass(frozen=True)
class Stream:
    """The residual stream as a module is given it, where a branch around that module is added later.

    An edit reaches that module, and also the stream behind it: the `item` that the module at `until`
    returns. For blocks that scale a branch before they add it, without a module that does so.
    """

    path: str
    until: str = ""
    item: int | None = None


@dataclass(frozen=True)
class Built:
    """A value that depends on how a module was built: that of the first case that holds, else `otherwise`.

    `cases` are (attribute of the tower's module or of a part's block, the value it equals, the value
    meant); True and False match anything that counts as true or false.
    """

    cases: tuple[tuple[str, Any, Any], ...]
    otherwise: Any


Location = Output | Input | Norm | Attention | Residual | Stream
Parts = Mapping[str, Location | tuple[Location, ...] | Built]
Pool = Literal["first", "end", "last", "each", "mean", "attention", "none"]


@dataclass(frozen=True)
class Joint:
    """Text and image in one sequence: which comes first, and the block's argument that is the text."""

    first: Literal["text", "image"]
    argument: str = "encoder_hidden_states"


@dataclass(frozen=True)
class Stack:
    """Modules that repeat.

    Args:
        paths: Globs from the tower, in the order the modules run.
        parts: What each of them has, by part of the site name.
        needs: A path; modules that a glob matches and that lack it are not members.
        folded: Paths in a block where batch and position are one axis; the sites show two.
        classes: Names of the only classes that `parts` describes, where a tower may hold others.
    """

    paths: tuple[str, ...]
    parts: Parts
    needs: str | None = None
    folded: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tower:
    """One tower: its stacks, its own sites in running order, and what it lacks, with the reason.

    Args:
        name: The record's name.
        role: "vision", "text", "language", "projector", "denoiser", "vae", ...
        classes: The classes it covers, as "package:Class".
        stacks: Its repeated modules, by name; "blocks" are TransformerLens'.
        before: Its own sites before the stacks.
        after: Its own sites behind them.
        absent: Globs of sites that it does not have, each with the reason.
        norm: The kind of its norms.
        takes: The argument it is run with.
        gives: The attribute of its output that sums it up; "" is the output itself.
        pool: The position that its summary is read from.
        embed: Its table of tokens.
        position: Its table of positions.
        patch: The module that cuts an image into patches; its stride is the patch size.
        n_class: How many class tokens come first: a number, or a path to it.
        n_register: How many registers follow: a number, or a path to it.
        causal: Whether a position attends only to itself and earlier ones.
        calls: The module whose calls count as the tower's, if it is not the tower itself.
        joint: How text and image share one sequence.
        grids: The argument with each image's rows and columns of patches, where images come cut into patches.
        packed: The patches of all images lie end to end, without a batch axis. The sites show one row, and
            the patterns are blocks on a diagonal.
        any_size: It reads images of other sizes than its configuration names.
        order: The order of its patches: line by line, end to end (all images in one row), by cells that are
            merged later, by windows of such cells, by tiles (all tiles of an image in one row), or another
            one at each stage.
        images: How an image's features lie among the words.
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
    """Where a composite model keeps a tower, and how it runs it.

    Args:
        path: The tower's module, from the model.
        tower: The tower's record by name, where the class of the module does not tell.
        run: A path to the callable that runs this tower alone; "" is the model itself, None the module.
        gives: The attribute of that callable's output that sums the tower up.
        takes: The argument of that callable.
        project: The tensor that maps the pooled residual to the summary, with ".T" at the end of its path if
            it must be transposed; several, with " @ " between them, where one map follows another.
        unit: Whether that callable divides the summary by its length.
    """

    path: str
    tower: str | None = None
    run: str | None = None
    gives: str | None = None
    takes: str | None = None
    project: str | None = None
    unit: bool = False


@dataclass(frozen=True)
class Guidance:
    """How a pipeline runs classifier-free guidance: what switches it on, and which rows are which.

    Args:
        flag: The pipeline's attribute that says whether it guides; None where only `scale` says it.
        denoiser_rows: The parts of a denoiser's batch, in order.
        text_calls: The parts that the text encoder's calls are for, in order.
        scale: The argument that switches guidance on above one; of several with "|" between them, any.
        denoiser_calls: The parts that the denoiser's calls within one step are for, in order, where a
            pipeline calls it once for each part and does not make them rows of one batch.
        text: The denoiser's argument by which such calls differ.
        image_scale: The argument that scales what a part "image" adds.
        from_zero: Whether a scale of zero, and not of one, is the conditional part alone.
        keeps_norm: Whether the guided prediction keeps the norm of the conditional part, on the last axis.
        rescale: The argument that draws the spread of a guided row towards that of the conditional one.
        perturbed: The pipeline's attribute that says whether a part "perturbed" comes last in the batch.

    Of several `scale`s the first is the one this loop is guided by. The sampler is given
    uncond + scale (cond - uncond), or with a part "image"
    uncond + scale (cond - image) + image_scale (image - uncond).
    """

    flag: str | None = "do_classifier_free_guidance"
    denoiser_rows: tuple[str, ...] = ("uncond", "cond")
    text_calls: tuple[str, ...] = ("cond", "uncond")
    scale: str = "guidance_scale"
    denoiser_calls: tuple[str, ...] = ()
    text: str = "encoder_hidden_states"
    image_scale: str = "image_guidance_scale"
    from_zero: bool = False
    keeps_norm: bool = False
    rescale: str | None = None
    perturbed: str | None = None


@dataclass(frozen=True)
class Sampling:
    """What a sampling loop denoises, and how its latents become a picture.

    Args:
        latents: The denoiser's site that is given the latents; what comes with them follows them.
        prediction: The denoiser's site with its prediction.
        variance: Whether variances follow the prediction, in as many channels: "always", "never", or "wide":
            where it has twice the channels that the denoiser is given.
        scheduler: The pipeline's attribute with the sampler.
        steps: The pipeline's argument with the number of steps.
        packed: Whether a position holds the latents of a cell of 2 x 2.
        scaled: What the autoencoder's config says that latents were scaled by: a "factor" and a shift, or
            "statistics" of each channel; None if they were not.
        decode: Arguments of the autoencoder's decoding. Without an autoencoder latents are pixels in -1..1.
        signed: Whether pictures with `output_type="pt"` are from -1 to 1.
        pictures: Whether the loop makes pictures, and not embeddings.
    """

    latents: str = "hook_in"
    prediction: str = "hook_out"
    variance: Literal["always", "never", "wide"] = "never"
    scheduler: str = "scheduler"
    steps: str = "num_inference_steps"
    packed: bool = False
    scaled: Literal["factor", "statistics"] | None = "factor"
    decode: Mapping[str, Any] = field(default_factory=dict)
    signed: bool = False
    pictures: bool = True


@dataclass(frozen=True)
class ModelRecord:
    """A composite model: what kind it is, and where its towers are, in the order they run.

    Args:
        name: The record's name.
        kind: "contrastive", "vlm", "diffusion" or "tower".
        classes: The classes it covers, as "package:Class".
        towers: Its towers by name.
        loop: The tower that the sampling loop calls.
        guidance: How that loop is guided.
        more_loops: Towers that loops of their own call before or after it (a prior, a stage that enlarges
            the picture), and what is called once with a loop's rows; each with its guidance.
        sampling: What a loop denoises, by tower; the loop of one that is not here as in Stable Diffusion.
        image_token: The config's attribute with the token in whose place image features go.
        images: How they lie among the words; the vision tower's `images` if None.
        video_token: The config's attribute with the token in whose place a video's features go.
        videos: How a video's frames lie among the words; None if the family does not say.
        prompt: What a text has in an image's place, written with the processor's own attributes; None if the
            processor makes that place itself.
        logit_scale: The parameter whose exponential multiplies cosines.
        joint_text: The text towers whose sequences, one after the other, are the text of a joint attention.
        template: The pipeline's attributes with the text around each prompt ("{}" is its place), and with how
            many tokens of it the denoiser does not see. Such prompts are as long as the longest of them.
        prompt_length: To how many tokens its code cuts and pads every prompt, whatever its tokenizer says;
            None where the text encoder, the tokenizer or `max_sequence_length` says it.
        outputs: The values of `output_type` that it knows.
    """

    name: str
    kind: Kind
    classes: tuple[str, ...]
    towers: Mapping[str, TowerMount]
    loop: str | None = None
    guidance: Guidance | None = None
    more_loops: Mapping[str, Guidance | None] = field(default_factory=dict)
    sampling: Mapping[str, Sampling] = field(default_factory=dict)
    image_token: str | None = None
    images: ImageTokens | None = None
    video_token: str | None = None
    videos: VideoTokens | None = None
    prompt: str | None = "{image_token}"
    logit_scale: str | None = None
    joint_text: tuple[str, ...] = ()
    template: tuple[str, str] | None = None

    def sampling_of(self, loop: str) -> Sampling | None:
        """What a loop denoises; the main one's as in Stable Diffusion if nothing else is said."""
        return self.sampling.get(loop, Sampling() if loop == self.loop else None)

    prompt_length: int | None = None
    outputs: tuple[str, ...] = ("pil", "np", "pt", "latent")


@dataclass(frozen=True)
class Site:
    """One activation of one model: its name, the module it is read at, and how.

    `axes` are names, with the size where the model fixes it ("head=12"). `reason` says why the model does
    not have it; None if it has.
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

    @property
    def n_heads(self) -> int | None:
        """How many heads its value has apart; None if it has none."""
        sizes = (axis.removeprefix("head=") for axis in self.axes if axis.startswith("head="))
        return next(map(int, sizes), None)

    def __str__(self) -> str:
        shown = f"absent: {self.reason}" if self.reason else f"[{', '.join(self.axes)}]"
        return f"{self.name:<44} {shown}"
