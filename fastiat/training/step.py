"""One update in fixed buffers, which can be captured as CUDA graphs; the eager form is `algorithm1`
in `fastiat.train`.
"""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from fastiat.attack import PGDLoop
from fastiat.engine import graphs
from fastiat.engine.modes import attack_mode
from fastiat.mix import Mix
from fastiat.models import normalisation_layers
from fastiat.training.update import Update, mixed_pass


def running_statistics(model: nn.Module) -> list[Tensor]:
    """Return the floating-point buffers that a training pass changes: those of BatchNorm."""
    return [
        buffer
        for layer in normalisation_layers(model)
        for buffer in layer.buffers(recurse=False)
        if buffer.is_floating_point()
    ]


class Step:
    """Algorithm 1 and the optimizer's step in fixed buffers, compiled and captured piece by piece.

    The pieces are, in the order they run: the clean pass, the attack, the adversarial pass, the
    optimizer's step. Each pass is compiled, and captured, once for every mix layer that comes.

    Why pieces: manifold mixup draws a layer for each of the two passes, so with three layers whole
    updates would need nine graphs, and passes need six. Replayed in turn, the pieces keep the
    device as busy as one graph of everything.

    optimizer: holds a state for every parameter already, and takes its learning rate from a tensor.
    batch: (B, C, H, W) of the batches to come.
    attack: the keyword arguments of `pgd`, all of them, or None for no adversarial batch.
    dtype: type that the network computes in by autocast, or None.
    per_sample: whether lambda comes as (B,).
    compiled, captured: whether passes are compiled, and pieces captured as CUDA graphs.
    all_reduce_mean_: replaces tensors by their means over the `ranks` of a training.
    accept: whether the gradients of an update may be used; asked before the optimizer's step.

    The other arguments are those of `fastiat.train.algorithm1`, and so are the results:
    un-compiled, bit for bit.
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
        all_reduce_mean_: Callable[[list[Tensor]], None] = lambda tensors: None,
        ranks: int = 1,
        accept: Callable[[Update], bool] = lambda update: True,
    ) -> None:
        self.model, self.optimizer, self.dtype, self.accept = model, optimizer, dtype, accept
        self.compiled, self.loss, self.mix_pixels = compiled, loss, mix_pixels
        self.loss_weights = (clean_weight, 1 - clean_weight) if attack else (1.0, 0.0)
        parameters = list(model.parameters())
        device = parameters[0].device
        # A graph reads and writes the addresses that it was captured with. So the inputs of an
        # update, and all that one piece leaves for another, are tensors made once, here.
        self.grads = [torch.zeros_like(parameter) for parameter in parameters]
        for parameter, grad in zip(parameters, self.grads, strict=True):
            parameter.grad = grad
        # The adversarial pass writes its gradients to a list of their own and adds that to
        # `grads`: a bf16 gradient becomes fp32 by the copy, so that the sum is rounded once, in
        # fp32. The clean pass overwrites `grads`, so nothing has to set them to zero.
        self.adv_grads = [torch.zeros_like(grad) for grad in self.grads] if attack else []
        self.x = torch.zeros(batch, device=device).contiguous(memory_format=torch.channels_last)
        self.y = torch.zeros(batch[0], dtype=torch.int64, device=device)
        self.perm = [torch.zeros_like(self.y) for _ in range(2)]
        lam = torch.zeros(batch[0] if per_sample else (), device=device)
        self.lam = [lam, lam.clone()]
        # Those of `Update`, in its order. They stay on the device until a row of metrics is due.
        self.figures = torch.zeros(4, device=device)
        self.all_reduce_mean_, self.ranks = all_reduce_mean_, ranks
        self.reduced = [*self.grads, *running_statistics(model), self.figures]
        self.weights = graphs.Weights(model, dtype, self._cast(attack))
        # All graphs take their intermediate results from one pool of memory, as only one runs at a
        # time; with a pool each, they would need the memory of an update once per mix layer.
        self.pool = torch.cuda.graph_pool_handle() if captured else None
        self.attack: PGDLoop | None = None
        if attack is not None:
            self.attack = PGDLoop(
                model,
                self.x,
                self.y,
                dtype,
                attack,
                # The copies of the weights that the clean pass has made serve the attack as well.
                weights=lambda: self.weights.detached,
                compiled=compiled,
                captured=captured,
                pool=self.pool,
            )
        self._passes: dict[int | None, Callable[..., tuple[Tensor, Tensor]]] = {}
        self._captured: dict[Hashable, graphs.Captured] | None = {} if captured else None

    def _cast(self, attack: dict[str, Any] | None) -> set[str]:
        """Return the names of the weights that the passes take bf16 copies of."""
        if self.dtype is None:
            return set()
        castable = graphs.CastableWeights(self.model, self.dtype)
        castable.observe(self.x, None)
        if attack is not None:
            with attack_mode(self.model, attack["bn"]):
                castable.observe(self.x)
        return castable.names

    def __call__(self, images: Tensor, y: Tensor, mixes: tuple[Mix | None, Mix | None]) -> Update:
        """Make one update on a uint8 batch (B, C, H, W) with labels (B,).

        `mixes` are the draws for the clean and the adversarial pass.
        """
        self.x.copy_(images).div_(255)
        self.y.copy_(y)
        for which, mix in enumerate(mixes):
            if mix is not None:
                self.perm[which].copy_(mix.perm, non_blocking=True)
                self.lam[which].copy_(mix.lam, non_blocking=True)
        clean_layer, adv_layer = (None if mix is None else mix.layer for mix in mixes)
        # The order is that of `algorithm1`: with bn="update" each of the three changes the running
        # statistics, and the attack needs the copies of the weights that the clean pass makes.
        self._run(("clean", clean_layer), lambda: self._half(0, clean_layer))
        if self.attack is not None:
            self.attack()
            self._run(("adversarial", adv_layer), lambda: self._half(1, adv_layer))
        # Collectives stay outside the graphs: each rank draws its own mix layers, so that the ranks
        # may replay different graphs.
        self.all_reduce_mean_(self.reduced)
        # A copy, as the next update overwrites the figures.
        update = Update.of_means(self.figures.clone(), self.ranks)
        if self.accept(update):
            self._run("optimizer", self.optimizer.step)
        return update

    def _run(self, name: Hashable, piece: Callable[[], object]) -> None:
        """Run a piece, or replay its graph, which is captured when its name first comes."""
        if self._captured is None:
            piece()
            return
        if name not in self._captured:
            self._captured[name] = graphs.Captured(piece, self._changed, self.x.device, self.pool)
        self._captured[name]()

    def _half(self, which: int, layer: int | None) -> None:
        """Add the gradient of the clean (0) or the adversarial (1) half of the loss."""
        x, into = self.x, self.grads
        if which == 0:
            self.weights.refresh()  # the optimizer has changed the parameters
        else:
            assert self.attack is not None
            x, into = self.attack.x_adv, self.adv_grads
        run = self._pass(layer)
        value, correct = run(self.weights.copies, x, self.y, self.perm[which], self.lam[which])
        # `backward` would make new `.grad` tensors at new addresses, those of bf16 copies in bf16.
        grads = torch.autograd.grad(self.loss_weights[which] * value, self.weights.leaves)
        with torch.no_grad():
            # By type, as one kernel copies many tensors only where all have the same.
            for dtype in {grad.dtype for grad in grads}:
                same = [pair for pair in zip(into, grads, strict=True) if pair[1].dtype == dtype]
                torch._foreach_copy_([wide for wide, _ in same], [grad for _, grad in same])
            if which:
                torch._foreach_add_(self.grads, self.adv_grads)
            self.figures[which].copy_(value)
            self.figures[2 + which].copy_(correct)

    def _pass(self, layer: int | None) -> Callable[..., tuple[Tensor, Tensor]]:
        """Return the pass that mixes at `layer`, compiled if it is to be.

        A compiled program takes only tensors as inputs: the layer is a constant in it.
        """
        if layer in self._passes:
            return self._passes[layer]
        model, dtype, loss, mix_pixels = self.model, self.dtype, self.loss, self.mix_pixels

        def run(
            weights: dict[str, Tensor], x: Tensor, y: Tensor, perm: Tensor, lam: Tensor
        ) -> tuple[Tensor, Tensor]:
            def forward(x: Tensor, mix: Mix | None) -> Tensor:
                return graphs.forward(model, weights, dtype, x, mix)

            mix = None if layer is None else Mix(layer, perm, lam)
            return mixed_pass(forward, x, y, mix, loss, mix_pixels)

        self._passes[layer] = graphs.compile_once(run) if self.compiled else run
        return self._passes[layer]

    def _changed(self) -> list[Tensor]:
        """Return all that a piece changes and that outlives it; a capture restores these after its
        warm-up runs.
        """
        momentum = [t for state in self.optimizer.state.values() for t in state.values()]
        grads = [*self.grads, *self.adv_grads, *self.weights.made]
        return [*self.model.state_dict().values(), *momentum, *grads, self.figures]
