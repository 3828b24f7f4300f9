"""Which decoder blocks train when: distributions over blocks and draws from them.

Pure functions; p [L] are probabilities over L blocks, gamma the number of blocks drawn at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from owlore.config import Distribution, resolve_distribution


def check_scores(scores: Sequence[float], n: int) -> np.ndarray:
    """Outlier scores as an array.

    Args:
        scores: Score of each block, >= 0. [L]
        n: Number of decoder blocks L.

    Raises:
        ValueError: Wrong length, a negative or non-finite score, or nothing but zeros.
    """
    array = np.asarray(scores, dtype=np.float64)
    if array.shape != (n,):
        raise ValueError(f"scores: expected {n} numbers, one for each block, got {array.shape}")
    if not np.isfinite(array).all() or (array < 0).any():
        raise ValueError(f"scores: expected finite numbers >= 0, got {array.tolist()}")
    if array.sum() == 0:
        raise ValueError("scores: expected at least one score above 0, got only zeros")
    return array


def probabilities(
    distribution: Distribution,
    n: int,
    scores: Sequence[float] | None = None,
    weight_norms: Sequence[float] | None = None,
    floor: float = 0.0,
) -> np.ndarray:
    """Probability of each block (OwLore, arXiv 2405.18380, section 3.2).

    `outlier` is p = D / sum(D); `reverse` gives the largest of these probabilities to the block
    with the smallest score, the second largest to the second smallest, and so on; `uniform` is LISA
    (arXiv 2403.17919); `increase` and `decrease` are linear in depth, from 1 to L and from L to 1;
    `weight_norm` follows the Frobenius norm of a block's linear weights; a function gets the scores
    (an array [L], or None) and returns L weights.

    Args:
        distribution: A name, "package.module:function" or a function.
        n: Number of decoder blocks L.
        scores: Outlier scores D. [L]
        weight_norms: Frobenius norm of each block's linear weights. [L]
        floor: Share f in p <- (1 - f) p + f / L.

    Returns:
        Probabilities that sum to 1. [L]

    Raises:
        ValueError: Scores are missing or do not fit, or a function returned no valid weights.
    """
    rule = resolve_distribution(distribution)
    given = None if scores is None else check_scores(scores, n)
    if rule in ("outlier", "reverse") and given is None:
        raise ValueError(
            f"scores: distribution={rule!r} needs the outlier score of each block; make them with "
            "`owlore outliers MODEL --data FILE --out scores.json` and pass scores='scores.json'"
        )
    if callable(rule):
        weights = np.asarray(rule(given), dtype=np.float64)
        valid = weights.shape == (n,) and np.isfinite(weights).all() and (weights >= 0).all()
        if not valid or weights.sum() == 0:
            raise ValueError(
                f"distribution: the function must return {n} finite weights >= 0, not all 0, "
                f"got {weights.tolist()}"
            )
    elif rule == "uniform":
        weights = np.ones(n)
    elif rule == "increase":
        weights = np.arange(1.0, n + 1)
    elif rule == "decrease":
        weights = np.arange(float(n), 0, -1)
    elif rule == "weight_norm":
        assert weight_norms is not None
        weights = check_scores(weight_norms, n)
    else:
        assert given is not None
        weights = given
        if rule == "reverse":
            ascending = np.argsort(given, kind="stable")
            weights = np.empty(n)
            weights[ascending] = given[ascending[::-1]]
    p = weights / weights.sum()
    return (1 - floor) * p + floor / n


def spread_rank(p: np.ndarray, rank: int) -> list[int]:
    """Spreads a rank over blocks in proportion to their probabilities.

    Ranks are multiples of 16 where the mean is one, since kernels pad to these; no block has less
    than one such multiple, and the sum of all ranks is that of even ones.

    Args:
        p: Probabilities. [L]
        rank: The mean rank.

    Returns:
        The rank of each block.
    """
    unit = 16 if rank % 16 == 0 else 1
    total = rank // unit * len(p)
    # One to each, and the rest in proportion to what a share holds above that.
    spare = np.maximum(p * total - 1, 0.0)
    if spare.sum() > 0:
        spare *= (total - len(p)) / spare.sum()
    units = np.floor(spare).astype(int)
    largest = np.argsort(units - spare, kind="stable")
    units[largest[: total - len(p) - units.sum()]] += 1
    return [unit * int(1 + extra) for extra in units]


def check_drawable(p: np.ndarray, gamma: int) -> None:
    """Raises ValueError unless gamma distinct blocks can be drawn from p."""
    if gamma > len(p):
        raise ValueError(f"blocks: expected at most {len(p)}, the model's blocks, got {gamma}")
    positive = int((p > 0).sum())
    if gamma > positive:
        raise ValueError(
            f"blocks: expected at most {positive}, the blocks with a probability above 0, got "
            f"{gamma}; lower blocks, set floor, or make new scores with `owlore outliers`"
        )


def draw(p: np.ndarray, gamma: int, seed: int, index: int, method: str) -> tuple[int, ...]:
    """Draws gamma distinct blocks; a pure function of its arguments.

    Args:
        p: Probability of each block. [L]
        gamma: Number of blocks to draw.
        seed: Seed of the run.
        index: Number of the draw, from 0.
        method: "sequential" draws one block after another, renormalising in between, as the
            authors' code does; "inclusion" includes block l with probability min(1, c p_l) exactly,
            by systematic sampling over a shuffled order.

    Returns:
        The drawn blocks, ascending.

    Raises:
        ValueError: Fewer than gamma blocks have a probability above 0, or the method is unknown.
    """
    check_drawable(p, gamma)
    rng = np.random.default_rng([seed, index])
    if method == "sequential":
        chosen = _draw_sequential(p, rng.random(gamma))
    elif method == "inclusion":
        chosen = _draw_systematic(inclusion_probabilities(p, gamma, method), rng)
    else:
        raise ValueError(f"draw: expected 'sequential' or 'inclusion', got {method!r}")
    assert len(set(chosen)) == gamma
    return tuple(sorted(chosen))


def _draw_sequential(p: np.ndarray, uniforms: np.ndarray) -> list[int]:
    left = p.copy()
    chosen = []
    for u in uniforms:
        edges = np.cumsum(left)
        # A uniform that rounds up to the last edge must not fall on a block that is gone.
        block = int(np.searchsorted(edges, u * edges[-1], side="right"))
        block = min(block, int(np.flatnonzero(left)[-1]))
        chosen.append(block)
        left[block] = 0.0
    return chosen


def _draw_systematic(inclusion: np.ndarray, rng: np.random.Generator) -> list[int]:
    # The draw order of the generator is fixed: first the shuffle's keys, then the offset.
    keys, offset = rng.random(len(inclusion)), rng.random()
    certain = np.flatnonzero(inclusion == 1.0)
    rest = np.flatnonzero((inclusion > 0) & (inclusion < 1.0))
    count = round(float(inclusion[rest].sum()))
    order = rest[np.argsort(keys[rest], kind="stable")]
    edges = np.cumsum(inclusion[order])
    if count:
        edges *= count / edges[-1]
    picks = np.searchsorted(edges, offset + np.arange(count), side="right")
    return [*certain.tolist(), *order[picks].tolist()]


def inclusion_probabilities(p: np.ndarray, gamma: int, method: str) -> np.ndarray:
    """Probability that each block is among the gamma drawn; sums to gamma.

    For "inclusion" it is min(1, c p_l). For "sequential" it follows from exponential clocks: the
    draw equals the gamma earliest of independent arrivals with rates p_l, so
    P(l) = integral of p_l exp(-p_l t) * P(fewer than gamma of the others arrived by t) dt.

    Args:
        p: Probability of each block. [L]
        gamma: Number of blocks drawn.
        method: "sequential" or "inclusion".

    Returns:
        Inclusion probabilities. [L]

    Raises:
        ValueError: Fewer than gamma blocks have a probability above 0.
    """
    check_drawable(p, gamma)
    if gamma == int((p > 0).sum()):
        return (p > 0).astype(np.float64)
    if method == "inclusion":
        return _capped(p, gamma)
    positive = np.flatnonzero(p > 0)
    result = np.zeros(len(p))
    result[positive] = _sequential_inclusion(p[positive] / p[positive].sum(), gamma)
    return result


def _capped(p: np.ndarray, gamma: int) -> np.ndarray:
    """min(1, c p) with c such that it sums to gamma."""
    capped = np.zeros(len(p), dtype=bool)
    while True:
        c = (gamma - capped.sum()) / p[~capped].sum()
        over = ~capped & (c * p >= 1.0)
        if not over.any():
            return np.where(capped, 1.0, c * p)
        capped |= over


def _sequential_inclusion(p: np.ndarray, gamma: int) -> np.ndarray:
    # t = (x / (1 - x))^3 maps (0, 1) to (0, inf) and spreads the nodes over rates that differ by
    # orders of magnitude; 2,000 Gauss-Legendre nodes give more than 8 digits.
    x, w = np.polynomial.legendre.leggauss(2000)
    x, w = (x + 1) / 2, w / 2
    t = (x / (1 - x)) ** 3
    w = w * 3 * (x / (1 - x)) ** 2 / (1 - x) ** 2
    result = np.empty(len(p))
    arrived = -np.expm1(-np.outer(p, t))  # [L, nodes]
    for block in range(len(p)):
        # counts[k]: probability that exactly k of the others arrived, k < gamma.
        counts = np.zeros((gamma, len(t)))
        counts[0] = 1.0
        for other in range(len(p)):
            if other != block:
                moved = counts[:-1] * arrived[other]
                counts *= 1 - arrived[other]
                counts[1:] += moved
        result[block] = (w * p[block] * np.exp(-p[block] * t) * counts.sum(axis=0)).sum()
    return result
