"""Pre-training as an objective of the loop: windows of a weighted mixture, the loss by source, validation by source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from gloria.config.cli import to_mapping
from gloria.config.schema import flatten
from gloria.data.corpus import Corpus
from gloria.data.loader import Loader
from gloria.data.mixture import Mixture
from gloria.data.tokenizer import load_tokenizer
from gloria.dist.agreement import on_all_ranks, require_same
from gloria.dist.checkpoint_read import open_reader
from gloria.dist.manifest import checkpoint_path, step_of
from gloria.dist.process import Process, rank0_decides
from gloria.dist.rank_log import open_rank_log
from gloria.dist.sharding import build_mesh, fill_parameters, precision_and_reason, shard
from gloria.dist.step_sums import StepSums
from gloria.errors import warn
from gloria.files import to_json, write_whole
from gloria.model.config import TransformerConfig
from gloria.model.float8 import check_float8, to_float8
from gloria.model.huggingface import read_tensors
from gloria.model.kernels import choose_kernel, use_cudnn_attention
from gloria.model.transformer import Transformer, initial_value
from gloria.optim.optimizers import build_optimizer
from gloria.train import windows
from gloria.train.branch import START, Ancestor, require_fitting, require_same_trunk
from gloria.train.config import PretrainConfig, RunPlan, check_epochs, continued, located
from gloria.train.loop import StepBatch
from gloria.train.meter import Meter, peak_flops
from gloria.train.metrics import bits_per_byte, perplexity, weighted_mean
from gloria.train.on_gpus import advice_on, gathered_on
from gloria.train.resume import changes_since, choose_trunk, read_run_state
from gloria.train.run import (
    Run,
    ancestry,
    begin_log,
    compiles_blocks,
    load_checkpoint,
    lock_and_choose,
    opening,
    prepare_folder,
    require_same_recipe,
)
from gloria.train.samples import encode_prompts
from gloria.train.sections import parse_range
from gloria.train.summary import describe
from gloria.train.texts import Texts, read_all_texts
from gloria.train.validation import Validation, bytes_per_token, open_validation, validate


@dataclass
class Pretraining:
    """The objective: predict every next token of windows that the mixture draws."""

    plan: RunPlan
    mixture: Mixture
    loader: Loader
    validation: Validation
    bytes_per_token: Mapping[str, float]  # of sources whose text was counted; see `train.metrics.bits_per_byte`
    prompts: list[list[int]]  # of the samples of text
    peak: float | None  # FLOP/s of a rank's card, where it is known

    @property
    def evaluate_every(self) -> int:
        return self.validation.every

    @property
    def groups(self) -> tuple[str, ...]:
        return self.mixture.names

    def next_batch(self, run: Run) -> StepBatch:
        """The rows of this rank; micro-batches are `windows.Windows`."""
        batch = next(self.loader)
        # One rank's rows and the number of passes come out even, see train.config.
        parts, there = windows.windows_on_device(run, batch.tokens, {"groups": batch.source})
        global_tokens = self.mixture.global_batch * self.mixture.sequence_length
        return StepBatch(parts, there["groups"], global_tokens, global_tokens)

    def losses(self, run: Run, part: windows.Windows) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The summed loss, the summed cross entropy of each window, (rows,), and what z-loss adds, where it is on."""
        loss, rows = windows.window_losses(run, part, labels=part.tokens[:, 1:])
        return loss, rows, {"z_loss": loss.detach() - rows.sum()} if run.config.train.z_loss else {}

    def evaluate(self, run: Run) -> str:
        """Validate; why to stop, or ""."""
        return validate(run, self.validation)

    def log_values(
        self, run: Run, step: int, values: dict[str, Any], losses: dict[str, float | None]
    ) -> dict[str, Any]:
        """Perplexity, speed in FLOP/s, and of each source its loss, share (asked and achieved) and epochs.

        The achieved share counts windows since the present weights hold.
        """
        next_sample = self.mixture.samples_of_step(step - 1).stop
        taken, stage = self.mixture.count_before(next_sample), self.mixture.stage(next_sample - 1)
        since = {name: taken[name] - before for name, before in zip(stage.names, stage.taken)}
        epochs, shares = self.mixture.epochs_at(next_sample), self.mixture.shares
        flops = values["tokens_per_s"] * self.plan.flops_per_token / run.process.world
        sources = {
            name: {
                "asked": shares.get(name, 0.0),
                "share": since.get(name, 0) / max(sum(since.values()), 1),
                "loss": loss,
                "bits_per_byte": bits_per_byte(loss, self.bytes_per_token.get(name)),
                "epoch": epochs[name],
            }
            for name, loss in losses.items()
            if loss is not None or shares.get(name)
        }
        return {
            "perplexity": perplexity(values["loss"]),
            "bits_per_byte": bits_per_byte(values["loss"], weighted_mean(self.bytes_per_token, shares)),
            "tflops": flops / 1e12,
            **({} if self.peak is None else {"mfu": flops / self.peak}),
            "sources": sources,
        }

    def describe_step(self, step: int, sums: StepSums) -> dict[str, Any]:
        samples = self.mixture.samples_of_step(step)
        bad = [name for name, loss in zip(self.groups, sums.group_loss) if not np.isfinite(loss)]
        what = bad or ("all" if sums.spike else "all finite: the gradient was not")
        return {"samples": f"{samples.start}:{samples.stop}", "sources": what}

    def finish(self, run: Run) -> bool:
        if run.process.is_main:
            print(f"next: python -m gloria.export --run {run.folder} --out models/{run.folder.name}", flush=True)
        return True

    def close(self) -> None:
        self.loader.close()

    def state_dict(self) -> dict[str, Any]:
        return {"mixture": self.mixture.state_dict(), "model": self.plan.shape.to_dict()}


def open_pretraining(config: PretrainConfig, plan: RunPlan, process: Process) -> Run:
    """Lock the run folder, build the model, and go on where the newest checkpoint ends.

    Raises `UserError` on all ranks for whatever a recipe, a folder or a checkpoint has wrong.
    """
    folder = Path(config.run.dir)
    with opening(config, process) as watch:
        with located(config):
            precision, why = precision_and_reason(config.train.precision, process.device)
        require_same_recipe(process, config, plan.corpus.manifest, precision=precision)
        texts = _read_texts(config, plan.corpus, process)
        mesh = build_mesh(process, config.dist.replicas)
        resume_step = lock_and_choose(config, process, folder, watch, config.data.skip_samples)
        open_rank_log(folder, process.rank, process.world)
        gathered = gathered_on(config, plan, process, precision)
        compiled = compiles_blocks(config, process)
        use_cudnn_attention(True)  # windows all have one length
        with located(config):
            if config.train.fp8:
                on_all_ranks(process, lambda: check_float8(plan.shape, process.device, precision))
            kernel, attention = choose_kernel(
                config.train.attention,
                plan.shape,
                device=process.device,
                precision=precision,
                sequence_length=config.train.sequence_length,
                mask_documents=config.data.mask_documents,
                compiled=compiled,
            )
        model = shard_model(
            plan.shape,
            mesh,
            process.device,
            precision=precision,
            activation_checkpointing=config.train.activation_checkpointing,
            compile_blocks=compiled,
            keep_gathered=gathered.keep,
            kernel=kernel,
            z_loss=config.train.z_loss,
            float8=config.train.fp8,
        )
        card = torch.cuda.get_device_name(process.device) if process.device.type == "cuda" else ""
        objective = Pretraining(
            plan=plan,
            mixture=plan.mixture,
            loader=_loader(config, plan.corpus, plan.mixture, process),
            validation=Validation(0),
            bytes_per_token=bytes_per_token(plan.corpus, "train"),
            prompts=on_all_ranks(process, lambda: encode_prompts(config.log, plan.corpus, plan.shape.max_positions)),
            peak=peak_flops(card, precision) if card else None,
        )
        run = Run(
            config=config,
            objective=objective,
            process=process,
            mesh=mesh,
            folder=folder,
            seed=config.run.seed,
            precision=precision,
            model=model,
            optimizer=build_optimizer(config.optim, model.named_parameters()),
            total_steps=plan.total_steps,
            meter=Meter(plan.mixture.names, plan.mixture.sequence_length),
            watch=watch,
            keep_gathered=gathered.keep,
        )
        changes = []
        if resume_step:
            changes += _load(run, checkpoint_path(folder, resume_step))
        elif config.run.branch:
            changes += _begin_branch(run, choose_trunk(config.run, folder, process))
        else:
            _initialise(run)
        if samples := parse_range(config.data.skip_samples):
            with located(config):
                changes += plan.mixture.leave_out(samples)
        objective.validation = open_validation(config, plan.corpus, plan.mixture, texts)
        prepare_folder(run)
        rank0_decides(process, lambda: _write_start(run))
        if process.is_main:
            print(f"{'attention':<11} {attention}", flush=True)
            plan, on_gpu = objective.plan, process.device.type == "cuda"
            print(describe(config, plan, precision, why, on_gpu, gathered), flush=True)
            for name, text in texts.items():
                print(f"{'text':<11} {name}: {text.describe()}", flush=True)
            for warning in (*plan.warnings, *advice_on(config, plan, process, precision, gathered)):
                warn(warning)
        begin_log(run, changes)
        if run.log:
            run.log.group_sources(objective.groups)
    return run


def _read_texts(config: PretrainConfig, corpus: Corpus, process: Process) -> dict[str, Texts]:
    """The texts of `valid.paths`, the same on all ranks."""

    def read() -> dict[str, Texts]:
        with located(config):
            tokenizer = load_tokenizer(corpus.tokenizer_folder)
            return read_all_texts(config.valid.paths, config.valid.text_field, tokenizer, config.train.sequence_length)

    texts = on_all_ranks(process, read) if config.valid.paths else {}
    require_same(process, {f"valid.paths.{name}": text.fingerprint for name, text in texts.items()})
    return texts


def _loader(config: PretrainConfig, corpus: Corpus, mixture: Mixture, process: Process) -> Loader:
    # Its thread starts with the first batch, when the mixture stands where the checkpoint has it.
    streams = {entry.name: corpus.stream(entry.name) for entry in corpus.manifest.sources if entry.train.tokens}
    return Loader(streams, mixture, rank=process.rank, world=process.world, prefetch=config.data.prefetch)


def shard_model(
    shape: TransformerConfig,
    mesh: DeviceMesh,
    device: torch.device,
    *,
    precision: str,
    activation_checkpointing: str,
    compile_blocks: bool,
    keep_gathered: bool = False,
    kernel: str = "sdpa",
    z_loss: float = 0.0,
    float8: bool = False,
) -> Transformer:
    """A Transformer whose parameters live in shards on `mesh`; their values are not set yet (`fill_parameters`).

    Order: float8 puts other layers into the blocks, under the same names; checkpointing is a call inside
    `Block.forward`, then `block.compile()` in place (`torch.compile(block)` would put `_orig_mod.` in the parameter
    names), then `fully_shard(block)`, then the root, whose group holds the tied embedding whole while the loss is
    computed inside the root's forward.
    """
    with torch.device("meta"):
        model = Transformer(shape, activation_checkpointing=activation_checkpointing, kernel=kernel, z_loss=z_loss)
    if float8:
        to_float8(model.transformer.h)
    if compile_blocks:
        model.token_losses = torch.compile(model.token_losses)
        for block in model.transformer.h:
            block.compile()
    shard(model, model.transformer.h, mesh, precision, keep_gathered=keep_gathered, cast_inputs=False)
    model.to_empty(device=device)
    # The head reads wte.weight, so a second copy after to_empty would train apart from the first.
    assert sum(name.endswith("wte.weight") for name, _ in model.named_parameters()) == 1
    return model


def _initialise(run: Run) -> None:
    """The starting weights: a Hugging Face folder's, or random ones that no number of ranks changes."""
    config, shape = run.config, run.objective.plan.shape
    if config.model.from_:
        tensors = read_tensors(config.model.from_, shape.vocab_size)
        fill_parameters(run.model, lambda name, size: tensors[name])
    else:
        fill_parameters(run.model, lambda name, size: initial_value(name, size, shape, run.seed))


def _load(run: Run, checkpoint: Path) -> list[str]:
    """Everything from a checkpoint of this run, or of the one it is a branch of; a line for each change since."""
    trainer, saved = read_run_state(checkpoint, "model", "mixture", "schedule")
    reader = open_reader(checkpoint)
    objective, data = run.objective, run.config.data
    with located(run.config):
        if checkpoint.parent.parent == run.folder:
            require_same_trunk(run.config.run, saved.ancestors, run.folder)
        changes = changes_since(trainer, run.config, objective.plan, reader.step)
        changes += objective.mixture.load_state_dict(
            trainer["mixture"], step=reader.step, allow_change=data.allow_change, new_epoch=data.new_epoch
        )
        check_epochs(run.config, objective.mixture, run.total_steps)
    # A source of an earlier stage keeps its place among the names, so the meter is made for those of now.
    run.meter = Meter(objective.groups, objective.mixture.sequence_length)
    objective.plan = continued(run.config, objective.plan, saved.tokens)
    return changes + load_checkpoint(run, reader, trainer, saved)


def _begin_branch(run: Run, checkpoint: Path) -> list[str]:
    """Everything from a checkpoint of another run; the loop saves it as this run's own before its first step."""
    config = run.config
    began_from = flatten(read_run_state(checkpoint)[0]["recipe"]).get("model.from")
    with located(config):
        require_fitting(config.run, config.model.from_, began_from, run.total_steps, step_of(checkpoint) or 0)
    changes = _load(run, checkpoint)
    run.ancestors = (Ancestor(str(config.run.trunk[0]), run.step), *run.ancestors)
    run.saved_step, run.evaluated_step = 0, -1
    return changes


def _write_start(run: Run) -> int:
    """For rank 0, before the first step: what `show` and `export` read."""
    plan = run.objective.plan
    plan.corpus.copy_tokenizer(run.folder / "tokenizer")
    start = {"recipe": to_mapping(run.config), "mixture": run.objective.mixture.state_dict(), **ancestry(run)}
    write_whole(run.folder / START, to_json(start))
    return 0
