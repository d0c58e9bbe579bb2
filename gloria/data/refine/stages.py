"""The stages of `gloria.refine` put together: from the shards of a plan to cleaned text and its manifest.

Without [dedup] one task a shard does everything. With it there are four stages: filter (to FOLDER/work, with MinHash
signatures), buckets and clusters (which documents go), and write. A stage's marks hold the key of all that it depends
on, so a launch does what no earlier one has done.
"""

from __future__ import annotations

import glob
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gloria.config.cli import to_mapping
from gloria.data.prepare.recipe import Recipe, SourceFile
from gloria.data.prepare.text import clean, read_documents
from gloria.data.refine.config import DecontaminateConfig, DedupConfig, PiiConfig
from gloria.data.refine.decontaminate import contamination_filter, make_index
from gloria.data.refine.dedup import Buckets, Clusters, DropDuplicates, Signatures, group_names
from gloria.data.refine.pipeline import SUFFIX, Clean, ReadCleaned, ReadRaw, Step, WriteCleaned
from gloria.data.refine.plan import Shard, dedup_record, limits_of, make_key
from gloria.data.refine.private import replace_private
from gloria.data.refine.records import Record, read_record, total
from gloria.data.refine.steps import build_steps
from gloria.data.refine.variety import BRAZIL, PORTUGAL, train
from gloria.errors import UserError
from gloria.files import hash_file, to_json

WORK = "work"
INDEX = "evaluation.npz"
VARIETY = "variety.npz"


@dataclass(frozen=True)
class Stage:
    """Tasks of one kind: what each runs, and the key of all that its result depends on."""

    name: str
    pipeline: list[Any]
    keys: list[str]


@dataclass(frozen=True)
class LastSteps:
    """What is done to documents that stay: decontamination, then personal data. Made in the task, from plain values."""

    decontaminate: DecontaminateConfig | None
    pii: PiiConfig | None
    index: str

    def __call__(self, shard: Shard, record: Record) -> list[Step]:
        steps = []
        if self.decontaminate:
            apply = contamination_filter(Path(self.index), self.decontaminate, record)
            steps.append(Step("evaluation data", apply))
        if self.pii:
            steps.append(Step("personal data", replace_private(self.pii)))
        return steps


@dataclass(frozen=True)
class FirstSteps:
    """What is done to each document as it is read, by source; and `last`, where no deduplication comes between."""

    limits: tuple[Any, ...]  # of each source
    encoding: bool
    variety: tuple[str, float] | None
    last: LastSteps | None

    def __call__(self, shard: Shard, record: Record) -> list[Step]:
        steps = build_steps(shard.config, self.limits[shard.source], self.encoding, self.variety, record)
        return steps + (self.last(shard, record) if self.last else [])


def make_stages(recipe: Recipe, shards: Sequence[Shard], index_key: str) -> list[Stage]:
    """The stages that the recipe asks for, in the order in which they run."""
    assert recipe.refine is not None
    out = str(Path(recipe.refine.out).absolute())  # fsspec keeps what a relative path was at first
    work = f"{out}/{WORK}"
    last = LastSteps(recipe.decontaminate, recipe.pii, f"{work}/{INDEX}")
    last_key = [
        index_key,
        recipe.decontaminate and to_mapping(recipe.decontaminate),
        recipe.pii and to_mapping(recipe.pii),
    ]
    limits = tuple(limits_of(recipe, source) for source in recipe.source)
    variety = (f"{work}/{VARIETY}", recipe.variety.least) if recipe.variety else None
    first = FirstSteps(limits, recipe.refine.encoding, variety, None if recipe.dedup else last)
    read = ReadRaw(shards, f"{work}/records/read")
    if not recipe.dedup:
        keys = [make_key([shard.key, last_key]) for shard in shards]
        return [Stage("clean", [read, Clean(shards, first, f"{work}/records/clean"), WriteCleaned(out)], keys)]
    dedup = recipe.dedup
    groups = group_names(dedup, shards)
    different = list(dict.fromkeys(groups))
    sources = [shard.config.name for shard in shards]
    filtered = f"{work}/filtered"
    clean = [
        read,
        Clean(shards, first, f"{work}/records/clean"),
        WriteCleaned(filtered),
        Signatures(groups, dedup, work),
    ]
    shape = [dedup.n_grams, dedup.buckets, dedup.hashes]
    clean_keys = [make_key([shard.key, group, shape]) for shard, group in zip(shards, groups)]
    members = {name: [key for key, group in zip(clean_keys, groups) if group == name] for name in different}
    group_keys = {name: make_key([members[name], groups.index(name), dedup_record(dedup)]) for name in different}
    last_pipeline = [
        ReadCleaned(shards, filtered),
        DropDuplicates(groups, work, f"{work}/records/duplicates"),
        Clean(shards, last, f"{work}/records/last"),
        WriteCleaned(out),
    ]
    return [
        Stage("clean", clean, clean_keys),
        Stage(
            "compare",
            [Buckets(different, dedup, work)],
            [make_key([group_keys[name], "pairs"]) for name in different for _ in range(dedup.buckets)],
        ),
        Stage("cluster", [Clusters(different, sources, dedup, work)], list(group_keys.values())),
        Stage("write", last_pipeline, [make_key([group_keys[group], last_key]) for group in groups]),
    ]


def forget(stage: Stage, ranks: Iterable[int], shards: Sequence[Shard], recipe: Recipe) -> None:
    """Remove what earlier launches left of tasks that run again, and of shards that there are no longer."""
    assert recipe.refine is not None
    out = Path(recipe.refine.out)
    work = out / WORK
    again = set(ranks)
    dedup = recipe.dedup or DedupConfig()
    groups = list(dict.fromkeys(group_names(dedup, shards)))
    if stage.name in ("clean", "write"):
        for rank in again:
            where = work / "filtered" if stage.name == "clean" and recipe.dedup else out
            (where / (shards[rank].name + SUFFIX)).unlink(missing_ok=True)
            for kind in ("read", "clean") if stage.name == "clean" else ("duplicates", "last"):
                (work / "records" / kind / f"{rank:05d}.json").unlink(missing_ok=True)
    if stage.name == "clean":
        for name in glob.glob(f"{glob.escape(str(work))}/signatures/*/bucket_*/*.minhash.sig"):
            rank = int(Path(name).name.partition(".")[0])
            if rank in again or rank >= len(shards):
                Path(name).unlink()
    for rank in again if stage.name in ("compare", "cluster") else ():
        if stage.name == "compare":
            group, bucket = divmod(rank, dedup.buckets)
            (work / "pairs" / groups[group] / f"{bucket:05d}_00.dups").unlink(missing_ok=True)
        else:
            shutil.rmtree(work / "clusters" / groups[rank], ignore_errors=True)


def prepare_index(recipe: Recipe, texts: Mapping[str, Sequence[str]]) -> tuple[str, dict[str, Counter[str]]]:
    """Write the index of evaluation data; its key (of its content) and counts of the texts by task."""
    assert recipe.refine is not None
    if not recipe.decontaminate:
        return "", {}
    path = Path(recipe.refine.out, WORK, INDEX)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name("new.npz")
    counts = make_index(texts, recipe.decontaminate, beside)
    beside.replace(path)
    return make_key({task: list(examples) for task, examples in texts.items()}), counts


def train_variety(recipe: Recipe, files: Sequence[Sequence[SourceFile]]) -> None:
    """Train the classifier on the files of European and Brazilian text, unless that was done with these files."""
    assert recipe.refine is not None
    if not files:
        return
    path = Path(recipe.refine.out, WORK, VARIETY)
    done = path.with_suffix(".json")
    key = to_json({"key": make_key([[hash_file(file.path) for file in group] for group in files])})
    if path.exists() and done.exists() and done.read_bytes() == key:
        return
    texts = [
        [clean(document.text) for file in group for document in read_documents(file.path, file.format)]
        for group in files
    ]
    for name, found in zip(("european", "brazilian"), texts):
        if len(found) < 10:
            raise UserError(f"variety.{name}: holds {len(found)} documents, too few to learn from; name more")
    count, right = train(dict(zip((PORTUGAL, BRAZIL), texts)), path)
    done.write_bytes(key)
    print(
        f"variety: trained on {count:,} pieces of text; of a fifth held out, {right:.1%} were told rightly", flush=True
    )


def read_records(recipe: Recipe, shards: Sequence[Shard]) -> list[Record]:
    """The record of each source, all its steps in the order in which they ran."""
    assert recipe.refine is not None
    folder = Path(recipe.refine.out, WORK, "records")
    kinds = ("read", "clean", "duplicates", "last") if recipe.dedup else ("read", "clean")
    records = []
    for number in range(len(recipe.source)):
        ranks = [rank for rank, shard in enumerate(shards) if shard.source == number]
        parts = {kind: total(read_record(folder / kind / f"{rank:05d}.json") for rank in ranks) for kind in kinds}
        whole = total(parts.values())
        # What stays is what the last stage let pass; lengths are those of cleaned texts.
        final = parts[kinds[-1]]
        for key in ("kept", "kept_characters"):
            whole.counts[key] = final.counts[key]
        whole.histograms["length"] = final.histograms["length"]
        records.append(whole)
    return records
