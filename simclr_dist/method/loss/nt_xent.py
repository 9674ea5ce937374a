"""Compute NT-Xent and its decoupled form. Chen et al. 2020, equation 1; Yeh et al. 2022 (DCL)."""

import functools
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr_dist.method.distributed import all_gather, first_derivative_only, rank, world_size
from simclr_dist.method.loss.tiles import Similarities, gather_views, unit_rows
from simclr_dist.system.errors import reason_of

if TYPE_CHECKING:
    from simclr_dist.method.loss import fused


def nt_xent_reference(z_a: Tensor, z_b: Tensor, temperature: float, *, decoupled: bool = False, scale: float = 1.0) -> Tensor:
    """Compute NT-Xent by its definition, with the whole matrix. For one process: the oracle of the tests.

    Shapes: z_a, z_b float [n, d], rows i are the two views of image i. Returns `scale` times the mean over the 2n anchors.
    """
    z = F.normalize(torch.cat([z_a, z_b]), dim=1)
    similarity = z @ z.T / temperature
    similarity = similarity.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -torch.inf)
    positive = torch.arange(len(z), device=z.device).roll(len(z_a))
    if decoupled:
        negatives = similarity.scatter(1, positive[:, None], -torch.inf)
        return scale * (negatives.logsumexp(1) - similarity.gather(1, positive[:, None])[:, 0]).mean()
    return scale * F.cross_entropy(similarity, positive)


class NTXentLoss(nn.Module):
    """NT-Xent over the embeddings of all ranks.

    Each rank passes its own n images' embeddings (the same n on every rank); each of the 2N anchors of the global batch
    has its partner as positive and 2(N - 1) negatives. The value is the global mean, the same on every rank. The gradient
    carries a factor world_size, so that the average which DDP takes over ranks is the gradient of that mean: the gradient
    of one process that holds the whole batch. Computed in float32 (float64 stays) whatever autocast says.

    `decoupled` leaves the positive out of the denominator (DCL). `scale` multiplies the loss: 2 for that of SimCLR's official
    code, which adds the means over the two views.

    All three are the same on every rank. Raises ValueError for a temperature or scale that is not above 0 and finite. There is
    no second derivative: a backward with create_graph raises RuntimeError.
    """

    def __init__(self, temperature: float = 0.1, *, decoupled: bool = False, scale: float = 1.0) -> None:
        super().__init__()
        for name, value in (("temperature", temperature), ("scale", scale)):
            if not 0 < value < math.inf:
                raise ValueError(f"NTXentLoss: {name}: {value} must be above 0, and finite")
        self.temperature, self.decoupled, self.scale = temperature, decoupled, scale
        self._agreed = False  # whether the ranks' shapes were the same at the last check

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """Compute the loss, a scalar. z_a, z_b: float [n, d], row i of each a view of image i; need not be normalised.

        n and d are at least 1; with one image in all, the loss is 0. Raises ValueError, on every rank, when shapes or types
        differ between the views or the ranks, and when the ranks' losses have other settings. On CUDA the ranks are
        compared at the first call only, since that waits for the device.
        """
        self._check(z_a, z_b)
        with torch.autocast(z_a.device.type, enabled=False), _full_precision():
            pairs = zip(self.cut(z_a), self.cut(z_b), strict=True)
            parts = [unit_rows(z if z.dtype == torch.float64 else z.float()) for z in map(torch.cat, pairs)]
            loss: Tensor = _NTXent.apply(self.temperature, self.decoupled, self.factor, *parts)
            return self.scale * loss

    @property
    def factor(self) -> float:
        """Return what the gradient is multiplied by."""
        return world_size()

    def cut(self, z: Tensor) -> Sequence[Tensor]:
        """Cut this rank's [n, d] into parts that are computed alone."""
        return [z]

    def _check(self, z_a: Tensor, z_b: Tensor) -> None:
        same = z_a.shape == z_b.shape and z_a.dtype == z_b.dtype
        good = same and z_a.dim() == 2 and z_a.numel() > 0 and z_a.is_floating_point()
        if world_size() > 1 and not (z_a.is_cuda and self._agreed):
            mine = [*z_a.shape, z_a.dtype == torch.float64] if good else [-1, -1, -1]
            settings = [self.temperature, self.decoupled, self.scale]
            ranks = all_gather(torch.tensor([*mine, *settings], dtype=torch.float64, device=z_a.device)).tolist()
            shapes = [list(map(int, of_rank[:3])) for of_rank in ranks]
            if any(shape != shapes[0] for shape in shapes):
                each = ", ".join(f"[{n}, {d}]{' float64' * double}" if n >= 0 else "what is none" for n, d, double in shapes)
                raise ValueError(f"every rank must pass embeddings of one shape and type, but ranks 0, 1, ... pass {each}")
            if any(of_rank != ranks[0] for of_rank in ranks):
                each = ", ".join(f"({temperature:g}, {bool(dcl)}, {scale:g})" for *_, temperature, dcl, scale in ranks)
                raise ValueError(f"temperature, decoupled and scale must be the same, but ranks 0, 1, ... have {each}")
            self._agreed = good
        if not good:
            kinds = f"{list(z_a.shape)} {z_a.dtype} and {list(z_b.shape)} {z_b.dtype}"
            raise ValueError(f"z_a and z_b must be float [n, d], both the same and not empty, but are {kinds}")


@contextmanager
def _full_precision() -> Iterator[None]:
    """Compute float32 products with float32's digits. Overrides settings that allow less."""
    # Per backend: torch.get_float32_matmul_precision fails once somebody has used these.
    mkldnn: Any = torch.backends.mkldnn  # whose `matmul` is not in its type
    products = torch.backends.cuda.matmul, mkldnn.matmul
    before = [backend.fp32_precision for backend in products]
    try:
        for backend in products:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(products, before, strict=True):
            backend.fp32_precision = precision


def for_kernels(device: torch.device, dtype: torch.dtype, dim: int) -> bool:
    """Return whether the Triton kernels are the faster way for such embeddings.

    GPUs before compute capability 8.0 have no TF32. Triton multiplies float32 without tensor cores there; so cuBLAS does it.
    """
    fits = device.type == "cuda" and dtype == torch.float32 and dim <= 256
    return fits and torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def triton_problem(device: torch.device) -> str:
    """Try once whether Triton compiles for this GPU. Returns '', or why not with the cure, of which it also warns."""
    try:
        from simclr_dist.method.loss import fused

        problem = fused.problem(device)
    except ImportError as error:
        problem = f"Triton cannot be imported ({reason_of(error)}); pip install triton"
    if problem:
        warnings.warn(problem, RuntimeWarning, stacklevel=2)
    return problem


def _similarities(z: Tensor, columns: Tensor, first: int, temperature: float) -> "Similarities | fused.Similarities":
    if for_kernels(z.device, z.dtype, z.shape[1]) and not triton_problem(z.device):
        from simclr_dist.method.loss import fused

        return fused.Similarities(z, columns, first, temperature)
    return Similarities(z, columns, first, temperature)


class _NTXent(torch.autograd.Function):
    """Mean NT-Xent of normalised rows.

    With L_i the log-sum-exp over the negatives of i, p_i its positive's logit, l_i = softplus(L_i - p_i) and
    a_i = sigmoid(L_i - p_i) (decoupled: l_i = L_i - p_i, a_i = 1), the gradient of row i is

        dl/dz_i = 1/(2N tau) * (sum_j [a_i exp(s_ij - L_i) + a_j exp(s_ij - L_j)] z_j - (a_i + a_pos) z_pos)

    so once every rank knows L and a of all rows, each has the whole gradient of its own rows. It is finished in the forward:
    the backward needs no collective, and only the gradient is kept. Summing over negatives only keeps the digits that
    1 - softmax loses once the loss is small.
    """

    @staticmethod
    def forward(ctx: Any, temperature: float, decoupled: bool, factor: float, *parts: Tensor) -> Tensor:
        n = len(parts[0]) // 2
        columns = gather_views(parts)
        matrices, logits, terms = [], [], []
        for number, z in enumerate(parts):
            similarities = _similarities(z, columns, (rank() * len(parts) + number) * n, temperature)
            positive = (z * z.roll(n, 0)).sum(1) / temperature
            # One image alone has no negatives: loss and gradient are 0, not nan.
            lse = similarities.log_sum_exp().clamp_min(torch.finfo(z.dtype).min / 4)
            if decoupled and len(columns) > 2:
                losses, log_a = lse - positive, torch.zeros_like(lse)
            else:
                losses, log_a = F.softplus(lse - positive), F.logsigmoid(lse - positive)
            matrices.append(similarities)
            logits.append(log_a)
            terms.append(torch.stack([losses, log_a - lse]))
        gathered = all_gather(torch.stack(terms)).unflatten(3, (2, n))  # [ranks, parts, 2, views, n]
        losses, log_weights = gathered.permute(2, 3, 0, 1, 4).flatten(1)
        gradients = []
        for z, similarities, log_a, (_, log_weight) in zip(parts, matrices, logits, terms, strict=True):
            if any(ctx.needs_input_grad):
                a, gradient = log_a.exp(), similarities.weighted_sum(log_weight, log_weights)
                gradient -= (a + a.roll(n))[:, None] * z.roll(n, 0)
                gradient *= factor / (len(columns) * temperature)
                gradients.append(gradient)
        ctx.save_for_backward(*gradients)
        loss: Tensor = losses.mean()
        return loss

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *(gradient * upstream for gradient in ctx.saved_tensors)
