"""The weight gradient of every convolution, and its per-patient norms, as one function of two stacks of maps.

    G[o, c, δ] = Σ_q points[o, q] · maps[c, q · stride + δ · dilation − padding]

For a convolution `maps` is its input and `points` the gradient of its output. A transposed convolution is the adjoint:
there `maps` is the gradient of its output and `points` its input. With A the patches of `maps` and B the `points` of a
patient as matrices, positions in columns, G = B Aᵀ and ‖G‖² = ⟨AᵀA, BᵀB⟩ (the ghost norm of Li et al. 2021,
arXiv:2110.05679, section 4), which is cheap where there are few positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from fedmed.training.clipping.patients import Block, counted, each
from fedmed.training.clipping.recording import full, quiet
from fedmed.training.clipping.rounding import scaled, squares_above

TRANSIENT = 2**22  # numbers in a temporary tensor, above which a product is made in several parts
LANES = 16  # floats that the processor multiplies at once
HEAVY = 2**17  # weights of a layer, above which a convolution with as many groups as patients is slow
LARGE = 2000  # positions, from which on one patient's convolution keeps a core busy


@dataclass(frozen=True, kw_only=True)
class Window:
    """How the patches of a convolution lie on its maps, a number for each axis."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def pointwise(self) -> bool:
        """Whether a patch is one position, and every position is one."""
        return max(self.kernel) == max(self.stride) == 1 and max(self.padding) == 0

    @property
    def steps_by_one(self) -> bool:
        """Whether there is a patch at every position."""
        return max(self.stride) == 1


def gradients(maps: Tensor, points: Tensor, window: Window, blocks: Sequence[Block]) -> Tensor:
    """(patients, O, C / groups, *kernel) the weight gradient of every patient of some blocks.

    On a CPU as the weight gradient of one convolution whose groups are the patients, which costs no more than the plain
    one where the library has a fast path for it: channels in multiples of 16, weights that fit its cache.

    Args:
        maps: (n, C, *sides).
        points: (n, O, *sides).
        window: Of the convolution.
        blocks: Of the rows.
    """
    maps, points = full(maps), full(points)
    if window.pointwise or maps.is_cuda:
        return _joined([_by_products(maps, points, window, block) for block in blocks])
    volumes, weights = len(window.kernel) > 2, prod(_shape(maps, points, window))
    small, large = min(maps.shape[1], points.shape[1]), prod(points.shape[2:]) >= LARGE
    even = maps.shape[1] % LANES == points.shape[1] % LANES == 0 and window.groups == 1
    if volumes or (even and weights < HEAVY and not large):
        lanes = LANES if not even and window.groups == 1 and small > LANES // 2 else 1
        return _joined([_by_groups(maps, points, window, block, lanes) for block in blocks])
    found = maps.new_empty(counted(blocks), *_shape(maps, points, window))
    for number, rows in enumerate(each(blocks)):
        found[number] = weight_gradient(maps[rows], points[rows], window)
    return found


def squares_by_gram(maps: Tensor, points: Tensor, window: Window, blocks: Sequence[Block]) -> Tensor:
    """(patients,) squared norms of the weight gradients of some blocks, rounded up, without these."""
    found = []
    for block in blocks:
        positions = block.images * max(prod(points.shape[2:]), prod(maps.shape[2:]))
        for part in block.parts(max(1, TRANSIENT // (positions**2 * window.groups))):
            found.append(_gram(full(maps[part.rows]), full(points[part.rows]), window, part.images))
    return torch.cat(found)


def weighted(maps: Tensor, points: Tensor, window: Window, factors: Tensor, silent: Tensor | None) -> Tensor:
    """Σ_i factor_i · G_i for factors (n,); silent rows count as 0."""
    maps, points = quiet(full(maps), silent), quiet(full(points), silent)
    points = points * factors.view(-1, *[1] * (points.dim() - 1))
    positions = prod(points.shape[2:])
    if window.groups > 1 or (positions > 64 if window.pointwise else 4 * len(points) * positions > points.shape[1]):
        return weight_gradient(maps, points, window)
    # One product of two matrices: the library's convolution spends more on laying out large weights than on small maps.
    a, b = (_matrices(rows, len(rows), 1)[0] for rows in (maps if window.pointwise else patches(maps, window), points))
    return (b @ a.t()).view(_shape(maps, points, window))


def weight_gradient(maps: Tensor, points: Tensor, window: Window) -> Tensor:
    """(O, C / groups, *kernel) the sum of the weight gradients of all rows."""
    weight = maps.new_empty(1).expand(_shape(maps, points, window))  # only its shape is read
    _, gradient, _ = torch.ops.aten.convolution_backward(
        points,
        maps,
        weight,
        None,
        window.stride,
        window.padding,
        window.dilation,
        False,
        [0] * len(window.kernel),
        window.groups,
        [False, True, False],
    )
    found: Tensor = gradient
    return found


def _shape(maps: Tensor, points: Tensor, window: Window) -> tuple[int, ...]:
    return points.shape[1], maps.shape[1] // window.groups, *window.kernel


def _by_groups(maps: Tensor, points: Tensor, window: Window, block: Block, lanes: int) -> Tensor:
    """(patients, O, C / groups, *kernel) by one convolution whose groups are the patients.

    Args:
        maps: (n, C, *sides).
        points: (n, O, *sides).
        window: Of the convolution.
        block: The patients.
        lanes: Channels are filled up with zeros to a multiple of it.
    """
    shape = _shape(maps, points, window)
    together = []
    for rows in (maps, points):
        each = _filled(rows[block.rows], lanes)
        each = each.reshape(block.patients, block.images, *each.shape[1:]).transpose(0, 1)
        together.append(each.reshape(block.images, -1, *each.shape[3:]))  # (images, patients * channels, *sides)
    found = weight_gradient(together[0], together[1], replace(window, groups=block.patients * window.groups))
    return found.view(block.patients, -1, *found.shape[1:])[:, : shape[0], : shape[1]]


def _filled(rows: Tensor, lanes: int) -> Tensor:
    missing = -rows.shape[1] % lanes
    return F.pad(rows, [0, 0] * (rows.dim() - 2) + [0, missing]) if missing else rows


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _by_products(maps: Tensor, points: Tensor, window: Window, block: Block) -> Tensor:
    """(patients, O, C / groups, *kernel) by one matrix product for every patient, patches laid out in memory."""
    size = prod(window.kernel) * maps[0].numel() * block.images
    parts = []
    for part in block.parts(max(1, 16 * TRANSIENT // size) if not window.pointwise else block.patients):
        rows = full(maps[part.rows])
        if not window.pointwise:
            rows = patches(rows, window)
        a = _matrices(rows, part.images, window.groups)  # (patients * groups, C / groups * K, images * T)
        b = _matrices(full(points[part.rows]), part.images, window.groups)
        parts.append(torch.bmm(b, a.transpose(1, 2)))
    return _joined(parts).view(block.patients, *_shape(maps, points, window))


def _gram(maps: Tensor, points: Tensor, window: Window, images: int) -> Tensor:
    b, size_of_b = scaled(_matrices(points, images, window.groups))
    of_points = torch.bmm(b.transpose(1, 2), b)  # (patients * groups, images * T, images * T)
    slides = window.steps_by_one and not window.pointwise
    read = maps if window.pointwise or slides else patches(maps, window)
    a, size_of_a = scaled(_matrices(read, images, window.groups))
    of_maps = torch.bmm(a.transpose(1, 2), a)
    if slides:
        of_maps = _slid(of_maps, window, images, maps.shape[2:], points.shape[2:])
    depths = prod(_shape(maps, points, window)[1:]), b.shape[1]
    squares = squares_above(of_maps.reshape(of_points.shape), of_points, depths=depths) * (size_of_a * size_of_b) ** 2
    return squares.view(-1, window.groups).sum(1)


def _slid(gram: Tensor, window: Window, images: int, sides: tuple[int, ...], outputs: tuple[int, ...]) -> Tensor:
    """AᵀA of patches from MᵀM of single positions: Σ_δ (MᵀM)[q + δ, q' + δ], one axis after the other.

    The patches of a 3 × 3 convolution hold every position nine times; this way none of them is multiplied twice.

    Args:
        gram: (patients * groups, images * positions, images * positions).
        window: With stride 1.
        images: Of each patient.
        sides: Of the maps.
        outputs: Sides of the points.
    """
    axes = len(sides)
    gram = gram.view(-1, images, *sides, images, *sides)
    for axis in range(axes):
        kernel, padding, dilation = window.kernel[axis], window.padding[axis], window.dilation[axis]
        if kernel == 1 and padding == 0:
            continue
        first, second = 2 + axis, 3 + axes + axis
        shape = list(gram.shape)
        shape[first] = shape[second] = outputs[axis]
        total = gram.new_zeros(shape)
        for step in range(kernel):
            offset = step * dilation - padding
            low, high = max(0, -offset), min(outputs[axis], sides[axis] - offset)
            if low < high:
                near = gram.narrow(first, low + offset, high - low).narrow(second, low + offset, high - low)
                total.narrow(first, low, high - low).narrow(second, low, high - low).add_(near)
        gram = total
    return gram


def patches(maps: Tensor, window: Window) -> Tensor:
    """(n, C * K, *positions) what a convolution reads at every position, for K numbers of a kernel."""
    if max(window.padding):
        maps = F.pad(maps, [pad for side in reversed(window.padding) for pad in (side, side)])
    outputs = [
        (side - dilation * (kernel - 1) - 1) // stride + 1
        for side, kernel, stride, dilation in zip(
            maps.shape[2:], window.kernel, window.stride, window.dilation, strict=True
        )
    ]
    along = maps.stride()[2:]
    steps = [dilation * step for dilation, step in zip(window.dilation, along, strict=True)]
    jumps = [stride * step for stride, step in zip(window.stride, along, strict=True)]
    size, stride = (*maps.shape[:2], *window.kernel, *outputs), (*maps.stride()[:2], *steps, *jumps)
    return maps.as_strided(size, stride, maps.storage_offset()).reshape(
        len(maps), maps.shape[1] * prod(window.kernel), *outputs
    )


def _matrices(rows: Tensor, images: int, groups: int) -> Tensor:
    """(patients * groups, C / groups, images * T) for rows (patients * images, C, *sides): one matrix a product."""
    rows = rows.reshape(len(rows) // images, images, groups, rows.shape[1] // groups, -1)
    return rows.permute(0, 2, 3, 1, 4).reshape(len(rows) * groups, rows.shape[3], -1)
