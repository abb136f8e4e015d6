"""Training time on 1 to 1,024 GPUs, estimated by arithmetic: the tables of docs/scaling.md.

    python docs/scaling.py

Nothing here is measured on a GPU. Inputs: FLOP counts and parameters of the networks, the shares of
the peak that RECORDS.md predicts, and nominal bandwidths, all named below.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

PEAK = 790e12
"""FLOP/s of dense bf16 matrix products on one H200."""
MEMORY = 4.3e12
"""Bytes/s of its memory."""
NODE = 8
"""GPUs that NVLink connects; beyond, each has a 400 Gb/s InfiniBand port of its own."""
NVLINK, INFINIBAND = 0.8 * 450e9, 0.8 * 50e9
"""Bytes/s in one direction and GPU, at 80 % of the nominal rate."""
HOP, FAR_HOP = 2e-6, 6e-6
"""Seconds that a message takes at least within and between nodes."""
SOCKET = 50e-6
"""Seconds of one TCP exchange of the flags on which ranks agree."""
IMAGES, TEST = 50_000, 10_000
"""CIFAR-10."""
GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Network:
    """Sizes and FLOP of a training step of a network."""

    parameters: int
    statistics: int
    """Values of BatchNorm's running statistics."""
    input_gradient: float
    """GFLOP of a PGD step for an image."""
    full: float
    """GFLOP of a plain training step for an image."""
    share: tuple[float, float]
    """Predicted share of the peak at a batch of 64 and of 512 (RECORDS.md)."""

    @property
    def iat(self) -> float:
        """FLOP of an IAT update for an image: seven PGD steps and two training passes."""
        return 1e9 * (7 * self.input_gradient + 2 * self.full)

    @property
    def size(self) -> int:
        """Bytes that a step reduces: gradients, statistics and four figures in fp32."""
        return 4 * (self.parameters + self.statistics + 4)

    def compute(self, images: float) -> float:
        """Return the seconds of an update of so many images: a straight line through two points."""
        (at_64, at_512) = (
            n * self.iat / (PEAK * share) for n, share in zip((64, 512), self.share, strict=True)
        )
        slope = (at_512 - at_64) / (512 - 64)
        return at_64 + (images - 64) * slope


NETWORKS = {
    "preact18": Network(11_172_170, 7_808, 2.2217, 3.3290, (0.32, 0.46)),
    "wrn28_10": Network(36_479_194, 17_952, 20.973, 31.459, (0.52, 0.61)),
    # RECORDS.md predicts no shares for it: these are those of wrn28_10.
    "wrn34_10": Network(46_160_474, 22_432, 26.636, 39.953, (0.52, 0.61)),
}


def all_reduce(size: float, gpus: int) -> float:
    """Return the seconds of a sum over GPUs of `size` bytes: in the node, between nodes, and back.

    A ring moves 2 (n - 1) / n of the bytes in 2 (n - 1) hops. Between N nodes every GPU reduces an
    eighth, in a ring or, where that takes fewer hops, in a tree of depth log2 N.
    """
    near, nodes = min(gpus, NODE), math.ceil(gpus / NODE)
    seconds = 2 * (near - 1) / near * size / NVLINK + 2 * (near - 1) * HOP
    if nodes > 1:
        hops = min(2 * (nodes - 1), 2 * math.ceil(math.log2(nodes)) + 2)
        seconds += 2 * (nodes - 1) / nodes * size / near / INFINIBAND + hops * FAR_HOP
    return seconds


def step(network: Network, images: float, gpus: int) -> float:
    """Return the seconds of an update with so many images on each GPU.

    The reduction waits for the last gradient, and copies into the flat buffer and out of it read
    and write every byte. The flags go over TCP while the device works.
    """
    device = network.compute(images)
    if gpus == 1:
        return device
    device += all_reduce(network.size, gpus) + 4 * network.size / MEMORY
    return max(device, 2 * math.ceil(math.log2(gpus)) * SOCKET)


def strong(network: Network, batch: int) -> Iterator[tuple[int, float, float]]:
    """Yield GPUs, seconds of an epoch and efficiency, with one batch shared by all."""
    alone = step(network, batch, 1)
    for gpus in (gpus for gpus in GPUS if gpus <= batch):
        seconds = step(network, batch // gpus, gpus)
        yield gpus, IMAGES // batch * seconds, alone / (gpus * seconds)


def weak(network: Network, each: int) -> Iterator[tuple[int, float, float]]:
    """Yield GPUs, seconds of an epoch and efficiency, with a batch of `each` on every GPU.

    The epoch takes infinitely long where the batch is larger than the data set.
    """
    alone = step(network, each, 1)
    for gpus in GPUS:
        seconds, updates = step(network, each, gpus), IMAGES // (each * gpus)
        yield gpus, updates * seconds if updates else math.inf, alone / seconds


def evaluation(network: Network, steps: int, gpus: int, batch: int = 500) -> float:
    """Return the seconds of PGD on the test set: whole batches go to the GPUs in turn."""
    flop = batch * 1e9 * (network.input_gradient * steps + network.full / 3)
    return math.ceil(math.ceil(TEST / batch) / gpus) * flop / (PEAK * network.share[1])


def until(rows: Iterator[tuple[int, float, float]], least: float) -> int:
    """Return the most GPUs with at least this efficiency."""
    return max(gpus for gpus, _, efficiency in rows if efficiency >= least)


def table(columns: list[str], rows: list[list[str]]) -> str:
    """Write a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def tables() -> str:
    """Return all tables as docs/scaling.md has them."""
    parts = ["A step's reduction, by network:\n"]
    sizes = [
        [
            name,
            f"{network.parameters / 1e6:.2f} M",
            f"{network.size / 1e6:.1f} MB",
            f"{network.iat / 1e9:.1f}",
            *(f"{1e3 * all_reduce(network.size, gpus):.2f}" for gpus in (2, 8, 16, 64, 256, 1024)),
        ]
        for name, network in NETWORKS.items()
    ]
    head = ["network", "parameters", "reduced", "IAT, GFLOP/image"]
    parts.append(table([*head, *(f"{n} GPUs, ms" for n in (2, 8, 16, 64, 256, 1024))], sizes))
    for batch in (512, 1024):
        parts.append(
            f"Strong: a batch of {batch} for all GPUs together, the same updates whatever their "
            f"number ({IMAGES // batch} an epoch). Seconds an epoch, efficiency:\n"
        )
        columns = [strong(network, batch) for network in NETWORKS.values()]
        rows = [
            [str(line[0][0]), str(batch // line[0][0]), *map(cell, line)]
            for line in zip(*columns, strict=True)
        ]
        parts.append(table(["GPUs", "images on each", *NETWORKS], rows))
    parts.append(
        "Weak: a batch of 128 on every GPU. Seconds an epoch, efficiency, and what the batch "
        "implies: the learning rate by the linear rule (0.1 at 64) and the updates of 200 epochs:\n"
    )
    columns = [weak(network, 128) for network in NETWORKS.values()]
    rows = []
    for line in zip(*columns, strict=True):
        batch = 128 * line[0][0]
        rate, updates = (
            f"{0.1 * batch / 64:.3g}",
            f"{200 * (IMAGES // batch):,}" if batch <= IMAGES else "none",
        )
        rows.append([str(line[0][0]), f"{batch:,}", rate, updates, *map(cell, line)])
    parts.append(table(["GPUs", "batch", "rate", "updates", *NETWORKS], rows))
    parts.append("Loading: images/s that one GPU trains, and a node of 8, at 128 images each:\n")
    rows = []
    for name, network in NETWORKS.items():
        rate = 128 / network.compute(128)
        rows.append([name, f"{rate:,.0f}", f"{8 * rate:,.0f}"])
    parts.append(table(["network", "GPU", "node"], rows))
    parts.append("Evaluation on 10,000 images in batches of 500, PGD-20 and PGD-1000, seconds:\n")
    rows = [
        [
            str(gpus),
            *(
                f"{evaluation(network, 20, gpus):.1f}, {evaluation(network, 1000, gpus):.0f}"
                for network in NETWORKS.values()
            ),
        ]
        for gpus in (1, 2, 4, 8, 16, 20, 1024)
    ]
    parts.append(table(["GPUs", *NETWORKS], rows))
    parts.append("The most GPUs of the tables with an efficiency of 80 % and of 50 %:\n")
    rows = []
    for name, network in NETWORKS.items():
        row = [name]
        for batch in (512, 1024):
            row += [str(until(strong(network, batch), least)) for least in (0.8, 0.5)]
        row += [str(until(weak(network, 128), least)) for least in (0.8, 0.5)]
        rows.append(row)
    kinds = ("batch 512", "batch 1,024", "128 on each")
    head = [f"{kind}, {least} %" for kind in kinds for least in (80, 50)]
    parts.append(table(["network", *head], rows))
    return "\n".join(parts)


def cell(row: tuple[int, float, float]) -> str:
    """Write an epoch's seconds and the efficiency."""
    _, seconds, efficiency = row
    epoch = f"{seconds:.3g} s" if seconds < math.inf else "none"
    return f"{epoch}, {100 * efficiency:.0f} %"


if __name__ == "__main__":
    print(tables())
