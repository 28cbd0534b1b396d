"""What one batch leaves behind in the layers, and the clipped sum that is made of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmed.errors import ModelError
from fedmed.training.clipping.patients import Patients

Weighted = Callable[[Tensor, Tensor | None], Tensor]  # factors (n,), silent rows -> Σ_i factor_i · gradient_i
Products = Callable[[list[tuple[Tensor, Tensor]]], None]  # what a linear layer was given and got back, over its uses


class Recording:
    """Per-patient gradients of one batch, each kept in the form that is cheapest for its layer.

    A gradient is kept as per-image rows (small parameters), as per-patient tensors, or as its squared norms together
    with what is needed for the weighted sum later (Bu et al. 2022, arXiv:2210.00038, section 3: book-keeping).
    """

    def __init__(self, patients: Patients, groups: Mapping[nn.Parameter, int]) -> None:
        """Begin a batch; `groups` says which norm every trainable parameter counts for."""
        self.patients = patients
        self.images = len(patients.of_row)
        self.groups = groups
        self.uses: Counter[nn.Parameter] = Counter()
        self.squares: dict[int, Tensor] = {}  # per group (Q,) squared norms so far
        self.rows: dict[nn.Parameter, Tensor] = {}  # (n, size)
        self.kept: dict[nn.Parameter, Tensor] = {}  # (Q, *shape), or of the last patients alone
        self.later: dict[nn.Parameter, tuple[int, Weighted]] = {}  # how many of the first rows it is of
        self.leaves: dict[nn.Parameter, Tensor] = {}  # (n * size,) an own copy of the parameter for every image
        self.products: dict[nn.Parameter, tuple[Products, list[tuple[Tensor, Tensor]]]] = {}
        self.ends: list[Callable[[], None]] = []  # called after the backward pass
        self.anchor = torch.empty(0, requires_grad=True)

    def use(self, layer: str, rows: Tensor, *parameters: nn.Parameter | None) -> None:
        """Count that a layer reads its parameters, and check that its input is one row for every image.

        Raises:
            ModelError: If it is not.
        """
        if rows.shape[0] != self.images:
            raise ModelError(
                f"layer {layer} was given {rows.shape[0]} rows for {self.images} images. Under differential privacy "
                "the first axis of every layer's input is the images, because each image's gradient is clipped with "
                "its patient's; keep slices or windows in an axis of their own, as model.name = 'cnn-lstm' does"
            )
        self.uses.update(parameter for parameter in parameters if parameter is not None and parameter.requires_grad)

    def single(self, parameter: nn.Parameter) -> bool:
        """Whether the network reads a parameter once only."""
        return self.uses[parameter] == 1

    def watch(self, output: Tensor, received: Callable[[Tensor], None]) -> Tensor:
        """Call `received` with the gradient of `output`, which is returned.

        An output that no gradient would reach, since nothing before it is trained, is made to get one; autograd then
        has nothing to do before it.
        """
        if not output.requires_grad:
            output = _Root.apply(output, self.anchor)  # type: ignore[no-untyped-call]  # torch does not annotate it
        output.register_hook(received)  # type: ignore[no-untyped-call]  # torch does not annotate it
        return output

    def own(self, parameter: nn.Parameter) -> Tensor:
        """(n * size,) the values of a parameter repeated for each image; autograd leaves each image's gradient there.

        A layer that folds the images into its channels so has per-image gradients at the cost of its plain backward.
        """
        if parameter not in self.leaves:
            leaf = parameter.detach().reshape(-1).repeat(self.images)
            self.leaves[parameter] = leaf.requires_grad_(parameter.requires_grad)
        return self.leaves[parameter]

    def add_rows(self, parameter: nn.Parameter, rows: Tensor) -> None:
        """Add per-image gradients (n, size)."""
        self.rows[parameter] = self.rows[parameter] + rows if parameter in self.rows else rows

    def keep(self, parameter: nn.Parameter, gradients: Tensor) -> None:
        """Add per-patient gradients (Q, *shape); or fewer, of the last patients, where others' are postponed."""
        if self.single(parameter):  # while they are in the processor's cache
            self._add_squares_of_kept(parameter, gradients)
            self.kept[parameter] = gradients
        else:
            self.kept[parameter] = self.kept[parameter] + gradients if parameter in self.kept else gradients

    def postpone(self, parameter: nn.Parameter, squares: Tensor, weighted: Weighted, *, rows: int) -> None:
        """Add squared norms of a parameter that is read once; `weighted` makes the sum when the factors are known.

        `weighted` is given a factor for every row and the rows that must not count, which may hold NaN.

        Args:
            parameter: Whose gradients they are of.
            squares: (Q,), or of the first patients alone.
            weighted: Makes their sum.
            rows: Of these patients.
        """
        self.add_squares(self.groups[parameter], squares)
        self.later[parameter] = rows, weighted

    def add_squares(self, group: int, squares: Tensor, *, first: int = 0) -> None:
        """Add squared norms to a group, of the patients from `first` on."""
        missing = len(self.patients.names) - first - len(squares)
        squares = F.pad(squares, (first, missing)) if first or missing else squares
        self.squares[group] = self.squares[group] + squares if group in self.squares else squares

    def add_product(self, parameter: nn.Parameter, inputs: Tensor, gradient: Tensor, products: Products) -> None:
        """Collect the uses of a linear layer's weight: inputs (n, T, features) and gradient (n, T, outputs)."""
        self.products.setdefault(parameter, (products, []))[1].append((inputs, gradient))

    @torch.no_grad()
    def finish_(self, bounds: Tensor) -> Tensor:
        """Add the clipped sum to every trainable parameter's .grad, and return the norms (Q, groups).

        c = min(1, bound / ‖gradient of the patient‖), per group. A patient whose norm is not finite counts as 0, so
        that the sum stays finite and no patient adds more than the bound.

        Args:
            bounds: (groups,).
        """
        for end in self.ends:
            end()
        for products, uses in self.products.values():
            products(uses)
        self.products.clear()
        small = self._small_parameters()
        nothing = bounds.new_zeros(len(self.patients.names))
        norms = torch.stack([self.squares.get(group, nothing) for group in range(len(bounds))], dim=1)
        norms = norms.clamp(min=0).sqrt()  # rounding can leave a norm of nothing just below 0
        factors = bounds / norms.clamp(min=bounds)  # (Q, groups)
        finite = norms.isfinite().all(dim=1)  # (Q,)
        silent: Tensor | None = None  # rows
        if not finite.all():
            factors = factors.masked_fill(~finite[:, None], 0)
            silent = (~self.patients.spread(finite)).nonzero().flatten()
        of_rows = self.patients.spread(factors)  # (n, groups)
        for group, (parameters, gradients) in small.items():
            sums = torch.mv(quiet(gradients, (~finite).nonzero().flatten()).t(), factors[:, group])
            start = 0
            for parameter in parameters:  # no split: autograd forbids changing one of several views in place
                _add_(parameter, sums[start : start + parameter.numel()])
                start += parameter.numel()
        small.clear()
        while self.kept:
            parameter, gradients = self.kept.popitem()
            if silent is not None:
                lost = ~finite[-len(gradients) :]
                gradients = gradients.masked_fill(lost.view(-1, *[1] * (gradients.dim() - 1)), 0)
            _add_(parameter, torch.mv(gradients.flatten(1).t(), factors[-len(gradients) :, self.groups[parameter]]))
        while self.later:
            parameter, (rows, weighted) = self.later.popitem()
            unheard = None if silent is None else silent[silent < rows]
            _add_(parameter, weighted(of_rows[:rows, self.groups[parameter]], unheard))
        return norms

    def _add_squares_of_kept(self, parameter: nn.Parameter, gradients: Tensor) -> None:
        first = len(self.patients.names) - len(gradients)
        self.add_squares(self.groups[parameter], square_norms(gradients), first=first)

    def _small_parameters(self) -> dict[int, tuple[list[nn.Parameter], Tensor]]:
        """Per group, the parameters with per-image rows, and (Q, sizes) the patients' sums of these; norms are added.

        What is released is made of these sums, and not of the rows once more: rows of one patient may cancel.
        """
        for parameter, leaf in self.leaves.items():
            if leaf.grad is not None:
                self.add_rows(parameter, leaf.grad.view(self.images, -1))
        self.leaves.clear()
        several = {parameter for parameter in self.kept if not self.single(parameter)}
        for parameter in several & self.rows.keys():
            self.kept[parameter] = self.kept[parameter] + self.patients.sums(self.rows.pop(parameter)).view_as(
                self.kept[parameter]
            )
        for parameter in several:
            self._add_squares_of_kept(parameter, self.kept[parameter])
        parameters: dict[int, list[nn.Parameter]] = {}
        for parameter in self.rows:
            parameters.setdefault(self.groups[parameter], []).append(parameter)
        small = {
            group: (of, self.patients.sums(torch.cat([self.rows.pop(p) for p in of], dim=1)))
            for group, of in parameters.items()
        }
        for group, (_, gradients) in small.items():
            self.add_squares(group, square_norms(gradients))
        return small


class _Root(torch.autograd.Function):
    """The identity, whose output asks for a gradient although nothing before it is trained."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, output: Tensor, anchor: Tensor) -> Tensor:
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[None, None]:
        return None, None


def square_norms(rows: Tensor) -> Tensor:
    """(n,) squared Euclidean norms of rows (n, …)."""
    norms: Tensor = torch.linalg.vector_norm(rows.flatten(1), dim=1)
    return norms.square()


def quiet(rows: Tensor, silent: Tensor | None) -> Tensor:
    """`rows` (n, …) with the silent ones zero, whatever they held."""
    return rows if silent is None else rows.index_fill(0, silent, 0)


def full(tensor: Tensor) -> Tensor:
    """The tensor in float32 at least: norms and sums of half-precision activations are not rounded to half."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _add_(parameter: nn.Parameter, gradient: Tensor) -> None:
    gradient = gradient.view_as(parameter).to(parameter.dtype)
    if parameter.grad is None:
        same = gradient.stride() == parameter.stride()  # fused optimizers take no notice of a gradient's strides
        parameter.grad = gradient if same else torch.empty_like(parameter).copy_(gradient)
    else:
        parameter.grad += gradient
