"""Opacus' optimizer above the clipping engine, without its copies of the network."""

from __future__ import annotations

from opacus.optimizers import DPOptimizerFastGradientClipping
from opacus.optimizers.optimizer import _check_processed_flag, _generate_noise, _mark_as_processed


class ClippedSumOptimizer(DPOptimizerFastGradientClipping):  # type: ignore[misc]  # Opacus is not annotated
    """DPOptimizerFastGradientClipping that takes clipped sums over instead of copying them, and noises them in place.

    Noise, scaling, skipped steps of physical batches and the accountant's hook are Opacus'. With `zero_grad` between
    batches, no more than one gradient of the network is in memory after the backward pass.
    """

    def accumulate(self) -> None:
        """Move each .grad to the sum of the physical batches so far."""
        for p in self.params:
            if p.summed_grad is None:
                p.summed_grad = p.grad
            else:
                p.summed_grad += p.grad
            p.grad = None

    def add_noise(self) -> None:
        """Add noise of standard deviation σ C to the sums, which become the .grad."""
        for p in self.params:
            _check_processed_flag(p.summed_grad)  # a sum that was noised already
            noise = _generate_noise(
                std=self.noise_multiplier * self.max_grad_norm,
                reference=p.summed_grad,
                generator=self.generator,
                secure_mode=self.secure_mode,
            )
            # A view: Opacus' mark is an attribute of the sum, and must not pass to a .grad that zero_grad fills anew.
            p.grad = p.summed_grad.add_(noise).view_as(p)
            _mark_as_processed(p.summed_grad)
