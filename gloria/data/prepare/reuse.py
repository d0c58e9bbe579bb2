"""What of an older corpus a new one takes over: the shards of each source that would come out the same.

They do if its documents are the same, which its files and options say, and if the same of them are kept: an earlier
source may hold other texts than before. For this a corpus lists each source's documents in `SOURCE/documents.hashes`:
so duplicates are found without reading the source again.
"""

from __future__ import annotations

import bisect
import os
import shutil
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gloria.data.corpus import Manifest, SourceEntry, read_manifest
from gloria.data.prepare.inputs import SourceRecord, input_paths, read_inputs
from gloria.data.prepare.recipe import MEGATRON, Recipe, to_record
from gloria.data.prepare.scatter import RECORD, Frame, Piece, read_records
from gloria.data.prepare.units import hash_values
from gloria.data.prepare.workers import Workers
from gloria.errors import warn
from gloria.files import hash_file

# Of what reading, cleaning and tokenising make of a text: raised with every change of it, so that nothing that an
# older version has made is mixed with it.
VERSION = 1
LIST = "documents.hashes"
LISTED = np.dtype([("high", "<u8"), ("low", "<u8"), ("size", "<i8")])


class Known(NamedTuple):
    """A source that the older corpus has read from the same files in the same way."""

    folder: Path  # of the corpus
    entry: SourceEntry
    record: SourceRecord

    @property
    def documents(self) -> str:
        return str(self.folder / self.entry.name / LIST)

    def files(self) -> dict[str, str]:
        """The files that are taken over, relative to the corpus folder, and their hashes."""
        shards = [*self.entry.train.shards, *self.entry.valid.shards]
        hashes = {f"{self.entry.name}/{LIST}": self.record.documents}
        for shard in shards:
            hashes |= {f"{shard.path}.bin": shard.bin_hash, f"{shard.path}.idx": shard.idx_hash}
        return hashes


def key_of_pieces(
    recipe: Recipe, number: int, pieces: Sequence[Piece], hashes: Mapping[str, str], tokenizer: str
) -> str:
    """What the documents of some of a source's pieces depend on; `hashes` are those of the files by path.

    Where the files are, what they are called and in which order they come has no part in it.
    """
    options = to_record(recipe)["source"][number]
    del options["name"], options["weight"]
    bytes_of = [
        [piece.file.format, piece.start, piece.end or 0, *(hashes[path] for path in input_paths(piece.file))]
        for piece in pieces
    ]
    adopted = tokenizer if recipe.source[number].format == MEGATRON else ""
    return hash_values([VERSION, unicodedata.unidata_version, recipe.seed, options, sorted(bytes_of), adopted])


def find_known(old: Path, recipe: Recipe, keys: Sequence[str], fingerprint: str, pool: Workers) -> dict[int, Known]:
    """By number, the sources of a recipe whose documents the corpus `old` has read; `keys` are those of its sources.

    A source with damaged files there is none of them, with a warning.
    """
    manifest, recorded = read_manifest(old), read_inputs(old)
    records = recorded[1] if recorded else {}
    if not records:
        warn(f"{old}: an older version made it, without lists of its documents; every source is read again")
    if manifest.tokenizer.fingerprint != fingerprint or manifest.recipe.get("shard_tokens") != recipe.shard_tokens:
        print(f"{old}: has another tokenizer or shard_tokens; every source is read and tokenised again", flush=True)
        return {}
    known = {}
    for number, (source, key) in enumerate(zip(recipe.source, keys)):
        record = records.get(source.name)
        if record and record.key == key and _is_well_formed(record.counts, recipe):
            known[number] = Known(old, _entry(manifest, source.name), record)
    for number, damage in zip(list(known), pool.map(find_damage, list(known.values()), "checking what is unchanged")):
        if damage:
            warn(f"{damage}; its source is read again")
            del known[number]
    return known


def _entry(manifest: Manifest, name: str) -> SourceEntry:
    return next(source for source in manifest.sources if source.name == name)


def _is_well_formed(counts: Mapping[str, int], recipe: Recipe) -> bool:
    """False for a source that may now have too many malformed documents: read again, it says which they are."""
    return counts.get("malformed", 0) <= recipe.max_malformed * counts.get("read", 0)


def find_damage(known: Known) -> str:
    """What is wrong with the first file of a known source that is not as it was made, or an empty string."""
    for name, listed in known.files().items():
        try:
            if hash_file(known.folder / name) != listed:
                return f"{known.folder / name}: has changed since it was made"
        except OSError as error:
            return f"{known.folder / name}: can't be read ({error.strerror})"
    return ""


def take_over(known: Known, folder: Path) -> None:
    """Put a known source's files into the corpus `folder`: as links where the disk has such, else as copies."""
    (folder / known.entry.name).mkdir()
    for name in known.files():
        place = os.path.realpath(known.folder / name)  # a shard may lie on another disk
        try:
            os.link(place, folder / name)
        except OSError:
            shutil.copyfile(place, folder / name)


class ListTask(NamedTuple):
    """A source's frames in the order of the buckets, and the file for the list of its documents."""

    frames: Sequence[Sequence[Frame]]
    path: str


def write_list(task: ListTask) -> str:
    """Write the list of a source's documents, each as often as it was read, in the order of the hashes; its hash."""
    Path(task.path).parent.mkdir(exist_ok=True)
    with open(task.path, "wb") as file:
        for frames in task.frames:
            records = read_records(frames)
            listed = records[list(LISTED.names or ())].astype(LISTED)
            file.write(listed[np.lexsort((records["low"], records["high"]))].tobytes())
    return hash_file(task.path)


def read_list(path: str, source: int, bucket: int, buckets: int) -> np.ndarray:
    """The records of a bucket, RECORD (documents,), from a list of the documents of a source."""
    if os.path.getsize(path) == 0:
        return np.empty(0, RECORD)
    listed = np.memmap(path, LISTED, "r")
    # The bucket of a hash is its upper 16 bits, scaled (scatter.py).
    edges = [-(-(number << 16) // buckets) for number in (bucket, bucket + 1)]
    first, last = (
        bisect.bisect_left(range(len(listed)), edge, key=lambda i: int(listed[i]["high"]) >> 48) for edge in edges
    )
    records = np.zeros(last - first, RECORD)
    for key in listed.dtype.names or ():
        records[key] = listed[key][first:last]
    records["source"] = source
    return records
