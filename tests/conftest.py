"""Fixtures of the whole suite, and the NaN filling of fresh memory."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from functools import wraps
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.utils._device

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

# Triton reads this when a kernel is decorated, so it must stand before any kernel is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The suite's tensors are small: a second thread costs more than it does.
torch.set_num_threads(1)

_CREATORS = ("empty", "empty_like", "empty_strided")


def _filled(create: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The same creator, whose result is useless until written when owlore asks for it."""

    @wraps(create)
    def call(*args: Any, **options: Any) -> torch.Tensor:
        tensor = create(*args, **options)
        module = sys._getframe(1).f_globals.get("__name__", "")
        if module.split(".")[0] == "owlore" and tensor.device.type != "meta":
            with torch.no_grad():
                if tensor.is_floating_point():
                    tensor.fill_(float("nan"))
                elif tensor.dtype != torch.bool:
                    tensor.fill_(torch.iinfo(tensor.dtype).max)
        return tensor

    return call


@pytest.fixture(autouse=True, scope="session")
def fresh_memory_is_nan() -> Iterator[None]:
    """`torch.empty` called from owlore gives NaN, so that an element nobody wrote fails a test."""
    # `with torch.device(...)` knows the creators by identity and collects them at its first use.
    torch.utils._device._device_constructors()
    originals = {name: getattr(torch, name) for name in _CREATORS}
    for name, create in originals.items():
        setattr(torch, name, _filled(create))
    yield
    for name, create in originals.items():
        setattr(torch, name, create)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch sees none"))


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    """A random LLaMA of four blocks in training mode, the same weights every time. float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).train()


@pytest.fixture
def stories260k() -> LlamaForCausalLM:
    """A fresh copy of a pretrained LLaMA of 260,032 parameters, five blocks. float32."""
    from stories260k import load_model

    return load_model()
