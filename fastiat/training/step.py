"""One update: Algorithm 1 of the paper, written plainly, and in buffers that can be captured."""

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastiat import kernels
from fastiat.attack import PGDLoop
from fastiat.engine import graphs as engine
from fastiat.engine.modes import attack_mode
from fastiat.mix import Mix, mixed_correct, mixed_loss
from fastiat.models import normalisation_layers

Attack = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Update:
    """What one update saw, as tensors on the device, so that nobody waits for them."""

    clean_loss: Tensor
    adv_loss: Tensor
    """Zero where the update has no adversarial batch."""
    clean_correct: Tensor
    """How much of the clean batch was predicted right, in [0, B]; under mixing, by weight."""
    adv_correct: Tensor

    @property
    def figures(self) -> list[Tensor]:
        """All four, in order."""
        return [self.clean_loss, self.adv_loss, self.clean_correct, self.adv_correct]

    @classmethod
    def of(cls, means: Tensor, ranks: int) -> "Update":
        """Return the whole batch's update from the means, (4,), of its parts on `ranks` ranks."""
        clean_loss, adv_loss, clean_correct, adv_correct = means.unbind()
        return cls(clean_loss, adv_loss, ranks * clean_correct, ranks * adv_correct)


def algorithm1(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: Attack | None,
    draw: Callable[[], Mix | None],
    *,
    clean_weight: float = 0.5,
    loss: Any = "ce",
    shared_mix: bool = False,
    mix_pixels: bool = False,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Update:
    """Add the gradient of Algorithm 1's loss to the parameters of `model`.

        L = w Loss(f, Mix, x, y) + (1 - w) Loss(f, Mix, attack(x, y), y),  w = `clean_weight`

    The paper has w = 1/2. `x` is (B, C, H, W) pixels in [0, 1], `y` (B,) int64. `attack` attacks
    the un-mixed batch with its true labels; None leaves L = Loss(f, Mix, x, y). `draw` is called
    for each of the two losses, or once with `shared_mix`. `mix_pixels` moves mix point 0 before
    the standardisation. `precision` gives the context a forward pass runs in; losses are taken
    outside it. The attack and both losses see the same weights, so the halves are backpropagated
    as they come and only one half's activations are held at a time.
    """

    def forward(x: Tensor, mix: Mix | None) -> Tensor:
        with precision():
            return model(x, mix)

    def backward(x: Tensor, mix: Mix | None, weight: float) -> tuple[Tensor, Tensor]:
        value, correct = mixed_pass(forward, x, y, mix, loss, mix_pixels)
        (weight * value).backward()
        return value.detach(), correct

    # Autocast keeps its copies of the weights until the outermost context is left.
    with torch.autocast(x.device.type, torch.bfloat16, enabled=False):
        mix = draw()
        clean_loss, clean_correct = backward(x, mix, clean_weight if attack else 1.0)
        if attack is None:
            zero = torch.zeros_like(clean_loss)
            return Update(clean_loss, zero, clean_correct, zero)
        with precision():
            x_adv = attack(x, y)
        mix = mix if shared_mix else draw()
        adv_loss, adv_correct = backward(x_adv, mix, 1 - clean_weight)
        return Update(clean_loss, adv_loss, clean_correct, adv_correct)


def mixed_pass(
    forward: Callable[[Tensor, Mix | None], Tensor],
    x: Tensor,
    y: Tensor,
    mix: Mix | None,
    loss: Any,
    mix_pixels: bool,
) -> tuple[Tensor, Tensor]:
    """Return Loss(f, Mix, x, y) and how much was predicted right, both scalars."""
    inner = mix
    if mix is not None and mix.layer == 0 and mix_pixels:
        x, inner = kernels.mix(x, mix.perm, mix.lam), None
    logits = forward(x, inner)
    logits = logits.float() if logits.dtype == torch.bfloat16 else logits
    return mixed_loss(logits, y, mix, loss), mixed_correct(logits.detach(), y, mix)


def running_statistics(model: nn.Module) -> list[Tensor]:
    """Return the floating-point buffers that a training pass moves: those of BatchNorm."""
    return [
        buffer
        for layer in normalisation_layers(model)
        for buffer in layer.buffers(recurse=False)
        if buffer.is_floating_point()
    ]


class Step:
    """Algorithm 1 and the optimizer's step in fixed buffers, compiled and captured piece by piece.

    The pieces are the clean pass, the attack, the adversarial pass and the optimizer's step; each
    pass is compiled, and captured, once for every mix layer that comes. The captured graphs share
    one memory pool; replayed in turn they keep the device as busy as one graph of everything, with
    one graph for each layer of a pass instead of one for each pair of layers.

    optimizer: holds a state for every parameter already, and takes its learning rate from a tensor.
    batch: (B, C, H, W) of the batches to come.
    attack: the keyword arguments of `pgd`, all of them, or None for no adversarial batch.
    dtype: type that the network computes in by autocast, or None.
    per_sample: whether lambda comes as (B,).
    compiled, captured: whether passes are compiled, and pieces captured as CUDA graphs.
    average: replaces tensors by their means over the `ranks` of a training.
    accept: asked before the optimizer's step, which is left out where it says no.

    The rest is as for `algorithm1`, and so are the results: un-compiled, bit for bit.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batch: torch.Size,
        attack: dict[str, Any] | None,
        *,
        dtype: torch.dtype | None,
        compiled: bool,
        captured: bool,
        clean_weight: float = 0.5,
        loss: Any = "ce",
        mix_pixels: bool = False,
        per_sample: bool = False,
        average: Callable[[list[Tensor]], None] = lambda tensors: None,
        ranks: int = 1,
        accept: Callable[[Update], bool] | None = None,
    ) -> None:
        self.model, self.optimizer, self.dtype, self.accept = model, optimizer, dtype, accept
        self.compiled, self.loss, self.mix_pixels = compiled, loss, mix_pixels
        self.share = (clean_weight, 1 - clean_weight) if attack else (1.0, 0.0)
        parameters = list(model.parameters())
        device = parameters[0].device
        self.grads = [torch.zeros_like(parameter) for parameter in parameters]
        self.second = [torch.zeros_like(parameter) for parameter in parameters] if attack else []
        for parameter, grad in zip(parameters, self.grads, strict=True):
            parameter.grad = grad
        self.x = torch.zeros(batch, device=device).contiguous(memory_format=torch.channels_last)
        self.y = torch.zeros(batch[0], dtype=torch.int64, device=device)
        self.perm = [torch.zeros_like(self.y) for _ in range(2)]
        lam = torch.zeros(batch[0] if per_sample else (), device=device)
        self.lam = [lam, lam.clone()]
        self.figures = torch.zeros(4, device=device)
        self.average, self.ranks = average, ranks
        self.averaged = [*self.grads, *running_statistics(model), self.figures]
        self.weights = engine.Weights(model, dtype, self._cast(attack))
        self.pool = torch.cuda.graph_pool_handle() if captured else None
        self.climb: PGDLoop | None = None
        if attack is not None:
            self.climb = PGDLoop(
                model,
                self.x,
                self.y,
                dtype,
                attack,
                weights=lambda: self.weights.detached,
                compiled=compiled,
                captured=captured,
                pool=self.pool,
            )
        self._passes: dict[int | None, Callable[..., tuple[Tensor, Tensor]]] = {}
        self._captured: dict[Hashable, engine.Captured] | None = {} if captured else None

    def _cast(self, attack: dict[str, Any] | None) -> set[str]:
        """Return the names of the weights that the passes take bf16 copies of."""
        if self.dtype is None:
            return set()
        castable = engine.CastableWeights(self.model, self.dtype)
        castable.observe(self.x, None)
        if attack is not None:
            with attack_mode(self.model, attack["bn"]):
                castable.observe(self.x)
        return castable.names

    def __call__(self, images: Tensor, y: Tensor, mixes: tuple[Mix | None, Mix | None]) -> Update:
        """Make one update on a uint8 batch (B, C, H, W) with labels (B,), mixed as `mixes` say."""
        self.x.copy_(images).div_(255)
        self.y.copy_(y)
        for which, mix in enumerate(mixes):
            if mix is not None:
                self.perm[which].copy_(mix.perm, non_blocking=True)
                self.lam[which].copy_(mix.lam, non_blocking=True)
        layers = [None if mix is None else mix.layer for mix in mixes]
        self._run(("clean", layers[0]), lambda: self._half(0, layers[0]))
        if self.climb is not None:
            self.climb()
            self._run(("adversarial", layers[1]), lambda: self._half(1, layers[1]))
        # Between graphs, as collectives are kept out of them.
        self.average(self.averaged)
        update = Update.of(self.figures.clone(), self.ranks)
        if self.accept is None or self.accept(update):
            self._run("optimizer", self.optimizer.step)
        return update

    def _run(self, name: Hashable, piece: Callable[[], object]) -> None:
        if self._captured is None:
            piece()
            return
        if name not in self._captured:
            self._captured[name] = engine.Captured(piece, self._changed, self.x.device, self.pool)
        self._captured[name]()

    def _half(self, which: int, layer: int | None) -> None:
        """Add the gradient of the clean (0) or the adversarial (1) half of the loss."""
        x = self.x
        if which == 0:
            self.weights.refresh()
        else:
            assert self.climb is not None
            x = self.climb.x_adv
        run = self._pass(layer)
        value, correct = run(self.weights.copies, x, self.y, self.perm[which], self.lam[which])
        grads = torch.autograd.grad(self.share[which] * value, self.weights.leaves)
        with torch.no_grad():
            # Gradients of bf16 copies are summed in the parameters' fp32.
            into = self.second if which else self.grads
            for dtype in {grad.dtype for grad in grads}:
                # One kernel copies many tensors of one type.
                same = [pair for pair in zip(into, grads, strict=True) if pair[1].dtype == dtype]
                torch._foreach_copy_([wide for wide, _ in same], [grad for _, grad in same])
            if which:
                torch._foreach_add_(self.grads, self.second)
            self.figures[which].copy_(value)
            self.figures[2 + which].copy_(correct)

    def _pass(self, layer: int | None) -> Callable[..., tuple[Tensor, Tensor]]:
        """Return the pass that mixes at `layer`, compiled if it is to be."""
        if layer in self._passes:
            return self._passes[layer]
        model, dtype, loss, mix_pixels = self.model, self.dtype, self.loss, self.mix_pixels

        def run(
            weights: dict[str, Tensor], x: Tensor, y: Tensor, perm: Tensor, lam: Tensor
        ) -> tuple[Tensor, Tensor]:
            def forward(x: Tensor, mix: Mix | None) -> Tensor:
                return engine.forward(model, weights, dtype, x, mix)

            mix = None if layer is None else Mix(layer, perm, lam)
            return mixed_pass(forward, x, y, mix, loss, mix_pixels)

        self._passes[layer] = engine.compile_once(run) if self.compiled else run
        return self._passes[layer]

    def _changed(self) -> list[Tensor]:
        """Return all that a piece changes and that outlives it."""
        buffers = [t for s in self.optimizer.state.values() for t in s.values()]
        grads = [*self.grads, *self.second, *self.weights.made]
        return [*self.model.state_dict().values(), *buffers, *grads, self.figures]
