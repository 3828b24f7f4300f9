"""Block discovery and roles on the architectures that the README names, and what trains in each."""

from __future__ import annotations

import copy
import logging
import re
import warnings

import pytest
import tiny_models
import torch
import transformers
from tolerances import TRAINING_FLOAT64
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from owlore import OwLore, blocks

# Names below a block ("|": name.weight unless it ends otherwise) and outside the blocks, by role.
LLAMA_LINEAR = (
    "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj "
    "mlp.gate_proj mlp.up_proj mlp.down_proj"
)
ATTENTION = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj"
QKV_BIAS = " self_attn.q_proj.bias self_attn.k_proj.bias self_attn.v_proj.bias"
QK_NORM = " self_attn.q_norm self_attn.k_norm"
PRE_NORMS = "input_layernorm post_attention_layernorm"
GEMMA_NORMS = PRE_NORMS + " pre_feedforward_layernorm post_feedforward_layernorm"
EXPERTS = "mlp.gate mlp.experts.gate_up_proj: mlp.experts.down_proj:"
OPT_LINEAR = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj fc1 fc2"
GPT2_LINEAR = "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj"
NEOX_LINEAR = "attention.query_key_value attention.dense mlp.dense_h_to_4h mlp.dense_4h_to_h"


def _biases(names: str) -> str:
    return "".join(f" {name}.bias" for name in names.split())


def _with_biases(names: str) -> str:
    return names + _biases(names)


def _llama(linear: str = LLAMA_LINEAR, norms: str = PRE_NORMS, other: str = "") -> dict[str, str]:
    return {
        "path": "model.layers",
        "linear": linear,
        "norms": norms,
        "other": other,
        "embeddings": "model.embed_tokens",
        "head": "lm_head",
        "norm": "model.norm",
    }


EXPECTED: dict[str, dict[str, str]] = {
    "llama": _llama(),
    "llama-tied": _llama() | {"head": ""},
    "mistral": _llama(),
    "qwen2": _llama(norms=PRE_NORMS + QKV_BIAS),
    "qwen3": _llama(norms=PRE_NORMS + QK_NORM),
    "gemma2": _llama(norms=GEMMA_NORMS),
    "gemma3": _llama(norms=GEMMA_NORMS + QK_NORM),
    "phi3": _llama("self_attn.qkv_proj self_attn.o_proj mlp.gate_up_proj mlp.down_proj"),
    "gpt2": {
        "path": "transformer.h",
        "linear": GPT2_LINEAR,
        "norms": _with_biases("ln_1 ln_2") + _biases(GPT2_LINEAR),
        "other": "",
        "embeddings": "transformer.wte transformer.wpe",
        "head": "lm_head",
        "norm": _with_biases("transformer.ln_f"),
    },
    "gpt-neox": {
        "path": "gpt_neox.layers",
        "linear": NEOX_LINEAR,
        "norms": _with_biases(PRE_NORMS) + _biases(NEOX_LINEAR),
        "other": "",
        "embeddings": "gpt_neox.embed_in",
        "head": "lm_head",
        "norm": _with_biases("gpt_neox.final_layer_norm"),
    },
    "opt": {
        "path": "model.decoder.layers",
        "linear": OPT_LINEAR,
        "norms": _with_biases("self_attn_layer_norm final_layer_norm") + _biases(OPT_LINEAR),
        "other": "",
        "embeddings": "model.decoder.embed_tokens model.decoder.embed_positions",
        "head": "lm_head",
        "norm": _with_biases("model.decoder.final_layer_norm"),
    },
    "olmo": _llama(norms="") | {"norm": ""},
    "olmo2": _llama(norms="post_attention_layernorm post_feedforward_layernorm" + QK_NORM),
    "mixtral": _llama(ATTENTION, other=EXPERTS),
    "qwen2-moe": _llama(
        ATTENTION + " mlp.shared_expert.gate_proj mlp.shared_expert.up_proj"
        " mlp.shared_expert.down_proj mlp.shared_expert_gate",
        PRE_NORMS + QKV_BIAS,
        EXPERTS,
    ),
    "qwen3-moe": _llama(ATTENTION, PRE_NORMS + QK_NORM, EXPERTS),
}
EXPECTED["opt-350m"] = EXPECTED["opt"] | {
    "norm": "",
    "outside": "model.decoder.project_in model.decoder.project_out",
}
EXPECTED["llava"] = {
    key: value.replace("model.", "model.language_model.") for key, value in _llama().items()
}
ARCHITECTURES = tuple(tiny_models.ARCHITECTURES)


def full_names(names: str, prefix: str = "") -> set[str]:
    """Parameter names: a bias as it is, a bare parameter with ":", everything else a weight."""
    found = set()
    for name in names.split():
        whole = name.endswith((".bias", ":"))
        found.add(prefix + name.rstrip(":") if whole else f"{prefix}{name}.weight")
    return found


def expected_roles(name: str) -> dict[str, set[str]]:
    """Every parameter's name by role, from the table above."""
    table = EXPECTED[name]
    prefixes = [f"{table['path']}.{i}." for i in range(tiny_models.BLOCKS)]
    roles = {role: full_names(table[role]) for role in ("embeddings", "head", "norm")}
    for role, key in (("blocks", "linear"), ("block_norms", "norms"), ("other", "other")):
        roles[role] = {full for prefix in prefixes for full in full_names(table[key], prefix)}
    roles["other"] |= full_names(table.get("outside", ""))
    # All of them model language.
    roles["classifier"] = set()
    if name == "llava":
        outside = re.compile(r"model\.(vision_tower|multi_modal_projector)\.")
        model = tiny_models.build(name)
        roles["other"] |= {n for n, _ in model.named_parameters() if outside.match(n)}
    return roles


def block_of(name: str, path: str) -> int | None:
    found = re.match(rf"{re.escape(path)}\.(\d+)\.", name)
    return int(found[1]) if found else None


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_parameter_has_its_role(name):
    model = tiny_models.build(name)
    layout = blocks.find_layout(model)
    path = EXPECTED[name]["path"]
    assert layout.blocks_path == path
    assert [*layout.blocks] == [*model.get_submodule(path)]
    assert layout.owner is model.get_submodule(path.rpartition(".")[0])
    assert layout.tied is (name == "llama-tied")
    found: dict[str, set[str]] = {role: set() for role in blocks.ROLES}
    for entry in layout.entries:
        found[entry.role].add(entry.name)
        assert entry.block == block_of(entry.name, path)
        assert entry.param is model.get_parameter(entry.name)
    assert found == expected_roles(name)
    assert len(layout.entries) == len(list(model.parameters()))


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(("rank", "gradient"), [(2, "projected"), (2, "dense"), (None, "dense")])
def test_three_steps_change_only_what_is_documented(name, rank, gradient):
    model = tiny_models.build(name)
    path, roles = EXPECTED[name]["path"], expected_roles(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    flags = {key: value.requires_grad for key, value in model.named_parameters()}
    always = roles["embeddings"] | roles["head"] | roles["norm"]
    optimizer = OwLore(
        model, distribution="uniform", blocks=1, rank=rank, interval=2, lr=1e-2, seed=1,
        gradient=gradient, refresh="exact", embeddings="full", head="full", norms="full",
    )  # fmt: skip

    def weight(key: str) -> str:
        return key.replace("owlore_coordinates", "weight")

    def now_trainable() -> set[str]:
        return {weight(key) for key, value in model.named_parameters() if value.requires_grad}

    assert now_trainable() == {key for key, flag in flags.items() if flag}

    trained_blocks = set()
    for step in range(3):
        start = {key: value.clone() for key, value in model.state_dict().items()}
        with warnings.catch_warnings():
            # A draw that came only at step(), or missing gradients, would warn.
            warnings.filterwarnings("error", message="owlore")
            loss = model(**tiny_models.batch(seed=step)).loss
            active = {
                key
                for key in roles["blocks"] | roles["block_norms"]
                if block_of(key, path) in optimizer.active_blocks
            }
            assert active
            assert len(optimizer.active_blocks) == 1
            assert now_trainable() == active | always
            loss.backward()
            grads = {key: value.grad for key, value in model.named_parameters()}
            with_grad = {weight(key) for key, grad in grads.items() if grad is not None}
            assert with_grad <= active | always
            formed = {key for key in roles["blocks"] if grads.get(key) is not None}
            assert not (formed and gradient == "projected"), formed
            optimizer.step()
            optimizer.zero_grad()
        trained_blocks |= set(optimizer.active_blocks)
        for key, value in model.state_dict().items():
            moved = not torch.equal(value, start[key])
            tied_copy = key == "lm_head.weight" and name == "llama-tied"
            if key in active | always or tied_copy:
                # A key's bias cancels in the softmax: its gradient may be exactly zero.
                assert moved or "k_proj.bias" in key, f"{key} did not train in step {step}"
            else:
                assert not moved, f"{key} changed in step {step}"
    assert trained_blocks == {b for _, drawn in optimizer.draws() for b in drawn}
    assert len(trained_blocks) == 2, "the seed should draw two different blocks"
    owner = model.get_submodule(path.rpartition(".")[0])
    assert [m for m in model.modules() if m._forward_pre_hooks] == [owner]
    optimizer.detach()
    assert not owner._forward_pre_hooks
    assert {key: value.requires_grad for key, value in model.named_parameters()} == flags
    assert all(param.grad is None for param in model.parameters())
    inactive = {
        key
        for key in roles["blocks"] | roles["block_norms"]
        if block_of(key, path) not in trained_blocks
    }
    for key in inactive | roles["other"]:
        assert torch.equal(model.state_dict()[key], before[key]), key


def test_a_vision_language_model_trains_on_images():
    model = tiny_models.build("llava")
    ids = tiny_models.batch(rows=1)["input_ids"]
    ids[0, :4] = model.config.image_token_id
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    optimizer = OwLore(model, distribution="uniform", blocks=1, rank=2, lr=1e-2, refresh="exact")
    vision = {key: value.clone() for key, value in model.model.vision_tower.state_dict().items()}
    model(input_ids=ids, pixel_values=pixels, labels=ids).loss.backward()
    assert len(optimizer.active_blocks) == 1
    q_proj = model.model.language_model.layers[optimizer.active_blocks[0]].self_attn.q_proj.weight
    before = q_proj.detach().clone()
    optimizer.step()
    assert not torch.equal(q_proj, before)
    for key, value in model.model.vision_tower.state_dict().items():
        assert torch.equal(value, vision[key]), key


def test_a_vision_tower_of_the_same_depth_must_be_told_apart_by_name():
    model = tiny_models.build("llava", num_hidden_layers=2)
    message = r"several lists fit: .*vision_tower.*language_model.layers.*blocks_path"
    with pytest.raises(ValueError, match=message):
        blocks.find_layout(model)
    layout = blocks.find_layout(model, "model.language_model.layers")
    assert len(layout.blocks) == 2
    assert layout.owner is model.model.language_model


# Mixtures of experts.


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "qwen3-moe"])
def test_expert_stacks_are_named_in_the_log_and_train_on_request(name, caplog):
    caplog.set_level(logging.INFO, logger="owlore")
    model = tiny_models.build(name)
    optimizer = OwLore(model, distribution="uniform", blocks=1, rank=2)
    assert "not trained: " in caplog.text
    for part in ("experts.down_proj", "experts.gate_up_proj", "gate.weight"):
        assert f"model.layers.*.mlp.{part}" in caplog.text
    optimizer.detach()

    optimizer = OwLore(
        model, distribution="uniform", blocks=1, rank=2, interval=1, lr=1e-2, other="full", seed=1,
        gradient="dense",
    )  # fmt: skip
    for step in range(2):
        start = {key: value.clone() for key, value in model.state_dict().items()}
        model(**tiny_models.batch(seed=step, rows=4)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for key, value in model.state_dict().items():
            if ".experts." in key or key.endswith(".mlp.gate.weight"):
                index = block_of(key, "model.layers")
                assert torch.equal(value, start[key]) is (index not in optimizer.active_blocks), key
    left = {b for _, drawn in optimizer.draws() for b in drawn} - set(optimizer.active_blocks)
    assert left
    stack = model.model.layers[left.pop()].mlp.experts.down_proj
    assert stack not in optimizer.state
    assert not stack.requires_grad


# Conv1D.


def _with_linear(model: nn.Module) -> nn.Module:
    """The same GPT-2 with nn.Linear, whose weights are stored transposed, in Conv1D's place."""
    twin = copy.deepcopy(model)
    for parent in list(twin.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Conv1D):
                linear = nn.Linear(child.nx, child.nf, dtype=child.weight.dtype)
                linear.weight.data.copy_(child.weight.detach().T)
                linear.bias.data.copy_(child.bias.detach())
                setattr(parent, name, linear)
    return twin


def _as_linear(value: Tensor, key: str) -> Tensor:
    conv1d = any(f".{name}.weight" in key for name in GPT2_LINEAR.split())
    return value.T if conv1d else value


@pytest.mark.parametrize("side", ["std", "left", "right", "reverse", "auto"])
@pytest.mark.parametrize("basis", ["subspace", "random"])
@pytest.mark.parametrize("gradient", ["projected", "dense"])
def test_a_conv1d_model_trains_as_its_linear_form(side, basis, gradient):
    conv = tiny_models.build("gpt2").double()
    linear = _with_linear(conv)
    options = {
        "distribution": "uniform",
        "blocks": 2,
        "rank": 3,
        "interval": 3,
        "refresh_interval": 2,
        # The sign of a basis vector is arbitrary, and kept moments would not follow it.
        "on_refresh": "transport",
        "weight_decay": 0.1,
        "lr": 1e-2,
        "side": side,
        "basis": basis,
        "gradient": gradient,
        "embeddings": "full",
        "head": "full",
        "norms": "full",
    }
    models = {"conv": conv, "linear": linear}
    optimizers = {key: OwLore(model, **options) for key, model in models.items()}
    for step in range(8):
        for key, model in models.items():
            model(**tiny_models.batch(seed=step)).loss.backward()
            optimizers[key].step()
            optimizers[key].zero_grad()
    start = tiny_models.build("gpt2").double().state_dict()
    for key, value in linear.state_dict().items():
        found = _as_linear(conv.state_dict()[key], key)
        torch.testing.assert_close(found, value, **TRAINING_FLOAT64)
        assert not torch.equal(conv.state_dict()[key], start[key]), key
    states = {
        key: {
            n.replace("owlore_coordinates", "weight"): optimizers[key].state[p]
            for n, p in model.named_parameters()
            if optimizers[key].state[p]
        }
        for key, model in models.items()
    }
    name = f"transformer.h.{optimizers['conv'].active_blocks[0]}.mlp.c_fc.weight"
    # [16, 64] stored, so 64 out and 16 in features: "std" projects the input side.
    wide = (3, 16) if side in ("left", "reverse") else (64, 3)
    assert states["conv"][name]["exp_avg"].shape == wide
    for key in ("exp_avg", "exp_avg_sq"):
        ours, theirs = states["conv"][name][key], states["linear"][name][key]
        torch.testing.assert_close(ours.abs(), theirs.abs(), **TRAINING_FLOAT64)


def test_a_conv1d_weight_rounds_as_its_linear_form_bit_for_bit():
    conv = tiny_models.build("gpt2").bfloat16()
    models = [conv, _with_linear(conv)]
    for model in models:
        optimizer = OwLore(model, distribution="uniform", blocks="all", rank=None, lr=1e-3)
        for step in range(3):
            model(**tiny_models.batch())
            for i, (name, param) in enumerate(model.named_parameters()):
                flat = model is not conv
                shape = param.shape if flat else _as_linear(param, name).shape
                gradient = torch.randn(
                    shape, generator=torch.Generator().manual_seed(100 * step + i)
                )
                gradient = gradient if flat else _as_linear(gradient, name)
                param.grad = gradient.to(param)
            optimizer.step()
    for key, value in models[1].state_dict().items():
        assert torch.equal(_as_linear(conv.state_dict()[key], key), value), key


# Models that do not fit.


def _t5(**sizes: int) -> nn.Module:
    config = transformers.T5Config(
        vocab_size=40,
        d_model=16,
        d_kv=4,
        d_ff=24,
        num_heads=2,
        decoder_start_token_id=0,
        dropout_rate=0.0,
        **sizes,
    )
    return transformers.T5ForConditionalGeneration(config).train()


def _bart(**sizes: int) -> nn.Module:
    config = transformers.BartConfig(
        vocab_size=40,
        d_model=16,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        **sizes,
    )
    return transformers.BartForConditionalGeneration(config).train()


@pytest.mark.parametrize(
    "build",
    [
        lambda: _t5(num_layers=2),
        lambda: _t5(num_layers=3, num_decoder_layers=2),
        lambda: _bart(encoder_layers=2, decoder_layers=3),
    ],
    ids=["t5", "t5-uneven", "bart-uneven"],
)
def test_an_encoder_beside_a_decoder_is_never_guessed_at(build):
    with pytest.raises(ValueError, match=r"several lists fit: .*encoder.*decoder.*blocks_path"):
        OwLore(build(), distribution="uniform", blocks=1)


def test_an_encoder_decoder_trains_where_blocks_path_says():
    model = _t5(num_layers=3, num_decoder_layers=2)
    optimizer = OwLore(
        model, distribution="uniform", blocks=1, rank=2, lr=1e-2, blocks_path="decoder.block",
        refresh="exact",
    )  # fmt: skip
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="owlore")
        model(**tiny_models.batch()).loss.backward()
        optimizer.step()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    (active,) = optimizer.active_blocks
    assert any(key.startswith(f"decoder.block.{active}.") for key in changed)
    assert not any(key.startswith(f"decoder.block.{1 - active}.") for key in changed)
    assert not any(key.startswith("encoder.block.") for key in changed)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(4, 4), nn.ReLU()),
        nn.Sequential(nn.ModuleList([nn.LayerNorm(4), nn.LayerNorm(4)])),
        nn.Sequential(nn.ModuleList()),
    ],
    ids=["no-list", "no-linear-layer", "empty-list"],
)
def test_a_model_without_blocks_is_refused(model):
    flags = [param.requires_grad for param in model.parameters()]
    with pytest.raises(ValueError, match=r"model: expected one list .*none was found"):
        OwLore(model, distribution="uniform", blocks=1)
    assert [param.requires_grad for param in model.parameters()] == flags


@pytest.mark.parametrize("path", ["model.layer", "model", "model.layers.0", ""])
def test_a_blocks_path_that_names_no_list_is_refused(path):
    with pytest.raises(ValueError, match=f"blocks_path: expected .* got {path!r}"):
        blocks.find_layout(tiny_models.build("llama"), path)


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got list"):
        OwLore([nn.Linear(2, 2)], distribution="uniform", blocks=1)


class Blocks(nn.Module):
    """A plain model that runs a given list of blocks on a given embedding."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def _linear_blocks(count: int, width: int = 6) -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width)) for _ in range(count)]


def test_a_plain_module_needs_no_transformers_config():
    model = Blocks(_linear_blocks(3))
    optimizer = OwLore(model, distribution="uniform", blocks=1, rank=2, lr=1e-2, refresh="exact")
    before = [layer[0].weight.detach().clone() for layer in model.layers]
    model(torch.randn(4, 6)).square().sum().backward()
    optimizer.step()
    changed = [
        not torch.equal(layer[0].weight, old)
        for layer, old in zip(model.layers, before, strict=True)
    ]
    assert changed == [i in optimizer.active_blocks for i in range(3)]


def _quantise(linear: nn.Linear) -> None:
    weight = torch.randint(-9, 9, linear.weight.shape, dtype=torch.int8)
    linear.weight = nn.Parameter(weight, requires_grad=False)


@pytest.mark.parametrize("other", ["freeze", "full"])
def test_quantised_weights_are_left_alone(other):
    model = Blocks(_linear_blocks(3))
    _quantise(model.layers[1][0])
    layout = blocks.find_layout(model)
    roles = {entry.name: entry.role for entry in layout.entries}
    assert roles["layers.1.0.weight"] == "other"
    assert roles["layers.0.0.weight"] == "blocks"
    optimizer = OwLore(model, distribution="uniform", blocks="all", rank=2, other=other)
    trained = {id(param) for group in optimizer.param_groups for param in group["params"]}
    assert id(model.layers[1][0].weight) not in trained
    optimizer._apply_due_draw()
    assert not model.layers[1][0].weight.requires_grad


def test_a_fully_quantised_model_is_refused():
    model = Blocks(_linear_blocks(2))
    for layer in model.layers:
        _quantise(layer[0])
    with pytest.raises(ValueError, match=r"no linear layer with floating-point .*quantised"):
        OwLore(model, distribution="uniform", blocks=1)


def test_a_weight_shared_by_two_blocks_belongs_to_none_of_them():
    first, second, third = _linear_blocks(3)
    second[0].weight = first[0].weight
    model = Blocks([first, second, third])
    roles = {entry.name: (entry.role, entry.block) for entry in blocks.find_layout(model).entries}
    assert roles["layers.0.0.weight"] == ("other", None)
    assert roles["layers.2.0.weight"] == ("blocks", 2)
    assert roles["layers.0.0.bias"] == ("block_norms", 0)
    optimizer = OwLore(model, distribution="uniform", blocks="all", rank=2, lr=1e-2)
    before = first[0].weight.detach().clone()
    for _ in range(2):
        model(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(first[0].weight, before)


def test_blocks_that_are_all_the_same_module_are_refused():
    (block,) = _linear_blocks(1)
    with pytest.raises(ValueError, match="share all their weights"):
        OwLore(Blocks([block, block]), distribution="uniform", blocks=1)


# What the user froze.


def test_parameters_that_the_user_froze_stay_frozen():
    model = tiny_models.build("llama")
    frozen = {"model.embed_tokens.weight"} | {
        name
        for name, _ in model.named_parameters()
        if "q_proj" in name or "input_layernorm" in name
    }
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = OwLore(
        model, distribution="uniform", blocks="all", rank=2, lr=1e-2, embeddings="full",
        head="full", norms="full",
    )  # fmt: skip
    for step in range(2):
        model(**tiny_models.batch(seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == set(before) - frozen
    optimizer.detach()
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == frozen


def test_a_model_whose_blocks_are_frozen_is_refused():
    model = tiny_models.build("llama")
    model.model.layers.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        OwLore(model, distribution="uniform", blocks=1)


# Wrappers, forward passes that must not draw.


def test_names_do_not_depend_on_wrappers():
    model = Blocks(_linear_blocks(3))
    plain = [entry.name for entry in blocks.find_layout(model).entries]
    compiled = torch.compile(model, backend="eager")
    assert [entry.name for entry in blocks.find_layout(compiled).entries] == plain
    assert blocks.clean_name("module.layers.1._orig_mod.0.weight") == "layers.1.0.weight"


def test_a_wrapper_hides_neither_head_nor_embedding():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(tiny_models.build("llama"))
        layout = blocks.find_layout(wrapped)
    finally:
        torch.distributed.destroy_process_group()
    found: dict[str, set[str]] = {role: set() for role in blocks.ROLES}
    for entry in layout.entries:
        found[entry.role].add(entry.name)
    assert found == expected_roles("llama")


def test_gradients_of_blocks_that_leave_are_freed():
    model = tiny_models.build("llama")
    optimizer = OwLore(
        model, distribution="uniform", blocks=1, rank=2, interval=1, seed=1, gradient="dense",
        norms="full",
    )  # fmt: skip
    seen = set()
    for step in range(4):
        model(**tiny_models.batch(seed=step)).loss.backward()
        seen.add(optimizer.active_blocks)
        for index, layer in enumerate(model.model.layers):
            held = {param.grad is not None for param in layer.parameters()}
            assert held == {index in optimizer.active_blocks}
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    assert len(seen) > 1


def test_experts_in_a_list_inside_a_block_are_no_blocks():
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.experts[0](x) + self.experts[1](x)

    layout = blocks.find_layout(Blocks([Mixture(), Mixture(), Mixture()]))
    assert layout.blocks_path == "layers"
    assert [entry.block for entry in layout.entries] == [0, 0, 1, 1, 2, 2]
    assert {entry.role for entry in layout.entries} == {"blocks"}


def test_only_a_training_forward_draws():
    model = tiny_models.build("llama")
    optimizer = OwLore(model, distribution="uniform", blocks=1, rank=2, gradient="dense")
    with torch.no_grad():
        model(**tiny_models.batch())
    model.eval()
    model(**tiny_models.batch())
    assert optimizer.active_blocks == ()
    assert all(param.requires_grad for param in model.parameters())
    model.train()
    # Trainers with a fused loss call the inner model.
    model.model(input_ids=tiny_models.batch()["input_ids"])
    assert len(optimizer.active_blocks) == 1


def test_weight_norms_are_those_of_the_linear_weights():
    for name in ("llama", "gpt2", "qwen2-moe"):
        model = tiny_models.build(name)
        path = EXPECTED[name]["path"]
        linear = expected_roles(name)["blocks"]
        want = [0.0] * tiny_models.BLOCKS
        for key, value in model.state_dict().items():
            if key in linear:
                want[block_of(key, path)] += value.double().square().sum().item()
        found = blocks.weight_norms(blocks.find_layout(model))
        assert found == pytest.approx([square**0.5 for square in want], rel=1e-6)
