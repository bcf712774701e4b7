"""BatchTopK training whose only dense product is the encoder's: the same loss and gradients, sooner."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens import BatchTopKTrainingSAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor
from torch.nn.functional import embedding_bag

# The bound is set, by an estimate from some of the rows, so that this many times k a row pass it.
_MARGINS = (1.5, 4.0)
# More candidates than this many times k a row, and the dense step is sooner done.
_MOST = 24.0
_SAMPLED_ROWS = 64


class FastBatchTopK(BatchTopKTrainingSAE):
    """SAELens' BatchTopKTrainingSAE with a sparse training step; saves, loads and infers as it does.

    Of the dense products of a step (encoder, decoder, and three in the backward pass) only the
    encoder's is left: what is zero is never multiplied. The `k * batch` largest activations are
    found exactly, among those above a bound estimated from some rows; if too few or too many pass
    the bound, SAELens' own step is run. `n_dense_steps` counts how often.

    Decoder norms that rescale activations cancel out of the reconstruction, and so of its gradient.
    """

    n_dense_steps: int = 0

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """As SAELens'; `feature_acts` is a sparse COO tensor, and `hidden_pre` empty."""
        x = step_input.sae_in
        largest = None if self._needs_dense(x) else self._largest(x)
        if largest is None:
            self.n_dense_steps += 1
            return super().training_forward_pass(step_input)
        row, latent, acts = largest
        # What the decoder is multiplied by.
        norms = self.W_dec.detach().norm(dim=-1) if self.cfg.rescale_acts_by_decoder_norm else None
        values = acts if norms is None else acts / norms[latent]
        out: Any = _Reconstruction.apply(
            self._centred(x),
            row,
            latent,
            values,
            self.W_enc,
            self.b_enc,
            self.W_dec,
            self.b_dec,
            self.cfg.apply_b_dec_to_input,
        )
        mse = (out - x).square().sum(-1).mean()
        auxiliary = self._auxiliary(x, out, step_input.dead_neuron_mask)
        self._follow_threshold(acts)
        feature_acts = torch.sparse_coo_tensor(
            torch.stack([row, latent]),
            acts,
            (len(x), self.cfg.d_sae),
            is_coalesced=True,
            check_invariants=False,
        )
        return TrainStepOutput(
            sae_in=x,
            sae_out=out,
            feature_acts=feature_acts,
            hidden_pre=x.new_empty(0),
            loss=mse + auxiliary,
            losses={"mse_loss": mse, "auxiliary_reconstruction_loss": auxiliary},
            metrics={"topk_threshold": self.topk_threshold},
        )

    def _needs_dense(self, x: Tensor) -> bool:
        """Whether a hook is active on a dense value, or the maths is not the plain one."""
        hooked = any(point._forward_hooks for point in self.hook_dict.values())
        return (
            hooked
            or x.ndim != 2
            or x.dtype != self.dtype
            or x.requires_grad
            or self.cfg.normalize_activations in ("layer_norm", "constant_norm_rescale")
            or torch.is_autocast_enabled(x.device.type)
        )

    def _centred(self, x: Float[Tensor, "row d_in"]) -> Float[Tensor, "row d_in"]:
        return (x - self.b_dec.detach()) if self.cfg.apply_b_dec_to_input else x

    @torch.no_grad()
    def _largest(
        self, x: Float[Tensor, "row d_in"]
    ) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"], Float[Tensor, " n"]] | None:
        """Row, latent and value of the `k * row` largest positive activations, row by row.

        None if the candidates overflow, or there are too few to be sure.
        """
        # In SAELens' order of operations, so that rounding chooses alike.
        pre = (self._centred(x) @ self.W_enc).add_(self.b_enc)
        if self.cfg.rescale_acts_by_decoder_norm:
            pre.mul_(self.W_dec.norm(dim=-1))
        n_kept = int(self.cfg.k * len(x))
        flat = pre.view(-1)
        some = pre[:: max(1, len(x) // _SAMPLED_ROWS)].flatten()
        for margin in _MARGINS:
            n = min(int(margin * self.cfg.k * (some.numel() // self.cfg.d_sae)), some.numel())
            bound = some.topk(n).values[-1].clamp_min(0.0) if n else some.new_zeros(())
            above = _where(flat > bound)
            if len(above) > _MOST * n_kept:
                return None
            if len(above) >= n_kept:
                values = flat[above]
                if len(above) > n_kept:
                    kept = values.topk(n_kept, sorted=False).indices.sort().values
                    above, values = above[kept], values[kept]
                return above // self.cfg.d_sae, above % self.cfg.d_sae, values
            if bound == 0:  # Fewer than that are positive.
                return above // self.cfg.d_sae, above % self.cfg.d_sae, flat[above]
        return None

    def _auxiliary(self, x: Tensor, out: Tensor, dead: Tensor | None) -> Tensor:
        """SAELens' loss for dead latents, over the columns of the dead alone."""
        if dead is None or not self.cfg.aux_loss_coefficient or (n_dead := int(dead.sum())) == 0:
            return out.new_tensor(0.0)
        which = dead.nonzero()[:, 0]
        decoder = self.W_dec[which]
        pre = self.process_sae_in(x) @ self.W_enc[:, which] + self.b_enc[which]
        if self.cfg.rescale_acts_by_decoder_norm:
            pre = pre * decoder.norm(dim=-1)
        half = x.shape[-1] // 2
        top = pre.topk(min(half, n_dead), dim=-1, sorted=False)
        acts = torch.zeros_like(pre).scatter(-1, top.indices, top.values)
        if self.cfg.rescale_acts_by_decoder_norm:
            acts = acts * (1 / decoder.norm(dim=-1))
        error = (acts @ decoder - (x - out).detach()).square().sum(-1).mean()
        return self.cfg.aux_loss_coefficient * min(n_dead / half, 1.0) * error

    @torch.no_grad()
    def _follow_threshold(self, acts: Tensor) -> None:
        positive = acts[acts > 0]
        if len(positive):
            rate = self.cfg.topk_threshold_lr
            lowest = positive.min().to(self.topk_threshold.dtype)
            self.topk_threshold = (1 - rate) * self.topk_threshold + rate * lowest


class _Reconstruction(torch.autograd.Function):
    """The decoder's output for chosen activations, and the gradient of all four parameters."""

    @staticmethod
    def forward(
        ctx: Any,
        centred: Tensor,
        row: Tensor,
        latent: Tensor,
        values: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        tied: bool,
    ) -> Tensor:
        starts = _starts(row, len(centred))
        ctx.tied = tied
        ctx.save_for_backward(centred, row, latent, values, starts, W_enc, W_dec)
        return embedding_bag(latent, W_dec, starts, mode="sum", per_sample_weights=values) + b_dec

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = (g.contiguous() for g in grads)
        centred, row, latent, values, starts, W_enc, W_dec = ctx.saved_tensors
        slope = _dots(grad, W_dec, latent, starts)
        # The same entries, latent by latent.
        order = latent.argsort(stable=True)
        by_latent, columns = row[order], _starts(latent[order], len(W_dec))
        d_dec = embedding_bag(by_latent, grad, columns, mode="sum", per_sample_weights=values[order])
        d_enc = embedding_bag(by_latent, centred, columns, mode="sum", per_sample_weights=slope[order])
        d_bias = torch.zeros_like(W_dec[:, 0]).index_add_(0, latent, slope)
        d_b_dec = grad.sum(0)
        if ctx.tied:
            d_b_dec = d_b_dec - W_enc @ d_bias
        return None, None, None, None, d_enc.T, d_bias, d_dec, d_b_dec, None


def _dots(
    rows: Float[Tensor, "row d"], directions: Float[Tensor, "latent d"], latent: Tensor, starts: Tensor
) -> Float[Tensor, " n"]:
    """The dot product of each row with the directions chosen for it.

    It is what embedding_bag's gradient by its weights is, for which there is a kernel.
    """
    with torch.enable_grad():
        weights = rows.new_zeros(len(latent)).requires_grad_()
        bag = embedding_bag(latent, directions.detach(), starts, mode="sum", per_sample_weights=weights)
    (dots,) = torch.autograd.grad(bag, weights, rows)
    return dots


def _starts(sorted_numbers: Int[Tensor, " n"], n: int) -> Int[Tensor, " n_bags"]:
    """Where each number's run begins in a sorted list."""
    counts = torch.bincount(sorted_numbers, minlength=n)
    return counts.cumsum(0) - counts


def _where(mask: Tensor) -> Int[Tensor, " n"]:
    if mask.device.type == "cpu":  # NumPy's is several times faster.
        import numpy as np

        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.nonzero()[:, 0]
