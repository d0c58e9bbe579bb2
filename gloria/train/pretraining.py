"""Pre-training as an objective of the loop: windows of a weighted mixture, the loss by source, validation by source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from gloria.config.cli import to_mapping
from gloria.config.schema import flatten
from gloria.data.corpus import Corpus
from gloria.data.loader import Loader, document_bounds, validation_windows
from gloria.data.mixture import Mixture
from gloria.data.stream import TokenStream
from gloria.dist.agreement import on_all_ranks
from gloria.dist.checkpoint_read import open_reader
from gloria.dist.manifest import checkpoint_path, step_of
from gloria.dist.process import Process, rank0_decides
from gloria.dist.rank_log import open_rank_log
from gloria.dist.sharding import all_reduce_sums, build_mesh, fill_parameters, precision_and_reason, shard
from gloria.dist.signals import ASKED
from gloria.dist.step_sums import StepSums
from gloria.dist.transfer import to_device
from gloria.errors import warn
from gloria.files import to_json, write_whole
from gloria.model.config import TransformerConfig
from gloria.model.float8 import check_float8, to_float8
from gloria.model.huggingface import read_tensors
from gloria.model.kernels import choose_kernel, use_cudnn_attention
from gloria.model.transformer import Transformer, initial_value
from gloria.optim.optimizers import build_optimizer
from gloria.train.branch import START, Ancestor, require_fitting, require_same_trunk
from gloria.train.config import PretrainConfig, RunPlan, check_epochs, continued, located
from gloria.train.loop import StepBatch
from gloria.train.meter import Meter, peak_flops
from gloria.train.metrics import perplexity
from gloria.train.on_gpus import advice_on, gathered_on
from gloria.train.resume import changes_since, choose_trunk, read_run_state
from gloria.train.run import (
    TAKEN_OVER,
    Run,
    ancestry,
    begin_log,
    compiles_blocks,
    flags_of,
    load_checkpoint,
    lock_and_choose,
    opening,
    prepare_folder,
    require_same_recipe,
)
from gloria.train.sections import parse_range
from gloria.train.summary import describe


class Windows(NamedTuple):
    """A micro-batch, on the device."""

    tokens: Tensor  # (rows, seq + 1) int64
    documents: Tensor | None  # of the first seq tokens, see `document_bounds`; None: they see each other


@dataclass
class Pretraining:
    """The objective: predict every next token of windows that the mixture draws."""

    plan: RunPlan
    mixture: Mixture
    loader: Loader
    valid_streams: Mapping[str, tuple[TokenStream, np.ndarray]]  # by source: held-out tokens, windows (n,)
    valid_weights: Mapping[str, float]  # of sources in valid/loss; see `_open_validation`
    evaluate_every: int
    peak: float | None  # FLOP/s of a rank's card, where it is known

    @property
    def groups(self) -> tuple[str, ...]:
        return self.mixture.names

    def next_batch(self, run: Run) -> StepBatch:
        """The rows of this rank; micro-batches are `Windows`."""
        batch = next(self.loader)
        # One rank's rows and the number of passes come out even, see train.config.
        parts, there = windows_on_device(run, batch.tokens, {"groups": batch.source})
        global_tokens = self.mixture.global_batch * self.mixture.sequence_length
        return StepBatch(parts, there["groups"], global_tokens, global_tokens)

    def losses(self, run: Run, part: Windows) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The summed loss, the summed cross entropy of each window, (rows,), and what z-loss adds, where it is on."""
        loss, rows = window_losses(run, part, labels=part.tokens[:, 1:])
        return loss, rows, {"z_loss": loss.detach() - rows.sum()} if run.config.train.z_loss else {}

    @torch.no_grad()
    def evaluate(self, run: Run) -> str:
        """The loss of every source on its held-out windows, always the same ones; why to stop, or "".

        The model's forward is a collective, so every rank takes the same number of batches: a rank that has no window
        left takes one whose labels are all masked. After each batch the ranks agree whether to go on.
        """
        run.model.eval()
        process, micro_batch, length = run.process, run.config.train.filled_micro_batch, self.mixture.sequence_length
        no_end = int(self.plan.corpus.manifest.tokenizer.eos_id == 0)  # a missing row is one document
        losses: dict[str, float] = {}
        for name, (stream, windows) in self.valid_streams.items():
            own = windows[process.rank :: process.world]
            batches = -(-len(windows) // (process.world * micro_batch))
            losses[name] = 0.0
            for number in range(batches):
                run.watch.beat(run.step, "validation", slow=run.step == 0)
                chosen = own[number * micro_batch : (number + 1) * micro_batch]
                tokens = np.full((micro_batch, length + 1), no_end, stream.dtype)
                stream.gather(chosen, length, tokens[: len(chosen)])
                (part,), _ = windows_on_device(run, tokens, {})
                labels = part.tokens[:, 1:].clone()
                labels[len(chosen) :] = -100
                sums = torch.zeros(3, dtype=torch.float64, device=process.device)
                sums[0] = window_losses(run, part, labels)[1].sum(dtype=torch.float64)
                flags = flags_of(run)
                sums[1:] = torch.tensor([flags.stop, flags.lock_lost])
                all_reduce_sums(sums)
                loss, stop_requests, locks_lost = sums.tolist()
                if stop_requests or locks_lost:
                    run.model.train()
                    return TAKEN_OVER if locks_lost else ASKED
                losses[name] += loss / (len(windows) * length)
        run.model.train()
        run.evaluated_step = run.step
        if run.log:
            weights = {name: self.valid_weights.get(name, 0.0) for name in losses}
            total = sum(weights.values())
            mean = sum(weights[name] * loss for name, loss in losses.items()) / total if total else float("nan")
            run.log.valid(run.step, mean, losses, weights)
        return ""

    def log_values(
        self, run: Run, step: int, values: dict[str, Any], losses: dict[str, float | None]
    ) -> dict[str, Any]:
        """Perplexity, speed in FLOP/s, and of each source its loss, share (asked and achieved) and epochs.

        The achieved share counts windows since the present weights hold.
        """
        next_sample = self.mixture.samples_of_step(step - 1).stop
        taken, stage = self.mixture.count_before(next_sample), self.mixture.stages[-1]
        since = {name: taken[name] - before for name, before in zip(stage.names, stage.taken)}
        epochs, shares = self.mixture.epochs_at(next_sample), self.mixture.shares
        flops = values["tokens_per_s"] * self.plan.flops_per_token / run.process.world
        sources = {
            name: {
                "asked": shares.get(name, 0.0),
                "share": since.get(name, 0) / max(sum(since.values()), 1),
                "loss": loss,
                "epoch": epochs[name],
            }
            for name, loss in losses.items()
            if loss is not None or shares.get(name)
        }
        return {
            "perplexity": perplexity(values["loss"]),
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


def windows_on_device(
    run: Run, tokens: np.ndarray, more: Mapping[str, np.ndarray]
) -> tuple[list[Windows], dict[str, Tensor]]:
    """Windows of tokens (n, seq + 1) as micro-batches, and other arrays by name, in one transfer."""
    size, bounds = run.config.train.filled_micro_batch, {}
    if run.config.data.mask_documents:
        eos_id = run.objective.plan.corpus.manifest.tokenizer.eos_id
        cuts = range(0, len(tokens), size)
        bounds = {f"documents {at // size}": document_bounds(tokens[at : at + size, :-1], eos_id) for at in cuts}
    there = to_device({**more, **bounds, "tokens": tokens}, run.process.device)
    # As small as they are on disk until here; the embedding takes int64.
    parts = there["tokens"].to(torch.int64).split(size)
    return [Windows(part, there.get(f"documents {number}")) for number, part in enumerate(parts)], there


def window_losses(run: Run, part: Windows, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The model's loss on windows, a sum, and the cross entropy of each, (rows,)."""
    return run.model(part.tokens[:, :-1], labels, part.documents)


def open_pretraining(config: PretrainConfig, plan: RunPlan, process: Process) -> Run:
    """Lock the run folder, build the model, and go on where the newest checkpoint ends.

    Raises `UserError` on all ranks for whatever a recipe, a folder or a checkpoint has wrong.
    """
    folder = Path(config.run.dir)
    with opening(config, process) as watch:
        with located(config):
            precision, why = precision_and_reason(config.train.precision, process.device)
        require_same_recipe(process, config, plan.corpus.manifest, precision=precision)
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
            valid_streams={},
            valid_weights={},
            evaluate_every=0,
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
        _open_validation(config, plan.corpus, objective)
        prepare_folder(run)
        rank0_decides(process, lambda: _write_start(run))
        if process.is_main:
            print(f"{'attention':<11} {attention}", flush=True)
            plan, on_gpu = objective.plan, process.device.type == "cuda"
            print(describe(config, plan, precision, why, on_gpu, gathered), flush=True)
            for warning in (*plan.warnings, *advice_on(config, plan, process, precision, gathered)):
                warn(warning)
        begin_log(run, changes)
    return run


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


def _open_validation(config: PretrainConfig, corpus: Corpus, objective: Pretraining) -> None:
    """The held-out windows of every source that the run has ever drawn, also one whose weight is 0 by now.

    Their weights in `valid/loss` are the shares the run began with: a re-weighting would change what the curve means.
    """
    mixture, found = objective.mixture, {}
    held_out = {entry.name: entry.valid.tokens for entry in corpus.manifest.sources if config.valid.every}
    for name in mixture.names:
        if held_out.get(name, 0) > mixture.sequence_length:  # plan_run reports the others
            stream = corpus.stream(name, "valid")
            found[name] = (stream, validation_windows(stream, mixture.sequence_length, config.valid.windows))
    first = mixture.stages[0]
    objective.valid_weights = {name: quota / first.period for name, quota in zip(first.names, first.quotas)}
    objective.valid_streams = found
    objective.evaluate_every = config.valid.every if found else 0
