"""Low-rank steps against galore-torch's GaLoreAdamW, and every difference that is documented.

GaLore (arXiv 2403.03507) is "all blocks + low rank" here. With eps 1e-30, no decay and gradients
that are not zero, both give the same weights; each of the last tests shows one documented
difference, on both sides of it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerances import GALORE_FLOAT32
from torch import Tensor, nn

from owlore import OwLore

RANK, LR, SCALE = 3, 1e-2, 0.25
SIDES = {"std": "std", "left": "left", "right": "right", "reverse": "reverse_std"}


def _galore_adamw() -> Callable[..., torch.optim.Optimizer]:
    """`galore_torch.GaLoreAdamW` without the rest of its package.

    `galore_torch/__init__.py` imports all its optimizers, and with them bitsandbytes and tensorly:
    hundreds of megabytes and five seconds for what is not tested here. The module of GaLoreAdamW
    needs neither, so it is imported from a package whose `__init__` does not run.
    """
    name = "galore_torch"
    spec = importlib.util.find_spec(name)
    if spec is None:
        pytest.skip("galore-torch is not installed (pip install --no-deps galore-torch==1.0)")
    before = sys.modules.get(name)
    package = types.ModuleType(name)
    package.__path__ = list(spec.submodule_search_locations or ())
    sys.modules[name] = package
    try:
        return importlib.import_module(f"{name}.adamw").AdamW
    finally:
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before


@pytest.fixture(scope="module")
def galore_adamw() -> Callable[..., torch.optim.Optimizer]:
    return _galore_adamw()


@pytest.fixture
def one_sign(monkeypatch) -> None:
    """Gives singular vectors one sign, the same for a matrix and its transpose.

    The sign is arbitrary, and moments that are kept over a refresh depend on it.
    """
    decompose = torch.linalg.svd

    def svd(A: Tensor, full_matrices: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        U, S, Vh = decompose(A, full_matrices=full_matrices)
        sign = (U.sum(dim=0) + Vh.sum(dim=1)).sign()
        return U * sign, S, Vh * sign[:, None]

    monkeypatch.setattr(torch.linalg, "svd", svd)


class Matrices(nn.Module):
    """Blocks of a tall, a wide and a square weight, to which a test gives its gradients."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList()
        for _ in range(blocks):
            layers = [nn.Linear(n, m, bias=False) for m, n in ((12, 7), (7, 12), (9, 9))]
            for layer in layers:
                layer.weight.data = torch.randn(layer.weight.shape, generator=generator)
            self.layers.append(nn.ModuleList(layers))

    def forward(self) -> None:
        """Only makes the optimizer's draw take effect."""

    def weights(self) -> list[nn.Parameter]:
        return list(self.parameters())


def gradients(model: Matrices, step: int, direction: int = 0) -> list[Tensor]:
    """Noisy gradients in a few leading directions, other ones for another `direction`."""
    found = []
    for i, weight in enumerate(model.weights()):
        m, n = weight.shape
        fixed = torch.Generator().manual_seed(100 * direction + i)
        left, right = torch.randn(m, 4, generator=fixed), torch.randn(4, n, generator=fixed)
        # Distinct singular values, so that the basis is unique up to signs.
        strengths = torch.tensor([8.0, 4.0, 2.0, 0.5])
        fresh = torch.randn(m, n, generator=torch.Generator().manual_seed(1000 * step + i))
        found.append((left * strengths) @ right + 0.3 * fresh)
    return found


def ours(model: Matrices, **options: Any) -> OwLore:
    given: dict[str, Any] = {
        "distribution": "uniform",
        "blocks": "all",
        "rank": RANK,
        "lr": LR,
        "scale": SCALE,
        "eps": 1e-30,
        "basis": "svd",
        "gradient": "dense",
    }
    return OwLore(model, **given | options)


def theirs(
    galore_adamw: Callable[..., torch.optim.Optimizer],
    model: Matrices,
    side: str = "std",
    gap: int = 200,
    rank: int | None = RANK,
    **options: Any,
) -> torch.optim.Optimizer:
    group: dict[str, Any] = {"params": model.weights()}
    if rank is not None:
        group |= {"rank": rank, "update_proj_gap": gap, "scale": SCALE, "proj_type": SIDES[side]}
    given: dict[str, Any] = {"lr": LR, "eps": 1e-30, "no_deprecation_warning": True}
    return galore_adamw([group], **given | options)


def step(model: Matrices, optimizer: torch.optim.Optimizer, grads: list[Tensor]) -> None:
    model()
    for weight, gradient in zip(model.weights(), grads, strict=True):
        weight.grad = gradient.clone() if weight.requires_grad else None
    optimizer.step()


def distance(one: Matrices, other: Matrices) -> float:
    """Largest difference of two models' weights, in units of the learning rate."""
    pairs = zip(one.weights(), other.weights(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs) / LR


@pytest.mark.usefixtures("one_sign")
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("gap", [200, 6])
def test_equal_weights_over_thirty_steps(galore_adamw, side, gap):
    models = Matrices(), Matrices()
    start = Matrices()
    optimizers = (
        ours(models[0], side=side, refresh_interval=gap),
        theirs(galore_adamw, models[1], side, gap),
    )
    for i in range(30):
        grads = gradients(models[0], i)
        for model, optimizer in zip(models, optimizers, strict=True):
            step(model, optimizer, grads)
        for weight, want in zip(models[0].weights(), models[1].weights(), strict=True):
            torch.testing.assert_close(weight, want, **GALORE_FLOAT32)
    assert distance(models[0], start) > 1.0
    # The projected sides were those that the name promises.
    for weight, authors in zip(models[0].weights(), models[1].weights(), strict=True):
        m, n = weight.shape
        right = {"std": m >= n, "reverse": m < n, "left": False, "right": True}[side]
        want_shape = (m, RANK) if right else (RANK, n)
        assert optimizers[0].state[weight]["exp_avg"].shape == want_shape
        assert optimizers[1].state[authors]["exp_avg"].shape == want_shape


def test_equal_weights_without_projection(galore_adamw):
    models = Matrices(), Matrices()
    optimizers = ours(models[0], rank=None), theirs(galore_adamw, models[1], rank=None)
    for i in range(20):
        for model, optimizer in zip(models, optimizers, strict=True):
            step(model, optimizer, gradients(model, i))
    for weight, want in zip(models[0].weights(), models[1].weights(), strict=True):
        torch.testing.assert_close(weight, want, **GALORE_FLOAT32)


# Differences. Each shows the two updates that the documentation tells apart.


def test_difference_eps_is_added_after_bias_correction(galore_adamw):
    # Ours: N = M_hat / (sqrt(V_hat) + eps). GaLore's: eps joins sqrt(V) before the correction, and
    # so weighs 1 / sqrt(1 - b2^t) as much: 31.6 times at the first step.
    eps, beta2 = 0.1, 0.999
    models = Matrices(), Matrices()
    optimizers = ours(models[0], eps=eps), theirs(galore_adamw, models[1], eps=eps)
    grads = gradients(models[0], 0)
    before = [weight.detach().clone() for weight in models[0].weights()]
    for model, optimizer in zip(models, optimizers, strict=True):
        step(model, optimizer, grads)
    for i, gradient in enumerate(grads):
        m, n = gradient.shape
        U, _, Vh = torch.linalg.svd(gradient, full_matrices=False)
        left, right = U[:, :RANK], Vh[:RANK].T
        R = gradient @ right if m >= n else left.T @ gradient
        for model, weight_of_eps in ((models[0], 1.0), (models[1], (1 - beta2) ** -0.5)):
            N = R / (R.abs() + eps * weight_of_eps)
            update = N @ right.T if m >= n else left @ N
            want = before[i] - LR * SCALE * update
            torch.testing.assert_close(model.weights()[i].data, want, **GALORE_FLOAT32)
    assert distance(*models) > 0.01


def test_difference_decay_comes_before_the_update(galore_adamw):
    # Ours: W (1 - lr wd) - u. GaLore's: (W - u) (1 - lr wd), so ours is smaller by lr wd u.
    decay = 2.0
    models = Matrices(), Matrices()
    options = {"weight_decay": decay}
    optimizers = ours(models[0], **options), theirs(galore_adamw, models[1], **options)
    free = Matrices()
    undecayed = ours(free)
    start = Matrices().weights()
    for model, optimizer in (
        (models[0], optimizers[0]),
        (models[1], optimizers[1]),
        (free, undecayed),
    ):
        step(model, optimizer, gradients(model, 0))
    rest = 1 - LR * decay
    for i, W in enumerate(start):
        u = W - free.weights()[i]
        torch.testing.assert_close(models[0].weights()[i], W * rest - u, **GALORE_FLOAT32)
        torch.testing.assert_close(models[1].weights()[i], (W - u) * rest, **GALORE_FLOAT32)
        gap = models[1].weights()[i] - models[0].weights()[i]
        torch.testing.assert_close(gap, LR * decay * u, rtol=1e-2, atol=1e-6)
    assert distance(*models) > 1e-3


def test_difference_the_basis_is_fresh_at_every_activation(galore_adamw):
    # The authors keep GaLore's clock of each matrix, which ticks only while its block is active:
    # with 2 steps per visit and a gap of 3, a second visit starts on the basis of the first.
    gap, interval = 3, 2
    visits = [0, 1, 0]
    models = Matrices(), Matrices()
    optimizer = ours(
        models[0],
        blocks=1,
        interval=interval,
        refresh_interval=gap,
        state="keep",
        seed=_seed_that_draws(visits, interval),
    )
    authors = theirs(galore_adamw, models[1], gap=gap)
    for i in range(interval * len(visits)):
        active = visits[i // interval]
        grads = gradients(models[0], i, direction=i // interval)
        step(models[0], optimizer, grads)
        assert optimizer.active_blocks == (active,)
        for j, weight in enumerate(models[1].weights()):
            weight.grad = grads[j] if j // 3 == active else None
        authors.step()
        if i == 2 * interval:
            for j, gradient in enumerate(grads[:3]):
                best = captured(gradient, exact_basis(gradient))
                fresh = optimizer.state[models[0].weights()[j]]["basis"]
                stale = authors.state[models[1].weights()[j]]["projector"].ortho_matrix
                m, n = gradient.shape
                stale = stale.T if m >= n else stale
                assert captured(gradient, fresh) == pytest.approx(best, rel=1e-5)
                assert captured(gradient, stale) < 0.9 * best
        if i < 2 * interval:
            for weight, want in zip(models[0].weights(), models[1].weights(), strict=True):
                torch.testing.assert_close(weight, want, **GALORE_FLOAT32)
    assert distance(*models) > 0.1


def exact_basis(gradient: Tensor) -> Tensor:
    U, _, Vh = torch.linalg.svd(gradient, full_matrices=False)
    return Vh[:RANK].T if gradient.shape[0] >= gradient.shape[1] else U[:, :RANK]


def captured(gradient: Tensor, basis: Tensor) -> float:
    """Share of the gradient's energy in a basis of the side that "std" projects."""
    R = gradient @ basis if gradient.shape[0] >= gradient.shape[1] else basis.T @ gradient
    return (R.square().sum() / gradient.square().sum()).item()


def _seed_that_draws(visits: list[int], interval: int) -> int:
    for seed in range(1000):
        optimizer = ours(Matrices(), blocks=1, interval=interval, seed=seed)
        if [optimizer._draw(i) for i in range(len(visits))] == [(block,) for block in visits]:
            return seed
    raise AssertionError("no seed draws these blocks")


def test_difference_the_rank_is_clamped_to_the_smaller_side(galore_adamw):
    # GaLore takes what the decomposition has, in silence; here the log names it. The update is one.
    models = Matrices(), Matrices()
    optimizer = ours(models[0], rank=8)
    authors = theirs(galore_adamw, models[1], rank=8)
    for i in range(5):
        for model, each in ((models[0], optimizer), (models[1], authors)):
            step(model, each, gradients(model, i))
    assert any("rank 8 is above the smaller side" in line for line in optimizer.describe())
    for weight, want in zip(models[0].weights(), models[1].weights(), strict=True):
        torch.testing.assert_close(weight, want, **GALORE_FLOAT32)
