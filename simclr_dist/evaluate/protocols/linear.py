"""Fit the linear probe: multinomial logistic regression on frozen features. L-BFGS solves it to convergence.

The strength of the penalty on the weights decides points of accuracy. Which value is right depends on the features. So it is
chosen on rows of the training set that are kept from the fit. The test rows are met once, by the finished classifier.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from simclr_dist.evaluate.protocols.scores import AT_ONCE, ON_VALIDATION, Predict, top1
from simclr_dist.evaluate.rows import copied
from simclr_dist.evaluate.settings import Settings
from simclr_dist.system.errors import DataError

# Half decades, strong to weak, in the order of the warm starts: between two of them accuracy moves by tenths of a point.
# Features are standardised and the cross-entropy is a mean, so 10 leaves little but the bias of 512 correlated columns
# and 1e-6 is no penalty on 50,000 rows (scikit-learn's C = 20). Best values seen: 1e-2 to 3e-4.
L2_GRID = tuple(10.0 ** (half / 2) for half in range(2, -13, -1))
VALIDATION_SHARE = 0.2
# A fifth of fewer rows is at most 1000, by whose top-1 a poor value can win: with 256 CIFAR-10 images 2 to 3 points are lost to
# the best value, in the mean. Five folds and the cross-entropy lose .4. From here on both do equally well.
FEW = 5000
FOLDS = 5
FEW_HELD_OUT = int(FEW * VALIDATION_SHARE)
_OVERFIT = 3  # values in a row behind the best one: the weaker penalties, which take longest, are left out
TOLERANCE = 1e-4  # what no entry of the gradient may pass for `converged` (scikit-learn's default tol)
_ROWS_AT_ONCE = 4096
_ROWS_SUMMED = 1024
_ROWS_OF_HESSIAN = 8192
_FINISHED = 4e-5  # largest entry of the preconditioned gradient; the loss is then within 4e-6 of its minimum
_HISTORY_BYTES = 2**32  # of L-BFGS: 20 pairs of vectors, fewer where classes x columns are tens of millions
_GOOD_ENOUGH = 1e-4  # the same for fits that are only compared with each other


def linear_probe(
    train_h: Tensor,
    train_y: Tensor,
    *,
    classes: int,
    l2: float | None = None,
    val: tuple[Tensor, Tensor] | None = None,
    seed: int = 0,
    max_iter: int = Settings.max_iter,
) -> tuple[Predict, dict[str, Any]]:
    """Fit a linear classifier on the training rows.

    Minimises mean cross-entropy + l2/2 * |W|^2 over weights W and an unpenalised bias, full batch, from zero, on
    features standardised by the training rows' mean and standard deviation. scikit-learn's C is 1 / (l2 * n). Without
    `l2`, `choose_l2` chooses it on `val`, else among training rows; the fit on all training rows is then as with that l2 given.
    Needs one float32 copy of train_h, two where l2 is chosen, in files where they are large (`evaluate.space`); the inputs are
    left as they are.

    Args:
        train_h: [n, d] features. train_y: [n] int64 labels in [0, classes).
        seed: of the rows on which l2 is chosen; without effect where l2 is given.

    Returns:
        The classifier, from test rows [m, d] on the device of train_h to float32 logits [m, classes], and a dict of plain
        values: the settings, `choice`
        (what `choose_l2` returns, or None), `converged`, `iterations`, `evaluations`, `gradient_max`, `loss` (with the
        penalty) and `train_top1` in percent.

    Raises DataError where there are too few rows to choose l2 on.
    """
    if (l2 is not None and l2 < 0) or max_iter < 1:
        raise ValueError(f"l2 must not be negative and max_iter at least 1, got l2={l2} and max_iter={max_iter}")
    if len(train_h) == 0:
        raise ValueError("there are no training rows to fit")
    choice = None
    if l2 is None:
        choice = choose_l2(train_h, train_y, classes=classes, val=val, seed=seed, max_iter=max_iter)
        l2 = float(choice["l2"])
    problem = _standardised(copied(train_h, dtype=torch.float32), train_y, classes)
    fit = _fit(problem, l2, max_iter, _FINISHED)
    info = {
        "l2": l2, "choice": choice, "max_iter": max_iter,
        "tolerance": TOLERANCE, "converged": fit.gradient_max <= TOLERANCE,
        "iterations": fit.iterations, "evaluations": fit.evaluations, "gradient_max": fit.gradient_max,
        "loss": fit.loss, "train_top1": top1(fit.logits, problem.x, problem.y, classes),
    }  # fmt: skip
    return lambda h: torch.cat([fit.logits(problem.like(rows)) for rows in h.split(_ROWS_AT_ONCE)]), info


def choose_l2(
    train_h: Tensor,
    train_y: Tensor,
    *,
    classes: int,
    grid: Sequence[float] = L2_GRID,
    val: tuple[Tensor, Tensor] | None = None,
    seed: int = 0,
    max_iter: int = Settings.max_iter,
) -> dict[str, Any]:
    """Choose the l2 that is best on `val`, or held-out training rows.

    The top-1 of `val` (features and labels) decides, of fewer than `FEW_HELD_OUT` rows the cross-entropy. Without, a fifth of
    the rows is held out by `stratified_split`, and top-1 decides; of fewer than `FEW` each is held out once, in folds, and the
    cross-entropy decides. Fits start from the next stronger penalty's. Of equally good values the strongest is taken.

    Returns:
        `l2`, `chosen_on` (in words), `by` ("top-1" or "cross-entropy"), `grid` (what was tried, descending), `validation_top1`
        in percent and `validation_loss` for each of it, `validation_rows`, `folds`, `share`, `seed`, `runner_up` (the next best
        value), `margin` (by how much its top-1 or loss is worse), `margin_error` (the margin's standard error over rows), and
        `at_edge`: whether the best value is the first or last of `grid` as given, so that a better one may lie outside.

    Raises DataError as `check_choice` does.
    """
    if val is None:
        check_choice(train_y, seed)
    train_y, parts = train_y.to(train_h.device), list[tuple[_Problem, Tensor, Tensor]]()
    count, values = folds(len(train_y)) if val is None else 1, sorted(map(float, grid), reverse=True)
    by = 1 if count == 1 and (val is None or len(val[1]) >= FEW_HELD_OUT) else 0  # what `_judged` has there
    for fold in range(count):
        if val is not None:
            problem = _standardised(copied(train_h, dtype=torch.float32), train_y, classes)
            parts.append((problem, problem.like(val[0]), val[1].to(train_h.device)))
            break
        split = stratified_split(train_y, share=VALIDATION_SHARE, seed=seed, fold=fold)
        fit_rows, held_out = (rows.to(train_h.device) for rows in split)
        if len(held_out):
            problem = _standardised(copied(train_h, fit_rows, torch.float32), train_y[fit_rows], classes)
            parts.append((problem, problem.like(train_h, held_out), train_y[held_out]))
    fits, judged, worse = dict[int, _Fit](), list[Tensor](), list[float]()
    for value in values:
        for at, (problem, _, _) in enumerate(parts):
            fits[at] = _fit(problem, value, max_iter, _GOOD_ENOUGH, start=fits.get(at))
        judged.append(torch.cat([_judged(fits[at], *part) for at, part in enumerate(parts)], dim=1))
        worse.append(float(judged[-1][by].mean()))
        best = worse.index(min(worse))
        if by == 0 and len(worse) - best > _OVERFIT:
            break
    second = min((cost, at) for at, cost in enumerate(worse) if at != best)[1] if len(worse) > 1 else best
    margins = judged[second][by] - judged[best][by]
    loss, wrong = torch.stack(judged).mean(dim=2).T.tolist()
    return {
        "l2": values[best], "grid": values[: len(worse)], "validation_top1": [100 - share for share in wrong],
        "validation_loss": loss, "validation_rows": len(margins), "folds": count, "by": ("cross-entropy", "top-1")[by],
        "chosen_on": ON_VALIDATION if val is not None else _held_out(count), "seed": seed,
        "share": VALIDATION_SHARE if val is None else None, "runner_up": values[second], "margin": float(margins.mean()),
        "margin_error": float(margins.std(correction=0)) / math.sqrt(len(margins)), "at_edge": best in (0, len(values) - 1),
    }  # fmt: skip


def check_choice(train_y: Tensor, seed: int = 0) -> None:
    """Raise DataError where `choose_l2` would hold out no row of these labels."""
    splits = (stratified_split(train_y, share=VALIDATION_SHARE, seed=seed, fold=fold) for fold in range(folds(len(train_y))))
    if not any(len(held_out) for _, held_out in splits):
        few = f"{len(train_y)} labelled training images are too few to choose l2 on"
        raise DataError(f"linear probe: {few} (no class has a row to spare for validation); give l2, or more images")


def _held_out(count: int) -> str:
    return "a fifth of the training images" if count == 1 else f"training images, each held out once in {count} folds"


def folds(rows: int) -> int:
    """Return how many times a fifth of the `rows` is held out."""
    return FOLDS if rows < FEW else 1


def stratified_split(labels: Tensor, *, share: float, seed: int, fold: int = 0) -> tuple[Tensor, Tensor]:
    """Split rows in two, ascending, on the CPU. The second part has `share` of each class, rounded, drawn by `seed`.

    Second parts of different folds have no row in common. A class of one row is in the first part only.
    """
    labels = labels.cpu()
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    count = torch.bincount(labels)
    place = torch.arange(len(labels)) - (count.cumsum(0) - count).repeat_interleave(count)
    first, end = ((count * share * (fold + more)).add(0.5).floor().repeat_interleave(count) for more in (0, 1))
    second = (place >= first) & (place < end) & (count > 1).repeat_interleave(count)
    return by_class[~second].sort().values, by_class[second].sort().values


def _judged(fit: "_Fit", problem: "_Problem", x: Tensor, y: Tensor) -> Tensor:
    """Judge each row. [2, rows], float64: its cross-entropy, and 100 where its prediction is wrong, else 0."""
    rows_at_once, parts = max(1, AT_ONCE // problem.classes), list[Tensor]()
    for rows, true in zip(x.split(rows_at_once), y.split(rows_at_once), strict=True):
        logits = fit.logits(rows)
        loss = torch.nn.functional.cross_entropy(logits, true, reduction="none")
        parts.append(torch.stack([loss.double(), 100.0 * (logits.argmax(dim=1) != true)]))
    return torch.cat(parts, dim=1)


class _Problem(NamedTuple):
    """Standardised rows x [n, d] float32 with labels y. `hessian` is of one class's weights at zero without penalty.

    With few rows x is [n, n], in the `basis` [d, n] of the space that they span: whatever minimises the penalty lies in it.
    """

    x: Tensor
    y: Tensor
    classes: int
    mean: Tensor
    scale: Tensor
    hessian: Tensor
    basis: Tensor | None

    def like(self, h: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return other rows, standardised by these rows' mean and deviation. They are a copy, in the basis of these."""
        x = copied(h, rows, torch.float32).sub_(self.mean).mul_(self.scale)
        return x if self.basis is None else x @ self.basis


def _standardised(x: Tensor, y: Tensor, classes: int) -> _Problem:
    """Standardise rows [n, d] float32 in place."""
    # Sums are float32 inside a block of rows, float64 between blocks, and of distances from the first row, so that a
    # column that is constant has exactly its value as the mean.
    first = x[0].clone()
    total = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    for rows in x.split(_ROWS_SUMMED):
        total += (rows - first).sum(dim=0)
    mean = (first + total / len(x)).float()  # float32: the deviations are from the very value that is subtracted
    x.sub_(mean)
    total.zero_()
    for rows in x.split(_ROWS_SUMMED):
        total += rows.square().sum(dim=0)
    deviation = (total / len(x)).sqrt()
    varies = deviation > 1e-6 * mean.abs()  # a column that is constant to rounding becomes 0
    scale = torch.where(varies, 1 / deviation.where(varies, torch.ones_like(deviation)), 0.0).float()
    x, basis = x.mul_(scale), None
    if 2 * len(x) <= x.shape[1]:  # raw pixels of some hundred images: the Hessian of all columns would take minutes
        basis = torch.linalg.qr(x.T.double())[0].float()
        x = x @ basis
    some = x[:: -(-len(x) // _ROWS_OF_HESSIAN)]
    hessian = (some.T @ some).double() / (len(some) * classes)
    return _Problem(x, y.to(x.device), classes, mean, scale, hessian, basis)


class _Fit(NamedTuple):
    """Weights [d, classes] and bias [classes], float64, and how they were found."""

    weight: Tensor
    bias: Tensor
    loss: float
    gradient_max: float
    iterations: int
    evaluations: int

    def logits(self, x: Tensor) -> Tensor:
        return x @ self.weight.float() + self.bias.float()


def _fit(problem: _Problem, l2: float, max_iter: int, finished: float, *, start: _Fit | None = None) -> _Fit:
    # The optimizer's state is float64 and sums over blocks are, the products float32: the line search compares losses
    # that differ by less than a float32 sum over the rows resolves.
    # Raw pixels are so correlated that plain L-BFGS stalls: solve for v in W = U^-1 v, where U'U is the Hessian at zero.
    hessian = problem.hessian.clone()
    # It only has to be near the Hessian. With columns without variance, or fewer rows than columns, float32 sums leave it
    # eigenvalues below 0, by a part of the largest one.
    hessian.diagonal().add_(l2 + 1e-6 * (1 + float(hessian.trace())))
    upper, root = torch.linalg.cholesky(hessian, upper=True), math.sqrt(problem.classes)
    weight, bias = hessian.new_zeros(len(hessian), problem.classes), hessian.new_zeros(problem.classes)
    v, u = (upper @ start.weight, start.bias / root) if start else (torch.zeros_like(weight), torch.zeros_like(bias))
    at: tuple[Tensor, Tensor] | None = None
    loss, gradient_max, evaluations = torch.zeros(()), float("inf"), 0

    def closure() -> Tensor:
        nonlocal at, loss, gradient_max, evaluations
        if at is not None and torch.equal(at[0], v) and torch.equal(at[1], u):
            return loss  # the gradients of this point are in place
        at = v.clone(), u.clone()
        weight.copy_(torch.linalg.solve_triangular(upper, v, upper=True))
        bias.copy_(u * root)
        loss, weight_gradient, bias_gradient = _objective(problem, weight, bias, l2)
        u.grad = bias_gradient * root
        v.grad = torch.linalg.solve_triangular(upper.T, weight_gradient, upper=False).contiguous()
        of_columns = weight_gradient if problem.basis is None else problem.basis.double() @ weight_gradient
        gradient_max = max(float(of_columns.abs().max()), float(bias_gradient.abs().max()))
        evaluations += 1
        return loss

    # torch's first step is 1/|gradient|_1 long; preconditioned, a step of 1 is right, which lr can restore.
    closure()
    assert v.grad is not None, "it has gone backward"
    assert u.grad is not None, "the same"
    length = max(1.0, float(v.grad.abs().sum() + u.grad.abs().sum()))
    optimizer = torch.optim.LBFGS(
        [v, u], lr=length, max_iter=1, max_eval=2 * max_iter + 20,
        tolerance_grad=finished, tolerance_change=1e-9,  # what float32 products resolve
        history_size=min(20, max(3, _HISTORY_BYTES // (2 * v.nbytes))), line_search_fn="strong_wolfe",
    )  # fmt: skip
    optimizer.step(closure)
    if max_iter > 1 and max(float(v.grad.abs().max()), float(u.grad.abs().max())) > finished:
        optimizer.param_groups[0].update(lr=1.0, max_iter=max_iter - 1)
        optimizer.step(closure)
    closure()  # the line search may have ended elsewhere than where it looked last
    return _Fit(weight, bias, float(loss), gradient_max, int(optimizer.state[v]["n_iter"]), evaluations)


def _objective(problem: _Problem, weight: Tensor, bias: Tensor, l2: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the penalised mean cross-entropy and its gradient. The gradient is by weight and bias. All are float64."""
    loss = weight.new_zeros(())
    weight_gradient, bias_gradient = torch.zeros_like(weight.T), torch.zeros_like(bias)
    weight32, bias32, n = weight.float(), bias.float(), len(problem.x)
    rows_at_once = max(1, min(_ROWS_AT_ONCE, AT_ONCE // problem.classes))
    for rows, labels in zip(problem.x.split(rows_at_once), problem.y.split(rows_at_once), strict=True):
        # Classes come first: over a short last dimension softmax is 15 times slower on CPU, and so is rows.T @ residual.
        log_probability = torch.addmm(bias32, rows, weight32).T.contiguous().log_softmax(dim=0)
        picked = labels[None]
        loss -= log_probability.gather(0, picked).sum(dtype=torch.float64)
        residual = log_probability.clamp_(min=-80).exp_()  # less becomes a denormal number: products 3 times slower
        residual.scatter_add_(0, picked, torch.full_like(picked, -1, dtype=residual.dtype))
        weight_gradient += residual @ rows
        bias_gradient += residual.sum(dim=1)
    return loss / n + 0.5 * l2 * weight.square().sum(), weight_gradient.T / n + l2 * weight, bias_gradient / n
