"""Random projections of gradients, the same for every example, defined by a kind, a width and a seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from methods_multimodal.core.generators import mixed
from methods_multimodal.data_attribution import _signs
from mm_adapters import InputError

Kind = Literal["none", "rademacher", "normal", "sparse", "factored", "traker"]
_KINDS = ("none", "rademacher", "normal", "sparse", "factored", "traker")
# One block of a dense matrix has about so many numbers; part of what the matrix is.
_BLOCK = 2**22


@dataclass(frozen=True)
class Projection:
    """How gradients become features. Dot products are kept in expectation, whatever the width.

    "sparse" adds each coordinate to one feature with a random sign (Charikar et al. 2002), which costs no
    matrix, and its dot products vary no more than those of a dense one; on a GPU it sums in no fixed order.
    "rademacher" and "normal" multiply by a dense matrix of signs or normal numbers, as traker does;
    "factored" projects the input and the output gradient of each linear and convolutional layer, to
    sqrt(dim) each, and never forms the gradient (LoGra, Choe et al. 2024, arXiv 2405.13954): `dim` is
    then each layer's, and other layers are left out; "traker" is traker's own projector (its CUDA
    kernels on a GPU, where fast_jl is installed); "none" keeps the gradient as it is.

    A dense matrix is kept while it fits in `memory` bytes, else its blocks are made again for each batch;
    signs on a CPU are never a matrix: eight gradients' sums are looked up. Larger batches cost less.

    Raises: InputError for an unknown kind, or a `dim` that does not fit it.
    """

    kind: Kind = "sparse"
    dim: int = 2048
    seed: int = 0
    memory: int = 2**31

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise InputError(f"There is no projection {self.kind!r}; there is {', '.join(_KINDS)}.")
        if self.kind != "none" and self.dim < 1:
            raise InputError(f"A projection has at least one feature, not {self.dim}.")
        if self.kind == "factored" and math.isqrt(self.dim) ** 2 != self.dim:
            raise InputError(
                f"A factored projection has a square number of features a layer, not {self.dim}."
            )

    def about(self) -> dict[str, Any]:
        """What the features depend on."""
        return (
            {"kind": self.kind}
            if self.kind == "none"
            else {"kind": self.kind, "dim": self.dim, "seed": self.seed}
        )

    def on(self, n_parameters: int, device: torch.device) -> Callable[[Tensor, int], Tensor]:
        """The projection of gradients [example, parameter] of checkpoint number k, to [example, feature]."""
        if self.kind == "none":
            return lambda gradients, _: gradients
        if self.kind == "sparse":
            return _Sparse(n_parameters, self.dim, self.seed, device)
        if self.kind == "traker":
            return _traker(n_parameters, self.dim, self.seed, device)
        if self.kind == "rademacher" and device.type == "cpu" and self.dim >= _signs.NARROW:
            return lambda gradients, _: _signs.product(gradients, self.dim, self.seed) / math.sqrt(self.dim)
        assert self.kind in ("rademacher", "normal")
        return _Dense(n_parameters, self.dim, self.seed, device, self.kind, self.memory)

    def side(
        self, width: int, layer: str, which: int, device: torch.device
    ) -> Float[Tensor, "width dim"] | None:
        """A layer's projection of one side, orthonormal; None if it is narrow enough to be kept whole."""
        dim = math.isqrt(self.dim)
        if width <= dim:
            return None
        name = sum(ord(c) * 31**i for i, c in enumerate(layer)) % 2**31
        normal = torch.randn(width, dim, generator=mixed(self.seed, name, which), dtype=torch.float64)
        return (torch.linalg.qr(normal).Q * math.sqrt(width / dim)).float().to(device)


class _Dense:
    def __init__(self, n: int, dim: int, seed: int, device: torch.device, kind: str, memory: int) -> None:
        self.n, self.dim, self.seed, self.device, self.kind = n, dim, seed, device, kind
        self.kept = list(self._pieces()) if n * dim * 4 <= memory else None

    def __call__(self, gradients: Tensor, _: int) -> Tensor:
        out, at = gradients.new_zeros(len(gradients), self.dim), 0
        for piece in self.kept if self.kept is not None else self._pieces():
            rows = min(len(piece), self.n - at)
            out.addmm_(gradients[:, at : at + rows], piece[:rows])
            at += rows
        return out.div_(math.sqrt(self.dim))

    def _pieces(self) -> Iterator[Tensor]:
        """The matrix from its first row to its last, in pieces."""
        if self.kind == "rademacher":
            for piece in _signs.pieces(self.n, self.dim, self.seed):
                yield _signs.as_matrix(piece.to(self.device))
            return
        rows = max(1, _BLOCK // self.dim)
        for number, start in enumerate(range(0, self.n, rows)):
            count = min(rows, self.n - start)
            rng = mixed(self.seed, number)
            yield torch.randn(count, self.dim, generator=rng).to(self.device)


class _Sparse:
    def __init__(self, n: int, dim: int, seed: int, device: torch.device) -> None:
        rng = mixed(seed)
        self.dim = dim
        self.to = torch.randint(dim, (n,), generator=rng).to(device)
        self.signs = _signs.signs(n, rng).to(device)

    def __call__(self, gradients: Tensor, _: int) -> Tensor:
        out = gradients.new_zeros(self.dim, len(gradients))
        return out.index_add_(0, self.to, (gradients * self.signs).T).T


def _traker(n: int, dim: int, seed: int, device: torch.device) -> Callable[[Tensor, int], Tensor]:
    try:
        from trak.projectors import BasicProjector, CudaProjector, ProjectionType
    except ImportError:
        raise InputError("The projection 'traker' needs it: pip install mm-interp[attribution].") from None
    kind = ProjectionType("rademacher")
    if device.type == "cuda":
        projector = CudaProjector(n, dim, seed, kind, device, max_batch_size=32)
    else:
        projector = BasicProjector(n, dim, seed, kind, device)
    return lambda gradients, k: projector.project(gradients, model_id=k) / math.sqrt(dim)
