"""What does cleaning buy? Bits per byte of small models at equal tokens of raw and of refined text, three seeds each.

    python bench/cleaning.py CORPUS_FOLDER [--sources NAME NAME] [--others NAME ...] [--steps 300]

The two sources are those of which `gloria.refine` (preset fineweb2-por, near-duplicates over all) keeps the smallest
share of documents. A tenth of each, by the hash of the text, is held out: it is refined, too, and documents of which a
fifth of the runs of 13 words are in the raw training text are left out, so that no model has seen them. `--others` are
sources that no model reads; refined, they are held out as well. Tokenizer, model (GPT-Neo's 2 layers x 96), weights,
windows, steps and seeds are the same for both texts. Bits per byte by `gloria.evaluate`; the spread is over the seeds.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import xxhash
import zstandard

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from gloria.data.corpus import open_corpus  # noqa: E402 (after the path is set)
from gloria.data.prepare.text import clean  # noqa: E402
from gloria.data.tokenizer import TokenizerConfig, train_tokenizer  # noqa: E402

WEIGHTS = (0.7, 0.3)
SEEDS = (1, 2, 3)
HELD = 10  # one document in so many
RUN_WORDS = 13
MOST_SEEN = 0.2
WINDOWS, LENGTH = 24, 128  # a step
LAYERS, HIDDEN, VOCABULARY = 2, 96, 2048
KINDS = ("raw", "refined")
HELD_OUT = ("own", "others")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--sources", nargs=2, default=["libreoffice-help-pt", "bosque-cetenfolha"])
    parser.add_argument("--others", nargs="*", default=["debian-docs-pt", "bosque-cetempublico"])
    parser.add_argument("--steps", type=int, default=300)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench(Path(folder), flags.corpus, flags.sources, flags.others, flags.steps)


def bench(folder: Path, corpus: Path, sources: Sequence[str], others: Sequence[str], steps: int) -> None:
    raw = {name: read_source(corpus, name) for name in [*sources, *others]}
    for name in sources:
        held = [text for text in raw[name] if xxhash.xxh3_64_intdigest(text) % HELD == 0]
        write(folder / "raw" / f"held-{name}.jsonl", held)
        write(folder / "raw" / f"{name}.jsonl", [text for text in raw[name] if text not in set(held)])
    for name in others:
        write(folder / "raw" / f"other-{name}.jsonl", raw[name])
    names = [*(f"held-{name}" for name in sources), *(f"other-{name}" for name in others), *sources]
    refined = refine(folder, names)
    for name in sources:
        write(folder / "refined" / f"{name}.jsonl", refined[name])
    seen = {run for name in sources for text in texts_of(folder / "raw" / f"{name}.jsonl") for run in runs(text)}
    write(folder / "own.jsonl", [text for name in sources for text in unseen(refined[f"held-{name}"], seen)])
    write(folder / "others.jsonl", [text for name in others for text in unseen(refined[f"other-{name}"], seen)])
    for name in HELD_OUT:
        texts = texts_of(folder / f"{name}.jsonl")
        print(f"held out, {name}: {len(texts)} documents, {sum(len(text.encode()) for text in texts) / 1e3:.0f} kB")
    both = [text for kind in KINDS for name in sources for text in texts_of(folder / kind / f"{name}.jsonl")]
    train_tokenizer(TokenizerConfig(vocab_size=VOCABULARY), both, folder / "tokenizer")
    for kind in KINDS:
        prepare(folder, kind, sources, steps)
    runs_ = [Run(folder, kind, seed, steps) for seed in SEEDS for kind in KINDS]
    scores: dict[tuple[str, str], list[float]] = {(kind, held): [] for kind in KINDS for held in HELD_OUT}
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for run, found in zip(runs_, pool.imap(train_and_score, runs_)):
            for held, value in found.items():
                scores[run.kind, held].append(value)
            shown = ", ".join(f"{held} {value:.4f}" for held, value in found.items())
            print(f"seed {run.seed}, {run.kind}: {shown} bits per byte", flush=True)
    for held in HELD_OUT:
        one, two = scores["raw", held], scores["refined", held]
        gains = [after - before for before, after in zip(one, two)]
        print(
            f"{held}: raw {spread(one)}, refined {spread(two)}; refined - raw, seed by seed: "
            f"{', '.join(f'{gain:+.4f}' for gain in gains)}"
        )


def spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.4f} (s.d. {statistics.stdev(values):.4f})"


def read_source(corpus: Path, name: str) -> list[str]:
    (path,) = corpus.rglob(f"{name}.jsonl")
    return list(dict.fromkeys(clean(text) for text in texts_of(path)))


def texts_of(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def write(path: Path, texts: Sequence[str]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def runs(text: str) -> list[tuple[str, ...]]:
    words = text.split()
    return [tuple(words[i : i + RUN_WORDS]) for i in range(len(words) - RUN_WORDS + 1)]


def unseen(texts: Sequence[str], seen: set[tuple[str, ...]]) -> list[str]:
    own = [(text, runs(text)) for text in texts]
    return [text for text, found in own if sum(run in seen for run in found) <= MOST_SEEN * len(found)]


def refine(folder: Path, names: Sequence[str]) -> dict[str, list[str]]:
    """What `gloria.refine` keeps of each; a text that is like a held-out one goes from the training text."""
    recipe = [f'[tokenizer]\n[refine]\nout = "{folder}/cleaned"\n[dedup]\nscope = "all"\n[pii]']
    recipe += [f'[[source]]\nname = "{name}"\npaths = ["raw/{name}.jsonl"]' for name in names]
    (folder / "refine.toml").write_text("\n".join(recipe))
    print(command("gloria.refine", str(folder / "refine.toml")), end="")
    kept: dict[str, list[str]] = {name: [] for name in names}
    for name in names:
        for path in sorted((folder / "cleaned" / name).glob("*.zst")):
            with zstandard.open(path, "rt", encoding="utf-8") as file:
                kept[name] += [json.loads(line)["text"] for line in file]
    return kept


def prepare(folder: Path, kind: str, sources: Sequence[str], steps: int) -> None:
    recipe = [f'[tokenizer]\npath = "{folder}/tokenizer"']
    for name, weight in zip(sources, WEIGHTS):
        recipe.append(f'[[source]]\nname = "{name}"\npaths = ["{kind}/{name}.jsonl"]\nweight = {weight}')
    (folder / f"{kind}.toml").write_text("\n".join(recipe))
    command("gloria.prepare", str(folder / f"{kind}.toml"), "--out", str(folder / f"{kind}-corpus"))
    corpus = open_corpus(folder / f"{kind}-corpus")
    tokens = [corpus.source(name).train.tokens for name in sources]
    epochs = [steps * WINDOWS * LENGTH * weight / size for weight, size in zip(WEIGHTS, tokens)]
    parts = [f"{name} {size:,} tokens ({epoch:.1f} epochs)" for name, size, epoch in zip(sources, tokens, epochs)]
    print(f"{kind}: {', '.join(parts)}", flush=True)


class Run(NamedTuple):
    folder: Path
    kind: str
    seed: int
    steps: int


def train_and_score(run: Run) -> dict[str, float]:
    """Bits per byte of each held-out text of a model trained on one core."""
    import torch

    from gloria import evaluate, pretrain

    torch.set_num_threads(1)
    place = run.folder / f"{run.kind}-{run.seed}"
    flags = {
        "config": REPOSITORY / "launch" / "demo.toml",
        "model.num-layers": LAYERS,
        "model.hidden-size": HIDDEN,
        "run.dir": place,
        "run.seed": run.seed,
        "data.corpus": run.folder / f"{run.kind}-corpus",
        "train.steps": run.steps,
        "valid.every": 0,
        "checkpoint.every": run.steps,
        "log.tensorboard": "false",
    }
    found = {}
    with contextlib.redirect_stdout(io.StringIO()):
        assert pretrain.main([f"--{key}={value}" for key, value in flags.items()]) == 0
        for held in HELD_OUT:
            out = run.folder / f"{run.kind}-{run.seed}-{held}"
            data = run.folder / f"{held}.jsonl"
            given = ["--task=perplexity", f"--model={place}", f"--data={data}", f"--out={out}", f"--stride={LENGTH}"]
            assert evaluate.main(given) == 0
            (record,) = json.loads((out / "results.json").read_text())["results"]
            found[held] = record["scores"]["bits_per_byte"]["value"]
    return found


def command(module: str, *arguments: str) -> str:
    """What a command of ours prints; its last lines, where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


if __name__ == "__main__":
    main()
