"""Reads the test model stories260K and its tokenizer from llama2.c's binary format.

The model file is seven int32 of header, then the weights in float32: all blocks of one kind after
each other, then two RoPE tables that a Hugging Face model computes itself.
"""

from __future__ import annotations

import heapq
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

FOLDER = Path(__file__).parent / "data" / "stories260k"
_HEADER = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)
BOS = 1
# Ids 3 to 258 stand for single bytes.
_FIRST_BYTE = 3


def read_config(path: Path = FOLDER / "stories260K.bin") -> dict[str, int]:
    """The sizes in the header, under the names of `LlamaConfig`."""
    with path.open("rb") as file:
        return dict(zip(_HEADER, struct.unpack("<7i", file.read(28)), strict=True))


def read_state(path: Path = FOLDER / "stories260K.bin") -> dict[str, Tensor]:
    """The weights under Hugging Face's names.

    Returns:
        State dict of a `LlamaForCausalLM` with tied embedding. float32.
    """
    config = read_config(path)
    width, hidden = config["hidden_size"], config["intermediate_size"]
    blocks, heads = config["num_hidden_layers"], config["num_attention_heads"]
    kv_heads, head_width = config["num_key_value_heads"], width // heads
    kv_width = kv_heads * head_width

    layout = {
        "model.embed_tokens": (config["vocab_size"], width),
        "input_layernorm": (blocks, width),
        "self_attn.q_proj": (blocks, width, width),
        "self_attn.k_proj": (blocks, kv_width, width),
        "self_attn.v_proj": (blocks, kv_width, width),
        "self_attn.o_proj": (blocks, width, width),
        "post_attention_layernorm": (blocks, width),
        "mlp.gate_proj": (blocks, hidden, width),
        "mlp.down_proj": (blocks, width, hidden),
        "mlp.up_proj": (blocks, hidden, width),
        "model.norm": (width,),
        "RoPE tables": (2, config["max_position_embeddings"], head_width // 2),
    }
    sizes = [int(torch.Size(shape).numel()) for shape in layout.values()]
    floats = torch.frombuffer(bytearray(path.read_bytes()[28:]), dtype=torch.float32)
    arrays = {
        name: part.view(shape)
        for (name, shape), part in zip(layout.items(), floats.split(sizes), strict=True)
    }
    del arrays["RoPE tables"]

    state = {}
    for name, array in arrays.items():
        if name.startswith("model."):
            state[f"{name}.weight"] = array.clone()
            continue
        for block, weight in enumerate(array):
            if name in ("self_attn.q_proj", "self_attn.k_proj"):
                # llama2.c rotates neighbouring rows, Hugging Face row i with row i + half a head.
                pairs = weight.view(-1, head_width // 2, 2, width)
                weight = pairs.transpose(1, 2).reshape(-1, width)
            state[f"model.layers.{block}.{name}.weight"] = weight.clone()
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return state


def load_model() -> LlamaForCausalLM:
    """A fresh copy of the model, in evaluation mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **read_config(), rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=BOS
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(read_state())
    return model.eval()


class Tokenizer:
    """The byte-fallback BPE of llama2.c: repeatedly merges the pair with the best score."""

    def __init__(self, path: Path = FOLDER / "tok512.bin") -> None:
        data = path.read_bytes()
        self.pieces: list[bytes] = []
        self.scores: list[float] = []
        position = 4  # the longest piece's length comes first
        while position < len(data):
            score, length = struct.unpack_from("<fi", data, position)
            position += 8
            self.pieces.append(data[position : position + length])
            self.scores.append(score)
            position += length
        self.ids = {piece: i for i, piece in enumerate(self.pieces)}
        for byte in range(256):
            self.pieces[_FIRST_BYTE + byte] = bytes([byte])

    def encode(self, text: str) -> list[int]:
        """Token ids, the first of them BOS."""
        tokens: list[int | None] = []
        for character in " " + text:
            piece = character.encode("utf8")
            known = self.ids.get(piece)
            tokens += [known] if known is not None else [_FIRST_BYTE + byte for byte in piece]
        # Neighbours are found through links, so a merge costs one heap operation.
        following = [*range(1, len(tokens)), -1]
        previous = list(range(-1, len(tokens) - 1))
        heap: list[tuple[float, int, int, int]] = []

        def offer(left: int) -> None:
            right = following[left] if left >= 0 else -1
            if right < 0:
                return
            merged = self.ids.get(self.pieces[tokens[left]] + self.pieces[tokens[right]])
            if merged is not None:
                heapq.heappush(heap, (-self.scores[merged], left, right, merged))

        for left in range(len(tokens) - 1):
            offer(left)
        while heap:
            _, left, right, merged = heapq.heappop(heap)
            if tokens[left] is None or tokens[right] is None or following[left] != right:
                continue
            if self.pieces[tokens[left]] + self.pieces[tokens[right]] != self.pieces[merged]:
                continue
            tokens[left], tokens[right] = merged, None
            following[left] = following[right]
            if following[right] >= 0:
                previous[following[right]] = left
            offer(previous[left])
            offer(left)
        return [BOS, *(token for token in tokens if token is not None)]

    def decode(self, ids: list[int]) -> str:
        """Text of the ids, special ones left out."""
        text = b"".join(self.pieces[i] for i in ids if i >= _FIRST_BYTE)
        return text.decode("utf8", "replace")
