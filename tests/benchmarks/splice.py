"""What concepts cost: all rows solved together, beside one scikit-learn Lasso for each.

python -m tests.benchmarks.splice [--small]
"""

from __future__ import annotations

import argparse
import time
import warnings

import torch
from sklearn.linear_model import Lasso
from torch import Tensor

from methods_multimodal.text_explanations.sparse_coding import solve

LIMITS = {"scikit-learn / ours": 50.0, "largest difference of objectives": 1e-5}


def problem(n_rows: int, n_concepts: int, width: int) -> tuple[Tensor, Tensor]:
    """Rows mixed of ten correlated concepts each, with noise; all of length one."""
    g = torch.Generator().manual_seed(0)
    shared = torch.randn(60, width, generator=g)
    words = torch.randn(n_concepts, 60, generator=g) @ shared / 8
    words = torch.nn.functional.normalize(words + 0.6 * torch.randn(n_concepts, width, generator=g), dim=1)
    mixed = torch.zeros(n_rows, n_concepts)
    for row in mixed:
        row[torch.randperm(n_concepts, generator=g)[:10]] = torch.rand(10, generator=g)
    rows = mixed @ words + 0.05 * torch.randn(n_rows, width, generator=g)
    return torch.nn.functional.normalize(rows, dim=1), words


def measured(
    n_rows: int, n_concepts: int, width: int, l1: float, sample: int, rounds: int
) -> dict[str, float]:
    """Processor time of both in turn; scikit-learn on a sample of the rows, at SpLiCE's settings."""
    rows, words = problem(n_rows, n_concepts, width)
    features, aims = words.double().numpy().T, rows.double().numpy()
    ratios, worst = [], 0.0
    weights = solve(rows, words, l1)
    for turn in range(rounds):
        start = time.process_time()
        weights = solve(rows, words, l1)
        ours = (time.process_time() - start) / n_rows
        theirs = 0.0
        for i in range(turn * sample, (turn + 1) * sample):
            lasso = Lasso(
                alpha=l1 / (2 * width), positive=True, fit_intercept=False, max_iter=10_000, tol=1e-6
            )
            start = time.process_time()
            lasso.fit(features, aims[i])
            theirs += (time.process_time() - start) / sample
            own, other = (
                float((w.double() @ words.double() - rows[i].double()).square().sum() + l1 * w.sum())
                for w in (weights[i], torch.tensor(lasso.coef_))
            )
            worst = max(worst, abs(own - other) / other)
        ratios.append(theirs / ours)
    return {
        "scikit-learn / ours": sorted(ratios)[len(ratios) // 2],
        "largest difference of objectives": worst,
        "concepts a row": float((weights > 0).sum(1).float().mean()),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--small", action="store_true", help="A tenth of the concepts, in seconds")
    parser.add_argument("--l1", type=float, default=0.25)
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    n_concepts = 1000 if options.small else 10_000
    rows = measured(256, n_concepts, 512, options.l1, sample=3 if options.small else 8, rounds=5)
    missed = 0
    for name, value in rows.items():
        limit = None if options.small and name.startswith("scikit") else LIMITS.get(name)
        good = limit is None or (value >= limit if name.startswith("scikit") else value <= limit)
        missed += not good
        verdict = "" if limit is None else f"limit {limit:g} " + ("ok" if good else "MISSED")
        print(f"{name:<36} {value:10.3g}  {verdict}")
    return int(missed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
