"""One update in fixed buffers, which can be captured as CUDA graphs.

`fastiat.training.eager.algorithm1` is the same update in eager PyTorch.
"""

from collections.abc import Callable, Hashable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastiat.attack import PGDLoop
from fastiat.engine import graphs
from fastiat.engine.modes import attack_mode
from fastiat.mix import Mix, MixPoints, soft_labels
from fastiat.models import running_statistics
from fastiat.training.awp import ascend_
from fastiat.training.update import Update, joint_pass, mixed_pass

Method = Literal["at", "trades", "mart", "mixed"]
"""The form of an update: Algorithm 1, TRADES, MART, or an attack on the mixed batch.

See `algorithm1`, `joint_update` and `mixed_attack_update` in `fastiat.train`.
"""
Pass = Literal["clean", "adversarial", "joint"]
"""A forward and backward pass: of the clean batch, of the adversarial batch, or of both."""


def trained_parameters(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return the parameters, by name, that get a gradient from the logits for pixels `x`.

    These are all but those that do not require a gradient and those that the pass does not use, to
    which eager PyTorch gives no gradient either. Buffers and random states are restored.
    """
    asked: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads: list[Tensor | None] = []

    def run() -> None:
        with torch.enable_grad():
            total = model(x).sum()
        grads[:] = torch.autograd.grad(total, list(asked.values()), allow_unused=True)

    devices = [x.device] if x.is_cuda else []
    with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
        graphs.with_state_restored(run, model.buffers(), 1)
    return {n: p for (n, p), grad in zip(asked.items(), grads, strict=True) if grad is not None}


class Step:
    """An update in fixed buffers, compiled and captured in pieces.

    The pieces of Algorithm 1 are, in this order: the clean pass, the attack, the adversarial pass,
    the optimizer's step. TRADES and MART have, in place of the passes, a refresh of the copies of
    the weights before the attack and one pass of both batches after it; an attack on the mixed
    batch has the mixing before the attack and no clean pass. With AWP, a piece that computes the
    ascent gradient comes before the pass of the adversarial batch. The passes are compiled, and
    captured, once for each mix layer that is drawn.

    Reason for the pieces: manifold mixup draws a layer for each of the two passes. With three
    layers, graphs of whole updates would be nine; graphs of passes are six. Replayed in turn, the
    pieces keep the device as busy as one graph of a whole update.

    optimizer: has a state for every parameter already, and takes its learning rate from a tensor.
    batch: shape (B, C, H, W) of every batch.
    attack: all keyword arguments of `pgd`, or None for no adversarial batch.
    points: the mix points of `model`.
    dtype: type that the network computes in under autocast, or None for no autocast.
    method, beta: the form of the update, and the weight of the divergence of TRADES and MART.
    gamma: length of AWP's step, see `fastiat.training.awp.ascend_`.
    classes: number of classes, K.
    boxes: whether a draw of Mix has a box.
    per_sample: whether lambda has shape (B,) instead of (), and boxes (B, 4) instead of (4,).
    compiled, captured: whether passes are compiled, and pieces captured as CUDA graphs.
    all_reduce_mean_: replaces tensors in place by their means over the `ranks` of a training.
    accept: returns whether the gradients of an update may be used; called before the optimizer's
        step.

    The other arguments are those of `algorithm1`. Without `compiled`, the results equal those of
    the eager functions (`Method`) bit for bit.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batch: torch.Size,
        attack: dict[str, Any] | None,
        points: MixPoints,
        *,
        dtype: torch.dtype | None,
        compiled: bool,
        captured: bool,
        clean_weight: float = 0.5,
        loss: Any = "ce",
        smoothing: float = 0.0,
        method: Method = "at",
        beta: float = 6.0,
        gamma: float = 0.0,
        classes: int = 0,
        boxes: bool = False,
        per_sample: bool = False,
        all_reduce_mean_: Callable[[list[Tensor]], None] = lambda tensors: None,
        ranks: int = 1,
        accept: Callable[[Update], bool] = lambda update: True,
    ) -> None:
        self.model, self.optimizer, self.dtype, self.accept = model, optimizer, dtype, accept
        self.compiled, self.points = compiled, points
        self.loss, self.smoothing = loss, smoothing
        self.method, self.beta, self.gamma = method, beta, gamma
        weights = (clean_weight, 1 - clean_weight) if attack else (1.0, 0.0)
        self.loss_weights = weights if method == "at" else (1.0, 1.0)
        device = next(model.parameters()).device
        # A CUDA graph reads and writes the addresses that it was captured with. Therefore the
        # inputs of an update, and every tensor that one piece writes and another reads, are
        # allocated once, here, and only filled in place afterwards.
        self.x = torch.zeros(batch, device=device).contiguous(memory_format=torch.channels_last)
        self.y = torch.zeros(batch[0], dtype=torch.int64, device=device)
        trained = trained_parameters(model, self.x[:2])
        self.grads = [torch.zeros_like(parameter) for parameter in trained.values()]
        self.trained = list(trained.values())
        # The optimizer, and `accept`, read the gradients at `.grad`. The optimizer leaves a
        # parameter without gradient as it is.
        for parameter, grad in zip(self.trained, self.grads, strict=True):
            parameter.grad = grad
        # The adversarial pass writes its gradients to `adv_grads` and then adds these to `grads`.
        # The first copy turns a bf16 gradient into fp32, so that the sum is rounded once, in fp32.
        # The clean pass overwrites `grads`, so no `zero_grad` is needed. The ascent gradient of AWP
        # is in `adv_grads` too, until the pass has perturbed the weights with it.
        self.adv_grads = [torch.zeros_like(grad) for grad in self.grads] if attack else []
        # Two of each, for the clean and the adversarial pass, whose draws differ.
        self.perm = [torch.zeros_like(self.y) for _ in range(2)]
        lam = torch.zeros(batch[0] if per_sample else (), device=device)
        self.lam = [lam, lam.clone()]
        shape = (batch[0], 4) if per_sample else (4,)
        box = torch.zeros(shape, dtype=torch.int64, device=device)
        self.box = [box, box.clone()] if boxes else [None, None]
        # The fields of `Update`, in its order. They stay on the device until a row of metrics is
        # due, because reading them makes the CPU wait.
        self.figures = torch.zeros(4, device=device)
        self.all_reduce_mean_, self.ranks = all_reduce_mean_, ranks
        # Running statistics too: each rank's BatchNorm sees only this rank's part of the batch.
        self.reduced = [*self.grads, *running_statistics(model), self.figures]
        self.weights = graphs.Weights(model, dtype, self._cast(attack), trained)
        # All graphs allocate their intermediate results in one memory pool. That is safe because
        # only one graph runs at a time and no piece reads intermediate results of another. With one
        # pool per graph, the memory of an update would be needed once for each mix layer.
        self.pool = torch.cuda.graph_pool_handle() if captured else None
        self.attack: PGDLoop | None = None
        self.attacked, self.targets = self.x, self.y
        if method == "mixed":
            self.attacked = torch.zeros_like(self.x)
            self.targets = torch.zeros(batch[0], classes, device=device)
        if attack is not None:
            self.attack = PGDLoop(
                model,
                self.attacked,
                self.targets,
                dtype,
                attack,
                # The attack uses the copies of the weights that the clean pass has refreshed. They
                # are detached: the attack needs the gradient of the input only.
                weights=lambda: self.weights.detached,
                compiled=compiled,
                captured=captured,
                pool=self.pool,
            )
        self._passes: dict[Hashable, Callable[..., tuple[Tensor, tuple[Tensor, ...]]]] = {}
        self._captured: dict[Hashable, graphs.Captured] | None = {} if captured else None

    def _cast(self, attack: dict[str, Any] | None) -> set[str]:
        """Return the names of the weights that the passes read as copies in `dtype`."""
        if self.dtype is None:
            return set()
        # Observe the kinds of passes of an update: a weight is copied only if both allow it.
        castable = graphs.CastableWeights(self.model, self.dtype)
        castable.observe(self.x)
        if attack is not None:
            with attack_mode(self.model, attack["bn"]):
                castable.observe(self.x)
        return castable.names

    def __call__(
        self,
        images: Tensor,
        y: Tensor,
        mixes: tuple[Mix | None, Mix | None],
        perturbs: bool = False,
    ) -> Update:
        """Make one update on a batch (B, C, H, W) of uint8 pixels with labels (B,) int64.

        `mixes` are the draws for the clean and the adversarial pass; the other methods than
        Algorithm 1 use the first alone. `perturbs` is whether AWP perturbs the weights. Returns the
        figures of the whole batch, over all ranks.
        """
        # The arguments have new addresses in every update, so these copies are outside the graphs.
        self.x.copy_(images).div_(255)
        self.y.copy_(y)
        for which, mix in enumerate(mixes):
            if mix is not None:
                self.perm[which].copy_(mix.perm, non_blocking=True)
                self.lam[which].copy_(mix.lam, non_blocking=True)
                box = self.box[which]
                if box is not None and mix.box is not None:
                    box.copy_(mix.box, non_blocking=True)
        layers = [None if mix is None else mix.layer for mix in mixes]
        # The order is that of the eager functions. It matters for the running statistics, which the
        # attack changes as well with bn="update", and for the copies of the weights, which the
        # first piece refreshes and the others read.
        if self.method == "at":
            self._backward("clean", 0, layers[0])
        else:
            self._run("prepare", self._prepare)
        if self.attack is not None:
            self.attack()
            last: Pass = "adversarial" if self.method in ("at", "mixed") else "joint"
            which = 1 if self.method == "at" else 0
            layer = None if self.method == "mixed" else layers[which]
            self._backward(last, which, layer, perturbs)
        # The collective is outside the graphs: each rank draws its own mix layers, so the ranks may
        # replay, or capture, different graphs.
        self.all_reduce_mean_(self.reduced)
        # Return a copy, because the next update overwrites the figures.
        update = Update.of_means(self.figures.clone(), self.ranks)
        # The optimizer's step is a piece of its own, so that it can be skipped.
        if self.accept(update):
            self._run("optimizer", self.optimizer.step)
        return update

    def _run(self, name: Hashable, piece: Callable[[], object]) -> None:
        """Run a piece, or replay its graph, which is captured at the first call with `name`."""
        if self._captured is None:
            piece()
            return
        if name not in self._captured:
            self._captured[name] = graphs.Captured(piece, self._changed, self.x.device, self.pool)
        self._captured[name]()

    def _prepare(self) -> None:
        """Copy the weights, and mix the batch that is attacked, where no clean pass comes first."""
        self.weights.refresh()
        if self.method == "mixed":
            mix = self._mix(0, 0)
            assert mix is not None
            self.attacked.copy_(mix.blend(self.x))
            self.targets.copy_(soft_labels(self.y, mix, self.targets.shape[1]))

    def _mix(self, which: int, layer: int | None) -> Mix | None:
        """Return draw `which`, in its buffers, as a mixing at `layer` (None: no mixing)."""
        if layer is None:
            return None
        return Mix(layer, self.perm[which], self.lam[which], self.box[which])

    def _backward(self, kind: Pass, which: int, layer: int | None, perturbs: bool = False) -> None:
        """Compute a part of the loss, mixed at `layer` by draw `which`, and its gradient."""
        if perturbs:
            self._run(("ascent", layer), lambda: self._ascent(kind, which, layer))
            # All ranks perturb alike. The collective is outside the graphs, see `__call__`.
            self.all_reduce_mean_(self.adv_grads)
        self._run((kind, layer, perturbs), lambda: self._gradient(kind, which, layer, perturbs))

    def _ascent(self, kind: Pass, which: int, layer: int | None) -> None:
        """Write the ascent gradient of AWP to `adv_grads`, and restore the network's buffers."""
        with graphs.restored(self.model.buffers()):
            grads, _ = self._differentiate(kind, which, layer, 1.0)
        _copy(self.adv_grads, grads)

    def _gradient(self, kind: Pass, which: int, layer: int | None, perturbs: bool) -> None:
        """Write the gradient of a part of the loss to `grads`, and its figures to `figures`.

        The adversarial part of Algorithm 1 is added to the gradient of its clean part.
        """
        second = kind == "adversarial" and self.method == "at"
        if kind == "clean":
            # The optimizer changed the parameters after the last update. The refresh is inside the
            # captured piece, so that every replay repeats it.
            self.weights.refresh()
        with graphs.restored(self.trained if perturbs else ()):
            if perturbs:
                ascend_(self.trained, self.adv_grads, self.gamma)
                self.weights.refresh()
            grads, figures = self._differentiate(kind, which, layer, self.loss_weights[second])
        _copy(self.adv_grads if second else self.grads, grads)
        if second:
            torch._foreach_add_(self.grads, self.adv_grads)
        for place, figure in figures.items():
            self.figures[place].copy_(figure)

    def _differentiate(
        self, kind: Pass, which: int, layer: int | None, weight: float
    ) -> tuple[tuple[Tensor, ...], dict[int, Tensor]]:
        """Return the gradient of `weight` times a part of the loss, and figures by their place."""
        run, weights, mixes_network = self._pass(kind, layer), self.weights, self.method != "mixed"
        mix = self._mix(which, layer if mixes_network else 0)
        x_adv = self.x if self.attack is None else self.attack.x_adv
        x = x_adv if kind == "adversarial" else self.x
        also = (x_adv,) if kind == "joint" else ()
        with self.points.applied(mix if mixes_network else None):
            value, figures = run(weights.copies, x, self.y, mix, *also)
            # Not `backward`: it would accumulate into the `.grad` of the leaves, and those of the
            # bf16 copies would be new bf16 tensors at new addresses.
            grads = torch.autograd.grad(weight * value, weights.leaves)
        places = {"clean": (0, 2), "adversarial": (1, 3), "joint": (0, 1, 2, 3)}[kind]
        return grads, dict(zip(places, figures, strict=True))

    def _pass(
        self, kind: Pass, layer: int | None
    ) -> Callable[..., tuple[Tensor, tuple[Tensor, ...]]]:
        """Return the pass that mixes at `layer` (None: without mixing), compiled if `compiled`.

        The layer is a constant in the compiled program, and permutation and lambda are inputs, so
        that one program serves all draws of a layer, and both batches of Algorithm 1.
        """
        joint = kind == "joint"
        if (joint, layer) in self._passes:
            return self._passes[joint, layer]
        model, dtype, loss, smoothing = self.model, self.dtype, self.loss, self.smoothing
        method, beta = self.method, self.beta

        def run(
            weights: dict[str, Tensor],
            x: Tensor,
            y: Tensor,
            mix: Mix | None,
            x_adv: Tensor | None = None,
        ) -> tuple[Tensor, tuple[Tensor, ...]]:
            def forward(x: Tensor) -> Tensor:
                return graphs.forward(model, weights, dtype, x)

            if x_adv is not None:
                found = joint_pass(forward, x, x_adv, y, mix, method, beta, loss, smoothing)
                return found.loss, tuple(found.figures)
            value, correct = mixed_pass(forward, x, y, mix, loss, smoothing)
            return value, (value.detach(), correct)

        self._passes[joint, layer] = graphs.compile_once(run) if self.compiled else run
        return self._passes[joint, layer]

    def _changed(self) -> list[Tensor]:
        """Return the tensors that a piece changes and that are read after it.

        The warm-up runs before a capture change them too, so the capture restores them.
        """
        momentum = [t for state in self.optimizer.state.values() for t in state.values()]
        grads = [*self.grads, *self.adv_grads, *self.weights.made]
        return [*self.model.state_dict().values(), *momentum, *grads, self.figures]


@torch.no_grad()
def _copy(wide: list[Tensor], grads: tuple[Tensor, ...]) -> None:
    """Copy gradients to buffers, which may have another type."""
    # One call per type: `_foreach_copy_` uses one kernel only for tensors of equal type.
    for dtype in {grad.dtype for grad in grads}:
        same = [pair for pair in zip(wide, grads, strict=True) if pair[1].dtype == dtype]
        torch._foreach_copy_([into for into, _ in same], [grad for _, grad in same])
