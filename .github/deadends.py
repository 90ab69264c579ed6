"""When do models of side 6 lose their boards? python .github/deadends.py FILE.pt ...

A board is lost with the token that leaves no valid board to complete it to, even if no rule is
broken yet. Models decode as by default with 0 to 4 latent tokens and with all; all models of one
system are put together. The figure, out/deadends/deadends.png, shows the fewest (none: dashed)
and the most.

From the left it also prints how many boards the 26th token loses, by what decides it: the `?` of
README (.github/RESULTS.md, "Where boards are lost").
"""
import argparse
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import latent  # noqa: E402
import train_ar  # noqa: E402
import train_diffusion  # noqa: E402
from data import TASKS  # noqa: E402
from data.sudoku import fill  # noqa: E402


def tokens_before_lost(board, order, valid):
    """How many tokens of a board, in the order of decoding, some valid board agrees with. valid:
    all valid boards, but for the names of the digits, so that only which are equal counts."""
    place_of = {}                                              # where each digit was decoded first
    for n, place in enumerate(order):
        same = valid[:, [*place_of.values()]] == valid[:, [place]]
        valid = valid[(same == [digit == board[place] for digit in place_of]).all(1)]
        if not len(valid):
            return n
        place_of.setdefault(board[place], place)
    return len(order)


def decided_by(board):
    """What decides the 26th token, the second of the fifth row? When two rows are left a column
    lacks two digits. One column of the right box lacks what was just decoded, the 25th token. It
    has to take its other digit in this row, so the second column can not: a short chain, through
    that column. A longer one starts at the digit that the first column has left for the last row,
    and goes through that row."""
    lacks = [set(range(6)) - set(board[column:24:6]) for column in range(6)]
    [left_over] = lacks[0] - {board[24]}
    for start, name in (board[24], "column {}"), (left_over, "longer chain"):
        [column] = [column for column in (3, 4, 5) if start in lacks[column]]
        if (lacks[column] - {start}) & lacks[1]:
            return name.format(column + 1)
    return "nothing"


parser = argparse.ArgumentParser(description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("files", nargs="+", type=Path, help="checkpoints")
parser.add_argument("--samples", type=latent.at_least(1), default=1024, help="[%(default)s]")
args = parser.parse_args()
valid, ends, chains = fill(6), defaultdict(list), defaultdict(lambda: defaultdict(list))
for path in args.files:
    saved = latent.load(path)
    system = latent.SYSTEMS[saved["settings"]["system"]]
    script = train_ar if system.order == "left" else train_diffusion
    flags = ["--checkpoint", str(path), *"--latents 0 1 2 3 4 all --out out/deadends".split()]
    task, [job] = latent.prepare(script.flags().parse_args(flags), TASKS, script.jobs)
    model = latent.Transformer(task.vocab_size, task.seq_len, job.layers, job.heads, job.width)
    model.load_state_dict(saved["model"])
    for k in job.latents:
        places = []
        filled, _ = latent.decode(
            model, system, torch.zeros(args.samples, 36, dtype=torch.int64), 0, k,
            generator=torch.Generator().manual_seed(job.seed),
            on_step=lambda tokens, positions, logits, c, decoded: places.append(decoded))
        orders = torch.cat(places, dim=1)
        for board, order in zip(filled.tolist(), orders.tolist()):
            ends[system, k].append(end := tokens_before_lost(board, order, valid))
            if system.order == "left" and end >= 25:
                chains[system, k][decided_by(board)].append(end == 25)
figure = Figure(figsize=(12, 4), layout="constrained")
panels = dict(zip(("left", "random"), figure.subplots(1, 2, sharey=True)))
for (system, k), end in ends.items():
    share = np.bincount(end, minlength=37) / len(end)
    name = f"{system.title}, {k} latent tokens"
    print(f"{name}, {share[36]:.1%} valid; lost with token:",
          *(f"{n}: {lost:.1%}," for n, lost in enumerate(share[:36], start=1) if lost))
    for chain, lost in sorted(chains[system, k].items()):
        print(f"    26, decided by {chain}: {sum(lost)} of {len(lost)} ({np.mean(lost):.1%})")
    numbers = [n for other, n in ends if other == system]
    if k in (min(numbers), max(numbers)):
        panels[system.order].plot(100 - 100 * (np.cumsum(share) - share), color=system.color,
                                  ls="-" if k else "--", label=name)
for panel, order in zip(panels.values(), ("from the left", "top-prob order")):
    panel.set(xlabel="decoded tokens", title=order)
panels["left"].set_ylabel("boards that can still become valid, %")
figure.legend(loc="outside right upper", frameon=False)
figure.savefig(path := job.out / "deadends.png", dpi=100)
print(f"The figure is {path}")
