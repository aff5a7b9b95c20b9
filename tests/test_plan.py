# SPDX-License-Identifier: Apache-2.0
"""The memory planner against sums by hand, real allocations and torch's own MemTracker."""

import gc
import importlib
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from kdfast import info
from kdfast.configs import CONFIGS, ConfigError, load
from kdfast.memory import DoesNotFit, Step, plan_batch, plan_memory, plan_step
from kdfast.memory.cuda_rules import as_on_cuda
from kdfast.memory.measure import _optimizer, checkpointed, supervised
from kdfast.models import EVAViT
from kdfast.ops import OPS
from kdfast.ops import kd_loss as kd_loss_file
from kdfast.plan import main, steps_of

MIB, GIB = 2**20, 2**30


def vit(**changes: Any) -> nn.Module:
    options = {"img_size": 64, "depth": 2, "num_classes": 10, **changes}
    return timm.create_model("vit_tiny_patch16_224", **options)


def distilled() -> Step:
    return supervised(vit(), vit(depth=3))


def eva_step(recompute: bool = False) -> Step:
    """The step of the config "smoke", with enough pixels for its activations to count."""
    (step,) = steps_of(load("smoke", ["data.size=[96,96]"], files=False))
    return step.build(recompute)


def real_peak(step: Step, shape: tuple[int, ...], amp: torch.dtype | None) -> int:
    """Bytes of the second real step by the allocator's own events, on top of what is kept."""
    module = step.module.train()
    optimizer = _optimizer(step, "cpu")

    def once() -> None:
        images, labels = torch.zeros(shape), torch.zeros(shape[0], dtype=torch.int64)
        with nullcontext() if amp is None else torch.autocast("cpu", dtype=amp):
            loss = step.loss(images, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    once()
    gc.collect()
    held = [t for m in (module, *step.teachers) for t in (*m.parameters(), *m.buffers())]
    held += [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        once()

    def walk(events: Any) -> Iterator[Any]:
        for event in events:
            yield event
            yield from walk(event.children)

    kind = torch._C._profiler._EventType.Allocation
    tree = run.profiler.kineto_results.experimental_event_tree()
    events = sorted((e for e in walk(tree) if e.tag == kind), key=lambda e: e.start_time_ns)
    now = peak = 0
    for event in events:
        now += event.extra_fields.alloc_size
        peak = max(peak, now)
    return sum(kept.values()) + peak


@pytest.mark.parametrize(
    ("build", "batch", "side", "amp"),
    [
        (lambda: supervised(vit(), None), 16, 64, None),
        (lambda: supervised(vit(img_size=96), None), 8, 96, None),
        (distilled, 16, 64, None),
        (distilled, 16, 64, torch.bfloat16),
        (lambda: supervised(checkpointed(vit(), True), None), 32, 64, None),
        (lambda: supervised(vit(), None, "sgd"), 16, 64, None),
        (lambda: supervised(vit(), None, "lamb"), 16, 64, None),
        (lambda: supervised(timm.create_model("test_byobnet", num_classes=9), None), 8, 96, None),
        (eva_step, 4, 96, None),
        (lambda: eva_step(True), 4, 96, torch.bfloat16),
    ],
    ids="vit pixels teacher bf16 checkpoint sgd lamb cnn eva eva_bf16_checkpoint".split(),
)
@pytest.mark.filterwarnings("ignore")  # of the profiler
def test_prediction_is_within_a_tenth_of_real_allocations(
    build: Callable[[], Step],
    batch: int,
    side: int,
    amp: torch.dtype | None,
    compiled: None,
) -> None:
    plan = plan_step(build, batch, image_size=side, amp=amp, device="cpu")
    real = real_peak(build(), (batch, 3, side, side), amp)
    assert plan.tensors == pytest.approx(real, rel=0.1)
    # What grows with the batch must be right too, not only the parameters.
    assert sum(plan.categories.values()) == plan.tensors
    assert sum(size for sizes in plan.modules.values() for size in sizes.values()) == plan.tensors


def test_total_is_that_of_torchs_memtracker() -> None:
    def step_in(mode: MemTracker) -> int:
        model = vit()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        mode.track_external(model, optimizer)
        with mode:
            for _ in range(2):
                loss = supervised(model, None).loss(
                    torch.zeros(8, 3, 64, 64), torch.zeros(8, dtype=torch.int64)
                )
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                del loss
                mode.reset_mod_stats()
        return int(mode.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"])

    plan = plan_memory(vit, 8, image_size=64, device="cpu")
    assert plan.tensors == pytest.approx(step_in(MemTracker()), rel=0.02)


def tiny_step() -> Step:
    """y = relu(x W1) W2 on flattened images of 12 numbers, without biases."""
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(12, 1000, bias=False),
        nn.ReLU(),
        nn.Linear(1000, 4, bias=False),
    )
    return Step(model, lambda images, _: model(images).sum())


def test_bytes_of_a_tiny_model_by_hand() -> None:
    plan = plan_step(tiny_step, 4096, image_size=2, device="cpu")
    held = plan.categories
    weights = 4 * (12 * 1000 + 1000 * 4)
    assert held["parameters"] == weights
    # Two moments, and one counter of 4 bytes for each of two tensors, in units of 64 bytes.
    assert held["optimizer states"] == 2 * weights + 2 * 64
    assert held["inputs"] == 4096 * 12 * 4 + 4096 * 8
    # relu(h) serves as its own mask and as the input of W2; the image is an input already.
    assert held["saved for backward"] == 4096 * 1000 * 4
    # In the backward: its gradient, and that of h.
    assert plan.phase == "backward"
    assert held["temporaries"] == pytest.approx(2 * 4096 * 1000 * 4, rel=0.01)
    assert plan.modules["1"]["parameters"] == 4 * 12 * 1000
    assert plan.overhead == 0


def test_a_plan_needs_no_memory() -> None:
    def build() -> Step:
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 1 << 31, bias=False))
        return Step(model, lambda images, _: model(images).sum())

    plan = plan_step(build, 64, image_size=2, device="cuda")
    assert plan.categories["parameters"] == 12 * 2**31 * 4
    # Context and workspaces, and a twentieth for fragmentation.
    assert plan.overhead == (512 + 64) * MIB + int(0.05 * plan.tensors)
    assert plan.peak_bytes == plan.tensors + plan.overhead


def test_cudas_autocast_norms_in_fp32_also_when_a_block_is_recomputed() -> None:
    block, seen = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)), []
    block[1].register_forward_hook(lambda *args: seen.append(args[2].dtype))
    for roots in ((), (block,)):
        mode = as_on_cuda(roots) if roots else nullcontext()
        with mode, torch.autocast("cpu", dtype=torch.bfloat16):
            x = torch.randn(2, 8, requires_grad=True)
            y = checkpoint(block, x, use_reentrant=False)
            assert (x @ x.T).dtype == torch.bfloat16
            assert y.dtype == torch.bfloat16
            assert y.softmax(-1).dtype == seen[-1]
        with mode if not roots else as_on_cuda(roots):
            y.sum().backward()
    half, full = torch.bfloat16, torch.float32
    assert seen == [half, half, full, full]


def test_cuda_takes_the_kernels_and_puts_everything_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdfast.ops.pruned_attention.FUSED_ON", frozenset())
    use_fused = kd_loss_file.use_fused
    options = {"img_size": 256, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 4}
    model = EVAViT(**options, pt_hw_seq_len=32, pretrain_img_size=256, with_cp=False)

    def build() -> Step:
        inner = EVAViT(**{**model.config, "with_cp": False})
        return Step(inner, lambda images, _: inner(images).sum())

    matrix = 4 * 1024 * 1024 * 4
    assert plan_step(build, 1, image_size=256, device="cpu").tensors > matrix
    assert plan_step(build, 1, image_size=256, device="cuda").tensors < matrix
    assert kd_loss_file.use_fused is use_fused


def test_every_op_is_planned_as_it_runs_on_a_gpu() -> None:
    with as_on_cuda(()):
        for op, source in OPS.items():
            use_fused = importlib.import_module(f"kdfast.ops.{op}").use_fused
            assert use_fused(op, None, "no kernel here") == (source is not None)
            assert not use_fused(op, "reference", None)


def test_checkpointing_is_planned_under_cudas_autocast() -> None:
    plans = [
        plan_memory(vit, 32, image_size=64, amp=torch.bfloat16, checkpointing=on, teacher_fn=vit)
        for on in (False, True)
    ]
    assert [plan.checkpointing for plan in plans] == [False, True]
    saved = [plan.categories["saved for backward"] for plan in plans]
    assert saved[1] < saved[0] / 3


def test_vit_base_with_its_teacher_trains_in_6_gib() -> None:
    def model() -> nn.Module:
        return timm.create_model("vit_base_patch16_224", num_classes=10)

    plan = plan_memory(model, 8, image_size=224, teacher_fn=model, amp=torch.bfloat16)
    # 85.8M parameters: 4 bytes, 8 for the moments, 4 for the teacher; 55 MiB of activations and
    # cast weights in each of 12 blocks.
    assert plan.categories["parameters"] == pytest.approx(4 * 85.8e6, rel=0.001)
    assert plan.categories["frozen models"] == pytest.approx(4 * 85.8e6, rel=0.01)
    assert plan.categories["saved for backward"] == pytest.approx(665 * MIB, rel=0.02)
    assert 2.4 * GIB < plan.peak_bytes < 2.8 * GIB


def test_plan_batch_takes_the_largest_that_fits() -> None:
    sizes = [8, 16, 32]
    peaks = [plan_memory(vit, size, image_size=64).peak_bytes for size in sizes]
    assert peaks == sorted(peaks)
    for room, batch in ((peaks[1], 16), (peaks[2] - 1, 16), (10 * peaks[2], 32)):
        found = plan_batch(vit, None, image_size=64, vram=room, candidates=sizes[::-1])
        assert (found.batch, found.checkpointing) == (batch, False)
        assert found.peak_bytes == peaks[sizes.index(batch)]
        assert f"batch {batch}, 64 x 64" in found.table


def test_plan_batch_recomputes_only_if_it_must() -> None:
    options: dict[str, Any] = {"image_size": 64, "candidates": [64]}
    plain = plan_memory(vit, 64, image_size=64)
    light = plan_memory(vit, 64, image_size=64, checkpointing=True)
    assert light.peak_bytes < plain.peak_bytes
    found = plan_batch(vit, None, vram=plain.peak_bytes - 1, **options)
    assert found.checkpointing and found.batch == 64
    found = plan_batch(vit, None, vram=plain.peak_bytes, checkpointing=True, **options)
    assert found.checkpointing


def test_what_would_have_to_change() -> None:
    with pytest.raises(DoesNotFit) as caught:
        plan_batch(vit, vit, image_size=64, vram=580 * MIB, candidates=[8])
    text = str(caught.value)
    assert "batch 8 needs" in text and "more than the 580 MiB there are" in text
    assert "even with checkpointing" in text
    assert "batch 1 with accumulation saves about" in text
    assert "a teacher cache saves up to" in text
    assert "an optimizer without states (sgd) saves" in text
    with pytest.raises(DoesNotFit, match="parameters and gradients alone do not fit"):
        plan_batch(vit, None, image_size=64, vram=8, candidates=[1])


@pytest.mark.parametrize(
    ("match", "call"),
    [
        ("batch must be at least 1, got 0", lambda: plan_step(tiny_step, 0, image_size=2)),
        ("device must be one of", lambda: plan_step(tiny_step, 1, image_size=2, device="tpu")),
        (
            r"candidates must be batches of at least 1, got \[\]",
            lambda: plan_batch(vit, None, image_size=64, vram=GIB, candidates=[]),
        ),
        (
            "Linear has no gradient checkpointing",
            lambda: plan_memory(lambda: nn.Linear(2, 2), 1, image_size=2, checkpointing=True),
        ),
    ],
)
def test_rejects(match: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=match):
        call()


def test_steps_of_a_chain_are_its_links() -> None:
    config = load("vit_chain_digits", ["optim.ema=0.99", "batch=auto"], files=False)
    first, second, third = steps_of(config)
    assert [step.batch for step in (first, second, third)] == [None] * 3
    assert third.title == (
        "vit_chain_digits, student: vit_tiny_patch16_224 taught by vit_small_patch16_224"
    )
    plan = second.plan(32, False)
    # The student's averaged copy, and the teacher.
    both = sum(
        sum(p.numel() for p in timm.create_model(name, num_classes=10, **args).parameters())
        for name, args in zip(config.chain[:2], config.model_args[:2], strict=True)
    )
    assert plan.categories["frozen models"] == pytest.approx(4 * both, rel=0.05)
    cached = steps_of(load("vit_chain_digits", ["cache=true"], files=False))[1].plan(32, False)
    assert cached.categories["frozen models"] == 0


def test_a_config_is_planned_without_its_files() -> None:
    assert load("orion50", files=False) == CONFIGS["orion50"]()
    with pytest.raises(ConfigError, match="prune.keep: .*must be at most 1"):
        load("orion50", ["prune.keep=1.5"], files=False)


def test_memory_of_the_compensation(capsys: pytest.CaptureFixture[str]) -> None:
    """Weights of both models, D^2 doubles a block, and every image with its two streams."""
    config = load("smoke", ["prune.calibration_views=30"], files=False)
    (step,) = steps_of(config)
    step_module = step.build(False)
    models = (step_module.module.student, step_module.teachers[0])
    weights = sum(p.nbytes for model in models for p in model.parameters())
    each = 4 * (3 * 32 * 32 + 2 * 16 * 64)
    assert step.before is not None
    assert step.before.bytes == weights + 4 * 8 * 64**2 + 32 * each  # 8 whole batches of 4
    (once,) = steps_of(load("smoke", ["prune.sequential=false"], files=False))
    assert once.before is not None and once.before.bytes == step.before.bytes - 28 * each
    (cut,) = steps_of(load("smoke", ["prune.compensate=false"], files=False))
    assert cut.before is None
    many = ["--config", "smoke", "--set", "prune.calibration_views=1000000", "--vram", "4GiB"]
    assert main(many) == 1
    text = capsys.readouterr().out
    assert "the compensation DOES NOT FIT into 4.0 GiB: set fewer prune.calibration_views" in text
    assert " fits into 4.0 GiB" in text


@pytest.mark.slow
def test_eva_l_distils_in_24_gib() -> None:
    (step,) = steps_of(load("orion50", files=False))
    plan = step.plan(4, True)
    assert plan.peak_bytes < 7 * GIB
    assert plan.categories["parameters"] == pytest.approx(4 * 253e6, rel=0.01)


def test_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdfast.plan.CANDIDATES", [4, 8])
    assert main(["--config", "smoke", "--vram", "1GiB", "--modules"]) == 0
    text = capsys.readouterr().out
    assert "smoke: distil into 50% of the heads" in text
    assert "before it, the compensation keeps 7 MiB" in text
    assert "fits into 1.0 GiB" in text and "largest batch in 1.0 GiB: 8 or more, " in text
    assert "blocks.0" in text
    assert main(["--model", "test_vit", "--teacher", "test_vit2", "--vram", "100MiB"]) == 1
    text = capsys.readouterr().out
    assert "DOES NOT FIT into 0.1 GiB" in text and "parameters and gradients alone" in text


def test_hours(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdfast.plan.CANDIDATES", [4, 8])
    words = ["--model", "test_vit", "--gpu", "2x4090"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "fits into 24.0 GiB" in text and "--images says how many an epoch has" in text
    assert main([*words, "--images", "1000000000000"]) == 0
    text = capsys.readouterr().out
    number = r"(\S+)"
    line = (
        f"{number} GFLOP an image, 1,000,000,000,000 images: {number} to {number} hours on 2 x RTX"
    )
    found = re.search(line, text)
    assert found is not None and "165 TFLOP/s each" in text
    flop, fast, slow = (float(x) for x in found.groups())
    assert slow == pytest.approx(flop * 1e9 / (2 * 165 * 0.25) / 3600, rel=0.05)
    assert fast == pytest.approx(slow / 2, rel=0.05)
    assert main(["--config", "smoke", "--gpu", "l4", "--set", "run.precision=fp32"]) == 0
    text = capsys.readouterr().out
    assert "48 images, 2 epochs" in text and "30.3 TFLOP/s" in text and "minutes on L4" in text
    (step,) = steps_of(load("orion50_frames", files=False))
    assert (step.images, step.epochs) == (6 * 234_769, 3)


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        (["--config", "smoke", "--images", "9"], "--images is for the hours, which need --gpu"),
        (["--config", "smoke", "--images", "0", "--gpu", "l4"], "--images must be at least 1"),
        ([], "give either --config or --model"),
        (["--config", "smoke", "--model", "resnet18"], "give either --config or --model"),
        (
            ["--config", "smoke", "--batch", "8", "--checkpointing"],
            "--batch, --checkpointing cannot be said of a config; change its keys by --set",
        ),
        (["--model", "resnet18", "--set", "a=1"], "--set changes a config, and --model has none"),
        (["--model", "resnet18", "--classes", "0"], "--classes must be at least 1, got 0"),
        (["--model", "resnet18", "--batch", "0"], "plan: batch must be at least 1, got 0"),
        (["--model", "resnet18", "--optimizer", "x"], "Optimizer x not found"),
        (
            ["--config", "smoke", "--set", "run.batch=1"],
            "config: 1 problem\n  - run.batch: unknown",
        ),
        (["--config", "nothing"], "config: 1 problem\n  - name: must be one of orion50"),
        (["--model", "vit_nothing"], "--model: timm has no model 'vit_nothing'"),
    ],
)
def test_command_explains(argv: list[str], match: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert f"error: {match}" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["6 apples", "-1GiB", "0", ""])
def test_sizes_that_are_none(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--config", "smoke", f"--vram={text}"])
    assert f"--vram: must be a size such as 6GiB, got {text!r}" in capsys.readouterr().err


def test_info_prints_memory(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert info.main(["--memory"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "Memory"
    now, peak = (float(x) for x in re.findall(r"([\d.]+) GiB", lines[3]))
    assert 0.1 < now <= peak
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    for name, value in (("max_memory_allocated", 3), ("memory_allocated", 2)):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda _, value=value: value * GIB)
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda _: 4 * GIB)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (5 * GIB, 6 * GIB))
    assert info.memory()[2:] == [
        ("gpu 0", "5.0 GiB free of 6.0 GiB, all processes together"),
        ("gpu 0, this process", "2.0 GiB allocated (peak 3.0 GiB), 4.0 GiB reserved"),
    ]
