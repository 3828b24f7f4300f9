"""Addresses of gradients on the device; in the interpreter without a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from owlore.kernels import common

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# An address on the device is no small number.
BASE = 1 << 46


def numbers(count: int, which: int = 0) -> tuple[int, ...]:
    return tuple(BASE + 4096 * which + 16 * i for i in range(count))


@pytest.mark.parametrize("count", [1, 16, 35, 256, 300, 600])
def test_addresses_reach_the_device(count):
    addresses = common.Addresses(torch.device(DEVICE), count)
    for which in range(2):
        array = addresses.at(numbers(count, which), False)
        assert array.dtype == torch.int64
        assert tuple(array[:count].tolist()) == numbers(count, which)


def test_tensors_without_elements_take_no_part():
    """Their address is zero: as an argument a number of another type than the others."""
    addresses = common.Addresses(torch.device(DEVICE), 3)
    first, second, third = numbers(3)
    for given in ((first, 0, third), (first, second, 0), (first, second, third)):
        array = addresses.at(given, False)[:3].tolist()
        assert all(got == want for got, want in zip(array, given, strict=True) if want)


def test_addresses_that_come_back_are_not_written_again():
    addresses = common.Addresses(torch.device(DEVICE), 5)
    arrays = [addresses.at(numbers(5, which), False) for which in range(8)]
    for which in (3, 0, 7):
        assert addresses.at(numbers(5, which), False) is arrays[which]
    assert addresses.written == 8
    # The one used longest ago makes room.
    assert addresses.at(numbers(5, 8), False) is arrays[1]
    assert addresses.written == 9
    for which, array in enumerate(arrays):
        assert tuple(array[:5].tolist()) == numbers(5, 8 if which == 1 else which)
    assert addresses.at(numbers(5, 0), False) is arrays[0]
    assert addresses.written == 9


@pytest.mark.parametrize("known", [False, True])
def test_what_a_graph_refers_to_is_not_written_again(known):
    addresses = common.Addresses(torch.device(DEVICE), 5)
    if known:
        addresses.at(numbers(5), False)
    captured = addresses.at(numbers(5), True)
    for which in range(20):
        assert addresses.at(numbers(5, which), False) is not captured
    assert tuple(captured[:5].tolist()) == numbers(5)


@pytest.mark.gpu
def test_addresses_on_the_gpu():
    for count in (1, 35, 300):
        test_addresses_reach_the_device(count)
    test_tensors_without_elements_take_no_part()
    test_addresses_that_come_back_are_not_written_again()
    for known in (False, True):
        test_what_a_graph_refers_to_is_not_written_again(known)
