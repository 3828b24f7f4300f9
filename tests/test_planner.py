"""The memory planner against real runs: state, activations and the allocator's own peak."""

from __future__ import annotations

import gc
import itertools
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from owlore import OwLore, OwLoreConfig, planner
from owlore.cli import main

BLOCKS, ROWS, TOKENS = 4, 2, 96


def llama_config(**changes: Any) -> LlamaConfig:
    sizes = {
        "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
        "tie_word_embeddings": False,
    }  # fmt: skip
    return LlamaConfig(**{**sizes, **changes})


class Run:
    """A real model after two steps with blocks spread evenly, and the plan of just that."""

    def __init__(
        self, options: dict[str, Any], checkpointing: bool = False, dtype: str = "float32"
    ) -> None:
        self.config = OwLoreConfig(**{"rank": 8, **options})
        gamma = BLOCKS if self.config.blocks == "all" else int(self.config.blocks)
        chosen = [i * BLOCKS // gamma for i in range(gamma)]
        self.model = AutoModelForCausalLM.from_config(
            llama_config(), dtype=getattr(torch, dtype)
        ).train()
        if checkpointing:
            self.model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        self.optimizer = OwLore(
            self.model,
            self.config.replace(
                blocks=gamma, distribution=lambda _: [float(i in chosen) for i in range(BLOCKS)],
                refresh_interval=3, interval=1000,
            ),
        )  # fmt: skip
        self.ids = torch.randint(0, 512, (ROWS, TOKENS))
        self.plan = planner.plan(
            llama_config(), self.config, ROWS, TOKENS,
            checkpointing=checkpointing, dtype=getattr(torch, dtype), active=chosen,
        )  # fmt: skip
        self.step()
        self.step()

    def backward(self) -> None:
        self.model(input_ids=self.ids, labels=self.ids).loss.backward()

    def step(self) -> None:
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def allocated_peak(call: Any) -> int:
    """Most bytes that a call holds of the CPU allocator beyond what was held before."""
    gc.collect()
    gc.disable()
    try:
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            call()
    finally:
        gc.enable()
    found: list[tuple[int, int, int]] = []
    waiting = list(profile.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        if event.tag == torch._C._profiler._EventType.Allocation:
            fields = event.extra_fields
            found.append((event.start_time_ns, fields.alloc_size, fields.ptr))
    now = peak = 0
    held: set[int] = set()
    for _, size, pointer in sorted(found, key=lambda entry: entry[0]):
        # An address that an earlier profile saw and that is freed in this one is reported with the
        # size it had then.
        if size < 0 and pointer not in held:
            continue
        (held.add if size > 0 else held.discard)(pointer)
        now += size
        peak = max(peak, now)
    return peak


CASES: list[dict[str, Any]] = [
    {"blocks": 2, "gradient": "projected"},
    {"blocks": 2, "gradient": "dense"},
    {"blocks": "all", "gradient": "projected", "moments": "bf16", "side": "reverse"},
    {"blocks": "all", "gradient": "projected", "embeddings": "freeze", "head": "freeze"},
    {"blocks": 2, "gradient": "projected", "embeddings": "lowrank", "head": "lowrank"},
    {"blocks": "all", "rank": None, "dense_moments": "fp32"},
]


def normal_peak(plan: planner.Plan) -> int:
    """Peak of a normal step without what only a GPU's kernels take."""
    steps = [parts for name, parts in plan.moments.items() if name.startswith("normal")]
    return max(sum(parts.values()) - parts["kernel scratch"] for parts in steps)


@pytest.mark.parametrize(
    ("options", "dtype"),
    [*((case, "float32") for case in CASES), *((case, "bfloat16") for case in CASES[1:4])],
    ids=str,
)
def test_state_and_gradients_are_planned_to_the_byte(options: dict[str, Any], dtype: str) -> None:
    run = Run(options, dtype=dtype)
    run.backward()
    account = run.optimizer.memory()
    planned = run.plan.account()
    buffers = sum(b.numel() * b.element_size() for b in run.model.buffers())
    # Coordinates are parameters of a few bytes.
    coordinates = len(list(run.model.parameters())) - len(list(run.model.state_dict()))
    extra = planned["weights"] - account["weights"] - buffers
    assert 0 <= extra <= 4 * coordinates
    for part in ("gradients", "moments", "basis"):
        assert planned[part] == account[part], part
    assert account["gradients"] > 0


@pytest.mark.parametrize("options", CASES[:5], ids=str)
def test_activations_are_what_autograd_keeps(options: dict[str, Any]) -> None:
    run = Run(options)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = run.model.model(input_ids=run.ids).last_hidden_state
    ours = [*run.model.parameters(), *run.model.buffers(), run.ids]
    ours += [s["basis"] for s in run.optimizer.state.values() if "basis" in s]
    left_out = {tensor.untyped_storage().data_ptr() for tensor in ours}
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    if run.config.head == "full":
        # The head keeps its input too.
        sizes[hidden.data_ptr()] = hidden.nbytes
    kept = sum(size for pointer, size in sizes.items() if pointer not in left_out)
    planned = run.plan.moments["normal step, loss"]["activations"]
    # Beside them a plan counts the token ids and numbers of a few bytes.
    assert 0 <= planned - kept <= run.ids.nbytes + 1024


@pytest.mark.parametrize(
    ("options", "checkpointing"),
    [(case, i % 2 == 0) for i, case in enumerate(CASES)] + [(CASES[0], False)],
    ids=str,
)
def test_peak_is_the_allocators(options: dict[str, Any], checkpointing: bool) -> None:
    run = Run(options, checkpointing)
    account = run.optimizer.memory()
    before = sum(account[part] for part in ("weights", "moments", "basis"))
    measured = before + allocated_peak(run.step)
    assert normal_peak(run.plan) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("gradient", ["projected", "dense"])
def test_peak_of_a_draw_is_the_allocators(gradient: str) -> None:
    options = {"blocks": 2, "rank": 8, "distribution": "uniform", "gradient": gradient}
    run = Run(options)
    run.optimizer.detach()
    # Draws 0 and 1 of this seed have no block in common.
    run.optimizer = OwLore(run.model, **options, interval=2, seed=8)
    for _ in range(2):
        run.step()
    first = run.optimizer.active_blocks
    account = run.optimizer.memory()
    before = sum(account[part] for part in ("weights", "moments", "basis"))
    # The profiler does not see that what was there before it began is freed: the state of the
    # blocks that are left.
    before -= sum(planner._block_state(run.optimizer, drop=False).values())
    measured = before + allocated_peak(run.step)
    assert not set(first) & set(run.optimizer.active_blocks)
    parts = [p for name, p in run.plan.moments.items() if name.startswith("refresh")]
    planned = max(sum(p.values()) - p["kernel scratch"] for p in parts)
    assert planned == pytest.approx(measured, rel=0.001)


def test_accumulation_keeps_gradients_beside_activations() -> None:
    config = OwLoreConfig(rank=8, blocks="all", moments="bf16")
    once, twice = (
        planner.plan(llama_config(), config, ROWS, TOKENS, accumulation=n) for n in (1, 2)
    )
    before, during = (p.moments["normal step, loss"] for p in (once, twice))
    assert before["dense gradients"] == before["low-rank gradients"] == 0
    # R in bfloat16 is no place to sum in: float32 as soon as there is more than one backward.
    R = once.moments["normal step, step"]["low-rank gradients"]
    assert during["low-rank gradients"] == 2 * R
    assert during["dense gradients"] == once.moments["normal step, step"]["dense gradients"]


def test_kept_state_adds_up_over_all_blocks() -> None:
    reset, keep, every = (
        planner.plan(llama_config(), OwLoreConfig(rank=8, **options), ROWS, TOKENS)
        for options in ({"blocks": 1}, {"blocks": 1, "state": "keep"}, {"blocks": "all"})
    )
    assert reset.account()["moments"] < keep.account()["moments"]
    assert keep.account()["moments"] == every.account()["moments"]
    assert keep.account()["basis"] == every.account()["basis"]


@pytest.mark.parametrize(
    ("options", "checkpointing"),
    [({"rank": None}, True), ({"rank": 8, "embeddings": "freeze", "head": "freeze"}, False)],
    ids=str,
)
def test_no_draw_takes_more(options: dict[str, Any], checkpointing: bool) -> None:
    config = OwLoreConfig(blocks=2, **options)
    peaks = {
        active: planner.plan(
            llama_config(), config, 1, 16, checkpointing=checkpointing, active=active
        ).peak
        for active in itertools.combinations(range(BLOCKS), 2)
    }
    made = planner.plan(llama_config(), config, 1, 16, checkpointing=checkpointing)
    assert made.peak == max(peaks.values())


def test_lowest_active_block_ends_backward() -> None:
    config = OwLoreConfig(rank=8, blocks=1, embeddings="freeze", head="freeze")
    top = planner.plan(llama_config(), config, ROWS, TOKENS, active=[BLOCKS - 1])
    bottom = planner.plan(llama_config(), config, ROWS, TOKENS)
    through = planner.plan(
        llama_config(), config, ROWS, TOKENS, active=[BLOCKS - 1], input_grads=True
    )
    kept = [p.moments["normal step, loss"]["activations"] for p in (top, bottom, through)]
    assert kept[0] < 0.6 * kept[1]
    assert kept[0] < 0.6 * kept[2]


def test_plan_of_a_model_leaves_it_alone() -> None:
    model = LlamaForCausalLM(llama_config())
    model.model.layers[1].requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    config = OwLoreConfig(rank=8, blocks="all", embeddings="freeze", head="freeze")
    made = planner.plan(model, config.replace(blocks=3), ROWS, TOKENS, active=[0, 2, 3])
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(type(m) is nn.Linear for m in model.modules() if isinstance(m, nn.Linear))
    assert all(p.device.type == "cpu" for p in model.parameters())
    by_shape = planner.plan(
        llama_config(), config.replace(blocks=3), ROWS, TOKENS,
        active=[0, 2, 3], dtype=torch.float32,
    )  # fmt: skip
    assert made.account()["moments"] == by_shape.account()["moments"]


def test_nothing_stays_patched() -> None:
    attention, generator = nn.functional.scaled_dot_product_attention, torch.Generator
    with pytest.raises(ValueError, match="rank"):
        planner.plan(
            llama_config(), OwLoreConfig(blocks=2, rank=None, head="lowrank"), ROWS, TOKENS
        )
    assert nn.functional.scaled_dot_product_attention is attention
    assert torch.Generator is generator
    assert not torch.empty(1, device="meta").is_cuda
    assert "is_cuda" not in vars(torch.Tensor)


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "gemma2", "llama-tied"])
def test_other_architectures(name: str) -> None:
    model = tiny_models.build(name)
    config = OwLoreConfig(rank=2, blocks=2)
    made = planner.plan(model, config, 2, 9)
    optimizer = OwLore(model, config.replace(distribution=lambda _: [1.0, 1.0, 0.0]))
    for _ in range(2):
        optimizer.zero_grad()
        model(**tiny_models.batch()).loss.backward()
        optimizer.step()
    account = optimizer.memory()
    planned = made.account()
    assert {k: planned[k] for k in ("gradients", "moments", "basis")} == {
        k: account[k] for k in ("gradients", "moments", "basis")
    }


def test_command_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "smollm2-135m", "--batch", "2", "--seq", "64", "--checkpointing"]
    assert main([*words, "--blocks", "2", "--rank", "16", "--moments", "bf16"]) == 0
    text = capsys.readouterr().out
    config = OwLoreConfig(blocks=2, rank=16, moments="bf16")
    made = planner.plan("smollm2-135m", config, 2, 64, checkpointing=True)
    assert text.strip() == made.table().strip()
    assert f"peak {made.peak / 2**30:.2f} GiB ({made.at})" in text
    assert (
        made.peak
        == sum(made.parts.values())
        == max(sum(parts.values()) for parts in made.moments.values())
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch", "0"], "batch: expected a whole number >= 1, got 0"),
        (["--seq", "x"], "--seq: expected a whole number, got 'x'"),
        (["--rnk", "4"], "did you mean --rank?"),
        (["--preset", "lsia"], "did you mean lisa?"),
        (["--blocks", "99"], "blocks: expected at most 30, got 99"),
    ],
)
def test_wrong_input_is_named(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "smollm2-135m", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("owlore plan: error: ")
    assert message in error


def test_unknown_model_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "no/such/folder"]) == 2
    assert "no/such/folder does not exist" in capsys.readouterr().err


def test_a_model_that_needs_values_is_an_error() -> None:
    class Picky(LlamaForCausalLM):
        def forward(self, input_ids: Tensor, **options: Any) -> Any:
            return super().forward(input_ids[input_ids > 3][None], **options)

    with pytest.raises(ValueError, match="Picky cannot be planned without its weights"):
        planner.plan(Picky(llama_config()), OwLoreConfig(blocks=2, rank=8), ROWS, TOKENS)


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "options",
    [{"blocks": 5}, {"blocks": "all", "moments": "bf16"}, {"blocks": 5, "gradient": "dense"}],
    ids=str,
)
def test_peak_on_a_gpu(options: dict[str, Any], checkpointing: bool) -> None:
    kind = planner.SHAPES["smollm2-135m"][1]
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**kind), dtype=torch.bfloat16).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    config = OwLoreConfig(**options)
    optimizer = OwLore(
        model, config.replace(distribution="uniform", interval=1000, refresh_interval=3)
    )
    ids = torch.randint(0, 1000, (4, 512), device="cuda")
    for step in range(7):
        if step == 3:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    made = planner.plan("smollm2-135m", config, 4, 512, checkpointing=checkpointing)
    assert torch.cuda.max_memory_allocated() == pytest.approx(made.peak, rel=0.05)


@pytest.mark.parametrize(("rank", "projected"), [(8, True), (8, False), (136, True)])
def test_scratch_is_what_the_kernels_ask_for(
    rank: int, projected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from owlore.kernels import common, lowrank_adam

    asked: list[int] = []
    arena = common.arena

    def spy(device: torch.device, size: int) -> Tensor:
        asked.append(size)
        return arena(device, size)

    monkeypatch.setattr(common, "arena", spy)
    monkeypatch.setattr(planner, "_ARCHITECTURE", 0)
    shapes = [(48, 40), (40, 48)]
    sides = ["right", "left"]
    lists: list[list[Tensor]] = [[] for _ in range(6)]
    for (m, n), side in zip(shapes, sides, strict=True):
        R = torch.randn((rank, n) if side == "left" else (m, rank))
        values = [
            torch.randn(m, n), R if projected else torch.randn(m, n),
            torch.randn(m if side == "left" else n, rank), R.clone(), R.square(), torch.tensor(1.0),
        ]  # fmt: skip
        for entries, value in zip(lists, values, strict=True):
            entries.append(value)
    launched = lowrank_adam.launch_lowrank_adam(
        *lists, torch.tensor(1e-3, dtype=torch.float64), torch.zeros(2, dtype=torch.int32),
        torch.tensor(1), sides=sides, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, scale=1.0,
        stochastic=False, seed=0, streams=[1, 2], projected=projected,
    )  # fmt: skip
    assert launched
    empty = [[value.to("meta") for value in entries] for entries in lists]
    planned = planner._scratch("lowrank_adam_", *empty, sides=sides, projected=projected)
    assert planned == max(asked, default=0)
