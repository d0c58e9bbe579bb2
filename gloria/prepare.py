"""From raw text to a corpus of token shards: python -m gloria.prepare RECIPE.toml

The documents of all sources are spread over buckets by the hash of their text (pass 1), each bucket is
deduplicated, split and tokenised (pass 2), and the buckets' tokens are written as shards (pass 3). The
corpus is the same to the last byte for any number of workers, any order of the files and any cutting of the
documents into files. Where the recipe has [refine], what `gloria.refine` has made of the sources is read. The corpus is
made in a folder beside and renamed when whole; killed at any moment, the same command goes on with what is finished
there. With --update a corpus is made again, and the sources that have not changed are taken over from it. At the end
the command prints the documents read, dropped by reason and kept of each source.
"""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gloria.config.cli import option, parse
from gloria.config.toml import find_recipe
from gloria.data.corpus import MANIFEST, Manifest, open_corpus, read_manifest, write_manifest
from gloria.data.prepare.inputs import (
    INPUTS,
    differences,
    find_files,
    read_inputs,
    shorten,
)
from gloria.data.prepare.passes import make_corpus
from gloria.data.prepare.recipe import Recipe, about_sources, read_recipe, to_record, tokenizer_place
from gloria.data.prepare.report import report
from gloria.data.prepare.workers import available_cores
from gloria.data.refine.plan import make_plan, read_refined, refined_recipe
from gloria.data.tokenizer import tokenizer_fingerprint
from gloria.dist.signals import end_on_stop_signals
from gloria.errors import UserError, run_command, warn
from gloria.files import partial_folder, publish


@dataclass(frozen=True)
class PrepareOptions:
    """Which corpus is made, and how."""

    recipe: Path = option(help="what the corpus is made of; its keys are listed below", positional="RECIPE.toml")
    out: Path | None = option(None, "the corpus folder, instead of the recipe's out")
    workers: int = option(available_cores(), "processes; any number makes the same corpus", minimum=1)
    budget_tokens: int | None = option(None, "report how many epochs of each source so many tokens are", minimum=1)
    verify: bool = option(False, "check all hashes of an existing corpus")
    update: bool = option(
        False, "make an existing corpus again where its recipe or its sources have changed: the others are taken over"
    )
    force: bool = option(False, "make an existing corpus again, from nothing")


def main(argv: list[str] | None = None) -> int:
    """Make the corpus, or check the existing one."""
    flags = parse(
        PrepareOptions,
        argv,
        prog="python -m gloria.prepare",
        description="Make a corpus of token shards from raw text.",
        recipe=False,
        file_keys=Recipe,
    ).config
    where = find_recipe(str(flags.recipe))
    recipe = read_recipe(where)
    out = Path(flags.out or recipe.out)
    recipe, about = of_cleaned_text(recipe, where)
    about |= about_sources(recipe)
    if (out / MANIFEST).exists() and not flags.force and not (flags.update and why_outdated(recipe, where, out)):
        manifest = describe_anew(out, check(recipe, where, out, verify=flags.verify), about)
    else:
        manifest = make(recipe, where, out, flags.workers, update=flags.update, force=flags.force, about=about)
    print("\n".join(report(manifest, flags.budget_tokens)))
    return 0


def of_cleaned_text(recipe: Recipe, where: str) -> tuple[Recipe, dict[str, Any]]:
    """Where the recipe has [refine], the recipe of the cleaned text, and what the manifest says of it."""
    if recipe.refine is None:
        return recipe, {}
    manifest = read_refined(recipe, make_plan(recipe, find_files(recipe, where), where), where)
    return refined_recipe(recipe, manifest), {"contamination": manifest["contamination"]}


def make(
    recipe: Recipe,
    where: str,
    out: Path,
    workers: int,
    *,
    update: bool,
    force: bool,
    about: Mapping[str, Any] = MappingProxyType({}),
) -> Manifest:
    """Make the corpus of a recipe (read from `where`) at `out`, which holds none yet, or one to replace.

    With `update`, and without `force`, what has not changed is taken over from it. `about` is added to the recipe in
    the manifest.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).exists()):
        raise UserError(f"{out}: exists and is no corpus; give another --out, or remove it")
    files = find_files(recipe, where)
    with partial_folder(out, keep="spill/*.json") as work:
        is_there = (out / MANIFEST).exists()
        if is_there and not (update or force):
            raise UserError(f"{out}: another launch has just made it; run this again to check it, or --force")
        try:
            old = out if is_there and not force else None
            manifest, stats = make_corpus(recipe, files, where, work, workers, old)
            manifest = dataclasses.replace(manifest, recipe={**manifest.recipe, **about})
            write_manifest(work / "corpus", manifest)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise UserError(f"{out}: the disk got full; free some, or give another --out") from None
        open_corpus(work / "corpus", verify=True)
        publish(work / "corpus", out, replace=is_there)
    print(f"{out}: made; {stats}")
    return manifest


def check(recipe: Recipe, where: str, out: Path, *, verify: bool) -> Manifest:
    """The manifest of the corpus at `out`; `UserError` unless it is whole and of this recipe and its files.

    With `verify` all hashes are checked, without it whether a source's file has changed since.
    """
    manifest = open_corpus(out, verify=verify).manifest
    if why := why_outdated(recipe, where, out, files=not verify):
        raise UserError(f"{out}: {why}; --update makes it again where it has changed, --force makes all of it again")
    if read_inputs(out) is None:
        warn(f"{out}: has no {INPUTS}, so changes of its sources can't be seen; --force makes it again")
    print(f"{out}: is already whole{', every hash is right' if verify else ''}")
    return manifest


def describe_anew(out: Path, manifest: Manifest, about: Mapping[str, Any]) -> Manifest:
    """The manifest with today's origin, licence and description of the sources; the corpus stays as it is."""
    kept = {key: value for key, value in manifest.recipe.items() if key != "about"}
    now = {**kept, **{key: about[key] for key in about.keys() & {"about"}}}
    if now == manifest.recipe:
        return manifest
    manifest = dataclasses.replace(manifest, recipe=now)
    write_manifest(out, manifest)
    print(f"{out}: origin, licence and description of its sources are written anew")
    return manifest


def why_outdated(recipe: Recipe, where: str, out: Path, *, files: bool = True) -> str:
    """Why the corpus at `out` is not of this recipe or, with `files`, not of its files; an empty string if it is."""
    manifest = read_manifest(out)
    record = to_record(recipe)
    keys = [key for key in record if record[key] != manifest.recipe.get(key)]
    if not keys and recipe.tokenizer.path:
        place, made_with = Path(tokenizer_place(recipe, where)), manifest.tokenizer.fingerprint
        if (place / "tokenizer.json").is_file() and tokenizer_fingerprint(place) != made_with:
            keys = ["tokenizer"]
    if keys:
        return f"was made by another recipe (it differs in {', '.join(keys)})"
    inputs = read_inputs(out) if files else None
    changed = differences(inputs[0], find_files(recipe, where), where) if inputs else []
    return f"{shorten(changed)} since it was made" if changed else ""


if __name__ == "__main__":
    end_on_stop_signals("what is finished is kept; the same command goes on")
    raise SystemExit(run_command(main))
