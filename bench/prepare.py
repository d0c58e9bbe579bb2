"""How fast is gloria.prepare, and how much of it is the tokenizer? MB of text by second of processor time.

    python bench/prepare.py [--text FOLDER] [--vocab-size 16384] [--kills 10] [--seed 0]

Prepares the JSON lines below FOLDER, a source a file, with one worker and with one a core; the tokenizer is trained
beforehand. Beside it stands the bare tokenizer, on the same documents in batches of the same size: what a perfect
pipeline would reach. Processor time, so that a busy machine does not count. Then a document is added to the source of
median size: --update against the whole. Without FOLDER the package's sample texts are taken many times over, with other
numbers in them.

With --kills, only this: launches are killed (SIGKILL) at random moments and started again, so many times. Each corpus
that comes out must be that of a launch nobody touched, byte for byte; status 1 at the first difference.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Set before the tokenizers library starts its threads: one worker is to be one core.
os.environ["TOKENIZERS_PARALLELISM"] = "false"

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from gloria.data.prepare.buckets import ENCODE_BYTES  # noqa: E402 (after the path and the environment are set)
from gloria.data.prepare.inputs import find_files  # noqa: E402
from gloria.data.prepare.passes import make_corpus  # noqa: E402
from gloria.data.prepare.recipe import read_recipe  # noqa: E402
from gloria.data.prepare.text import clean, read_documents  # noqa: E402
from gloria.data.prepare.workers import available_cores  # noqa: E402
from gloria.data.tokenizer import TokenizerConfig, load_tokenizer, train_tokenizer  # noqa: E402
from gloria.prepare import main as prepare  # noqa: E402

COPIES = 150  # of the sample texts, about 15 MB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="folder of .jsonl files; default: the sample texts, many times over")
    parser.add_argument("--vocab-size", type=int, default=16384)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if flags.kills:
            kill(Path(folder), flags.text, flags.vocab_size, flags.kills, random.Random(flags.seed))
        else:
            bench(Path(folder), flags.text, flags.vocab_size)


def bench(folder: Path, text: Path | None, vocab_size: int) -> None:
    files = sorted(text.rglob("*.jsonl")) if text else write_copies(folder)
    assert files, f"{text}: no .jsonl there"
    documents = [clean(document.text) for file in files for document in read_documents(str(file), "jsonl")]
    start = time.perf_counter()
    train_tokenizer(TokenizerConfig(vocab_size=vocab_size), documents, folder / "tokenizer")
    size = sum(len(document.encode()) for document in documents)
    print(f"training a tokenizer of {vocab_size}: {size / 1e6:.1f} MB in {time.perf_counter() - start:.1f} s")
    bare = bare_tokenizer(folder / "tokenizer", documents, size)
    print(f"bare tokenizer: {bare:.2f} MB/s a core")
    recipe = [f'[tokenizer]\npath = "{folder}/tokenizer"']
    recipe += [f'[[source]]\nname = "s{number}"\npaths = ["{file}"]' for number, file in enumerate(files)]
    (folder / "recipe.toml").write_text("\n".join(recipe))
    for workers in sorted({1, available_cores()}):
        work = folder / f"work-{workers}"
        work.mkdir()
        config = read_recipe(str(folder / "recipe.toml"))
        start = processor_seconds()
        _, stats = make_corpus(config, find_files(config, "recipe.toml"), "recipe.toml", work, workers)
        rate = size / 1e6 / (processor_seconds() - start)
        print(f"prepare, {workers} workers: {rate:.2f} MB/s a core, {rate / bare:.0%} of the bare tokenizer's speed")
        print(f"    by the clock: {stats}")
    update(folder, files)


def update(folder: Path, files: list[Path]) -> None:
    """A corpus is made, then made again after one source has changed, as the command does it."""
    changed = sorted(files, key=lambda file: file.stat().st_size)[len(files) // 2]
    own = shutil.copyfile(changed, folder / f"changed-{changed.name}")
    recipe, out = folder / "recipe.toml", folder / "out"
    recipe.write_text(recipe.read_text().replace(str(changed), str(own)))
    spent = []
    for flag in ([], ["--update"]):
        begin, processor = time.perf_counter(), processor_seconds()
        with contextlib.redirect_stdout(None):
            prepare([str(recipe), "--out", str(out), *flag])
        spent.append((processor_seconds() - processor, time.perf_counter() - begin))
        with open(own, "a") as file:
            file.write(json.dumps({"text": "Um documento que não estava lá."}) + "\n")
    (whole, whole_clock), (again, again_clock) = spent
    share = own.stat().st_size / sum(file.stat().st_size for file in files)
    print(
        f"one of {len(files)} sources changed, {share:.1%} of the text: {again:.1f} s of processor time against "
        f"{whole:.1f} for the whole, {again / whole:.1%}; by the clock {again_clock:.1f} s against {whole_clock:.1f}"
    )


def kill(folder: Path, text: Path | None, vocab_size: int, kills: int, chance: random.Random) -> None:
    """Kill launches at random moments until so many were killed."""
    files = sorted(text.rglob("*.jsonl")) if text else write_copies(folder)
    recipe = [f"[tokenizer]\nvocab_size = {vocab_size}"]
    recipe += [f'[[source]]\nname = "s{number}"\npaths = ["{file}"]' for number, file in enumerate(files)]
    (folder / "recipe.toml").write_text("\n".join(recipe))
    begin = time.perf_counter()
    prepare([str(folder / "recipe.toml"), "--out", str(folder / "whole")])
    seconds = time.perf_counter() - begin
    killed = launches = 0
    while killed < kills:
        out = folder / f"killed-{launches}"
        of_this = 0
        while not out.exists():
            command = [sys.executable, "-m", "gloria.prepare", str(folder / "recipe.toml"), "--out", str(out)]
            log = open(folder / "log", "a")  # noqa: SIM115 (one for all launches)
            process = subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=log, start_new_session=True)
            try:
                process.wait(chance.uniform(1, 1 + seconds / 4) if killed < kills else None)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                killed, of_this = killed + 1, of_this + 1
            launches += 1
        same = contents(out) == contents(folder / "whole")
        print(f"killed {of_this} times: {'byte-identical' if same else 'DIFFERENT'} to never killed", flush=True)
        if not same:
            raise SystemExit(1)
    lines = (folder / "log").read_text().splitlines()
    print(f"{killed} kills; of units kept: " + "; ".join(line for line in lines if "earlier launch" in line))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def processor_seconds() -> float:
    """Of this process and of its workers that have ended."""
    return sum(os.times()[:4])


def bare_tokenizer(folder: Path, documents: list[str], size: int) -> float:
    """MB of text by second of processor time that the tokenizer alone takes."""
    tokenizer = load_tokenizer(folder)
    seconds, batch, held = 0.0, [], 0
    for number, document in enumerate(documents, 1):
        batch.append(document)
        held += len(document)
        if held >= ENCODE_BYTES or number == len(documents):
            start = time.process_time()
            tokenizer.encode_batch(batch)
            seconds += time.process_time() - start
            batch, held = [], 0
    return size / 1e6 / seconds


def write_copies(folder: Path) -> list[Path]:
    """The sample texts again and again, each copy with a number in every paragraph: no two documents are equal."""
    files = []
    for source in sorted((REPOSITORY / "gloria" / "data" / "sample").iterdir()):
        texts = [file.read_text(encoding="utf-8") for file in sorted(source.glob("*.txt"))]
        files.append(folder / f"{source.name}.jsonl")
        with open(files[-1], "w", encoding="utf-8") as file:
            for copy in range(COPIES):
                for text in texts:
                    file.write(json.dumps({"text": text.replace("\n\n", f"\n\n{copy}. ")}) + "\n")
    return files


if __name__ == "__main__":
    main()
