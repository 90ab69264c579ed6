"""Latent tokens: one transformer, five ways to fill in what is unknown.

A masked token that a model predicts but does not decode in this step is a *latent token*: a hidden
state that the decoded position can attend to. This file holds the whole method of "Reasoning with
Latent Tokens in Diffusion Language Models" (He, Welleck & Fried, arXiv 2602.03769), in the order
in which one would explain it on a whiteboard:

    1. who sees whom        one small function is the difference between the systems
    2. the transformer      a plain GPT that is told positions and visibility
    3. objectives           what is hidden, and which predictions count
    4. nats                 how well a system models held-out answers, exactly
    5. decoders             left to right, and in any order with k latent tokens
    6. training             one loop for every objective, and its checkpoints
    7. around it            flags, tables, figure: shared by both scripts, safe to skip

`python latent.py` prints who sees whom. train_diffusion.py and train_ar.py run experiments.
"""
import argparse
import concurrent.futures
import dataclasses
import json
import math
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

# 1. who sees whom -----------------------------------------------------------------------------
# Every token has a rank. 0: clean, i.e. known. 1, 2, ..., m: the m masked tokens, in the order of
# a chain. -1: absent from this pass. The systems differ in nothing but what is hidden (section 3)
# and in this table of which query attends to which key (paper, section 3).


def visibility(rank, kind):
    """rank (B, T) int -> (B, T, T) bool: may the query (middle index) attend to the key (last)?"""
    query, key = rank[:, :, None], rank[:, None, :]
    itself = torch.eye(rank.shape[1], dtype=torch.bool, device=rank.device)
    clean, earlier = key == 0, (0 < key) & (key < query)
    if kind == "joint":               # MDM, AR+MTP: everybody sees everybody
        return (key >= 0) | itself
    if kind == "independent":         # SIDM: masked tokens do not see each other
        return clean | itself
    if kind == "semicausal":          # SCDM; AR too, where every token's rank is its position
        return clean | earlier | itself
    raise ValueError(f"unknown kind of visibility: {kind}")


KIND = {"ar": "semicausal", "mtp": "joint", "control": "joint",
        "mdm": "joint", "sidm": "independent", "scdm": "semicausal"}


# 2. the transformer ---------------------------------------------------------------------------


@dataclasses.dataclass
class Config:
    vocab_size: int           # tokens that can be predicted; the mask is one more, that can not
    seq_len: int              # prompt and answer
    layers: int = 3
    heads: int = 2
    width: int = 64


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.attention_out = nn.Linear(config.width, config.width, bias=False)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp_in = nn.Linear(config.width, 4 * config.width, bias=False)
        self.mlp_out = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x, visible):
        B, T, C = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(B, T, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                        # each (B, heads, T, C / heads)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        x = x + self.attention_out(y.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp_out(F.relu(self.mlp_in(self.mlp_norm(x))).square())


class Transformer(nn.Module):
    """A pre-norm GPT with learned absolute positions and an untied output layer."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.mask = config.vocab_size                                # the id of the mask token
        self.token = nn.Embedding(config.vocab_size + 1, config.width)
        self.position = nn.Embedding(config.seq_len, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.output = nn.Linear(config.width, config.vocab_size, bias=False)
        for name, weight in self.named_parameters():
            if name.endswith("_out.weight"):      # every block starts as the identity: at small
                nn.init.zeros_(weight)            # widths this matters more than the optimizer
            elif weight.dim() == 2:
                nn.init.normal_(weight, std=0.5 * weight.shape[1] ** -0.5)

    def forward(self, tokens, positions, visible):
        """tokens (B, T), positions (B, T) or (1, T), visible (B, T, T) or (1, T, T) bool ->
        logits (B, T, vocab_size). Positions are explicit: trimmed or reordered, a token keeps
        the position that it has in the full sequence."""
        x = self.token(tokens) + self.position(positions)                               # (B, T, C)
        for block in self.blocks:
            x = block(x, visible[:, None])                      # one mask for all heads
        return self.output(self.norm(x))                                       # (B, T, vocab_size)


# 3. objectives --------------------------------------------------------------------------------
# An objective chooses what the model reads (inputs), who sees whom (rank), and how much the
# cross-entropy of each token counts (weight, with sum 1 over the batch). The rest is the same for
# all. tokens is (B, T), the prompt first; A is the length of the answer; rng is numpy's, so that
# every device draws the same.


def cross_entropy(model, tokens, inputs, rank, kind):
    """The cross-entropy in nats of every token, (B, T), when the model reads `inputs`."""
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    logits = model(inputs, positions, visibility(rank, kind))
    return F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")


def next_token(tokens, prompt_len, mask):
    """AR: slot i reads token i - 1 (the first slot a mask) and predicts token i."""
    B, T = tokens.shape
    inputs = torch.cat([tokens.new_full((B, 1), mask), tokens[:, :-1]], dim=1)
    rank = torch.arange(1, T + 1, device=tokens.device).expand(B, T)
    weight = (rank > prompt_len).float()
    return inputs, rank, weight / weight.sum()


def multi_token(tokens, prompt_len, mask, rng, window, loss_on_window=True):
    """AR+MTP: the answer is cut at a random place. Before the cut it is clean, the next `window`
    tokens are masked, the rest is absent. Only the first masked token will ever be decoded, the
    others are latent. The control, loss_on_window=False, has them but does not train them."""
    B, T = tokens.shape
    cut = prompt_len + stratified(B, T - prompt_len, rng)                                  # (B, 1)
    rank = window_rank(T, cut, window)
    weight = (rank > 0 if loss_on_window else rank == 1).float()
    return torch.where(rank == 0, tokens, mask), rank, weight / weight.sum()


def diffusion(tokens, prompt_len, mask, rng):
    """Masked diffusion: m of the answer's A tokens, m uniform in 1..A, are masked, in a random
    order. The plain mean over all masked tokens has the same minimiser as the ELBO, which weights
    each sequence's sum by A / m, and less variance."""
    B, T = tokens.shape
    m = 1 + stratified(B, T - prompt_len, rng)                                             # (B, 1)
    rank = random_rank(B, T, prompt_len, m, rng)
    weight = (rank > 0).float()
    return torch.where(rank == 0, tokens, mask), rank, weight / weight.sum()


def stratified(B, n, rng):
    """(B, 1) integers, each uniform in 0..n-1 and together evenly spread: every batch covers all
    cuts, or all noise levels, which lowers the variance of its gradient."""
    return torch.from_numpy(((np.arange(B) + rng.random()) * n / B).astype(np.int64))[:, None]


def window_rank(T, cut, window):
    """Ranks (B, T) for cuts (B, 1): 0 before the cut, 1..window from there on, then -1, absent."""
    ahead = torch.arange(1, T + 1, device=cut.device) - cut
    return torch.where(ahead <= window, ahead.clamp(min=0), -1)


def random_rank(B, T, prompt_len, m, rng):
    """Ranks (B, T): 0 for the prompt, and for the answer 1..m at m random places, 0 elsewhere."""
    order = 1 + torch.from_numpy(rng.random((B, T - prompt_len)).argsort(1))   # shuffled 1, 2, ...
    return F.pad(torch.where(order <= m, order, 0), (prompt_len, 0))


# 4. nats --------------------------------------------------------------------------------------
# Every system is a generative process, and so has an exact negative log-likelihood. Where the
# entropy of the answer is known, its floor, "is my loss normal?" has an answer; and the share of
# right answers among samples at temperature 1 is at least exp(-(nats - floor)).


@torch.no_grad()
def next_token_nats(model, tokens, prompt_len):
    """AR's nats for an answer: the sum of its next-token cross-entropies. A mean over tokens."""
    inputs, rank, _ = next_token(tokens, prompt_len, model.mask)
    ce = cross_entropy(model, tokens, inputs, rank, "semicausal")
    return ce[:, prompt_len:].sum(1).mean().item()


@torch.no_grad()
def multi_token_nats(model, tokens, prompt_len, window):
    """AR+MTP's nats for an answer: at every cut, the cross-entropy of the next token."""
    nats = 0.0
    for cut in range(prompt_len, tokens.shape[1]):
        present = tokens[:, :cut + window]
        rank = window_rank(present.shape[1], torch.tensor([[cut]], device=tokens.device), window)
        inputs = torch.where(rank == 0, present, model.mask)
        nats += cross_entropy(model, present, inputs, rank, "joint")[:, cut].mean().item()
    return nats


@torch.no_grad()
def diffusion_table(model, tokens, prompt_len, kind, rng):
    """CE[m - 1, r - 1]: the mean cross-entropy of the masked token of rank r when m are masked, in
    nats, (A, A); 0 where r > m."""
    B, T = tokens.shape
    rows = []
    for m in range(1, T - prompt_len + 1):
        rank = random_rank(B, T, prompt_len, m, rng).to(tokens.device)
        inputs = torch.where(rank == 0, tokens, model.mask)
        ce = cross_entropy(model, tokens, inputs, rank, kind)
        by_rank = ce.new_zeros(B, T + 1).scatter(1, rank, ce)            # column 0: clean tokens
        rows.append(by_rank[:, 1:T - prompt_len + 1].mean(0))
    return torch.stack(rows).cpu()


def diffusion_nats(table, kind, n_latent):
    """Nats for an answer that is decoded in uniformly random order: the sum over m = A..1 of the
    cross-entropy of one token. In SCDM with k latent tokens that is the token of rank k + 1; in
    MDM and SIDM the masked tokens have no order and their mean has the least variance."""
    if kind == "semicausal":
        return sum(row[min(n_latent, m)].item() for m, row in enumerate(table))
    return sum(row[:m + 1].mean().item() for m, row in enumerate(table))


# 5. decoders ----------------------------------------------------------------------------------
# One token a step. Both return the filled tokens, (B, T), and the number of forward tokens: how
# many positions went through the transformer for one puzzle, the honest unit of inference cost.


def sample(logits, greedy, generator):
    """logits (B, V) -> tokens (B,): drawn at temperature 1, or the most probable ones."""
    if greedy:
        return logits.argmax(-1)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


@torch.no_grad()
def decode_left_to_right(model, tokens, prompt_len, window, greedy=False, generator=None):
    """AR+MTP with a window of masked tokens, of which only the first is decoded and the others are
    latent; window 0 is AR, which reads what is known and one start slot."""
    B, T = tokens.shape
    tokens = torch.where(torch.arange(T, device=tokens.device) < prompt_len, tokens, model.mask)
    forward_tokens = 0
    for cut in range(prompt_len, T):
        if window == 0:
            present, rank, _ = next_token(tokens[:, :cut + 1], prompt_len, model.mask)
            visible = visibility(rank[:1], "semicausal")
        else:
            present = tokens[:, :cut + window]                   # what is absent is not computed
            cuts = torch.full((1, 1), cut, device=tokens.device)
            visible = visibility(window_rank(present.shape[1], cuts, window), "joint")
        positions = torch.arange(present.shape[1], device=tokens.device)[None]
        logits = model(present, positions, visible)[:, cut]                                # (B, V)
        tokens[:, cut] = sample(logits, greedy, generator)
        forward_tokens += present.shape[1]
    return tokens, forward_tokens


@torch.no_grad()
def decode_any_order(model, tokens, prompt_len, kind, n_latent, candidates=8, greedy=False,
                     generator=None):
    """Masked diffusion with k latent tokens (MDM: all, SIDM: 0). At every step random masked
    positions are the candidates, k others are latent, and the rest does not go through the model.
    The candidate whose best token is most probable is decoded: top-prob order; with one candidate
    the order is uniform."""
    B, T = tokens.shape
    tokens = torch.where(torch.arange(T, device=tokens.device) < prompt_len, tokens, model.mask)
    places = torch.arange(T, device=tokens.device).expand(B, T)
    known, unknown = places[:, :prompt_len], places[:, prompt_len:]
    forward_tokens = 0
    for m in range(T - prompt_len, 0, -1):
        shuffle = torch.rand(B, m, generator=generator, device=tokens.device).argsort(1)
        unknown = unknown.gather(1, shuffle)                                               # (B, m)
        c = min(candidates, m)
        k = min(n_latent, m - c)
        positions = torch.cat([known, unknown[:, c:c + k], unknown[:, :c]], dim=1)
        rank = torch.arange(1 - known.shape[1], k + c + 1, device=tokens.device).clamp(0, k + 1)
        visible = visibility(rank[None], kind)        # known 0, latents 1..k, all candidates k + 1
        logits = model(tokens.gather(1, positions), positions, visible)[:, -c:]         # (B, c, V)
        best = logits.softmax(-1).amax(-1).argmax(1, keepdim=True)                         # (B, 1)
        token = sample(logits.take_along_dim(best[..., None], 1)[:, 0], greedy, generator)
        place = unknown.gather(1, best)                                                    # (B, 1)
        tokens = tokens.scatter(1, place, token[:, None])
        known = torch.cat([known, place], dim=1)
        unknown = unknown.scatter(1, best, unknown[:, -1:])[:, :-1]    # the last one fills the gap
        forward_tokens += positions.shape[1]
    return tokens, forward_tokens


# 6. training ----------------------------------------------------------------------------------


class RunError(Exception):
    """Something that ends a run and that one line explains. The scripts exit with status 2."""


def choose_device(name):
    """The one place that names devices: auto is CUDA, then MPS, then the CPU."""
    usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
              "cpu": True}
    usable = [device for device, is_there in usable.items() if is_there]
    if name != "auto" and name not in usable:
        raise RunError(f"--device: no {name} on this machine, only auto, {', '.join(usable)}")
    return torch.device(usable[0] if name == "auto" else name)


def write(path, write_to):
    """Write a file whole or not at all: a temporary file, then a rename."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write_to(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        raise RunError(f"--out: cannot write {path}, what was there is intact: {error}") from None


def load(path, **expected):
    """Read a checkpoint; refuse what is none, or what was trained with other values than these."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        found = saved["args"] | saved["job"]
        saved["model"], saved["optimizer"], saved["step"]
    except Exception as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else "not a checkpoint"
        raise RunError(f"{path}: {reason}") from None
    for name, value in expected.items():
        if found.get(name) != value:
            raise RunError(f"{path}: a checkpoint with {name} {found.get(name)}, not {value}")
    return saved


def schedule(step, steps, warmup=100):
    """The learning rate's factor: a short warm-up, constant, then linear to 5 % in the 2nd half."""
    return min(1, (step + 1) / warmup, 0.05 + 0.95 * 2 * (1 - step / steps))


def train(model, objective, task, args, job, probe, bar_position=0):
    """Train one model and keep its checkpoint OUT/NAME.pt; returns the minutes that it took.

    objective(tokens, rng) -> inputs, rank, weight; probe() -> a quick accuracy for the progress
    bar. The data and masks of a step depend on (seed, step) alone, so that a run needs no random
    state to be resumed exactly."""
    device = model.token.weight.device
    path = Path(args.out) / f"{job_name(job)}.pt"
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98),
                                  weight_decay=0, fused=True)
    first, seconds, best = 0, 0.0, -1.0
    if args.resume and path.exists():
        saved = load(path, **job, **{name: getattr(args, name) for name in SAME_TO_RESUME})
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first, seconds, best = saved["step"], saved["seconds"], saved["best"]

    interrupted = []                                       # Ctrl-C waits for the end of the step
    handler = signal.signal(signal.SIGINT, lambda *_: interrupted.append(True))
    last_save = time.time()
    started = time.time() - seconds
    bar = tqdm(range(first, args.steps), job_name(job), args.steps, initial=first,
               position=bar_position, dynamic_ncols=True)
    for step in bar:
        rng = np.random.default_rng((job["seed"], step))
        tokens = torch.from_numpy(task.batch(args.batch_size, rng, "train"))
        batch = (tokens, *objective(tokens, rng))
        tokens, inputs, rank, weight = (x.to(device, non_blocking=True) for x in batch)
        ce = cross_entropy(model, tokens, inputs, rank, KIND[job["system"]])
        loss = (weight * ce).sum()
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * schedule(step, args.steps)
        optimizer.step()

        tenth = (step + 1) % max(1, args.steps // 10) == 0 or step + 1 == args.steps
        must_save = tenth or interrupted or time.time() - last_save > 60
        if must_save or step % 50 == 0:                    # .item() waits for the device
            if not math.isfinite(loss.item() + norm.item()):
                raise RunError(f"{job_name(job)}: loss {loss.item()} at step {step} with learning "
                               f"rate {optimizer.param_groups[0]['lr']:.2g}; the last good "
                               f"checkpoint, if any, is {path}")
            bar.set_postfix_str(f"loss {loss.item():.3f}" + accuracy)
