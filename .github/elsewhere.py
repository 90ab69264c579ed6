"""From the left: must a latent token be in the loss, or is it enough that its place is predicted
elsewhere? Train AR+MTP with causal context and marked latent tokens, decode with all of them, and
say how well the first of them and those further on predict their own cells (OUT/NAME.jsonl).

    python .github/elsewhere.py next        the loss counts the next token
    python .github/elsewhere.py latent      and one latent token
    python .github/elsewhere.py elsewhere   and one further place, where no latent token stands
    python .github/elsewhere.py near        as elsewhere, always the place behind the next token
    python .github/elsewhere.py apart       as elsewhere, but it sees no latent tokens
    python .github/elsewhere.py none        as elsewhere, without any latent tokens

Six cuts of a puzzle share one pass, in which known tokens see those before them. For each cut there
are a mask for the next token, one for a further place (drawn anew each time, so that it is latent
at other times), and latent tokens, marked by an input of their own, for the rest. All of these see
what is known before their cut, and its latent tokens; nobody sees masks. With `latent` there is no
second mask: the latent token of the further place is in the loss. With `next` it is not counted.
"""
import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import latent  # noqa: E402
from data import TASKS  # noqa: E402

KNOWN, LATENT, DECODED = range(3)


def visibility(arm, position, cut, kind):
    """Position, cut, kind, each (S,) -> who sees whom, (1, S, S). The cut of a known token is its
    position, so that it sees what is before it."""
    earlier = (kind == KNOWN) & (position < cut[:, None])
    same_window = (kind != KNOWN)[:, None] & (kind == LATENT) & (cut == cut[:, None])
    if arm == "apart":
        same_window &= ((kind == LATENT) | (position == cut))[:, None]
    return (earlier | same_window | torch.eye(len(kind), dtype=torch.bool))[None]


def objective(system, tokens, prompt_len, mask, window, rng):
    T = tokens.shape[1]
    cuts = rng.choice(np.arange(prompt_len, T), 6, replace=False)
    parts = [(torch.arange(T), torch.arange(T), KNOWN, False)]      # position, cut, kind, in loss
    for cut in cuts:
        behind = torch.arange(cut + 1, T)
        further = behind == (rng.integers(cut + 1, T) if len(behind) else T)
        if args.arm == "near":
            further = behind == cut + 1
        if args.arm != "none":
            parts.append((behind[~further], cut, LATENT, False))
        parts.append((torch.tensor([cut]), cut, DECODED, True))
        kind = LATENT if args.arm == "latent" else DECODED
        parts.append((behind[further], cut, kind, args.arm != "next"))
    position = torch.cat([part[0] for part in parts])
    cut, kind, weight = (
        torch.cat([torch.as_tensor(part[i]).expand(len(part[0])) for part in parts])
        for i in (1, 2, 3))
    inputs = torch.where(kind == DECODED, mask, tokens[:, position])
    inputs = torch.where(kind == LATENT, mask - 1, inputs)
    weight = weight.expand(len(tokens), -1)
    visible = visibility(args.arm, position, cut, kind)
    return inputs, position[None], visible, weight / weight.sum()


def cross_entropy(model, system, tokens, inputs, positions, visible):
    logits = model(inputs, positions, visible)
    return F.cross_entropy(logits.mT, tokens[:, positions[0]], reduction="none")


@torch.no_grad()
def decode(model, tokens, prompt_len, n_latent, teacher_forcing=False):
    """From the left. Returns answers, their nats (B,), and for each step the nats of the cells of
    its latent tokens, (B, latent tokens)."""
    nats, of_latents, answers = 0, [], tokens.clone()
    for n in range(prompt_len, tokens.shape[1]):
        latents = torch.arange(n + 1, min(tokens.shape[1], n + 1 + n_latent))
        position = torch.cat([torch.arange(n), latents, torch.tensor([n])])
        kind = torch.tensor([KNOWN] * n + [LATENT] * len(latents) + [DECODED])
        cut = torch.where(kind == KNOWN, position, n)
        inputs = torch.where(kind == LATENT, model.mask - 1, answers[:, position])
        inputs[:, -1] = model.mask
        logits = model(inputs, position[None], visibility("next", position, cut, kind))
        of_latents.append(F.cross_entropy(logits[:, n:-1].mT, tokens[:, latents], reduction="none"))
        if not teacher_forcing:
            answers[:, n] = torch.distributions.Categorical(logits=logits[:, -1]).sample()
        nats += F.cross_entropy(logits[:, -1], answers[:, n], reduction="none")
    return answers, nats, of_latents


parser = argparse.ArgumentParser(description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("arm", choices=["next", "latent", "elsewhere", "near", "apart", "none"])
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--steps", type=int)
parser.add_argument("--out", type=Path, default=Path("out/elsewhere"))
parser.add_argument("--resume", action="store_true")
args = parser.parse_args()
torch.set_num_threads(max(1, torch.get_num_threads() // 2))

puzzle = TASKS["latin-puzzle"]()
task = SimpleNamespace(batch=puzzle.batch, prompt_len=puzzle.prompt_len, seq_len=puzzle.seq_len,
                       vocab_size=puzzle.vocab_size + 1)                # the last is the mark
latent.objective, latent.cross_entropy = objective, cross_entropy
recipe = latent.Recipe("mtp-causal", "all", args.seed, puzzle.name, puzzle.default_size, 64, 3e-3,
                       3, 4, 64)
args.out.mkdir(parents=True, exist_ok=True)
path = args.out / f"{args.arm}-s{args.seed}.pt"
model = latent.build(recipe, task)
state = latent.train(task, recipe, model, path, args.steps or puzzle.steps, args.resume)
tokens = torch.from_numpy(puzzle.batch(512, np.random.default_rng((0, 2**32)), "test"))
torch.manual_seed(args.seed)
n_latent = 0 if args.arm == "none" else puzzle.cells - 1
how = [model, tokens, task.prompt_len, n_latent]
right = puzzle.correct(decode(*how)[0].numpy()).mean()
_, nats, of_latents = decode(*how, teacher_forcing=True)
record = {"experiment": "elsewhere", "model": recipe._asdict(), "kind": args.arm, "k": n_latent,
          "accuracy": right, "nats": nats.mean().item(), "samples": len(tokens),
          "step": state["step"], "minutes": state["minutes"]}
if n_latent:
    record["first_nats"] = torch.cat([x[:, :1] for x in of_latents], dim=1).mean().item()
    record["further_nats"] = torch.cat([x[:, 1:] for x in of_latents], dim=1).mean().item()
with path.with_suffix(".jsonl").open("a") as file:
    print(json.dumps(record), file=file)
print(path.stem, *(f"{name} {x:.3f}" for name, x in record.items() if isinstance(x, float)))
