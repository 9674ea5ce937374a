"""Prove that the distributed gradient equals the gradient of one process. Also the loss alone, as it trains."""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr_dist.config.settings import ENCODERS, Config, LossConfig, ModelConfig, ViewsConfig
from simclr_dist.data.views.draws import view_side
from simclr_dist.method.distributed import World, all_gather, all_gather_objects, all_sum, rank
from simclr_dist.method.loss import nt_xent_reference
from simclr_dist.method.microbatch import LossFunction
from simclr_dist.preflight.check.findings import Finding, place_of
from simclr_dist.train.learner import (
    backward,
    build_learner,
    build_loss,
    build_model,
    build_shapes,
    cut,
    embedding_size,
    kernel_problem,
    keyed,
)

TOLERANCE = 1e-11
SMALL = Config(
    global_batch_size=96,
    device="auto",
    model=ModelConfig(encoder="resnet10", stem="small_stride2", projector_hidden=64, projector_dim=32),
    views=ViewsConfig(preset="small"),
)


def gradient_report(config: Config, world: World) -> tuple[str, bool]:
    """Compare the trainer's gradient with one process's. Returns (table, whether it is exact).

    Model, global BatchNorm, micro-batches, loss and DDP are the trainer's. The reference is the plain definition on the
    whole batch, without any of them. The other rows are losses that peers use, to show what a wrong one looks like.
    """
    size, most = config.views.image_size or (32 if config.views.preset == "small" else 64), 96
    if config.model.encoder not in ENCODERS:  # it may take images of one size alone, and they may be large
        size, most = view_side(config.views.preset, config.views.image_size), 16
    # Two micro-batches prove as much as many; and one process has to hold the graph of the whole batch.
    config = dataclasses.replace(config, micro_batches=min(config.micro_batches, 2))
    pieces = config.micro_batches * world.size
    batch = pieces * max(2, min(config.global_batch_size, most) // pieces)
    config = dataclasses.replace(config, precision="fp64", compile=False, global_batch_size=batch, steps=1, epochs=None)
    config = dataclasses.replace(config, exact_piece=math.gcd(config.exact_piece, batch // pieces))
    generator = torch.Generator().manual_seed(config.seed)
    shape = batch, config.data.channels, size, size
    view_a, view_b = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    learner = build_learner(config, world)
    with torch.no_grad():  # a zero-initialised BatchNorm weight would hide half of the encoder from the comparison
        for p in learner.model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device))
    mine = torch.arange(batch).view(config.micro_batches, world.size, -1)[:, world.rank].flatten()
    local_a, local_b = view_a[mine].to(world.device), view_b[mine].to(world.device)

    share = learner.loss.factor / world.size  # nothing averages the pieces of `deterministic: exact` over the ranks
    losses: dict[str, LossFunction] = {
        "this trainer": learner.loss,
        "wrong: without the factor world_size": lambda a, b: learner.loss(a, b) / world.size,
        "wrong: gathered embeddings without gradient": lambda a, b: share * _detached(a, b, config.loss),
        "wrong: negatives of the own rank only": lambda a, b: share * _definition(a, b, config.loss),
    }
    gradients = {}
    for name, loss in losses.items():
        learner.optimizer.zero_grad()
        backward(learner, cut(local_a, local_b, config.micro_batches), loss, rows=mine.chunk(config.micro_batches))
        gradients[name] = torch.cat([p.grad.flatten() for p in learner.model.parameters() if p.grad is not None])
    truth = _one_process(learner.model, view_a.to(world.device), view_b.to(world.device), config)
    rows = [
        f"gradient of {config.model.encoder}, {batch} images, {world.size} processes, {config.micro_batches} pieces, float64",
        f"{'':46s}{'scale':>10s}{'cosine':>12s}{'relative error':>16s}",
        *(f"{name:46s}{compared(gradient, truth)}" for name, gradient in gradients.items()),
    ]
    worst = all_sum(((gradients["this trainer"] - truth).norm() / truth.norm()).detach())
    return "\n".join(rows), bool(worst < TOLERANCE)


def _one_process(model: nn.Module, view_a: Tensor, view_b: Tensor, config: Config) -> Tensor:
    """Compute the gradient by definition. The whole batch on this rank, no gradient cache."""
    # With torch's BatchNorm, which sees one process; a block that is computed again has its keys no more.
    plain = build_model(dataclasses.replace(config, activation_checkpointing=False)).double()
    plain.load_state_dict(model.state_dict())
    plain.to(view_a.device)
    halves = []
    for rows in torch.arange(len(view_a)).chunk(config.micro_batches):
        with keyed(plain, config.seed, 0, rows):
            halves.append(plain(torch.cat([view_a[rows], view_b[rows]])).chunk(2))
    z_a, z_b = (torch.cat(view) for view in zip(*halves, strict=True))
    loss = _definition(z_a, z_b, config.loss)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(plain.parameters()))])


def _definition(z_a: Tensor, z_b: Tensor, loss: LossConfig) -> Tensor:
    return nt_xent_reference(z_a, z_b, loss.temperature, decoupled=loss.decoupled, scale=loss.scale)


def _detached(z_a: Tensor, z_b: Tensor, loss: LossConfig) -> Tensor:
    """Compute the loss with a plain all_gather. Its columns carry no gradient."""
    z, images = F.normalize(torch.stack([z_a, z_b]), dim=2), torch.arange(len(z_a), device=z_a.device)
    columns, left_out = all_gather(z.detach()).transpose(0, 1).flatten(1, 2), "both" if loss.decoupled else "itself"
    return loss.scale * contrast(z, columns, images + rank() * len(images), loss.temperature, left_out)


def contrast(rows: Tensor, columns: Tensor, images: Tensor, temperature: float, left_out: str) -> Tensor:
    """Compute a contrastive loss by definition, as the mean over some rows.

    Shapes: rows [2, n, d], columns [2, N, d], images [n], which says where the rows stand among the columns. `left_out` of each
    anchor's denominator: 'itself', 'both' (itself and its positive), 'view' (all of its own view), or ''.
    """
    logits, n, most = rows.flatten(0, 1) @ columns.flatten(0, 1).T / temperature, len(images), columns.shape[1]
    same_image = (images[:, None] == torch.arange(most, device=rows.device)).repeat(2, 2)
    same_view = torch.eye(2, dtype=torch.bool, device=rows.device).repeat_interleave(n, 0).repeat_interleave(most, 1)
    mask = {"itself": same_view & same_image, "both": same_image, "view": same_view, "": same_view & ~same_view}[left_out]
    return (logits.masked_fill(mask, -torch.inf).logsumexp(1) - logits[same_image & ~same_view]).mean()


def compared(gradient: Tensor, truth: Tensor) -> str:
    """Format scale, cosine and relative error of a gradient."""
    scale, cosine = gradient.norm() / truth.norm(), F.cosine_similarity(gradient, truth, dim=0)
    return f"{scale:10.6f}{cosine:12.8f}{(gradient - truth).norm() / truth.norm():16.2e}"


def check_loss(config: Config, world: World) -> Finding:
    """Compare the loss that trains with its definition. It has the run's settings, device, width and number type."""
    n, loss = max(2, min(config.global_batch_size, 512) // world.size), config.loss
    dtype = torch.float64 if config.precision == "fp64" else torch.float32
    dim, generator = embedding_size(config, build_shapes(config)), torch.Generator().manual_seed(config.seed)
    z = torch.randn(2, n * world.size, dim, generator=generator).to(world.device, torch.float64).requires_grad_()
    expected = _definition(z[0], z[1], loss)
    mine = slice(world.rank * n, (world.rank + 1) * n)
    truth = torch.autograd.grad(expected, z)[0][:, mine]
    local = z[:, mine].detach().to(dtype).requires_grad_()
    trained = build_loss(dataclasses.replace(config, micro_batches=1, exact_piece=math.gcd(config.exact_piece, n)))
    value = trained(local[0], local[1])
    gradient = torch.autograd.grad(value, local)[0].double() / trained.factor
    errors = float((value - expected).detach().abs() / loss.scale), float((gradient - truth).norm() / truth.norm())
    # Similarities go to 1 / temperature, and are rounded there. TF32's products are a hundred times as far off.
    most = (1e-12 if dtype == torch.float64 else 4e-6) * (3 + 1 / loss.temperature)
    problem = kernel_problem(dataclasses.replace(config, compile=False), dim, world)  # which `versions` looks at
    seen = all_gather_objects((place_of(world.rank), all(error < most for error in errors), problem))
    where = f"{str(dtype).removeprefix('torch.')} on {world.device.type}, {2 * n * world.size} embeddings of {dim}"
    if wrong := [place for place, right, _ in seen if not right]:
        cure = "a driver or a library computes wrongly there; compare the versions above with a machine where it is right"
        return Finding("gradient", "failure", f"the loss ({where}) is not what its definition says on {wrong[0]}", cure)
    if slow := [f"{place}: {problem}" for place, _, problem in seen if problem]:
        return Finding("gradient", "warning", slow[0], "install what is missing; without it the loss is right, and slower")
    return Finding("gradient", "ok", f"the loss ({where}) is what its definition says, to {max(errors):.0e}")
