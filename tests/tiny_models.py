"""Randomly initialised models of many architectures, each a few thousand weights and three blocks.

Every builder gives the same weights each time, in float32 and training mode, without dropout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 40
BLOCKS = 3
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


def _text(name: str, drop: tuple[str, ...] = (), **more: Any) -> Callable[..., nn.Module]:
    """Builder of a causal language model by transformers' name of it."""
    sizes = {key: value for key, value in _SIZES.items() if key not in drop}

    def build(**overrides: Any) -> nn.Module:
        config_class = getattr(transformers, f"{name}Config")
        model_class = getattr(transformers, f"{name}ForCausalLM", None)
        model_class = model_class or getattr(transformers, f"{name}LMHeadModel")
        return model_class(config_class(**{**sizes, **more, **overrides}))

    return build


def _gemma3_text(**overrides: Any) -> nn.Module:
    sizes = {**_SIZES, "head_dim": 4, "sliding_window": 8, **overrides}
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**sizes))


def _llava(**overrides: Any) -> nn.Module:
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=16,
    )
    text = transformers.LlamaConfig(**{**_SIZES, **overrides})
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=VOCABULARY - 1
    )
    return transformers.LlavaForConditionalGeneration(config)


_NO_DROPOUT = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
_OPT = {"ffn_dim": 24, "dropout": 0.0, "do_layer_norm_before": True}
_OPT_DROP = ("intermediate_size", "num_key_value_heads")
_EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8}

ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "llama": _text("Llama"),
    "llama-tied": _text("Llama", tie_word_embeddings=True),
    "mistral": _text("Mistral"),
    "qwen2": _text("Qwen2"),
    "qwen3": _text("Qwen3", head_dim=4),
    "gemma2": _text("Gemma2", head_dim=4, sliding_window=8),
    "gemma3": _gemma3_text,
    "phi3": _text("Phi3"),
    "gpt2": _text(
        "GPT2",
        ("intermediate_size", "num_key_value_heads"),
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
    ),
    "gpt-neox": _text("GPTNeoX", ("num_key_value_heads",), **_NO_DROPOUT),
    "opt": _text("OPT", _OPT_DROP, word_embed_proj_dim=16, **_OPT),
    "opt-350m": _text(
        "OPT", _OPT_DROP, **{**_OPT, "word_embed_proj_dim": 8, "do_layer_norm_before": False}
    ),
    "olmo": _text("Olmo"),
    "olmo2": _text("Olmo2"),
    "mixtral": _text("Mixtral", num_local_experts=3, num_experts_per_tok=2),
    "qwen2-moe": _text(
        "Qwen2Moe", **_EXPERTS, shared_expert_intermediate_size=12, decoder_sparse_step=1
    ),
    "qwen3-moe": _text("Qwen3Moe", **_EXPERTS, head_dim=4, decoder_sparse_step=1),
    "llava": _llava,
}


def build(name: str, **overrides: Any) -> nn.Module:
    """The model of an architecture; overrides go to the (text) config."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ARCHITECTURES[name](**overrides).train()


def batch(seed: int = 0, rows: int = 2, length: int = 9) -> dict[str, Tensor]:
    """Token ids [rows, length] that serve as labels too, without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY - 1, (rows, length), generator=generator)
    return {"input_ids": ids, "labels": ids}
