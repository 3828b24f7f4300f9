"""The runs that decide how embedding and head are trained, on four tasks.

A method's settings are: embedding and head trained like the rest, frozen, or trained at a third of
the rate (with the norms). Every setting of every method gets the same grid of rates, and one more
beyond the end of the grid where its best rate stands there. Rates, and then settings, are chosen on
rows held out of the training rows; the test rows are judged once, at each setting's own rate.
`verdict` is the rule for the default of OwLoreConfig, written before the runs.

commonsense: three folds, disjoint from one another and from the 600 rows of the earlier validation
split; seed k trains without fold k and is judged by it, and the mean of the three decides.
wikitext2, shakespeare: one seed decides the rate of a setting, two more at that rate the setting.
gsm8k: one seed, whose runs were mostly there.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import quality_stats

__all__ = [
    "PLANS", "RATES", "SETTINGS", "TABLES", "Key", "Verdict", "chosen", "jobs",
    "judged", "tuned", "tuning", "verdict",
]  # fmt: skip

# Task, method, variant, rate, seed and split: what two equal runs share.
Key = tuple[str, str, str, float, int, str]
Row = dict[str, Any]

RATES = (1e-4, 3e-4, 1e-3)
BEYOND = {1e-4: 3e-5, 1e-3: 3e-3}
FROZEN = "embeddings=freeze,head=freeze"
THIRD = "dense_lr=lr/3"
OPTIONS = {"full": "", "frozen": FROZEN, "third": THIRD}
SETTINGS: dict[str, dict[str, str]] = {
    "owlore": {
        setting: ",".join(filter(None, ("blocks=all", option)))
        for setting, option in OPTIONS.items()
    },
    **{
        method: {setting: option or "default" for setting, option in OPTIONS.items()}
        for method in ("full", "galore", "lisa", "ows")
    },
    "lora": {"full": "default"},
}


class Plan(NamedTuple):
    """How a task is tuned and tested.

    Attributes:
        split: Split that chooses.
        seeds: Seeds of all rates.
        again: Seeds of each setting's best rate.
        test: Seeds on the test split.
        every: Methods of which all settings are tested, not the chosen one alone.
    """

    split: str
    seeds: tuple[int, ...]
    again: tuple[int, ...]
    test: tuple[int, ...]
    every: tuple[str, ...] = ("owlore", "full", "galore")


PLANS = {
    "commonsense": Plan("fold", (0, 1, 2), (), (5, 6, 7, 8, 9)),
    "gsm8k": Plan("validation", (0,), (), (0, 1, 2, 3, 4)),
    "wikitext2": Plan("validation", (0,), (1, 2), (0, 1, 2, 3, 4)),
    "shakespeare": Plan("validation", (0,), (1, 2), (0, 1, 2, 3, 4)),
}
# Tasks of each table, and whether it tests.
TABLES = {
    "folds": (("commonsense",), False),
    "folds-test": (("commonsense",), True),
    "text-validation": (("wikitext2", "shakespeare"), False),
    "text": (("wikitext2", "shakespeare"), True),
    "gsm8k-embeddings-validation": (("gsm8k",), False),
    "gsm8k-embeddings": (("gsm8k",), True),
}


# A setting becomes the default if validation chose it for `owlore` on so many of the tasks, and the
# test is nowhere worse by more than this than with embedding and head trained like the rest: points
# of accuracy, nats a token.
MAJORITY = 3
WORSE = {"commonsense": 0.5, "gsm8k": 0.01, "wikitext2": 0.01, "shakespeare": 0.01}


def tuning(
    task: str,
    method: str,
    variant: str,
    done: Sequence[Row],
    failed: Collection[tuple[Any, ...]] = (),
) -> tuple[list[Key], tuple[float, float] | None]:
    """The runs that choose the rate of a setting.

    Args:
        task: The task.
        method: The method.
        variant: The setting's variant.
        done: Rows of finished runs.
        failed: Keys of runs that will have no row.

    Returns:
        The runs, and the best rate with its mean score once all have ended.
    """
    plan = PLANS[task]
    scores: dict[float, dict[int, float]] = {}
    for row in done:
        if (row["task"], row["method"], row["variant"], row["split"]) == (
            task, method, variant, plan.split,
        ):  # fmt: skip
            scores.setdefault(row["lr"], {})[row["seed"]] = quality_stats.score(row)

    def key(lr: float, seed: int) -> Key:
        return task, method, variant, lr, seed, plan.split

    def ended(keys: Sequence[Key]) -> bool:
        return all(k[4] in scores.get(k[3], {}) or k in failed for k in keys)

    def best(rates: Sequence[float]) -> float | None:
        found = {
            lr: [scores[lr][seed] for seed in plan.seeds if seed in scores[lr]]
            for lr in rates
            if lr in scores
        }
        most = max(map(len, found.values()), default=0)
        if not most:
            return None
        # Of equal means the lower rate.
        return max(
            (lr for lr, own in found.items() if len(own) == most),
            key=lambda lr: (statistics.mean(found[lr]), -lr),
        )

    wanted = [key(lr, seed) for seed in plan.seeds for lr in RATES]
    rate = best(RATES)
    if rate is None or not ended(wanted):
        return wanted, None
    if rate in BEYOND:
        wanted += [key(BEYOND[rate], seed) for seed in plan.seeds]
        rate = best((*RATES, BEYOND[rate]))
        assert rate is not None
    if not ended(wanted):
        return wanted, None
    wanted += [key(rate, seed) for seed in plan.again]
    if not ended(wanted):
        return wanted, None
    seeds = [seed for seed in plan.seeds + plan.again if seed in scores[rate]]
    return wanted, (rate, statistics.mean(scores[rate][seed] for seed in seeds))


def tuned(
    task: str, method: str, done: Sequence[Row], failed: Collection[tuple[Any, ...]] = ()
) -> dict[str, tuple[float, float]]:
    """{variant: (rate, mean score)} of the settings whose runs have all ended."""
    found = {
        variant: tuning(task, method, variant, done, failed)[1]
        for variant in SETTINGS[method].values()
    }
    return {variant: entry for variant, entry in found.items() if entry is not None}


def chosen(
    task: str, done: Sequence[Row], failed: Collection[tuple[Any, ...]] = ()
) -> dict[str, tuple[str, float]]:
    """Variant and rate of each method whose settings have all been tuned."""
    best = {}
    for method, settings in SETTINGS.items():
        own = tuned(task, method, done, failed)
        if len(own) == len(settings):
            # Of equal ones the first, which trains embedding and head like the rest.
            variant = max(own, key=lambda name: own[name][1])
            best[method] = variant, own[variant][0]
    return best


def judged(
    task: str, done: Sequence[Row], failed: Collection[tuple[Any, ...]] = ()
) -> list[tuple[str, str, float]]:
    """Method, variant and rate of what the test split judges."""
    best = chosen(task, done, failed)
    found = []
    for method in SETTINGS:
        for variant, (lr, _) in tuned(task, method, done, failed).items():
            if method in PLANS[task].every or best.get(method) == (variant, lr):
                found.append((method, variant, lr))
    return found


def jobs(
    table: str, done: Sequence[Row], failed: Collection[tuple[Any, ...]] = ()
) -> Iterator[tuple[Key, bool]]:
    """The runs of a table that can begin, and whether each is of a chosen setting.

    Args:
        table: One of TABLES.
        done: Rows of finished runs.
        failed: Keys of runs that will have no row.
    """
    tasks, tests = TABLES[table]
    for task in tasks:
        # Only these choose.
        own = [row for row in done if (row["task"], row["split"]) == (task, PLANS[task].split)]
        if tests:
            best, entries = chosen(task, own, failed), judged(task, own, failed)
            for seed in PLANS[task].test:
                for method, variant, lr in entries:
                    key = (task, method, variant, lr, seed, "test")
                    yield key, best.get(method) == (variant, lr)
        else:
            for method, settings in SETTINGS.items():
                for variant in settings.values():
                    for key in tuning(task, method, variant, own, failed)[0]:
                        yield key, False


class Verdict(NamedTuple):
    """What the rule says of one setting of `owlore`.

    Attributes:
        setting: The setting.
        chosen: Tasks on which validation chose it.
        differences: Test scores over those of "full", by task: mean and its 95% interval, more is
            better; None where fewer than two seeds are there.
        default: Whether it becomes the default; None while that is open.
    """

    setting: str
    chosen: tuple[str, ...]
    differences: dict[str, tuple[float, float, float] | None]
    default: bool | None


def by_seed(rows: Sequence[Row], task: str, method: str, variant: str) -> dict[int, float]:
    """Scores on the test split by seed, at the rate that tuning gave; the plan's seeds alone."""
    rate = tuned(task, method, rows).get(variant, (None,))[0]
    return {
        row["seed"]: quality_stats.score(row)
        for row in rows
        if (row["task"], row["method"], row["variant"], row["split"], row["lr"])
        == (task, method, variant, "test", rate) and row["seed"] in PLANS[task].test
    }  # fmt: skip


def verdict(rows: Sequence[Row]) -> list[Verdict]:
    """Applies the rule to each setting but the one that trains embedding and head like the rest."""
    variants = SETTINGS["owlore"]
    best = {task: chosen(task, rows).get("owlore") for task in PLANS}
    found = []
    for setting in (name for name in variants if name != "full"):
        wins = tuple(task for task, own in best.items() if own and own[0] == variants[setting])
        differences = {
            task: quality_stats.paired(
                by_seed(rows, task, "owlore", variants[setting]),
                by_seed(rows, task, "owlore", variants["full"]),
            )
            for task in PLANS
        }
        worse = any(own and own[0] < -WORSE[task] for task, own in differences.items())
        lost = sum(own is not None for own in best.values()) - len(wins)
        default: bool | None = None
        if worse or lost > len(PLANS) - MAJORITY:
            default = False
        elif len(wins) >= MAJORITY and None not in differences.values():
            default = True
        found.append(Verdict(setting, wins, differences, default))
    return found
