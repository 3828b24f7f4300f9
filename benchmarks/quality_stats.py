"""Means, paired differences and intervals of the quality tables, from their rows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Sequence
from typing import Any

__all__ = [
    "accuracy", "best_rates", "interval", "paired", "score", "summarise", "t_quantile",
]  # fmt: skip

Row = dict[str, Any]
Interval = tuple[float, float, float]
# Methods that are alike but for the distribution of the blocks.
DRAWING = ("owlore", "uniform", "reverse", "decrease")


def accuracy(
    likelihoods: Sequence[float],
    lengths: Sequence[int],
    counts: Sequence[int],
    labels: Sequence[int],
) -> list[bool]:
    """Whether the right answer has the highest likelihood per character.

    Args:
        likelihoods: Log-likelihood of each answer, question by question.
        lengths: Characters of each answer.
        counts: Number of answers of each question.
        labels: The right answer of each question.

    Returns:
        One value a question; of equal likelihoods the first counts.
    """
    right, start = [], 0
    for count, label in zip(counts, labels, strict=True):
        scores = [likelihoods[i] / max(1, lengths[i]) for i in range(start, start + count)]
        right.append(scores.index(max(scores)) == label)
        start += count
    return right


def _t_within(t: float, df: int) -> float:
    """P(|T| < t) of Student's distribution (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(df))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    if df % 2 == 0:
        total = term = 1.0
        for k in range(1, df // 2):
            term *= square * (2 * k - 1) / (2 * k)
            total += term
        return sine * total
    total = term = math.cos(angle) if df > 1 else 0.0
    for k in range(1, (df - 1) // 2):
        term *= square * (2 * k) / (2 * k + 1)
        total += term
    return 2 / math.pi * (angle + sine * total)


def t_quantile(df: int, level: float = 0.95) -> float:
    """Half width, in standard errors, of a two-sided interval with df degrees of freedom."""
    low, high = 0.0, 1e4
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_within(middle, df) < level else (low, middle)
    return high


def paired(mine: dict[int, float], theirs: dict[int, float]) -> Interval | None:
    """Mean difference over the seeds that both have, and the ends of its 95% interval.

    Args:
        mine: Value by seed.
        theirs: Value by seed of what it is compared with.

    Returns:
        Mean, lower end, upper end; None with fewer than two seeds in common.
    """
    differences = [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())]
    if len(differences) < 2:
        return None
    mean = statistics.mean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    half = t_quantile(len(differences) - 1) * error
    return mean, mean - half, mean + half


def interval(found: Interval | None, task: str) -> str:
    """A difference with its interval as text."""
    digits = 2 if task == "commonsense" else 4
    if found is None:
        return ""
    mean, low, high = (f"{number:+.{digits}f}" for number in found)
    return f"{mean} [{low}, {high}]"


def value(row: Row) -> float:
    """What a row is judged by: the mean accuracy in percent, or the loss."""
    return float(row["accuracy"] if row["task"] == "commonsense" else row["loss"])


def score(row: Row) -> float:
    """What a row is judged by, turned so that more is better."""
    return value(row) if row["task"] == "commonsense" else -value(row)


def best_rates(rows: Iterable[Row], task: str) -> dict[str, tuple[str, float]]:
    """Variant and learning rate of each method that did best on the validation split.

    The mean over seeds decides among the pairs of variant and rate that have the most seeds; of
    equal ones the lower rate wins.

    Returns:
        {method: (variant, learning rate)}
    """
    found: dict[tuple[str, str, float], list[float]] = {}
    for row in rows:
        if row["task"] == task and row["split"] == "validation":
            key = (row["method"], row["variant"], row["lr"])
            found.setdefault(key, []).append(score(row))
    best: dict[str, tuple[int, float, float, str]] = {}
    for (method, variant, lr), scores in sorted(found.items()):
        entry = (len(scores), statistics.mean(scores), -lr, variant)
        if method not in best or entry[:3] > best[method][:3]:
            best[method] = entry
    return {method: (variant, -minus) for method, (_, _, minus, variant) in best.items()}


def base_of(variant: str, known: Collection[str]) -> str | None:
    """The variant without its last options that is known, or "default"; None for the default."""
    options = variant.split(",")
    for count in range(len(options) - 1, 0, -1):
        if ",".join(options[:count]) in known:
            return ",".join(options[:count])
    return None if variant == "default" else "default"


def added_gib(rows: Iterable[Row], task: str, method: str, variant: str) -> float | None:
    """Peak memory over weights and batches in a plain loop; None where it was not measured.

    What a process kept of earlier runs is in both numbers. All rates train alike.
    """
    found = [
        # Adapters are there before the first step.
        row["peak_gib"] - row["start_gib"]
        + (row["trained_parameters"] / 2**28 if method in ("lora", "dora") else 0.0)
        for row in rows
        if (row["task"], row["method"], row["variant"], row["split"])
        == (task, method, variant, "memory")
    ]  # fmt: skip
    return min(found, default=None)


def summarise(
    rows: Sequence[Row],
    task: str,
    split: str,
    against: tuple[str, str] = ("full", "default"),
    timed: Sequence[Row] = (),
    fresh: Collection[int] = (),
) -> list[Row]:
    """One row for each (method, variant, lr): mean, deviation, paired differences, cost.

    Differences are seed by seed, by fresh seeds where both have them, with their 95% interval, and
    None with fewer than two seeds in common: `against`; `base`, to the same method and rate without
    the variant's last options (`base_name`); of a method that draws blocks, `uniform` and
    `reverse`, to those distributions with the same variant and rate.

    Args:
        rows: Rows of runs.
        task: The task.
        split: "validation", "fold" or "test".
        against: Method and variant of the runs that all are compared with (of several rates the
            chosen one, then the one tuned for them, the one with the most seeds, the better one).
        timed: Rows of runs that had a GPU for themselves: seconds are theirs.
        fresh: Seeds that count alone where a row of the table has them.
    """
    groups: dict[tuple[str, str, float], dict[int, Row]] = {}
    for row in rows:
        if row["task"] == task and row["split"] == split:
            key = (row["method"], row["variant"], row["lr"])
            groups.setdefault(key, {})[row["seed"]] = row

    def counted(key: tuple[str, str, float]) -> dict[int, Row]:
        """Rows by seed, without those of earlier seeds where there are fresh ones."""
        own = groups[key]
        return {seed: own[seed] for seed in own.keys() & set(fresh)} or own

    def rank(key: tuple[str, str, float]) -> tuple[bool, bool, int, float]:
        own = groups[key].values()
        chosen, tuned = (any(row.get(name) for row in own) for name in ("chosen", "tuned"))
        return chosen, tuned, len(own), statistics.mean(score(row) for row in own)

    def difference(
        key: tuple[str, str, float], other: tuple[str, str, float] | None
    ) -> Interval | None:
        if other not in groups or other is None:
            return None
        # Rows whose fresh seeds are not the other's compare by the earlier ones.
        for own in (counted(key), groups[key]):
            mine, theirs = (
                {seed: value(row) for seed, row in by_seed.items()}
                for by_seed in (own, groups[other])
            )
            found = paired(mine, theirs)
            if found is not None:
                return found
        return None

    like = [key for key in groups if key[:2] == tuple(against)]
    reference = max(like, key=rank, default=None)
    state = max((row["state_mib"] for row in groups.get(reference, {}).values()), default=0.0) \
        if reference else 0.0  # fmt: skip
    table = []
    for key in groups:
        method, variant, lr = key
        kept = counted(key)
        own = list(kept.values())
        values = [value(row) for row in own]
        known = {k[1] for k in groups if (k[0], k[2]) == (method, lr)}
        base = base_of(variant, known)
        alone = [
            row
            for row in timed
            if (row["task"], row["method"], row["variant"]) == (task, method, variant)
        ]
        draws = {
            name: difference(key, (name, variant, lr))
            if method in DRAWING and method != name
            else None
            for name in ("uniform", "reverse")
        }
        entry: Row = {
            "method": method, "variant": variant, "lr": lr, "seeds": len(own),
            "seed_range": f"{min(kept)}-{max(kept)}",
            "mean": statistics.mean(values),
            "deviation": statistics.stdev(values) if len(values) > 1 else None,
            "reference": key == reference,
            "against": difference(key, None if key == reference else reference),
            "base": difference(key, (method, base, lr)) if base else None,
            "base_name": base,
            **draws,
            "state_mib": max(row["state_mib"] for row in own),
            "added_gib": added_gib(rows, task, method, variant),
            "seconds": statistics.mean(row["seconds"] for row in alone) if alone else None,
            "trained_parameters": own[0]["trained_parameters"],
            "chosen": any(row.get("chosen") for row in own),
            "tuned": any(row.get("tuned") for row in own),
        }  # fmt: skip
        entry["state_share"] = entry["state_mib"] / state if state else None
        names = own[0].get("per_task") or {}
        entry["per_task"] = {
            name: statistics.mean(row["per_task"][name] for row in own) for name in names
        }
        table.append(entry)
    sign = 1 if task == "commonsense" else -1
    return sorted(table, key=lambda e: -sign * e["mean"])
