"""The linear probe: multinomial logistic regression on frozen features, solved to convergence by L-BFGS."""

import math
from typing import Any

import torch
from torch import Tensor

from simclr_dist.evaluate.options import L2, MAX_ITER

_ROWS_AT_ONCE = 8192
_ROWS_OF_HESSIAN = 16384


def linear_probe(
    train_h: Tensor,
    train_y: Tensor,
    test_h: Tensor,
    *,
    classes: int,
    l2: float = L2,
    max_iter: int = MAX_ITER,
    tolerance: float = 1e-4,
) -> tuple[Tensor, dict[str, Any]]:
    """Classes of the test rows by a linear classifier fitted on the training rows.

    Minimises mean cross-entropy + l2/2 * |W|^2 over weights W and an unpenalised bias, full batch, from zero, on
    features standardised by the training rows' mean and standard deviation. scikit-learn's C is 1 / (l2 * n). Nothing
    is random. Needs one float32 copy of train_h; the inputs are left as they are.

    Args:
        train_h: [n, d] features. train_y: [n] int64 labels in [0, classes). test_h: [m, d], on the device of train_h.
        tolerance: what no entry of the gradient may pass for `converged` (scikit-learn's default tol).

    Returns:
        [m] int64 predictions on the device of the features, and a dict of plain values: the settings, `converged`,
        `iterations`, `evaluations`, `gradient_max`, `loss` (with the penalty) and `train_top1` in percent.
    """
    if l2 < 0 or max_iter < 1:
        raise ValueError(f"l2 must not be negative and max_iter at least 1, got l2={l2} and max_iter={max_iter}")
    if len(train_h) == 0:
        raise ValueError("there are no training rows to fit")
    device = train_h.device
    mean, scale = _standardisation(train_h)
    x = train_h.to(torch.float32, copy=True).sub_(mean).mul_(scale)
    y = train_y.to(device)
    # The optimizer's state is float64 and sums over rows are, the products float32: the line search compares losses
    # that differ by less than a float32 sum over the rows resolves.
    weight = torch.zeros(x.shape[1], classes, dtype=torch.float64, device=device)
    bias = torch.zeros(classes, dtype=torch.float64, device=device)

    # Raw pixels are so correlated that plain L-BFGS stalls: solve for v in W = U^-1 v, where U'U is the Hessian at zero.
    upper, root = _hessian_factor(x, classes, l2), math.sqrt(classes)
    v, u = torch.zeros_like(weight), torch.zeros_like(bias)
    gradient_max = float("inf")

    def closure() -> Tensor:
        nonlocal gradient_max
        weight.copy_(torch.linalg.solve_triangular(upper, v, upper=True))
        bias.copy_(u * root)
        loss, weight_gradient, bias_gradient = _objective(x, y, weight, bias, l2)
        u.grad = bias_gradient * root
        v.grad = torch.linalg.solve_triangular(upper.T, weight_gradient, upper=False).contiguous()
        gradient_max = max(float(weight_gradient.abs().max()), float(bias_gradient.abs().max()))
        return loss

    optimizer = torch.optim.LBFGS(
        [v, u],
        max_iter=max_iter,
        max_eval=2 * max_iter + 20,
        tolerance_grad=1e-5,
        tolerance_change=1e-9,  # what float32 products resolve
        history_size=20,
        line_search_fn="strong_wolfe",
    )
    optimizer.step(closure)
    loss = closure()
    state = optimizer.state[v]
    info = {
        "l2": l2,
        "max_iter": max_iter,
        "tolerance": tolerance,
        "converged": gradient_max <= tolerance,
        "iterations": int(state["n_iter"]),
        "evaluations": int(state["func_evals"]),
        "gradient_max": gradient_max,
        "loss": float(loss),
        "train_top1": 100 * float((_predict(x, weight, bias) == y).double().mean()),
    }
    predictions = [torch.empty(0, dtype=torch.int64, device=device)]
    predictions += [
        _predict(rows.to(torch.float32).sub(mean).mul_(scale), weight, bias) for rows in test_h.split(_ROWS_AT_ONCE)
    ]
    return torch.cat(predictions), info


def _standardisation(h: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and 1/standard deviation of each column as float32 [d]; a column that is constant to rounding gets 0."""
    total = torch.zeros(h.shape[1], dtype=torch.float64, device=h.device)
    for rows in h.split(_ROWS_AT_ONCE):
        total += rows.double().sum(dim=0)
    mean = (total / len(h)).float()  # float32, so that the deviations are from the very value that is subtracted later
    square = torch.zeros_like(total)
    for rows in h.split(_ROWS_AT_ONCE):
        square += (rows.double() - mean).square().sum(dim=0)
    deviation = (square / len(h)).sqrt()
    varies = deviation > 1e-6 * mean.abs()
    return mean, torch.where(varies, 1 / deviation.where(varies, torch.ones_like(deviation)), 0.0).float()


def _hessian_factor(x: Tensor, classes: int, l2: float) -> Tensor:
    """Upper U [d, d], float64, with U'U = covariance/classes + l2: the Hessian of one class's weights at zero."""
    rows = x[:: -(-len(x) // _ROWS_OF_HESSIAN)]
    hessian = (rows.T @ rows).double() / (len(rows) * classes)
    hessian.diagonal().add_(l2 + 1e-6)  # columns without variance and fewer rows than columns, at l2 = 0
    upper: Tensor = torch.linalg.cholesky(hessian, upper=True)
    return upper


def _objective(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, l2: float) -> tuple[Tensor, Tensor, Tensor]:
    """Penalised mean cross-entropy and its gradient with respect to weight and bias, all float64."""
    loss = torch.zeros((), dtype=torch.float64, device=x.device)
    weight_gradient, bias_gradient = torch.zeros_like(weight), torch.zeros_like(bias)
    weight32, bias32 = weight.float(), bias.float()
    for rows, labels in zip(x.split(_ROWS_AT_ONCE), y.split(_ROWS_AT_ONCE), strict=True):
        log_probability = (rows @ weight32 + bias32).log_softmax(dim=1)
        picked = labels[:, None]
        loss -= log_probability.gather(1, picked).double().sum()
        residual = log_probability.exp_()
        residual.scatter_add_(1, picked, torch.full_like(picked, -1, dtype=residual.dtype))
        weight_gradient += (residual.T @ rows).T.double()  # rows.T @ residual is 8 times slower on CPU
        bias_gradient += residual.double().sum(dim=0)
    n = len(x)
    penalty = 0.5 * l2 * weight.square().sum()
    return loss / n + penalty, weight_gradient / n + l2 * weight, bias_gradient / n


def _predict(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return (x @ weight.float() + bias.float()).argmax(dim=1)
