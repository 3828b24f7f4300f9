"""Pictures, report.html, model card and the atomic writing of files."""

from __future__ import annotations

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from owlore import OutlierScores, OwLoreConfig, report
from owlore.options import TrainOptions


def a_run(**changes: Any) -> dict[str, Any]:
    """The content of run.json after a made-up run of 12 steps."""
    run: dict[str, Any] = {
        "status": "finished",
        "model": {
            "name": "org/base",
            "license": "apache-2.0",
            "quantised": "Q4_1 (210)",
            "note": "dequantised from 4 bit",
        },
        "options": {**vars(TrainOptions(model="org/base", data="some/rows.jsonl", out="run"))},
        "config": OwLoreConfig(blocks=2, interval=5).to_dict(),
        "data": {
            "rows": 20,
            "tokens": 900,
            "trained_tokens": 700,
            "truncated_rows": 3,
            "dropped_rows": 1,
            "held_out_rows": 4,
            "held_out_tokens": 150,
            "held_out_truncated_rows": 0,
        },
        "loss": {
            "before": 2.0,
            "after": 1.5,
            "training": [{"step": i, "loss": 2 - i / 24} for i in range(1, 13)],
            "held_out": [{"step": 0, "loss": 2.0}, {"step": 12, "loss": 1.5}],
        },
        "versions": {"owlore": "0", "torch": "1", "transformers": "2"},
        "seconds": {"loading": 1.0, "training": 60.0},
        "steps": 12,
        "planned_steps": 12,
        "blocks": 4,
        "probabilities": [0.4, 0.3, 0.2, 0.1],
        "scores": [0.04, 0.03, 0.02, 0.01],
        "draws": [[0, [0, 1]], [5, [1, 3]], [10, [0, 2]]],
        "plan": ["a plan <line>"],
        "nonfinite": 0,
        "memory": {
            "bytes": {"weights": 2048, "gradients": 1024, "moments": 10, "activations": None},
            "peak_process_bytes": 5 * 2**30,
            "peak_cuda_bytes": None,
            "how": "measured thus",
        },
    }
    return {**run, **changes}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    report.write_json(tmp_path / "run.json", a_run())
    return tmp_path


def test_draws_become_a_raster() -> None:
    raster, edges = report.active_steps([[0, [0, 1]], [5, [1, 3]], [10, [0, 2]]], 10, 4)
    assert edges.tolist() == [0, 5, 10]
    expected = [[1, 0], [1, 1], [0, 0], [0, 1]]
    assert raster.astype(int).tolist() == expected


def test_the_page_needs_no_other_file_and_says_what_happened(folder: Path) -> None:
    path = report.write_report(folder)
    page = path.read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 3
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert 'name="viewport"' in page
    assert "2.000 &rarr; 1.500" in page
    assert "dequantised from 4 bit" in page
    assert "3 were cut to 512 tokens and 1 left out" in page
    assert "a plan &lt;line&gt;" in page
    assert "measured thus" in page
    assert "not measured" in page

    class Balance(HTMLParser):
        open: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag: str, attrs: Any) -> None:
            if tag not in ("meta", "img"):
                self.open.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    balance = Balance()
    balance.feed(page)
    assert balance.open == []


def test_a_run_without_scores_and_held_out_rows_has_a_report(tmp_path: Path) -> None:
    run = a_run(scores=None, nonfinite=7, status="interrupted", planned_steps=30)
    run["loss"] = {**run["loss"], "before": None, "after": None, "held_out": []}
    report.write_json(tmp_path / "run.json", run)
    assert "Why these blocks" in report.write_report(tmp_path).read_text()
    # Where all blocks train nothing is drawn, and no distribution has a say.
    run["config"] = OwLoreConfig(interval=5).to_dict()
    report.write_json(tmp_path / "run.json", run)
    report.write_card(tmp_path / "README.md", {**run, "loss": a_run()["loss"]})
    assert "all 4 blocks, rank 128\n" in (tmp_path / "README.md").read_text()
    page = report.write_report(tmp_path).read_text()
    assert "Why these blocks" not in page
    assert "7 matrix-steps had non-finite gradients" in page
    assert "interrupted: 12 of 30 steps" in page
    text = report.summary(run, tmp_path)
    assert "training loss  1.9583 at the first step, 1.5000 at the last" in text
    assert "7 matrix-steps" in text


def pixels(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return imread(path)


def count(path: Path, color: str) -> int:
    """Pixels of a colour."""
    from matplotlib.colors import to_rgb

    return int((np.abs(pixels(path)[..., :3] - to_rgb(color)).max(axis=-1) < 0.02).sum())


def test_pictures_show_their_data(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    report.plot_visits(path, [[0, [0]]], 10, 4)
    one = count(path, report.BLUE)
    report.plot_visits(path, [[0, [0, 1]]], 10, 4)
    # Twice the blocks, twice the blue, in both panels.
    assert count(path, report.BLUE) == pytest.approx(2 * one, rel=0.05)
    report.plot_scores(path, [0.1, 0.1, 0.1, 0.1], None)
    even = count(path, report.BLUE)
    report.plot_scores(path, [0.1, 0.0, 0.0, 0.0], None)
    assert count(path, report.BLUE) == pytest.approx(even / 4, rel=0.05)
    assert count(path, report.ORANGE) == 0
    report.plot_scores(path, None, [0.5, 0.5])
    assert count(path, report.ORANGE) > 1000
    report.plot_loss(path, [{"step": 1, "loss": 2.0}], [])
    assert count(path, report.RED) == 0
    report.plot_loss(path, [], [{"step": 0, "loss": 2.0}, {"step": 1, "loss": 1.0}])
    assert count(path, report.RED) > 100
    assert list(tmp_path.iterdir()) == [path]


def test_summary(folder: Path) -> None:
    text = report.summary(a_run(), folder, draws=2)
    assert "held-out loss  2.0000 -> 1.5000" in text
    assert "steps     1 to     5: 0 1" in text
    assert "steps     6 to    10: 1 3" in text
    assert "and 1 draws more" in text
    assert re.search(r"weights +2\.0 KiB", text)
    assert re.search(r"activations +not measured", text)
    assert str(folder / "report.html") in text
    everything = a_run(draws=[[0, [0, 1, 2, 3]]])
    assert "steps     1 to    12: all 4" in report.summary(everything, folder)


def test_the_card_states_base_data_losses_and_licence(tmp_path: Path) -> None:
    report.write_card(tmp_path / "README.md", a_run())
    card = (tmp_path / "README.md").read_text()
    import yaml

    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "org/base"
    assert front["license"] == "apache-2.0"
    assert "2.0000 before, 1.5000 after" in card
    assert "some/rows.jsonl, 20 rows" in card
    assert "dequantised from 4 bit" in card
    assert "2 of 4 blocks at a time, redrawn every 5 steps, distribution outlier" in card
    run = a_run(model={**a_run()["model"], "name": "/home/me/model", "license": "unknown"})
    report.write_card(tmp_path / "README.md", run)
    front = yaml.safe_load((tmp_path / "README.md").read_text().split("---")[1])
    assert "base_model" not in front
    assert "license" not in front


def test_folders_without_a_report(tmp_path: Path) -> None:
    with pytest.raises(report.ReportError, match="holds no run"):
        report.read_run(tmp_path)
    file = tmp_path / "run.json"
    for content, reason in (
        ('{"status": ', "damaged"),
        ("[]", "not written by owlore train"),
        ('{"status": "running"}', r"no results yet \(status: running\)"),
    ):
        file.write_text(content)
        with pytest.raises(report.ReportError, match=reason):
            report.write_report(tmp_path)


def test_an_interrupted_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.json"
    report.write_json(file, {"a": 1})
    mode = (tmp_path / "plain").write_text("") or (tmp_path / "plain").stat().st_mode
    assert file.stat().st_mode == mode

    def fail(*paths: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        report.write_json(file, {"a": 2})
    assert json.loads(file.read_text()) == {"a": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "plain"]


def test_expected_visits_of_a_planned_run() -> None:
    p = np.array([0.5, 0.25, 0.25, 0.0])
    share, never = report.expected_visits(p, 1, "sequential", steps=100, interval=30)
    np.testing.assert_allclose(share, p, atol=1e-9)
    # 100 steps of 30 are four draws, the last one cut short.
    np.testing.assert_allclose(never, (1 - p) ** 4)


def test_plot_of_scores_names_the_blocks_out_of_reach(tmp_path: Path) -> None:
    layers = {f"model.layers.{i}.mlp.{kind}": 0.01 for i in range(3) for kind in ("up", "down")}
    scores = OutlierScores([0.9, 0.1, 0.001], 5.0, layers, 10, "m")
    file = tmp_path / "scores.png"
    assert report.plot_outliers(file, scores, 1, "sequential", 100, 50) == [1, 2]
    assert file.read_bytes().startswith(b"\x89PNG")
    plan = (1, "sequential", 10**6, 50)
    assert report.plot_outliers(file, scores, *plan, weight_norms=[1.0, 2.0, 3.0]) == []
