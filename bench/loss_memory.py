"""Peak memory and time of the loss, forward and backward: chunked (`gloria.model.loss`) against torch's cross
entropy.

    python bench/loss_memory.py [--tokens 4096] [--vocab 50257] [--hidden 768] [--dtype float32]

Each runs in a process of its own on the CPU. Peak is the growth of the process's largest resident set over
what it was with hidden states and head weight in memory, so it holds logits, their gradients and the two
input gradients.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

METHODS = ("plain", "chunked")


def measure(method: str, tokens: int, vocab: int, hidden_size: int, dtype: str) -> dict[str, float]:
    """In this process: growth of the peak resident set in MB, seconds of the second of two passes, the loss."""
    import torch
    import torch.nn.functional as F

    from gloria.model.loss import language_model_loss

    torch.manual_seed(0)
    hidden = torch.randn(1, tokens, hidden_size).to(getattr(torch, dtype)).requires_grad_()
    weight = (0.02 * torch.randn(vocab, hidden_size)).to(hidden.dtype)
    if method == "chunked":
        weight = F.pad(weight, (0, 0, 0, -vocab % 128))
    weight.requires_grad_()
    labels = torch.randint(vocab, (1, tokens))
    (hidden[:, :8] @ weight[:8].T).sum().backward()  # the matrix library's own buffers are no loss's fault
    hidden.grad = weight.grad = None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):
        hidden.grad = weight.grad = None
        start = time.perf_counter()
        if method == "plain":
            logits = F.linear(hidden[0], weight).float()
            loss = F.cross_entropy(logits, labels[0], reduction="sum")
            del logits
        else:
            loss, _ = language_model_loss(hidden, weight, labels, vocab)
        loss.backward()
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"peak_mb": peak / 1024, "seconds": seconds, "loss": loss.item() / tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--method", choices=METHODS, help="measure this one here and print JSON")
    arguments = parser.parse_args()
    sizes = (arguments.tokens, arguments.vocab, arguments.hidden, arguments.dtype)
    if arguments.method:
        print(json.dumps(measure(arguments.method, *sizes)))
        return
    results = {}
    for method in METHODS:
        command = [sys.executable, __file__, *sys.argv[1:], "--method", method]
        results[method] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    print(f"{sizes[0]} tokens x {sizes[1]}, hidden {sizes[2]}, {sizes[3]}")
    for method, result in results.items():
        print(f"{method:8} peak {result['peak_mb']:7.0f} MB, {result['seconds']:.2f} s, loss {result['loss']:.6f}")
    print(f"chunked / plain: memory {results['chunked']['peak_mb'] / results['plain']['peak_mb']:.3f}, ", end="")
    print(f"time {results['chunked']['seconds'] / results['plain']['seconds']:.2f}")


if __name__ == "__main__":
    main()
