"""Draws the plot of docs/performance.md from what `run.py bench --device` wrote: `python tools plot_card JSON PNG`.

Needs matplotlib.
"""

import json
import sys
from pathlib import Path

METHODS = ("fidelity", "extreme style", "neutral")
OTHERS = {"as published": "#b0b0b0", "as the most used pack does": "#8c8c8c"}
OURS = {"fidelity": "#2a6f97", "extreme style": "#468faf", "neutral": "#89c2d9"}


def main() -> int:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    about = json.loads(Path(sys.argv[1]).read_text())
    figures = {(one["section"], one["what"]): one["value"] for one in about["figures"]}
    plot, (added, limit) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    bars = {f"{method}, v1": OURS[method] for method in METHODS} | OTHERS
    for place, batch in enumerate((2, 8)):
        plain = figures[f"step, {batch}", "unpatched"]
        values = [figures[f"step, {batch}", f"{name}: added"] for name in bars]
        at = [place * (len(bars) + 1) + index for index in range(len(bars))]
        drawn = added.bar(at, values, color=bars.values())
        added.bar_label(drawn, [f"{100 * value / plain:.0f} %" for value in values], fontsize=8)
    added.set_xticks([2, 2 + len(bars) + 1], ["batch 2", "batch 8"])
    added.set_ylabel("ms added to a step of 1024 px")
    added.legend(drawn, bars, frameon=False, fontsize=8, loc="upper left")
    for index, batch in enumerate((2, 8)):
        for way, style in (("eager", "#d9d9d9"), ("fused", "#2a6f97")):
            heights = [over_limit(about["figures"], f"70 sites, batch {batch}, {method}, {way}") for method in METHODS]
            at = [index * 4 + place + (0.4 if way == "fused" else 0) for place in range(3)]
            limit.bar(at, heights, width=0.4, color=style, label=way if index == 0 else None)
    limit.axhline(1, color="black", linewidth=0.8)
    limit.set_xticks(
        [i * 4 + p + 0.2 for i in (0, 1) for p in range(3)], 2 * ["fidelity", "style", "neutral"], fontsize=8
    )
    limit.set_xlabel("batch 2                                        batch 8")
    limit.set_ylabel("time of all sites over the least possible")
    limit.legend(frameon=False, fontsize=8)
    for axes in (added, limit):
        axes.spines[["top", "right"]].set_visible(False)
    plot.suptitle(f"{about['device']}, float16, torch {about['torch']}, ComfyUI {about['ComfyUI']}", fontsize=10)
    plot.savefig(sys.argv[2], dpi=110)
    return 0


def over_limit(figures: list[dict], what: str) -> float:
    """The ratio stands in the row below."""
    row = next(index for index, one in enumerate(figures) if one["what"] == what)
    return figures[row + 1]["value"]


if __name__ == "__main__":
    sys.exit(main())
