"""GPUs that are known: their memory and dense peaks, and which of them are in this machine. Imports no torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from gloria.config.cli import option, suggest
from gloria.errors import UserError


@dataclass(frozen=True)
class GPU:
    """A GPU model. Peaks are dense, in TFLOP/s; None where the card cannot."""

    name: str  # as `python -m gloria.plan --gpus` has it
    cuda_name: str  # pattern of CUDA's name for it, without the vendor
    memory: int  # MiB, as nvidia-smi reports it
    bf16: float | None  # tensor cores, fp32 accumulation
    fp16: float | None  # the same
    fp32: float | None  # outside tensor cores: torch multiplies fp32 matrices there by default
    link: float | None  # GB/s to the other GPUs of its node, one way: NVLink, or PCIe where it has none for all
    source: str

    def peak(self, precision: str) -> float | None:
        """FLOP/s in fp32, or in bf16 and fp16, which have the same peak where a card has both."""
        found = self.fp32 if precision == "fp32" else self.bf16 or self.fp16
        return found * 1e12 if found else None


# From NVIDIA's data sheets and architecture papers, which often print twice as much, for 2:4 sparse matrices. A name
# matches as a whole, so that a slice (MIG) or a variant of a card is unknown rather than taken for another.
CARDS = (
    GPU(
        "B200", r"B200", 183359, 2250, 2250, 75, 900, "HGX B200 data sheet, for 8: 36 PFLOP/s sparse, 600 TFLOP/s fp32"
    ),
    GPU("H200", r"H200", 143771, 989, 989, 67, 450, "H200 data sheet: 1,979 sparse"),
    GPU("GH200", r"GH200 .*", 97871, 989, 989, 67, 450, "GH200 data sheet: 1,979 sparse; the one with 96 GB"),
    GPU("H100", r"H100 80GB HBM3", 81559, 989, 989, 67, 450, "H100 data sheet, SXM: 1,979 sparse"),
    GPU("H100-NVL", r"H100 NVL", 95830, 835, 835, 60, 300, "H100 data sheet, NVL: 1,671 sparse"),
    GPU("H200-NVL", r"H200 NVL", 143771, 835, 835, 60, 450, "H200 data sheet, NVL: 1,671 sparse"),
    GPU("H100-PCIe", r"H100 PCIe", 81559, 756, 756, 51, 64, "H100 data sheet, PCIe: 1,513 sparse"),
    GPU("A100-80GB", r"A100-SXM4-80GB|A100 80GB PCIe|A100-PCIE-80GB", 81920, 312, 312, 19.5, 300, "A100 data sheet"),
    GPU("A100-40GB", r"A100-(SXM4|PCIE)-40GB", 40960, 312, 312, 19.5, 300, "A100 data sheet"),
    GPU("A30", r"A30", 24576, 165, 165, 10.3, 32, "A30 data sheet"),
    GPU("A40", r"A40", 46068, 149.7, 149.7, 37.4, 32, "A40 data sheet"),
    GPU("A10", r"A10", 23028, 125, 125, 31.2, 32, "A10 data sheet"),
    GPU("L40S", r"L40S", 46068, 362, 362, 91.6, 32, "L40S data sheet"),
    GPU("L4", r"L4", 23034, 121, 121, 30.3, 32, "L4 data sheet: 242 sparse"),
    GPU("V100-32GB", r"V100-SXM2-32GB", 32768, None, 125, 15.7, 150, "V100 data sheet, SXM2"),
    GPU("V100-16GB", r"V100-SXM2-16GB", 16384, None, 125, 15.7, 150, "V100 data sheet, SXM2"),
    GPU("V100-PCIe-32GB", r"V100-PCIE-32GB", 32768, None, 112, 14, 16, "V100 data sheet, PCIe"),
    GPU("V100-PCIe-16GB", r"V100-PCIE-16GB", 16384, None, 112, 14, 16, "V100 data sheet, PCIe"),
    GPU("T4", r"T4", 15360, None, 65, 8.1, 16, "T4 data sheet"),
    GPU("RTX-4090", r"RTX 4090", 24564, 165.2, 165.2, 82.6, 32, "Ada architecture paper, table of the RTX 4090"),
    GPU("RTX-3090", r"RTX 3090", 24576, 71, 71, 35.6, 32, "GA102 architecture paper, table of the RTX 3090"),
)


# Of a GPU's memory: what the CUDA context and NCCL take, and the share that a fragmented allocator cannot use.
OUTSIDE, FRAGMENTED = 1.5 * 2**30, 0.05

ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}  # by precision


def usable_memory(total: float) -> float:
    """Bytes that tensors can have of a GPU's `total`."""
    return (total - OUTSIDE) * (1 - FRAGMENTED)


def precision_option() -> str:
    """The recipe's `train.precision`, of a pre-training and of a fine-tuning."""
    return option(
        "auto",
        "of the matrix products: auto is bf16 on a GPU that has it, fp16 (with its loss scaled) on an older one, "
        "fp32 on CPU; weights and state stay fp32",
        choices=("auto", *ELEMENT_BYTES),
    )


def resolve_precision(precision: str, card: str | None, *, has_bf16: bool = False) -> tuple[str, str]:
    """What `train.precision` is on a card (its name, None for a CPU), and why, in words.

    `auto` is bf16 where the card has it, fp16 on other cards, which is as fast and needs its loss scaled, and fp32 on
    CPU, where 16 bits are slower. UserError for bf16 on a card without: torch would emulate it, many times slower.
    """
    if precision == "auto" and card is None:
        return "fp32", "no GPU is used"
    if precision == "auto":
        return ("bf16", f"{card} has it") if has_bf16 else ("fp16", f"{card} has no bf16")
    if precision == "bf16" and card is not None and not has_bf16:
        raise UserError(f"train.precision: {card} has no bf16; set it to auto, fp16 or fp32")
    return precision, "as the recipe has it"


def precision_on(precision: str, card: GPU | None) -> tuple[str, str]:
    """`resolve_precision` for a card, None for a CPU; one that is not in the table is taken to have bf16."""
    if card is None:
        return resolve_precision(precision, None)
    return resolve_precision(precision, card.name, has_bf16=bool(card.bf16 or not card.fp16))


def has_code_for(capability: tuple[int, int], built_for: Sequence[str]) -> bool:
    """Whether a torch that is `built_for` such architectures as sm_80 (its code) and compute_90 (compiled when it is
    loaded) runs on a card: code runs on later cards of the same generation, compute_ on all later ones.
    """
    major, minor = capability
    for name in built_for:
        kind, _, number = name.partition("_")
        digits = re.match(r"\d+", number)
        if not digits:
            continue
        built = divmod(int(digits[0]), 10)
        if (kind == "sm" and built[0] == major and built[1] <= minor) or (kind == "compute" and built <= capability):
            return True
    return False


def c_compiler() -> str:
    """The C compiler that torch.compile would use on this node, or ""."""
    names = filter(None, (os.environ.get("CC"), "gcc", "clang", "cc"))
    return next((found for name in names if (found := shutil.which(name))), "")


def card_of_cuda_name(cuda_name: str) -> GPU | None:
    """The card by CUDA's name for it; None for an unknown one."""
    name = re.sub(r"^(NVIDIA |Tesla |GeForce )+", "", cuda_name)
    return next((card for card in CARDS if re.fullmatch(card.cuda_name, name)), None)


def read_gpus(text: str) -> tuple[int, GPU]:
    """`8xH100` as a number and a card; a card alone is one of it. `UserError` says what is wrong with it."""
    count, name = re.findall(r"^(?:(\d+)\s*x\s*)?(.*)$", text.strip(), re.IGNORECASE)[0]
    known = {card.name.upper(): card for card in CARDS}
    if name.upper() not in known:
        raise UserError(f'unknown card "{name}"; {suggest(name.upper(), known)}')
    if count and int(count) < 1:
        raise UserError(f"{text} is no number of GPUs; give at least 1, as in 1x{known[name.upper()].name}")
    return int(count or 1), known[name.upper()]


def gpus_here() -> tuple[int, GPU] | None:
    """How many GPUs this machine has, and what the first of them is; None where nvidia-smi finds none.

    A card that is not in the table has its own name and memory, and no peaks.
    """
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    if not lines:
        return None
    name, _, memory = lines[0].rpartition(", ")
    unknown = GPU(name, "", int(memory), None, None, None, None, "not in the table of cards")
    return len(lines), card_of_cuda_name(name) or unknown
