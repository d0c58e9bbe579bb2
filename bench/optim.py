"""What Muon costs beside AdamW: time and memory of a step, measured on a small model and counted for large ones.

    python bench/optim.py [--preset gpt-neo-125m --layers 12 --tokens 4096] [--rounds 5]

Measured on this machine's CPU in fp32, the two by turns: forward and backward (the same for both), the update, and the
peak of what torch has allocated in an update beyond weights, gradients and state. Counted from the shapes, as
`gloria.plan` does, for a step of half a million tokens on H100s: `python -m gloria.plan` has it for any recipe.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from gloria.dist.sharding import local_gradients, update
from gloria.model.config import PRESETS, TransformerConfig, count_parameters, flops_per_token
from gloria.model.memory import memory_per_rank, newton_schulz_flops, traffic_per_step
from gloria.model.transformer import Transformer, initial_value
from gloria.optim.optimizers import OptimConfig, build_optimizer

NAMES = ("adamw", "muon")
STEP_TOKENS, LENGTH = 2**19, 2048


class Trained:
    """A model with its optimizer."""

    def __init__(self, shape: TransformerConfig, name: str) -> None:
        self.model = Transformer(shape)
        with torch.no_grad():
            for key, parameter in self.model.named_parameters():
                parameter.copy_(initial_value(key, parameter.shape, shape, 0))
        self.optimizer = build_optimizer(OptimConfig(name), self.model.named_parameters())
        states = (value for state in self.optimizer.state.values() for value in state.values())
        self.state_bytes = sum(value.nbytes for value in states)

    def backward(self, ids: torch.Tensor) -> float:
        """Seconds of forward and backward."""
        start = time.perf_counter()
        (self.model(ids[:, :-1], ids[:, 1:])[0] / ids.numel()).backward()
        return time.perf_counter() - start

    def update(self) -> float:
        """Seconds of the update."""
        start = time.perf_counter()
        update(self.optimizer, local_gradients(self.model), torch.tensor(1.0), torch.tensor(True))
        return time.perf_counter() - start

    def work_bytes(self, ids: torch.Tensor) -> int:
        """The most that an update allocates at a time."""
        self.backward(ids)
        gradients = local_gradients(self.model)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            update(self.optimizer, gradients, torch.tensor(1.0), torch.tensor(True))
        events = profiled.profiler.kineto_results.events()
        total = peak = 0
        for event in sorted((each for each in events if each.name() == "[memory]"), key=lambda each: each.start_ns()):
            total += event.nbytes()
            peak = max(peak, total)
        return peak


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="gpt-neo-125m")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    preset = PRESETS[options.preset]
    layers = options.layers
    shape = replace(preset, num_layers=layers, attention_layers=preset.attention_layers[:layers])
    measured(shape, options.tokens, options.rounds)
    counted()


def measured(shape: TransformerConfig, tokens: int, rounds: int) -> None:
    """One line an optimizer, and their ratio."""
    length = min(tokens, 512)
    ids = torch.randint(0, shape.vocab_size, (tokens // length, length + 1), generator=torch.Generator().manual_seed(0))
    runs = {name: Trained(shape, name) for name in NAMES}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in NAMES}
    for number in range(rounds + 1):
        for name, run in runs.items():
            times = run.backward(ids), run.update()
            if number:  # the first one allocates
                seconds[name].append(times)
    print(f"{count_parameters(shape)['total'] / 1e6:.0f} M parameters, {tokens:,} tokens a step, {rounds} steps each")
    print(f"{'':<8}{'fwd+bwd ms':>12}{'update ms':>12}{'state MB':>12}{'work MB':>12}{'GFLOP of the update':>22}")
    for name, run in runs.items():
        passes, updates = (1000 * statistics.median(part) for part in zip(*seconds[name]))
        work = run.work_bytes(ids) / 1e6
        run.backward(ids)
        with FlopCounterMode(display=False) as counter:
            run.update()
        flops = counter.get_total_flops()
        assert flops == (newton_schulz_flops(shape) if name == "muon" else 0)
        print(
            f"{name:<8}{passes:>12.1f}{updates:>12.1f}{run.state_bytes / 1e6:>12.1f}{work:>12.1f}{flops / 1e9:>22.1f}"
        )


def counted() -> None:
    """State, memory at the update, operations and traffic of a rank."""
    print(f"\ncounted: a step of {STEP_TOKENS:,} tokens, T = {LENGTH}")
    row = "{:<14}{:>5}{:>8}{:>11}{:>11}{:>14}{:>12}{:>12}".format
    print(row("", "GPUs", "", "state GB", "peak GiB", "TFLOP a GPU", "of a step", "sent GB"))
    for preset in ("gpt-neo-125m", "gpt-neo-1.3b"):
        shape = PRESETS[preset]
        for gpus in (1, 8):
            model = flops_per_token(shape, LENGTH) * STEP_TOKENS
            sent = {
                name: traffic_per_step(shape, passes=8, ranks=gpus, replicas=1, element_bytes=2, optimizer=name).shards
                for name in NAMES
            }
            for name in NAMES:
                memory = memory_per_rank(
                    shape,
                    sequence_length=LENGTH,
                    micro_batch=4,
                    accumulation=STEP_TOKENS // (LENGTH * 4 * gpus),
                    shards=gpus,
                    element_bytes=2,
                    activation_checkpointing="none",
                    on_gpu=True,
                    by_flash=True,
                    optimizer=name,
                )
                flops = newton_schulz_flops(shape) if name == "muon" else 0
                cells = (f"{memory.optimizer / 1e9:.2f}", f"{memory.total / 2**30:.2f}", f"{flops / gpus / 1e12:.2f}")
                share, extra = f"{100 * flops / model:.2f} %", f"+{(sent[name] - sent['adamw']) / 1e9:.3f}"
                print(row(preset, gpus, name, *cells, share, extra))


if __name__ == "__main__":
    main()
