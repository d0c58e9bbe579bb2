"""gloria.prepare beside datatrove's tokenizer and Megatron's preprocess_data, on the same text and tokenizer.

    python bench/prepare_peers.py [--megatron A/CHECKOUT/OF/Megatron-LM] [--copies 60]

One worker each, a process of its own each: MB of text by second of processor time, start-up taken off by a run on one
document. Ours also drops duplicates, repairs text, cuts validation off and hashes what it writes; theirs only tokenise.
datatrove shuffles documents in memory. What is not installed is named and left out.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
DATATROVE = """
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
steps = [JsonlReader({text!r}), DocumentTokenizer({out!r}, {tokenizer!r}, eos_token="<|endoftext|>")]
LocalPipelineExecutor(steps, tasks=1, workers=1, logging_dir={out!r} + "-logs").run()
"""
# It asks for Python 3.12, of which it uses typing.override alone.
MEGATRON = """
import runpy, sys, typing, typing_extensions
typing.override = typing_extensions.override
sys.argv = [{script!r}, *{words!r}]
if __name__ == "__main__":
    runpy.run_path({script!r}, run_name="__main__")
"""


def write_text(folder: Path, copies: int) -> float:
    """The sample texts again and again, with another number in each paragraph, as JSON lines; MB of text."""
    texts = [file.read_text("utf-8") for file in sorted((REPOSITORY / "gloria/data/sample").rglob("*.txt"))]
    size = 0
    folder.mkdir()
    with open(folder / "text.jsonl", "w", encoding="utf-8") as file:
        for copy in range(copies):
            for text in texts[: None if copies > 1 else 1]:
                numbered = text.replace("\n\n", f"\n\n{copy}. ")
                size += len(numbered.encode())
                file.write(json.dumps({"text": numbered}) + "\n")
    return size / 1e6


def commands(text: Path, out: Path, tokenizer: Path, megatron: Path | None) -> dict[str, list[str]]:
    recipe = f'[tokenizer]\npath = "{tokenizer}"\n[[source]]\nname = "text"\npaths = ["{text}/text.jsonl"]\n'
    out.mkdir()
    (out / "recipe.toml").write_text(recipe)
    python = sys.executable
    ours = [python, "-m", "gloria.prepare", str(out / "recipe.toml"), "--out", str(out / "gloria"), "--workers", "1"]
    found = {"gloria.prepare": ours}
    if find_spec("datatrove"):
        script = DATATROVE.format(
            text=str(text), out=str(out / "datatrove"), tokenizer=str(tokenizer / "tokenizer.json")
        )
        found["datatrove"] = [python, "-c", script]
    if megatron:
        flags = {"--input": text / "text.jsonl", "--output-prefix": out / "megatron", "--workers": 1}
        flags |= {"--tokenizer-type": "HuggingFaceTokenizer", "--tokenizer-model": tokenizer}
        words = [str(word) for pair in flags.items() for word in pair]
        script = MEGATRON.format(script=str(megatron / "tools/preprocess_data.py"), words=[*words, "--append-eod"])
        # Its own modules before those of an installed megatron-core.
        found["megatron"] = ["env", f"PYTHONPATH={megatron}", python, "-c", script]
    return found


def seconds(command: list[str]) -> float:
    """Processor seconds of a command and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: status {done.returncode}\n{done.stdout[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megatron", type=Path, help="a checkout of Megatron-LM, for its tools/preprocess_data.py")
    parser.add_argument("--copies", type=int, default=60, help="of the sample texts")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-prepare-") as name:
        folder = Path(name)
        megabytes = write_text(folder / "text", options.copies)
        write_text(folder / "one", 1)
        tokens = [sys.executable, "-m", "gloria.prepare", "launch/sample.toml", "--out", str(folder / "sample")]
        subprocess.run(tokens, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
        shutil.move(folder / "sample/tokenizer", folder / "tokenizer")
        empty = commands(folder / "one", folder / "out-one", folder / "tokenizer", options.megatron)
        whole = commands(folder / "text", folder / "out", folder / "tokenizer", options.megatron)
        for missing in sorted({"gloria.prepare", "datatrove", "megatron"} - whole.keys()):
            print(f"{missing}: left out; it is not here")
        for label, command in whole.items():
            start_up = seconds(empty[label])
            taken = seconds(command) - start_up
            line = {"what": label, "megabytes": round(megabytes, 1), "MB_per_cpu_s": round(megabytes / taken, 2)}
            print(json.dumps(line | {"start_up_cpu_s": round(start_up, 1)}), flush=True)


if __name__ == "__main__":
    main()
