"""The parts of bench/gpu.py: each yields rows of figures, measured in this process. See there."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor

from gloria.dist.gpus import card_of_cuda_name
from gloria.model.config import flops_per_token

ROOT = Path(__file__).resolve().parent.parent
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
HALF = torch.bfloat16 if CUDA else torch.float32
GPT2 = {"model.preset": "gpt2-124m"}
NEO = {"model.preset": "gpt-neo-1.3b"}
TINY = {"model.hidden_size": 64, "model.num_layers": 2, "model.num_heads": 2, "model.vocab_size": 2304}
STEPS = (("gpt2-124m", GPT2, 512), ("gpt2-124m", GPT2, 1024), ("gpt-neo-1.3b", NEO, 512), ("gpt-neo-1.3b", NEO, 2048))
PASSES = 4  # micro-batches a step

Row = dict[str, Any]


def milliseconds(function: Callable[[], object], repeats: int = 10, warm: int = 3) -> float:
    """The median time of a call, after some that warm it up."""
    times = []
    for number in range(warm + (repeats if CUDA else 2)):
        if CUDA:
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if CUDA:
            torch.cuda.synchronize()
        if number >= warm:
            times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def random(*size: int, grad: bool = False) -> Tensor:
    return torch.randn(size, device=DEVICE, dtype=HALF).requires_grad_(grad)


def ceilings() -> Iterator[Row]:
    """What this card gives at most: products of matrices, and copies."""
    scale = 1 if CUDA else 32
    for rows, inner, columns in ((8192, 8192, 8192), (16384, 2048, 2048), (16384, 2048, 8192), (16384, 8192, 2048)):
        left, right = random(rows // scale, inner // scale), random(inner // scale, columns // scale)
        took = milliseconds(lambda: left @ right)  # noqa: B023 - called at once
        flops = 2 * left.numel() * right.shape[1]
        yield {"what": f"{rows} x {inner} x {columns}", "ms": took, "TFLOP/s": flops / took / 1e9}
    source = torch.empty(2**30 // scale**2, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    took = milliseconds(lambda: target.copy_(source))
    yield {"what": "copy of 1 GiB", "ms": took, "GB/s": 2 * source.numel() / took / 1e6}


def head() -> Iterator[Row]:
    """The head's three products by the width of the vocabulary: an odd one has kernels of its own."""
    hidden_size = 2048 if CUDA else 64
    for tokens in (512, 4096) if CUDA else (64,):
        for vocabulary in (50257, 50258, 50304) if CUDA else (1001, 1024):
            hidden, weight = random(tokens, hidden_size), random(vocabulary, hidden_size)
            gradient = random(tokens, vocabulary)
            products = {
                "logits": lambda: hidden @ weight.T,  # noqa: B023
                "by hidden": lambda: gradient @ weight,  # noqa: B023
                "by weight": lambda: gradient.T @ hidden,  # noqa: B023
            }
            row: Row = {"tokens": tokens, "vocabulary": vocabulary}
            for name, product in products.items():
                row[f"{name} ms"] = milliseconds(product)
            row["TFLOP/s"] = 6 * tokens * vocabulary * hidden_size / sum(row[f"{name} ms"] for name in products) / 1e9
            yield row


def attention() -> Iterator[Row]:
    """A layer's attention, forward and backward, by kernel; gradients against those of the mask in fp32."""
    from gloria.model.attention import attend, attention_masks

    batch, heads, dim = (8, 16, 128) if CUDA else (2, 2, 16)
    for length in (512, 2048) if CUDA else (64,):
        for window in (0, 256 if CUDA else 16):
            inputs = [random(batch, length, heads, dim, grad=True) for _ in range(3)]
            upstream = random(batch, length, heads * dim)
            wanted: list[Tensor] | None = None
            for kernel in ("fp32", "sdpa", "varlen", "flex") if CUDA else ("fp32", "sdpa"):
                dtype = torch.float32 if kernel == "fp32" else HALF
                used = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
                masks = attention_masks(
                    *(batch, length, window, None),
                    device=DEVICE,
                    dtype=dtype,
                    **({} if kernel == "fp32" else {"kernel": kernel}),
                )

                def both() -> list[Tensor]:
                    output = attend(*used, masks, window=window, scale=1.0, dropout=0.0)  # noqa: B023
                    return torch.autograd.grad(output, used, upstream.to(dtype))  # noqa: B023

                row = {"length": length, "window": window, "kernel": kernel}
                try:
                    call = torch.compile(both) if kernel == "flex" else both
                    gradients = [gradient.float() for gradient in call()]
                    wanted = wanted or gradients
                    error = max(
                        float((own - exact).norm() / exact.norm()) for own, exact in zip(gradients, wanted, strict=True)
                    )
                    yield row | {"ms": milliseconds(call), "gradient error": error}
                except Exception as error:
                    yield row | {"ms": math.nan, "failed": str(error).splitlines()[0][:90]}


def loss() -> Iterator[Row]:
    """Head and loss of 16,384 tokens, forward and backward: time and peak, and torch's plain cross entropy beside."""
    from gloria.model.loss import chunk_losses, language_model_loss

    tokens, size, rows, vocabulary = (16384, 2048, 50304, 50257) if CUDA else (256, 32, 1024, 1001)
    hidden, weight = random(8, tokens // 8, size, grad=True), random(rows, size, grad=True)
    labels = torch.randint(vocabulary, (8, tokens // 8), device=DEVICE)

    def plain() -> None:
        logits = F.linear(hidden, weight).float()[..., :vocabulary]
        F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()

    def chunked(chunk: int | None, pointwise: Callable[..., Any] | None) -> Callable[[], None]:
        def call() -> None:
            language_model_loss(hidden, weight, labels, vocabulary, chunk_tokens=chunk, token_losses=pointwise)[
                0
            ].backward()

        return call

    cases: dict[str, Callable[[], None]] = {"plain": plain, "ours, as it is chosen": chunked(None, None)}
    if CUDA:
        compiled = torch.compile(chunk_losses)
        cases |= {f"ours, chunks of {chunk}, compiled": chunked(chunk, compiled) for chunk in (512, 2048, 4096, 8192)}
    for name, call in cases.items():
        hidden.grad = weight.grad = None
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if CUDA else 0
        took = milliseconds(call)
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30 if CUDA else math.nan
        yield {"what": name, "ms": took, "peak GiB": peak}


def shape_of(model: str, length: int) -> Any:
    """The shape of a preset, or without CUDA of a tiny model of its family."""
    from gloria.model.config import ModelSection, resolve_shape

    sizes = {} if CUDA else {key.removeprefix("model."): value for key, value in TINY.items()}
    return resolve_shape(
        ModelSection(preset=model, **sizes), vocab_size=50257 if CUDA else 2304, sequence_length=length
    )


@contextlib.contextmanager
def opened(recipe: dict[str, Any], length: int, micro_batch: int, corpus: str) -> Iterator[Any]:
    """A run of `gloria.pretrain` in this process (or in all ranks of torchrun), with everything that a user's has."""
    import gloria.pretrain as pretrain
    from gloria.train.group import process_group
    from gloria.train.pretraining import open_pretraining
    from gloria.train.run import close_run

    keys = {
        "data.corpus": corpus,
        "train.sequence_length": length,
        "train.micro_batch": micro_batch,
        "train.global_batch": micro_batch * PASSES,
        "train.steps": 10**6,
        "schedule.warmup_steps": 0,
        "valid.every": 0,
        "checkpoint.every": 10**6,
        "log.every": 10**6,
        "log.tensorboard": "false",
        **({} if CUDA else TINY | {"run.device": "cpu"}),
        **recipe,
    }
    launch = os.environ.get("TORCHELASTIC_RUN_ID", os.getpid())  # the same on all ranks
    with contextlib.ExitStack() as stack:
        folder = f"{tempfile.gettempdir()}/gloria-bench-{launch}-{recipe.get('dist.replicas', 1)}"
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        flags = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
        config, plan = pretrain.check(["--config", str(ROOT / "launch/demo.toml"), "--run.dir", folder, *flags])
        with process_group(config) as process:
            run = open_pretraining(config, plan, process)
            try:
                yield run
            finally:
                close_run(run, "stopped")


def timed_steps(run: Any, steps: int) -> float:
    """Seconds a step of the real loop, after three that compile and allocate."""
    from gloria.train import loop

    pending = None
    for number in range(3 + steps):
        if number == 3:
            if CUDA:
                torch.cuda.synchronize()
            start = time.perf_counter()
        step = loop.take_step(run, run.objective.next_batch(run))
        if pending:
            loop.finish_step(run, pending)
        pending = step
    loop.finish_step(run, pending)
    if CUDA:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


def both_mfu(shape: Any, parameters: int, length: int, tokens_per_s: float) -> Row:
    """MFU in both counts, where the card is known."""
    card = card_of_cuda_name(torch.cuda.get_device_name()) if CUDA else None
    peak = card.peak("bf16") if card else None
    ours = flops_per_token(shape, length)
    foundry = 6 * parameters + 12 * shape.num_layers * shape.hidden_size * length
    row: Row = {"TFLOP/s": tokens_per_s * ours / 1e12}
    if peak:
        row |= {"MFU %": 100 * tokens_per_s * ours / peak, "llm-foundry %": 100 * tokens_per_s * foundry / peak}
    return row


def step(model: str, length: int, corpus: str, micro_batch: int, checkpointing: str) -> Iterator[Row]:
    """Whole steps of the real loop at one micro-batch: speed, peak memory and the forecast of it."""
    from gloria.train.config import peak_of_step

    recipe = next(recipe for name, recipe, _ in STEPS if name == model)
    recipe = recipe | {"train.activation_checkpointing": checkpointing}
    with opened(recipe, length, micro_batch, corpus) as run:
        seconds = timed_steps(run, 8 if CUDA else 2)
        tokens = micro_batch * PASSES * length
        shape, kept = run.objective.plan.shape, run.keep_gathered
        forecast = peak_of_step(run.config, shape, 1, precision=run.precision, on_gpu=CUDA, keep_gathered=kept).total
        parameters = sum(parameter.numel() for parameter in run.model.parameters())
        yield {
            "who": "gloria",
            "model": model,
            "T": length,
            "checkpointing": checkpointing,
            "micro-batch": micro_batch,
            "ms": 1000 * seconds,
            "tokens/s": tokens / seconds,
            **both_mfu(run.objective.plan.shape, parameters, length, tokens / seconds),
            "peak GiB": torch.cuda.max_memory_allocated() / 2**30 if CUDA else math.nan,
            "forecast GiB": forecast / 2**30,
        }


def host(corpus: str) -> Iterator[Row]:
    """Where a step of GPT-2 124M waits: synchronising calls that torch warns of, and a trace's idle time."""
    from torch.profiler import ProfilerActivity, profile

    from gloria.train import loop

    with opened(GPT2, 512 if CUDA else 32, 8 if CUDA else 2, corpus) as run:
        timed_steps(run, 2)
        batch = run.objective.next_batch(run)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if CUDA:
                torch.cuda.set_sync_debug_mode("warn")
            pending = loop.take_step(run, batch)
            if CUDA:
                torch.cuda.set_sync_debug_mode("default")
        waits = sorted(
            {f"{Path(line.filename).name}:{line.lineno}" for line in caught if "synchroniz" in str(line.message)}
        )
        loop.finish_step(run, pending)
        yield {"what": "synchronising calls in take_step", "count": len(waits), "where": " ".join(waits)}
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * CUDA
        start = time.perf_counter()
        with profile(activities=activities) as trace:
            seconds = timed_steps(run, 3)
        wall = time.perf_counter() - start
        kernels = [event for event in trace.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        busy = sum(event.device_time for event in kernels) / 1e6
        yield {"what": "kernels a step", "count": len(kernels) // 6, "ms": 1000 * seconds}
        yield {"what": "share of the time in kernels, under the profiler", "%": 100 * busy / wall}


def decode() -> Iterator[Row]:
    """Continuing prompts of many lengths, with and without cuDNN's attention, which plans anew for each length."""
    from gloria.model.transformer import Transformer

    model = Transformer(shape_of("gpt2-124m", 1024 if CUDA else 64)).to(DEVICE, HALF).eval()
    prompts = [list(range(1, 2 + 7 * number % (97 if CUDA else 31))) for number in range(64 if CUDA else 4)]
    for cudnn in (True, False):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        with torch.no_grad():
            start = time.perf_counter()
            for prompt in prompts:
                ids = torch.tensor([prompt], device=DEVICE)
                cache = model.new_cache(1, 160 if CUDA else 48)
                positions = torch.arange(len(prompt), device=DEVICE)[None]
                for _ in range(32 if CUDA else 4):
                    hidden = model.hidden_states(ids, positions=positions, cache=cache)
                    ids = model.logits(hidden[:, -1:]).argmax(-1)
                    positions = positions[:, -1:] + 1
            if CUDA:
                torch.cuda.synchronize()
            took = time.perf_counter() - start
        yield {"what": f"{len(prompts)} prompts, cuDNN {'on' if cudnn else 'off'}", "seconds": took}


def saving(corpus: str) -> Iterator[Row]:
    """A background checkpoint of GPT-2 124M: what the loop waits for, first and second, and steps beside it."""
    from gloria.train import checkpointing, loop

    with opened(GPT2, 512 if CUDA else 32, 8 if CUDA else 2, corpus) as run:
        undisturbed = timed_steps(run, 4)
        for name in ("first", "second"):
            if CUDA:
                torch.cuda.synchronize()
            start = time.perf_counter()
            loop.save(run, asynchronous=True)
            waited = time.perf_counter() - start
            beside = timed_steps(run, 1)
            checkpointing.wait(run)
            whole = time.perf_counter() - start
            pinned = sum(tensor.numel() * tensor.element_size() for tensor in run.staging.values()) / 2**30
            yield {
                "what": f"{name} save",
                "loop waits ms": 1000 * waited,
                "until durable s": whole,
                "step beside / alone": beside / undisturbed,
                "staging GiB": pinned,
            }
