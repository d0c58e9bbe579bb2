"""Is the plan right? Its memory and FLOPs of a step against measured ones, and what it costs to plan.

    python bench/plan.py

Seven configurations of gloria.pretrain run some steps on this machine's CPU, each in processes of its own. Memory is
measured twice: `tensors` is the peak of what torch's CPU allocator has handed out (torch.profiler's memory events, as
torch.cuda.max_memory_allocated reports on a GPU), and that is what is planned; `resident` is how much more ru_maxrss
is than that of the same run with a model of next to nothing: the operations' own scratch memory is in it. With several
ranks gloo's threads free memory behind the profiler's back, so what seems left over from earlier steps is taken off.
FLOPs are those of torch.utils.flop_counter.

Then the largest job there is a promise for: 10^13 tokens in 1,000 sources on 4,096 ranks.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
import tracemalloc
from contextlib import ExitStack, contextmanager
from pathlib import Path

LAUNCH = Path(__file__).resolve().parent.parent / "launch"
COMMON = {
    "valid.every": 0,
    "checkpoint.every": 1000000,
    "log.tensorboard": "false",
    "train.steps": 100,
    "schedule.warmup_steps": 0,
    "run.device": "cpu",
}
GPT2 = {"model.preset": "gpt2-124m", "model.num_layers": 6, "model.hidden_size": 256, "model.num_heads": 4}
NEO = {"model.preset": "gpt-neo-125m", "model.num_layers": 4, "model.hidden_size": 256, "model.num_heads": 4}
LLAMA = {"model.preset": "llama-630m", "model.num_layers": 4, "model.hidden_size": 256, "model.num_heads": 4}
LLAMA |= {"model.num_kv_heads": 2}
NOTHING = {"model.num_layers": 1, "model.hidden_size": 32, "model.num_heads": 2, "train.sequence_length": 32}
CASES = {  # name: (ranks, recipe)
    "gpt2, large vocabulary": (1, GPT2 | {"model.vocab_size": 16384, "train.global_batch": 8}),
    "gpt2, full, 4 passes": (
        1,
        GPT2 | {"train.activation_checkpointing": "full", "train.global_batch": 32, "train.micro_batch": 8},
    ),
    "gpt-neo, selective": (
        1,
        NEO | {"train.activation_checkpointing": "selective", "train.global_batch": 16, "model.window_size": 64},
    ),
    "gpt-neo, masked documents": (
        1,
        NEO | {"train.global_batch": 12, "model.window_size": 48, "data.mask_documents": "true"},
    ),
    "gpt-neo, bf16": (
        1,
        NEO
        | {"model.hidden_size": 128, "model.window_size": 32, "train.global_batch": 8, "train.sequence_length": 128}
        | {"train.precision": "bf16"},
    ),
    "llama, own head": (1, LLAMA | {"train.global_batch": 8}),
    "gpt-neo, 2 ranks, 2 passes": (
        2,
        NEO | {"train.global_batch": 32, "train.micro_batch": 8, "model.window_size": 64},
    ),
}


def main() -> int:
    """Print both tables."""
    print(f"{'':<28}{'planned':>10}{'tensors':>10}{'':>8}{'resident':>10}{'':>8}{'GFLOP':>10}{'counted':>10}{'':>9}")
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "sample"
        sample = ["-m", "gloria.prepare", str(LAUNCH / "sample.toml"), "--out", str(corpus)]
        subprocess.run([sys.executable, *sample], check=True, capture_output=True)
        for name, (ranks, recipe) in CASES.items():
            found = measure(recipe, ranks, corpus)
            cells = []
            for planned, measured in (("memory", "tensors"), ("memory", "resident"), ("flops", "counted")):
                cells.append(f"{100 * (found[planned] / found[measured] - 1):+.1f} %")
            mega = {key: f"{found[key] / 1e6:.1f} MB" for key in ("memory", "tensors", "resident")}
            print(
                f"{name:<28}{mega['memory']:>10}{mega['tensors']:>10}{cells[0]:>8}{mega['resident']:>10}{cells[1]:>8}"
                f"{found['flops'] / 1e9:>10.3f}{found['counted'] / 1e9:>10.3f}{cells[2]:>9}",
                flush=True,
            )
    print(json.dumps(largest_job()))
    return 0


def measure(recipe: dict[str, object], ranks: int, corpus: Path, *, resident: bool = True) -> dict[str, float]:
    """Of rank 0: bytes and FLOPs of a step as planned (`memory`, `flops`) and as measured."""
    found = _run("tensors", recipe, ranks, corpus)
    if resident:
        nothing = NOTHING | {"train.global_batch": 2 * ranks}
        whole, little = (_run("resident", each, ranks, corpus)["resident"] for each in (recipe, nothing))
        found["resident"] = whole - little
    return found


def _run(what: str, recipe: dict[str, object], ranks: int, corpus: Path) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        settings = {"run.dir": f"{folder}/run", "data.corpus": str(corpus), "train.sequence_length": 256}
        flags = [f"--{key}={value}" for key, value in (settings | COMMON | recipe).items()]
        port = _free_port()
        processes = [_start(what, flags, rank, ranks, port) for rank in range(ranks)]
        answers = [process.communicate(timeout=300)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), answers
    return json.loads(answers[0].splitlines()[-1])


def _start(what: str, flags: list[str], rank: int, ranks: int, port: int) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(LAUNCH.parent)}
    # What is freed goes back at once, so that the resident set is what is in use.
    environment["MALLOC_MMAP_THRESHOLD_"] = "262144"
    if ranks > 1:
        names = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks}
        environment |= {name: str(value) for name, value in names.items()}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, __file__, what, "--config", str(LAUNCH / "demo.toml"), *flags]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def child(what: str, flags: list[str]) -> int:
    """In a process of its own: run some steps, and print what was measured as JSON."""
    from gloria import pretrain

    config, plan = pretrain.check(flags)
    print(json.dumps((_tensors if what == "tensors" else _resident)(config, plan)), flush=True)
    return 0


@contextmanager
def _opened(config, plan):
    """The run, in a process group of its own, ready for its first step."""
    from gloria.train.group import process_group
    from gloria.train.pretraining import open_pretraining
    from gloria.train.run import close_run

    with process_group(config) as process:
        run = open_pretraining(config, plan, process)
        yield run
        close_run(run, "stopped")


def _take_step(run) -> None:
    from gloria.train.loop import take_step

    take_step(run, run.objective.next_batch(run))


def _counted_flops(run) -> int:
    """Of one more step, as torch counts them."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    aten = torch.ops.aten
    # What torch does not count: attention on CPU, and products added in place. The arguments here are shapes.
    attention = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *shapes, **_: sdpa_backward_flop_count(
            *shapes[:4]
        ),
        aten.addmm_: lambda _, left, right, **__: 2 * left[0] * left[1] * right[1],
    }
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        _take_step(run)
    return counter.get_total_flops()


def _tensors(config, plan) -> dict[str, float]:
    from torch.profiler import ProfilerActivity, profile, record_function

    from gloria.model.memory import executed_flops_per_token, newton_schulz_flops
    from gloria.train.config import peak_of_step

    with ExitStack() as until_counted:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            run = until_counted.enter_context(_opened(config, plan))
            for _ in range(3):
                with record_function("step"):
                    _take_step(run)
        flops = _counted_flops(run)
    train = config.train
    per_token = executed_flops_per_token(plan.shape, train.sequence_length, train.activation_checkpointing)
    return {
        "memory": peak_of_step(
            *(config, plan.shape, plan.world),
            precision=train.precision if train.precision in ("bf16", "fp16") else "fp32",
            on_gpu=False,
            keep_gathered=run.keep_gathered,
        ).total,
        "tensors": _peak_of_steps(profiled.profiler.kineto_results.events()),
        "flops": per_token * train.global_batch * train.sequence_length // plan.world
        + (newton_schulz_flops(plan.shape) if config.optim.name == "muon" else 0),
        "counted": flops,
    }


def _peak_of_steps(events) -> int:
    """The largest sum of allocations within a step, less what earlier steps seem to have left."""
    steps = [(event.start_ns(), event.end_ns()) for event in events if event.name() == "step"]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    starts, peaks = [0] * len(steps), [0] * len(steps)
    total = 0
    for moment, size in changes:
        total += size
        for number, (start, end) in enumerate(steps):
            if moment < start:
                starts[number] = total
            elif moment <= end:
                peaks[number] = max(peaks[number], total)
    return min(peak - (start - starts[0]) for peak, start in zip(peaks, starts))


def _resident(config, plan) -> dict[str, float]:
    with _opened(config, plan) as run:
        for _ in range(3):
            _take_step(run)
    return {"resident": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


def largest_job() -> dict[str, float]:
    """Seconds and bytes of the mixture and the plan for 10^13 tokens, 1,000 sources and 4,096 ranks."""
    from gloria.data.mixture import new_mixture
    from gloria.data.weights import Source
    from gloria.model.config import PRESETS
    from gloria.model.memory import memory_per_rank

    ranks, batch, length = 4096, 8192, 2048
    sources = {f"source-{number:04}": Source(10**10, f"{number:032x}") for number in range(1000)}
    weights = {name: 1 / (number + 1) for number, name in enumerate(sources)}
    tracemalloc.start()
    start = time.perf_counter()
    mixture = new_mixture(1, length, sources, weights, global_batch=batch)
    cost = {"mixture_s": time.perf_counter() - start, "mixture_bytes": tracemalloc.get_traced_memory()[0]}
    mixture.plan(0, batch)
    cost["with_a_planned_period_bytes"] = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    cost["state_bytes"] = len(json.dumps(mixture.state_dict()))
    steps = 10**13 // (batch * length)
    period = -(-mixture.stages[-1].period // batch)  # steps that one planned period serves
    for label, first in (("early", period), ("last", steps - period)):
        start = time.perf_counter()
        for step in range(first, first + period):
            samples = mixture.samples_of_step(step)
            mixture.plan(samples.start, len(samples))
        cost[f"{label}_step_ms"] = 1000 * (time.perf_counter() - start) / period
    start = time.perf_counter()
    mixture.epochs_at(steps * batch)
    cost["epochs_s"] = time.perf_counter() - start
    start = time.perf_counter()
    memory_per_rank(
        PRESETS["gloria-2.7b"],
        sequence_length=length,
        micro_batch=2,
        accumulation=1,
        shards=ranks,
        element_bytes=2,
        activation_checkpointing="full",
    )
    cost["memory_s"] = time.perf_counter() - start
    return {name: float(f"{value:.3g}") for name, value in cost.items()}


if __name__ == "__main__":
    raise SystemExit(child(sys.argv[1], sys.argv[2:]) if sys.argv[1:] else main())
