"""A matrix of random signs that is never laid out whole: a byte stands for eight rows of one column.

Eight numbers have 256 sums with signs. Once those are in a table, a column adds one of them for eight rows,
where a matrix product multiplies and adds eight times (Arlazarov et al. 1970, over another ring).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from methods_multimodal.core.generators import mixed

# Rows of a piece, for which each column has 32 bytes; and so many numbers of pieces are made at a time.
ROWS = 256
_BYTES = ROWS // 8
_AT_A_TIME = 2**22
# Gradients at a time: their table of sums stays in a processor's cache.
_AT_ONCE = 32
# Narrower, a table costs more than it saves.
NARROW = 512


def random_bytes(count: int, rng: torch.Generator) -> UInt8[Tensor, " count"]:
    """Uniform random bytes, made of random 64-bit words."""
    return torch.randint(-(2**63), 2**63 - 1, (-(-count // 8),), generator=rng).view(torch.uint8)[:count]


def table() -> Float[Tensor, "256 8"]:
    """The signs a byte stands for, the lowest bit's first."""
    return ((torch.arange(256)[:, None] >> torch.arange(8)) & 1).float().mul_(2).sub_(1)


def signs(count: int, rng: torch.Generator) -> Float[Tensor, " count"]:
    """`count` random signs, each +1 or -1 with probability one half."""
    return table()[random_bytes(-(-count // 8), rng).int()].flatten()[:count]


def pieces(n: int, dim: int, seed: int) -> Iterator[UInt8[Tensor, "dim byte"]]:
    """The matrix [n, dim] from its first rows to its last, `ROWS` at a time."""
    at_once, left = max(1, _AT_A_TIME // (ROWS * dim)), -(-n // ROWS)
    number = 0
    while left > 0:
        bytes_of_pieces = random_bytes(at_once * dim * _BYTES, mixed(seed, number)).view(at_once, dim, _BYTES)
        yield from bytes_of_pieces[:left]
        left, number = left - at_once, number + 1


def as_matrix(piece: UInt8[Tensor, "dim byte"]) -> Float[Tensor, "row dim"]:
    """A piece as the matrix it stands for."""
    return table().to(piece.device)[piece.int()].flatten(1).T


def product(gradients: Float[Tensor, "example n"], dim: int, seed: int) -> Float[Tensor, "example dim"]:
    """The gradients times the whole matrix, on a CPU."""
    n, signs_of = gradients.shape[1], table().to(gradients.dtype)
    blocks = gradients.split(_AT_ONCE)
    totals = [block.new_zeros(dim, len(block)) for block in blocks]
    firsts = torch.arange(_BYTES, dtype=torch.int32) * 256
    for number, piece in enumerate(pieces(n, dim, seed)):
        part = slice(number * ROWS, (number + 1) * ROWS)
        index = piece.int() + firsts
        for block, total in zip(blocks, totals, strict=True):
            rows = block[:, part].T
            rows = pad(rows, (0, 0, 0, ROWS - len(rows))) if len(rows) < ROWS else rows
            sums = signs_of @ rows.reshape(_BYTES, 8, -1)
            total += embedding_bag(index, sums.flatten(0, 1), mode="sum")
    return torch.cat(totals, 1).T
