"""The model families as a table: what all models of a family share, and how config.json describes one of them.

An entry of FAMILIES is all that is known of a family by name; the transformer reads its flags. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from gloria.config.cli import option

GLOBAL, LOCAL = "global", "local"
# Far above any model: a larger number in a file would only use up memory and time before something else fails.
MAX_LAYERS, MAX_SIZE = 10_000, 2**31 - 1


@dataclass(frozen=True)
class RopeScaling:
    """How rotary positions are stretched beyond the length that a model was first trained at."""

    kind: str = option(help="all frequencies divided, or as Llama 3.1 the low ones", choices=("linear", "llama3"))
    factor: float = option(help="what the frequencies are divided by", above=0.0)
    low_freq_factor: float = option(1.0, "llama3: longer waves than original / this are divided", above=0.0)
    high_freq_factor: float = option(4.0, "llama3: shorter waves than original / this are kept", above=0.0)
    original_max_positions: int = option(8192, "llama3: tokens of the first training", minimum=1)


@dataclass(frozen=True)
class Family:
    """What the models of a family share: first what they compute, then how Hugging Face's folders describe them."""

    fused_qkv: bool  # one projection gives queries, keys and values; otherwise one each
    qkv_bias: bool
    bias: bool  # of all other linear layers
    qk_norm: bool  # each head of queries and keys is normed
    attention_scale: float | None  # factor of the attention scores; None: 1/sqrt(head_dim)
    attention_kinds: tuple[str, ...]  # "global" or "local", which the layers take by turns
    rotary: bool  # positions turn queries and keys (arXiv 2104.09864); otherwise they are learned and added
    rms_norm: bool  # arXiv 1910.07467; otherwise LayerNorm
    gated_mlp: bool  # SwiGLU (arXiv 2002.05202); otherwise GELU in its tanh form
    scaled_start: bool  # see `initial_value`

    model_type: str
    model_class: str  # of transformers, with the language model's head
    sizes: dict[str, tuple[str, int | None]]  # our name -> (key, what transformers takes where the key is missing)
    norm_epsilon: tuple[str, float]  # likewise
    dropouts: tuple[str, ...]  # keys of the dropout rates
    fixed: dict[str, Any]  # keys that change what a model computes, with the only value that ours has of each
    layers_key: str = ""  # what says which layers are local; "": none is
    names: tuple[tuple[str, str], ...] = ()  # parts of our parameters' names, and what folders have in their place
    transposed: str = r"(?!)"  # pattern of the weights that a folder keeps as (in, out); this one matches nothing

    def folder_name(self, name: str) -> str:
        """What a folder calls the parameter that is `name` here."""
        for ours, theirs in self.names:
            name = name.replace(ours, theirs)
        return name


# Radford et al. 2019
_GPT2 = Family(
    fused_qkv=True,
    qkv_bias=True,
    bias=True,
    qk_norm=False,
    attention_scale=None,
    attention_kinds=(GLOBAL,),
    rotary=False,
    rms_norm=False,
    gated_mlp=False,
    scaled_start=True,
    model_type="gpt2",
    model_class="GPT2LMHeadModel",
    sizes={
        "num_layers": ("n_layer", 12),
        "hidden_size": ("n_embd", 768),
        "num_heads": ("n_head", 12),
        "intermediate_size": ("n_inner", None),
        "max_positions": ("n_positions", 1024),
        "vocab_size": ("vocab_size", 50257),
    },
    norm_epsilon=("layer_norm_epsilon", 1e-5),
    dropouts=("embd_pdrop", "attn_pdrop", "resid_pdrop"),
    fixed={
        "activation_function": "gelu_new",
        "tie_word_embeddings": True,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    transposed=r"\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight$",  # transformers' Conv1D
)
# Black et al. 2021 (doi 10.5281/zenodo.5297715)
_GPT_NEO = replace(
    _GPT2,
    fused_qkv=False,
    qkv_bias=False,
    attention_scale=1.0,
    attention_kinds=(GLOBAL, LOCAL),
    model_type="gpt_neo",
    model_class="GPTNeoForCausalLM",
    sizes={
        "num_layers": ("num_layers", 24),
        "hidden_size": ("hidden_size", 2048),
        "num_heads": ("num_heads", 16),
        "intermediate_size": ("intermediate_size", None),
        "max_positions": ("max_position_embeddings", 2048),
        "vocab_size": ("vocab_size", 50257),
        "window_size": ("window_size", 256),
    },
    dropouts=("embed_dropout", "attention_dropout", "resid_dropout"),
    fixed={"activation_function": "gelu_new", "tie_word_embeddings": True},
    layers_key="attention_types",
    transposed=Family.transposed,
)
# Touvron et al. 2023 (arXiv 2302.13971); Tucano, EuroLLM and SmolLM are such models
_LLAMA = replace(
    _GPT2,
    fused_qkv=False,
    qkv_bias=False,
    bias=False,
    rotary=True,
    rms_norm=True,
    gated_mlp=True,
    scaled_start=False,
    model_type="llama",
    model_class="LlamaForCausalLM",
    sizes={
        "num_layers": ("num_hidden_layers", 32),
        "hidden_size": ("hidden_size", 4096),
        "num_heads": ("num_attention_heads", 32),
        "num_kv_heads": ("num_key_value_heads", None),
        "head_size": ("head_dim", None),
        "intermediate_size": ("intermediate_size", 11008),
        "max_positions": ("max_position_embeddings", 2048),
        "vocab_size": ("vocab_size", 32000),
    },
    norm_epsilon=("rms_norm_eps", 1e-6),
    dropouts=(),
    fixed={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0},
    names=(
        ("transformer.wte.", "model.embed_tokens."),
        ("transformer.h.", "model.layers."),
        ("transformer.ln_f.", "model.norm."),
        (".ln_1.", ".input_layernorm."),
        (".attn.attention.out_proj.", ".self_attn.o_proj."),
        (".attn.attention.", ".self_attn."),
        (".ln_2.", ".post_attention_layernorm."),
        (".mlp.c_gate.", ".mlp.gate_proj."),
        (".mlp.c_fc.", ".mlp.up_proj."),
        (".mlp.c_proj.", ".mlp.down_proj."),
    ),
    transposed=Family.transposed,
)
# Jiang et al. 2023 (arXiv 2310.06825)
_MISTRAL = replace(
    _LLAMA,
    attention_kinds=(LOCAL,),
    model_type="mistral",
    model_class="MistralForCausalLM",
    sizes=_LLAMA.sizes
    | {
        "num_kv_heads": ("num_key_value_heads", 8),
        "intermediate_size": ("intermediate_size", 14336),
        "max_positions": ("max_position_embeddings", 131072),
        "window_size": ("sliding_window", 4096),
    },
    fixed={"hidden_act": "silu", "attention_dropout": 0.0, "layer_types": None},
    layers_key="sliding_window",
)
# Yang et al. 2024 (arXiv 2407.10671)
_QWEN2 = replace(
    _LLAMA,
    qkv_bias=True,
    model_type="qwen2",
    model_class="Qwen2ForCausalLM",
    sizes=_LLAMA.sizes
    | {
        "num_kv_heads": ("num_key_value_heads", 32),
        "intermediate_size": ("intermediate_size", 22016),
        "max_positions": ("max_position_embeddings", 32768),
        "vocab_size": ("vocab_size", 151936),
        "window_size": ("sliding_window", 4096),
    },
    fixed={"hidden_act": "silu", "attention_dropout": 0.0},
    layers_key="layer_types",
)
# Yang et al. 2025 (arXiv 2505.09388)
_QWEN3 = replace(
    _QWEN2,
    qkv_bias=False,
    qk_norm=True,
    model_type="qwen3",
    model_class="Qwen3ForCausalLM",
    sizes=_QWEN2.sizes | {"head_size": ("head_dim", 128)},
    fixed={"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0},
)
FAMILIES = {
    "gpt2": _GPT2,
    "gpt-neo": _GPT_NEO,
    "llama": _LLAMA,
    "mistral": _MISTRAL,
    "qwen2": _QWEN2,
    "qwen3": _QWEN3,
}


def by_turns(architecture: str, num_layers: int) -> tuple[str, ...]:
    """The kind of attention of each layer, as the family has it."""
    kinds = FAMILIES[architecture].attention_kinds
    return tuple(kinds[layer % len(kinds)] for layer in range(num_layers))


def find_family(model_type: Any) -> str | None:
    """The name of the family that config.json calls `model_type`, if it is one of ours."""
    return next((name for name, family in FAMILIES.items() if family.model_type == model_type), None)
