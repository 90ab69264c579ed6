"""Draw .github/watch.gif (python .github/picture.py): the model in data/weights solves one puzzle
twice in random order, without latent tokens and with all. The order of cells is the same both
times. The puzzle is that of the first --watch SEED that is wrong without them and right with all.
"""
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import latent  # noqa: E402
from data import TASKS  # noqa: E402


def solve(n_latent):
    """All that `decode` shows of its steps, and whether the answer is right."""
    steps = []
    solved = latent.decode(model, latent.SYSTEMS[recipe.system], tokens, start, n_latent, "random",
                           candidates=1, generator=torch.Generator().manual_seed(0),
                           on_step=lambda *step: steps.append(step))
    return steps, task.correct(solved.tokens.numpy())[0]


def draw(n):
    """Draw step n of both, or behind the last one how they end."""
    for axis, steps, title, verdict in ((left, without, "without latent tokens", ": wrong"),
                                        (right, with_all, "with all latent tokens", ": right")):
        answer, positions, logits, _, place = steps[min(n, end - 1)]
        digits = np.where(answer[0, start:] < side, answer[0, start:], puzzle)
        guesses = dict(zip((positions[0] - start).tolist(), logits[0].softmax(-1)))
        axis.clear()
        axis.set(xlim=(0, side), ylim=(side, 0), aspect="equal", xticks=[], yticks=[])
        axis.set_title(title + verdict if n >= end else title)
        for cell, digit in enumerate(digits):
            color, ground, sure = "black" if digit < side else "white", "white", 1
            if n < end and cell == place - start:
                color, ground = "white", "tab:red"
            elif cell in guesses and digit == side:
                color, ground = "tab:blue", "#e7f0fa"
                sure, digit = (x.item() for x in guesses[cell].max(0))
            elif n >= end and any(sum(digits[unit] == digit) > 1 for unit in units if cell in unit):
                color, ground = "tab:red", "#fbdfdf"
            row, column = divmod(cell, side)
            axis.fill_between([column, column + 1], row, row + 1, color=ground)
            axis.text(column + 0.5, row + 0.53, digit + 1, color=color, alpha=0.15 + 0.85 * sure,
                      weight=700 if puzzle[cell] < side else 400, size=18, ha="center", va="center")
        for i in range(side + 1):
            axis.axhline(i, color="black", lw=2 if i % side == 0 else 0.4)
            axis.axvline(i, color="black", lw=2 if i % side == 0 else 0.4)


saved = torch.load(ROOT / "data/weights/latin-puzzle-5-list/scdm-s0.pt", weights_only=True)
recipe = latent.Recipe(**saved["settings"])
task = TASKS[recipe.task](recipe.size)
model = latent.build(recipe, task)
model.load_state_dict(saved["model"])
start, side, units = task.prompt_len, task.side, task.board.units
seed, good, better = -1, True, True
while good or not better:
    seed += 1
    tokens = torch.from_numpy(task.batch(1, np.random.default_rng((seed, 2**32)), "test"))
    puzzle = task._grid(tokens.numpy())[0]
    (without, good), (with_all, better) = solve(0), solve(task.seq_len)         # is it right?
print(f"seed {seed}: wrong without latent tokens, right with all")

end = len(without)
figure = Figure(figsize=(6.6, 3.9), dpi=90)
left, right = figure.subplots(1, 2)
figure.subplots_adjust(0.02, 0.13, 0.98, 0.91, wspace=0.06)
figure.supxlabel("bold: given     red: decoded now     blue: latent token, dark if sure")
FuncAnimation(figure, draw, end + 6).save(ROOT / ".github/watch.gif", PillowWriter(fps=2))
