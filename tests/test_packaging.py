"""What a wheel, an sdist and a bare checkout contain, and the name `kernels` left to others."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PROBE = "owlore_packaging_probe"


def run(*command: str, cwd: Path, **environment: str) -> str:
    # A stray PYTHONPATH must not lend the module under test.
    base = {"PATH": "/usr/bin:/bin", "HOME": str(cwd), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        command, cwd=cwd, env=base | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources with one more kernel file, so that nothing is built in the tree."""
    copy = tmp_path_factory.mktemp("checkout") / "owlore"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy / name)
    skip = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in ("owlore", "kernels", "csrc"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=skip)
    (copy / "kernels" / f"{PROBE}.py").write_text("VALUE = 41\n")
    return copy


def build(checkout: Path, kind: str) -> Path:
    out = checkout.parent / kind
    script = f"from setuptools import build_meta as b; print(b.build_{kind}({str(out)!r}))"
    out.mkdir()
    run(sys.executable, "-c", script, cwd=checkout, OWLORE_BUILD_EXT="0")
    (result,) = out.iterdir()
    return result


@pytest.fixture(scope="module")
def wheel(checkout: Path) -> Path:
    return build(checkout, "wheel")


def test_wheel_ships_the_package_and_no_top_level_kernels(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.name.endswith("-py3-none-any.whl")
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"owlore"}
    assert "owlore/py.typed" in names
    assert f"owlore/kernels/{PROBE}.py" in names
    assert {path.name for path in (ROOT / "owlore").glob("*.py")} <= {
        name.removeprefix("owlore/") for name in names
    }
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any("tests/" in name or name.endswith((".cpp", ".cu")) for name in names)


def test_wheel_imports_from_elsewhere(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    script = f"""
import owlore
from owlore.kernels import {PROBE} as probe
assert owlore.__file__.startswith({str(site)!r}), owlore.__file__
assert probe.__file__.startswith({str(site)!r}) and probe.VALUE == 41
try:
    import kernels
except ImportError:
    print("fine")
"""
    assert run(sys.executable, "-c", script, cwd=tmp_path, PYTHONPATH=str(site)) == "fine\n"


def test_sdist_builds_the_same_wheel(checkout: Path, wheel: Path, tmp_path: Path) -> None:
    sdist = build(checkout, "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path)
    (unpacked,) = tmp_path.iterdir()
    assert {path.name for path in (ROOT / "csrc").iterdir()} == {
        path.name for path in (unpacked / "csrc").iterdir()
    }
    again = build(unpacked, "wheel")
    assert zipfile.ZipFile(again).namelist() == zipfile.ZipFile(wheel).namelist()


def test_kernels_link_is_relative_and_has_no_init() -> None:
    link = ROOT / "owlore" / "kernels"
    assert link.is_symlink()
    assert str(link.readlink()) == "../kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("safe_path", ["", "1"])
def test_transformers_imports_llama_from_the_repository_root(safe_path: str) -> None:
    # With a package named `kernels` in sight, transformers takes it for Hugging Face's and fails.
    script = "from transformers import LlamaForCausalLM; import owlore; print('fine')"
    out = run(
        sys.executable, "-c", script, cwd=ROOT, PYTHONSAFEPATH=safe_path, PYTHONPATH=str(ROOT)
    )
    assert out.endswith("fine\n")


def test_one_version() -> None:
    import owlore

    text = (ROOT / "pyproject.toml").read_text(encoding="utf8")
    assert re.search(r'^version = "(.+)"$', text, re.M)[1] == owlore.__version__
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf8"), re.M)[1]
    assert newest == owlore.__version__


def configure(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "out"],
        cwd=checkout,
        env={"PATH": "/usr/bin:/bin", "HOME": str(checkout)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_failed_extension_falls_back_or_is_loud(checkout: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(checkout, broken, symlinks=True)
    (broken / "csrc" / "column_sq_norm.cpp").write_text("#error broken on purpose\n")
    quiet = configure(broken)
    assert quiet.returncode == 0, quiet.stderr
    assert "THE EXTENSION DID NOT BUILD" in quiet.stderr
    assert "OWLORE_BUILD_EXT=1" in quiet.stderr
    loud = configure(broken, OWLORE_BUILD_EXT="1")
    assert loud.returncode != 0
    wrong = configure(broken, OWLORE_BUILD_EXT="yes")
    assert "OWLORE_BUILD_EXT must be 0, 1 or unset, got 'yes'" in wrong.stderr


def test_cuda_architectures_follow_the_toolkit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("setuptools.setup", lambda **settings: None)
    default_cuda_archs = runpy.run_path(str(ROOT / "setup.py"))["default_cuda_archs"]
    assert default_cuda_archs("13.0") == "8.0;8.6;8.9;9.0;10.0+PTX"
    assert default_cuda_archs("12.4") == "8.0;8.6;8.9;9.0+PTX"


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_extension_is_one_stable_binary(checkout: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(checkout, tree, symlinks=True)
    built = configure(tree, OWLORE_BUILD_EXT="1", MAX_JOBS="1")
    assert built.returncode == 0, built.stderr[-3000:]
    (library,) = (tree / "out").glob("**/*.so")
    assert library.name == "_C.abi3.so"
    script = f"import torch; torch.ops.load_library({str(library)!r}); print('fine')"
    assert run(sys.executable, "-c", script, cwd=tmp_path) == "fine\n"
    assert torch.version.cuda or b"libcudart" not in library.read_bytes()
