import itertools
import math

import pytest
import torch
from kernel_cases import HALVES, LAYOUTS, assert_within_one_ulp, laid_out, reference_only

from fastiat.kernels import random_start
from fastiat.kernels.random_start import philox_uniform, random_start_reference

EPS = 0.1


def make(shape=(2, 3, 5, 7), device="cpu", seed=3):
    torch.manual_seed(0)
    return torch.rand(shape).to(device), torch.tensor(seed, device=device)


def as_unit(word):
    return min(word, 2**32 - 1 - word) / 2**31


@reference_only
@pytest.mark.parametrize(
    ("seed", "words"),
    [(0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8))],
)
def test_generator_gives_the_known_answers_of_random123(seed, words):
    u = philox_uniform(seed, 0, 1).view(4, 1024)[:, 0]
    torch.testing.assert_close(u, torch.tensor([as_unit(w) for w in words]))


# One value; a block and one; a group of four blocks less one, and one more; CIFAR images.
@pytest.mark.parametrize("shape", [(1,), (1025,), (4095,), (4097,), (2, 3, 32, 32)])
@pytest.mark.parametrize("seed", [0, 12345, -1, 2**40 + 7])
def test_every_device_draws_the_same_bits(shape, seed, device):
    x, seed = make(shape, device, seed)
    expected = random_start_reference(x.cpu(), seed.cpu(), EPS, 0.0, 1.0)
    assert torch.equal(random_start(x, EPS, seed).cpu(), expected)


@pytest.mark.parametrize("seed", [0, -1])
@pytest.mark.parametrize("cuts", [(1,), (4095, 4096, 4097), (1000, 9000), (33000,)])
def test_the_parts_of_a_batch_have_the_starts_of_the_whole(seed, cuts, device):
    x, seed = make((40000,), device, seed)
    whole = random_start_reference(x.cpu(), seed.cpu(), EPS, 0.0, 1.0)
    ends = (0, *cuts, len(x))
    for first, last in itertools.pairwise(ends):
        part = random_start(x[first:last], EPS, seed, first=first)
        assert torch.equal(part.cpu(), whole[first:last])
    # Far beyond 32 bits of a value's place, where the counter's high word counts.
    far = 2**45 + 5
    words = philox_uniform(int(seed), far // 4096, 1)[5:15].mul(2).sub(1).mul(EPS)
    expected = (x[:10].cpu() + words).clamp(0, 1)
    assert torch.equal(random_start(x[:10], EPS, seed, first=far).cpu(), expected)


def test_draws_are_uniform_in_the_ball_and_independent_of_each_other(device):
    x = torch.zeros(3, 9000, device=device)
    one = random_start(x, 1.0, torch.tensor(5, device=device), (-9, 9)).cpu().double()
    two = random_start(x, 1.0, torch.tensor([6], device=device), (-9, 9)).cpu().double()
    flat = one.flatten().sort().values
    ranks = torch.linspace(-1, 1, len(flat), dtype=torch.float64)
    assert (flat - ranks).abs().max() < 2 * 1.95 / math.sqrt(len(flat))  # Kolmogorov, p = 0.001
    for other in (two.flatten(), one.flatten().roll(1), one.flatten().roll(1024)):
        correlation = torch.corrcoef(torch.stack([one.flatten(), other]))[0, 1]
        assert abs(correlation) < 4 / math.sqrt(len(flat))


def test_start_is_clamped_and_in_the_ball(device):
    x, seed = make((4, 1000), device)
    start = random_start(x, EPS, seed)
    assert (start - x).abs().max() <= EPS + 6e-8
    assert start.min() >= 0
    assert start.max() <= 1
    assert torch.equal(start, random_start(x, EPS, seed, (-9, 9)).clamp(0, 1))
    assert torch.equal(random_start(x, 0.0, seed), x)


def test_seed_tensor_is_read_when_called(device):
    x, seed = make(device=device)
    first = random_start(x, EPS, seed)
    seed += 1
    second = random_start(x, EPS, seed)
    assert not torch.equal(first, second)
    seed -= 1
    assert torch.equal(random_start(x, EPS, seed), first)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_rounded_once(dtype, device):
    x, seed = make(device=device)
    x = x.to(dtype)
    exact = random_start(x.float(), EPS, seed).double()
    assert random_start(x, EPS, seed).dtype == dtype
    assert_within_one_ulp(random_start(x, EPS, seed), exact)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_memory_format(layout, device):
    x, seed = make(device=device)
    x = laid_out(x, layout)
    start = random_start(x, EPS, seed)
    assert torch.equal(start.cpu(), random_start_reference(x.cpu(), seed.cpu(), EPS, 0.0, 1.0))
    assert (start - x).abs().max() <= EPS + 6e-8
    is_last = start.is_contiguous(memory_format=torch.channels_last)
    assert is_last if layout == "channels_last" else start.is_contiguous()


@pytest.mark.parametrize("shape", [(0, 3, 5, 7), (2, 0), (0,)])
def test_empty_tensors_pass_through(shape, device):
    x, seed = make(shape, device)
    assert random_start(x, EPS, seed).shape == shape


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"x": torch.zeros(3, dtype=torch.uint8)}, TypeError, "x must be float32"),
        ({"seed": 3}, TypeError, "seed must be an int64 tensor"),
        ({"seed": torch.tensor(3.0)}, TypeError, "seed must be an int64 tensor"),
        ({"seed": torch.tensor([3, 4])}, ValueError, "seed must have one element"),
        ({"seed": torch.tensor(3, device="meta")}, ValueError, "seed is on meta"),
        ({"eps": -0.1}, ValueError, "eps must be zero or more"),
        ({"eps": math.nan}, ValueError, "eps must be zero or more"),
        ({"clip": (1, 0)}, ValueError, "low <= high"),
        ({"first": -1}, ValueError, "first must be zero or more"),
    ],
)
def test_wrong_arguments_are_named(change, kind, message):
    good = {"x": torch.zeros(3), "eps": 0.1, "seed": torch.tensor(0)}
    with pytest.raises(kind, match=message):
        random_start(**{**good, **change})


@reference_only
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_opcheck(layout, device):
    x, seed = make(device=device)
    args = (laid_out(x, layout), seed, EPS, 0.0, 1.0)
    torch.library.opcheck(torch.ops.fastiat.random_start.default, args)


@reference_only
def test_compiles_and_reads_the_seed_at_every_call(device):
    def start(x, seed):
        return random_start(x * 1.0, EPS, seed) + 1

    compiled = torch.compile(start, fullgraph=True, backend="aot_eager")
    x, seed = make(device=device)
    for _ in range(2):
        assert torch.equal(compiled(x, seed), start(x, seed))
        seed += 1


@pytest.mark.gpu
def test_replays_of_a_captured_graph_draw_anew():
    x, seed = make((4, 3, 32, 32), "cuda")
    random_start(x, EPS, seed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        start = random_start(x, EPS, seed)
        seed += 1
    starts = []
    for _ in range(2):
        graph.replay()
        starts.append(start.clone())
    assert torch.equal(starts[0], random_start(x, EPS, torch.tensor(3, device="cuda")))
    assert torch.equal(starts[1], random_start(x, EPS, torch.tensor(4, device="cuda")))
