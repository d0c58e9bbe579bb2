"""Prevents: a corpus that depends on workers, on the order of files or on how documents are cut into files; lost,
doubled or misplaced documents; and a half-made corpus that looks whole.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures.process import BrokenProcessPool
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import xxhash
import zstandard

from gloria import prepare
from gloria.data.corpus import open_corpus
from gloria.data.prepare import passes, training
from gloria.data.prepare import scatter as spill
from gloria.data.prepare.inputs import find_files
from gloria.data.prepare.recipe import read_recipe
from gloria.data.prepare.text import clean
from gloria.data.prepare.workers import Workers
from gloria.data.shards import map_tokens, read_index
from gloria.data.tokenizer import TextTokenizer, TokenizerConfig, load_tokenizer, train_tokenizer
from gloria.errors import UserError
from gloria.files import partial_folder
from tests.launch import wait_until

WORDS = """
a o de que e do da em um para com não uma os no se na por mais as dos como mas ao ele das à seu sua ou
quando muito nos já eu também só pelo pela até isso ela entre depois sem mesmo aos seus quem nas me esse
eles você essa num nem suas meu às minha numa pelos elas qual nós lhe deles essas esses pelas este dele
mar navio rio coração montanha palavra caminho pão árvore inverno Lisboa Coimbra Évora século república
freguesia ção
""".split()  # noqa: SIM905 (a list of quoted words would fill a page)


AGAIN = "--update makes it again where it has changed, --force makes all of it again"
GOES_ON = "holds what is finished; the same command goes on"


def make_texts(key: str, count: int, most_words: int = 60) -> list[str]:
    choose = random.Random(key)
    return [
        f"{key} {number}: " + " ".join(choose.choices(WORDS, k=choose.randint(3, most_words))) + "."
        for number in range(count)
    ]


def write_lines(path: Path, texts: Iterable[str]) -> None:
    data = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        data = zstandard.ZstdCompressor().compress(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def write_recipe(
    folder: Path, names: Sequence[str], tokenizer: str | None, extra: str = "", paths: str = '["{}"]'
) -> Path:
    """A recipe whose sources are the folders `names`."""
    lines = [extra, "[tokenizer]", "vocab_size = 600"]
    lines += [f'path = "{tokenizer}"'] if tokenizer else []
    for number, name in enumerate(names):
        lines += ["[[source]]", f'name = "{name}"', f"paths = {paths.format(name)}", f"weight = {number + 1}"]
    path = folder / "corpus.toml"
    path.write_text("\n".join(lines))
    return path


def run(recipe: Path, out: Path, *flags: str) -> None:
    workers = [] if "--workers" in flags else ["--workers", "1"]
    assert prepare.main([str(recipe), "--out", str(out), *workers, *flags]) == 0


def files_of(folder: Path) -> dict[str, bytes]:
    """All files but inputs.json, which alone depends on the sources' paths and times."""
    files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    del files["inputs.json"]
    return files


def read_documents(corpus: Path, name: str, split: str) -> list[str]:
    """The texts of a split, in the shards' order; each document must end with EOS and hold it nowhere else."""
    tokenizer = load_tokenizer(corpus / "tokenizer")
    texts = []
    for shard in getattr(open_corpus(corpus).source(name), split).shards:
        tokens, offsets = map_tokens(corpus / shard.path), read_index(corpus / shard.path).document_offsets()
        ends = np.flatnonzero(tokens == tokenizer.eos_id)
        assert ends.tolist() == (offsets[1:] - 1).tolist()
        texts += [tokenizer.decode(tokens[a : b - 1]) for a, b in pairwise(offsets)]
    return texts


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small tokenizer, trained once."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TokenizerConfig(vocab_size=600), make_texts("tokenizer", 300), folder)
    return str(folder)


def sources_with_duplicates() -> dict[str, list[str]]:
    """Three sources: texts that are in several of them, several times in one, in two spellings, or empty."""
    first, second, third = make_texts("um", 300), make_texts("dois", 120), make_texts("três", 40)
    return {
        "um": first + first[:30] + ["cafe\u0301 da manhã", "", " \n"],
        "dois": second + first[20:40] + second[:5] + ["café da manhã", "linha\r\nseguinte"],
        "tres": third + first[:3] + second[5:9] + ["linha\nseguinte ", "<|endoftext|> é texto"],
    }


def expected(sources: dict[str, list[str]], seed: int) -> dict[str, tuple[list[str], list[str]]]:
    """What a corpus must hold, said as plainly as can be: texts for training and for validation by source."""
    seen: set[str] = set()
    result = {}
    for name, texts in sources.items():
        kept = [text for text in dict.fromkeys(map(clean, texts)) if text and text not in seen]
        seen.update(kept)
        hashes = {text: xxhash.xxh3_128_intdigest(text.encode(), seed) for text in kept}
        size = {text: len(text.encode()) for text in kept}
        total = sum(size.values())
        most = min(total * 0.10, 8_000_000)
        goal = min(max(total * 0.01, 64_000), most)
        valid: list[str] = []
        fitting = [text for text in kept if size[text] <= int(most)]
        for text in sorted(fitting, key=lambda text: hashes[text] % 2**64):
            reached = sum(size[other] for other in valid)
            if valid and (reached >= goal or reached + size[text] > most):
                break
            valid.append(text)
        order = sorted(kept, key=hashes.__getitem__)
        result[name] = ([t for t in order if t not in valid], [t for t in order if t in valid])
    return result


def test_the_corpus_is_what_the_plain_statement_says(tmp_path: Path, tokenizer: str) -> None:
    sources = sources_with_duplicates()
    for name, texts in sources.items():
        write_lines(tmp_path / name / "a.jsonl", texts)
    run(write_recipe(tmp_path, list(sources), tokenizer, "seed = 5\nshard_tokens = 3000"), tmp_path / "out")
    for name, (train, valid) in expected(sources, 5).items():
        assert read_documents(tmp_path / "out", name, "train") == train
        assert read_documents(tmp_path / "out", name, "valid") == valid
        assert train
        assert valid
    corpus = open_corpus(tmp_path / "out")
    assert len(corpus.source("um").train.shards) > 2
    um = {"read": 333, "malformed": 0, "empty": 2, "short": 0, "duplicate": 30, "duplicate_elsewhere": 0}
    dois = {"read": 147, "malformed": 0, "empty": 0, "short": 0, "duplicate": 5, "duplicate_elsewhere": 21}
    tres = {"read": 49, "malformed": 0, "empty": 0, "short": 0, "duplicate": 0, "duplicate_elsewhere": 8}
    for name, counts in {"um": um, "dois": dois, "tres": tres}.items():
        entry = corpus.source(name)
        texts = [text for split in expected(sources, 5)[name] for text in split]
        assert entry.counts == counts | {"kept": len(texts), "valid_near_train": 0}
        assert entry.train.bytes + entry.valid.bytes == sum(len(text.encode()) for text in texts)
        assert entry.train.words + entry.valid.words == sum(len(text.split()) for text in texts)


def test_the_bytes_depend_on_nothing_but_the_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = sources_with_duplicates()
    one, many = tmp_path / "one", tmp_path / "many"
    shuffle = random.Random(3).shuffle
    for name, texts in sources.items():
        write_lines(one / name / "a.jsonl", texts)
        texts = list(texts)
        shuffle(texts)
        for number, suffix in enumerate((".jsonl", ".jsonl.gz", ".json.zst", ".jsonl", ".json")):
            write_lines(many / name / f"{number}{suffix}", texts[number::5])
    extra = "shard_tokens = 3000"
    run(write_recipe(one, list(sources), None, extra), tmp_path / "out1")
    run(write_recipe(many, list(sources), None, f'out = "x"\n{extra}'), tmp_path / "out2", "--workers", "3")
    made = files_of(tmp_path / "out1")
    assert files_of(tmp_path / "out2") == made
    assert {"manifest.json", "tokenizer/tokenizer.json", "um/train-00002.bin", "tres/valid-00000.idx"} <= set(made)
    assert str(tmp_path).encode() not in b"".join(made.values())
    # The same in another order of paths, with files read in pieces, many spills and another number of buckets.
    for name, value in (("PIECE_BYTES", 500), ("SPILL_BYTES", 3000), ("LEAST_BUCKETS", 7)):
        monkeypatch.setattr(spill, name, value)
    backwards = '["{0}/4*", "{0}/3.jsonl", "{0}/2*", "{0}/1*", "{0}/0*", "{0}"]'
    run(write_recipe(many, list(sources), None, extra, backwards), tmp_path / "out3")
    assert files_of(tmp_path / "out3") == made
    # And it can fail: one document more is another corpus.
    write_lines(one / "um" / "b.jsonl", ["mais um"])
    run(write_recipe(one, list(sources), None, extra), tmp_path / "out4")
    assert files_of(tmp_path / "out4") != made


def test_a_source_added_last_leaves_the_others_as_they_were(tmp_path: Path, tokenizer: str) -> None:
    sources = sources_with_duplicates()
    for name, texts in sources.items():
        write_lines(tmp_path / name / "a.jsonl", texts)
    run(write_recipe(tmp_path, ["um", "dois"], tokenizer), tmp_path / "before")
    run(write_recipe(tmp_path, ["um", "dois", "tres"], tokenizer), tmp_path / "after")
    before, after = files_of(tmp_path / "before"), files_of(tmp_path / "after")
    shards = [name for name in before if name != "manifest.json"]
    assert len(shards) == 2 + 2 * (2 * 2 + 1)
    assert {name: after[name] for name in shards} == {name: before[name] for name in shards}
    assert len(after) == len(before) + 5


def test_the_tokenizer_learns_from_a_sample_by_weight_without_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample: list[str] = []

    def train_and_record(config: TokenizerConfig, texts: Iterable[str], folder: Path) -> TextTokenizer:
        sample.extend(texts)
        return train_tokenizer(config, sample, folder)

    monkeypatch.setattr(training, "train_tokenizer", train_and_record)
    for name in ("um", "dois", "tres"):
        write_lines(tmp_path / name / "a.jsonl", make_texts(name, 20 if name == "tres" else 2000, 20))
    recipe, out = write_recipe(tmp_path, ["um", "dois", "tres"], None), tmp_path / "out"
    recipe.write_text(recipe.read_text().replace("vocab_size = 600", "vocab_size = 600\nsample_bytes = 60_000"))
    run(recipe, out)
    assert sample == sorted(sample, key=lambda text: xxhash.xxh3_128_intdigest(text.encode(), 0))
    trained = {name: read_documents(out, name, "train") for name in ("um", "dois", "tres")}
    drawn = {name: [text for text in sample if text in set(texts)] for name, texts in trained.items()}
    assert sum(map(len, drawn.values())) == len(sample), "only documents of training"
    # Weights 1, 2, 3: a sixth, a third, and all that the small source has for training.
    assert sum(len(text.encode()) for text in drawn["um"]) == pytest.approx(10_000, rel=0.25)
    assert sum(len(text.encode()) for text in drawn["dois"]) == pytest.approx(20_000, rel=0.25)
    assert drawn["tres"] == trained["tres"]
    # Drawn by another hash than the one that orders: from everywhere in the order.
    places = [trained["um"].index(text) / len(trained["um"]) for text in drawn["um"]]
    assert np.histogram(places, 4, (0, 1))[0].min() > len(places) / 10


def start(recipe: Path, out: Path) -> subprocess.Popen[str]:
    """A launch with two workers, in a process group of its own."""
    command = [sys.executable, "-m", "gloria.prepare", str(recipe), "--out", str(out), "--workers", "2"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def start_and_wait(tmp_path: Path, tokenizer: str) -> tuple[subprocess.Popen[str], list[int], Path]:
    """A launch that is tokenising, its workers, and its recipe."""
    for name in ("um", "dois"):
        write_lines(tmp_path / name / "a.jsonl", make_texts(name, 6000, 100))
    recipe = write_recipe(tmp_path, ["um", "dois"], tokenizer)
    process = start(recipe, tmp_path / "out")
    wait_until(lambda: list(tmp_path.glob("out.partial-kept/tokens/*.json")) or process.poll() is not None)
    assert process.poll() is None, "it ended before it could be killed"
    workers = children_of(process.pid)
    assert len(workers) >= 2
    return process, workers, recipe


def test_killed_half_way_it_goes_on(tmp_path: Path, tokenizer: str) -> None:
    process, workers, recipe = start_and_wait(tmp_path, tokenizer)
    out = tmp_path / "out"
    process.kill()
    process.communicate()
    assert not out.exists()
    partial = tmp_path / "out.partial-kept"
    assert not list(partial.rglob("manifest.json"))
    wait_until(lambda: not any(map(is_running, workers)))
    with pytest.raises(UserError, match=r"no such folder, only an unfinished out\.partial-"):
        open_corpus(out)
    # Several at once: one makes it, the others end in a line.
    again = [start(recipe, out) for _ in range(3)]
    ends = [(process.communicate(), process.returncode) for process in again]
    assert sorted(status for _, status in ends) == [0, 2, 2]
    lines = [printed for (printed, _), status in ends if status == 0]
    assert "reading: 2 of 2 parts were finished by an earlier launch\ntokenising: " in lines[0]
    for (_, error), status in ends:
        assert status == 0 or re.fullmatch(rf"error: {out}: another launch (is making|has just made) it[^\n]*\n", error)
    assert [path.name for path in tmp_path.glob("*out*")] == ["out"]
    run(recipe, tmp_path / "other")
    assert files_of(tmp_path / "other") == files_of(out)


@pytest.mark.parametrize(("number", "whole_group"), [(signal.SIGTERM, True), (signal.SIGHUP, False)])
def test_a_stop_signal_leaves_what_is_finished_and_is_reported(
    tmp_path: Path, tokenizer: str, number: signal.Signals, whole_group: bool
) -> None:
    process, workers, recipe = start_and_wait(tmp_path, tokenizer)
    (os.killpg if whole_group else os.kill)(process.pid, number)
    _, error = process.communicate()
    assert process.returncode == 128 + number
    line = f"{number.name}: what is finished is kept; the same command goes on\n"
    assert error.endswith(f"{line}{tmp_path}/out.partial-kept: {GOES_ON}\n")
    assert "Traceback" not in error
    wait_until(lambda: not any(map(is_running, workers)))
    run(recipe, tmp_path / "out")
    assert [path.name for path in tmp_path.glob("*out*")] == ["out"]


def children_of(parent: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            number, rest = status.read_text().split(" (", 1)
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(rest.rpartition(") ")[2].split()[1]) == parent:
            found.append(int(number))
    return found


def is_running(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_out_of_memory_names_the_longest_documents(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(task: object) -> None:
        raise errors.pop()

    monkeypatch.setattr(spill, "LONG_BYTES", 300)
    monkeypatch.setattr(passes, "tokenise", die)
    texts = make_texts("um", 20, 10)
    write_lines(tmp_path / "um" / "a.jsonl", [*texts, "mar " * 100, *texts[:3], "rio " * 1000])
    recipe = write_recipe(tmp_path, ["um"], tokenizer)
    errors = [MemoryError(), BrokenProcessPool()]
    while errors:
        with pytest.raises(UserError) as error:
            run(recipe, tmp_path / "out")
        assert str(error.value) == (
            "a worker was killed, or ran out of memory; the longest documents are "
            f"{tmp_path}/um/a.jsonl:25 (4 kB), {tmp_path}/um/a.jsonl:21 (400 B): cut them up, or give it more memory"
        )


def test_a_long_document_without_a_space_to_cut_it_at_is_named(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gloria.data.prepare.buckets.PIECE_CHARS", 100)
    monkeypatch.setattr("gloria.data.tokenizer.PIECE_CHARS", 100)
    write_lines(tmp_path / "um" / "a.jsonl", [*make_texts("um", 3), "mar " * 1000, "rio" * 1000])
    run(write_recipe(tmp_path, ["um"], tokenizer), tmp_path / "out")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "cut up" in line]
    assert line == (
        f'warning: the document of 3,000 characters that begins "{"rio" * 20}" can\'t be cut up to be tokenised '
        "(it has no single space between words): this takes about 0.0 GB of memory"
    )


def test_a_worker_that_dies_is_an_error_and_not_a_wait() -> None:
    with Workers(2) as pool, pytest.raises(BrokenProcessPool):
        list(pool.map(os._exit, [3, 3], "tokenising"))


def test_an_error_in_a_worker_is_one_line_and_leaves_nothing(tmp_path: Path, tokenizer: str) -> None:
    write_lines(tmp_path / "um" / "a.jsonl.gz", make_texts("um", 500))
    path = tmp_path / "um" / "a.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-100])
    recipe = write_recipe(tmp_path, ["um"], tokenizer)
    command = [sys.executable, "-m", "gloria.prepare", str(recipe), "--out", str(tmp_path / "out"), "--workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    reason = "Compressed file ended before the end-of-stream marker was reached"
    assert done.stderr == f"error: {path}: is no whole .gz file ({reason}); get it again\n"
    assert not list(tmp_path.glob("out*"))


def test_no_torch_is_imported(tmp_path: Path, tokenizer: str) -> None:
    write_lines(tmp_path / "um" / "a.jsonl", make_texts("um", 20))
    recipe = write_recipe(tmp_path, ["um"], tokenizer)
    script = "from gloria.prepare import main; import sys; main(sys.argv[1:]); print(*sys.modules)"
    command = [sys.executable, "-c", script, str(recipe), "--out", str(tmp_path / "out"), "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = done.stdout.splitlines()[-1].split()
    assert "tokenizers" in imported
    assert not {"torch", "transformers"} & set(imported)


def test_a_corpus_that_is_there_is_left_or_refused_or_replaced(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(tmp_path / "um" / "a.jsonl", make_texts("um", 100))
    recipe, out = write_recipe(tmp_path, ["um"], tokenizer), tmp_path / "out"
    run(recipe, out)
    made = files_of(out)
    capsys.readouterr()
    run(recipe, out, "--verify")
    assert capsys.readouterr().out.startswith(f"{out}: is already whole, every hash is right\nsource ")
    run(recipe, out)
    assert capsys.readouterr().out.startswith(f"{out}: is already whole\nsource ")
    # A flipped byte is seen by --verify only; sizes are always checked.
    shard = out / "um" / "train-00000.bin"
    shard.write_bytes(made["um/train-00000.bin"][:-1] + b"\xff")
    with pytest.raises(UserError, match=r"train-00000\.bin: its hash is "):
        run(recipe, out, "--verify")
    shard.write_bytes(made["um/train-00000.bin"])
    # Another recipe, other text.
    write_recipe(tmp_path, ["um"], tokenizer, "seed = 1")
    with pytest.raises(UserError) as error:
        run(recipe, out)
    assert str(error.value) == (f"{out}: was made by another recipe (it differs in seed); {AGAIN}")
    write_recipe(tmp_path, ["um"], tokenizer)
    write_lines(tmp_path / "um" / "b.jsonl", make_texts("mais", 10))
    with pytest.raises(UserError) as error:
        run(recipe, out)
    assert str(error.value) == f"{out}: {tmp_path}/um/b.jsonl is new since it was made; {AGAIN}"
    assert files_of(out) == made
    run(recipe, out, "--force")
    assert len(read_documents(out, "um", "train")) > 95
    assert files_of(out).keys() == made.keys()
    assert [path.name for path in tmp_path.glob("out*")] == ["out"]


OLD = (10**9, 10**9)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda folder: (folder / "c.jsonl").write_text('{"text": "c"}'), "{}/c.jsonl is new"),
        (lambda folder: (folder / "a.jsonl").unlink(), "um/a.jsonl is gone"),
        (lambda folder: (folder / "a.jsonl").write_text('{"text": "novo"}'), "{}/a.jsonl has changed"),
        (lambda folder: (folder / "a.jsonl").write_bytes((folder / "b.jsonl").read_bytes()), "{}/a.jsonl has changed"),
        (lambda folder: (folder / "a.jsonl").rename(folder / "0.jsonl"), "{}/0.jsonl is new, um/a.jsonl is gone"),
        (lambda folder: (folder / "a.jsonl").touch(), ""),
        (lambda folder: folder.rename(folder.parent / "x") and (folder.parent / "x").rename(folder), ""),
    ],
)
def test_changed_sources_are_noticed_whatever_their_times_say(
    tmp_path: Path, tokenizer: str, change: Callable[[Path], object], what: str
) -> None:
    folder, out = tmp_path / "um", tmp_path / "out"
    for name in "ab":  # of the same size
        write_lines(folder / f"{name}.jsonl", [f"{name} {text}" for text in make_texts("um", 20)])
    recipe = write_recipe(tmp_path, ["um"], tokenizer)
    run(recipe, out)
    change(folder)
    for path in folder.iterdir():
        os.utime(path, OLD)
    if not what:
        return run(recipe, out)
    with pytest.raises(UserError) as error:
        run(recipe, out)
    assert str(error.value) == f"{out}: {what.format(folder)} since it was made; {AGAIN}"


def test_a_file_that_grows_while_it_is_read_is_an_error(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scatter_and_append(task: spill.ScatterTask) -> object:
        done = scatter(task)
        with open(path, "a") as file:
            file.write('{"text": "mais"}\n')
        return done

    path, scatter = tmp_path / "um" / "a.jsonl", spill.scatter
    write_lines(path, make_texts("um", 20))
    monkeypatch.setattr(spill, "scatter", scatter_and_append)
    with pytest.raises(UserError) as error:
        run(write_recipe(tmp_path, ["um"], tokenizer), tmp_path / "out")
    assert str(error.value) == f"{path} has changed while it was read; start again when the files are complete"


def test_a_corpus_without_a_list_of_its_files_is_reported(tmp_path: Path, tokenizer: str, capsys) -> None:
    write_lines(tmp_path / "um" / "a.jsonl", make_texts("um", 20))
    recipe, out = write_recipe(tmp_path, ["um"], tokenizer), tmp_path / "out"
    run(recipe, out)
    (out / "inputs.json").unlink()
    run(recipe, out)
    assert capsys.readouterr().err.endswith(
        f"warning: {out}: has no inputs.json, so changes of its sources can't be seen; --force makes it again\n"
    )


def test_near_duplicates_across_the_split_are_counted(tmp_path: Path, tokenizer: str, capsys) -> None:
    """Every text three times, but for its last words: whatever is in validation is in training, too."""
    texts = make_texts("um", 40, 100)
    write_lines(tmp_path / "um" / "a.jsonl", [f"{text} {number}" for text in texts for number in range(3)])
    write_lines(tmp_path / "dois" / "a.jsonl", make_texts("dois", 50))
    recipe, out = write_recipe(tmp_path, ["um", "dois"], tokenizer), tmp_path / "out"
    run(recipe, out)
    one, two = open_corpus(out).manifest.sources
    train = read_documents(out, "um", "train")
    valid = [text for text in read_documents(out, "um", "valid") if len(text.split()) > 13]
    near = sum(any(text.rpartition(" ")[0] in other for other in train) for text in valid)
    assert one.counts["valid_near_train"] == near > 3
    assert two.counts["valid_near_train"] == 0
    line = f"{near} of {one.valid.documents} validation documents share 50% or more of their runs of 16 tokens"
    assert f'source "um": {line} with training text\n' in capsys.readouterr().out


def test_two_launches_on_one_corpus(tmp_path: Path, tokenizer: str) -> None:
    write_lines(tmp_path / "um" / "a.jsonl", make_texts("um", 10))
    recipe, out = write_recipe(tmp_path, ["um"], tokenizer), tmp_path / "out"
    with partial_folder(out) as work, pytest.raises(UserError) as error:
        run(recipe, out)
    assert str(error.value) == (
        f"{out}: another launch is making it ({work.name}); wait for it or choose another place"
    )
    run(recipe, out)


def test_the_report_has_epochs_and_a_weight(tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(tmp_path / "um" / "a.jsonl", make_texts("um", 400))
    write_lines(tmp_path / "dois" / "a.jsonl", make_texts("dois", 100))
    recipe, out = write_recipe(tmp_path, ["um", "dois"], tokenizer), tmp_path / "out"
    run(recipe, out)
    capsys.readouterr()
    corpus = open_corpus(out)
    one, two = (corpus.source(name).train.tokens for name in ("um", "dois"))
    budget = 3 * (one + two)
    run(recipe, out, "--budget-tokens", str(budget))
    _, headings, first, second = capsys.readouterr().out.splitlines()
    assert headings.endswith("weight   share  epochs  weight for 4 epochs")
    assert first.split()[-3:] == ["1", "33.33%", f"{budget / 3 / one:.2f}"]
    assert second.split()[-4:-1] == ["2", "66.67%", f"{budget * 2 / 3 / two:.2f}"]
    weight = float(second.split()[-1])
    assert budget * weight / (1 + weight) / two == pytest.approx(4, rel=1e-3)
    run(recipe, out, "--budget-tokens", "1e9")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (
        "no weights keep every source at 4 epochs: "
        f"1,000,000,000 tokens are more than 4 epochs of all, {4 * (one + two):,}"
    )


def test_the_sample_recipe_reads(repository: Path) -> None:
    where = str(repository / "launch" / "sample.toml")
    recipe = read_recipe(where)
    files = find_files(recipe, where)
    assert [source.name for source in recipe.source] == ["enciclopedia", "parlamento", "dialogos", "cartas"]
    assert all(len(found) >= 3 for found in files)
