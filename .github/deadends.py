"""When do models lose a 6x6 Sudoku board? With the token that leaves no valid board to complete it
to, even if no rule is broken yet. `python .github/deadends.py FILE.pt ...` prints this for 0 to 4
latent tokens and for all; some systems have but one number. Random orders are top-prob. From the
left it also prints how many boards the 26th token, the `?` of README, loses, by what decides it.
The same numbers are appended to --out as lines of JSON, some of which .github/chain.py draws.
"""
import argparse
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import latent  # noqa: E402
from data.sudoku import Sudoku, fill  # noqa: E402


def tokens_before_lost(board, order, valid):
    """How many tokens of a board, in the order of decoding, some valid board agrees with. valid:
    all valid boards, but for the names of the digits, so that only which are equal counts."""
    first = {}                                          # where each digit was decoded first
    for n, place in enumerate(order):
        same = valid[:, [*first.values()]] == valid[:, [place]]
        valid = valid[(same == [digit == board[place] for digit in first]).all(1)]
        if len(valid) == 0:
            return n
        first.setdefault(board[place], place)
    return len(order)


def decided_by(board):
    """What decides the 26th token, the second of row 5? When two rows are left a column lacks two
    digits. One column of the right box lacks what was just decoded, the 25th token. It has to take
    its other digit in this row, so the second column can not: a short chain, through that column. A
    longer one starts at what the first column has left for the last row, and goes through it."""
    lacks = [set(range(6)) - set(board[column:24:6]) for column in range(6)]
    [left_over] = lacks[0] - {board[24]}
    for start, name in (board[24], "column {}"), (left_over, "longer chain"):
        [column] = [column for column in (3, 4, 5) if start in lacks[column]]
        if (lacks[column] - {start}) & lacks[1]:
            return name.format(column + 1)
    return "nothing"


SWEEP = [0, 1, 2, 3, 4, 35]
parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("files", nargs="+", help="checkpoints")
parser.add_argument("--samples", type=latent.at_least(1), default=1024, help="[%(default)s]")
parser.add_argument("--out", type=Path, default="out/deadends.jsonl", help="[%(default)s]")
args = parser.parse_args()
args.out.parent.mkdir(parents=True, exist_ok=True)
valid = fill(6)
for path in args.files:
    saved = torch.load(path, map_location="cpu", weights_only=True)
    recipe = latent.Recipe(**saved["settings"])
    model = latent.build(recipe, Sudoku("6"))
    model.load_state_dict(saved["model"])
    system = latent.SYSTEMS[recipe.system]
    numbers = {"joint": [35], "independent": [0], "semicausal": SWEEP}[system.sees]
    if system.order == "left":
        numbers = SWEEP if recipe.window == "random" else [(recipe.window or 1) - 1]
    for k in numbers:
        places, lost_with, chains = [], Counter(), defaultdict(list)
        solved = latent.decode(model, system, torch.zeros(args.samples, 36, dtype=int), 0, k,
                               generator=torch.Generator().manual_seed(recipe.seed),
                               on_step=lambda *step: places.append(step[-1]))
        for board, order in zip(solved.tokens.tolist(), torch.cat(places, dim=1).tolist()):
            token = 1 + tokens_before_lost(board, order, valid)           # 37: no token loses it
            lost_with[token] += 1
            if system.order == "left" and token >= 26:
                chains[decided_by(board)].append(token == 26)

        share = lost_with.pop(37, 0) / args.samples
        records = [{"valid": share, "lost_with": lost_with, "samples": args.samples}]
        print(f"{recipe.name}, {solved.latents} latent tokens, {share:.1%} valid; lost with token:",
              *(f"{token}: {n / args.samples:.1%}," for token, n in sorted(lost_with.items())))
        for chain, lost in sorted(chains.items()):
            lost, of = sum(lost), len(lost)
            print(f"    26, decided by {chain}: {lost} of {of} ({lost / of:.1%})")
            records.append({"chain": chain, "lost": lost, "of": of, "samples": args.samples})
        same = {"experiment": "deadends", "model": recipe._asdict(), "k": solved.latents}
        with args.out.open("a") as file:
            file.writelines(json.dumps(same | record) + "\n" for record in records)
