"""CALAME by `gloria.evaluate`'s own code against one `generate` of transformers a context and rule: same answers?

    python bench/calame.py [--model FOLDER] [--data FOLDER] [--batches 3] [--batch 16] [--preset gpt-neo-125m]

Without --model it is a model of the preset's layers with random weights and a tokenizer trained on the contexts.
`generate` stops, as the rules say, when the word is over, and keeps keys and values. Both run in turns, batch by batch.
On a CPU its seconds are compared, which others on the machine disturb less than the clock (with OMP_NUM_THREADS=1:
threads that wait for each other count as busy). Reading a context is bound by arithmetic on both sides, so a rule alone
gains by its steps only; all of them together read it once. Without --data it is the sample that comes with gloria.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from gloria.data.tokenizer import TokenizerConfig, train_tokenizer
from gloria.dist.process import start_process_group, stop_process_group
from gloria.model.config import PRESETS, parameter_shapes
from gloria.model.huggingface import write_folder
from gloria.model.transformer import initial_value
from gloria.tasks.catalog import TASKS
from gloria.tasks.examples import LastWord
from gloria.tasks.formats.lastword import LOG_LIKELIHOOD, RULES, Rule
from gloria.tasks.models.backbones import LoadedModel, load_model
from gloria.tasks.models.encode import length_batches, start_ids
from gloria.tasks.models.loglikelihood import make_requests
from gloria.tasks.models.zeroshot import LIKELIHOOD, EvalSettings, Evaluation, answers
from gloria.tasks.samples import sample_folder


class WordIsOver(StoppingCriteria):
    """A rule's own end of a continuation, for `generate`."""

    def __init__(self, rule: Rule, loaded: LoadedModel, start: list[int]) -> None:
        self.rule, self.loaded, self.start = rule, loaded, start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        over = self.rule.is_over(new_text(self.loaded, self.start, input_ids[0].tolist()))
        return torch.tensor([over], device=input_ids.device)


def new_text(loaded: LoadedModel, start: list[int], whole: list[int]) -> str:
    before, after = (loaded.tokenizer.decode(ids, skip_special_tokens=True) for ids in (start, whole))
    return after[len(before) :]


def one_by_one(model: torch.nn.Module, loaded: LoadedModel, examples: list[LastWord], rule: Rule) -> dict[str, str]:
    """What `generate` writes after each context, one at a time."""
    written = {}
    for example in examples:
        context = example.context.rstrip() if rule.strip else example.context
        start = start_ids(loaded, needed=False)
        start += loaded.tokenizer(context, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([start], device=model.device)
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=rule.max_new_tokens,
            do_sample=False,
            repetition_penalty=rule.repetition_penalty,
            stopping_criteria=StoppingCriteriaList([WordIsOver(rule, loaded, start)]),
            eos_token_id=loaded.tokenizer.eos_token_id,
            pad_token_id=loaded.tokenizer.eos_token_id,
        )
        written[example.id] = new_text(loaded, start, output[0].tolist())
    return written


def scored_one_by_one(model: torch.nn.Module, loaded: LoadedModel, examples: list[LastWord]) -> dict[str, float]:
    """The log-likelihood of each gold word, one forward an example."""
    found = {}
    for example in examples:
        if not (example.word or "").strip():
            continue
        texts = [(example.context.rstrip(), f" {example.word.strip()}")]
        ((request,), _) = make_requests(loaded, texts)
        ids = torch.tensor([request.ids], device=model.device)
        labels = ids.clone()
        labels[:, : -request.scored] = -100
        found[example.id] = -float(model(ids, labels=labels).loss) * request.scored
    return found


def random_model(preset: str, contexts: list[str], work: Path) -> Path:
    """A folder with a model of a preset's layers, and a tokenizer of the contexts."""
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=16384), contexts, work / "tokenizer")
    shape = replace(PRESETS[preset], vocab_size=tokenizer.vocab_size)
    sizes = parameter_shapes(shape)
    tensors = ((name, initial_value(name, torch.Size(size), shape, seed=0)) for name, size in sizes.items())
    write_folder(work / "model", shape, tensors, work / "tokenizer", "float32")
    return work / "model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a Hugging Face folder")
    parser.add_argument("--data", type=Path, help="the folder of calamept_all.jsonl")
    parser.add_argument("--preset", default="gpt-neo-125m", choices=PRESETS)
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16, help="contexts of a batch")
    a = parser.parse_args()
    task = TASKS["calame"]
    examples = task.read(a.data or sample_folder(task), "test")
    # Batches as the whole file has them, of contexts alike in length, evenly from the longest to the shortest.
    batches = length_batches([len(example.context) for example in examples], a.batch)
    batches = [batches[(2 * number + 1) * len(batches) // (2 * a.batches)] for number in range(a.batches)]
    chosen = [examples[number] for batch in batches for number in batch]
    process = start_process_group("auto", timeout_minutes=30)
    with tempfile.TemporaryDirectory() as work:
        path = a.model or random_model(a.preset, [example.context for example in examples], Path(work))
        loaded = load_model(str(path), language_model=True)
        loaded.language_model.to(process.device).eval()
        theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(process.device).eval()
        tokens = sum(len(loaded.tokenizer(example.context)["input_ids"]) for example in chosen)
        print(f"model      {a.model or a.preset}, vocabulary {len(loaded.tokenizer)}, {process.device}, fp32")
        length = tokens / len(chosen)
        print(f"contexts   {len(chosen)} of {len(examples)}, {length:.0f} tokens on average, batch {a.batch}")
        on_cpu = process.device.type == "cpu"
        clock, unit = (time.process_time, "CPU seconds") if on_cpu else (time.perf_counter, "seconds")
        print(f"{unit:<32}{'one by one':>12}{'gloria':>12}{'ratio':>8}  answers")
        # Each of the generated rules alone, and all of them as `python -m gloria.evaluate --task calame` has them.
        columns = [(name,) for name in RULES] + [(*RULES, LOG_LIKELIHOOD)]
        sums = dict.fromkeys(columns, (0.0, 0.0, 0))
        for batch in batches:
            part = [examples[number] for number in batch]
            wanted, alone = {}, {}
            for name in (*RULES, LOG_LIKELIHOOD):
                begun = clock()
                if name == LOG_LIKELIHOOD:
                    with torch.no_grad():
                        wanted[name] = scored_one_by_one(theirs, loaded, part)
                else:
                    wanted[name] = one_by_one(theirs, loaded, part, RULES[name])
                alone[name] = clock() - begun
            for rules, (slow, fast, differing) in sums.items():
                settings = EvalSettings(LIKELIHOOD, 0, 0, rules, a.batch)
                begun = clock()
                found = {
                    answer.rule: answer.predictions
                    for answer in answers(Evaluation(loaded, task, part, [], settings, process))
                }
                seconds = clock() - begun
                differing += sum(
                    abs(predictions[key].log_likelihood - answer) > 1e-3 if name == LOG_LIKELIHOOD
                    else predictions[key].text != answer
                    for name, predictions in found.items() for key, answer in wanted[name].items()
                )  # fmt: skip
                sums[rules] = slow + sum(alone[name] for name in rules), fast + seconds, differing
        for rules, (slow, fast, differing) in sums.items():
            same = "equal" if not differing else f"{differing} DIFFER"
            name = rules[0] if len(rules) == 1 else "all rules and log-likelihood"
            print(f"{name:<32}{slow:>10.1f} s{fast:>10.1f} s{slow / fast:>7.1f}x  {same}")
    stop_process_group()


if __name__ == "__main__":
    main()
