"""What cleaning finds of planted documents, what it drops of real ones, and how fast each step is.

    python bench/refine.py CORPUS_FOLDER TASKS_FOLDER

CORPUS_FOLDER holds one folder a source with JSON lines of text; TASKS_FOLDER the files of tasks (calame-pt, assin2).
Planted by a seed: mojibake, exact duplicates, near-duplicates of five Jaccard similarities, other languages, spam,
hidden sentences of tasks, personal data in several spellings, and numbers that look like them. Each kind is a source of
its own, so recall and precision of a step are read off the report. What is dropped of the real documents is listed by
rule. Beside it the quality filters run in plain datatrove, on every fifth real document.
"""

from __future__ import annotations

import argparse
import itertools
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


def changed(text: str, aim: float, choose: random.Random) -> str:
    """The text with words changed, so that its similarity to what it was is about `aim`."""
    words = text.split()
    count = max(1, round(len(words) * (1 - aim) / (5 * (1 + aim))))  # each ends five shingles and begins five
    for place in choose.sample(range(0, len(words) - 4, 5), min(count, len(words) // 5)):
        words[place] = f"{choose.choice(SPAM)}{choose.randrange(1000)}"
    return " ".join(words)


def nif(choose: random.Random, *, right: bool = True) -> str:
    digits = [choose.choice((1, 5)), *(choose.randrange(10) for _ in range(7))]
    check = 11 - sum(digit * weight for digit, weight in zip(digits, range(9, 1, -1))) % 11
    return "".join(map(str, digits)) + str(((0 if check >= 10 else check) + (not right)) % 10)


def iban(choose: random.Random, *, right: bool = True) -> str:
    bare = f"{choose.randrange(10**20, 10**21)}"
    return f"PT{98 - int(bare + '252900') % 97 - (not right):02d}{bare}"


def in_groups(text: str, *sizes: int, sign: str = " ") -> str:
    ends = list(itertools.accumulate(sizes, initial=0))
    return sign.join(part for part in (*(text[a:b] for a, b in itertools.pairwise(ends)), text[ends[-1] :]) if part)


def spell_email(n: int, choose: random.Random) -> str:
    return [f"nome{n}@exemplo.pt", f"ana.sa-{n}@correio.exemplo.com", f"RUI_{n}@EXEMPLO.ORG"][n % 3]


def spell_ip(n: int, choose: random.Random) -> str:
    return f"{choose.choice((81, 193, 8))}.{n}.7.{choose.randrange(1, 255)}"


def spell_nif(n: int, choose: random.Random) -> str:
    bare = nif(choose)
    return [bare, in_groups(bare, 3, 3), f"PT{bare}", in_groups(bare, 3, 3, sign=".")][n % 4]


def spell_iban(n: int, choose: random.Random) -> str:
    bare = iban(choose)
    return [bare, in_groups(bare, 4, 4, 4, 4, 4, 4)][n % 2]


def spell_phone(n: int, choose: random.Random) -> str:
    bare = f"{choose.choice(('91', '93', '96', '21', '22'))}{choose.randrange(10**6, 10**7)}"
    spaced = in_groups(bare, 3, 3)
    return [bare, spaced, f"+351 {spaced}", f"(+351) {bare}", in_groups(bare, 2, 3, 2)][n % 5]


def spell_nothing(n: int, choose: random.Random) -> str:
    """What looks like personal data and is none."""
    wrong = nif(choose, right=False)
    price = f"2,9{choose.randrange(10**7, 10**8)} euros"
    return [wrong, iban(choose, right=False), f"192.168.1.{n}", price, f"7{choose.randrange(10**10, 10**11)}"][n % 5]


CONTACT = "O contacto é"
PRIVATE = {
    "EMAIL": spell_email,
    "IP": spell_ip,
    "NIF": spell_nif,
    "IBAN": spell_iban,
    "PHONE": spell_phone,
    "none": spell_nothing,
}
SIMILAR = (0.95, 0.9, 0.8, 0.7, 0.5)  # of the sets of 5-word shingles


def plant(
    real: list[str], hidden: list[str], choose: random.Random
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Planted documents by kind, and of near-duplicates what each was made of."""
    long = [text for text in real if 600 < len(text) < 6000]
    moji = [text.encode().decode("latin-1") for text in choose.sample(long, 500)]
    near: dict[str, list[str]] = {}
    near_of: dict[str, list[str]] = {}
    for aim in SIMILAR:
        near_of[f"near-{aim:.2f}"] = choose.sample(long, 100)
        near[f"near-{aim:.2f}"] = [changed(text, aim, choose) for text in near_of[f"near-{aim:.2f}"]]
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
    sentences = [part for text in choose.sample(long, 200) for part in text.split(". ") if 60 < len(part) < 300]
    private = {
        # Of sentences from anywhere, so that none is a near-duplicate of a real document.
        f"private-{kind}": [
            f"{' '.join(choose.choices(sentences, k=9))} {CONTACT} {spell(n, choose)}." for n in range(50)
        ]
        for kind, spell in PRIVATE.items()
    }
    exact = choose.sample(long, 500)
    return {"mojibake": moji, "exact": exact, **near, **foreign, "spam": spam, "held": held, **private}, near_of


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
    planted, near_of = plant([text for _, text in real], [text for text in hidden if len(text.split()) > 9], choose)
    sources: dict[str, list[str]] = {}
    for name, text in real:
        sources.setdefault(name, []).append(text)
    names = {**sources, **planted}
    recipe = ["[tokenizer]", "[refine]", f'preset = "{flags.preset}"', "[dedup]", 'scope = "all"']
    recipe += ["[pii]", "nif = true", "iban = true", "phone = true"]
    recipe += ["[decontaminate]", f'tasks = {{calame = "{flags.tasks}/calame-pt", assin2 = "{flags.tasks}/assin2"}}']
    for name, texts in names.items():
        write_rows(flags.work / f"{name}.jsonl", texts)
        recipe += ["[[source]]", f'name = "{name}"', f'paths = ["{name}.jsonl"]']
        recipe += ['preset = "none"', 'limits = {language = "pt"}'] if name in FOREIGN else []
        recipe += ['preset = "none"'] if name.startswith("private-") else []
    (flags.work / "corpus.toml").write_text("\n".join(recipe))
    start = time.process_time()
    out = flags.work / "out"
    with suppress(UserError):  # of some planted sources nothing is left
        refine.main([str(flags.work / "corpus.toml"), "--out", str(out), "--workers", "1", "--force"])
    took = time.process_time() - start
    show(out, names, near_of, list(sources), took)
    write_rows(flags.work / "real.jsonl", [text for _, text in real[::5]])
    beside_datatrove(flags.work, flags.preset)


def write_rows(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))


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


def show(out: Path, names: dict[str, list[str]], near_of: dict[str, list[str]], real: list[str], took: float) -> None:
    report = json.loads((out / "report.json").read_text())["sources"]

    def dropped(source: str, step: str) -> int:
        rules = report[source]["steps"].get(step, {}).get("dropped", {})
        return sum(rule["documents"] for rule in rules.values())

    def seen(source: str, step: str) -> int:
        return report[source]["steps"][step]["documents"]

    def texts(source: str) -> list[str]:
        return [
            json.loads(line)["text"] for path in (out / source).glob("*.zst") for line in zstandard.open(path, "rt")
        ]

    read = sum(len(names[name]) for name in real)
    print(f"\n{'planted':<16}{'step':<18}{'found':>7}{'of':>7}{'recall':>9}   dropped of {read:,} real documents")
    rows = [("mojibake", "encoding", report["mojibake"]["steps"]["encoding"]["changed"], len(names["mojibake"]))]
    rows += [("exact", "near-duplicates", dropped("exact", "near-duplicates"), seen("exact", "near-duplicates"))]
    stayed = {clean(text) for source in real for text in texts(source)}
    for kind, originals in near_of.items():
        # A copy may stay whose original the quality rules have dropped; the others were missed.
        copies = {clean(text) for text in texts(kind)}
        missed = sum(clean(one) in stayed and clean(copy) in copies for one, copy in zip(originals, names[kind]))
        found = dropped(kind, "near-duplicates")
        rows += [(kind, "near-duplicates", found, found + missed)]
    rows += [(kind, "language", dropped(kind, "language"), len(names[kind])) for kind in FOREIGN]
    spam = sum(dropped("spam", step) for step in report["spam"]["steps"])
    rows += [("spam", "any", spam, len(names["spam"]))]
    rows += [("held", "evaluation data", dropped("held", "evaluation data"), seen("held", "evaluation data"))]
    for kind in PRIVATE:
        kept = texts(f"private-{kind}")
        found = sum(f"{CONTACT} <" in text if kind == "none" else f"{CONTACT} <{kind}>" in text for text in kept)
        rows += [(f"private-{kind}", "personal data", found, len(kept))]
    for kind, step, found, of in rows:
        steps = [name for name in report[real[0]]["steps"] if step in ("any", name)]
        lost = sum(dropped(source, name) for source in real for name in steps)
        if step in ("encoding", "personal data"):
            lost = sum(report[source]["steps"][step]["changed"] for source in real)
        print(f"{kind:<16}{step:<18}{found:>7}{of:>7}{found / max(of, 1):>9.1%}   {lost:,}")
    seconds: Counter[str] = Counter()
    for path in (out / "work/records").rglob("*.json"):
        seconds.update(read_record(path).seconds)
    size = sum(len(text.encode()) for texts in names.values() for text in texts) / 1e6
    print(f"\n{size:.1f} MB in {took:.0f} s of processor time: {size / took:.2f} MB/s")
    for step, spent in seconds.most_common():
        documents = sum(found["steps"].get(step, {}).get("characters", 0) for found in report.values()) / 1e6
        print(f"  {step:<18}{spent:>8.1f} s {documents / max(spent, 1e-9):>10.2f} million characters/s")
    print(f"  {'the rest':<18}{took - seconds.total():>8.1f} s (reading, MinHash, writing)")
    kept = sum(len(texts(source)) for source in real)
    print(f"{kept:,} of {read:,} real documents stay; dropped by step and rule:")
    rules: Counter[str] = Counter()
    for source in real:
        for step, what in report[source]["steps"].items():
            rules.update({f"{step}: {rule}": found["documents"] for rule, found in what.get("dropped", {}).items()})
    for rule, number in rules.most_common():
        print(f"  {rule:<50}{number:>7,}")


if __name__ == "__main__":
    main()
