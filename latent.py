"""Latent tokens: one transformer, and the question who sees whom.

A masked token that a model predicts but does not decode in this step is a *latent token*: a hidden
state that the decoded token can attend to. This file holds the whole method of "Reasoning with
Latent Tokens in Diffusion Language Models" (He, Welleck & Fried, arXiv 2602.03769), in the order
in which one would explain it on a whiteboard:

    1. systems, who sees whom   2. the transformer   3. the objective   4. nats   5. the decoder

What follows trains (6), evaluates (7), and handles flags, processes, table and figure (8).
`python latent.py` prints who sees whom. train_diffusion.py and train_ar.py run experiments.
"""
import argparse
import io
import json
import math
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

# 1. systems -----------------------------------------------------------------------------------
# Every system fills in an answer, token by token. Two questions tell them apart. In which *order*
# do tokens become known: from the left, or in a random order? And what does a masked token *see*
# of the other masked ones: all of them, none, or those before it in the order?
#
# A token's *turn*, 0, 1, 2, ..., is its place in the order: first the prompt, position by position,
# then the answer. At a *cut* all tokens of an earlier turn are known (the paper: clean), the next
# `window` ones are masked, and the rest is absent, with turn -1.


class System(NamedTuple):
    title: str                 # its name in tables and figures
    color: str
    order: str                 # "left" or "random"
    sees: str                  # what a masked token sees of others; if joint, known ones see it
    causal: bool = False       # a known token sees only earlier ones, so decoding can cache it
    shifted: bool = False      # from the left, nothing masked: slot i reads token i - 1, predicts i
    next_only: bool = False    # the loss counts the next token alone: a control


SYSTEMS = {
    "ar": System("AR", "tab:gray", "left", "joint", causal=True, shifted=True),
    "mtp": System("AR+MTP", "tab:orange", "left", "joint"),
    "mtp-causal": System("AR+MTP causal", "tab:red", "left", "joint", causal=True),
    "control": System("control", "tab:brown", "left", "joint", next_only=True),
    "mdm": System("MDM", "tab:purple", "random", "joint"),
    "sidm": System("SIDM", "tab:green", "random", "independent"),
    "scdm": System("SCDM", "tab:blue", "random", "semicausal"),
    "scdm-causal": System("SCDM causal", "tab:cyan", "random", "semicausal", causal=True),
}


def visibility(system, turn, masked):
    """Who sees whom (paper, section 3), in four cells. turn (B, T) int, masked (B, T) bool ->
    (B, T, T) bool: may the query (middle index) attend to the key (last index)?"""
    query, key = turn[:, :, None], turn[:, None, :]
    everything = key >= 0                                   # no other token sees an absent one
    nothing = torch.zeros_like(everything)
    earlier = everything & (key < query)

    known_sees_known = earlier if system.causal else everything
    known_sees_masked = everything if system.sees == "joint" and not system.causal else nothing
    masked_sees_known = everything
    masked_sees_masked = {"joint": everything,                     # MDM, AR+MTP
                          "independent": nothing,                  # SIDM
                          "semicausal": earlier}[system.sees]      # SCDM

    known_query, known_key = ~masked[:, :, None], ~masked[:, None, :]
    visible = torch.where(known_query, torch.where(known_key, known_sees_known, known_sees_masked),
                          torch.where(known_key, masked_sees_known, masked_sees_masked))
    return visible | torch.eye(turn.shape[1], dtype=torch.bool, device=turn.device)     # and itself


# 2. the transformer ---------------------------------------------------------------------------
class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream. Returns what it
    makes of x (B, T, C), and the keys and values, (B, heads, T, C / heads), after those of past."""

    def __init__(self, heads, width):
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x, visible, past=None):
        B, T, C = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(B, T, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                        # each (B, heads, T, C / heads)
        if past:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        x = x + self.attention_out(y.transpose(1, 2).reshape(B, T, C))
        h = F.relu(self.mlp_in(self.mlp_norm(x)))
        return x + self.mlp_out(h * h), (k, v)         # ReLU squared: as good as GELU, and cheaper


class Transformer(nn.Module):
    """A pre-norm GPT with learned absolute positions and an untied output layer. Of its
    vocab_size + 1 input tokens the last is the mask, which can not be predicted."""

    def __init__(self, vocab_size, seq_len, layers, heads, width, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.mask = vocab_size
        self.token = nn.Embedding(vocab_size + 1, width)
        self.position = nn.Embedding(seq_len, width)
        self.blocks = nn.ModuleList(Block(heads, width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, vocab_size, bias=False)
        for name, weight in self.named_parameters():
            if name.endswith("_out.weight"):      # every block starts as the identity: at small
                nn.init.zeros_(weight)            # widths this matters more than the optimizer
            elif name in ("token.weight", "position.weight"):
                nn.init.normal_(weight, std=0.2, generator=generator)
            elif weight.dim() == 2:
                nn.init.normal_(weight, std=0.5 * weight.shape[1] ** -0.5, generator=generator)

    def forward(self, tokens, positions, visible, cache=None, n_keep=0):
        """tokens (B, T), positions (B, T) or (1, T), visible (B, T, T) or (1, T, T) bool ->
        logits (B, T, vocab_size). Positions are explicit: trimmed or reordered, a token keeps
        the position that it has in the full sequence.

        A decoder may pass a `cache`, at first {}: keys and values of S tokens of earlier passes, to
        go before those of this one; visible is (B or 1, T, S + T), the first `n_keep` are kept."""
        x = self.token(tokens) + self.position(positions)                               # (B, T, C)
        for i, block in enumerate(self.blocks):
            x, (k, v) = block(x, visible[:, None], (cache or {}).get(i))    # one mask, all heads
            if cache is not None:
                cache[i] = k[:, :, :n_keep], v[:, :, :n_keep]
        return self.output(self.norm(x))                                       # (B, T, vocab_size)


# 3. the objective -----------------------------------------------------------------------------
# tokens is (B, T), the prompt first; A is the length of the answer. rng is numpy's, so that
# training draws the same on every device.
def hide(system, tokens, prompt_len, mask, cut, window, rng):
    """cut: a number or (B, 1). Tokens of an earlier turn stay known, the next `window` are masked,
    the rest is absent; AR knows all. Returns what the model reads, turn, masked, each (B, T)."""
    B, T = tokens.shape
    turn = torch.arange(T).repeat(B, 1)
    if system.order == "random":
        shuffled = torch.from_numpy(rng.random((B, T - prompt_len)).argsort(1))        # 0..A-1
        turn = torch.cat([turn[:, :prompt_len], prompt_len + shuffled], dim=1)
    turn = turn.to(tokens.device)
    if system.shifted:
        return F.pad(tokens, (1, -1), value=mask), turn, torch.zeros_like(turn, dtype=torch.bool)
    known = turn < cut
    turn = torch.where(turn < cut + window, turn, -1)                          # the rest is absent
    return torch.where(known, tokens, mask), turn, turn >= cut


def objective(system, tokens, prompt_len, mask, window, rng):
    """Draw a cut for every row, uniformly from the A turns of the answer: AR+MTP's random prefix,
    or in random order masked diffusion's random number of masks. The window is a number, "random"
    (drawn for the whole batch, uniformly from 1 to A), or None: all. Returns inputs, turn, masked,
    and the weight of each token's cross-entropy in the loss, each (B, T). The plain mean over
    masked tokens has, for a model that can fit everything, the same minimiser as diffusion's ELBO,
    which weights each row's sum by A over its number of masks; and it has less variance."""
    B, T = tokens.shape
    if window == "random":
        window = rng.integers(1, T - prompt_len, endpoint=True)
    # One random offset, then evenly spread over the rows: every batch covers the cuts evenly.
    spread = (np.arange(B)[:, None] + rng.random()) * (T - prompt_len) / B
    cut = prompt_len + torch.from_numpy(spread.astype(np.int64)).to(tokens.device)        # (B, 1)
    inputs, turn, masked = hide(system, tokens, prompt_len, mask, cut, window or T, rng)
    weight = masked
    if system.shifted:
        weight = turn >= prompt_len
    if system.next_only:
        weight = turn == cut
    return inputs, turn, masked, weight / weight.sum()


def cross_entropy(model, system, tokens, inputs, turn, masked):
    """The cross-entropy in nats of every token, (B, T), when the model reads `inputs`."""
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    logits = model(inputs, positions, visibility(system, turn, masked))
    return F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")


# 4. nats --------------------------------------------------------------------------------------
# Every system is a generative process with a negative log-likelihood: exact from the left, in
# random order its mean over the orders, an upper bound. The lowest possible value, the floor, is
# the entropy of the answer. At temperature 1 (for diffusion in uniform order) the share of right
# answers is at least exp(-(nats - floor)).
@torch.no_grad()
def nats(model, system, tokens, prompt_len, n_latents, rng):
    """Nats for an answer, decoded one token a step beside k latent tokens: the sum over cuts of the
    cross-entropy of the token that would be decoded, as a mean over the rows of tokens. One number
    for each k of n_latents; nan where this measure does not apply."""
    T, totals = tokens.shape[1], torch.zeros(len(n_latents))
    for cut in range(prompt_len, T):
        for i, k in enumerate(n_latents):
            part = tokens[:, :cut + k + 1] if system.order == "left" else tokens     # k + 1 masked
            if i == 0 or part.shape != inputs.shape:     # else the last pass serves this k, too
                inputs, turn, masked = hide(system, part, prompt_len, model.mask, cut, T, rng)
                ce = cross_entropy(model, system, part, inputs, turn, masked)
            if system.order == "left":
                decoded = turn == cut
            elif system.sees == "semicausal":   # the one that has seen k latent tokens, or all left
                decoded = turn == min(cut + k, T - 1)
            elif (system.sees, k) in [("independent", 0), ("joint", T - prompt_len - 1)]:
                decoded = masked               # each could be the decoded one: take their mean
            else:
                return torch.full_like(totals, math.nan)
            totals[i] += ((ce * decoded).sum() / decoded.sum()).item()
    return totals


# 5. the decoder -------------------------------------------------------------------------------
# Which candidate is decoded next: the one with the highest score, from their probabilities
# (B, candidates, V). In uniform order it is the first one, which is random already.
POLICIES = {
    "top-prob": lambda p: p.amax(-1),                       # its best token is the most probable
    "margin": lambda p: -p.topk(2).values.diff()[..., 0],   # best less second best (2502.06768)
    "uniform": lambda p: torch.zeros_like(p[..., 0]),
}


@torch.no_grad()
def decode(model, system, tokens, prompt_len, n_latent, policy="top-prob", candidates=8,
           temperature=1.0, generator=None, on_step=None):
    """Fill in the answers, one token a step. In random order some masked positions, drawn anew at
    every step, are *candidates* for the policy to choose from (from the left there is but one, the
    next), n_latent more (or all that are left) are latent, and the rest does not go through the
    model. Returns the filled tokens, (B, T), and *forward tokens*: how many positions went through
    the transformer for one puzzle, the honest unit of inference cost. on_step(tokens, positions,
    logits, c, decoded) may watch the masked tokens of each pass, first the c candidates."""
    B, T = tokens.shape
    position = torch.arange(T, device=tokens.device).expand(B, T)
    tokens = torch.where(position < prompt_len, tokens, model.mask)
    known, unknown = position[:, :prompt_len], position[:, prompt_len:]
    cache, cached, forward_tokens = {} if system.causal else None, 0, 0
    for n in range(prompt_len, T):          # beside n known tokens c candidates, k latent tokens
        c = 1 if system.order == "left" else min(candidates, T - n)
        k = min(n_latent, T - n - c)
        turn = torch.arange(n + c + k, device=tokens.device)[None]
        if system.order == "random":
            shuffled = torch.rand(B, T - n, generator=generator, device=tokens.device).argsort(1)
            unknown = unknown.gather(1, shuffled)
            turn[:, n + c:] -= c      # latent tokens have the next turns, candidates share the one
            turn[:, n:n + c] = n + k  # after: in SCDM candidates see latent tokens, not each other
        positions = torch.cat([known, unknown[:, :c + k]], dim=1)[:, cached:]       # what is new
        inputs = F.pad(tokens, (1, -1), value=model.mask) if system.shifted else tokens
        masked = (turn >= n) & (not system.shifted)
        visible = visibility(system, turn, masked)[:, cached:]
        n_keep = n + system.shifted        # AR's slot n reads token n - 1, which is known, too
        logits = model(inputs.gather(1, positions), positions, visible, cache, n_keep)
        forward_tokens += positions.shape[1]
        logits = logits[:, n - cached:]                                   # (B, c + k, V)

        best = POLICIES[policy](logits[:, :c].softmax(-1)).argmax(1, keepdim=True)       # (B, 1)
        logit = logits.take_along_dim(best[..., None], 1)                             # (B, 1, V)
        gumbel = -torch.empty_like(logit).exponential_(generator=generator).clamp(1e-30).log()
        token = (logit + temperature * gumbel).argmax(-1)       # the Gumbel-max trick, (B, 1)
        decoded = unknown.gather(1, best)                                                # (B, 1)
        tokens = tokens.scatter(1, decoded, token)
        if on_step:
            on_step(tokens, unknown[:, :c + k], logits, c, decoded)
        known = torch.cat([known, decoded], dim=1)
        unknown = unknown.scatter(1, best, unknown[:, :1])[:, 1:]       # the first fills the gap
        cached = n_keep if system.causal else 0
    return tokens, forward_tokens


# 6. training ----------------------------------------------------------------------------------
# What makes a model what it is. The first three name its files.
SETTINGS = "system window seed task size batch_size lr layers heads width".split()


class RunError(Exception):
    """A mistake or failure that one line explains; the scripts then exit with status 2."""


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., kellerjordan.github.io/posts/muon): a step along the orthogonal matrix
    nearest to the momentum. As torch.optim.Muon in single precision, but all matrices, of one
    shape, at once, (n, rows, columns): a third of the kernels, which small models wait for."""

    @torch.no_grad()
    def step(self):
        matrices, lr = self.param_groups[0]["params"], self.param_groups[0]["lr"]
        gradient = torch.stack([w.grad for w in matrices])
        momentum = self.state[matrices[0]].setdefault("momentum", torch.zeros_like(gradient))
        x = gradient.lerp(momentum.lerp_(gradient, 0.05), 0.95)                     # Nesterov's
        x = x.mT if (tall := x.shape[1] > x.shape[2]) else x
        x = F.normalize(x, dim=(1, 2), eps=1e-7)
        for _ in range(5):                    # Newton-Schulz: takes all singular values near 1
            gram = x @ x.mT
            gram = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
            x = torch.baddbmm(x, gram, x, beta=3.4445)
        x = 0.2 * max(x.shape[1:]) ** 0.5 * (x.mT if tall else x)     # as long as AdamW's steps
        torch._foreach_add_(matrices, x.unbind(), alpha=-lr)


def optimizers(model, lr):
    """Muon for the blocks' matrices, one for each kind; AdamW for the rest (alone it is worse)."""
    kinds = [*zip(*([w for w in block.parameters() if w.dim() == 2] for block in model.blocks))]
    others = [w for name, w in model.named_parameters() if "blocks" not in name or w.dim() < 2]
    return [*(Muon(kind, {"lr": lr}) for kind in kinds),
            torch.optim.AdamW(others, lr, betas=(0.9, 0.98), weight_decay=0, fused=True)]


def batch(task, args, mask, step):
    """Tokens of a training step, counted from 0, and what `objective` makes of them. They follow
    from (seed, step) alone: a resumed run goes on exactly, no random state needs saving."""
    rng = np.random.default_rng((args.seed, step))
    tokens = torch.from_numpy(task.batch(args.batch_size, rng, "train"))
    return tokens, *objective(SYSTEMS[args.system], tokens, task.prompt_len, mask, args.window, rng)


def train(task, args, model):
    """Train a model and keep its checkpoint, args.path, up to date; or load --checkpoint. Returns
    step, minutes, and history: [step, loss] each 50 steps or less."""
    opts, state = optimizers(model, args.lr), {"step": 0, "minutes": 0.0, "history": []}
    system, path = SYSTEMS[args.system], args.checkpoint or args.path
    if args.checkpoint or (args.resume and path.exists()):
        saved = load(path)
        for name, value in saved["settings"].items():
            if value != getattr(args, name):
                raise RunError(f"{path}: its {name} is {value}, not {getattr(args, name)}")
        try:
            model.load_state_dict(saved["model"])
            state = {name: saved[name] for name in state}
            if args.checkpoint or state["step"] >= args.steps:
                return state
            for opt, opt_state in zip(opts, saved["optimizers"]):
                opt.load_state_dict(opt_state)
        except (RuntimeError, KeyError, ValueError):
            raise RunError(f"{path}: another model, only weights, or older; no --resume") from None
    elif args.resume:
        tqdm.write(f"{path} is not there: it is trained from the start", file=sys.stderr)
    forward = torch.compile(cross_entropy) if args.compile else cross_entropy
    cuda = args.device == "cuda"
    bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)        # else float32
    started = time.time() - 60 * state["minutes"]
    batches = DataLoader(range(state["step"], args.steps), batch_size=None,
                         collate_fn=partial(batch, task, args, model.mask),
                         num_workers=int(cuda), pin_memory=cuda)  # another process draws ahead
    bar = tqdm(batches, args.path.stem, args.steps, initial=state["step"], position=args.bar)
    for step, drawn in enumerate(bar, state["step"] + 1):
        tokens, inputs, turn, masked, weight = (x.to(args.device, non_blocking=cuda) for x in drawn)
        with torch.autocast(args.device, torch.bfloat16, enabled=bf16):
            ce = forward(model, system, tokens, inputs, turn, masked)
        loss = (weight * ce).sum()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        # A short warm-up, then constant, then in the second half linear to 5 %.
        lr = args.lr * min(1, step / 100, 0.05 + 1.9 * (1 - (step - 1) / args.steps))
        for opt in opts:
            opt.param_groups[0]["lr"] = lr
            opt.step()
            opt.zero_grad()
        saving = step == args.steps or time.time() - started > 60 * (state["minutes"] + 1)
        if saving or step % 50 == 0:                              # .item() waits for the device
            if not math.isfinite(loss.item() + norm.item()):
                raise RunError(f"{path}: loss {loss:.3g}, gradient {norm:.3g} at step {step}")
            state["history"].append([step, loss.item()])
            bar.set_postfix_str(f"loss {loss.item():.3f}")
            if (parent := torch.multiprocessing.parent_process()) and not parent.is_alive():
                raise KeyboardInterrupt                                  # an orphan ends
        if saving:
            state.update(step=step, minutes=(time.time() - started) / 60)
            torch.save({"settings": {name: getattr(args, name) for name in SETTINGS}, **state,
                        "model": model.state_dict(),
                        "optimizers": [opt.state_dict() for opt in opts]}, file := io.BytesIO())
            write(path, file.getvalue())
    return state


def write(path, content):
    """Write bytes to a file, whole or not at all: a temporary file (it stays if this fails)."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def load(path):
    """Read a checkpoint, without running code that it may hold. Settings it lacks are None."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        return saved | {"settings": {name: saved["settings"].get(name) for name in SETTINGS}}
    except Exception as error:
        raise RunError(f"{path}: no intact checkpoint ({type(error).__name__})") from None


# 7. evaluation --------------------------------------------------------------------------------
def evaluate(task, args, model, state, decode, order=None, candidates=None):
    """For each number of latent tokens measure nats of --samples test puzzles and decode them.
    Records go to args.path, as .json. `unseen`: of the valid boards, the share held out (10 %)."""
    if args.watch is not None:
        return watch(task, args, decode)
    rng = np.random.default_rng((args.seed, 2**32 + 1))         # steps use (seed, step < 2**32)
    tokens = torch.from_numpy(task.batch(args.samples, rng, "test")).to(args.device)
    parts = tokens.split(128 if args.device == "cpu" else 1024)
    measured = sum(nats(model, SYSTEMS[args.system], part, task.prompt_len, args.latents, rng)
                   * len(part) / args.samples for part in parts)
    path = args.path.with_suffix(".json")
    records = json.loads(path.read_text())["records"] if path.exists() else {}
    bar = tqdm(args.latents, f"{args.path.stem} decodes", leave=False, position=args.bar)
    decode(tokens=parts[0], n_latent=args.latents[0])[0].cpu()                  # warms up
    for k, nats_of_k in zip(bar, measured.tolist()):
        generator, started = torch.Generator(args.device).manual_seed(args.seed), time.time()
        done = [decode(tokens=part, n_latent=k, generator=generator) for part in parts]
        filled = torch.cat([filled for filled, _ in done]).cpu().numpy()
        seconds, right = time.time() - started, task.correct(filled)
        unseen = task.held_out(filled[right]).mean() if any(right) and not task.prompt_len else None
        how = {name: getattr(args, name) for name in (*SETTINGS, "temperature", "samples")}
        how.update(step=state["step"], n_latent=k, order=order, candidates=candidates)
        records[json.dumps(how)] = {                 # only the same measurement replaces it
            **how, "accuracy": right.mean().item(), "unseen": unseen,
            "nats": None if math.isnan(nats_of_k) else nats_of_k, "nats_floor": task.floor_nats,
            "forward_tokens": done[0][1], "ms_per_puzzle": 1000 * seconds / args.samples,
            "train_minutes": state["minutes"], "device": args.device, "torch": torch.__version__}
        write(path, json.dumps({**state, "records": records}, indent=1).encode())


def watch(task, args, decode):
    """Solve one test puzzle with the least and with the most latent tokens, and show every pass."""
    rng = np.random.default_rng((args.watch, 2**32))
    puzzle = torch.from_numpy(task.batch(1, rng, "test")).to(args.device)
    print("[x] is decoded, x 83% a candidate, as sure as that, x~83% latent, . not in this pass")
    for k in sorted({args.latents[0], args.latents[-1]}):
        def on_step(tokens, positions, logits, c, decoded):
            shown, form = tokens[0].tolist(), {}
            for i, (place, p) in enumerate(zip(positions[0].tolist(), logits[0].softmax(-1))):
                style = "[{}]"
                if place != decoded[0, 0]:
                    style, shown[place] = " {} " if i < c else " {}~", p.argmax().item()
                form[place] = f"{style}{100 * p[shown[place]]:3.0f}%"
            board = task.show(shown, lambda place, text: form.get(place, " {}     ").format(text))
            text = f"\n{args.path.stem}, {k} latent tokens\n{board}"
            print(text, flush=True)
            if sys.stdout.isatty() and (tokens >= task.vocab_size).any():  # the next goes over it
                time.sleep(0.3)
                print(f"\033[{text.count(chr(10)) + 1}F\033[J", end="")

        filled, _ = decode(tokens=puzzle, n_latent=k, on_step=on_step,
                           generator=torch.Generator(args.device).manual_seed(args.watch))
        print(f"The answer is {'right' if task.correct(filled.cpu().numpy())[0] else 'wrong'}.")


# 8. around it, shared by both scripts ----------------------------------------------------------
def at_least(least, kind=int, words=()):
    """An argparse type: a finite number, not below `least`, or one of some words."""
    def number(text):
        if text not in words and not least <= kind(text) < 2**63:
            raise ValueError
        return text if text in words else kind(text)
    number.__name__ = " or ".join([f"number >= {least}", *words])
    return number


def common_flags(description, tasks, order, default_systems):
    """The flags that both scripts have, [defaults] in brackets; each script adds its own."""
    parser = argparse.ArgumentParser(description=description, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    sizes = "; ".join(f"{t.name}: {' '.join(t.sizes)} [{t.default_size}]" for t in tasks.values())
    systems = [name for name, system in SYSTEMS.items() if system.order == order]
    devices = [name for name in ("cuda", "mps") if getattr(torch, name).is_available()] + ["cpu"]
    flag("--task", default="sudoku", choices=tasks, help="the puzzle [%(default)s]")
    flag("--size", help=f"its size and [default]: {sizes}")
    flag("--systems", nargs="+", default=default_systems, choices=systems,
         help=f"what to train [{' '.join(default_systems)}]")
    flag("--latents", nargs="+", type=at_least(0, words=["all"]), metavar="K", help="numbers of "
         "latent tokens to sweep [0, powers of two, all; more is all]; some systems have one")
    flag("--seeds", nargs="+", type=at_least(0), default=[0], help="everything once for each [0]")
    for name, kind, default, text in [
            ("steps", at_least(1), 4600, "training steps"),
            ("batch-size", at_least(1), 64, "puzzles in a step"),
            ("lr", at_least(0, float), 3e-3, "highest learning rate"),
            ("layers", at_least(1), 3, "transformer blocks"),
            ("heads", at_least(1), 4, "attention heads in a block"),
            ("width", at_least(1), 64, "width of the residual stream"),
            ("samples", at_least(2), 1024, "test puzzles in each evaluation"),
            ("temperature", at_least(0, float), 1.0, "of decoding; 0: the most probable token"),
            ("jobs", at_least(1), 3, "models to train side by side")]:
        flag(f"--{name}", type=kind, default=default, help=f"{text} [%(default)s]")
    flag("--device", default=devices[0], choices=devices, help="[%(default)s]")
    flag("--compile", action="store_true", help="train with torch.compile")
    flag("--out", type=Path, help="folder for all output [out/TASK-SIZE]")
    flag("--resume", action="store_true", help="go on from the checkpoints in the output folder")
    flag("--checkpoint", type=Path, help="train nothing, evaluate this checkpoint")
    flag("--watch", nargs="?", type=at_least(0), const=0, metavar="SEED",
         help="once trained, only solve one puzzle, drawn with this seed [0], and show every step")
    return parser


def sweep(args, most):
    """The numbers of latent tokens to decode with: those of --latents, or 0, powers of two, all."""
    chosen = args.latents or [0, *(2**i for i in range((2 * most // 3).bit_length())), most]
    return sorted({most if k == "all" else min(k, most) for k in chosen})


def prepare(args, tasks, make_jobs):
    """Complete and check the flags before any work is done. Returns the task, and for every model
    its job: the flags, its system, window, seed and latents, and the path of its checkpoint."""
    if args.checkpoint:                                  # the model's settings are its checkpoint's
        vars(args).update(settings := load(args.checkpoint)["settings"])
        print(f"{args.checkpoint}:", *(f"{k} {v}" for k, v in settings.items() if v is not None))
        order = getattr(SYSTEMS.get(args.system), "order", "")
        if order != SYSTEMS[args.systems[0]].order or args.task not in tasks:
            raise RunError(f"--checkpoint: {args.system} for {args.task} is not of this script")
        args.systems, args.windows, args.seeds = [args.system], [args.window], [args.seed]
        args.out = args.out or args.checkpoint.parent
    args.size = args.size or tasks[args.task].default_size
    if args.size not in tasks[args.task].sizes:
        raise RunError(f"--size: {args.task} comes in {', '.join(tasks[args.task].sizes)}")
    if args.width % args.heads:
        raise RunError(f"--width: {args.width} is not divisible by --heads {args.heads}")
    task, jobs = tasks[args.task](args.size), {}
    args.out = args.out or Path("out") / f"{args.task}-{args.size}"
    for job in make_jobs(task, args):
        name = "-".join(str(x) for x in (job["system"], job["window"], f"s{job['seed']}") if x)
        path = args.out / (args.checkpoint.name if args.checkpoint else f"{name}.pt")
        if path.exists() and not (args.resume or path.samefile(args.checkpoint or args.out)):
            raise RunError(f"--out: {path} is there; go on with --resume, or choose another folder")
        jobs[name] = argparse.Namespace(**vars(args) | job, path=path, bar=len(jobs) % args.jobs)
    args.out.mkdir(parents=True, exist_ok=True)
    return task, list(jobs.values())


def work(i, width, lock, failures, task, jobs, experiment):
    """Process i of `width` runs experiment(task, job) for every width-th job."""
    tqdm.set_lock(lock)
    torch.set_num_threads(max(1, torch.get_num_threads() // width))
    if jobs[0].device == "cuda":
        torch.cuda.set_device(i % torch.cuda.device_count())                # several in turn
    for job in jobs[i::width]:
        try:
            experiment(task, job)
        except (RunError, OSError, torch.OutOfMemoryError) as error:         # the others go on
            failures.put(str(error))


def main(parser, tasks, make_jobs, experiment):
    """The main function of both scripts: run all jobs, some of them side by side."""
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="replace")
    try:
        task, jobs = prepare(args, tasks, make_jobs)
        context = torch.multiprocessing.get_context("spawn")
        width = min(len(jobs), args.jobs) if args.watch is None else 1
        failures = context.SimpleQueue()
        shared = (width, context.RLock(), failures, task, jobs, experiment)
        if width == 1:
            work(0, *shared)
        else:
            torch.multiprocessing.spawn(work, shared, width)
        if args.watch is None and (rows := summary(args)):
            draw(rows, args)
            lines = [HEAD, *(ROW.format(**row) for row in rows), FOOT]
            print("\n".join(lines).replace("nan%", "   -").replace("nan", "  -"))
        if not failures.empty():
            raise RunError("; ".join(failures.get() for _ in iter(failures.empty, True)))
    except KeyboardInterrupt:
        parser.exit(130, "\nInterrupted; --resume goes on from the last checkpoints.\n")
    except (RunError, OSError, torch.multiprocessing.ProcessExitedException) as error:
        parser.error(str(error))
    finally:
        for process in torch.multiprocessing.active_children():
            process.terminate()


MEANS = "accuracy nats nats_floor unseen forward_tokens ms_per_puzzle train_minutes"
ROW = ("{name:<33}{n_latent:>7}{accuracy:>10.1%} ±{error:>5.1%}{nats:>8.2f}{excess:>8.2f}"
       "{forward_tokens:>16.0f}{ms_per_puzzle:>11.2f}{step:>8}{train_minutes:>9.1f}{seeds:>7}"
       "{unseen:>8.0%}")
HEAD = ("system                           latents  accuracy           nats  excess  forward tokens"
        "  ms/puzzle    step  minutes  seeds  unseen")
FOOT = ("nats: at temperature 1, for diffusion in random order; excess: above the entropy of all"
        " right answers;\nunseen: of the valid boards, those held out. Short runs favour AR.")


def summary(args):
    """One row for each system, way of decoding and number of latent tokens, from all files with
    this run's settings: means over seeds, and their error (of one: half of Wilson's interval)."""
    groups, rows = {}, []
    files = [json.loads(path.read_text()) for path in sorted(args.out.glob("*.json"))]
    for r in (r for content in files for r in content.get("records", {}).values()):
        window = {None: "", "random": " random window"}.get(r["window"], f" window {r['window']}")
        order = f" {r['order']} of {r['candidates']}" if r["order"] else ""
        heat = f" temperature {r['temperature']:g}" if r["temperature"] != 1 else ""
        name = SYSTEMS[r["system"]].title + window + order + heat
        if all(r.get(setting) == getattr(args, setting) for setting in SETTINGS[3:]):
            groups.setdefault((name, r["step"], r["samples"], r["n_latent"]), []).append(r)
    for (name, _, samples, _), group in sorted(groups.items()):
        row = {key: np.array([r[key] for r in group], float).mean() for key in MEANS.split()}
        p, n = row["accuracy"], len({r["seed"] for r in group})
        excess = row["nats"] - row["nats_floor"]
        error = (p * (1 - p) / samples + 0.25 / samples**2) ** 0.5 / (1 + 1 / samples)
        if n > 1:
            error = np.std([r["accuracy"] for r in group], ddof=1) / n**0.5
        rows.append({**group[0], **row, "name": name, "seeds": n, "error": error, "excess": excess})
    return rows


def draw(rows, args):
    """The figure, latents.png. Of the rows it shows those that are decoded as this run does."""
    try:
        from matplotlib.figure import Figure
    except Exception as error:
        return print(f"No figure ({error}); pip install matplotlib, then the same with --resume")
    rows = [r for r in rows if r["order"] in (None, getattr(args, "order", r["order"]))
            and r["temperature"] == args.temperature] or rows
    figure = Figure(figsize=(15, 4), layout="constrained")
    panels, one_step = figure.subplots(1, 3), len({r["step"] for r in rows}) == 1
    loss = "nats" if math.isnan(rows[0]["nats_floor"]) else "excess"
    for panel, x, y in zip(panels, ["n_latent"] * 2 + ["forward_tokens"], ["accuracy", loss] * 2):
        for key in dict.fromkeys((r["name"], r["step"], r["samples"]) for r in rows):
            curve = [r for r in rows if (r["name"], r["step"], r["samples"]) == key]
            panel.errorbar([r[x] for r in curve], [r[y] for r in curve],
                           [r["error"] for r in curve] if y == "accuracy" else None, capsize=3,
                           label=key[0] if one_step else "{}, {} steps".format(*key),
                           fmt="o-" if curve[1:] else "*", color=SYSTEMS[curve[0]["system"]].color)
        panel.set(xlabel=x.replace("n_latent", "latent tokens").replace("_", " "),
                  ylabel=y.replace("excess", "excess nats"))
        if x == "n_latent":
            panel.set_xscale("symlog", linthresh=1)
            panel.set_xticks(ticks := sorted({r[x] for r in rows}), ticks, rotation=60)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.savefig(path := args.out / "latents.png", dpi=150)
    print(f"The figure is {path}")


if __name__ == "__main__":
    print("Who sees whom: rows are queries, columns keys, named by their turn, [masked]")
    for system in SYSTEMS.values():
        example = torch.zeros(1, 6, dtype=torch.long), 0, 1, 2, 3 if system.order == "left" else 6
        _, turn, masked = hide(system, *example, np.random.default_rng(0))
        heads = [f"[{t}]" if m else f" {t} " for t, m in zip(turn[0].tolist(), masked[0]) if t >= 0]
        print(f"\n{system.title:<16}{''.join(heads)}")
        for head, row in zip(heads, visibility(system, turn, masked)[0]):
            print(f"{head:>16} " + "  ".join("x" if seen else "." for seen in row[:len(heads)]))
