"""Draw .github/watch.gif: one SCDM model makes a board without latent tokens, and with all of them.

Shown is the first seed, from 0 on, at which the one board is wrong and the other right. `python
.github/picture.py` takes the weights in data/weights; another checkpoint is the first argument.
"""
import sys
from pathlib import Path

import torch
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import latent  # noqa: E402
from data import TASKS  # noqa: E402

saved = latent.load(sys.argv[1] if len(sys.argv) > 1 else HERE.parent / "data/weights/scdm-s0.pt")
settings = saved["settings"]
task, system = TASKS[settings["task"]](settings["size"]), latent.SYSTEMS[settings["system"]]
model = latent.Transformer(task.vocab_size, task.seq_len, settings["layers"], settings["heads"],
                           settings["width"])
model.load_state_dict(saved["model"])
MOST, SIDE = task.seq_len - 8, task.side


def solve(n_latent, seed):
    """The frames of one decoding, and whether the board is right. A frame is a list of cells:
    place, digit, kind, and how sure the model is of the digit."""
    frames = []

    def on_step(tokens, positions, logits, c, decoded):
        cells = [(place, token, "known", 1.0) for place, token in enumerate(tokens[0].tolist())
                 if token < task.vocab_size and place != decoded[0, 0]]
        for i, (place, p) in enumerate(zip(positions[0].tolist(), logits[0].softmax(-1))):
            kind, token = "candidate" if i < c else "latent", p.argmax().item()
            if place == decoded[0, 0]:
                kind, token = "decoded", tokens[0, place].item()
            cells.append((place, token, kind, p[token].item()))
        frames.append(cells)

    blank = torch.zeros(1, task.seq_len, dtype=torch.int64)
    filled, _ = latent.decode(model, system, blank, 0, n_latent, on_step=on_step,
                              generator=torch.Generator().manual_seed(seed))
    return frames, bool(task.correct(filled.numpy())[0])


for seed in range(1000):
    without, without_right = solve(0, seed)
    everything, right = solve(MOST, seed)
    if right and not without_right:
        break
print(f"seed {seed}: wrong without latent tokens, right with {MOST}")

COLOR = {"known": "black", "candidate": "tab:orange", "latent": "tab:blue", "decoded": "white"}
figure = Figure(figsize=(7.2, 4.1), dpi=90)
axes = figure.subplots(1, 2)
figure.subplots_adjust(0.02, 0.12, 0.98, 0.9, wspace=0.08)


def draw(step):
    for axis, frames, verdict, title in (
            (axes[0], without, "wrong", "without latent tokens"),
            (axes[1], everything, "right", "with all latent tokens")):
        axis.clear()
        axis.set(xlim=(0, SIDE), ylim=(SIDE, 0), aspect="equal", xticks=[], yticks=[])
        for i in range(SIDE + 1):
            axis.axhline(i, color="black", lw=2 if i % 2 == 0 else 0.4)
            axis.axvline(i, color="black", lw=2 if i % 3 == 0 else 0.4)
        done = step >= len(frames)
        axis.set_title(f"{title}: {verdict}" if done else title, fontsize=12)
        cells = frames[min(step, len(frames) - 1)]
        board = {place: digit for place, digit, _, _ in cells}
        twice = {place for unit in task.units for place in unit if done
                 and [board[other] for other in unit].count(board[place]) > 1}
        for place, digit, kind, sure in cells:
            row, column = divmod(place, SIDE)
            if kind == "decoded" and not done:
                axis.fill_between([column, column + 1], row, row + 1, color="tab:red")
            color = COLOR[kind] if not done else "tab:red" if place in twice else "black"
            axis.text(column + 0.5, row + 0.53, str(digit + 1), ha="center", va="center",
                      fontsize=16, color=color,
                      alpha=1 if kind in ("known", "decoded") else 0.15 + 0.85 * sure)
    figure.texts.clear()
    for x, text, color in ((0.13, "known", "black"), (0.32, "decoded now", "tab:red"),
                           (0.55, "candidate", "tab:orange"), (0.78, "latent token", "tab:blue")):
        figure.text(x, 0.04, text, color=color, fontsize=11, ha="center")


steps = len(everything)            # both boards take as many
animation = FuncAnimation(figure, draw, frames=[*range(steps), *[steps] * 6])
animation.save(HERE / "watch.gif", PillowWriter(fps=2))
