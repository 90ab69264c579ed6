"""Which masked tokens are worth something as latent tokens? Train SCDM, and measure the nats of its
answers when the decoded token sees k latent tokens of one kind alone (OUT/NAME.jsonl).

    python .github/latents.py              unknown cells: of its row, column or box; or others
    python .github/latents.py constant     unknown cells, or paddings, always the same token
    python .github/latents.py random       the same, paddings are as many tokens as there are digits
    python .github/latents.py predicted    marked latent tokens, with a loss
    python .github/latents.py unpredicted  marked latent tokens, without a loss
    python .github/latents.py registers    the same, behind the answer: they stand for no cell
    python .github/latents.py half         with a loss, in all as many terms as `unpredicted`
    python .github/latents.py none         no latent tokens in training, with as many terms

Paddings stand behind the answer, as many as it has tokens, masked and trained like it. Marked
latent tokens have an input of their own instead of the mask: in training a random number of masked
tokens are latent, in a chain; the others see all of these and nothing else that is masked. Of the
registers a random number is there, from the first on. `predicted` has about twice the terms of
`unpredicted` in its loss; the others have, on average, as many as this, a random part of theirs.

For m = 1 .. A unknown cells, in a random order, the next one is decoded behind k others of a kind
(or all that are left); known paddings are as many in proportion. Nats are summed over m. Puzzles
and orders are the same for all kinds and k, so differences are known better than the nats.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import latent  # noqa: E402
from data import TASKS  # noqa: E402


class Padded:
    """A task whose answer is followed by `paddings` tokens, each one of `kinds` different ones.
    Behind all tokens there is one more, the input of latent tokens that are marked."""

    def __init__(self, task, paddings, kinds):
        self.task, self.paddings, self.kinds = task, paddings, kinds
        self.prompt_len = task.prompt_len
        self.seq_len = task.seq_len + paddings
        self.vocab_size = task.vocab_size + kinds + 1
        self.marked = self.vocab_size - 1

    def batch(self, n, rng, split):
        tokens = self.task.batch(n, rng, split)
        paddings = self.task.vocab_size + rng.integers(max(1, self.kinds), size=(n, self.paddings))
        return np.concatenate([tokens, paddings], axis=1)


def marked_objective(task, arm, usual=latent.objective):
    """With marked latent tokens. Those that are decoded share the turn behind them."""
    def objective(system, tokens, prompt_len, mask, window, rng):
        B, T = tokens.shape
        T -= task.paddings
        _, turn, _, _ = usual(system, tokens[:, :T], prompt_len, mask, window, rng)     # all >= 0
        spread = (np.arange(B)[:, None] + rng.random()) * (T - prompt_len) / B
        cut = torch.from_numpy(prompt_len + spread.astype(np.int64))
        part, n_masked = torch.from_numpy(rng.random((B, 1))), T - cut
        n_latent = (part * n_masked).long()
        share = (n_masked - n_latent).sum() / n_masked.sum()            # of masked ones that decode
        if arm == "none":
            n_latent = torch.zeros_like(n_latent)
        if arm == "registers":
            n_latent = (part * (task.paddings + 1)).long()
        first = cut + n_latent                                          # the turn of these
        if arm == "registers":
            chain = torch.arange(task.paddings).expand(B, -1)
            chain = torch.where(chain < n_latent, cut + chain, -1)
            turn = torch.cat([torch.where(turn < cut, turn, first), chain], dim=1)
        is_latent = (turn >= cut) & (turn < first)
        inputs = torch.where(turn < cut, tokens, mask)
        inputs = torch.where(is_latent, task.marked, inputs)
        turn = torch.where(turn >= first, first, turn)
        masked = turn >= cut
        weight = masked if arm in ("predicted", "half") else masked & ~is_latent
        if arm in ("half", "none", "registers"):
            weight = weight & (torch.from_numpy(rng.random(turn.shape)) < share)
        return inputs, turn, masked, weight / weight.sum()
    return objective


@torch.no_grad()
def measure(model, system, task, tokens, kinds, numbers, marked=None, seed=0):
    """Nats of the answers, (B,), for each kind and number of latent tokens; for the last of each
    also those of the latent tokens' own cells, (B, latent tokens). `kinds`: name -> (T, T) bool,
    may this decoded place (first) have that latent one (last)?"""
    B, T = tokens.shape
    p, paddings = task.prompt_len, getattr(task, "paddings", 0)
    cells = T - p - paddings
    rng = np.random.default_rng(seed)
    nats = {(kind, k): torch.zeros(B) for kind in kinds for k in numbers}
    of_latents = []
    for m in range(1, cells + 1):
        order = p + torch.from_numpy(rng.random((B, cells)).argsort(1))
        padding = p + cells + torch.from_numpy(rng.random((B, paddings)).argsort(1))
        known_paddings = paddings * (cells - m) // cells if marked is None else 0
        prompt = torch.arange(p).expand(B, p)
        known = torch.cat([prompt, order[:, :cells - m], padding[:, :known_paddings]], dim=1)
        decoded = order[:, cells - m:cells - m + 1]                                     # (B, 1)
        others = torch.cat([order[:, cells - m + 1:], padding[:, known_paddings:]], dim=1)
        others = others.gather(1, torch.from_numpy(rng.random(others.shape).argsort(1)))
        if marked is not None and paddings:                     # registers: in their order
            others = others.sort(1).values
        n = known.shape[1]
        for kind, allowed in kinds.items():
            ok, first = allowed[decoded, others].sort(dim=1, descending=True, stable=True)
            for k in numbers:
                positions = torch.cat([known, others.gather(1, first)[:, :k], decoded], dim=1)
                turn = torch.arange(positions.shape[1]).repeat(B, 1)
                turn[:, n:-1][~ok[:, :k]] = -1                  # fewer than k are of this kind
                masked = torch.arange(positions.shape[1]).expand(B, -1) >= n
                inputs = torch.where(masked, model.mask, tokens.gather(1, positions))
                if marked is not None:
                    inputs[:, n:-1] = marked
                logits = model(inputs, positions, latent.visibility(system, turn, masked))
                found = F.cross_entropy(logits[:, n:].mT, tokens.gather(1, positions[:, n:]),
                                        reduction="none")
                nats[kind, k] += found[:, -1]
        of_latents.append(found[:, :-1])
    return nats, torch.cat(of_latents, dim=1)


PADDINGS = ["constant", "random"]
MARKED = ["predicted", "half", "none", "unpredicted", "registers"]

parser = argparse.ArgumentParser(description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("arm", nargs="?", choices=PADDINGS + MARKED)
parser.add_argument("--task", default="latin-puzzle",
                    choices=["latin-puzzle", "latin", "sudoku", "zebra"])
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--steps", type=int)
parser.add_argument("--out", type=Path, default=Path("out/latents"))
parser.add_argument("--resume", action="store_true")
args = parser.parse_args()
torch.set_num_threads(max(1, torch.get_num_threads() // 2))

task = TASKS[args.task]()
answer, steps = task.seq_len - task.prompt_len, args.steps or task.steps
name, size = "-".join(filter(None, [args.task, args.arm])), task.default_size
paddings = answer if args.arm in [*PADDINGS, "registers"] else 0
if args.arm:
    different = task.side if args.arm == "random" else int(args.arm == "constant")
    task = Padded(task, paddings, different)
if args.arm in MARKED:
    latent.objective = marked_objective(task, args.arm)

T = task.seq_len
everything = torch.ones(T, T, dtype=torch.bool)
is_padding = torch.arange(T) >= T - paddings
kinds = {"any": everything}
if args.arm is None:
    near = torch.zeros(T, T, dtype=torch.bool)                      # do two places share a unit?
    for unit in getattr(task, "board", task).units + task.prompt_len:
        near[np.ix_(unit, unit)] = True
    kinds |= {"neighbours": near, "others": ~near}
if args.arm in PADDINGS:
    kinds = {"cells": everything & ~is_padding, "paddings": everything & is_padding}
if args.arm == "registers":
    kinds = {"any": everything & is_padding}

recipe = latent.Recipe("scdm", None, args.seed, name, size, 64, 3e-3, 3, 4, 64)
args.out.mkdir(parents=True, exist_ok=True)
path = args.out / f"{name}-{recipe.name}.pt"
model = latent.build(recipe, task)
state = latent.train(task, recipe, model, path, steps, args.resume)
tokens = torch.from_numpy(task.batch(256, np.random.default_rng((0, 2**32)), "test"))
numbers = [0] if args.arm == "none" else sorted({0, 1, 2, 4, 8, 16, answer + paddings})
nats, of_latents = measure(model, latent.SYSTEMS[recipe.system], task, tokens, kinds, numbers,
                           task.marked if args.arm in MARKED else None)
for (kind, k), found in nats.items():
    less = nats[kind, 0] - found
    record = {"experiment": "latents", "model": recipe._asdict(), "kind": kind, "k": k,
              "nats": found.mean().item(), "less": less.mean().item(),
              "less_error": (less.std() / len(less) ** 0.5).item(), "samples": len(less),
              "step": state["step"], "minutes": state["minutes"]}
    if args.arm in ("predicted", "half", "unpredicted") and k == numbers[-1]:
        record["latent_nats"] = of_latents.mean().item()
    with path.with_suffix(".jsonl").open("a") as file:
        print(json.dumps(record), file=file)
    print(path.stem, kind, k, *(f"{record[x]:.2f}" for x in ("nats", "less", "less_error")))
