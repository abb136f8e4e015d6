"""Adversarial weight perturbation (AWP): the gradient is taken at weights that raise the loss."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastiat.engine.graphs import restored


@torch.no_grad()
def ascend_(weights: Sequence[Tensor], grads: Sequence[Tensor], gamma: float) -> None:
    """Move weights along their gradients, in place, by `gamma` times their own norm.

        w <- w + gamma ||w|| g / ||g||

    This is the ascent step of Wu et al. 2020, eq. 8 to 10, for the weights of every layer. Biases
    and the parameters of BatchNorm, which have one dimension, stay, as in the published code.
    """
    pairs = [(w, g.to(w.dtype)) for w, g in zip(weights, grads, strict=True) if w.dim() > 1]
    kept, along = [w for w, _ in pairs], [g for _, g in pairs]
    # 1e-20, also from the published code, leaves a layer without gradient where it is.
    lengths = [
        gamma * own / (ascent + 1e-20)
        for own, ascent in zip(torch._foreach_norm(kept), torch._foreach_norm(along), strict=True)
    ]
    torch._foreach_add_(kept, torch._foreach_mul(along, lengths))


@dataclass(frozen=True)
class WeightPerturbation:
    """AWP for an update in eager PyTorch."""

    gamma: float
    """Length of the ascent step, relative to the norm of a layer's weights."""
    all_reduce_mean_: Callable[[list[Tensor]], None] = lambda tensors: None
    """Replaces gradients in place by their means over the ranks, so that all perturb alike."""

    @contextmanager
    def applied(self, model: nn.Module, loss: Callable[[], Tensor]) -> Iterator[None]:
        """Perturb the weights of `model` in this context by one ascent step of `loss()`.

        `loss` runs the passes of a batch. Its changes of buffers, such as running statistics, are
        undone. The weights are restored at the end, and no parameter gets a gradient.
        """
        parameters = [p for p in model.parameters() if p.requires_grad]
        with restored(model.buffers()):
            found = torch.autograd.grad(loss(), parameters, allow_unused=True)
        weights = [p for p, g in zip(parameters, found, strict=True) if g is not None]
        grads = [g for g in found if g is not None]
        self.all_reduce_mean_(grads)
        with restored(weights):
            ascend_(weights, grads, self.gamma)
            # Autocast keeps its copies of the weights until its outermost context ends.
            torch.clear_autocast_cache()
            yield
        torch.clear_autocast_cache()
