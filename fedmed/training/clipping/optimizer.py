"""Opacus' optimizer above the clipping engine, without its copies of the network."""

from __future__ import annotations

from opacus.optimizers import DPOptimizerFastGradientClipping


class ClippedSumOptimizer(DPOptimizerFastGradientClipping):  # type: ignore[misc]  # Opacus is not annotated
    """DPOptimizerFastGradientClipping that takes clipped sums over instead of copying them.

    Noise, scaling, skipped steps of physical batches and the accountant's hook are Opacus'; training puts noise of the
    site's own in their place (`fedmed.training.private.SecretNoiseOptimizer`).
    """

    def accumulate(self) -> None:
        """Move each .grad to the sum of the physical batches so far."""
        for p in self.params:
            if p.summed_grad is None:
                p.summed_grad = p.grad
            else:
                p.summed_grad += p.grad
            p.grad = None
