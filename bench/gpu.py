"""What one GPU does with this code: ceilings, parts of a step, whole steps, and transformers beside them.

    python bench/gpu.py [--out FOLDER] [--minutes 10] [--parts ceilings,head,...] [--corpus data/sample]

Nothing is downloaded. Every part runs in a process of its own, so that one that runs out of memory or hangs costs no
other; what did not run is listed with the reason. Prints a table a part and writes all figures to FOLDER/gpu.json.
Without CUDA it runs itself on a tiny model, to see that it works: those figures mean nothing.

Two counts of FLOPs a token, forward and backward, stand side by side:
    ours         6 N + 12 H (T a global layer, the window a local one), N all parameters but position embeddings
    llm-foundry  6 N + 12 H (T a layer, local or not), N all parameters
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.gpu_parts import (
    CUDA,
    DEVICE,
    GPT2,
    NEO,
    ROOT,
    STEPS,
    Row,
    attention,
    ceilings,
    decode,
    head,
    host,
    loss,
    saving,
    step,
)
from bench.gpu_peer import peer

MARK = "figures: "
PARTS: dict[str, Callable[..., Iterable[Row]]] = {
    "ceilings": ceilings,
    "head": head,
    "attention": attention,
    "loss": loss,
    "host": host,
    "decode": decode,
    "saving": saving,
    "step": step,
    "peer": peer,
}


def child(part: str, timeout: float, **arguments: Any) -> tuple[list[Row], str]:
    """A part in a process of its own: its rows, and why it has no more ("")."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", part, json.dumps(arguments)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired as ended:
        output = ended.stdout.decode() if isinstance(ended.stdout, bytes) else ended.stdout or ""
        return _rows(output), f"ended after {timeout:.0f} s"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    memory = any("out of memory" in line for line in lines)
    why = "" if done.returncode == 0 else "out of memory" if memory else (lines or ["no word"])[-1][:160]
    return _rows(done.stdout), why


def _rows(output: str) -> list[Row]:
    return [json.loads(line.removeprefix(MARK)) for line in output.splitlines() if line.startswith(MARK)]


def best_step(model: str, length: int, corpus: str, left: Callable[[], float]) -> tuple[list[Row], str]:
    """Steps at growing micro-batches until one does not fit or is slower; all rows, the best one last."""
    found: list[Row] = []
    micro_batch = 8 if CUDA else 1
    why = ""
    while micro_batch >= 1:
        rows, why = child(
            "step", left(), model=model, length=length, corpus=corpus, micro_batch=micro_batch, checkpointing="none"
        )
        found += rows
        if (
            rows
            and (len(found) < 2 or found[-1]["tokens/s"] > 1.01 * found[-2]["tokens/s"])
            and micro_batch < 128
            and CUDA
        ):
            micro_batch *= 2
        elif not found and why == "out of memory":
            micro_batch //= 2
        else:
            break
    found.sort(key=lambda row: row["tokens/s"])
    return found, why if not found or why != "out of memory" else ""


def table(title: str, rows: list[Row]) -> None:
    """Print rows as a table with a column for each key."""
    print(f"\n{title}")
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(key)) for key in keys] for row in rows]
    widths = [max(len(key), *(len(line[number]) for line in cells)) for number, key in enumerate(keys)]
    for line in [keys, *cells]:
        print("  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)), flush=True)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:,.4g}" if isinstance(value, float) else str(value)


def about() -> Row:
    """The machine and the versions that the figures hold for."""
    import transformers

    found: Row = {"torch": torch.__version__, "transformers": transformers.__version__, "date": time.strftime("%F")}
    if CUDA:
        properties = torch.cuda.get_device_properties(DEVICE)
        found |= {"gpu": properties.name, "GiB": properties.total_memory / 2**30, "cuda": torch.version.cuda}
        found["compute capability"] = f"{properties.major}.{properties.minor}"
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/bench-gpu")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--corpus", default="data/sample", help="made of the sample where it is not there")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, arguments = options.child
        for row in PARTS[name](**json.loads(arguments)):
            print(MARK + json.dumps(row), flush=True)
        return 0
    wanted = options.parts.split(",")
    if unknown := set(wanted) - set(PARTS):
        parser.error(f"unknown parts {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    end = time.monotonic() + 60 * options.minutes

    def left() -> float:
        return max(1.0, end - time.monotonic())

    if not Path(options.corpus, "manifest.json").exists():
        recipe = [str(ROOT / "launch/sample.toml"), "--out", options.corpus]
        subprocess.run(
            [sys.executable, "-m", "gloria.prepare", *recipe], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
        )
    corpus = str(Path(options.corpus).resolve())
    facts = about()
    table("machine", [facts])
    if not CUDA:
        print("\nno CUDA here: a tiny model on the CPU, to see that the script works; THE FIGURES MEAN NOTHING")
    results: dict[str, Any] = {"about": facts, "parts": {}, "not run": {}}
    for name in wanted:
        if name in ("step", "peer"):
            continue
        uses_corpus = {"corpus": corpus} if name in ("host", "saving") else {}
        rows, why = child(name, min(left(), 150.0), **uses_corpus)
        record(results, name, rows, why)
    for model, _, length in STEPS if CUDA else [("gpt2-124m", GPT2, 32), ("gpt-neo-1.3b", NEO, 64)]:
        title = f"{model}, T = {length}"
        rows, why = best_step(model, length, corpus, left) if "step" in wanted else ([], "")
        if "peer" in wanted:
            micro_batch = int(rows[-1]["micro-batch"]) if rows else 8 if CUDA else 1
            for implementation in ("eager", "flash_attention_2") if "neo" in model else ("sdpa", "flash_attention_2"):
                while micro_batch >= 1:
                    more, reason = child(
                        "peer",
                        min(left(), 120.0),
                        model=model,
                        length=length,
                        micro_batch=micro_batch,
                        implementation=implementation,
                    )
                    if reason != "out of memory":
                        break
                    micro_batch //= 2
                rows += more
                if reason:
                    results["not run"][f"{title}, transformers {implementation}"] = reason
        record(results, title, rows, why)
    for name, why in results["not run"].items():
        print(f"not run: {name}: {why}")
    Path(options.out).mkdir(parents=True, exist_ok=True)
    target = Path(options.out, "gpu.json")
    target.write_text(json.dumps(results, indent=1) + "\n")
    print(f"{target}: written")
    return 0


def record(results: dict[str, Any], name: str, rows: list[Row], why: str) -> None:
    """Print and keep what a part has given, and why there is no more."""
    if rows:
        table(name, rows)
        results["parts"][name] = rows
    if why:
        results["not run"][name] = why


if __name__ == "__main__":
    sys.exit(main())
