"""How good an SAE is on a multimodal model: by role and step, and by what the model still can do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor

from integrations.sae_lens._data import inputs_of, items_of
from integrations.sae_lens._sites import (
    Tokens,
    editor,
    find_site,
    heads_side_by_side,
    layouts_of,
    mask_of,
    reads_of,
    stream_of,
    value_at,
)
from integrations.sae_lens.splice import check_fit, splice
from mm_adapters import Edit, InputError, Model, Read

Score = Callable[[Any, Sequence[int]], Tensor]


@dataclass
class _Tally:
    """Sums over rows of one role or step, in float64."""

    n: int = 0
    error: float = 0.0
    active: float = 0.0
    total: Tensor | None = None
    square: float = 0.0
    fired: Tensor | None = None

    def add(self, x: Tensor, out: Tensor, acts: Tensor) -> None:
        if not len(x):
            return
        x, out = x.double(), out.double()
        self.n += len(x)
        self.error += float((x - out).square().sum())
        self.square += float(x.square().sum())
        self.total = x.sum(0) if self.total is None else self.total + x.sum(0)
        self.active += float((acts != 0).sum())
        fired = (acts != 0).any(0)
        self.fired = fired if self.fired is None else self.fired | fired

    def scores(self) -> Scores:
        assert self.total is not None
        assert self.fired is not None
        variance = self.square - float(self.total.square().sum()) / self.n
        return Scores(
            n_rows=self.n,
            explained=1 - self.error / variance if variance else float("nan"),
            l0=self.active / self.n,
            dead=1 - float(self.fired.float().mean()),
        )


@dataclass(frozen=True)
class Scores:
    """Of `n_rows` activations: the share of their variance that is explained, how many latents are
    active in one on average, and which share of the latents never is."""

    n_rows: int
    explained: float
    l0: float
    dead: float


@dataclass(frozen=True)
class Recovered:
    """A score of the model with the site as it is, reconstructed, set to zero, and set to its mean.

    `of_zero` is (sae - zero) / (plain - zero): 1 if the SAE costs nothing, 0 if it is as bad as zeros.
    """

    plain: float
    sae: float
    zero: float
    mean: float

    @property
    def of_zero(self) -> float:
        return _share(self.sae, self.plain, self.zero)

    @property
    def of_mean(self) -> float:
        return _share(self.sae, self.plain, self.mean)


@dataclass(frozen=True)
class SAEReport:
    """What `evaluate` found: overall, per role, per step, and what the model still can do."""

    overall: Scores
    by_role: Mapping[str, Scores]
    by_step: Mapping[int, Scores] = field(default_factory=dict)
    recovered: Recovered | None = None

    def __str__(self) -> str:
        rows: list[tuple[str, Scores]] = [("all", self.overall), *self.by_role.items()]
        rows += [(f"step {step}", scores) for step, scores in self.by_step.items()]
        lines = [f"{'':<10} {'rows':>9} {'explained':>10} {'L0':>8} {'dead':>7}"]
        lines += [f"{n:<10} {s.n_rows:>9} {s.explained:>10.3f} {s.l0:>8.2f} {s.dead:>7.1%}" for n, s in rows]
        if self.recovered is not None:
            r = self.recovered
            lines.append(
                f"score {r.plain:z.3f}; with the SAE {r.sae:z.3f}, zeros {r.zero:z.3f}, "
                f"the mean {r.mean:z.3f}: "
                f"{r.of_zero:z.1%} recovered of zeros, {r.of_mean:z.1%} of the mean"
            )
        return "\n".join(lines)


@torch.no_grad()
def evaluate(
    model: Model,
    sae: SAE[Any],
    data: Any,
    *,
    tokens: Tokens | None = None,
    steps: Sequence[int] | None = None,
    inputs: Mapping[str, Any] | None = None,
    score: Score | None = None,
    batch_size: int = 32,
) -> SAEReport:
    """Variance explained, L0 and dead latents over held-out items, per role and step.

    Args:
        data: As `collect` takes it: a folder of images, or a list of images, prompts or dicts of inputs.
        tokens: The roles whose positions count; None: those that the SAE was trained on.
        steps: Of a sampling loop, the steps that count; None: all.
        inputs: Go to every run (a pipeline's `num_inference_steps`, a CLIP's texts, ...).
        score: `score(output, numbers)` -> [row], higher is better, where `numbers` says which items the
            rows are: `zero_shot`, `retrieval`, `answer_likelihood`, or your own. With it the report says
            which share of the score is recovered, against zero- and mean-ablation.
        batch_size: Items a run.
    """
    sae_site = check_fit(model, sae)
    tokens = tokens or sae.cfg.metadata.token_kind or "all"
    items = items_of(data)
    overall, roles, by_step = _Tally(), {}, {}
    for numbers in _parts(len(items), batch_size):
        arguments = inputs_of(model, [items[i] for i in numbers], numbers, inputs or {})
        run = model.run(arguments, read=reads_of(model, [sae_site], steps))
        value = value_at(run, sae_site)
        is_looped = sae_site.site.tower in model.loops()
        value = value if is_looped else value[None]
        layout = layouts_of(model, arguments, [sae_site]).get(sae_site.site.tower)
        layout = layout and stream_of(layout, sae_site, value.shape[2])
        assert tokens is not None
        mask = mask_of(layout, tokens, sae_site, *value.shape[1:3])
        for i, at_step in enumerate(value):
            x = at_step[mask].float()
            with heads_side_by_side(sae):
                acts = sae.encode(x)
                out = sae.decode(acts)
            overall.add(x, out, acts)
            if is_looped:
                step = i if steps is None else sorted(set(steps))[i]
                by_step.setdefault(step, _Tally()).add(x, out, acts)
            for role, rows in _by_role(layout, mask).items():
                roles.setdefault(role, _Tally()).add(x[rows], out[rows], acts[rows])
    assert overall.total is not None
    mean = (overall.total / overall.n).float()
    score_recovered = None
    if score is not None:
        assert tokens is not None
        score_recovered = recovered(
            model, sae, items, score, mean=mean, tokens=tokens, inputs=inputs, batch_size=batch_size
        )
    return SAEReport(
        overall.scores(),
        {role: tally.scores() for role, tally in roles.items()},
        {step: tally.scores() for step, tally in by_step.items()},
        score_recovered,
    )


@torch.no_grad()
def recovered(
    model: Model,
    sae: SAE[Any],
    data: Any,
    score: Score,
    *,
    mean: Float[Tensor, " d"],
    tokens: Tokens = "all",
    inputs: Mapping[str, Any] | None = None,
    batch_size: int = 32,
) -> Recovered:
    """The mean score with the site as it is, reconstructed, zeroed, and set to `mean`.

    Args:
        data, tokens, inputs, score, batch_size: As `evaluate` takes them.
        mean: What mean-ablation sets the chosen positions to, in the site's own width.
    """
    sae_site = check_fit(model, sae)
    items = items_of(data)
    is_looped = sae_site.site.tower == model.record.loop
    sums: dict[str, float] = dict.fromkeys(("plain", "sae", "zero", "mean"), 0.0)
    n = 0
    for numbers in _parts(len(items), batch_size):
        arguments = inputs_of(model, [items[i] for i in numbers], numbers, inputs or {})
        layout = layouts_of(model, arguments, [sae_site]).get(sae_site.site.tower)
        mask = None
        if layout is not None and tokens != "all":
            n_pos = layout.n_pos
            if is_looped:  # A site of one stream of a joint attention has that stream's positions.
                n_pos = value_at(model.run(arguments, read=reads_of(model, [sae_site], [0])), sae_site).shape[
                    -2
                ]
            mask = mask_of(layout, tokens, sae_site, layout.n_rows, n_pos)
        edits = {
            "plain": [],
            "sae": splice(model, sae, mask=mask, rows="cond" if is_looped else "all"),
            "zero": [_set(model, sae_site.site.name, torch.zeros_like(mean), mask)],
            "mean": [_set(model, sae_site.site.name, mean, mask)],
        }
        ends = {"last": model.row_positions(arguments)} if isinstance(score, _AnswerLikelihood) else {}
        for name, edit in edits.items():
            scores = score(model.run(arguments, edit=edit).output, numbers, **ends).float()
            sums[name] += float(scores.sum())
        n += len(numbers)
    return Recovered(**{name: total / n for name, total in sums.items()})


def zero_shot(labels: Sequence[int]) -> Score:
    """1 where a contrastive model's highest logit is the right text's; `labels[i]` is item i's.

    The texts are in `inputs={"text": [...]}`.
    """
    truth = torch.as_tensor(list(labels))

    def score(output: Any, numbers: Sequence[int]) -> Tensor:
        return (output.logits_per_image.argmax(-1).cpu() == truth[list(numbers)]).float()

    return score


def retrieval(k: int = 1) -> Score:
    """1 where an item's own text is among the `k` that a contrastive model finds nearest of all texts.

    The texts are in `inputs={"text": [...]}`, the i-th item's the i-th.
    """

    def score(output: Any, numbers: Sequence[int]) -> Tensor:
        nearest = output.logits_per_image.topk(k, dim=-1).indices.cpu()
        return (nearest == torch.as_tensor(list(numbers))[:, None]).any(-1).float()

    return score


@dataclass(frozen=True)
class _AnswerLikelihood:
    """`last` is where each row's last token stands; None: at the end, as rows padded on the left have it."""

    tokens: tuple[Tensor, ...]

    def __call__(
        self, output: Any, numbers: Sequence[int], last: Int[Tensor, " row"] | None = None
    ) -> Float[Tensor, " row"]:
        logs = torch.log_softmax(output.logits.float(), -1).cpu()
        ends = [logs.shape[1] - 1] * len(logs) if last is None else last.tolist()
        rows = [(row[:end], self.tokens[i]) for row, end, i in zip(logs, ends, numbers, strict=True)]
        return torch.stack([row[-len(answer) :].gather(1, answer[:, None]).sum() for row, answer in rows])


def answer_likelihood(tokenizer: Any, answers: Sequence[str]) -> Score:
    """The log-likelihood, in nats, of each item's answer, whose tokens end its text.

    In `evaluate` and `recovered` rows may be padded on either side. Called by itself it takes rows that are
    padded on the left, or `last=model.row_positions(inputs)`.
    """
    ids = (tokenizer(f" {answer}", add_special_tokens=False).input_ids for answer in answers)
    return _AnswerLikelihood(tuple(torch.tensor(one) for one in ids))


@torch.no_grad()
def noise_recovered(
    model: Model,
    sae: SAE[Any],
    data: Any,
    steps: Sequence[int],
    *,
    inputs: Mapping[str, Any] | None = None,
    batch_size: int = 16,
) -> dict[int, float]:
    """For each step, 1 - error with the SAE / error with zeros, of what the denoiser predicts there.

    The SAE (or the zeros) is there at that step only, so every prediction is of the same latent.
    """
    sae_site = check_fit(model, sae)
    loop = sae_site.site.tower
    if loop not in model.loops():
        raise InputError(f"{sae_site.name} is not in a sampling loop.")
    items = items_of(data)
    errors = {step: [0.0, 0.0] for step in steps}
    for numbers in _parts(len(items), batch_size):
        arguments = inputs_of(model, [items[i] for i in numbers], numbers, inputs or {})
        site = f"{loop}.hook_out"
        plain = model.run(arguments, read=[Read(site, steps=list(steps), rows="cond")])[site]
        zero = torch.zeros(sae.cfg.d_in)
        for i, step in enumerate(sorted(steps)):
            read = [Read(site, steps=[step], rows="cond")]
            edits = (
                splice(model, sae, steps=[step], rows="cond"),
                [_set(model, sae_site.site.name, zero, None, [step])],
            )
            for which, edit in enumerate(edits):
                edited = model.run(arguments, read=read, edit=edit)[site][0]
                errors[step][which] += float((edited - plain[i]).square().sum())
    return {step: 1 - with_sae / with_zeros for step, (with_sae, with_zeros) in errors.items()}


def monosemanticity(
    acts: Float[Tensor, "image latent"], embeddings: Float[Tensor, "image d"]
) -> Float[Tensor, " latent"]:
    """How alike the images are that activate a latent: the mean cosine of all pairs, weighted by the
    product of their activations, scaled to 0..1. NaN for a latent active in fewer than two images.

    Source: Pach et al. 2025, arXiv 2504.02821, equations 5 to 8.
    """
    low, high = acts.min(0).values, acts.max(0).values
    weight = ((acts - low) / (high - low).clamp_min(1e-12)).double()
    unit = torch.nn.functional.normalize(embeddings.double(), dim=-1)
    # The sum over pairs i != j of w_i w_j e_i.e_j is |sum w e|^2 without its diagonal.
    diagonal = weight.square().sum(0)
    together = (weight.T @ unit).square().sum(-1) - diagonal
    pairs = weight.sum(0).square() - diagonal
    return torch.where(pairs > 1e-9, together / pairs, torch.nan).float()


def _set(model: Model, site: str, vector: Tensor, mask: Tensor | None, steps: Any = None) -> Edit:
    """An edit that puts one vector at all positions, or at those of a mask."""
    sae_site = find_site(model, site)

    def put(flat: Tensor) -> Tensor:
        new = vector.to(flat).expand_as(flat)
        return new.clone() if mask is None else torch.where(mask.to(flat.device)[..., None], new, flat)

    rows: Any = "cond" if sae_site.site.tower in model.loops() else "all"
    return Edit(site, editor(sae_site, put), steps=steps, rows=rows)


def _parts(n: int, size: int) -> list[list[int]]:
    return [list(range(at, min(at + size, n))) for at in range(0, n, size)]


def _by_role(layout: Any, mask: Tensor) -> dict[str, Tensor]:
    """For each role, which of the chosen rows have it."""
    if layout is None:
        return {}
    roles = {role for row in layout.roles for role in row}
    return {role: layout.mask(role)[mask] for role in sorted(roles) if bool((layout.mask(role) & mask).any())}


def _share(value: float, best: float, worst: float) -> float:
    return float("nan") if best == worst else (value - worst) / (best - worst)
