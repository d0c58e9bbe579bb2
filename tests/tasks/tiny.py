"""Tiny random models of every family, in Hugging Face folders, and a task that they can learn."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from tokenizers import decoders as token_decoders
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedTokenizerFast

from gloria.dist.process import Process

FAMILIES = ("gpt2", "gpt_neo", "llama", "bert", "deberta-v2", "gpt_neox")
OWN = FAMILIES[:3]  # run through gloria.model, as Mistral and Qwen do
ENCODERS = ("bert", "deberta-v2", "roberta", "electra", "distilbert")
SENTENCE = "o a gato cão rato mesa casa rua dorme come corre vê um uma grande pequeno preto branco sim não no na de"
WORDS = SENTENCE.split()

_COMMON = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 96,
}
_SHAPES = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96},
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "intermediate_size": 64,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
        "max_position_embeddings": 96,
    },
    "bert": _COMMON,
    "deberta-v2": {
        **_COMMON,
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 16,
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "type_vocab_size": 0,
        "position_biased_input": False,
    },
    "roberta": _COMMON,
    "electra": {**_COMMON, "embedding_size": 16},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 96},
    "opt": {**_COMMON, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt_neox": _COMMON,
    "llama": {**_COMMON, "num_key_value_heads": 2},
    "mistral": {**_COMMON, "num_key_value_heads": 2, "sliding_window": 8},
}


def make_folder(family: str, folder: Path, seed: int = 0, *, spare: int = 3, pad: str | None = None) -> Path:
    """A random model of a family with a tokenizer as such models have them.

    `spare` rows of the embedding are no token; a decoder's `pad` token is none, as usual, or another one.
    """
    tokenizer = make_tokenizer(family)
    if pad is not None:
        tokenizer.pad_token = pad
    shape = {**_SHAPES[family], "vocab_size": len(tokenizer) + spare, "attn_implementation": "eager"}
    # dropout would make a resumed run on other ranks another run
    shape |= dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    if family in ("gpt2", "gpt_neo"):
        shape |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_dropout", "embed_dropout"), 0.0)
        shape["resid_dropout"] = 0.0
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model(family, **shape, **special, bos_token_id=tokenizer.bos_token_id)
    torch.manual_seed(seed)
    kind = AutoModelForMaskedLM if family in ENCODERS else AutoModelForCausalLM
    kind.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """BERT's adds [CLS] and [SEP] and distinguishes two parts, LLaMA's its start; the others add nothing."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = token_decoders.ByteLevel()
    special = {
        "eos_token": "</s>",
        "bos_token": "<s>",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
    }
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=list(special.values()), initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    ids = {text: backend.token_to_id(text) for text in special.values()}
    if family in ENCODERS:
        names, pairs = ("[CLS]", "[SEP]"), "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1"
        single, kept = "[CLS] $A [SEP]", ("cls_token", "sep_token", "pad_token")
    elif family in ("llama", "mistral", "opt"):
        names, single, pairs, kept = ("<s>",), "<s> $A", "<s> $A <s>:1 $B:1", ("eos_token", "bos_token")
    else:
        names, single, pairs, kept = (), "$A", "$A $B:1", ("eos_token",)
    if names:
        backend.post_processor = processors.TemplateProcessing(
            single=single, pair=pairs, special_tokens=[(name, ids[name]) for name in names]
        )
    inputs = ["input_ids", "attention_mask"] + (["token_type_ids"] if family in ENCODERS else [])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_input_names=inputs, **{name: special[name] for name in kept}
    )


def sentence(generator: random.Random, words: int = 5) -> str:
    return " ".join(generator.choice(WORDS) for _ in range(words))


def write_assin(folder: Path, sizes: dict[str, int], seed: int = 0, labels: bool = True) -> Path:
    """ASSIN-2 files in which a pair is entailed exactly if both sentences are the same."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(seed)
    names = {"train": "assin2-train-only.xml", "dev": "assin2-dev.xml", "test": "assin2-test.xml"}
    for split, size in sizes.items():
        rows = []
        for number in range(size):
            first = sentence(generator)
            same = number % 2 == 0
            second = first if same else sentence(generator)
            label = (
                f'entailment="{"Entailment" if same else "None"}" similarity="{5 if same else 1}.0" ' if labels else ""
            )
            rows.append(f'<pair {label}id="{number}"><t>{first}</t><h>{second}</h></pair>')
        text = "\n".join(
            ['<?xml version="1.0" encoding="utf-8"?>', "<entailment-corpus>", *rows, "</entailment-corpus>"]
        )
        (folder / names[split]).write_text(text, encoding="utf-8")
    return folder


def write_squad(folder: Path, sizes: dict[str, int], seed: int = 0, impossible: bool = False, words: int = 12) -> Path:
    """FaQuAD-like files: the answer to "quem dorme?" is the word before "dorme"."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(seed)
    for split, size in sizes.items():
        paragraphs = []
        for number in range(size):
            others = [word for word in sentence(generator, words).split() if word != "dorme"]
            place = generator.randrange(1, len(others))
            none = impossible and number % 3 == 0
            context = " ".join(others if none else [*others[:place], "dorme", *others[place:]])
            start = len(" ".join(others[: place - 1])) + (place > 1)
            answers = [] if none else [{"text": others[place - 1], "answer_start": start}]
            question = {"id": f"{split}-{number}", "question": "quem dorme?", "answers": answers, "is_impossible": none}
            paragraphs.append({"context": context, "qas": [question]})
        (folder / f"{split}.json").write_text(json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]}))
    return folder


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path.parent


def one_process() -> Process:
    """This process as the only rank; the group is left to `gloria.dist` to make."""
    return Process(0, 1, torch.device("cpu"))
