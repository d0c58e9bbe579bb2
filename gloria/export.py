"""Turn a checkpoint of a run into a Hugging Face folder, or a fine-tuned model into a class of transformers.

    python -m gloria.export --run runs/demo --out models/demo [--step 1000] [--precision bf16]
    python -m gloria.export --finetuned runs/assin2-entailment/model --out models/assin2

One process, no process group, whatever number of ranks saved the checkpoint; at most a few GB of memory for a run, two
whole models for a fine-tuned one, whose logits are compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gloria.config.cli import Problems, option, parse
from gloria.data.corpus import describe_contamination
from gloria.dist.checkpoint_read import find_checkpoint, read_full_tensors, read_trainer
from gloria.dist.manifest import read_manifest
from gloria.errors import UserError, run_command
from gloria.model.config import TransformerConfig, count_parameters
from gloria.model.huggingface import write_folder
from gloria.record.card import README, finetuned_card, run_card
from gloria.record.facts import gather, read_facts, results_of
from gloria.record.weights import LAUNCH, STEP

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "float32": "float32", "bfloat16": "bfloat16"}


@dataclass(frozen=True)
class ExportOptions:
    """What is exported, and how."""

    out: Path = option(help="the folder to make; it must not be there yet")
    run: Path | None = option(None, "the run's folder")
    finetuned: Path | None = option(
        None, "instead: a fine-tuned model with one head, or its run", other_names=("tuned",)
    )
    step: int | None = option(None, "of which step; by default the newest checkpoint that is whole", minimum=0)
    precision: str = option("fp32", "of the stored weights", choices=tuple(DTYPES))
    card: Path | None = option(
        None,
        "FACTS.toml for the model card: name, authors, licence, language, contact, limits, citation and more",
    )
    dtype: str | None = option(None, "an older name of --precision", choices=tuple(DTYPES))


def main(argv: list[str] | None = None) -> int:
    """Export a run's checkpoint, or a fine-tuned model."""
    arguments = parse(
        ExportOptions,
        argv,
        prog="python -m gloria.export",
        description="Turn a run or a fine-tuned model into a Hugging Face folder.",
        recipe=False,
        check=_contradictions,
    ).config
    if arguments.finetuned:
        return export_finetuned(arguments)
    assert arguments.run is not None

    facts = read_facts(arguments.card)
    checkpoint = find_checkpoint(arguments.run, arguments.step)
    trainer = read_trainer(checkpoint)
    shape = TransformerConfig.from_dict(trainer["model"])
    manifest = read_manifest(checkpoint)
    tensors = read_full_tensors(checkpoint, "model.")
    about = {STEP: str(manifest.step), LAUNCH: manifest.launch}  # gloria.audit proves it
    texts = {README: run_card(facts, gather(arguments.run, checkpoint, trainer), arguments.out.name)}
    dtype = DTYPES[arguments.dtype or arguments.precision]
    write_folder(arguments.out, shape, tensors, arguments.run / "tokenizer", dtype, about=about, texts=texts)
    print(
        f"{arguments.out}: {count_parameters(shape)['total']:,} parameters ({dtype}) from {checkpoint}",
        *describe_contamination(trainer),
        sep="\n",
    )
    return 0


def _contradictions(arguments: ExportOptions) -> Problems:
    if arguments.out and arguments.out.exists():
        yield ("out",), f"{arguments.out} is already there; give another folder or remove it"
    if not arguments.finetuned:
        if not arguments.run:
            yield ("run",), "is missing; give a run's folder, or --finetuned with a fine-tuned model's"
        return
    if arguments.run:
        yield ("finetuned", "run"), "names a model, and so does --run; give one of them"
    if arguments.step is not None:
        yield ("step",), "is for --run; leave it out"
    if DTYPES[arguments.dtype or arguments.precision] != "float32":
        yield ("precision",), "is for --run, a fine-tuned model stays fp32; leave it out"


def export_finetuned(arguments: ExportOptions) -> int:
    """A fine-tuned model as the class of transformers that has its head."""
    # transformers' models take seconds to import, and a run's export has no use for them.
    from gloria.tasks.models.export import export_head
    from gloria.tasks.models.finetuned import find_finetuned, read_task_file

    assert arguments.finetuned is not None
    folder = find_finetuned(arguments.finetuned)
    if folder is None:
        raise UserError(f"--finetuned: {arguments.finetuned} holds no task.json; give the folder of a fine-tuning")
    facts = read_facts(arguments.card)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    result = export_head(folder, arguments.out)
    if not arguments.out.exists():
        raise UserError(f"--finetuned: {folder} cannot be exported ({result.removeprefix('none: ')}); use it here")
    if not (arguments.out / README).exists():
        head = result.split(": ")[1].split(",")[0]
        card = finetuned_card(
            facts, results_of(folder.parent), read_task_file(folder)["task"], head, arguments.out.name
        )
        (arguments.out / README).write_text(card, encoding="utf-8")
    print(result)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
