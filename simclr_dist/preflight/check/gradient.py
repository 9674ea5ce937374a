"""Prove that the distributed gradient equals the gradient of one process."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr_dist.config.settings import Config, ModelConfig, ViewsConfig
from simclr_dist.method.distributed import World, all_gather, all_sum, rank
from simclr_dist.method.loss import NTXentLoss, nt_xent_reference
from simclr_dist.method.microbatch import LossFunction
from simclr_dist.method.model import build_simclr
from simclr_dist.train.learner import backward, build_learner, cut

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
    size = config.views.image_size or (32 if config.views.preset == "small" else 64)
    # Two micro-batches prove as much as many; and one process has to hold the graph of the whole batch.
    config = dataclasses.replace(config, micro_batches=min(config.micro_batches, 2))
    pieces = config.micro_batches * world.size
    batch = pieces * max(2, min(config.global_batch_size, 96) // pieces)
    config = dataclasses.replace(config, precision="fp64", compile=False, global_batch_size=batch, steps=1, epochs=None)
    generator = torch.Generator().manual_seed(config.seed)
    view_a, view_b = (torch.randn(batch, 3, size, size, generator=generator, dtype=torch.float64) for _ in range(2))
    learner = build_learner(config, world)
    with torch.no_grad():  # a zero-initialised BatchNorm weight would hide half of the encoder from the comparison
        for p in learner.model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device))
    temperature = config.loss.temperature
    mine = torch.arange(batch).view(config.micro_batches, world.size, -1)[:, world.rank].flatten()
    local_a, local_b = view_a[mine].to(world.device), view_b[mine].to(world.device)

    losses: dict[str, LossFunction] = {
        "this trainer": NTXentLoss(temperature),
        "wrong: without the factor world_size": lambda a, b: NTXentLoss(temperature)(a, b) / world.size,
        "wrong: gathered embeddings without gradient": lambda a, b: _detached(a, b, temperature),
        "wrong: negatives of the own rank only": lambda a, b: nt_xent_reference(a, b, temperature),
    }
    gradients = {}
    for name, loss in losses.items():
        learner.optimizer.zero_grad()
        backward(learner, cut(local_a, local_b, config.micro_batches), loss)
        gradients[name] = torch.cat([p.grad.flatten() for p in learner.model.parameters() if p.grad is not None])
    truth = _one_process(learner.model, view_a.to(world.device), view_b.to(world.device), config)
    rows = [
        f"gradient of {config.model.encoder}, {batch} images, {world.size} processes, {config.micro_batches} pieces, float64",
        f"{'':46s}{'scale':>10s}{'cosine':>12s}{'relative error':>16s}",
    ]
    for name, gradient in gradients.items():
        scale, cosine = gradient.norm() / truth.norm(), F.cosine_similarity(gradient, truth, dim=0)
        rows.append(f"{name:46s}{scale:10.6f}{cosine:12.8f}{(gradient - truth).norm() / truth.norm():16.2e}")
    worst = all_sum(((gradients["this trainer"] - truth).norm() / truth.norm()).detach())
    return "\n".join(rows), bool(worst < TOLERANCE)


def _one_process(model: nn.Module, view_a: Tensor, view_b: Tensor, config: Config) -> Tensor:
    """Compute the gradient by definition. The whole batch on this rank, no gradient cache."""
    plain = build_simclr(**config.model.shape).double()  # with torch's BatchNorm, which sees one process
    plain.load_state_dict(model.state_dict())
    plain.to(view_a.device)
    halves = [
        plain(torch.cat(micro_batch)).chunk(2)
        for micro_batch in zip(view_a.chunk(config.micro_batches), view_b.chunk(config.micro_batches), strict=True)
    ]
    z_a, z_b = (torch.cat(view) for view in zip(*halves, strict=True))
    loss = nt_xent_reference(z_a, z_b, config.loss.temperature)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(plain.parameters()))])


def _detached(z_a: Tensor, z_b: Tensor, temperature: float) -> Tensor:
    """Compute the loss with a plain all_gather. Its columns carry no gradient."""
    z = F.normalize(torch.cat([z_a, z_b]), dim=1)
    n, columns = len(z_a), all_gather(z.detach()).flatten(0, 1)
    itself = torch.arange(2 * n, device=z.device) + rank() * 2 * n
    logits = (z @ columns.T / temperature).scatter(1, itself[:, None], -torch.inf)
    return F.cross_entropy(logits, itself.roll(n))
