"""Every example trains a tiny model and leaves an ordinary checkpoint."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import tiny_model
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# What an example needs beside owlore's own requirements.
NEEDS = {
    "plain_pytorch": (),
    "hf_trainer": (),
    "accelerate_loop": (),
    "trl_sft": ("trl", "datasets"),
    "lightning_module": ("lightning",),
}


def test_every_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(NEEDS)


@pytest.mark.parametrize("name", NEEDS)
def test_example_is_short(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 40


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of six blocks and training rows."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model.model(blocks=6).save_pretrained(folder / "model")
    tiny_model.tokenizer().save_pretrained(folder / "model")
    tiny_model.write_rows(folder / "rows.jsonl", tiny_model.sums(24))
    return folder


@pytest.mark.parametrize("name", NEEDS)
@pytest.mark.filterwarnings("ignore")
def test_example_trains(
    name: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in NEEDS[name]:
        pytest.importorskip(package, reason=f"{package} is not installed")
    from accelerate.state import AcceleratorState
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    out = tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    words = [f"{name}.py", str(base / "model"), str(base / "rows.jsonl"), str(out)]
    monkeypatch.setattr(sys, "argv", words)
    try:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    finally:
        # One process runs all of them.
        AcceleratorState._reset_state(reset_partial_state=True)
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (base / "model", out)
    )
    assert list(after) == list(before)
    moved = {key for key in after if not torch.equal(after[key], before[key])}
    # Five of six blocks at a time and one draw in so few steps; the embedding is frozen.
    blocks = {key.split(".")[2] for key in moved if ".layers." in key}
    assert len(blocks) == 5
    for block in blocks:
        assert sum(f".{block}." in key and "_proj.weight" in key for key in moved) == 7
    assert not any("embed_tokens" in key or "lm_head" in key for key in moved)
