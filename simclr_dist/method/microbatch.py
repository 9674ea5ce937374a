"""A global batch through the encoder in pieces, with the gradient of the whole (GradCache; Gao et al. 2021)."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.profiler import record_function

LossFunction = Callable[[Tensor, Tensor], Tensor]


def contrastive_backward(
    model: nn.Module,
    pieces: Sequence[tuple[Tensor, Tensor]],
    loss_function: LossFunction,
    *,
    no_sync: Callable[[], AbstractContextManager[None]] = nullcontext,
    first_pass: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> tuple[Tensor, Tensor, Tensor]:
    """Add the gradient of loss_function(z_a, z_b) over all pieces to the parameters.

    `pieces` are this rank's (view_a, view_b), float [n, 3, s, s] each; each pass takes one out at a time,
    so they may be made when they are asked for. Both views of a piece go through the model in ONE
    forward, so BatchNorm's statistics are over both. With one piece this is plain forward and backward. With more, z is
    first computed without a graph, the loss gives dL/dz, and a second pass over the pieces, with a graph, carries it into
    the parameters: one piece of activations is alive at a time, and the loss still sees every embedding. Each piece draws the
    same random numbers (dropout) in both passes.

    `no_sync` holds DDP's gradient exchange back for all pieces but the last. `first_pass` surrounds the pass without a
    graph (there BatchNorm must not move its running statistics twice).
    Returns (loss, z_a, z_b), detached; z is [n of all pieces, d].
    """
    if len(pieces) == 1:
        with record_function("forward"):
            z_a, z_b = model(torch.cat(pieces[0])).chunk(2)
        with record_function("loss"):
            loss = loss_function(z_a, z_b)
        with record_function("backward"):
            loss.backward()
        return loss.detach(), z_a.detach(), z_b.detach()

    # The bare module: DDP's forward would arm its gradient exchange.
    bare = getattr(model, "module", model)
    z, states, sizes = [], [], []
    with torch.no_grad(), first_pass():
        for piece in pieces:
            states.append(_random_state(piece[0].device))
            sizes.append(len(piece[0]))
            with record_function("forward"):
                z.append(bare(torch.cat(piece)))
            del piece  # before the next one is made
    z_a, z_b = (torch.cat(view).requires_grad_() for view in zip(*(part.chunk(2) for part in z), strict=True))
    with record_function("loss"):
        loss = loss_function(z_a, z_b)
        gradients = torch.autograd.grad(loss, (z_a, z_b))
    parts = list(zip(*(gradient.split(sizes) for gradient in gradients), strict=True))
    for i, part in enumerate(parts):
        piece = pieces[i]
        _set_random_state(states[i], piece[0].device)
        with no_sync() if i < len(pieces) - 1 else nullcontext():
            with record_function("forward"):
                z_again = model(torch.cat(piece))
            with record_function("backward"):
                z_again.backward(torch.cat(part))
        del piece
    return loss.detach(), z_a.detach(), z_b.detach()


def _random_state(device: torch.device) -> list[Tensor]:
    """Of the CPU's generator, and of the device's if it is a GPU; both live on the host, so nothing waits."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_random_state(state: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)
