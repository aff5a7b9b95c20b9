# SPDX-License-Identifier: Apache-2.0
"""The picture of docs/scale.md: hours over GPUs."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench.scale_model import CASES, FAST, SLOW, Inputs, hours, step_of
from bench.scale_settings import Assumptions, settings

MOST = 512
COLOURS = ("tab:red", "tab:blue", "tab:green")


def draw(inputs: Inputs, chosen: Assumptions, path: Path) -> None:
    """Draws the hours of every training between slow and fast case, and what a line would be."""
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    gpus = [2**n for n in range(MOST.bit_length())]
    for setting, colour in zip(settings(chosen), COLOURS, strict=True):
        count = setting.epochs[0]
        taken = [
            [hours(setting, step_of(setting, inputs, chosen, n, c), count) for n in gpus]
            for c in CASES
        ]
        epochs = f"{count} epoch{'s' * (count > 1)}"
        label = f"{setting.title}, {epochs}"
        axis.fill_between(gpus, taken[FAST], taken[SLOW], color=colour, alpha=0.25, label=label)
        for case in CASES:
            axis.plot(gpus, taken[case], color=colour, linewidth=1)
        straight = [taken[FAST][0] / n for n in gpus]
        axis.plot(gpus, straight, ":", color=colour, linewidth=1)
    axis.set(xscale="log", yscale="log", xlabel="H100 GPUs", ylabel="hours")
    axis.set_xticks(gpus, [str(n) for n in gpus])
    axis.set_xticks([], minor=True)
    marks = [0.1, 1, 10, 100, 1000]
    axis.set_yticks(marks, [f"{mark:g}" for mark in marks])
    axis.grid(True, which="major", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="upper right")
    axis.set_title(
        "Hours by counted work and stated assumptions, slow to fast case; nothing was run on a "
        "GPU.\nDotted: the fast case of one GPU, divided by their number.",
        fontsize=8,
        color="dimgray",
        loc="left",
    )
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)
