"""Draw two figures from .github/records.jsonl: `python .github/figures.py`.

chain.png: a board whose next digit, `?`, a short chain decides, and how many such boards models
lose (measured by deadends.py). kinds.png: what latent tokens of a kind are worth (latents.py,
elsewhere.py).
"""
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from tables import ARMS, grouped, load, select

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from data.sudoku import fill  # noqa: E402

records = load()


def lost(system, window, k, column):
    """Boards lost with `?`, in per cent of those that a chain through the column decides."""
    found = select(records, experiment="deadends", system=system, window=window, k=k,
                   chain=f"column {column}")
    return 100 * sum(r["lost"] for r in found) / sum(r["of"] for r in found)


figure = Figure(figsize=(10, 4.2), layout="constrained")
left, right = figure.subplots(1, 2, width_ratios=[1, 1.6])
left.set(xlim=(-1, 6.1), ylim=(8, -0.1), aspect="equal")
left.axis("off")
left.fill_between([3, 4], 0, 6.9, color="mistyrose", lw=0)
left.hlines(range(7), 0, 6, "black", lw=[2, 0.4])
left.vlines(range(7), 0, 6, "black", lw=[2, 0.4, 0.4])
# The last two rows of some valid board are these, once its digits are renamed.
row_5, row_6 = np.array([1, 3, 5, 4, 2, 6]), [2, 4, 6, 1, 5, 3]
boards = (row_5[board[24:30].argsort()][board] for board in fill(6))
board = next(board for board in boards if (board[30:] == row_6).all())
lacks = ["{} {}".format(*sorted(pair)) for pair in zip(row_5, row_6)]
for i, text in enumerate([*board[:24], 1, "?", "", 4, *[""] * 8, *lacks]):
    left.text(i % 6 + 0.5, i // 6 + 0.53, text, ha="center", va="center",
              size=14 if i < 36 else 11, color="tab:red" if i in (25, 27) else "black")
left.text(-0.1, 6.53, "lacks", ha="right", va="center", size=11)
left.text(0, 7.8, "1 is used in row 5, so column 4\nmust take 4, so ? is 3", color="tab:red")
for x, y, x_end in (0.5, 4.9, 3.3), (3.5, 4.15, 1.7):
    left.annotate("", (x_end, y), (x, y), arrowprops={
        "arrowstyle": "->", "connectionstyle": "arc3,rad=0.35", "color": "tab:red", "lw": 1.5})

for column, color in (4, "tab:red"), (5, "tab:orange"), (6, "goldenrod"):
    right.plot([lost("mtp", "random", k, column) for k in range(5)], "o-", color=color, lw=2.5)
    right.text(column - 2.35, 24, f"through\ncolumn {column}", color=color)
    right.plot(-0.1, lost("ar", None, 0, column), "D", color="tab:gray")
right.text(-0.2, lost("ar", None, 0, 5), "AR", color="tab:gray", ha="right", va="center")
control = np.mean([lost("control", 36, 35, column) for column in (4, 5, 6)])
right.hlines(control, 0, 4.1, "tab:brown", ls="--")
right.text(4.15, control, "control (35\nlatent tokens)", color="tab:brown", va="center")
right.set(xlim=(-0.6, 5.6), ylim=(-2, 70), ylabel="boards lost with ?, %", xticks=range(5),
          xticklabels=["0", *(f"{k}\ncolumn {k + 2}" for k in range(1, 5))],
          xlabel="latent tokens, and where the last of them stands",
          title="AR+MTP on boards where a chain like this decides ?")
right.spines[["top", "right"]].set_visible(False)
figure.savefig(HERE / "chain.png", dpi=100)

figure = Figure(figsize=(15, 4.6), layout="constrained")
*panels, last = figure.subplots(1, 4, sharey=True)
for panel, label, arm, kind in [
        (0, "cells, predicted", "-predicted", "any"),
        (0, "cells, predicted, half of the terms", "-half", "any"),
        (0, "cells, unpredicted, half of the terms", "-unpredicted", "any"),
        (0, "registers, unpredicted", "-registers", "any"),
        (0, "none in training, half of the terms", "-none", "any"),
        (1, "others", "", "others"), (1, "any cells", "", "any"),
        (1, "of the decoded cell's row or column", "", "neighbours"),
        (2, "paddings", "-constant", "paddings"), (2, "cells", "-constant", "cells")]:
    found = select(records, experiment="latents", kind=kind, task=f"latin-puzzle{arm}")
    nats = {min(k, 25): np.mean([r["nats"] for r in group])
            for (k,), group in grouped(found, "k").items()}
    panels[panel].plot(*zip(*sorted(nats.items())), "o-", label=label)
for panel, title in zip(panels, ["marked latent tokens", "which cells", "paddings"]):
    panel.set_xscale("symlog", base=2)
    panel.set(title=title, xlabel="latent tokens of a kind", ylabel="nats", ylim=(0.7, 5))
    panel.legend(loc="lower left", frameon=False, fontsize=9)
for arm in ARMS:
    nats = [r["nats"] for r in select(records, experiment="elsewhere", kind=arm)]
    last.plot([arm] * len(nats), nats, "oC0")
last.set(title="from the left", xlabel="model")
last.tick_params(axis="x", rotation=30)
figure.savefig(HERE / "kinds.png", dpi=100)
