"""What does cleaning buy? Bits per byte of small models at equal tokens of raw and of refined text, three seeds each.

    python bench/cleaning.py CORPUS_FOLDER [--sources NAME NAME] [--others NAME ...] [--steps 300]

The two sources are those of which `gloria.refine` (preset fineweb2-por, near-duplicates over all) keeps the smallest
share of documents. A tenth of each, by the hash of the text, is held out: it is refined, too, and documents of which a
fifth of the runs of 13 words are in the raw training text are left out, so that no model has seen them. `--others` are
sources that no model reads; refined, they are held out as well. Tokenizer, model (4 layers x 128), weights, windows,
steps and seeds are the same for both texts. Bits per byte by `gloria.evaluate`; the spread is over the seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

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
    for name in ("own", "others"):
        texts = texts_of(folder / f"{name}.jsonl")
        print(f"held out, {name}: {len(texts)} documents, {sum(len(text.encode()) for text in texts) / 1e3:.0f} kB")
    both = [
        text for kind in ("raw", "refined") for name in sources for text in texts_of(folder / kind / f"{name}.jsonl")
    ]
    train_tokenizer(TokenizerConfig(vocab_size=4096), both, folder / "tokenizer")
    for kind in ("raw", "refined"):
        prepare(folder, kind, sources, steps)
    scores: dict[tuple[str, str], list[float]] = {}
    for seed in SEEDS:
        for kind in ("raw", "refined"):
            begin = time.perf_counter()
            train(folder, kind, seed, steps)
            for held in ("own", "others"):
                scores.setdefault((kind, held), []).append(score(folder, kind, seed, held))
            found = ", ".join(f"{held} {scores[kind, held][-1]:.4f}" for held in ("own", "others"))
            print(f"seed {seed}, {kind}: {found} bits per byte ({time.perf_counter() - begin:.0f} s)", flush=True)
    for held in ("own", "others"):
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


def train(folder: Path, kind: str, seed: int, steps: int) -> None:
    flags = {
        "run.dir": folder / f"{kind}-{seed}",
        "run.seed": seed,
        "data.corpus": folder / f"{kind}-corpus",
        "train.steps": steps,
        "valid.every": steps,
        "checkpoint.every": steps,
        "log.tensorboard": "false",
    }
    arguments = [part for key, value in flags.items() for part in (f"--{key}", str(value))]
    command("gloria.pretrain", "--config", str(REPOSITORY / "launch" / "demo.toml"), *arguments)


def score(folder: Path, kind: str, seed: int, held: str) -> float:
    out = folder / f"{kind}-{seed}-{held}"
    model, data = str(folder / f"{kind}-{seed}"), str(folder / f"{held}.jsonl")
    command("gloria.evaluate", "--task", "perplexity", "--model", model, "--data", data, "--out", str(out))
    return json.loads((out / "results.json").read_text())["results"][0]["scores"]["bits_per_byte"]["value"]


def command(module: str, *arguments: str) -> str:
    """What a command of ours prints; its last lines, where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


if __name__ == "__main__":
    main()
