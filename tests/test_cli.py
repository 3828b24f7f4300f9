"""The command line from end to end, on a model that trains in a second."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_model
import torch

from owlore import OutlierScores, OwLoreConfig
from owlore.cli import main
from owlore.outliers import choose_threshold

Run = Callable[..., int]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and training rows."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model.save(folder / "model")
    tiny_model.write_rows(folder / "rows.jsonl", tiny_model.sums(40))
    return folder


@pytest.fixture
def words(base: Path, tmp_path: Path) -> list[str]:
    """A command line that trains in a second."""
    options = {
        "data": base / "rows.jsonl", "out": tmp_path / "run", "eval-rows": 8, "max-steps": 8,
        "batch-size": 4, "max-length": 64, "device": "cpu", "lr": 0.01, "blocks": 2, "rank": 4,
        "interval": 3, "calibration-rows": 8,
    }  # fmt: skip
    found = ["train", str(base / "model")]
    for name, value in options.items():
        found += [f"--{name}", str(value)]
    return found


def read(folder: Path) -> dict[str, Any]:
    run: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_train_leaves_a_folder_to_hand_on(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--tensorboard", "--eval-every", "4"]) == 0
    out = tmp_path / "run"
    assert sorted(p.name for p in out.iterdir()) == [
        "loss.png", "model", "report.html", "run.json", "scores.json", "scores.png",
        "tensorboard", "visits.png",
    ]  # fmt: skip
    run = read(out)
    assert run["status"] == "finished"
    assert run["steps"] == 8
    assert run["loss"]["after"] < run["loss"]["before"]
    assert [entry["step"] for entry in run["loss"]["held_out"]] == [0, 4, 8]
    assert [entry["step"] for entry in run["loss"]["training"]] == list(range(1, 9))
    assert [step for step, _ in run["draws"]] == [0, 3, 6]
    assert all(len(set(blocks)) == 2 for _, blocks in run["draws"])
    assert sum(run["probabilities"]) == pytest.approx(1)
    assert run["scores"] == OutlierScores.load(out / "scores.json").scores
    account = run["memory"]["bytes"]
    model = tiny_model.model()
    assert account["weights"] == sum(4 * p.numel() for p in model.parameters())
    assert all(account[part] > 0 for part in ("gradients", "moments", "basis", "activations"))
    planned = run["memory"]["planned"]["bytes"]
    # The dearest draw was planned for, and here every block is as large as the next.
    assert [planned[part] for part in ("moments", "basis")] == [
        account["moments"],
        account["basis"],
    ]
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert planned["weights"] <= account["weights"] + 4 * buffers + 256
    # The numbers on the screen are those in the file.
    printed = capsys.readouterr().out
    assert f"{run['loss']['before']:.4f} -> {run['loss']['after']:.4f}" in printed
    assert "steps     1 to     3" in printed
    assert str(out / "report.html") in printed
    # The checkpoint is an ordinary one, and is the model whose loss was reported.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from owlore.data import Collator, read_jsonl, split, tokenize
    from owlore.finetune import held_out_loss

    loaded = AutoModelForCausalLM.from_pretrained(out / "model")
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    rows = split(read_jsonl(run["options"]["data"]), 8, seed=0)[1]
    data = tokenize(rows, tokenizer, 64)
    loss = held_out_loss(loaded, data.examples, Collator.of(tokenizer), 3)
    assert loss == pytest.approx(run["loss"]["after"], abs=1e-5)
    assert loaded.config.use_cache == model.config.use_cache
    assert f"{run['loss']['after']:.4f} after" in (out / "model" / "README.md").read_text()
    # The logs hold what the optimizer did.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert "train/loss" in tags
    block = next(tag for tag in tags if tag.endswith("block/00"))
    expected = [float(0 in blocks) for _, blocks in run["draws"] for _ in range(3)][:8]
    assert [event.value for event in events.Scalars(block)] == expected


def test_the_held_out_loss_is_the_mean_over_tokens(base: Path) -> None:
    from owlore.data import Collator, read_jsonl, tokenize
    from owlore.finetune import held_out_loss

    model, tokenizer = tiny_model.model(), tiny_model.tokenizer()
    data = tokenize(read_jsonl(base / "rows.jsonl")[:7], tokenizer, 64)
    total, count = 0.0, 0
    with torch.no_grad():
        for example in data.examples:
            ids = torch.tensor([example["input_ids"]])
            logp = model(ids).logits.double().log_softmax(-1)[0]
            for t, label in enumerate(example["labels"][1:]):
                if label != -100:
                    total -= float(logp[t, label])
                    count += 1
    for batch_size in (1, 3, 7):
        loss = held_out_loss(model, data.examples, Collator.of(tokenizer), batch_size)
        assert loss == pytest.approx(total / count, rel=1e-6)


def test_activations_are_the_bytes_kept_for_backward() -> None:
    from owlore.finetune import _SavedBytes

    layer = torch.nn.Linear(3, 5)
    saved = _SavedBytes(layer)
    x = torch.randn(7, 3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        y = layer(x)
        (y.exp() * y).sum().backward()
    # The input, the output and its exponential, each once; the weight does not count.
    assert saved.bytes == 4 * (7 * 3 + 7 * 5 + 7 * 5)


@pytest.mark.parametrize("stop", [2, 5])
def test_a_stopped_run_resumes_to_the_same_bits(
    words: list[str], tmp_path: Path, stop: int, capsys: pytest.CaptureFixture[str]
) -> None:
    words += ["--accumulation", "2", "--scheduler", "cosine", "--warmup", "0.2"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert main([*words, "--out", str(whole)]) == 0
    # SIGTERM at the start of a step, as a cluster sends it.
    from transformers import Trainer

    real = Trainer.training_step
    calls = 0

    def training_step(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 2 * stop - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "training_step", training_step)
        assert main([*words, "--out", str(halves)]) == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert f"stopped at step {stop} of 8" in capsys.readouterr().err
    assert read(halves)["status"] == "interrupted"
    assert not (halves / "model").exists()
    # The state of the interrupted run can be looked at.
    assert main(["report", str(halves)]) == 0
    capsys.readouterr()
    assert main(["train", "--resume", "--out", str(halves)]) == 0
    assert f"from checkpoint-{stop}\n" in capsys.readouterr().out
    first, second = weights(whole / "model"), weights(halves / "model")
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    a, b = read(whole), read(halves)
    assert a["draws"] == b["draws"]
    assert a["loss"] == b["loss"]
    assert not (halves / "checkpoints").exists()


def test_a_run_killed_while_saving_resumes_from_the_checkpoint_before(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main([*words, "--save-every", "3", "--keep-checkpoints"]) == 0
    expected = weights(out / "model")
    names = sorted(p.name for p in (out / "checkpoints").iterdir())
    assert names == ["checkpoint-3", "checkpoint-6", "checkpoint-8"]
    # As it is when the process dies while checkpoint-6 is written.
    import shutil

    shutil.rmtree(out / "model")
    shutil.rmtree(out / "checkpoints" / "checkpoint-8")
    (out / "checkpoints" / "checkpoint-6" / "trainer_state.json").unlink()
    run = read(out)
    (out / "run.json").write_text(json.dumps({**run, "status": "running"}))
    assert main(["train", "--resume", "--out", str(out)]) == 0
    assert "from checkpoint-3\n" in capsys.readouterr().out
    assert read(out)["loss"] == run["loss"]
    found = weights(out / "model")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_options_come_from_yaml_and_the_command_line_has_priority(
    base: Path, tmp_path: Path
) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(
        f"model: {base / 'model'}\ndata: {base / 'rows.jsonl'}\neval_data: {base / 'rows.jsonl'}\n"
        "eval-rows: 5\nmax_steps: 2\nlr: 1e-3\nbetas: [0.8, 0.9]\nrank: none\nblocks: all\n"
        "preset: lisa\nmax_length: 32\ndevice: cpu\ngroup_by_length: true\n"
    )
    out = str(tmp_path / "run")
    assert main(["train", "--config", str(file), "--out", out, "--blocks", "1", "--clip=0"]) == 0
    run = read(tmp_path / "run")
    expected = OwLoreConfig.preset("lisa", lr=1e-3, betas=(0.8, 0.9), blocks=1).to_dict()
    assert run["config"] == expected
    assert run["options"]["group_by_length"] is True
    assert run["options"]["clip"] == 0
    assert run["data"]["held_out_rows"] == 5
    # LISA draws without scores, so none are computed.
    assert run["scores"] is None
    assert not (tmp_path / "run" / "scores.json").exists()


def test_every_field_is_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for name in OwLoreConfig.field_names():
        assert f"--{name.replace('_', '-')} " in text


def test_memory_saving_options_train(words: list[str], tmp_path: Path) -> None:
    assert main([*words, "--dtype", "bf16", "--gradient-checkpointing", "--state", "offload"]) == 0
    run = read(tmp_path / "run")
    assert run["loss"]["after"] < run["loss"]["before"]
    assert run["memory"]["bytes"]["activations"] is None
    assert {t.dtype for t in weights(tmp_path / "run" / "model").values()} == {torch.bfloat16}


def test_outliers_writes_scores_that_train_takes(
    base: Path, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "scores.json"
    options = ["--data", str(base / "rows.jsonl"), "--out", str(file), "--plot", "--rows", "9"]
    assert main(["outliers", str(base / "model"), *options, "--threshold", "3"]) == 0
    scores = OutlierScores.load(file)
    assert len(scores.scores) == 4
    assert scores.threshold == 3
    assert scores.model == str(base / "model")
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")
    assert f"{100 * scores.scores[2]:.3f}" in capsys.readouterr().out
    assert main([*words, "--scores", str(file)]) == 0
    run = read(tmp_path / "run")
    np.testing.assert_allclose(run["scores"], scores.scores)
    assert (tmp_path / "run" / "scores.json").read_text() == file.read_text()


def test_outliers_chooses_a_threshold_and_reads_back_what_matches(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    file = tmp_path / "scores.json"
    words = ["outliers", str(base / "model"), "--data", str(base / "rows.jsonl")]
    words += ["--out", str(file), "--threshold", "auto", "--rows", "9"]
    assert main(words) == 0
    scores = OutlierScores.load(file)
    assert scores.threshold == choose_threshold(scores.table)
    monkeypatch.setattr("owlore.outliers._calibrate", None)
    assert main(words) == 0
    assert OutlierScores.load(file) == scores
    capsys.readouterr()
    assert main([*words[:-4], "--threshold", "many"]) == 2
    assert "expected a number above 0" in capsys.readouterr().err


def test_outliers_names_blocks_that_a_run_will_hardly_reach(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["outliers", str(base / "model"), "--data", str(base / "rows.jsonl"), "--plot"]
    words += ["--out", str(tmp_path / "scores.json"), "--threshold", "2", "--rows", "9"]
    # One draw of one block: at most one of four can be more likely trained than not.
    assert main([*words, "--blocks", "1", "--steps", "50"]) == 0
    assert "more likely never trained than trained in 50 steps" in capsys.readouterr().out
    assert main([*words, "--blocks", "4", "--steps", "50"]) == 0
    assert "never trained" not in capsys.readouterr().out


def test_a_preset_on_the_command_line_goes_before_the_file(
    words: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("blocks: 1\nrank: 4\ninterval: 7\nlr: 0.002\n")
    arguments = [
        *_without(words, "--blocks", "--rank", "--interval", "--lr"),
        "--config",
        str(file),
    ]
    assert main([*arguments, "--preset", "full"]) == 0
    config = read(tmp_path / "run")["config"]
    assert (config["blocks"], config["rank"], config["distribution"]) == ("all", None, "uniform")
    assert (config["interval"], config["lr"]) == (7, 0.002)


def test_without_a_preset_all_blocks_train_and_nothing_is_calibrated(
    words: list[str], tmp_path: Path
) -> None:
    arguments = _without(words, "--blocks")
    assert main(arguments) == 0
    run = read(tmp_path / "run")
    assert run["config"]["blocks"] == "all"
    assert run["scores"] is None
    assert not (tmp_path / "run" / "scores.json").exists()


def _without(words: list[str], *names: str) -> list[str]:
    """The words less these options and their values."""
    gone = {i + k for i, word in enumerate(words) if word in names for k in (0, 1)}
    return [word for i, word in enumerate(words) if i not in gone]


def test_report_draws_again(words: list[str], tmp_path: Path) -> None:
    assert main(words) == 0
    out = tmp_path / "run"
    before = {name: (out / name).read_bytes() for name in ("visits.png", "report.html")}
    for name in before:
        (out / name).unlink()
    assert main(["report", str(out)]) == 0
    assert {name: (out / name).read_bytes() for name in before} == before


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = f"{sys.executable} -m owlore info | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("owlore")
    assert "Traceback" not in done.stderr


def test_info_names_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    from owlore import ops

    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text
    for row in ops.backends():
        assert row["reason"] in text


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["trian"], "unknown command 'trian'; did you mean train?"),
        (["train", "--raank", "3"], "unknown option --raank; did you mean --rank?"),
        (["train", "--embed", "full"], "unknown option --embed; did you mean --embeddings?"),
        (["train", "m", "extra"], "unexpected argument 'extra'"),
        (["train", "--rank"], "--rank: expected one argument"),
        (["train"], "MODEL is missing"),
        (["train", "m"], "--data FILE is missing"),
        (["train", "m", "--data", "d"], "--out FOLDER is missing"),
        (["train", "--rank", "many"], "--rank: expected a whole number or none, got 'many'"),
        (["train", "--lr", "fast"], "--lr: expected a number, got 'fast'"),
        (["train", "--betas", "0.9,x"], "--betas: expected numbers"),
        (["train", "--preset", "lizza"], "did you mean lisa?"),
        (["train", "--resume"], "--resume needs --out"),
        (["train", "--config", "nothing.yaml"], "nothing.yaml: No such file"),
        (["outliers", "m"], "--data, --out"),
        (["outliers", "m", "--data", "d", "--out", "no/such/s.json"], "no/such does not exist"),
        (["outliers", "m", "--data", "d", "--out", "s", "--rows", "0"], "--rows: expected"),
        (["report", "nothing"], "nothing holds no run"),
        (["info", "--json"], "unknown option --json"),
    ],
)  # fmt: skip
def test_wrong_command_lines(
    options: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if options[0] == "train" and "missing" not in reason and "m" not in options:
        options = [*options, "m", "--data", "d", *([] if "--resume" in options else ["--out", "o"])]
    if options[1:2] == ["--rank"] and "argument" in reason:
        options = ["train", "--rank"]
    assert main(options) == 2
    message = capsys.readouterr().err
    assert reason in message
    assert message.startswith("owlore")
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"rank": "0"}, "rank: expected a whole number >= 1"),
        ({"blocks": "9"}, "blocks: expected at most 4"),
        ({"side": "lfet"}, "did you mean 'left'?"),
        ({"scheduler": "linaer"}, "did you mean 'linear'?"),
        ({"batch-size": "0"}, "batch_size: expected a whole number >= 1, got 0"),
        ({"epochs": "-1"}, "epochs: expected a number above 0"),
        ({"epochs": "inf"}, "epochs: expected a number above 0"),
        ({"max-length": "1"}, "max_length: expected a whole number >= 2"),
        ({"eval-rows": "40"}, "cannot hold out 40 of 40 rows"),
        ({"scores": "nothing.json"}, "nothing.json"),
        ({"scores": "1,2"}, "scores: expected 4 numbers"),
        ({"data": "nothing.jsonl"}, "nothing.jsonl: no such file"),
        ({"distribution": "outlierr"}, "did you mean 'outlier'?"),
    ],
)
def test_wrong_values_leave_no_folder(
    words: list[str],
    options: dict[str, str],
    reason: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in options.items():
        words += [f"--{name}={value}"]
    assert main(words) == 2
    message = capsys.readouterr().err
    assert reason in message
    assert len(message.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("rnak: 3\n", "options.yaml: unknown key 'rnak'; did you mean rank?"),
        ("rank: [\n", "options.yaml, line 2"),
        ("- rank\n", "expected a mapping"),
        ("interval: often\n", "interval: expected a whole number, got 'often'"),
        ("resume: maybe\n", "resume: expected true or false, got 'maybe'"),
    ],
)
def test_wrong_yaml(
    words: list[str],
    content: str,
    reason: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(content)
    words = [w for i, w in enumerate(words) if "--interval" not in words[max(0, i - 1) : i + 1]]
    assert main([*words, "--config", str(file)]) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_models_and_rows_that_are_not_there(
    words: list[str], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(tmp_path / "gone"), *words[2:]]) == 2
    assert "gone does not exist: no such file or folder" in capsys.readouterr().err
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"}\n{"text": \n')
    assert main([*words, "--data", str(broken)]) == 2
    assert "broken.jsonl, line 2: not valid JSON" in capsys.readouterr().err
    broken.write_text("")
    assert main([*words, "--data", str(broken)]) == 2
    assert "broken.jsonl: the file is empty" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_something_is_left_alone(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert main(words) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main([*words, "--resume"]) == 2
    assert "holds no run" in capsys.readouterr().err
    (out / "notes.txt").unlink()
    assert main(words) == 0
    before = (out / "run.json").read_bytes()
    assert main(words) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main(["train", "--resume", "--out", str(out)]) == 2
    assert "is finished" in capsys.readouterr().err
    assert (out / "run.json").read_bytes() == before
    # Another learning rate would be another run.
    (out / "run.json").write_text(json.dumps({**json.loads(before), "status": "running"}))
    assert main(["train", "--resume", "--out", str(out), "--lr", "0.5"]) == 2
    assert "lr was 0.01 when the run was started" in capsys.readouterr().err
    assert main([*words, "--out", str(out / "run.json")]) == 2
    assert "is a file" in capsys.readouterr().err


def test_the_module_is_a_program(tmp_path: Path) -> None:
    def run(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "owlore", *options],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[1],
            check=False,
        )

    wrong = run("train", "--blokcs", "3")
    assert wrong.returncode == 2
    assert wrong.stderr == (
        "owlore train: error: unknown option --blokcs; did you mean --blocks? "
        "(see owlore train --help)\n"
    )
    assert run().returncode == 2
    overview = run("--help")
    assert overview.returncode == 0
    assert "owlore outliers" in overview.stdout
