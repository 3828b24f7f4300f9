"""What the README says of options and commands is what the code has."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

from owlore.config import PRESETS, OwLoreConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def rows() -> dict[str, str]:
    """Option and default of each row of the table of options."""
    table = README.split("## Options")[1].split("\n## ")[0]
    found: dict[str, str] = {}
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        if line.startswith("| `"):
            names = re.findall(r"`([^`]+)`", cells[0])
            defaults = re.findall(r"`([^`]+)`", cells[1])
            assert len(names) == len(defaults), line
            found.update(zip(names, defaults, strict=True))
    return found


def test_the_table_names_every_option_with_its_default():
    found = rows()
    fields = {entry.name: entry.default for entry in dataclasses.fields(OwLoreConfig)}
    assert set(found) == set(fields)
    for name, text in found.items():
        # The README is ours: its cells are Python literals.
        assert eval(text) == fields[name], name


def test_every_preset_is_named():
    assert set(re.findall(r"`(\w+)` \(", README.split("Presets,")[1])) == set(PRESETS)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    named = {t for line in re.findall(r"\bmake ([a-z -]+)", README) for t in line.split()}
    named &= {"finetune", "test", "test-gpu", "lint", "types", "bench", "help", "figures"}
    assert {"finetune", "test"} <= named
    assert named <= targets


def test_tables_are_those_of_the_committed_results():
    command = [sys.executable, str(ROOT / "benchmarks" / "figures.py"), "--check"]
    env = os.environ | {"PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stdout + done.stderr


def test_files_that_are_linked_exist():
    for link in re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", README):
        target = (link[0] or link[1]).partition("#")[0]
        if not target.startswith("http"):
            assert (ROOT / target).is_file(), target


def test_the_five_lines_run(tiny_llama):
    """The example of the README, on a tiny model."""
    import torch

    code = README.split("## In your own loop")[1].split("```python")[1].split("```")[0]
    scope = {
        "model": tiny_llama,
        "loader": [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 64, (3, 2, 9))],
    }
    before = tiny_llama.model.layers[0].mlp.up_proj.weight.detach().clone()
    exec(code, scope)
    assert scope["optimizer"].steps == 3
    assert not torch.equal(before, tiny_llama.model.layers[0].mlp.up_proj.weight)
