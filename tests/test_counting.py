"""The launch that counts a step against its definition; in the interpreter without a GPU."""

from __future__ import annotations

import pytest
import torch

from owlore import ops, reference

common = pytest.importorskip("owlore.kernels.common")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def counters(sizes, clocks):
    generator = torch.Generator().manual_seed(3)
    steps = [torch.arange(n, dtype=torch.float32) for n in sizes]
    skipped = [torch.randint(0, 9, (n,), generator=generator, dtype=torch.int32) for n in sizes]
    flags = [torch.randint(0, 2, (n,), generator=generator, dtype=torch.int32) for n in sizes]
    times = [torch.tensor(40 + i, dtype=torch.int32) for i in range(clocks)]
    return [[x.to(DEVICE) for x in xs] for xs in (steps, skipped, flags, times)]


@pytest.mark.parametrize("sizes", [(1,), (35,), (256, 5), (300, 600, 2), ()])
@pytest.mark.parametrize("clocks", [0, 1, 3])
def test_counting_is_its_definition(sizes, clocks):
    ours, theirs = counters(sizes, clocks), counters(sizes, clocks)
    if not sizes and not clocks:
        ops.Counting(*ours)()
        return
    count = common.Counting(*ours)
    for _ in range(3):
        count()
        reference.count_(*theirs)
        for mine, other in zip(ours, theirs, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(mine, other, strict=True))
        for flags in (ours[2], theirs[2]):
            for x in flags:
                x[::2] = 1
    assert all(x.tolist() == 40 + i + 3 for i, x in enumerate(ours[3]))


def test_counting_knows_what_it_counts():
    steps, skipped, flags, clocks = counters((4, 5), 1)
    count = ops.Counting(steps, skipped, flags, clocks)
    assert count.covers(steps, clocks)
    assert not count.covers(steps[:1], clocks)
    assert not count.covers([steps[0], steps[1].clone()], clocks)
    assert not count.covers(steps, [])
    count()
    assert int(clocks[0]) == 41


@pytest.mark.gpu
def test_counting_on_the_gpu():
    for sizes in ((1,), (300, 600, 2), ()):
        for clocks in (0, 1, 3):
            test_counting_is_its_definition(sizes, clocks)
    test_counting_knows_what_it_counts()
