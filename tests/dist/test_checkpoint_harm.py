"""Bug prevented: a damaged or hostile checkpoint that is loaded, that runs something, or that stops a run
which has an older whole one to go on from."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gloria.dist.checkpoint import begin_save, publish
from gloria.dist.checkpoint_read import find_checkpoint, open_reader, read_full_tensors, unknown_files, verify
from gloria.dist.manifest import checkpoint_path, manifest_bytes, read_manifest
from gloria.dist.state import Shard
from gloria.errors import UserError
from gloria.files import hash_file

RANK_FILE = "rank-00001.safetensors"
FILES = ["rank-00000.safetensors", RANK_FILE, "trainer.json", "manifest.json"]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    """A run with checkpoints of steps 10 and 20, saved by two ranks."""
    run_dir = tmp_path_factory.mktemp("whole")
    for step in (10, 20):
        saves = []
        for rank in range(2):
            rows = torch.full((3, 4), float(step + rank))
            shards = {
                "model.a": Shard(rows, (6, 4), 3 * rank, True),
                "optim.step.a": Shard(torch.tensor(float(step)), (), 0, rank == 0),
            }
            rng = {"cpu": torch.zeros(16, dtype=torch.uint8)}
            saves.append(
                begin_save(
                    run_dir, step, shards, rng, {"tokens": step}, rank=rank, world=2, launch="x", asynchronous=False
                )
            )
        assert publish(saves[0])
    return run_dir


@pytest.fixture
def run_dir(whole_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole_run, tmp_path / "run"))


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0xFF
    path.write_bytes(data)


def other_steps(path: Path) -> None:
    shutil.copy(path.parent.with_name("step-00000010") / path.name, path)


def link_out(path: Path) -> None:
    outside = path.parent.parent.parent / path.name
    path.rename(outside)
    path.symlink_to(outside)


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


HARMS: dict[str, Callable[[Path], object]] = {
    "first byte flipped": lambda path: flip(path, 0),
    "middle byte flipped": lambda path: flip(path, path.stat().st_size // 2),
    "last byte flipped": lambda path: flip(path, -1),
    "truncated by a byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "cut in half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "missing": lambda path: path.unlink(),
    "another step's": other_steps,
    "a link out of the folder": link_out,
    "a folder": make_folder,
    "a pipe": make_pipe,
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", HARMS)
def test_harm_to_any_file_is_found_named_and_passed_over(run_dir: Path, capsys, name: str, harm: str):
    path = checkpoint_path(run_dir, 20)
    HARMS[harm](path / name)
    assert find_checkpoint(run_dir) == checkpoint_path(run_dir, 10)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"warning: {path}/{name}: ")
    assert lines[0].endswith("; the checkpoint of step 20 is passed over")
    with pytest.raises(UserError, match=re.escape(f"{path}/{name}: ")):
        find_checkpoint(run_dir, 20)


@pytest.mark.parametrize(
    ("name", "harm", "what"),
    [
        (RANK_FILE, "last byte flipped", "its content is not what was written (hash differs)"),
        (RANK_FILE, "missing", "is missing"),
        (RANK_FILE, "a link out of the folder", "is a symbolic link, which is never followed here"),
        (RANK_FILE, "a pipe", "is not a plain file"),
        ("trainer.json", "emptied", "has 0 bytes, 77 were written"),
        ("manifest.json", "another step's", "belongs to step 10"),
        ("manifest.json", "missing", "is missing"),
    ],
)
def test_what_is_wrong_is_said_in_plain_words(run_dir: Path, name: str, harm: str, what: str):
    path = checkpoint_path(run_dir, 20)
    HARMS[harm](path / name)
    assert verify(path) == [f"{path}/{name}: {what}"]


def test_every_single_byte_of_the_manifest_counts(run_dir: Path):
    file = checkpoint_path(run_dir, 20) / "manifest.json"
    data = file.read_bytes()
    for position in range(len(data)):
        file.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(UserError, match=re.escape(str(file))):
            read_manifest(file.parent)


def test_all_problems_are_reported_at_once(run_dir: Path):
    path = checkpoint_path(run_dir, 20)
    (path / "trainer.json").unlink()
    flip(path / RANK_FILE, -1)
    assert verify(path) == [
        f"{path}/{RANK_FILE}: its content is not what was written (hash differs)",
        f"{path}/trainer.json: is missing",
    ]
    assert verify(path, hashes=False) == [f"{path}/trainer.json: is missing"]


def test_a_run_without_a_whole_checkpoint_does_not_start_afresh(run_dir: Path, capsys):
    for step in (10, 20):
        (checkpoint_path(run_dir, step) / "manifest.json").unlink()
    with pytest.raises(UserError) as error:
        find_checkpoint(run_dir)
    assert str(error.value) == (
        f"{run_dir}/checkpoints: none of the 2 checkpoints is whole (see the warnings); "
        "mend one, or move the folder away to start afresh"
    )
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_linked_checkpoint_folder_is_not_followed(run_dir: Path, tmp_path: Path):
    path = checkpoint_path(run_dir, 20)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert verify(path) == [f"{path}: is not a folder (symbolic links are not followed here)"]


def test_unknown_files_are_kept_and_named(run_dir: Path):
    path = checkpoint_path(run_dir, 20)
    (path / "notes.pkl").write_bytes(pickle.dumps({"harmless": True}))
    (path / "out").symlink_to("/etc")
    assert verify(path) == []
    assert unknown_files(path) == ["notes.pkl", "out"]


# --- hostile content under a manifest that agrees with it


def forge(path: Path, name: str, content: bytes) -> None:
    """Put content in place and seal the manifest over it, as somebody would who means harm."""
    (path / name).write_bytes(content)
    manifest = read_manifest(path)
    files = [
        replace(entry, size=(path / entry.name).stat().st_size, hash=hash_file(path / entry.name))
        for entry in manifest.files
    ]
    (path / "manifest.json").write_bytes(manifest_bytes(replace(manifest, files=tuple(files))))


class Payload:
    """Unpickled it makes a file: proof that something ran."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("name", FILES)
def test_a_pickle_in_any_file_is_never_run(run_dir: Path, tmp_path: Path, name: str):
    path = checkpoint_path(run_dir, 20)
    marker = tmp_path / "it-ran"
    payload = pickle.dumps(Payload(marker))
    if name == "manifest.json":
        (path / name).write_bytes(payload)
    else:
        forge(path, name, payload)
    (problem,) = verify(path)
    assert problem.startswith(f"{path}/{name}: ")
    assert find_checkpoint(run_dir) == checkpoint_path(run_dir, 10)
    assert not marker.exists()
    pickle.loads(payload)  # the payload does work
    assert marker.exists()


def header_of(path: Path) -> tuple[dict, bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header: dict | bytes, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


BOMB = b"[" * 3_000_000
BOMBS = [
    pytest.param((10 << 30).to_bytes(8, "little") + b"{}", "says its header has 10737418240 bytes", id="10 GB header"),
    pytest.param((2**64 - 1).to_bytes(8, "little"), "says its header has 18446744073709551615", id="2^64 header"),
    pytest.param(with_header(b" " * (17 << 20), b""), "says its header has 17825792 bytes", id="17 MB header"),
    pytest.param(with_header(b'{"a":' + BOMB, b""), "is not valid JSON", id="nested header"),
    pytest.param(with_header(b'{"a": 1, "a": 2}', b""), "a key is given twice", id="key twice"),
    pytest.param(with_header(b'{"a": ' + b"9" * 10_000 + b"}", b""), "is not valid JSON", id="endless number"),
    pytest.param(with_header(b"[]", b""), "is not a JSON object", id="no object"),
    pytest.param(with_header(b"{}", b""), "does not describe a rank's shards", id="no metadata"),
]


@pytest.mark.parametrize(("content", "what"), BOMBS)
def test_a_hostile_header_is_refused_before_anything_is_made_of_it(run_dir: Path, content: bytes, what: str):
    path = checkpoint_path(run_dir, 20)
    forge(path, RANK_FILE, content)
    (problem,) = verify(path)
    assert problem.startswith(f"{path}/{RANK_FILE}: ")
    assert what in problem
    assert len(problem) < 400


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b'{"a":' + BOMB, "is not valid JSON"),
        (b" " * (16 << 20) + b"{}", "16777218 bytes, more than the 16777216 such a file may have"),
        (b'{"format": 1, "step": 20, "state": []}', "is not the trainer state of a checkpoint of format 1"),
        (b'{"format": 2, "step": 20, "state": {}}', "is not the trainer state of a checkpoint of format 1"),
        (b'{"format": 1, "step": 10, "state": {}}', "is of step 10; step 20 belongs here"),
        (b'{"format": 1, "step": 20, "state": {"a": "\xff"}}', "is not valid JSON"),
    ],
    ids=["nested", "large", "list", "format", "step", "utf-8"],
)
def test_a_hostile_trainer_state_is_refused(run_dir: Path, content: bytes, what: str):
    path = checkpoint_path(run_dir, 20)
    forge(path, "trainer.json", content)
    (problem,) = verify(path)
    assert problem.startswith(f"{path}/trainer.json: {what}")


def change(entry: str, **values):
    def apply(header: dict) -> None:
        header[entry] = {**header[entry], **values}

    return apply


def move(offset: float, shape: list[int]):
    def apply(header: dict) -> None:
        places = json.loads(header["__metadata__"]["gloria.shards"])
        header["__metadata__"]["gloria.shards"] = json.dumps({**places, "model.a": [offset, shape]})

    return apply


LIES = {
    "more bytes than its shape": change("model.a", shape=[2, 4]),
    "a huge shape": change("model.a", shape=[2**60, 4]),
    "negative size": change("model.a", shape=[-3, -4]),
    "size not a number": change("model.a", shape=["3", 4]),
    "unknown dtype": change("model.a", dtype="F4"),
    "before the data": change("model.a", data_offsets=[-8, 40]),
    "behind the file": change("model.a", data_offsets=[0, 2**62]),
    "over its neighbour": change("model.a", data_offsets=[8, 56]),
    "offsets as fractions": change("model.a", data_offsets=[0.0, 48.0]),
    "row as a fraction": move(3.0, [6, 4]),
    "generator state of a terabyte": lambda header: header["__metadata__"].update(
        {"gloria.shards": header["__metadata__"]["gloria.shards"].replace("[16]", "[1000000000000]")}
    ),
    "endless name": lambda header: header.update({"x" * 1_000_000: header.pop("model.a")}),
    "offsets missing": lambda header: header["model.a"].pop("data_offsets"),
    "rows behind the end": move(4, [6, 4]),
    "rows before the start": move(-1, [6, 4]),
    "rows of another rank": move(0, [6, 4]),
    "rows missing": move(3, [60, 4]),
    "other columns": move(3, [6, 5]),
    "a place for a stranger": lambda header: header.pop("rng.cpu"),
    "another rank's": lambda header: header["__metadata__"].update({"gloria.rank": "0"}),
    "another step's": lambda header: header["__metadata__"].update({"gloria.step": "10"}),
    "rank not a number": lambda header: header["__metadata__"].update({"gloria.rank": "one"}),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(run_dir: Path, lie: str):
    path = checkpoint_path(run_dir, 20)
    header, data = header_of(path / RANK_FILE)
    LIES[lie](header)
    forge(path, RANK_FILE, with_header(header, data))
    (problem,) = verify(path)
    assert problem.startswith(f"{path}/{RANK_FILE}: ")
    assert len(problem) < 500
    with pytest.raises(UserError):
        open_reader(path)


def manifest_with(run_dir: Path, **values) -> Path:
    path = checkpoint_path(run_dir, 20)
    (path / "manifest.json").write_bytes(manifest_bytes(replace(read_manifest(path), **values)))
    return path


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "rank-00000.safetensors", "a/b", "", "rank-00009.safetensors"])
def test_a_manifest_names_nothing_but_the_ranks_files(run_dir: Path, name: str):
    files = list(read_manifest(checkpoint_path(run_dir, 20)).files)
    files[1] = replace(files[1], name=name)
    path = manifest_with(run_dir, files=tuple(files))
    (problem,) = verify(path)
    assert problem.startswith(f"{path}/manifest.json: is not a checkpoint's manifest (ValueError(\"names of 2 ranks'")


@pytest.mark.parametrize("values", [{"world": 1}, {"world": 3}, {"world": 10**9}, {"world": -1}, {"step": "20"}])
def test_a_manifest_with_wrong_numbers_is_refused(run_dir: Path, values: dict):
    path = manifest_with(run_dir, **values)
    (problem,) = verify(path)
    assert problem.startswith(f"{path}/manifest.json: is not a checkpoint's manifest ")


def test_a_manifest_of_a_later_format_is_refused_by_name(run_dir: Path):
    file = checkpoint_path(run_dir, 20) / "manifest.json"
    file.write_bytes(json.dumps({**json.loads(file.read_bytes()), "format": 2}).encode())
    assert verify(file.parent) == [f"{file}: has format 2; this version reads format 1"]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), changes=st.integers(1, 6))
def test_any_garbage_is_refused_or_read_but_never_an_accident(
    whole_run: Path, tmp_path_factory, seed: int, changes: int
):
    """Random changes in a header under a manifest that agrees: only UserError may come of it."""
    path = checkpoint_path(tmp_path_factory.mktemp("fuzz"), 20)
    shutil.copytree(checkpoint_path(whole_run, 20), path)
    data = bytearray((path / RANK_FILE).read_bytes())
    length = int.from_bytes(data[:8], "little")
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(0, 8 + length, (changes,), generator=generator).tolist()
    for place, value in zip(places, torch.randint(32, 127, (changes,), generator=generator).tolist()):
        data[place] = value
    forge(path, RANK_FILE, bytes(data))
    problems = verify(path)
    assert all(problem.startswith(str(path)) and "\n" not in problem for problem in problems)
    if not problems:
        assert all(tensor.numel() < 100 for _, tensor in read_full_tensors(path))
    shutil.rmtree(path.parent.parent)
