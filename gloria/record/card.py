"""The model card of an exported folder: metadata for the hub, and what is known, in the order of the EU's template.

The template is the Commission's for the public summary of training content (AI Act, article 53(1)(d)): general
information, data sources, data processing. Training, scores, limits and citation follow.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gloria.config.toml import write_toml
from gloria.model.config import TransformerConfig, count_parameters, flops_per_token
from gloria.record.facts import CardFacts, RunFacts

README = "README.md"
UNKNOWN = "not recorded"
_TOLD = ("description", "origin", "licence")  # of a source, by the corpus recipe
# Licences that the hub knows by these names; any other is `other` with a name.
LICENCES = (
    *("apache-2.0", "mit", "bsd-3-clause", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "openrail", "openrail++", "unlicense"),
    *(f"cc-by{kind}-4.0" for kind in ("", "-sa", "-nc", "-nd", "-nc-sa", "-nc-nd")),
    *("cc0-1.0", "bigscience-openrail-m", "creativeml-openrail-m", "llama3.1", "gemma"),
)
GLORIA = """@inproceedings{lopes-etal-2024-gloria,
  title = "{G}l{\\'o}r{IA}: A Generative and Open Large Language Model for {P}ortuguese",
  author = "Lopes, Ricardo and Magalhaes, Joao and Semedo, David",
  booktitle = "Proceedings of the 16th International Conference on Computational Processing of Portuguese",
  year = "2024",
  publisher = "Association for Computational Linguistics",
  url = "https://aclanthology.org/2024.propor-1.45",
  pages = "441--453",
  note = "arXiv 2402.12969"
}"""


def run_card(facts: CardFacts, run: RunFacts, name: str) -> str:
    """README.md of an exported checkpoint."""
    shape = TransformerConfig.from_dict(dict(run.trainer["model"]))
    name = facts.name or name
    parameters = count_parameters(shape)["total"]
    tokens = run.trainer.get("tokens")
    text = [
        f"# {name}",
        f"A {shape.architecture} language model of {parameters:,} parameters, pre-trained on "
        f"{_count(tokens)} tokens with GlórIA.",
        _usage("AutoModelForCausalLM", 'pipeline("text-generation", "FOLDER")("Era uma vez", max_new_tokens=50)'),
        *_general(facts, run, name, f"{shape.architecture}, {parameters:,} parameters"),
        *_sources(run),
        *_processing(facts, run),
        *_training(run, shape),
        *_scores(run.records),
        *_closing(facts, "python -m gloria.audit RUN --corpus CORPUS --export FOLDER"),
    ]
    return _card(facts, name, text, run.records, ["text-generation", shape.architecture.replace("_", "-")])


def finetuned_card(facts: CardFacts, results: Mapping[str, Any], task: str, head: str, name: str) -> str:
    """README.md of an exported fine-tuning."""
    name = facts.name or name
    records, recipe = results.get("results", []), results.get("recipe")
    pipeline = "question-answering" if "QuestionAnswering" in head else "text-classification"
    chosen = results.get("chosen") or {}
    based = _portable(results.get("from", UNKNOWN))
    text = [
        f"# {name}",
        f"A model fine-tuned on the task {task} with GlórIA, as `{head}`.",
        _usage(head, f'pipeline("{pipeline}", "FOLDER")'),
        "## General information",
        _table(
            ("Provider", ", ".join(facts.authors) or UNKNOWN),
            ("Contact", facts.contact or UNKNOWN),
            ("Based on", f"`{based}`, whose own card says what it was trained on"),
            ("Licence", facts.licence or UNKNOWN),
            ("Languages", ", ".join(facts.language) or UNKNOWN),
        ),
        "## Training",
        f"Seed {results.get('seed', UNKNOWN)}; chosen at step {chosen.get('step', UNKNOWN)} by its development score.",
        _recipe(recipe),
        *_scores(records),
        *_closing(facts, ""),
    ]
    return _card(facts, name, text, records, [pipeline])


def _card(
    facts: CardFacts, name: str, text: Sequence[str], records: Sequence[Mapping[str, Any]], tags: Sequence[str]
) -> str:
    from huggingface_hub import ModelCard, ModelCardData

    licence = facts.licence.lower() if facts.licence else None
    named: dict[str, Any] = {"license": licence}
    if licence and licence not in LICENCES:
        named = {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", licence)}
    data = ModelCardData(
        language=facts.language or None,
        datasets=facts.datasets or None,
        library_name="transformers",
        pipeline_tag=tags[0],
        tags=["gloria", *tags[1:]],
        model_name=name,
        eval_results=list(_eval_results(records, tags[0])) or None,
        **named,
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(text) + "\n"))


def _eval_results(records: Sequence[Mapping[str, Any]], kind: str) -> Iterator[Any]:
    from huggingface_hub import EvalResult

    for record in records:
        for metric, score in record.get("scores", {}).items():
            if score.get("value") is not None:
                yield EvalResult(
                    task_type=kind,
                    dataset_type=record["task"],
                    dataset_name=record["task"],
                    dataset_split=record["split"],
                    metric_type=metric,
                    metric_value=score["value"],
                    metric_name=f"{metric} ({'; '.join(filter(None, (_interval(score), _protocol(record))))})",
                )


def _general(facts: CardFacts, run: RunFacts, name: str, model: str) -> Iterator[str]:
    start = run.trainer.get("recipe", {}).get("model", {}).get("from")
    tokens = run.trainer.get("tokens")
    size = UNKNOWN
    if tokens is not None:
        bounds = ((10**9, "less than 1 billion"), (10**13, "1 billion to 10 trillion"))
        scale = next((text for bound, text in bounds if tokens < bound), "more than 10 trillion")
        size = f"{scale} tokens ({tokens:,} were predicted in training, repetitions among them)"
    yield "## 1. General information"
    yield "### 1.1 Provider"
    yield _table(("Provider", ", ".join(facts.authors) or UNKNOWN), ("Contact", facts.contact or UNKNOWN))
    yield "### 1.2 Model"
    trunk = "".join(f"; a branch of `{folder.name}` from step {step:,} on" for folder, step in run.ancestors)
    yield _table(
        ("Name", name),
        ("Model", model),
        ("Starting weights", f"`{start}`" if start else "random" if "recipe" in run.trainer else UNKNOWN),
        ("Checkpoint", f"step {run.step:,} of launch {run.launch}, {_date(run.saved_at)}{trunk}"),
        ("Licence", facts.licence or UNKNOWN),
        ("Intended uses", facts.uses or UNKNOWN),
    )
    yield "### 1.3 Training data as a whole"
    yield _table(
        ("Modality", "text"),
        ("Size", size),
        ("Languages", ", ".join(facts.language) or UNKNOWN),
        ("Newest text", facts.collected_until or UNKNOWN),
    )


def _sources(run: RunFacts) -> Iterator[str]:
    yield "## 2. Data sources"
    if not run.corpus and not run.reads:
        yield UNKNOWN
        return
    rows = ["| source | documents | tokens | bytes of text | share asked | share read | tokens read | epochs |"]
    rows.append("| --- |" + " ---: |" * 7)
    held = {entry.name: entry.train for entry in run.corpus.sources} if run.corpus else {}
    reads = {read.name: read for read in run.reads}
    nothing = "0" if reads else UNKNOWN
    for name in dict.fromkeys((*held, *reads)):
        entry, read = held.get(name), reads.get(name)
        there = (f"{entry.documents:,}", f"{entry.tokens:,}", f"{entry.bytes:,}") if entry else (UNKNOWN,) * 3
        read_of = (f"{read.asked:.4f}", f"{read.share:.4f}", f"{read.tokens:,}", f"{read.epochs:.3f}") if read else None
        rows.append(f"| {' | '.join((name, *there, *(read_of or (nothing,) * 4)))} |")
    yield "\n".join(rows)
    about = run.corpus.recipe.get("about", {}) if run.corpus else {}
    prints = run.trainer.get("mixture", {}).get("fingerprints", {}).get("sources", {})
    lines = []
    for name in dict.fromkeys((*held, *reads)):
        told = about.get(name, {})
        description, origin, licence = (told.get(key, UNKNOWN).rstrip(".") for key in _TOLD)
        lines.append(
            f"- **{name}**. Description: {description}. Origin: {origin}. Licence: {licence}. "
            f"Fingerprint of its shards: `{prints.get(name, UNKNOWN)}`."
        )
    yield "\n".join(lines)
    yield (
        "Whether a source is a public dataset, licensed, crawled, of users or synthetic (2.1 to 2.6 of the template): "
        f"see its origin; else {UNKNOWN}. Documents are counted after cleaning, without those held out for validation."
    )


def _processing(facts: CardFacts, run: RunFacts) -> Iterator[str]:
    yield "## 3. Data processing"
    rows = [
        ("Reservations of rights", facts.opt_outs or UNKNOWN),
        ("Illegal content", facts.illegal_content or UNKNOWN),
    ]
    if run.corpus:
        dropped: dict[str, int] = {}
        for source in run.corpus.sources:
            for key, count in source.counts.items():
                if key not in ("read", "kept", "valid_near_train") and count:
                    dropped[key] = dropped.get(key, 0) + count
        counts = ", ".join(f"{key.replace('_', ' ')} {count:,}" for key, count in dropped.items()) or "none"
        rows += [
            ("Deduplication", "exact, over all sources"),
            ("Documents left out", counts),
            ("Tokenizer", f"{run.corpus.tokenizer.vocab_size:,} tokens, `{run.corpus.tokenizer.fingerprint}`"),
            ("Corpus", f"`{run.corpus.seal or UNKNOWN}` (the seal of its manifest)"),
        ]
    yield _table(*rows)
    found = run.corpus.recipe.get("contamination", {}) if run.corpus else {}
    lines = [
        f"- {task}: {count['documents']:,} documents with one of its {count['texts']:,} texts were left out"
        for task, count in found.items()
    ]
    yield "**Evaluation data in the training text**: " + ("\n\n" + "\n".join(lines) if lines else "was not looked for.")


def _training(run: RunFacts, shape: TransformerConfig) -> Iterator[str]:
    recipe, tokens = run.trainer.get("recipe", {}), run.trainer.get("tokens")
    train = recipe.get("train", {})
    length = train.get("sequence_length")
    flops = f"{tokens * flops_per_token(shape, length):.3g}" if tokens and length else UNKNOWN
    hardware = dict.fromkeys(
        f"{launch.about.get('ranks', '?')} x {launch.about['hardware']}"
        for launch in run.launches
        if "hardware" in launch.about
    )
    versions = dict.fromkeys(
        ", ".join(f"{name} {version}" for name, version in launch.about.get("versions", {}).items())
        for launch in run.launches
    )
    yield "## Training"
    spent = f"{run.seconds / 3600:.2f} hours in steps, {run.rank_seconds / 3600:.2f} rank hours"
    yield _table(
        ("Steps", f"{run.step:,}; at the end of {train.get('global_batch', UNKNOWN)} windows of {length} tokens"),
        ("Tokens", _count(tokens)),
        ("Precision", str(run.trainer.get("precision", UNKNOWN))),
        ("Operations", f"{flops} FLOP, forward and backward" if flops != UNKNOWN else UNKNOWN),
        ("Hardware", "; ".join(hardware) or UNKNOWN),
        ("Time", spent + (", those of its trunk not counted" if run.ancestors else "") if run.seconds else UNKNOWN),
        ("Launches", f"{len(run.launches):,}" if run.launches else UNKNOWN),
        ("Updates left out", f"{run.trainer.get('skips', UNKNOWN)} (loss or gradient not finite, or a spike)"),
        ("Versions", "; ".join(filter(None, versions)) or UNKNOWN),
    )
    yield _recipe(recipe or None)


def _recipe(recipe: Mapping[str, Any] | None) -> str:
    if not recipe:
        return f"Recipe: {UNKNOWN}."
    return (
        f"<details><summary>The recipe</summary>\n\n```toml\n{write_toml(_portable(recipe)).strip()}\n```\n\n</details>"
    )


def _portable(value: Any) -> Any:
    """A recipe without the folders of the machine it ran on: of an absolute path its last part."""
    if isinstance(value, Mapping):
        return {key: _portable(item) for key, item in value.items()}
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


def _scores(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield "## Scores"
    rows = [
        f"| {record['task']} | {record['split']} | {metric} | {score['value']:.4f} | {_interval(score) or '-'} | "
        f"{score['n']:,} | {_protocol(record)} |"
        for record in records
        for metric, score in record.get("scores", {}).items()
        if score.get("value") is not None
    ]
    head = [
        "| task | split | metric | score | interval | n | protocol |",
        "| --- | --- | --- | ---: | --- | ---: | --- |",
    ]
    yield "\n".join([*head, *rows]) if rows else f"{UNKNOWN.capitalize()}: this checkpoint was not scored."


def _interval(score: Mapping[str, Any]) -> str:
    if "deviation" in score:
        return f"deviation over seeds {score['deviation']:.4f}"
    return f"95 %: {score['low']:.4f} to {score['high']:.4f}" if score.get("low") is not None else ""


def _protocol(record: Mapping[str, Any]) -> str:
    return ", ".join(str(record[key]) for key in ("method", "rule") if record.get(key))


def _closing(facts: CardFacts, proof: str) -> Iterator[str]:
    yield "## Limits"
    yield facts.limits or (
        f"Known faults: {UNKNOWN}. A language model continues text as its sources would: what it writes may be false, "
        "and may hold their prejudices or pieces of them."
    )
    if proof:
        yield "## Proof"
        yield f"With the run's folder and its corpus, `{proof}` checks what is said here of data and steps."
    yield "## Citation"
    yield "\n\n".join(f"```bibtex\n{entry.strip()}\n```" for entry in (facts.citation, GLORIA) if entry)


def _usage(head: str, call: str) -> str:
    return f'```python\nfrom transformers import pipeline  # or {head}.from_pretrained("FOLDER")\n\n{call}\n```'


def _table(*rows: tuple[str, str]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {key} | {_cell(value)} |" for key, value in rows)])


def _cell(text: str) -> str:
    """Text that stays within a cell of a table."""
    return " ".join(text.replace("|", "\\|").split())


def _count(number: int | None) -> str:
    return UNKNOWN if number is None else f"{number:,}"


def _date(seconds: int) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(seconds))
