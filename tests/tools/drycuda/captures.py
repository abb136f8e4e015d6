"""Captures updates of trainings on the dry CUDA, and prints what the graphs hold.

    python -m drycuda.captures < cases.json

Each case is an object: "settings" of `TrainConfig`, and "compiled" (default false). Without it the
network is captured as it runs in eager mode, which takes seconds instead of a minute. The result
is one line of JSON with an object for each case: "graphs" has the nodes of each piece of the
update by name, "faults" what must not be in a capture, "replays" how often a graph ran, "pool" and
"kept" the bytes of the graphs' memory pool before and after the training is deleted.
"""

import contextlib
import gc
import json
import sys
from itertools import islice
from typing import Any

import pytest
import torch

from drycuda import inside
from fastiat import data
from fastiat.config import TrainConfig
from fastiat.engine import graphs
from fastiat.train import Trainer
from fastiat.training.step import Step

BATCH = 8
UPDATES = 2
DEFAULTS: dict[str, Any] = dict(width=4, batch_size=BATCH, steps=2, mix="none", lr=1e-3)


def run(settings: dict[str, Any], compiled: bool = False) -> dict[str, Any]:
    """Make two updates of a training; return what was captured."""
    config = TrainConfig(device="cuda", engine="graph", **DEFAULTS | settings)
    size = config.image_size or 32
    # More than the updates need, as N-FGSM holds images out.
    images = torch.zeros(2 * UPDATES * BATCH, size, size, 3, dtype=torch.uint8)
    split = data.Split(images, torch.arange(len(images)) % 10)
    dataset = data.Dataset("zeros", tuple("0123456789"), split, split, True)
    with pytest.MonkeyPatch.context() as patch:
        if not compiled:
            patch.setattr(graphs, "compile_once", lambda function: function)
        trainer = Trainer(config, dataset)
        step = trainer.fast_step
        _name_pieces(step)
        inside.clear()
        for _ in islice(trainer.epoch_updates(), UPDATES):
            pass
    entries, pool = inside.log(), step.pool
    captured = inside.graphs(entries)
    before = _bytes_of(pool)
    del trainer, step
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()
    return {
        "graphs": {graph.name: inside.count(graph.nodes) for graph in captured},
        "faults": [f"{graph.name}: {fault}" for graph in captured for fault in graph.faults],
        "replays": sum(entry.kind == "replay" for entry in entries),
        "pool": before,
        "kept": _bytes_of(pool),
    }


def _name_pieces(step: Step) -> None:
    """Note the name of each piece before it runs, so that its graph gets the name."""
    run, attack = step._run, step.attack

    def run_named(name: Any, piece: Any) -> None:
        # ("clean", 1, False): the mix layer does not matter here.
        inside.note("piece", name if isinstance(name, str) else name[0])
        run(name, piece)

    step._run = run_named  # type: ignore[method-assign]
    if attack is not None:
        run_attack = attack._run

        def attack_named() -> None:
            inside.note("piece", "attack")
            run_attack()

        attack._run = attack_named


def _bytes_of(pool: Any) -> int:
    """Return how many bytes of device memory the allocator holds for a memory pool of graphs."""
    segments = torch.cuda.memory_snapshot()
    return sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) == tuple(pool))


def main() -> None:
    """Run the cases of the standard input."""
    cases = json.load(sys.stdin)
    # What torch prints goes to stderr, so that stdout has one line.
    with contextlib.redirect_stdout(sys.stderr):
        results = [run(**case) for case in cases]
    print(json.dumps(results))


if __name__ == "__main__":
    main()
