"""Pictures of the documents, drawn from the code they are about: python bench/pictures.py (needs matplotlib)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gloria.data.mixture import new_mixture
from gloria.data.weights import Source

# The shares that the original GlórIA asked for, which sum to 1.01.
WEIGHTS = {"wiki": 0.10, "arquivo": 0.08, "clueweb": 0.63, "europarl": 0.06, "oscar": 0.08, "subtitles": 0.06}
SAMPLES = 20_000
OUT = Path(__file__).parent.parent / "docs/images/data-order.png"


def surplus(source_of_sample: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Windows of each source beyond its share, behind each sample: (samples, sources)."""
    drawn = np.cumsum(source_of_sample[:, None] == np.arange(len(shares)), axis=0)
    return drawn - np.arange(1, len(source_of_sample) + 1)[:, None] * shares


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sources = {name: Source(10**9, name) for name in WEIGHTS}
    mixture = new_mixture(0, 512, sources, WEIGHTS, global_batch=SAMPLES, period=65536, tokenizer="")
    shares = np.array(list(WEIGHTS.values())) / sum(WEIGHTS.values())
    ours = surplus(mixture.plan(0, SAMPLES).source, shares)
    drawn = surplus(np.random.default_rng(0).choice(len(shares), SAMPLES, p=shares), shares)

    figure, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True, layout="constrained")
    for axis, lines, title in zip(axes, (drawn, ours), ("a draw for each sample", "quotas of a period (ours)")):
        axis.plot(lines[::20], linewidth=0.8, label=list(WEIGHTS))
        axis.set_xticks([0, 500, 1000], ["0", "10,000", "20,000"])
        axis.set(title=f"{title}: at most {np.abs(lines).max():.1f} windows off", xlabel="sample")
    axes[0].set_ylabel("windows beyond its share")
    axes[0].legend(fontsize=7, ncols=2)
    OUT.parent.mkdir(exist_ok=True)
    figure.savefig(OUT, dpi=110)
    print(
        f"{OUT}: off by at most {np.abs(drawn).max():.1f} windows drawn one by one, {np.abs(ours).max():.1f} by quotas"
    )


if __name__ == "__main__":
    main()
