"""When do models lose a 6x6 Sudoku board? With the token that leaves no valid board to complete it
to, even if no rule is broken yet. `python .github/deadends.py FILE.pt ...` says how many boards the
26th token, the `?` of README, loses from the left, by what decides it, for 0 to 4 latent tokens and
for all; some systems have but one number. It adds this to --out; `tables.py --collect` puts it into
the records that figures.py draws.
"""
import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import latent  # noqa: E402
from data.sudoku import Sudoku, fill  # noqa: E402


def tokens_before_lost(board, valid):
    """How many tokens of a board, from the left, some valid board agrees with. valid: all valid
    boards, but for the names of the digits, so that only which are equal counts."""
    first = {}                                          # where each digit was decoded first
    for place, digit in enumerate(board):
        same = valid[:, [*first.values()]] == valid[:, [place]]
        valid = valid[(same == [digit == other for other in first]).all(1)]
        if len(valid) == 0:
            return place
        first.setdefault(digit, place)
    return len(board)


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
    if system.order != "left":
        sys.exit(f"{path} does not decode from the left")
    numbers = SWEEP if recipe.window == "random" else [(recipe.window or 1) - 1]
    for k in numbers:
        solved = latent.decode(model, system, torch.zeros(args.samples, 36, dtype=int), 0, k,
                               generator=torch.Generator().manual_seed(recipe.seed))
        chains = defaultdict(list)
        for board in solved.tokens.tolist():
            token = 1 + tokens_before_lost(board, valid)                  # 37: no token loses it
            if token >= 26:
                chains[decided_by(board)].append(token == 26)

        print(f"{recipe.name}, {solved.latents} latent tokens:")
        for chain, lost in sorted(chains.items()):
            lost, of = sum(lost), len(lost)
            print(f"    26, decided by {chain}: {lost} of {of} lost ({lost / of:.1%})")
            record = {"experiment": "deadends", "model": recipe._asdict(), "k": solved.latents,
                      "chain": chain, "lost": lost, "of": of, "samples": args.samples}
            with args.out.open("a") as file:
                print(json.dumps(record), file=file)
