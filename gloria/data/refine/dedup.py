"""Near-duplicates by datatrove's MinHash. Of a cluster the first documents in the order of the shards stay; how many,
its size says ("rehydration": what is there often is rarely bad, Penedo et al. 2025).

A group is what is compared with each other: a source, or all. datatrove's clustering keeps any document of a cluster;
what stays is therefore read off its clusters here.
"""

from __future__ import annotations

import json
import struct
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)

from gloria.data.refine.config import DedupConfig
from gloria.data.refine.plan import Shard
from gloria.data.refine.records import Record
from gloria.data.refine.words import PORTUGUESE

PAIR = struct.Struct("<2I")  # document's number in its shard, and its cluster or the cluster's size


def minhash_config(config: DedupConfig) -> MinhashConfig:
    return MinhashConfig(config.n_grams, config.buckets, config.hashes)


class _Words:
    """The words of a text that has no case, accents and punctuation any more.

    spaCy's are the same but for units at numbers (3 of 43,754 words of a sample), and take 200 times as long.
    """

    @staticmethod
    def word_tokenize(text: str) -> list[str]:
        return text.split()


def signature_step(folder: str, config: DedupConfig) -> MinhashDedupSignature:
    """datatrove's stage 1 with words at white space."""
    step = MinhashDedupSignature(folder, minhash_config(config), PORTUGUESE)
    step.word_tokenizer = _Words()
    return step


def group_names(config: DedupConfig, shards: Sequence[Shard]) -> list[str]:
    """The group of each shard."""
    return ["all" if config.scope == "all" else shard.name.partition("/")[0] for shard in shards]


class Signatures(PipelineStep):
    """Stage 1 of MinHash into FOLDER/signatures/GROUP, at the end of a task: it takes the documents and gives none."""

    type, name = "DEDUP", "signatures"

    def __init__(self, groups: Sequence[str], config: DedupConfig, folder: str) -> None:
        super().__init__()
        self.groups, self.config, self.folder = groups, config, folder

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        place = f"{self.folder}/signatures/{self.groups[rank]}"
        signature_step(place, self.config).run(data, rank, world_size)


class Buckets(PipelineStep):
    """Stage 2: a task for each bucket of each group (groups in order, without repeats)."""

    type, name = "DEDUP", "buckets"

    def __init__(self, groups: Sequence[str], config: DedupConfig, folder: str) -> None:
        super().__init__()
        self.groups, self.config, self.folder = groups, config, folder

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        number, bucket = divmod(rank, self.config.buckets)
        places = (f"{self.folder}/{kind}/{self.groups[number]}" for kind in ("signatures", "pairs"))
        MinhashDedupBuckets(*places, config=minhash_config(self.config)).run(None, bucket, self.config.buckets)


class Clusters(PipelineStep):
    """Stage 3: a task for each group; then FOLDER/clusters/GROUP/RANK.remove names the documents that go.

    `sources` has the source of each shard.
    """

    type, name = "DEDUP", "clusters"

    def __init__(self, groups: Sequence[str], sources: Sequence[str], config: DedupConfig, folder: str) -> None:
        super().__init__()
        self.groups, self.sources, self.config, self.folder = groups, sources, config, folder

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        pairs, clusters = (f"{self.folder}/{kind}/{self.groups[rank]}" for kind in ("pairs", "clusters"))
        MinhashDedupCluster(
            pairs, clusters, config=minhash_config(self.config), save_cluster_id=True, save_cluster_size=True
        ).run(None, 0, 1)
        keep_first(Path(clusters), self.config.rehydrate, self.sources)


def keep_first(folder: Path, rehydrate: Mapping[str, int], sources: Sequence[str]) -> None:
    """Write the list of documents to remove from each file so that the first of a cluster stay.

    FOLDER/pairs.json gets how many documents of each source went for one of which source.
    """
    folder.mkdir(parents=True, exist_ok=True)
    steps = sorted((int(size), count) for size, count in rehydrate.items())
    seen: Counter[int] = Counter()
    first: dict[int, str] = {}
    pairs: dict[str, Counter[str]] = defaultdict(Counter)
    for path in sorted(folder.glob("*.clusters")):
        source = sources[int(path.stem)]
        sizes = PAIR.iter_unpack(path.with_suffix(".sizes").read_bytes())
        gone = []
        for (document, cluster), (_, size) in zip(PAIR.iter_unpack(path.read_bytes()), sizes):
            stay = ([1] + [count for least, count in steps if least <= size])[-1]
            if seen[cluster] >= stay:
                gone.append(document)
                pairs[source][first[cluster]] += 1
            seen[cluster] += 1
            first.setdefault(cluster, source)
        path.with_suffix(".remove").write_bytes(struct.pack(f"<{len(gone)}I", *gone))
    (folder / "pairs.json").write_text(json.dumps(pairs, sort_keys=True))


class DropDuplicates(PipelineStep):
    """Stage 4: passes on what stays of a shard, and records how large the clusters are and what goes.

    The record is that of `Clean` behind it: this step counts into `records` of its own.
    """

    type, name = "DEDUP", "near-duplicates"

    def __init__(self, groups: Sequence[str], folder: str, records: str) -> None:
        super().__init__()
        self.groups, self.folder, self.records = groups, folder, records

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        record = Record()
        count = record.step("near-duplicates")
        waiting: list[Document] = []  # read, and not yet passed on: those before the next that stays are dropped

        def watched() -> Iterator[Document]:
            for document in data:
                count["documents"] += 1
                count["characters"] += len(document.text)
                waiting.append(document)
                yield document

        place = f"{self.folder}/clusters/{self.groups[rank]}"
        found = Path(place, f"{rank:06d}.remove").exists()
        library = MinhashDedupFilter(place, load_cluster_sizes=found)
        for document in library.run(watched(), rank, world_size):
            while waiting[0] is not document:
                self._drop(waiting.pop(0), record)
            waiting.pop()
            size = document.metadata.pop("minhash_cluster_size", 1)
            if size > 1:
                document.metadata["notes"]["near_duplicates"] = size
            record.histograms["cluster"][str(size)] += 1
            yield document
        for document in waiting:
            self._drop(document, record)
        record.write(Path(self.records, f"{rank:05d}.json"))

    def _drop(self, document: Document, record: Record) -> None:
        record.drop("near-duplicates", "near-duplicate", document.id, document.text)
