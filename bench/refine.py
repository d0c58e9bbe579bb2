"""What cleaning finds of planted documents, what it drops of real ones, and how fast each step is.

    python bench/refine.py CORPUS_FOLDER TASKS_FOLDER

CORPUS_FOLDER holds one folder a source with JSON lines of text; TASKS_FOLDER the files of tasks (calame-pt, assin2).
Planted by a seed: mojibake, exact and near-duplicates of known Jaccard similarity, other languages, spam, hidden
sentences of tasks, e-mails and IPs. Each kind is a source of its own, so recall and precision of a step are read off
the report. Beside it the quality filters run in plain datatrove.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import zstandard

from gloria import refine
from gloria.data.prepare.text import clean
from gloria.data.refine.presets import find_preset
from gloria.data.refine.records import read_record
from gloria.errors import UserError

SPAM = [
    "Clique",
    "aqui",
    "para",
    "ganhar",
    "um",
    "prémio!!!",
    "Comprar",
    "barato",
    "online",
    "casino",
    "bónus",
    "grátis",
]
FOREIGN = {
    "es": "La reunión de ayer terminó tarde porque nadie quería firmar el acuerdo sin leer antes todas las páginas; el "
    "alcalde dijo que volvería el lunes, y los vecinos de {} se fueron a casa con {} preguntas y sin respuestas.",
    "gl": "A reunión de onte rematou tarde porque ninguén quería asinar o acordo sen ler antes todas as páxinas; o "
    "alcalde dixo que volvería o luns, e os veciños de {} marcharon para a casa con {} preguntas e sen respostas.",
    "en": "Yesterday's meeting ended late because nobody wanted to sign the agreement before reading all of its pages; "
    "the mayor said that he would be back on Monday, and the people of {} went home with {} questions.",
}


def real_documents(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.rglob("*.jsonl")):
        for line in path.open():
            yield path.stem, json.loads(line)["text"]


def jaccard(a: str, b: str) -> float:
    """Similarity of the sets of 5-word shingles."""
    one, two = ({tuple(words[i : i + 5]) for i in range(len(words) - 4)} for words in (a.split(), b.split()))
    return len(one & two) / max(len(one | two), 1)


def plant(real: list[str], hidden: list[str], choose: random.Random) -> dict[str, list[str]]:
    """Planted documents by kind."""
    long = [text for text in real if 600 < len(text) < 6000]
    moji = [text.encode().decode("latin-1") for text in choose.sample(long, 500)]
    near = []
    for text in choose.sample(long, 500):
        words = text.split(" ")
        for _ in range(max(1, len(words) // 60)):  # a word in 60 changed: similarity of about 0.85
            words[choose.randrange(len(words))] = choose.choice(SPAM)
        near.append(" ".join(words))
    towns = ["Braga", "Faro", "Vigo", "Lugo", "Cáceres", "Leeds", "Évora", "Beja"]
    foreign = {
        key: [
            " ".join(text.format(choose.choice(towns), choose.randint(2, 99)) for _ in range(2)) + f" {n}."
            for n in range(200)
        ]
        for key, text in FOREIGN.items()
    }
    spam = [" ".join(choose.choices(SPAM, k=12)) * 12 for _ in range(300)]
    held = [f"{choose.choice(long)[:900]}\n{text}\n{choose.choice(long)[:900]}" for text in choose.sample(hidden, 100)]
    private = [f"{choose.choice(long)[:1500]} Contacto: nome{n}@exemplo.pt, servidor 81.{n}.7.9." for n in range(50)]
    exact = choose.sample(long, 500)
    return {"mojibake": moji, "exact": exact, "near": near, **foreign, "spam": spam, "held": held, "private": private}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("corpus", type=Path)
    parser.add_argument("tasks", type=Path)
    parser.add_argument("--work", type=Path, default=Path("/tmp/bench-refine"))
    parser.add_argument("--preset", default="fineweb2-por")
    parser.add_argument("--every", type=int, default=1, help="take each n-th real document")
    flags = parser.parse_args()
    flags.work.mkdir(parents=True, exist_ok=True)
    choose = random.Random(20261124)
    real = list(real_documents(flags.corpus))[:: flags.every]
    lines = (flags.tasks / "calame-pt/calamept_all.jsonl").read_text().splitlines()
    hidden = [f"{row['sentence']} {row['last_word']}" for row in map(json.loads, lines)]
    planted = plant([text for _, text in real], [text for text in hidden if len(text.split()) > 9], choose)
    names = {"real": [text for _, text in real], **planted}
    recipe = ["[tokenizer]", "[refine]", f'preset = "{flags.preset}"', "[dedup]", 'scope = "all"', "[pii]"]
    recipe += ["[decontaminate]", f'tasks = {{calame = "{flags.tasks}/calame-pt", assin2 = "{flags.tasks}/assin2"}}']
    for name, texts in names.items():
        rows = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        (flags.work / f"{name}.jsonl").write_text(rows)
        recipe += ["[[source]]", f'name = "{name}"', f'paths = ["{name}.jsonl"]']
        recipe += ['preset = "none"', 'limits = {language = "pt"}'] if name in FOREIGN else []
    (flags.work / "corpus.toml").write_text("\n".join(recipe))
    start = time.process_time()
    out = flags.work / "out"
    with suppress(UserError):  # of some planted sources nothing is left
        refine.main([str(flags.work / "corpus.toml"), "--out", str(out), "--workers", "1", "--force"])
    took = time.process_time() - start
    show(out, names, took)
    beside_datatrove(flags.work, flags.preset)


def beside_datatrove(work: Path, preset: str) -> None:
    """The quality filters on the real documents in plain datatrove: the time, and whether the same documents stay."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter

    from gloria.data.refine import steps

    limits = find_preset(preset)
    filters = [steps.gopher_repetition(limits), steps.fineweb_quality(limits), steps.gopher_quality(limits)]
    reader = JsonlReader(str(work), glob_pattern="real.jsonl")
    pipeline = [reader, *filters, JsonlWriter(str(work / "peer"), compression="zstd")]
    start = time.process_time()
    LocalPipelineExecutor(pipeline, tasks=1, workers=1, logging_dir=str(work / "peer-logs"), skip_completed=False).run()
    theirs = time.process_time() - start
    recipe = f'[tokenizer]\n[refine]\npreset = "{preset}"\nencoding = false\n[[source]]\nname = "real"\n'
    (work / "same.toml").write_text(f'{recipe}paths = ["real.jsonl"]\nlimits = {{language = ""}}\n')
    start = time.process_time()
    refine.main([str(work / "same.toml"), "--out", str(work / "same"), "--workers", "1", "--force"])
    ours = time.process_time() - start
    kept = []
    for folder in (work / "peer", work / "same/real"):
        files = [zstandard.open(path, "rt", encoding="utf-8") for path in sorted(folder.glob("0*.zst"))]
        kept.append([clean(json.loads(line)["text"]) for file in files for line in file])
    print(f"the same filters, processor time: plain datatrove {theirs:.1f} s, here {ours:.1f} s")
    print(f"{len(kept[0]):,} and {len(kept[1]):,} documents stay; they are the same: {kept[0] == kept[1]}")


def show(out: Path, names: dict[str, list[str]], took: float) -> None:
    report = json.loads((out / "report.json").read_text())["sources"]

    def dropped(source: str, step: str) -> int:
        rules = report[source]["steps"].get(step, {}).get("dropped", {})
        return sum(rule["documents"] for rule in rules.values())

    def seen(source: str, step: str) -> int:
        return report[source]["steps"][step]["documents"]

    read = len(names["real"])
    print(f"\n{'planted':<12}{'step':<18}{'found':>7}{'of':>7}{'recall':>9}   dropped of {read:,} real documents")
    rows = [("mojibake", "encoding", report["mojibake"]["steps"]["encoding"]["changed"], len(names["mojibake"]))]
    rows += [
        (kind, "near-duplicates", dropped(kind, "near-duplicates"), seen(kind, "near-duplicates"))
        for kind in ("exact", "near")
    ]
    rows += [(kind, "language", dropped(kind, "language"), len(names[kind])) for kind in FOREIGN]
    spam = sum(dropped("spam", step) for step in report["spam"]["steps"])
    rows += [("spam", "any", spam, len(names["spam"]))]
    rows += [("held", "evaluation data", dropped("held", "evaluation data"), seen("held", "evaluation data"))]
    rows += [
        (
            "private",
            "personal data",
            report["private"]["steps"]["personal data"]["changed"],
            seen("private", "personal data"),
        )
    ]
    for kind, step, found, of in rows:
        lost = (
            sum(dropped("real", name) for name in report["real"]["steps"]) if step == "any" else dropped("real", step)
        )
        lost = report["real"]["steps"]["encoding"]["changed"] if step == "encoding" else lost
        print(f"{kind:<12}{step:<18}{found:>7}{of:>7}{found / max(of, 1):>9.1%}   {lost:,}")
    seconds: Counter[str] = Counter()
    for path in (out / "work/records").rglob("*.json"):
        seconds.update(read_record(path).seconds)
    size = sum(len(text.encode()) for texts in names.values() for text in texts) / 1e6
    print(f"\n{size:.1f} MB in {took:.0f} s of processor time: {size / took:.2f} MB/s")
    for step, spent in seconds.most_common():
        documents = sum(found["steps"].get(step, {}).get("characters", 0) for found in report.values()) / 1e6
        print(f"  {step:<18}{spent:>8.1f} s {documents / max(spent, 1e-9):>10.2f} million characters/s")
    print(f"  {'the rest':<18}{took - seconds.total():>8.1f} s (reading, MinHash, writing)")
    kept = [json.loads(line) for path in (out / "real").glob("*.zst") for line in zstandard.open(path, "rt")]
    print(f"{len(kept):,} of {read:,} real documents stay")


if __name__ == "__main__":
    main()
