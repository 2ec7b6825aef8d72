# Copyright 2026 The modeling_grassmann authors.
# SPDX-License-Identifier: Apache-2.0
r"""The Grassmann memory, a kernel between planes over the whole past, in plain PyTorch and without Transformers.

Each token writes a value :math:`v_s` under a plane :math:`K_s` and reads with a plane :math:`Q_t` of R^r. With decays
:math:`0 \le a \le 1`,

.. math:: o_t = \sum_{s \le t} D_{ts}\, \kappa(Q_t, K_s)\, v_s, \qquad D_{ts} = a_{s+1} \cdots a_t.

Planes are given by orthonormal frames, `m = 2` vectors in a matrix of shape `(m, r)` ([`orthonormalise`]). Two frames
have a Gram matrix :math:`G_{ij} = \langle q_i, k_j \rangle`, whose singular values are the cosines of the principal
angles :math:`\theta_1, \theta_2` between their planes. The kernels are the classical ones on the Grassmann manifold
Gr(2, r) (Hamm and Lee, 2008, "Grassmann discriminant analysis"):

| kernel | κ | of the plane alone | features |
| --- | --- | --- | --- |
| `"plucker"` | :math:`\det G`, the inner product of Plücker coordinates | up to its orientation | r (r - 1) / 2 |
| `"binet_cauchy"` | :math:`(\det G)^2 = \cos^2 \theta_1 \cos^2 \theta_2` | yes | r² (r² - 1) / 12 |
| `"projection"` | :math:`\|G\|^2 = \cos^2 \theta_1 + \cos^2 \theta_2` | yes | r (r + 1) / 2 |
| `"inner"` | :math:`\langle q, k \rangle` of single vectors, `m = 1`, of any norm | - | r |
| `"inner_squared"` | :math:`\langle q, k \rangle^2` of single vectors | - | r (r + 1) / 2 |

The last two have no planes: they are what a plane kernel has to beat. All have finite features,
:math:`\kappa(Q, K) = \langle \varphi(Q), \varphi(K) \rangle`, so that the sum is a recurrence with a state of constant
size, :math:`S_t = a_t S_{t-1} + \varphi(K_t) v_t^\top` and :math:`o_t = S_t^\top \varphi(Q_t)`.

The same numbers come from

- [`grassmann_memory_naive`], the reference: the sum as it is written above, from Gram matrices;
- [`grassmann_memory_recurrent`]: the recurrence, token by token, as in decoding;
- [`grassmann_memory`]: in chunks, with κ for all pairs inside a chunk, and the state from chunk to chunk. One chunk
  as long as the row is the quadratic form, which needs no features.

Rules that hold in all:

- **Positions.** Padding ([`NO_POSITION`]) writes nothing, reads zeros and leaves the state alone. A token whose
  position does not follow that of the last real token starts a new sequence, and sees nothing before. So left padding,
  right padding and packed sequences are exact, across calls too.
- **Degenerate planes.** Two parallel vectors span no plane. Their frame is zero, so that it is similar to nothing.
"""

import math
import operator
from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from itertools import combinations
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .plucker import NO_POSITION, asked_backend, choose_backend, triton_or_torch, unit, unit_tangent


try:
    from .frames_triton import orthonormalise_triton
    from .grassmann_memory_triton import coordinates_width, memory_pairs_triton, prefix_sums_op, why_not_triton
    from .memory_states_triton import read_states, write_states
except ImportError:
    memory_pairs_triton = None


# Less than e^-100 is no memory at all, and sums of this stay finite.
MIN_LOG_DECAY = -100.0
# Chunks whose states one product computes from what each of them writes.
CHUNKS_PER_GROUP = 16
# Tokens in a chunk of the fused kernels, and the longest row that is one chunk. On an H200, with three heads of planes
# in R^10 and decays as they are initialised, pairs alone take 10 ns a token in rows of 4,096 and 21 of 16,384, with
# gradients, as blocks that a head has forgotten are skipped. With states it is about 60 at every length; with heads
# that forget nothing, pairs alone take a few times as long as with these decays.
FUSED_CHUNK_SIZE = 2048
LONGEST_FUSED_ROW = 16384
# Features that exist at once: in float32, 16 MiB.
MAX_FEATURES = 2**22


def orthonormalise(vectors: torch.Tensor, eps: float = 1e-3, backend: str = "auto") -> torch.Tensor:
    """
    Orthonormal frames of planes, by Gram-Schmidt.

    Two vectors span no plane if one of them is zero, or if the part of the second that is perpendicular to the first
    has a norm of at most `eps` times that of the second. Their frame is exactly zero, with zero gradients.

    Args:
        vectors (`torch.Tensor` of shape `(..., 2, r)`): two vectors for each plane.
        eps (`float`, *optional*, defaults to 1e-3): sine of the angle up to which two vectors count as parallel.
        backend (`str`, *optional*, defaults to `"auto"`): `"torch"`, `"triton"` or `"auto"`, see [`choose_backend`].

    Returns:
        `torch.Tensor` of shape `(..., 2, r)`, computed and returned in float32 or better.
    """
    if choose_backend(backend, vectors, vectors.shape[-1]) == "triton":
        return orthonormalise_triton(vectors, eps)
    first, second = vectors.to(torch.promote_types(vectors.dtype, torch.float32)).unbind(-2)
    direction = unit(first)
    tangent = unit_tangent(direction, second, (direction != 0).any(-1, keepdim=True), eps)
    spans = (tangent != 0).any(-1, keepdim=True)
    return torch.stack([torch.where(spans, direction, 0), tangent], dim=-2)


class Products(NamedTuple):
    """
    Features that are products of two coordinates each: `weight * x[first] * x[second]`. To each of the last `overlap`
    ones, that many places before it times √⅓ is added.
    """

    first: list[int]
    second: list[int]
    weight: list[float]
    overlap: int = 0


def wedge_products(reduced_size: int) -> Products:
    """The pairs i < j of Plücker coordinates, in the order of `torch.triu_indices`."""
    terms = [(i, j, 1.0) for i, j in combinations(range(reduced_size), 2)]
    return Products(*zip(*terms))


def square_products(size: int) -> Products:
    """Features of `⟨x, y⟩²`: `x_i²`, and `√2 x_i x_j` for i < j."""
    terms = [(i, i, 1.0) for i in range(size)]
    terms += [(i, j, math.sqrt(2)) for i, j in combinations(range(size), 2)]
    return Products(*zip(*terms))


def square_of_planes_products(reduced_size: int) -> Products:
    """
    Features of `⟨p, p'⟩²` for Plücker coordinates of planes, no more than the dimensions that such squares span.

    Squares, and products of two coordinates that share an index, are as in [`square_products`]. Any four indices
    i < j < k < l have three more products, `X1 = p_ij p_kl`, `X2 = p_ik p_jl` and `X3 = p_il p_jk`, of which the
    kernel needs `2 (X1 X1' + X2 X2' + X3 X3')`. By the Plücker relation, `X1 - X2 + X3 = 0`, that is the inner product
    of `(√3 X3, X1 + X2)`, and `X1 + X2 = 2 X1 + √⅓ (√3 X3)`.
    """
    planes = list(combinations(range(reduced_size), 2))
    place = {plane: index for index, plane in enumerate(planes)}
    fours = list(combinations(range(reduced_size), 4))
    terms = [(index, index, 1.0) for index in range(len(planes))]
    terms += [(place[p], place[q], math.sqrt(2)) for p, q in combinations(planes, 2) if set(p) & set(q)]
    terms += [(place[h, k], place[i, j], math.sqrt(3)) for h, i, j, k in fours]
    terms += [(place[h, i], place[j, k], 2.0) for h, i, j, k in fours]
    return Products(*zip(*terms), len(fours))


class ProductTensors(NamedTuple):
    """
    [`Products`] as tensors.

    Args:
        factors (`torch.LongTensor` of shape `(2 F,)`): indices of all first, then of all second factors.
        selection (`torch.Tensor` of shape `(2 F, C)`): the same as a matrix, `selection @ x = x[factors]`.
        weight (`torch.Tensor` of shape `(F, 1)`): of each product.
        overlap (`int`): see [`Products`].
    """

    factors: torch.Tensor
    selection: torch.Tensor
    weight: torch.Tensor
    overlap: int


_MADE_ONCE = {}


def made_once(make: Callable[..., NamedTuple]) -> Callable[..., NamedTuple]:
    """Tensors that are a function of hashable arguments: made once, and constants in compiled code."""

    @torch.compiler.assume_constant_result
    @wraps(make)
    def get(*arguments):
        key = (make, *arguments)
        if key in _MADE_ONCE:
            return _MADE_ONCE[key]
        with torch.inference_mode(False):
            result = make(*arguments)
        # What a tracer makes instead of tensors must not outlive it.
        if all(type(x) in (torch.Tensor, nn.Parameter) for x in result if isinstance(x, torch.Tensor)):
            _MADE_ONCE[key] = result
        return result

    return get


def product_tensors(products: Callable[[int], Products], size: int, like: torch.Tensor) -> ProductTensors:
    """What one of the functions above gives for a `size`, on the device and in the type of a tensor."""
    # The size of a dimension may be a symbol in compiled code, which this makes a number.
    return constant_product_tensors(products, operator.index(size), like.device, like.dtype)


@made_once
def constant_product_tensors(products, size, device, dtype) -> ProductTensors:
    """[`product_tensors`]."""
    first, second, weight, overlap = products(size)
    factors = torch.tensor(first + second, device=device)
    selection = (factors[:, None] == torch.arange(1 + max(second), device=device)).to(dtype)
    weight = torch.tensor(weight, device=device, dtype=dtype)[:, None]
    # Parameters have fixed shapes in code that is compiled for all shapes.
    return ProductTensors(*(nn.Parameter(x, requires_grad=False) for x in (factors, selection, weight)), overlap)


def plucker_coordinates(frames: torch.Tensor) -> torch.Tensor:
    """Of n planes: `(..., 2, r, n)` -> `(..., P, n)`."""
    selection = product_tensors(wedge_products, frames.shape[-2], frames).selection
    first, second = (selection @ frames).unbind(-3)  # (..., 2 P, n)
    (first_i, first_j), (second_i, second_j) = first.chunk(2, dim=-2), second.chunk(2, dim=-2)
    return first_i * second_j - first_j * second_i


def projector_coordinates(frames: torch.Tensor) -> torch.Tensor:
    """Of projectors `q1 q1ᵀ + q2 q2ᵀ` on n planes, times √2 off the diagonal: `(..., 2, r, n)` -> `(..., C, n)`."""
    products = product_tensors(square_products, frames.shape[-2], frames)
    first, second = (products.selection @ frames).chunk(2, dim=-2)
    return (first * second).sum(-3) * products.weight


def determinant(gram: torch.Tensor) -> torch.Tensor:
    """`(..., 2, 2)` -> `(...)`."""
    return gram[..., 0, 0] * gram[..., 1, 1] - gram[..., 0, 1] * gram[..., 1, 0]


class Kernel(NamedTuple):
    """
    A kernel between frames: `⟨coordinates(Q), coordinates(K)⟩`, or its square.

    Args:
        num_vectors (`int`): `m`, the vectors of a frame.
        of_gram (`Callable`): κ as a function of the Gram matrix, `(..., m, m)` -> `(...)`.
        coordinates (`Callable`): of n frames, `(..., m, r, n)` -> `(..., C, n)`.
        num_features (`Callable`): their number, as a function of r.
        square (`Callable`, *optional*): [`Products`] of coordinates that are the features of the square of their inner
            product, as a function of r. By default the coordinates are the features.
    """

    num_vectors: int
    of_gram: Callable[[torch.Tensor], torch.Tensor]
    coordinates: Callable[[torch.Tensor], torch.Tensor]
    num_features: Callable[[int], int]
    square: Callable[[int], Products] | None = None


KERNELS = {
    "plucker": Kernel(
        num_vectors=2,
        of_gram=determinant,
        coordinates=plucker_coordinates,
        num_features=lambda r: r * (r - 1) // 2,
    ),
    "binet_cauchy": Kernel(
        num_vectors=2,
        of_gram=lambda gram: determinant(gram).square(),
        coordinates=plucker_coordinates,
        num_features=lambda r: r**2 * (r**2 - 1) // 12,
        square=square_of_planes_products,
    ),
    "projection": Kernel(
        num_vectors=2,
        of_gram=lambda gram: gram.square().sum((-2, -1)),
        coordinates=projector_coordinates,
        num_features=lambda r: r * (r + 1) // 2,
    ),
    "inner": Kernel(
        num_vectors=1,
        of_gram=lambda gram: gram[..., 0, 0],
        coordinates=lambda frames: frames.squeeze(-3),
        num_features=lambda r: r,
    ),
    "inner_squared": Kernel(
        num_vectors=1,
        of_gram=lambda gram: gram[..., 0, 0].square(),
        coordinates=lambda frames: frames.squeeze(-3),
        num_features=lambda r: r * (r + 1) // 2,
        square=square_products,
    ),
}


def add_overlap(features: torch.Tensor, overlap: int, transposed: bool = False) -> torch.Tensor:
    """The addition that [`Products`] speak of, or its transpose, in place: `(n, F, c)`."""
    if overlap:
        last, previous = features[:, -overlap:], features[:, -2 * overlap : -overlap]
        target, source = (previous, last) if transposed else (last, previous)
        target.add_(source, alpha=3**-0.5)
    return features


def in_pieces(function: Callable, features_each: int, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """What a function of tensors `(n, ...)` returns, computed for so many of `n` at once as have [`MAX_FEATURES`]."""
    # Compiled code needs less memory, and serves all `n`.
    if torch.compiler.is_compiling() or tensors[0].shape[0] * features_each <= MAX_FEATURES:
        return function(*tensors)
    size = max(MAX_FEATURES // features_each, 1)
    pieces = zip(*(tensor.split(size) for tensor in tensors))
    return [torch.cat(results) for results in zip(*(function(*piece) for piece in pieces))]


class SquareFeaturesProduct(torch.autograd.Function):
    """
    `φ @ matrix`, or `φᵀ @ matrix` if `transposed`, for the features φ that are [`Products`] of coordinates. They are
    larger than everything else, and are computed anew in the backward pass.

    Shapes are `(n, C, c)` for coordinates, `(n, F, c)` for features, and `(n, c, d)` or, if `transposed`, `(n, F, d)`
    for matrices.
    """

    @staticmethod
    def forward(coordinates, matrix, factors, selection, weight, overlap, transposed):
        def product(coordinates, matrix):
            first, second = coordinates.index_select(1, factors).chunk(2, dim=1)
            features = add_overlap(first.mul_(second).mul_(weight), overlap)
            return [(features.mT if transposed else features) @ matrix]

        return in_pieces(product, weight.shape[0] * coordinates.shape[-1], coordinates, matrix)[0]

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:5])
        ctx.overlap, ctx.transposed = inputs[5:]

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        coordinates, matrix, factors, selection, weight = ctx.saved_tensors
        # Each factor's gradient has the other one in it.
        swapped = factors.roll(weight.shape[0])

        def gradients(coordinates, matrix, gradient):
            others = coordinates.index_select(1, swapped).unflatten(1, (2, -1))  # (n, 2, F, c)
            features = add_overlap((others[:, 0] * others[:, 1]).mul_(weight), ctx.overlap)
            of_matrix = (features if ctx.transposed else features.mT) @ gradient
            of_features = matrix @ gradient.mT if ctx.transposed else gradient @ matrix.mT  # (n, F, c)
            of_features = add_overlap(of_features, ctx.overlap, transposed=True).mul_(weight)
            of_factors = others.mul_(of_features[:, None]).flatten(1, 2)  # (n, 2 F, c)
            return [selection.mT @ of_factors, of_matrix]

        features_each = weight.shape[0] * coordinates.shape[-1]
        return *in_pieces(gradients, features_each, coordinates, matrix, gradient), None, None, None, None, None


def write(coordinates: torch.Tensor, values: torch.Tensor, square: ProductTensors | None) -> torch.Tensor:
    """`Σ φ(K_s) v_sᵀ` over the tokens of a chunk: `(..., C, c)` and `(..., c, dv)` -> `(..., F, dv)`."""
    if square is None:
        return coordinates @ values
    return multiply_features(coordinates, values, square, transposed=False)


def read(coordinates: torch.Tensor, memory: torch.Tensor, square: ProductTensors | None) -> torch.Tensor:
    """`Sᵀ φ(Q_t)` for the tokens of a chunk: `(..., C, c)` and `(..., F, dv)` -> `(..., c, dv)`."""
    if square is None:
        return coordinates.mT @ memory
    return multiply_features(coordinates, memory, square, transposed=True)


def multiply_features(coordinates, matrix, square: ProductTensors, transposed: bool) -> torch.Tensor:
    """[`SquareFeaturesProduct`] with any number of dimensions before the last two."""
    batch = coordinates.shape[:-2]
    coordinates, matrix = (tensor.reshape(-1, *tensor.shape[-2:]) for tensor in (coordinates, matrix))
    # By name: PyTorch 2.11 cannot compile the unpacking of a constant.
    product = SquareFeaturesProduct.apply(
        coordinates, matrix, square.factors, square.selection, square.weight, square.overlap, transposed
    )
    return product.reshape(*batch, *product.shape[-2:])


def square_tensors(kernel: Kernel, frames: torch.Tensor) -> ProductTensors | None:
    """What [`write`] and [`read`] need for a kernel between frames of shape `(..., r)`."""
    if kernel.square is None:
        return None
    return product_tensors(kernel.square, frames.shape[-1], frames)


def kernel_features(frames: torch.Tensor, kernel: str) -> torch.Tensor:
    """φ with `κ(Q, K) = ⟨φ(Q), φ(K)⟩`: `(..., m, r)` -> `(..., F)`."""
    coordinates = KERNELS[kernel].coordinates(frames[..., None])  # (..., C, 1)
    one = coordinates.new_ones(*coordinates.shape[:-2], 1, 1)
    return write(coordinates, one, square_tensors(KERNELS[kernel], frames)).squeeze(-1)


class FeatureEntries(NamedTuple):
    """
    Features of a square in terms of coordinates, as the fused step takes them.

    Args:
        entries (`torch.IntTensor` of shape `(2, F)`): the two coordinates of each product.
        weight (`torch.Tensor` of shape `(F,)`): of each product.
        overlap (`int`): see [`Products`].
    """

    entries: torch.Tensor
    weight: torch.Tensor
    overlap: int


@made_once
def feature_entries(name: str, size: int, device) -> FeatureEntries:
    """[`FeatureEntries`] for a kernel between frames of shape `(..., size)`."""
    first, second, weight, overlap = KERNELS[name].square(size)
    entries = torch.tensor([first, second], device=device, dtype=torch.int32)
    weight = torch.tensor(weight, device=device, dtype=torch.float32)
    # As in [`constant_product_tensors`].
    return FeatureEntries(*(nn.Parameter(x, requires_grad=False) for x in (entries, weight)), overlap)


class PackedPlaces(NamedTuple):
    """
    How features are found among all products of coordinates, `(W * W,)`, as the fused kernels have them.

    Args:
        places (`torch.LongTensor` of shape `(F,)`): that of each feature's product.
        weight (`torch.Tensor` of shape `(F, 1)`): of each product.
        overlap (`int`): see [`Products`].
        relations (`torch.LongTensor` of shape `(6, Q)`): the products in each of the Plücker relations
            `p_ij p_km - p_ik p_jm + p_im p_jk = 0`, in both orders; none for vectors.
        relation_signs (`torch.Tensor` of shape `(6, 1, 1)`): theirs.
    """

    places: torch.Tensor
    weight: torch.Tensor
    overlap: int
    relations: torch.Tensor
    relation_signs: torch.Tensor


@made_once
def packed_places(name: str, size: int, device, dtype) -> PackedPlaces:
    """[`PackedPlaces`] of a kernel."""
    first, second, weight, overlap = KERNELS[name].square(size)
    width = coordinates_width(name, size)
    relations = []
    if KERNELS[name].num_vectors == 2:
        index = {pair: i for i, pair in enumerate(combinations(range(size), 2))}
        for i, j, k, m in combinations(range(size), 4):
            terms = [(index[i, j], index[k, m]), (index[i, k], index[j, m]), (index[i, m], index[j, k])]
            relations.append([x * width + y for a, b in terms for x, y in ((a, b), (b, a))])
    places = torch.tensor([x * width + y for x, y in zip(first, second)], device=device)
    weight = torch.tensor(weight, device=device, dtype=dtype)[:, None]
    relations = torch.tensor(relations, device=device, dtype=torch.long).reshape(-1, 6).T
    relation_signs = torch.tensor([1, 1, -1, -1, 1, 1], device=device, dtype=dtype)[:, None, None]
    return PackedPlaces(places, weight, overlap, relations, relation_signs)


def pack_state(memory: torch.Tensor, name: str, size: int) -> torch.Tensor:
    """
    A state of features as the fused kernels have it: `(B, H, F, dv)` -> `(B, H, W, W, dv)`, the one that products of
    coordinates could have written.
    """
    packed = packed_places(name, size, memory.device, memory.dtype)
    features = add_overlap(memory.flatten(0, 1).clone(), packed.overlap, transposed=True) * packed.weight
    width = coordinates_width(name, size)
    state = features.new_zeros(features.shape[0], width * width, features.shape[2])
    state = state.index_add(1, packed.places, features).unflatten(1, (width, width))
    state = ((state + state.transpose(1, 2)) / 2).flatten(1, 2)  # (B * H, W * W, dv)
    # Products of coordinates of planes are perpendicular to the relations.
    terms = state.index_select(1, packed.relations.flatten()).unflatten(1, packed.relations.shape)  # (B * H, 6, Q, dv)
    along = (terms * packed.relation_signs).mean(1, keepdim=True) * packed.relation_signs
    state = state.index_add(1, packed.relations.flatten(), -along.flatten(1, 2))
    return state.unflatten(1, (width, width)).unflatten(0, memory.shape[:2])


def unpack_state(state: torch.Tensor, name: str, size: int) -> torch.Tensor:
    """The features of a state of the fused kernels: `(B, H, W, W, dv)` -> `(B, H, F, dv)`."""
    packed = packed_places(name, size, state.device, state.dtype)
    shape = state.shape[:2]
    if state.requires_grad:
        # The gradient of a symmetric state is symmetric, too.
        state = (state + state.transpose(2, 3)) / 2
    state = state.flatten(0, 1).flatten(1, 2)  # (B * H, W * W, dv)
    features = state.index_select(1, packed.places) * packed.weight
    return add_overlap(features, packed.overlap).unflatten(0, shape)


class MemoryState(NamedTuple):
    """
    What decoding goes on from.

    Args:
        memory (`torch.Tensor` of shape `(B, H, F, dv)`): `S`, in float32 or better.
        position (integer `torch.Tensor` of shape `(B,)`): of each row's last real token, [`NO_POSITION`] for none.
    """

    memory: torch.Tensor
    position: torch.Tensor


def last_position(state: MemoryState | None, values: torch.Tensor) -> torch.Tensor:
    """Position of the last real token before these of shape `(B, ...)`: `(B,)`."""
    if state is not None:
        return state.position
    return torch.full(values.shape[:1], NO_POSITION, device=values.device)


def state_before(state: MemoryState | None, query: torch.Tensor, values: torch.Tensor, kernel: str) -> MemoryState:
    """The initial state of [`grassmann_memory`], whose arguments these are: zeros before any token."""
    if state is not None:
        return state
    shape = (values.shape[0], values.shape[2], KERNELS[kernel].num_features(query.shape[-1]), values.shape[3])
    dtype = torch.promote_types(values.dtype, torch.float32)
    return MemoryState(values.new_zeros(shape, dtype=dtype), last_position(None, values))


def following_positions(last: torch.Tensor, length: int) -> torch.Tensor:
    """Positions of `length` tokens that go on behind the `last` ones: `(B,)` -> `(B, T)`."""
    return torch.where(last == NO_POSITION, 0, last + 1)[:, None] + torch.arange(length, device=last.device)


def sequence_starts(positions: torch.Tensor, last: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Args:
        positions (integer `torch.Tensor` of shape `(B, T)`): of the tokens.
        last (integer `torch.Tensor` of shape `(B,)`): of the last real token before.

    Returns:
        Which tokens are real and which of these start a sequence, boolean `torch.Tensor`s of shape `(B, T)`, and the
        position of the last real one, `(B,)`.
    """
    real = positions != NO_POSITION
    token = torch.arange(1, positions.shape[1] + 1, device=positions.device)
    latest = F.pad(torch.where(real, token, 0).cummax(dim=1).values, (1, 0))  # (B, T + 1)
    position = torch.cat([last[:, None], positions], dim=1).gather(1, latest)  # of the last real token before each
    return real, real & (positions != position[:, :-1] + 1), position[:, -1]


def keep(tokens: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """`tensors` of shape `(B, T, ...)`, with zeros, whatever they hold, where `tokens` `(B, T)` is `False`."""
    return [torch.where(tokens[(...,) + (None,) * (tensor.dim() - 2)], tensor, 0) for tensor in tensors]


def without_autocast(device: torch.device):
    """Context in which products keep their precision: squares of similarities need it."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def in_one_precision(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """`tensors` in the best of their types, which is float32 or better."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]


def check_arguments(query, key, values, log_decay, positions, initial_state, kernel) -> None:
    """
    Raises:
        ValueError: for an unknown kernel, or shapes that do not fit together.
    """
    if kernel not in KERNELS:
        raise ValueError(f"`kernel` must be one of {list(KERNELS)}, got {kernel!r}.")
    num_vectors, shape, reduced_size = KERNELS[kernel].num_vectors, tuple(query.shape[:3]), query.shape[-1]
    if query.dim() != 5 or query.shape[3] != num_vectors or reduced_size < num_vectors or key.shape != query.shape:
        raise ValueError(
            f"`query` and `key` must be (batch, length, heads, {num_vectors}, r >= {num_vectors}) for the kernel "
            f"{kernel!r}, got {tuple(query.shape)} and {tuple(key.shape)}."
        )
    if values.dim() != 4 or tuple(values.shape[:3]) != shape or tuple(log_decay.shape) != shape:
        raise ValueError(
            f"`values` and `log_decay` must be {(*shape, 'dv')} and {shape} to go with `query` {tuple(query.shape)}, "
            f"got {tuple(values.shape)} and {tuple(log_decay.shape)}."
        )
    batch, length, heads = shape
    if positions is not None and tuple(positions.shape) not in ((batch, length), (1, length)):
        raise ValueError(f"`positions` must be ({batch}, {length}), got {tuple(positions.shape)}.")
    if initial_state is not None:
        expected = (batch, heads, KERNELS[kernel].num_features(reduced_size), values.shape[-1])
        if tuple(initial_state.memory.shape) != expected or tuple(initial_state.position.shape) != (batch,):
            raise ValueError(
                f"`initial_state` must hold shapes {expected} and ({batch},), got "
                f"{tuple(initial_state.memory.shape)} and {tuple(initial_state.position.shape)}."
            )


def grassmann_memory_naive(query, key, values, log_decay, positions=None, kernel="binet_cauchy") -> torch.Tensor:
    """[`grassmann_memory`] as the sum is written, quadratic in length and without features: the reference."""
    check_arguments(query, key, values, log_decay, positions, None, kernel)
    if values.shape[1] == 0:
        return values
    last = last_position(None, values)
    positions = following_positions(last, values.shape[1]) if positions is None else positions.expand(values.shape[:2])
    query, key, values, log_decay = keep(positions != NO_POSITION, query, key, values, log_decay)
    gram = torch.einsum("bthir,bshjr->bhtsij", query, key)
    similarity = KERNELS[kernel].of_gram(gram)  # (B, H, T, S)
    decay = torch.zeros_like(similarity[:, :, 0])  # (B, H, S): D_ts for one t
    outputs = []
    for t in range(values.shape[1]):
        real, follows = positions[:, t] != NO_POSITION, positions[:, t] == last + 1
        factor = torch.where(follows[:, None], log_decay[:, t].exp(), 0)
        decay = decay * torch.where(real[:, None], factor, 1)[..., None]
        decay = decay + (torch.arange(values.shape[1], device=decay.device) == t)  # D_tt = 1
        outputs.append(torch.einsum("bhs,bshd->bhd", decay * similarity[:, :, t], values))
        last = torch.where(real, positions[:, t], last)
    return torch.stack(outputs, dim=1)


def grassmann_memory_recurrent(
    query: torch.Tensor,
    key: torch.Tensor,
    values: torch.Tensor,
    log_decay: torch.Tensor,
    positions: torch.Tensor | None = None,
    initial_state: MemoryState | None = None,
    kernel: str = "binet_cauchy",
) -> tuple[torch.Tensor, MemoryState]:
    """[`grassmann_memory`] token by token, `S_t = a_t S_{t-1} + φ(K_t) v_tᵀ`: the decoding step for one token."""
    check_arguments(query, key, values, log_decay, positions, initial_state, kernel)
    dtype, state = values.dtype, state_before(initial_state, query, values, kernel)
    last = state.position
    positions = following_positions(last, values.shape[1]) if positions is None else positions.expand(values.shape[:2])
    query, key, values, log_decay = in_one_precision(query, key, values, log_decay)
    query, key, values, log_decay = keep(positions != NO_POSITION, query, key, values, log_decay)
    memory = state.memory.to(values.dtype)
    outputs = []
    with without_autocast(values.device):
        reading, writing = kernel_features(torch.stack([query, key]), kernel)  # (B, T, H, F)
        for t in range(values.shape[1]):
            real, follows = positions[:, t] != NO_POSITION, positions[:, t] == last + 1
            factor = torch.where(follows[:, None], log_decay[:, t].exp(), 0)
            factor = torch.where(real[:, None], factor, 1)  # (B, H)
            last = torch.where(real, positions[:, t], last)
            written = writing[:, t, :, :, None] * values[:, t, :, None]  # (B, H, F, dv)
            memory = written.addcmul_(factor[..., None, None], memory)
            outputs.append((reading[:, t, :, None] @ memory)[:, :, 0])  # (B, H, dv)
    output = torch.stack(outputs, dim=1).to(dtype) if outputs else values
    return output, MemoryState(memory, last)


@torch.no_grad()
def decay_factors(
    log_decay: torch.Tensor, segment: torch.Tensor, steps: slice = slice(None)
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Decays inside chunks of `c` steps, and from what comes before them. Only sums of log decays, never positive, are
    exponentiated.

    Args:
        log_decay (`torch.Tensor` of shape `(B, H, N, c)`): of each step.
        segment (integer `torch.Tensor` of shape `(B or 1, 1, N, c)`): number of the sequence of each step, from 0 for
            the one that began before all.
        steps (`slice`, *optional*): those to which decays from inside of their chunk are wanted, by default all.

    Returns:
        - Sums of log decays from the beginning of each chunk, `(B, H, N, c)`;
        - decays `D_ts` from each step `s` of a chunk to each step `t` of `steps`, `(B, H, N, c, c)`;
        - decays from the end of the previous chunk to each step, `(B, H, N, c)`.
    """
    total = prefix_sums(log_decay)
    later = torch.ones(total.shape[-1], total.shape[-1], dtype=torch.bool, device=total.device).triu(1)
    unseen = later[steps] | (segment[..., steps, None] != segment[..., None, :])
    inside = (total[..., steps, None] - total[..., None, :]).masked_fill(unseen, -math.inf).exp()
    before = F.pad(segment[..., :-1, -1], (1, 0))[..., None]  # (B or 1, 1, N, 1)
    return total, inside, torch.where(segment == before, total.exp(), 0)


def scan_states(log_decay: torch.Tensor, segment: torch.Tensor, writes: torch.Tensor) -> torch.Tensor:
    """
    States `S_n = a_n S_{n-1} + writes_n` after each of `N` chunks, group by group.

    Args:
        log_decay (`torch.Tensor` of shape `(B, H, N)`): `log a`.
        segment (integer `torch.Tensor` of shape `(B or 1, 1, N)`): number of the sequence at the end of each chunk.
        writes (`torch.Tensor` of shape `(B, H, N, F * dv)`): what each chunk adds.

    Returns:
        `torch.Tensor` of shape `(B, H, N, F * dv)`.
    """
    num_chunks = writes.shape[2]
    if num_chunks == 1:
        return writes
    size = min(num_chunks, CHUNKS_PER_GROUP)
    num_groups = (num_chunks + size - 1) // size
    padding = num_groups * size - num_chunks
    if padding:
        log_decay, segment = F.pad(log_decay, (0, padding)), F.pad(segment, (0, padding))
        writes = F.pad(writes, (0, 0, 0, padding))
    log_decay, segment = (steps.unflatten(2, (num_groups, size)) for steps in (log_decay, segment))
    total, inside, entering = decay_factors(log_decay, segment)
    states = inside @ writes.unflatten(2, (num_groups, size))  # (B, H, groups, size, F * dv)
    if num_groups > 1:
        carried = scan_states(total[..., -1], segment[..., -1], states[..., -1, :])  # (B, H, groups, F * dv)
        carried = F.pad(carried[:, :, :-1], (0, 0, 1, 0))
        states = states + entering[..., None] * carried[..., None, :]
    return states.flatten(2, 3)[:, :, :num_chunks]


def split_chunks(tensor: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """`(B, T, H, ...)` -> `(B, H, N, c, ...)`, with zeros behind the last token."""
    if chunk_size == tensor.shape[1]:
        # Exported programs allow no arithmetic on a length that may vary.
        return tensor[:, None].movedim(3, 1)
    num_chunks = (tensor.shape[1] + chunk_size - 1) // chunk_size
    padding = num_chunks * chunk_size - tensor.shape[1]
    if padding:
        tensor = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, padding))
    return tensor.unflatten(1, (num_chunks, chunk_size)).movedim(3, 1)


def prefix_sums(x: torch.Tensor, reverse: bool = False) -> torch.Tensor:
    """Sums up to each place of the last dimension, or from each place on."""
    if x.is_cuda and memory_pairs_triton is not None:
        return prefix_sums_op(x, reverse)
    return x.flip(-1).cumsum(-1).flip(-1) if reverse else x.cumsum(-1)


def row_state(
    key: torch.Tensor,
    values: torch.Tensor,
    log_decay: torch.Tensor,
    in_last: torch.Tensor | None,
    name: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """
    The state after rows without an initial one, `Σ_s e^{R_s} φ(K_s) v_sᵀ` with sums `R_s` of log decays behind each
    token, in fused kernels.

    Args:
        key (`torch.Tensor` of shape `(B, T, H, m, r)`), values (`torch.Tensor` of shape `(B, T, H, dv)`): all tokens.
        log_decay (`torch.Tensor` of shape `(B, T, H)`): zeros for padding and first tokens.
        in_last (boolean `torch.Tensor` of shape `(B, T)`, *optional*): tokens of the last sequence, by default all.
        name (`str`): of the kernel, a square.
        dtype (`torch.dtype`): that of products.

    Returns:
        `torch.Tensor` of shape `(B, H, F, dv)`.
    """
    if in_last is not None:
        key, values = keep(in_last, key, values)
    behind = F.pad(log_decay, (0, 0, 0, 1))[:, 1:].movedim(1, 2)  # (B, H, T)
    leaving = values.movedim(1, 2) * prefix_sums(behind, reverse=True).exp()[..., None]  # (B, H, T, dv)
    writes = write_states(key, leaving.to(dtype)[:, :, None], name)  # (B, H, 1, W, W, dv)
    return unpack_state(writes[:, :, 0], name, key.shape[-1])


def choose_chunk_size(length: int, num_features: int, backend: str) -> int:
    """
    The number of tokens in a chunk. With plain torch it is 64, or 128 for many features, the fastest on a CPU with
    values of 32. A short row is one chunk, because pairs of tokens take less time than features up to about 100, 130
    and 200 tokens for planes in R^r with r = 4, 6 and 8.
    """
    if backend == "triton":
        return length if length <= LONGEST_FUSED_ROW else FUSED_CHUNK_SIZE
    if length <= 96 + num_features // 3:
        return length
    return 64 if num_features < 200 else 128


def choose_memory_backend(backend: str, values: torch.Tensor, kernel: str, reduced_size: int) -> str:
    """
    `"torch"` or `"triton"`: what serves where `backend`, or for `"auto"` the environment variable `GRASSMANN_BACKEND`,
    asks for one of these. `"auto"` in both is `"triton"` on a GPU where it can serve; `"naive"` is `"torch"`.
    """
    asked = asked_backend(backend)
    if asked in ("naive", "torch"):
        return "torch"
    reason = "Triton is not installed"
    if memory_pairs_triton is not None:
        reason = why_not_triton(values, kernel, reduced_size)
    return triton_or_torch(asked, reason, values.is_cuda)


def grassmann_memory(
    query: torch.Tensor,
    key: torch.Tensor,
    values: torch.Tensor,
    log_decay: torch.Tensor,
    positions: torch.Tensor | None = None,
    initial_state: MemoryState | None = None,
    kernel: str = "binet_cauchy",
    chunk_size: int | None = None,
    output_final_state: bool = False,
    backend: str = "auto",
) -> tuple[torch.Tensor, MemoryState | None]:
    r"""
    The Grassmann memory :math:`o_t = \sum_{s \le t} D_{ts}\, \kappa(Q_t, K_s)\, v_s`, see the top of this file.

    Time and memory are linear in length for a fixed `chunk_size`. Features of all tokens never exist at once, in the
    forward pass as in the backward pass.

    Args:
        query, key (`torch.Tensor` of shape `(B, T, H, m, r)`):
            Frames of the planes, or vectors (`m = 1`) for kernels without planes.
        values (`torch.Tensor` of shape `(B, T, H, dv)`):
            What is written.
        log_decay (`torch.Tensor` of shape `(B, T, H)`):
            `log a`, not positive; `-inf` forgets everything before. Unused for the first token of a sequence.
        positions (integer `torch.Tensor` of shape `(B, T)` or `(1, T)`, *optional*):
            Position of each token in its sequence, [`NO_POSITION`] for padding. By default each row is one sequence
            that goes on where the initial state ends.
        initial_state ([`MemoryState`], *optional*):
            What earlier calls left.
        kernel (`str`, *optional*, defaults to `"binet_cauchy"`):
            A key of `KERNELS`.
        chunk_size (`int`, *optional*):
            Number of tokens in a chunk, by default that of [`choose_chunk_size`]. `T` is the quadratic form.
        output_final_state (`bool`, *optional*, defaults to `False`):
            Whether to return the state after the last token.
        backend (`str`, *optional*, defaults to `"auto"`):
            `"torch"`, `"triton"` (pairs of tokens in fused GPU kernels) or `"auto"`: see [`choose_memory_backend`].

    Returns:
        `torch.Tensor` of shape `(B, T, H, dv)` in the type of `values`, and the final [`MemoryState`] or `None`.

    Raises:
        ValueError: for an unknown kernel, or shapes that do not fit together.
    """
    check_arguments(query, key, values, log_decay, positions, initial_state, kernel)
    if values.shape[1] == 0:
        return values, state_before(initial_state, query, values, kernel) if output_final_state else None
    backend = choose_memory_backend(backend, values, kernel, query.shape[-1])
    if values.shape[1] == 1 and chunk_size is None and initial_state is not None:
        output, state = grassmann_memory_recurrent(query, key, values, log_decay, positions, initial_state, kernel)
        return output, state if output_final_state else None
    with without_autocast(values.device):
        return grassmann_memory_chunked(
            query, key, values, log_decay, positions, initial_state, kernel, chunk_size, output_final_state, backend
        )


def grassmann_memory_chunked(
    query, key, values, log_decay, positions, initial_state, kernel, chunk_size, output_final_state, backend
) -> tuple[torch.Tensor, MemoryState | None]:
    """[`grassmann_memory`], whose arguments these are."""
    name, kernel, dtype, length = kernel, KERNELS[kernel], values.dtype, values.shape[1]
    if chunk_size is None:
        chunk_size = choose_chunk_size(length, kernel.num_features(query.shape[-1]), backend)
    chunk_size = min(chunk_size, length)
    arguments = query, key, values, log_decay
    query, key, values, log_decay = in_one_precision(query, key, values, log_decay)
    log_decay = log_decay.clamp(min=MIN_LOG_DECAY)
    segments, last = None, None
    if positions is not None:
        positions = positions.expand(values.shape[:2])
        real, starts, last = sequence_starts(positions, last_position(initial_state, values))
        number = prefix_sums(starts.int())
        segments = torch.where(real, number, -1 - number)
        (log_decay,) = keep(real & ~starts, log_decay)
    elif output_final_state and initial_state is None:
        last = torch.full(values.shape[:1], length - 1, device=values.device)
    elif output_final_state:
        last = following_positions(initial_state.position, length)[:, -1]
    # States of squares have kernels of their own.
    fused = backend == "triton" and kernel.square is not None
    if backend == "triton":
        pairs = memory_pairs_triton(*arguments, segments, name, chunk_size)
        if chunk_size == length and initial_state is None and (fused or not output_final_state):
            if not output_final_state:
                return pairs, None
            in_last = None if segments is None else segments == number[:, -1:]
            return pairs, MemoryState(row_state(key, values, log_decay, in_last, name, dtype), last)
    if segments is None:
        starts = torch.zeros(1, length, dtype=torch.bool, device=values.device)
    else:
        query, key, values = keep(real, query, key, values)
    size, frames = query.shape[-1], (query, key)
    if not fused:
        square = square_tensors(kernel, query)
        query, key = (split_chunks(x, chunk_size).movedim(3, -1) for x in frames)  # (B, H, N, m, r, c)
        query, key = kernel.coordinates(query), kernel.coordinates(key)  # (B, H, N, C, c)
    values, log_decay, starts = (split_chunks(x, chunk_size) for x in (values, log_decay, starts[..., None]))
    segment = prefix_sums(starts.flatten(2).int()).view_as(starts)  # (B or 1, 1, N, c)

    # D_ts = e^{L_t - L_s}, with sums L of log decays. Constants take the place of D, without gradients: decays for
    # rounded sums. What remains is e^{rest_t} e^{-rest_s} with the difference `rest` between L and these sums, next to
    # zero, which belongs to tokens instead of pairs. It takes back the rounding and carries the gradient.
    steps = slice(None) if backend == "torch" else slice(-1, None)
    total, inside, entering = decay_factors(log_decay, segment, steps)
    rest = log_decay - F.pad(total, (1, 0)).diff(dim=-1)  # (B, H, N, c)
    rest = prefix_sums(rest.flatten(2)).view_as(rest) if rest.shape[2] > 1 else prefix_sums(rest)
    values = values * (-rest).exp()[..., None]  # (B, H, N, c, dv)

    output = torch.zeros_like(values)
    if backend == "torch":
        similarity = query.mT @ key  # (B, H, N, c, c)
        if kernel.square is not None:
            similarity = similarity.square()
        output = (similarity * inside) @ values  # (B, H, N, c, dv)

    # Without an initial state the first chunk reads nothing; without a final one, nobody what the last chunk writes.
    num_chunks = values.shape[2]
    first = 0 if initial_state is not None else 1
    end = num_chunks if output_final_state else num_chunks - 1
    state = None
    if end > 0 or first == 0:
        leaving = values[:, :, :end] * inside[:, :, :end, -1, :, None]
        if fused:
            writes = write_states(frames[1][:, : end * chunk_size], leaving.to(dtype), name)  # (B, H, N, W, W, dv)
        else:
            writes = write(key[:, :, :end], leaving, square)  # (B, H, N, F, dv)
        totals, segments = total[:, :, :end, -1], segment[:, :, :end, -1]
        if initial_state is not None:
            memory = initial_state.memory.to(writes.dtype)
            memory = pack_state(memory, name, size) if fused else memory
            writes = torch.cat([memory[:, :, None], writes], dim=2)
            totals, segments = F.pad(totals, (1, 0)), F.pad(segments, (1, 0))
        states = scan_states(totals, segments, writes.flatten(3)).unflatten(3, writes.shape[3:])
        if num_chunks > first:
            entered = states[:, :, : num_chunks - first]
            if fused:
                reads = read_states(frames[0][:, first * chunk_size :], entered, name, chunk_size, dtype)
            else:
                reads = read(query[:, :, first:], entered, square)
            output = output + F.pad(reads * entering[:, :, first:, :, None], (0, 0, 0, 0, first, 0))
        if output_final_state:
            memory = unpack_state(states[:, :, -1], name, size) if fused else states[:, :, -1]
            state = MemoryState(memory * rest[:, :, -1, -1, None, None].exp(), last)
    output = (output * rest.exp()[..., None]).movedim(1, 3).flatten(1, 2)[:, :length]  # (B, T, H, dv)
    if backend == "triton":
        output = output + pairs
    return output.to(dtype), state
