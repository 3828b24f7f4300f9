"""Finds the decoder blocks of a Hugging Face model and sorts its parameters into roles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

# What wrappers add to parameter names; without it names, and the random bits keyed by them, stay.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

# Parameters whose gradients are the low-rank gradient and the sketch of a layer
# (`owlore.projected`).
COORDINATES, SKETCH = "owlore_coordinates", "owlore_sketch"
BLOCKS, BLOCK_NORMS = "blocks", "block_norms"
EMBEDDINGS, HEAD, CLASSIFIER = "embeddings", "head", "classifier"
NORM, OTHER = "norm", "other"
ROLES = (BLOCKS, BLOCK_NORMS, EMBEDDINGS, HEAD, CLASSIFIER, NORM, OTHER)


@dataclass(frozen=True, eq=False)
class Entry:
    """One parameter and its place in the model.

    Attributes:
        name: Qualified name without wrappers' prefixes.
        param: The parameter.
        role: One of ROLES: the blocks' linear weights, the blocks' norms and biases, embeddings,
            LM head, the head of a model that classifies, final norm, and what fits no scheme.
        block: Index of the decoder block, or None outside the blocks.
        transposed: Whether the weight is stored [in, out] (GPT-2's Conv1D).
        siblings: Key of the linear layers that may read the same input: parent module, in features.
        module: The one module whose `weight` it is, or None.
    """

    name: str
    param: nn.Parameter
    role: str
    block: int | None = None
    transposed: bool = False
    siblings: tuple[str, int] | None = None
    module: nn.Module | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Out and in features [m, n] of a linear weight."""
        m, n = self.param.shape
        return (n, m) if self.transposed else (m, n)


@dataclass(frozen=True, eq=False)
class Layout:
    """A model as OwLore sees it.

    Attributes:
        blocks_path: Name of the block list in the model.
        owner: The module that holds the block list; its forward runs the blocks.
        blocks: The decoder blocks.
        entries: Every parameter once, in the model's order.
        tied: Whether LM head and embedding share one weight.
    """

    blocks_path: str
    owner: nn.Module
    blocks: tuple[nn.Module, ...]
    entries: tuple[Entry, ...]
    tied: bool


def clean_name(name: str) -> str:
    """A parameter's name without the prefixes that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and torch.compile wrappers."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def _is_conv1d(module: nn.Module) -> bool:
    # transformers.pytorch_utils.Conv1D (or ours in its place), without importing transformers.
    return any(kind.__name__ == "Conv1D" for kind in type(module).__mro__) and hasattr(module, "nf")


def linear_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """Linear layers below a module.

    Yields:
        Name, layer, and whether its weight is stored [in, out].
    """
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear):
            yield name, child, False
        elif _is_conv1d(child):
            yield name, child, True


def find_blocks(model: nn.Module, blocks_path: str | None = None) -> tuple[str, nn.ModuleList]:
    """Finds the list of decoder blocks.

    It is the outermost `nn.ModuleList` whose children all hold linear layers. Where there are
    several (a vision tower), the one as long as the text config's num_hidden_layers. An encoder
    beside a decoder is never guessed at.

    Args:
        model: A Hugging Face model, or any module built like one.
        blocks_path: Name of the list, where the search does not find it.

    Returns:
        Name and list.

    Raises:
        ValueError: There is no such list, or more than one fits.
    """
    if blocks_path is not None:
        modules = dict(model.named_modules())
        found = {clean_name(name): module for name, module in modules.items()}.get(blocks_path)
        if not isinstance(found, nn.ModuleList) or len(found) == 0:
            raise ValueError(
                f"blocks_path: expected the name of a non-empty nn.ModuleList, got {blocks_path!r}"
            )
        return blocks_path, found
    candidates: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in candidates)
        if inside or not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        if all(next(linear_layers(child), None) for child in module):
            candidates[name] = module
    if len(candidates) > 1:
        config = getattr(model, "config", None)
        # T5 and BART call the number of encoder layers num_hidden_layers.
        if not getattr(config, "is_encoder_decoder", False):
            if config is not None and hasattr(config, "get_text_config"):
                config = config.get_text_config()
            length = getattr(config, "num_hidden_layers", None)
            fitting = {name: blocks for name, blocks in candidates.items() if len(blocks) == length}
            candidates = fitting or candidates
    if len(candidates) != 1:
        what = f"several lists fit: {', '.join(candidates)}" if candidates else "none was found"
        raise ValueError(
            f"model: expected one list of decoder blocks in {type(model).__name__}, but {what}; "
            "name it with blocks_path (for example 'model.layers')"
        )
    name, blocks = next(iter(candidates.items()))
    return clean_name(name), blocks


def find_lm_head(model: nn.Module) -> nn.Module | None:
    """The layer that gives a language model's logits, or None."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else getattr(model, "lm_head", None)
    return head if isinstance(head, nn.Module) else None


def _classifies(head: nn.Module, embeddings: nn.Module | None) -> bool:
    """Whether a head that was put in the LM head's place gives far fewer numbers than tokens."""
    tokens, outputs = getattr(embeddings, "num_embeddings", 0), getattr(head, "out_features", None)
    return isinstance(outputs, int) and 2 * outputs < tokens


def _classifiers(model: nn.Module) -> list[nn.Module]:
    """The heads of a model that classifies (score, classifier, qa_outputs)."""
    return [child for child in model.children() if isinstance(child, nn.Linear)]


def _token_embeddings(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_input_embeddings", None)
    try:
        found = None if getter is None else getter()
    except NotImplementedError:
        return None
    return found if isinstance(found, nn.Module) else None


def _embedding_modules(model: nn.Module, owner: nn.Module) -> Iterator[nn.Module]:
    found = _token_embeddings(model)
    if found is not None:
        yield found
    # Position embeddings (GPT-2's wpe, OPT's embed_positions) stand beside the block list.
    for module in owner.modules():
        if isinstance(module, nn.Embedding):
            yield module


def find_layout(model: nn.Module, blocks_path: str | None = None) -> Layout:
    """Sorts every parameter of a model into a role.

    Args:
        model: A Hugging Face decoder, or any module built like one.
        blocks_path: Name of the block list, where the search does not find it.

    Returns:
        The layout.

    Raises:
        ValueError: The blocks cannot be found, or none of them has a floating-point linear weight.
    """
    model = unwrap(model)
    path, blocks = find_blocks(model, blocks_path)
    owner = model.get_submodule(_parent(_raw_path(model, blocks)))
    names: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(name)
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, param in module.named_parameters(recurse=False):
            holders.setdefault(id(param), []).append((module, attribute))
    block_of: dict[int, set[int]] = {}
    linear: dict[int, tuple[bool, str, int]] = {}
    for index, block in enumerate(blocks):
        for param in block.parameters():
            block_of.setdefault(id(param), set()).add(index)
        for name, layer, transposed in linear_layers(block):
            weight = layer.weight
            if isinstance(weight, nn.Parameter) and weight.dim() == 2:
                features = weight.shape[0 if transposed else 1]
                linear[id(weight)] = (transposed, f"{index}.{_parent(name)}", features)
    embeddings = {id(p) for module in _embedding_modules(model, owner) for p in module.parameters()}
    lm_head = find_lm_head(model)
    heads = _classifiers(model) if lm_head is None else [lm_head]
    classifies = lm_head is None or _classifies(lm_head, _token_embeddings(model))
    head_role = CLASSIFIER if classifies else HEAD
    head_params = {id(p) for head in heads for p in head.parameters()}
    owned = {id(p) for p in owner.parameters()}

    entries = []
    for _, param in model.named_parameters():
        key = id(param)
        name = clean_name(names[key][0])
        if name.rpartition(".")[2] in (COORDINATES, SKETCH):
            continue
        inside = block_of.get(key, set())
        held = [holder for holder, attribute in holders[key] if attribute == "weight"]
        only = held[0] if len(holders[key]) == len(held) == 1 else None
        if not param.is_floating_point() or len(inside) > 1:
            # Quantised weights cannot train; a weight shared by blocks belongs to none of them.
            entries.append(Entry(name, param, OTHER))
        elif inside:
            index = next(iter(inside))
            if key in linear:
                transposed, parent, features = linear[key]
                siblings = (parent, features)
                entries.append(Entry(name, param, BLOCKS, index, transposed, siblings, only))
            else:
                role = BLOCK_NORMS if param.dim() <= 1 else OTHER
                entries.append(Entry(name, param, role, index))
        elif key in embeddings:
            entries.append(Entry(name, param, EMBEDDINGS, module=only))
        elif key in head_params:
            entries.append(Entry(name, param, head_role, module=only))
        elif key in owned and param.dim() <= 1:
            entries.append(Entry(name, param, NORM))
        else:
            entries.append(Entry(name, param, OTHER))
    if not any(entry.role == BLOCKS for entry in entries):
        raise ValueError(
            f"model: no linear layer with floating-point weights of one block in {path}; OwLore "
            "cannot train quantised models, nor blocks that share all their weights"
        )
    tied = bool(embeddings & head_params)
    return Layout(path, owner, tuple(blocks), tuple(entries), tied)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _raw_path(model: nn.Module, target: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is target)


def inputs_need_no_gradient(model: nn.Module) -> bool:
    """Whether transformers asks for a gradient of the embeddings that checkpointing can do without.

    With activation checkpointing transformers makes the embeddings' output require a gradient, so
    that backward runs through every block. Only reentrant checkpointing needs that.
    """
    if not getattr(model, "_require_grads_hooks", None):
        return False
    functions = [
        getattr(module, "_gradient_checkpointing_func", None) for module in model.modules()
    ]
    found = [function for function in functions if function is not None]
    reentrant = [getattr(f, "keywords", {}).get("use_reentrant", True) for f in found]
    return bool(found) and not any(reentrant)


def weight_norms(layout: Layout) -> list[float]:
    """Frobenius norm of each block's linear weights.

    Returns:
        One norm for each block. [L]
    """
    squares = [0.0] * len(layout.blocks)
    with torch.no_grad():
        for entry in layout.entries:
            if entry.role == BLOCKS and entry.block is not None:
                norm = torch.linalg.vector_norm(entry.param, dtype=torch.float32)
                # Of a weight that FSDP2 spreads over ranks, each rank has the norm of its part.
                norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
                squares[entry.block] += float(norm) ** 2
    return [square**0.5 for square in squares]
