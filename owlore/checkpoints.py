"""What a checkpoint holds of an optimizer's state, read before the state itself is loaded."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# What `state_dict()` puts into its first group.
ENTRY = "owlore"
_GROUPS, _STATE = "param_groups", "state"
# Names under which trainers keep an optimizer's state in a checkpoint's folder.
_FILES = ("optimizer.pt", "optimizer.bin")
_FOLDERS = ("optimizer_0", "optimizer")


@dataclass(frozen=True)
class Saved:
    """What a checkpoint says of an optimizer, without the tensors' contents.

    Attributes:
        counters: The entry that `OwLore.state_dict` writes into its first group.
        states: State of each parameter by its name: numbers, and tensors without contents (on the
            meta device).
    """

    counters: dict[str, Any]
    states: dict[str, dict[str, Any]] = field(default_factory=dict)


def holds_state(folder: Path) -> bool:
    """Whether a trainer's checkpoint folder has an optimizer's state, of whatever kind."""
    return any((folder / name).exists() for name in (*_FILES, *_FOLDERS, ".metadata"))


def read(checkpoint: Any) -> Saved:
    """Reads counters, and names, shapes and dtypes of the state of an OwLore optimizer.

    Args:
        checkpoint: An optimizer's state dict (or one that holds it under some key), a file of
            one, a folder of `torch.distributed.checkpoint`, or a trainer's checkpoint folder.

    Raises:
        ValueError: It cannot be read, or OwLore did not write it.
    """
    if isinstance(checkpoint, Mapping):
        return _from_dict(checkpoint)
    path = Path(checkpoint)
    if path.is_dir():
        for name in _FILES:
            if (path / name).is_file():
                return _from_file(path / name)
        for folder in (path, *(path / name for name in _FOLDERS)):
            if (folder / ".metadata").is_file():
                return _from_distributed(folder)
        raise ValueError(
            f"checkpoint: no optimizer state in {path}: expected {', '.join(_FILES)} or the "
            ".metadata of torch.distributed.checkpoint (was saving interrupted?)"
        )
    return _from_file(path)


def _from_file(path: Path) -> Saved:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError as error:
        raise ValueError(f"checkpoint: there is no {path}") from error
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(f"checkpoint: {path} is damaged or no checkpoint: {error}") from error
    if not isinstance(loaded, Mapping):
        raise ValueError(f"checkpoint: {path} holds a {type(loaded).__name__}, no state dict")
    return _from_dict(loaded)


def _from_dict(state_dict: Mapping[str, Any]) -> Saved:
    found = _find(state_dict)
    if found is None:
        raise ValueError(
            "checkpoint: not written by OwLore: expected a dict with 'state' and 'param_groups', "
            "whose first group has an 'owlore' entry"
        )
    groups, states = found[_GROUPS], found[_STATE]
    names: dict[Any, str] = {}
    for group in groups:
        names.update(zip(group["params"], group.get("param_names", ()), strict=False))
    plain = {names.get(key, key): state for key, state in states.items()}
    return Saved(groups[0][ENTRY], {name: _empty(state) for name, state in plain.items()})


def _find(tree: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The optimizer's state dict in one, or in a dict of several things."""
    if {_GROUPS, _STATE} <= set(tree):
        groups = tree[_GROUPS]
        written = isinstance(groups, list) and groups and ENTRY in groups[0]
        return tree if written and isinstance(groups[0][ENTRY], Mapping) else None
    flat = {str(key).split(".")[0] for key in tree}
    if {_GROUPS, _STATE} <= flat:
        return _unflatten(tree)
    inside = [_find(value) for value in tree.values() if isinstance(value, Mapping)]
    return next((found for found in inside if found is not None), None)


def _unflatten(flat: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """From the keys of `StateDictOptions(flatten_optimizer_state_dict=True)`."""
    entry: dict[str, Any] = {}
    states: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        head, _, rest = str(key).partition(".")
        if head == _STATE:
            name, _, part = rest.rpartition(".")
            states.setdefault(name, {})[part] = value
        elif rest.endswith(f".{ENTRY}") and isinstance(value, Mapping):
            entry = dict(value)
        elif (place := rest.partition(f".{ENTRY}."))[1]:
            _put(entry, place[2].split("."), value)
    if not entry:
        return None
    return {_GROUPS: [{"params": [], ENTRY: entry}], _STATE: states}


def _put(tree: dict[str, Any], path: list[str], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _empty(state: Any) -> Any:
    if not isinstance(state, Mapping):
        return state
    return {
        key: torch.empty(value.shape, dtype=value.dtype, device="meta")
        if isinstance(value, Tensor)
        else value
        for key, value in state.items()
    }


def _from_distributed(folder: Path) -> Saved:
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.FileSystemReader(str(folder))
    try:
        metadata = reader.read_metadata()
    except Exception as error:
        # Unpickling damaged bytes raises nearly anything.
        raise ValueError(f"checkpoint: {folder / '.metadata'} is damaged: {error}") from error
    _check_files(folder, metadata.storage_data or {})
    keys = metadata.state_dict_metadata
    marks = re.compile(rf"^(?:(.*?)\.)?{_GROUPS}\.(?:(.*?)\.)?{ENTRY}\.steps$")
    places = [found for found in map(marks.match, keys) if found]
    if not places:
        raise ValueError(f"checkpoint: {folder} holds no optimizer state that OwLore wrote")
    prefix, middle = places[0][1], places[0][2]
    root = f"{prefix}." if prefix else ""
    # `param_groups.0.owlore`, or that of a parameter's name in a flattened state dict.
    head = ".".join(filter(None, (f"{root}{_GROUPS}", middle, ENTRY))) + "."
    numbers = {
        key: None
        for key, entry in keys.items()
        if not isinstance(entry, TensorStorageMetadata)
        and (key.startswith((head, f"{root}{_STATE}.")))
    }
    try:
        dcp.load(numbers, storage_reader=reader, no_dist=True)
    except dcp.CheckpointException as error:
        raise ValueError(f"checkpoint: {folder} is damaged: {error}") from error
    counters: dict[str, Any] = {}
    states: dict[str, dict[str, Any]] = {}
    for key, entry in keys.items():
        if key.startswith(head):
            _put(counters, key.removeprefix(head).split("."), numbers[key])
        elif key.startswith(f"{root}{_STATE}."):
            name, _, part = key.removeprefix(f"{root}{_STATE}.").rpartition(".")
            value = numbers.get(key)
            if isinstance(entry, TensorStorageMetadata):
                value = torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
            states.setdefault(name, {})[part] = value
    return Saved(counters, states)


def _check_files(folder: Path, places: Mapping[Any, Any]) -> None:
    """Raises ValueError where a file is missing or shorter than what should stand in it."""
    needed: dict[str, int] = {}
    for place in places.values():
        name = getattr(place, "relative_path", None)
        if name is not None:
            needed[name] = max(needed.get(name, 0), place.offset + place.length)
    for name, size in needed.items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"checkpoint: {file} is missing (was saving interrupted?)")
        if file.stat().st_size < size:
            raise ValueError(
                f"checkpoint: {file} is truncated: expected at least {size} bytes, got "
                f"{file.stat().st_size}"
            )
