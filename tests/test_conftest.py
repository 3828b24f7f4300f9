"""The fixtures are what they claim to be."""

from __future__ import annotations

import types

import torch
from stories260k import Tokenizer


def test_stories260k_tells_its_story(stories260k) -> None:
    ids = torch.tensor([[1]])
    story = stories260k.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=0)
    text = Tokenizer().decode(story[0].tolist())
    # The greedy story of llama2.c's doc/stories260K.md.
    assert text.startswith(
        " Once upon a time, there was a little girl named Lily. She loved to play outside"
    )


def test_tokenizer_merges_as_the_model_was_trained(stories260k) -> None:
    tokenizer = Tokenizer()
    text = "Once upon a time, there was a little girl named Lily. Zoë said “hi”.\n"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == " " + text
    # Merged pieces fit the model far better than single characters do.
    story = " Once upon a time, there was a little girl named Lily. She loved to play outside."
    tokens = torch.tensor([tokenizer.encode(story.strip())])
    with torch.no_grad():
        loss = stories260k(tokens, labels=tokens).loss.item()
    assert loss * tokens.numel() / len(story) < 0.5


def test_memory_that_owlore_asks_for_is_nan_until_written() -> None:
    owlore = types.ModuleType("owlore.probe")
    exec(
        "import torch\nmake = lambda: (torch.empty(3), torch.empty_like(torch.ones(2)))",
        vars(owlore),
    )
    assert all(tensor.isnan().all() for tensor in owlore.make())
    assert not torch.empty_like(torch.ones(2)).fill_(1).isnan().any()
