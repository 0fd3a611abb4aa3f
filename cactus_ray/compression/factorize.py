"""Weights as low rank plus sparse, ``W = U V + C`` (ATMC: Gui et al. 2019), and as the whole numbers that a file holds.

Convolutions are matrices of a row per output channel. What a share KEPT of the dense weights may be is the number of
nonzeros of U, V and C of all layers together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cactus_ray.bounds.graph import Params
from cactus_ray.compression.codebook import cluster
from cactus_ray.compression.levels import Level
from cactus_ray.compression.prune import keep_largest
from cactus_ray.compression.quantize import largest_code
from cactus_ray.compression.stored import EXACT, Factored, Stored

ROUNDS = 4
BISECTIONS = 14
CANDIDATES, TURNS = 3, 10
PART_BITS = 12
"""Bits of parts without a number format: their codes end where float16 holds all whole numbers, at 2048."""
LARGEST = 2 ** (PART_BITS - 1) - 1
LARGEST_MULTIPLE = 2048
SMALLEST_SCALE = 2.0**-100

Pairs = dict[str, tuple[Tensor, Tensor]]
"""U and V by the name of the weight."""


@dataclass(frozen=True, slots=True)
class Factors:
    """``left @ right + sparse`` [out, columns]: left [out, rank], right [rank, columns]; float64."""

    left: Tensor
    right: Tensor
    sparse: Tensor

    @property
    def matrix(self) -> Tensor:
        return self.left @ self.right + self.sparse

    @property
    def nonzeros(self) -> int:
        return sum(int(t.count_nonzero()) for t in (self.left, self.right, self.sparse))

    def distance(self, matrix: Tensor) -> float:
        """Squared error against a matrix [out, columns]."""
        return float((self.matrix - matrix).square().sum())


PARTS = ("left", "right", "sparse")


def trained_factors(names: Sequence[str], params: Params) -> dict[str, Factors]:
    """Factors with which the network was trained (``NODE.left``, ...), of all layers ``NODE.weight``; else empty.

    Empty, too, where a weight is no longer what they make.
    """
    found = {}
    for name in names:
        parts = [params.get(f"{name.removesuffix('weight')}{part}") for part in PARTS]
        if any(part is None for part in parts):
            return {}
        factors = Factors(*(part.double() for part in parts if part is not None))
        weight = params[name].double().flatten(1)
        if not factors.distance(weight) <= 1e-10 * float(weight.square().sum()):
            return {}
        found[name] = factors
    return found


def without_factors(names: Sequence[str], params: Params) -> Params:
    """The tensors of the network alone."""
    own = {f"{name.removesuffix('weight')}{part}" for name in names for part in PARTS}
    return {k: v for k, v in params.items() if k not in own}


def split(names: Sequence[str], params: Params, kept: float) -> dict[str, Factors]:
    """Factors of every weight with at most ``floor(kept * weights)`` nonzeros: the network's own where they fit.

    Where they have more, the largest of their entries, or factors of the weights themselves: what is closer.
    """
    weights, own = {name: params[name] for name in names}, trained_factors(names, params)
    budget = _budget(weights, kept)
    if own and sum(f.nonzeros for f in own.values()) <= budget:
        return own
    found = [factorize(weights, kept), *([largest_entries(own, budget)] if own else [])]
    return min(found, key=lambda f: _error(f, {k: w.double().flatten(1) for k, w in weights.items()}))


def entries(kept: float, total: int) -> int:
    """How many nonzeros a share of ``total`` weights allows: rounded down."""
    return int(kept * total + 1e-9)


def _budget(weights: Params, kept: float) -> int:
    return entries(kept, sum(w.numel() for w in weights.values()))


def factorize(weights: Params, kept: float) -> dict[str, Factors]:
    """Factors of every weight [out, ...], with ``floor(kept * weights)`` nonzeros in all of them together.

    Minimises ``|W - UV - C|^2 + t * nonzeros`` over all layers by turns, each exact: for given C, U V is the singular
    value decomposition of ``W - C`` as far as a component pays for its ``out + columns`` nonzeros; for given U V, C
    holds the residuals above ``sqrt(t)``. The price t is searched for. From the ranks so found, and from no U V at all,
    turns at fixed numbers of nonzeros go on; the smallest squared error wins. Deterministic.
    """
    matrices = {k: w.detach().double().flatten(1) for k, w in weights.items()}
    budget = _budget(weights, kept)
    first = {k: _singular(m) for k, m in matrices.items()}
    high = max(1e-300, *(float(values[0].max()) for values in first.values()))
    low = high * 2.0**-60
    tried: dict[tuple[int, ...], Pairs] = {}  # by ranks, the last price's of each
    for _ in range(BISECTIONS):
        price = (low * high) ** 0.5
        pairs = {k: _at_price(m, first[k], price) for k, m in matrices.items()}
        count = sum(left.numel() + right.numel() for left, right in pairs.values())
        if count <= budget:
            ranks = tuple(right.shape[0] for _, right in pairs.values())
            tried.pop(ranks, None)
            tried[ranks] = pairs
        count += sum(int(((m - pairs[k][0] @ pairs[k][1]).square() > price).sum()) for k, m in matrices.items())
        low, high = (price, high) if count > budget else (low, price)
    none = {k: (m.new_zeros(m.shape[0], 0), m.new_zeros(0, m.shape[1])) for k, m in matrices.items()}
    starts = [none, *list(tried.values())[-CANDIDATES:]]
    return min((_refined(matrices, start, budget) for start in starts), key=lambda f: _error(f, matrices))


def _refined(matrices: Params, pairs: Pairs, budget: int) -> dict[str, Factors]:
    """What turns at fixed ranks and a fixed number of nonzeros of C make of U V; no turn raises the squared error."""
    found = _with_largest(matrices, pairs, budget)
    for _ in range(TURNS if any(right.numel() for _, right in pairs.values()) else 0):
        rests = {k: m - found[k].sparse for k, m in matrices.items()}
        again = {k: _leading(rest, *_singular(rest), pairs[k][1].shape[0]) for k, rest in rests.items()}
        found = _with_largest(matrices, again, budget)
    return found


def _with_largest(matrices: Params, pairs: Pairs, budget: int) -> dict[str, Factors]:
    """U V, and of what they leave the largest entries of all layers, as many as the budget has left."""
    residuals = {k: m - pairs[k][0] @ pairs[k][1] for k, m in matrices.items()}
    flat = torch.cat([r.flatten() for r in residuals.values()])
    left_over = budget - sum(left.numel() + right.numel() for left, right in pairs.values())
    mask = keep_largest(flat.abs(), max(flat.numel() - left_over, 0))
    masks = mask.split_with_sizes([r.numel() for r in residuals.values()])
    return {k: Factors(*pairs[k], r * m.view_as(r)) for (k, r), m in zip(residuals.items(), masks, strict=True)}


def _error(factors: dict[str, Factors], matrices: Params) -> float:
    return sum(factors[k].distance(m) for k, m in matrices.items())


def largest_entries(factors: dict[str, Factors], kept: int) -> dict[str, Factors]:
    """The factors with only the ``kept`` largest absolute values of all U, V and C (ATMC's projection)."""
    tensors = [t for f in factors.values() for t in (f.left, f.right, f.sparse)]
    flat = torch.cat([t.abs().flatten() for t in tensors])
    mask = keep_largest(flat, max(flat.numel() - kept, 0))
    parts = [
        t * m.view_as(t) for t, m in zip(tensors, mask.split_with_sizes([t.numel() for t in tensors]), strict=True)
    ]
    return {k: Factors(*parts[3 * i : 3 * i + 3]) for i, k in enumerate(factors)}


def store(factors: Factors, shape: tuple[int, ...], level: Level, rows: Tensor | None = None) -> Factored:
    """The factors as whole numbers: of the level's integers or codebooks, else of 12 bits.

    ``rows`` [out]: factors on the rows of the weight (of a batch norm), which scales take up.

    The step of V is one per tensor, that of U one per row (one per tensor with ``:tensor`` and codebooks) and coarser
    where sums would not be exact; C is in multiples of the product of both, and where it has an entry it takes up what
    the rounding of U and V cost, if that brings the weight nearer.
    """
    whole = level.codebook or level.bits is None
    largest = LARGEST if whole else largest_code(level.bits or 0)
    common = level.per_tensor or level.codebook
    wanted = factors.matrix
    left, right = factors.left, factors.right
    unit = float(right.abs().amax()) / largest if right.numel() else 0.0
    rights = _whole(right / unit if unit > 0 else torch.zeros_like(right), largest, level)
    reach = left.abs() @ rights.tensor.double().abs()
    limits = [
        unit * left.abs() / largest,
        unit * reach / (EXACT / 4),
        factors.sparse.abs() / (LARGEST_MULTIPLE * largest),
    ]
    if not left.numel():
        limits = [factors.sparse.abs() / largest]
    ends = torch.stack([_most(limit, common) for limit in limits]).amax(0)
    scale = ends.clamp(min=SMALLEST_SCALE).float()
    steps = scale.double()[:, None]
    lefts = _whole(left * (unit / steps), largest, level)
    product = lefts.tensor.double() @ rights.tensor.double()
    final = scale if rows is None else (scale.double() * rows).float()

    def formed(rest: Tensor) -> Factored:
        multiple = (_most(rest.abs(), common) / largest - 1e-3).ceil().clamp(1, LARGEST_MULTIPLE).to(torch.float16)
        sparse = _whole(rest / multiple.double()[:, None], largest, level)
        if not bool(product.any()):
            return Factored(shape, final, multiple, None, None, sparse)
        if not bool(sparse.values.any()):
            return Factored(shape, final, torch.ones(1, dtype=torch.float16), lefts, rights, None)
        return Factored(shape, final, multiple, lefts, rights, sparse)

    candidates = formed(torch.where(factors.sparse != 0, wanted / steps - product, 0.0)), formed(factors.sparse / steps)
    wanted = wanted if rows is None else rows[:, None] * wanted
    return min(candidates, key=lambda found: float((found.tensor.double().flatten(1) - wanted).square().sum()))


def _whole(values: Tensor, largest: int, level: Level) -> Stored:
    """Values in [-largest, largest] as the whole numbers that the level has for them."""
    if level.codebook:
        places, table = cluster(values, level.bits or 0)
        table = table.round().clamp(-largest, largest)
        return Stored("codebook", places, bits=level.bits, table=table.half())
    codes = (values.round() + 0.0).clamp(-largest, largest)  # no -0, as sparse storage has one zero only
    if level.bits is None:
        return Stored("float16", codes.half())
    return Stored("integer", codes.to(torch.int8), bits=level.bits)


def _most(values: Tensor, common: bool) -> Tensor:
    """Largest value of every row [rows], or of all [1]; 0 where there is none."""
    most = values.amax(1) if values.shape[1] else values.new_zeros(len(values))
    return most.amax(0, keepdim=True) if common else most


def _singular(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Squared singular values, largest first, and the vectors of the shorter side as columns.

    By the smaller Gram matrix: what squaring costs in precision concerns values that are never kept.
    """
    short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    values, vectors = torch.linalg.eigh(short @ short.T)
    vectors = vectors.flip(1)
    # either sign is right; this one does not depend on the library
    signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    return values.flip(0).clamp(min=0.0), vectors * signs


def _at_price(matrix: Tensor, first: tuple[Tensor, Tensor], price: float) -> tuple[Tensor, Tensor]:
    """U and V of the best trade at a price; ``first``: the decomposition of the matrix itself."""
    cost = price * sum(matrix.shape)
    (values, vectors), rest = first, matrix
    left, right = _leading(rest, values, vectors, int((values > cost).sum()))
    for _ in range(ROUNDS - 1):
        residual = matrix - left @ right
        rest = matrix - torch.where(residual.square() > price, residual, 0.0)
        values, vectors = _singular(rest)
        left, right = _leading(rest, values, vectors, int((values > cost).sum()))
    return left, right


def _leading(matrix: Tensor, values: Tensor, vectors: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The first ``rank`` components of a matrix as U V, each shared out evenly, from its ``_singular``."""
    balance, chosen = values[:rank].clamp(min=1e-300).pow(0.25), vectors[:, :rank]
    if matrix.shape[0] <= matrix.shape[1]:
        return chosen * balance, (chosen / balance).T @ matrix
    return matrix @ (chosen / balance), (chosen * balance).T
