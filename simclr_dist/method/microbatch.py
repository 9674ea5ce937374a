"""Compute a global batch's gradient from micro-batches (GradCache; Gao et al. 2021)."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.profiler import record_function

LossFunction = Callable[[Tensor, Tensor], Tensor]


def contrastive_backward(
    model: nn.Module,
    micro_batches: Sequence[tuple[Tensor, Tensor]],
    loss_function: LossFunction,
    *,
    no_sync: Callable[[], AbstractContextManager[None]] = nullcontext,
    first_pass: Callable[[], AbstractContextManager[None]] = nullcontext,
    each: Callable[[int], AbstractContextManager[None]] = lambda _: nullcontext(),
) -> tuple[Tensor, Tensor, Tensor]:
    """Add the gradient of `loss_function(z_a, z_b)` over all micro-batches to the parameters.

    `micro_batches` are this rank's (view_a, view_b), float [n, c, s, s] each. Each pass takes one at a time, so they may be
    made when they are taken. Both views go through the model in ONE forward, so that BatchNorm's statistics are over both.
    One micro-batch is a plain forward and backward. With more, a first pass computes z without a graph, and the loss gives
    dL/dz. A second pass, with a graph, carries it into the parameters. So the activations of one micro-batch are alive at a
    time, and the loss still sees every embedding. Both passes of a micro-batch draw the same random numbers (dropout).

    `no_sync` holds DDP's gradient exchange back for all micro-batches but the last. `first_pass` surrounds the pass without
    a graph (there BatchNorm must not move its running statistics twice). `each` surrounds all work on micro-batch i.
    Returns (loss, z_a, z_b), detached; z is [n of all micro-batches, d].
    """
    if len(micro_batches) == 1:
        with each(0):
            return _in_one(model, torch.cat(micro_batches[0]), loss_function)

    # The bare module: DDP's forward would arm its gradient exchange.
    bare = getattr(model, "module", model)
    z, random_states, sizes = [], [], []
    with torch.no_grad(), first_pass():
        for i, micro_batch in enumerate(micro_batches):
            device = micro_batch[0].device
            # Both generators' states lie on the host, so nothing waits.
            random_states.append((torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None))
            sizes.append(len(micro_batch[0]))
            with each(i), record_function("forward"):
                z.append(bare(torch.cat(micro_batch)))
            del micro_batch  # before the next one is made
    z_a, z_b = (torch.cat(view).requires_grad_() for view in zip(*(part.chunk(2) for part in z), strict=True))
    with record_function("loss"):
        loss = loss_function(z_a, z_b)
        gradients = torch.autograd.grad(loss, (z_a, z_b))
    parts = list(zip(*(gradient.split(sizes) for gradient in gradients), strict=True))
    for i, part in enumerate(parts):
        micro_batch = micro_batches[i]
        state, state_of_gpu = random_states[i]
        torch.set_rng_state(state)
        if state_of_gpu is not None:
            torch.cuda.set_rng_state(state_of_gpu, micro_batch[0].device)
        with each(i), no_sync() if i < len(parts) - 1 else nullcontext():
            with record_function("forward"):
                z_again = model(torch.cat(micro_batch))
            with record_function("backward"):
                z_again.backward(torch.cat(part))
        del micro_batch
    return loss.detach(), z_a.detach(), z_b.detach()


def _in_one(model: nn.Module, views: Tensor, loss_function: LossFunction) -> tuple[Tensor, Tensor, Tensor]:
    with record_function("forward"):
        z_a, z_b = model(views).chunk(2)
    with record_function("loss"):
        loss = loss_function(z_a, z_b)
    with record_function("backward"):
        loss.backward()
    return loss.detach(), z_a.detach(), z_b.detach()
