"""One tower where it is mounted: its record as its module was built, its blocks, its weights, its summary."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from operator import attrgetter
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mm_adapters._errors import InputError, MissingSiteError
from mm_adapters.records.spec import Location, Norm, Tower, TowerMount
from mm_adapters.records.stages import Stages
from mm_adapters.sites.held import place
from mm_adapters.sites.weights import BlockWeights, norm_bias, norm_weight, tensor_at
from mm_adapters.tokens.attended import attended_of, attended_position
from mm_adapters.tokens.image_positions import Grid
from mm_adapters.tokens.layout import TokenLayout, cut_layout, vision_layout


@dataclass(frozen=True)
class FinalNorm:
    """The norm before a tower's summary. `offset` is what its module adds to its weight."""

    module: nn.Module
    kind: Literal["LN", "RMS"]
    offset: float = 0.0

    @property
    def gain(self) -> Float[Tensor, " _"]:
        """What it multiplies with, [d_model]; one if it has no weight."""
        return norm_weight(self.module, self.offset)

    @property
    def bias(self) -> Float[Tensor, " _"]:
        """What it adds, [d_model]; zero if it has no bias."""
        return norm_bias(self.module)


@dataclass(frozen=True)
class TowerView:
    """A tower of one model: what methods ask of it.

    `stacks` are the paths of its repeated modules by stack, `parts` what each of them has; `before` and
    `after` are the tower's own. `model` is the module or pipeline that the tower is a part of.
    """

    name: str
    record: Tower
    mount: TowerMount
    module: nn.Module = field(repr=False)
    path: str
    stacks: dict[str, list[str]]
    parts: dict[str, list[dict[str, Location]]]
    before: dict[str, Location]
    after: dict[str, Location]
    model: Any = field(repr=False)

    @property
    def role(self) -> str:
        """What it reads or makes: "vision", "text", "language", "denoiser", "projector", ..."""
        return self.record.role

    @property
    def input_name(self) -> str:
        """The argument it is run with."""
        return self.mount.takes or self.record.takes

    @property
    def pool(self) -> str:
        """Which position its summary is read from: "first", "last", "end", "mean", "attention" or "none"."""
        return str(self.record.pool)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        device = place([self.module])
        assert device is not None
        return device

    def n_layers(self, stack: str = "blocks") -> int:
        """How many repeated modules a stack has; 0 if there is no such stack."""
        return len(self.stacks.get(stack, ()))

    @property
    def context_length(self) -> int | None:
        """How many positions it holds, by its position table or its config; None if neither says it."""
        table = tensor_at(self.module, self.record.position) if self.record.position else None
        if table is not None:
            return table.numel() // table.shape[-1] - self.first_position_row
        return getattr(getattr(self.module, "config", None), "max_position_embeddings", None)

    @property
    def first_position_row(self) -> int:
        """The row of its position table that the first position reads: OPT, BART and RoBERTa reserve some."""
        path = (self.record.position or "").partition("|")[0]
        try:
            owner = self.module.get_submodule(path.removesuffix(".weight"))
        except AttributeError:
            return 0
        padding = getattr(owner, "padding_idx", None)
        return getattr(owner, "offset", 0 if padding is None else padding + 1)

    def block(self, layer: int, stack: str = "blocks") -> nn.Module:
        """One repeated module. Raises: MissingSiteError if there is no such layer."""
        self._check_layer(layer, stack)
        return self.module.get_submodule(self.stacks[stack][layer])

    def weights(self, layer: int, stack: str = "blocks") -> BlockWeights:
        """One layer's weights by TransformerLens' names: `weights(3).names("attn")["W_O"]()`.

        Raises: MissingSiteError if there is no such layer.
        """
        return BlockWeights(self.block(layer, stack), self.parts[stack][layer])

    @property
    def final_norm(self) -> FinalNorm | None:
        """The norm before the summary or the unembedding; None if there is none."""
        location = self.after.get("ln_final.hook_scale")
        if not isinstance(location, Norm):
            return None
        module = self.module.get_submodule(location.path)
        kind: Literal["LN", "RMS"] = "LN" if location.kind == "LN" else "RMS"
        return FinalNorm(module, kind, location.offset)

    @property
    def projection(self) -> Float[Tensor, "d_model d_out"] | None:
        """What maps the normalised, pooled residual to the summary (of a language tower: to its logits).

        None if nothing does: the residual is the summary then.

        Raises: MissingSiteError if the summary is not a linear map of one position.
        """
        if self.pool in ("attention", "none"):
            raise MissingSiteError(
                f"{self.name}: its summary is pooled by {self.pool}, so no single matrix reads it "
                "off the residual stream."
            )
        maps = self._projections()
        return reduce(torch.matmul, (matrix for matrix, _ in maps)) if maps else None

    @property
    def projection_bias(self) -> Float[Tensor, " d_out"] | None:
        """What the projection adds; None if it adds nothing."""
        total: Tensor | None = None
        for matrix, bias in self._projections():
            carried = None if total is None else total @ matrix
            total = carried if bias is None else bias if carried is None else carried + bias
        return total

    @property
    def pool_weights(self) -> BlockWeights:
        """The weights of what pools the sequence by attention: `pool_weights.names("pool.attn")`.

        They have no names where no site shows that attention.
        """
        return BlockWeights(self.module, self.after)

    @property
    def unembedding(self) -> Float[Tensor, "d_model token"]:
        """What maps a language tower's normalised residual to its logits.

        Raises: MissingSiteError if the tower writes no words.
        """
        matrix = self.projection if self.role == "language" else None
        if matrix is None:
            raise MissingSiteError(
                f"The {self.name} tower has no unembedding: it is a {self.role} tower"
                f"{' without a head of words' if self.role == 'language' else ''}."
            )
        return matrix

    @property
    def unembedding_module(self) -> nn.Module | None:
        """What makes a language tower's logits; None where no one module does."""
        path = self.mount.project or ""
        if self.role != "language" or not path.endswith(".weight.T") or {"@", "|"} & set(path):
            return None
        try:
            return self.model.get_submodule(path.removesuffix(".weight.T"))
        except AttributeError:
            return None

    @property
    def unembedding_bias(self) -> Float[Tensor, " token"]:
        """What the final norm's bias and the unembedding's own add to every logit.

        Raises: MissingSiteError if the tower writes no words.
        """
        matrix, norm, own = self.unembedding, self.final_norm, self.projection_bias
        own = matrix.new_zeros(matrix.shape[1]) if own is None else own
        return own if norm is None else norm.bias @ matrix + own

    def token_directions(self, tokens: Int[Tensor, " token"]) -> Float[Tensor, "token d_model"]:
        """The direction of the residual that raises each token's logit: the final norm's gain is in it.

        Raises: MissingSiteError if the tower writes no words.
        """
        columns = self.unembedding[:, tokens].T
        return columns if self.final_norm is None else columns * self.final_norm.gain

    def pooled_output(self, output: Any) -> Any:
        """The tensor that sums the tower up, out of what its run gave."""
        gives = self.record.gives if self.mount.gives is None else self.mount.gives
        for name in gives.split(".") if gives and not isinstance(output, Tensor) else ():
            output = getattr(output, name)
        return output

    def summary(self, output: Any) -> Float[Tensor, "row width"]:
        """The tower's embedding of each row, out of what its run gave."""
        pooled = self.pooled_output(output)
        if pooled.ndim == 4:  # Of a convolutional tower: a map of one place.
            return pooled.flatten(1)
        if pooled.ndim == 3 and self.pool in ("first", "mean"):
            return pooled[:, 0] if self.pool == "first" else pooled.mean(1)
        return pooled

    def embed(self, **arguments: Any) -> Float[Tensor, "row width"]:
        """Its embeddings of prepared inputs, by a call without hooks: gradients reach the arguments."""
        return self.summary(self.runner_in(self.model)(**arguments))

    def runner_in(self, model: Any) -> Callable[..., Any]:
        """What runs this tower alone in `model`, the one that it is mounted in or one that stands for it."""
        path = self.mount.run
        if path is None:
            return self.module
        if path == "":
            return model
        run = attrgetter(path)(model)
        first = next(iter(inspect.signature(run).parameters))
        if first == self.input_name:
            return run
        # Of CoCa the forward and what runs one tower call the same argument differently.
        return lambda **given: run(**{first if k == self.input_name else k: v for k, v in given.items()})

    def vocabulary_logits(self, output: Any) -> Float[Tensor, "row pos token"]:
        """A language tower's logits, out of what the whole model's run gave.

        Raises: MissingSiteError if the tower writes no words.
        """
        _ = self.unembedding
        for name in (self.mount.gives or "logits").split("."):
            output = getattr(output, name)
        return output

    def check_one_stream(self) -> None:
        """Raises: MissingSiteError if its stages differ in the width and the positions of the stream."""
        if isinstance(self.record.order, Stages):
            raise MissingSiteError(
                f"The {self.name} tower has no one residual stream: its positions are merged and made wider "
                "from stage to stage, so what its blocks add is not one sum and their weights no one stack. "
                f"The {self.name} tower's layout has no 'patch' role for all of it. Read the sites of one "
                "stage, or the weights of one block."
            )

    def patch_grid(self, pixels: Float[Tensor, "*_ height width"]) -> Grid:
        """How many patches these pixels are cut into, down and across.

        Raises: MissingSiteError if the tower cuts no patches.
        """
        if self.record.patch is None:
            raise MissingSiteError(f"The {self.name} tower's layout has no 'patch' role: it cuts no patches.")
        cut: Any = self.module.get_submodule(self.record.patch)
        down, across = cut.stride
        if isinstance(self.record.order, Stages):  # It pads its pixels to whole patches.
            return -(-pixels.shape[-2] // down), -(-pixels.shape[-1] // across)
        return pixels.shape[-2] // down, pixels.shape[-1] // across

    def patch_layout(
        self, pixels: Float[Tensor, "image ..."], grids: Int[Tensor, "image 2"] | None = None
    ) -> TokenLayout:
        """What each position of a vision tower's sequence is for these pixels.

        `grids` are each image's rows and columns of patches, where images come cut into patches and
        padded to the same number.

        Raises: MissingSiteError if the tower does not cut images into patches, or has another layout at
        each stage; InputError if it wants grids.
        """
        if isinstance(self.record.order, Stages):
            raise MissingSiteError(
                f"The {self.name} tower's layout has no 'patch' role for all of it: its grid is halved "
                "from stage to stage. model.layout(images=...).at(site) is that of a site."
            )
        if self.record.grids is not None:
            if grids is None:
                raise InputError(
                    f"The {self.name} tower takes images cut into patches. Pass {self.record.grids}=."
                )
            return cut_layout([(int(r), int(c)) for r, c in grids], pixels.shape[1])
        n_class, n_register = self.record.n_class, self.record.n_register
        assert isinstance(n_class, int)
        assert isinstance(n_register, int)
        return vision_layout(len(pixels), self.patch_grid(pixels), n_class, n_register)

    def row_positions(self, prepared: Mapping[str, Any], position: int = -1) -> Int[Tensor, " row"]:
        """Where one position of each row stands, in the arguments that the whole model is given.

        -1 is the last position that the row's attention mask has, -2 the one before it, wherever the
        padding is. From 0 on it is the position itself, which may be padding.

        Raises: InputError if a row has no such position, or the tower reads no text.
        """
        if self.role not in ("text", "language"):
            raise InputError(f"The {self.name} tower reads no text: count its positions from 0.")
        return attended_position(attended_of(prepared, self.input_name), position)

    def _projections(self) -> list[tuple[Tensor, Tensor | None]]:
        """The maps from the pooled residual to the summary, in order, each with what it adds."""
        maps = []
        for path in self.mount.project.split(" @ ") if self.mount.project else ():
            owners = [one.removesuffix(".T").removesuffix(".weight") for one in path.split("|")]
            matrix = tensor_at(self.model, path)
            if matrix is not None:
                maps.append((matrix, tensor_at(self.model, "|".join(f"{one}.bias" for one in owners))))
        return maps

    def _check_layer(self, layer: int, stack: str) -> None:
        if stack not in self.stacks:
            known = ", ".join(self.stacks) or "none"
            raise MissingSiteError(f"The {self.name} tower has no stack {stack!r}; its stacks: {known}.")
        if not -self.n_layers(stack) <= layer < self.n_layers(stack):
            raise MissingSiteError(
                f"The {self.name} tower has no layer {layer} in {stack}: it has {self.n_layers(stack)}."
            )
