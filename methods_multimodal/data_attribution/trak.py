"""Scores through the features' own kernel: TRAK, D-TRAK, Journey-TRAK, LoGra."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from methods_multimodal.data_attribution.features import Features, check_match
from methods_multimodal.data_attribution.scorers import ROWS, Block, columns
from mm_adapters import InputError
from mm_adapters.store import Store


@dataclass(frozen=True, eq=False)
class Kernel:
    """The sum over training examples of the outer product of their features, taken apart for any damping.

    One for each run of features: `eigenvalues` [feature] ascending, `eigenvectors` [feature, feature],
    `runs` (start, stop). What is left outside a run's diagonal block counts as zero.
    """

    runs: tuple[tuple[int, int], ...]
    eigenvalues: tuple[Tensor, ...]
    eigenvectors: tuple[Tensor, ...]

    @classmethod
    def of(cls, store: Store, name: str, blocks: Literal["all", "module"] = "all") -> Kernel:
        """One pass over a column; memory is the square of the (longest run of) features."""
        dim = store.columns[name].shape[0]
        bounds = store.about["blocks"] if blocks == "module" else [("all", 0, dim)]
        runs = tuple((int(a), int(b)) for _, a, b in bounds)
        sums = [torch.zeros(b - a, b - a, dtype=torch.float64) for a, b in runs]
        for rows in columns(store, name):
            for total, (a, b) in zip(sums, runs, strict=True):
                part = rows[:, a:b].double()
                total.addmm_(part.T, part)
        decomposed = [torch.linalg.eigh(total) for total in sums]
        values = tuple(v.clamp_min(0) for v, _ in decomposed)
        return cls(runs, values, tuple(vectors for _, vectors in decomposed))

    def solve(
        self, query: Float[Tensor, "query feature"], damping: float, relative: bool
    ) -> Float[Tensor, "query feature"]:
        """Each query's features times the inverse of the damped kernel.

        `relative` damping is in units of a run's mean eigenvalue.
        """
        out = torch.zeros(query.shape, dtype=torch.float64)
        for (a, b), values, vectors in zip(self.runs, self.eigenvalues, self.eigenvectors, strict=True):
            term = damping * float(values.mean()) if relative else damping
            inverse = (values + term).reciprocal()
            out[:, a:b] = (query[:, a:b].double() @ vectors * inverse) @ vectors.T
        return out


@dataclass(frozen=True)
class Trak:
    """phi(query) (Phi^T Phi + damping)^-1 phi(train), averaged over checkpoints, times a weight.

    With `measure="loss"` this is TRAK for diffusion; with another output function of the denoiser,
    `measure="output_norm"`, it is D-TRAK; at each step of a query's own trajectory, Journey-TRAK
    (`journey_trak`); over factored features with `blocks="module"`, LoGra. `fit(store)` keeps the kernel, so
    that `damped` ones cost no further pass over it.

    `damping` is in units of the kernel's mean eigenvalue (`relative=False`: as it is). `weight` makes of
    the stored values [train] what multiplies an example's score (TRAK's Q: the derivative of the loss by
    the output function; None: one). `leverage` divides by one minus the example's leverage, which TRAK
    drops and which makes it exact for linear least squares.

    Source: Park et al. 2023, arXiv 2303.14186; Zheng et al. 2024, arXiv 2311.00500 (D-TRAK); Georgiev et
    al. 2023, arXiv 2312.06205 (Journey-TRAK); Choe et al. 2024, arXiv 2405.13954 (LoGra).
    """

    measure: str = "loss"
    query_measure: str | None = None
    damping: float = 0.1
    relative: bool = True
    blocks: Literal["all", "module"] = "all"
    weight: Callable[[Tensor], Tensor] | None = None
    leverage: bool = False
    kernels: dict[str, Kernel] | None = None

    def fit(self, store: Store) -> Trak:
        """The same scorer with its kernels fitted to a store, to be used with several dampings."""
        names = [n for n in store.columns if n.startswith(f"{self.measure}@")]
        return replace(self, kernels={name: Kernel.of(store, name, self.blocks) for name in names})

    def damped(self, damping: float) -> Trak:
        """The same scorer, kernels and all, with another damping."""
        return replace(self, damping=damping)

    def pieces(self, store: Store, queries: Features) -> Iterator[Block]:
        """The scores, a piece at a time; see `scorers.Scorer`.

        Raises: InputError for a damping that is not positive where the kernel has no inverse.
        """
        pairs = check_match(store, queries, self.measure, self.query_measure or self.measure)
        kernels = self.kernels or self.fit(store).kernels
        assert kernels is not None
        for name, _ in pairs:
            lowest = min(float(v[0] / v.mean().clamp_min(1e-300)) for v in kernels[name].eigenvalues)
            if self.damping < 0 or (self.damping == 0 and lowest < 1e-12):
                raise InputError(
                    f"The kernel of {name} has no inverse with damping={self.damping}: it has more features "
                    "than examples, or features that say the same. Pass a positive damping."
                )
        ready = {
            name: kernels[name].solve(queries.columns[q], self.damping, self.relative).float()
            for name, q in pairs
        }
        for rows in store.views(ROWS, [c for name, _ in pairs for c in (name, f"value.{name}")]):
            parts, weights = [], []
            for name, _ in pairs:
                features = rows[name].float()
                part = ready[name] @ features.T
                if self.leverage:
                    solved = kernels[name].solve(features, self.damping, self.relative)
                    part = part / (1 - (solved * features).sum(1)).float()
                parts.append(part)
                weights.append(torch.ones(()) if self.weight is None else self.weight(rows[f"value.{name}"]))
            yield torch.stack(parts).mean(0) * torch.stack(weights).mean(0)
