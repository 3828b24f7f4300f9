"""Every example trains a tiny model and leaves an ordinary checkpoint."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import tiny_model
import tiny_models
import torch
from transformers import Trainer, TrainingArguments

from owlore import OwLore

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# What an example needs beside owlore's own requirements.
NEEDS = {
    "plain_pytorch": (),
    "hf_trainer": (),
    "accelerate_loop": (),
    "trl_sft": ("trl", "datasets"),
    "lightning_module": ("lightning",),
}
# What torchrun starts on several ranks.
TORCHRUN = ("torchrun_fsdp2",)


def test_every_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*NEEDS, *TORCHRUN}


@pytest.mark.parametrize("name", [*NEEDS, *TORCHRUN])
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
    check_checkpoint(base / "model", out)


@pytest.mark.parametrize("name", TORCHRUN)
def test_example_trains_on_two_ranks(name: str, base: Path, tmp_path: Path) -> None:
    (tmp_path / "scores.json").write_text("[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]")
    out = tmp_path / "out"
    words = [str(EXAMPLES / f"{name}.py"), str(base / "model"), str(base / "rows.jsonl"), str(out)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    subprocess.run(
        [*torchrun, "--nproc-per-node", "2", *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=120,
    )
    check_checkpoint(base / "model", out)


def test_lightning_trains_on_two_ranks(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="lightning is not installed")
    # What Lightning chooses by itself where there are two GPUs.
    example = (EXAMPLES / "lightning_module.py").read_text()
    start = tmp_path / "start.py"
    call = "lightning.Trainer("
    assert call in example
    start.write_text(example.replace(call, f"{call}accelerator='cpu', devices=2, strategy='ddp', "))
    out = tmp_path / "out"
    subprocess.run(
        [sys.executable, str(start), str(base / "model"), str(base / "rows.jsonl"), str(out)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=120,
    )
    check_checkpoint(base / "model", out)


def check_checkpoint(start: Path, out: Path) -> None:
    """The linear weights of five of the six blocks moved, and nothing else did."""
    from transformers import AutoModelForCausalLM

    before, after = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (start, out)
    )
    assert list(after) == list(before)
    moved = {key for key in after if not torch.equal(after[key], before[key])}
    # Five of six blocks at a time and one draw in so few steps.
    blocks = {key.split(".")[2] for key in moved if ".layers." in key}
    assert len(blocks) == 5
    for block in blocks:
        assert sum(f".{block}." in key and "_proj.weight" in key for key in moved) == 7
    assert len(moved) == 5 * 7


# docs/trainers.md: the plug-in points of trainers that are not installed here. What stands in for
# them is as much of LLaMA-Factory 0.9.5 and Axolotl 0.19.0 as the lines there touch.


def lines_of(section: str, kind: str = "python") -> str:
    """The first block of code of a kind in a section of docs/trainers.md."""
    text = (EXAMPLES.parent / "docs" / "trainers.md").read_text(encoding="utf-8")
    found = re.search(rf"## {section}\n.*?```{kind}\n(.*?)```", text, flags=re.DOTALL)
    assert found is not None
    return found.group(1)


@pytest.fixture
def owlore_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The options file of docs/trainers.md in the working directory, for three blocks."""
    options = lines_of("The options file", "yaml")
    assert "scores: scores.json" in options
    (tmp_path / "owlore.yaml").write_text(options.replace("blocks: 5", "blocks: 2"))
    (tmp_path / "scores.json").write_text("[1.0, 2.0, 3.0]")
    monkeypatch.chdir(tmp_path)


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> ModuleType:
    """A module, and the packages above it, that importing finds."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        path = ".".join(parts[:i])
        if path not in sys.modules:
            monkeypatch.setitem(sys.modules, path, ModuleType(path))
        if i > 1:
            parent = sys.modules[".".join(parts[: i - 1])]
            monkeypatch.setattr(parent, parts[i - 1], sys.modules[path], raising=False)
    for key, value in content.items():
        setattr(sys.modules[name], key, value)
    return sys.modules[name]


def trainer_of(folder: Path, kind: type[Trainer] = Trainer) -> Trainer:
    rows = [{k: v[0] for k, v in tiny_models.batch(seed=i, rows=1).items()} for i in range(4)]
    arguments = TrainingArguments(
        str(folder / "out"), max_steps=3, per_device_train_batch_size=2, learning_rate=0.01,
        report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True,
        lr_scheduler_type="constant",
    )  # fmt: skip
    return kind(tiny_models.build("llama"), arguments, train_dataset=rows)


def check_trained(trainer: Trainer) -> None:
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert isinstance(optimizer, OwLore)
    assert optimizer.steps == 3
    assert len(optimizer.active_blocks) == 2
    assert all(group["lr"] == 0.01 for group in optimizer.param_groups)


@pytest.mark.usefixtures("owlore_yaml")
def test_axolotl_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "axolotl.integrations.base", BasePlugin=object)
    names: dict[str, Any] = {}
    exec(lines_of("Axolotl"), names)
    trainer = trainer_of(tmp_path)
    names["OwLorePlugin"]().post_trainer_create(SimpleNamespace(), trainer)
    trainer.train()
    check_trained(trainer)


@pytest.mark.usefixtures("owlore_yaml")
def test_llama_factory_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = stand_in(monkeypatch, "llamafactory.train.sft.trainer", create_custom_optimizer=None)

    class CustomSeq2SeqTrainer(Trainer):
        def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
            if self.optimizer is None:
                self.optimizer = module.create_custom_optimizer(self.model, self.args, None)
            return super().create_optimizer(*args, **kwargs)

    ran = []

    def run_exp() -> None:
        ran.append(trainer_of(tmp_path, CustomSeq2SeqTrainer))
        ran[0].train()

    stand_in(monkeypatch, "llamafactory.train.tuner", run_exp=run_exp)
    exec(lines_of("LLaMA-Factory"), {})
    check_trained(ran[0])
