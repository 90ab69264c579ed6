"""Latent tokens: one transformer, five ways to fill in what is unknown.

A masked token that a model predicts but does not decode in this step is a *latent token*: a hidden
state that the decoded position can attend to. This file holds the whole method of "Reasoning with
Latent Tokens in Diffusion Language Models" (He, Welleck & Fried, arXiv 2602.03769), in the order
in which one would explain it on a whiteboard:

    1. who sees whom        one small function is the difference between the systems
    2. the transformer      a plain GPT that is told positions and visibility
    3. objectives           what is hidden, and which predictions count
    4. nats                 how well a system models held-out answers
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
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

# 1. who sees whom -----------------------------------------------------------------------------
# AR is next-token prediction, AR+MTP (mtp) the same with multi-token prediction; MDM, SIDM and SCDM
# are masked diffusion with joint, independent and semi-causal prediction. They differ in nothing
# but the objective (section 3) and this table of which query attends to which key (paper, section
# 3). Every token has a rank. 0: clean, i.e. known. 1, 2, ..., m: the m masked tokens, in an order,
# the chain (in diffusion a random one). -1: absent from this pass.
#
# Systems with causal context rank known tokens, too, in the order in which they became known. What
# is masked then never changes the keys and values of a known token, and decoders can cache them. In
# SCDM the masked tokens have the ranks after those. In AR and AR+MTP, from left to right, the known
# tokens have the even ranks 2, 4, 6, ..., and all masked tokens of a window one odd rank, 1 above
# the last one that they see.


def visibility(rank, kind):
    """rank (B, T) int -> (B, T, T) bool: may the query (middle index) attend to the key (last)?"""
    query, key = rank[:, :, None], rank[:, None, :]
    # A softmax over nothing would be NaN, so absent tokens see themselves, too.
    itself = torch.eye(rank.shape[1], dtype=torch.bool, device=rank.device)
    clean, earlier = key == 0, (0 < key) & (key < query)
    if kind == "joint":               # MDM, AR+MTP: everybody sees everybody
        return (key >= 0) | itself
    if kind == "independent":         # SIDM: masked tokens do not see each other
        return clean | itself
    if kind == "semicausal":          # SCDM: a masked token sees those before it in the chain
        return clean | earlier | itself
    if kind == "causal":              # AR, AR+MTP causal: known tokens (even) before it; its window
        return earlier & (key % 2 == 0) | (0 < key) & (key == query) | itself
    raise ValueError(f"unknown kind of visibility: {kind}")


# Five systems, the control of AR+MTP, and three variants with causal context.
KIND = {"ar": "causal", "mtp": "joint", "control": "joint", "mtp-causal": "causal",
        "mtp-cuts": "causal", "mdm": "joint", "sidm": "independent", "scdm": "semicausal",
        "scdm-causal": "semicausal"}
CACHEABLE = ("ar", "mtp-causal", "mtp-cuts", "scdm-causal")      # those with causal context


# 2. the transformer ---------------------------------------------------------------------------


@dataclasses.dataclass
class Config:
    vocab_size: int           # tokens that can be predicted; the mask is one more, that can not
    seq_len: int              # prompt and answer
    layers: int
    heads: int
    width: int


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream. Returns what it
    makes of x (B, T, C), and the keys and values, (B, heads, T, C / heads), after those of past."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        # With this gain attention logits start as cosines. README.md: what happens if it is 1.
        gain = (config.width // config.heads) ** -0.5
        self.gain = nn.Parameter(torch.full((config.heads, 1, 1), gain))
        self.attention_out = nn.Linear(config.width, config.width, bias=False)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp_in = nn.Linear(config.width, 4 * config.width, bias=False)
        self.mlp_out = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x, visible, past=None):
        B, T, C = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(B, T, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                        # each (B, heads, T, C / heads)
        # QK norm with a learned gain for each head (Henry et al., arXiv 2010.04245).
        q, k = F.rms_norm(q, q.shape[-1:]) * self.gain, F.rms_norm(k, k.shape[-1:])
        if past:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        x = x + self.attention_out(y.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp_out(F.relu(self.mlp_in(self.mlp_norm(x))).square()), (k, v)


class Transformer(nn.Module):
    """A pre-norm GPT with learned absolute positions and an untied output layer."""

    def __init__(self, config, generator=None):
        super().__init__()
        self.mask = config.vocab_size                                # the id of the mask token
        self.token = nn.Embedding(config.vocab_size + 1, config.width)
        self.position = nn.Embedding(config.seq_len, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.output = nn.Linear(config.width, config.vocab_size, bias=False)
        for name, weight in self.named_parameters():
            if name.endswith("_out.weight"):      # every block starts as the identity: at small
                nn.init.zeros_(weight)            # widths this matters more than the optimizer
            elif name in ("token.weight", "position.weight"):
                nn.init.normal_(weight, std=0.2, generator=generator)
            elif weight.dim() == 2:
                nn.init.normal_(weight, std=0.5 * weight.shape[1] ** -0.5, generator=generator)

    def forward(self, tokens, positions, visible, cache=None, n_known=0):
        """tokens (B, T), positions (B, T) or (1, T), visible (B, T, T) or (1, T, T) bool ->
        logits (B, T, vocab_size). Positions are explicit: trimmed or reordered, a token keeps
        the position that it has in the full sequence.

        A decoder may pass a `cache`, at first {}: the keys and values of S tokens from earlier
        passes. They go before those of this pass, visible is (B or 1, T, S + T), and of all S + T
        the first `n_known` are kept for the next pass."""
        x = self.token(tokens) + self.position(positions)                               # (B, T, C)
        for i, block in enumerate(self.blocks):
            x, (k, v) = block(x, visible[:, None], (cache or {}).get(i))    # one mask, all heads
            if cache is not None:
                cache[i] = k[:, :, :n_known], v[:, :, :n_known]
        return self.output(self.norm(x))                                       # (B, T, vocab_size)


# 3. objectives --------------------------------------------------------------------------------
# An objective chooses what the model reads (inputs), who sees whom (rank), and how much the
# cross-entropy of each token counts (weight, with sum 1 over the batch); if it does not read one
# input for each token, also their positions. The rest is the same for all. tokens is (B, T), the
# prompt first; A is the length of the answer; rng is numpy's, so that every device draws the same.


def cross_entropy(model, tokens, inputs, rank, kind, positions=None):
    """The cross-entropy in nats of every token, (B, T), when the model reads `inputs`. By default
    input i stands at position i; with `positions`, (B, S), inputs and the result are (B, S)."""
    if positions is None:
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    else:
        tokens = tokens.gather(1, positions)
    logits = model(inputs, positions, visibility(rank, kind))
    return F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")


def next_token(tokens, prompt_len, mask):
    """AR: slot i reads token i - 1 (the first slot a mask) and predicts token i."""
    B, T = tokens.shape
    inputs = torch.cat([tokens.new_full((B, 1), mask), tokens[:, :-1]], dim=1)
    rank = 2 * torch.arange(1, T + 1, device=tokens.device).expand(B, T)
    weight = (rank > 2 * prompt_len).float()
    return inputs, rank, weight / weight.sum()


def multi_token(tokens, prompt_len, mask, rng, window, loss_on_window=True, causal=False):
    """AR+MTP: the answer is cut at a random place. Before the cut it is clean, the next `window`
    tokens are masked, the rest is absent. Only the first masked token will ever be decoded, the
    others are latent. The control, loss_on_window=False, has them but does not train them."""
    B, T = tokens.shape
    cut = prompt_len + stratified(B, T - prompt_len, rng)                                  # (B, 1)
    rank, masked = window_rank(T, cut, window, causal)
    place = torch.arange(T)
    weight = (masked if loss_on_window else place == cut).float()
    return torch.where(place < cut, tokens, mask), rank, weight / weight.sum()


def multi_token_cuts(tokens, prompt_len, mask, rng, window):
    """AR+MTP with causal context, at several cuts in one pass. Masked tokens change nothing of what
    a clean one computes, so all windows share the clean tokens. These come first, once, then the
    windows of A // window cuts; a window sees the clean tokens before its cut, and itself. Returns
    inputs, rank, weight, and positions, each (B, S): S is T and all windows."""
    B, T = tokens.shape
    cuts = prompt_len + stratified(B, T - prompt_len, rng, (T - prompt_len) // window)
    cuts = cuts[:, :, None]                                                          # (B, cuts, 1)
    place = cuts + torch.arange(window)                                         # (B, cuts, window)
    rank = torch.where(place < T, 2 * cuts + 1, -1).flatten(1)               # absent past the end
    weight = F.pad((rank > 0).float(), (T, 0))                                             # (B, S)
    inputs = F.pad(tokens, (0, rank.shape[1]), value=mask)
    known = torch.arange(T).expand(B, T)
    rank = torch.cat([2 * known + 2, rank], dim=1)
    positions = torch.cat([known, place.flatten(1).clamp(max=T - 1)], dim=1)
    return inputs, rank, weight / weight.sum(), positions


def diffusion(tokens, prompt_len, mask, rng, causal=False):
    """Masked diffusion: m of the answer's A tokens, m uniform in 1..A, are masked, in a random
    order. The plain mean over all masked tokens has the same minimiser as the ELBO, which weights
    each sequence's sum by A / m, and less variance."""
    B, T = tokens.shape
    m = 1 + stratified(B, T - prompt_len, rng)                                             # (B, 1)
    rank, masked = random_rank(B, T, prompt_len, m, rng, causal)
    weight = masked.float()
    return torch.where(masked, mask, tokens), rank, weight / weight.sum()


def stratified(B, n, rng, draws=1):
    """(B, draws) integers, evenly spread over 0..n-1 in every row and over the rows (one of them,
    at random, is uniform): every batch covers the range of cuts, or of noise levels, evenly, and
    its gradient has less variance."""
    grid = np.arange(B)[:, None] + B * np.arange(draws) + rng.random()
    return torch.from_numpy((grid * n / (B * draws)).astype(np.int64))


def window_rank(T, cut, window, causal=False):
    """For cuts (B, 1) the ranks, and which tokens are masked, both (B, T): rank 0 before the cut,
    1..window from there on, then -1, absent. Causal: 2, 4, ... before the cut, and one rank for
    the whole window, the next odd one."""
    place = torch.arange(T, device=cut.device)
    present = place < cut + window
    rank = (2 * place + 2).minimum(2 * cut + 1) if causal else (place - cut + 1).clamp(min=0)
    return torch.where(present, rank, -1), (cut <= place) & present


def random_rank(B, T, prompt_len, m, rng, causal=False):
    """Ranks, and which tokens are masked, both (B, T): ranks 1..m, m an integer or (B, 1), at m
    random places of the answer, 0 for the rest and the prompt. Causal: 1, 2, ... for the prompt,
    then for the rest of the answer in a random order, then for the masked tokens."""
    order = torch.from_numpy(rng.random((B, T - prompt_len)).argsort(1))   # shuffled 0, 1, 2, ...
    masked = order < m
    rank, prompt = (order + 1) * masked, torch.zeros(B, prompt_len, dtype=torch.int64)
    if causal:
        rank = prompt_len + 1 + (order - m) % (T - prompt_len)    # those with order >= m come first
        prompt = torch.arange(1, prompt_len + 1).expand(B, prompt_len)
    return torch.cat([prompt, rank], dim=1), F.pad(masked, (prompt_len, 0))


# 4. nats --------------------------------------------------------------------------------------
# Every system is a generative process with a negative log-likelihood: exact for AR and AR+MTP; for
# diffusion its mean over random orders, an upper bound. Where the entropy of the answer is known,
# the floor, "is my loss normal?" has an answer; and the share of right answers among samples at
# temperature 1 (for diffusion in uniform order) is at least exp(-(nats - floor)).


@torch.no_grad()
def next_token_nats(model, tokens, prompt_len):
    """AR's nats for an answer: the sum of its next-token cross-entropies. A mean over tokens."""
    inputs, rank, _ = next_token(tokens, prompt_len, model.mask)
    ce = cross_entropy(model, tokens, inputs, rank, KIND["ar"])
    return ce[:, prompt_len:].sum(1).mean().item()


@torch.no_grad()
def multi_token_nats(model, tokens, prompt_len, window, causal=False):
    """AR+MTP's nats for an answer: at every cut, the cross-entropy of the next token."""
    nats = 0.0
    for cut in range(prompt_len, tokens.shape[1]):
        present = tokens[:, :cut + window]
        cuts = torch.tensor([[cut]], device=tokens.device)
        rank, masked = window_rank(present.shape[1], cuts, window, causal)
        inputs = torch.where(masked, model.mask, present)
        ce = cross_entropy(model, present, inputs, rank, "causal" if causal else "joint")
        nats += ce[:, cut].mean().item()
    return nats


@torch.no_grad()
def diffusion_table(model, tokens, prompt_len, kind, rng, causal=False):
    """CE[m - 1, r - 1]: the mean cross-entropy of the masked token of rank r when m are masked, in
    nats, (A, A); 0 where r > m."""
    B, T = tokens.shape
    rows = []
    for m in range(1, T - prompt_len + 1):
        rank, masked = (x.to(tokens.device)
                        for x in random_rank(B, T, prompt_len, m, rng, causal))
        ce = cross_entropy(model, tokens, torch.where(masked, model.mask, tokens), rank, kind)
        rank = (rank - (T - m if causal else 0)).clamp(min=0)
        by_rank = ce.new_zeros(B, T + 1).scatter(1, rank, ce)            # column 0: clean tokens
        rows.append(by_rank[:, 1:T - prompt_len + 1].mean(0))
    return torch.stack(rows).cpu()


def diffusion_nats(table, kind, n_latent):
    """Nats for an answer that is decoded in uniformly random order: the sum over m = A..1 of the
    cross-entropy of one token. In SCDM with k latent tokens that is the token of rank k + 1, or the
    last one if fewer are masked; in MDM and SIDM the masked tokens have no order and their mean
    has the least variance."""
    if kind == "semicausal":
        return sum(row[min(n_latent, m)].item() for m, row in enumerate(table))
    return sum(row[:m + 1].mean().item() for m, row in enumerate(table))


# 5. decoders ----------------------------------------------------------------------------------
# One token a step. Both return the filled tokens, (B, T), and the number of forward tokens: how
# many positions went through the transformer for one puzzle, the honest unit of inference cost.
# With causal context a known token is computed once, masked ones again in every pass.
# on_step(tokens, positions, logits, place) may watch how the first puzzle is solved.


def sample(logits, greedy, generator):
    """logits (B, V) -> tokens (B,): drawn at temperature 1, or the most probable ones."""
    if greedy:
        return logits.argmax(-1)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


@torch.no_grad()
def decode_left_to_right(model, tokens, prompt_len, window, greedy=False, generator=None,
                         causal=False, on_step=None):
    """AR+MTP with a window of masked tokens, of which only the first is decoded and the others are
    latent; window 0 is AR, which reads what is known and one start slot."""
    B, T = tokens.shape
    tokens = torch.where(torch.arange(T, device=tokens.device) < prompt_len, tokens, model.mask)
    causal = causal or window == 0
    cache, cached, forward_tokens = {} if causal else None, 0, 0
    for cut in range(prompt_len, T):
        present = tokens[:, :cut + max(1, window)]               # what is absent is not computed
        if window == 0:
            present = next_token(present, prompt_len, model.mask)[0]
        cuts = torch.full((1, 1), cut, device=tokens.device)
        rank, _ = window_rank(present.shape[1], cuts, max(1, window), causal)
        n_known = cut + (window == 0)                     # AR's slots all hold what is known
        positions = torch.arange(cached, present.shape[1], device=tokens.device)[None]
        visible = visibility(rank, "causal" if causal else "joint")[:, cached:]
        logits = model(present[:, cached:], positions, visible, cache, n_known)
        tokens[:, cut] = sample(logits[:, cut - cached], greedy, generator)
        forward_tokens += positions.shape[1]
        cached = n_known if causal else 0
        if on_step:
            on_step(tokens, positions, logits, cut)
    return tokens, forward_tokens


@torch.no_grad()
def decode_any_order(model, tokens, prompt_len, kind, n_latent, candidates=8, greedy=False,
                     generator=None, causal=False, on_step=None):
    """Masked diffusion with k latent tokens (MDM: all, SIDM: 0). At every step random masked
    positions are the candidates, k others are latent, and the rest does not go through the model.
    The candidate whose best token is most probable is decoded: top-prob order; with one candidate
    the order is uniform."""
    B, T = tokens.shape
    tokens = torch.where(torch.arange(T, device=tokens.device) < prompt_len, tokens, model.mask)
    places = torch.arange(T, device=tokens.device).expand(B, T)
    known, unknown = places[:, :prompt_len], places[:, prompt_len:]
    cache, cached, forward_tokens = {} if causal else None, 0, 0
    for m in range(T - prompt_len, 0, -1):
        shuffle = torch.rand(B, m, generator=generator, device=tokens.device).argsort(1)
        unknown = unknown.gather(1, shuffle)                                               # (B, m)
        c = min(candidates, m)
        k = min(n_latent, m - c)
        n_known = T - m
        positions = torch.cat([known[:, cached:], unknown[:, c:c + k], unknown[:, :c]], dim=1)
        # For two known, one latent and two candidates: 0 0 1 2 2; with causal context 1 2 3 4 4.
        rank = torch.arange(1 - n_known, k + c + 1, device=tokens.device).clamp(max=k + 1)
        rank = rank + n_known if causal else rank.clamp(min=0)
        visible = visibility(rank[None], kind)[:, cached:]
        logits = model(tokens.gather(1, positions), positions, visible, cache, n_known)
        candidate = logits[:, -c:]                                                      # (B, c, V)
        best = candidate.softmax(-1).amax(-1).argmax(1, keepdim=True)                      # (B, 1)
        token = sample(candidate.take_along_dim(best[..., None], 1)[:, 0], greedy, generator)
        place = unknown.gather(1, best)                                                    # (B, 1)
        tokens = tokens.scatter(1, place, token[:, None])
        known = torch.cat([known, place], dim=1)
        unknown = unknown.scatter(1, best, unknown[:, -1:])[:, :-1]    # the last one fills the gap
        forward_tokens += positions.shape[1]
        cached = n_known if causal else 0
        if on_step:
            on_step(tokens, positions, logits, place[0].item())
    return tokens, forward_tokens


# 6. training ----------------------------------------------------------------------------------

# What makes a model what it is, and the part of it that all models in an output folder share.
OF_THE_FOLDER = ("task", "size", "givens", "prompt", "steps", "batch_size", "lr", "layers", "heads",
                 "width")
OF_THE_MODEL = ("system", "window", "seed", *OF_THE_FOLDER)
CONTEXT = multiprocessing.get_context("spawn")      # safe with CUDA, and the same on all platforms
# Ctrl-C sets STOP: every training ends after its step and is saved. Under torchrun it ends at once,
# and the last minute is lost.
STOP = CONTEXT.Event()
# torchrun tells which of how many processes this one is; they share every batch.
DDP_RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
BAR = 0                                             # the line of this process's progress bar


class RunError(Exception):
    """What ends a run and can be said in one line. The scripts exit with status 2."""


# Three functions know one device from another. Everything else runs on any.


def choose_device(name):
    """auto is the first of CUDA, MPS and CPU that is there. Under torchrun every process takes a
    GPU of its own."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
             "cpu": True}
    there = [device for device, is_there in there.items() if is_there]
    if name not in ("auto", *there):
        raise RunError(f"--device: no {name} here, only auto, {', '.join(there)}")
    device = there[0] if name == "auto" else name
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return device


def autocast(device):
    """bf16 for the large products on a GPU that has it, not one that emulates it; else float32."""
    bf16 = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device, torch.bfloat16, enabled=bf16)


def side_by_side(device):
    """How many models to train at once: several small ones keep the cores of a CPU busier than
    several cores one small model, and three on two cores end together."""
    return 3 * torch.get_num_threads() // 2 if device == "cpu" else 1


def optimizers(model, lr):
    """Muon (Jordan et al., kellerjordan.github.io/posts/muon) for the matrices in the blocks, AdamW
    for the rest: in the same minutes more accurate than AdamW alone."""
    matrices = [w for w in model.blocks.parameters() if w.dim() == 2]
    others = [w for w in model.parameters() if id(w) not in map(id, matrices)]
    return [torch.optim.Muon(matrices, lr, weight_decay=0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr, betas=(0.9, 0.98), weight_decay=0, fused=True)]


def schedule(step, steps):
    """The learning rate's factor: a short warm-up, constant, then linear to 5 % in the 2nd half."""
    return min(1, (step + 1) / 100, 0.05 + 1.9 * (1 - step / steps))


def train(task, args, model, objective, decode):
    """Train a model, or load it if a checkpoint is given, and keep two checkpoints of it, the last
    and the best; returns for the results how long that took, and its probes.

    objective(tokens, rng) -> inputs, rank, weight, and positions if they are not one for every
    token. decode as in `solve`, with the most latent tokens of the sweep: about ten times in a
    training it probes how many of 64 training puzzles are solved. Data and masks of a step follow
    from (seed, step) alone, so a resumed run goes on exactly and no random state needs saving."""
    path = args.out / f"{job_name(args)}.pt"
    opts = optimizers(model, args.lr)
    source, first, seconds, probes = args.checkpoint or path, 0, 0.0, []
    if args.checkpoint or (args.resume and path.exists()):
        saved = load(source, settings(args))
        try:
            model.load_state_dict(saved["model"])
            for opt, state in zip(opts, saved["optimizers"]):
                opt.load_state_dict(state)
        except (RuntimeError, ValueError):
            raise RunError(f"{source}: a damaged checkpoint, or one of another model") from None
        first, seconds, probes = saved["step"], saved["seconds"], saved["probes"]
    if args.checkpoint:
        return {"train_minutes": seconds / 60, "probes": probes}
    if STOP.is_set():                               # Ctrl-C came while this job waited
        raise KeyboardInterrupt
    network = torch.compile(model) if args.compile else model
    network = nn.parallel.DistributedDataParallel(network) if WORLD_SIZE > 1 else network
    started = saved_at = time.time()
    bar = tqdm(range(first, args.steps), job_name(args), args.steps, initial=first,
               position=BAR, dynamic_ncols=True, disable=DDP_RANK > 0)
    for step in bar:
        rng = np.random.default_rng((args.seed, step))
        tokens = torch.from_numpy(task.batch(args.batch_size, rng, "train"))
        batch = (tokens, *objective(tokens, rng))
        tokens, inputs, rank, weight, *positions = (                    # this process's share
            x[DDP_RANK::WORLD_SIZE].to(args.device, non_blocking=True) for x in batch)
        with autocast(args.device):
            ce = cross_entropy(network, tokens, inputs, rank, KIND[args.system], *positions)
        loss = WORLD_SIZE * (weight * ce).sum()             # over processes gradients are averaged
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        lr = args.lr * schedule(step, args.steps)
        for opt in opts:
            opt.param_groups[0]["lr"] = lr
            opt.step()
            opt.zero_grad()
        if DDP_RANK > 0:
            continue                                # the first process checks, saves and shows

        probing = (step + 1) % max(1, args.steps // 10) == 0 or step + 1 == args.steps
        saving = probing or STOP.is_set() or time.time() - saved_at > 60
        if saving or step % 50 == 0:                        # .item() waits for the device
            if not math.isfinite(loss.item() + norm.item()):
                last = f"the last good checkpoint is {path}" if path.exists() else "no checkpoint"
                raise RunError(f"{job_name(args)}: loss {loss.item()}, gradient {norm.item()} at "
                               f"step {step}, learning rate {lr:.2g}; {last}")
            if probing:
                right = solve(task, args, 64, "train", decode)[1]
                probes.append([step + 1, right.mean().item()])
            so_far = f", accuracy {probes[-1][1]:.0%}" if probes else ""
            bar.set_postfix_str(f"loss {loss.item():.3f}{so_far}")
        if saving:
            saved_at = time.time()
            content = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in opts],
                       "step": step + 1, "seconds": seconds + saved_at - started,
                       "probes": probes, "settings": settings(args)}
            if probing and probes[-1][1] == max(accuracy for _, accuracy in probes):
                write(path.with_suffix(".best.pt"), lambda file: torch.save(content, file))
            write(path, lambda file: torch.save(content, file))
            if STOP.is_set():
                raise KeyboardInterrupt
    return {"train_minutes": (seconds + time.time() - started) / 60, "probes": probes}


def job_name(args):
    """What names a model: its system, its window if it has one, and its seed."""
    return "-".join(str(part) for part in (args.system, args.window, f"s{args.seed}") if part)


def settings(args):
    """What makes a model what it is, as checkpoints and results hold it."""
    return {name: getattr(args, name) for name in OF_THE_MODEL}


def write(path, write_to):
    """Write a file whole or not at all: a temporary file, then a rename."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write_to(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"--out: cannot write {path} (what was there is intact): {reason}") from None


def load(path, expected={}):
    """Read a checkpoint. Refuse what is none, and one of other settings than those expected."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        found = {name: saved["settings"][name] for name in OF_THE_MODEL}
        [saved[x] for x in ("model", "optimizers", "step", "seconds", "probes")]
    except FileNotFoundError:
        raise RunError(f"{path}: no such checkpoint") from None
    except Exception:
        raise RunError(f"{path}: not a checkpoint of this version of latent, or damaged") from None
    for name, value in expected.items():
        if found[name] != value:
            raise RunError(f"{path}: is a checkpoint with {name} {found[name]}, not {value}")
    return saved


# 7. around it ---------------------------------------------------------------------------------
# What both scripts share; a reader of the method may stop here.


class Parser(argparse.ArgumentParser):
    """An argparse whose complaints are one line."""

    def error(self, message):
        self.exit(2, None if DDP_RANK else f"{self.prog}: {message}\n")


def at_least(least, kind=int, words=()):
    """An argparse type: a finite number, not below `least`, or one of some words."""
    def number(text):
        if text in words:
            return text
        try:
            if least <= kind(text) < math.inf:
                return kind(text)
        except ValueError:
            pass
        expected = f"a {'whole ' * (kind is int)}number of at least {least}"
        raise argparse.ArgumentTypeError(
            f"expected {' or '.join([expected, *words])}, not {text!r}")
    return number


def common_flags(description, tasks, systems, default_systems):
    """The flags that both scripts have, [defaults] in brackets; each script adds its own."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    sizes = "; ".join(f"{t.name}: {' '.join(t.sizes)} [{t.default_size}]" for t in tasks.values())
    flag("--task", default="sudoku", choices=list(tasks), help="the puzzle [%(default)s]")
    flag("--size", help=f"its size and [default]: {sizes} (houses x attributes)")
    flag("--givens", nargs=2, type=at_least(0), metavar=("FEWEST", "MOST"),
         help="sudoku-puzzle: how many digits a puzzle shows")
    flag("--prompt", choices=["grid", "list"],
         help="sudoku-puzzle: a grid with blanks [grid], or a list of cells and digits")
    flag("--systems", nargs="+", default=default_systems, choices=systems,
         help=f"what to train [{' '.join(default_systems)}]")
    flag("--latents", nargs="+", metavar="K", type=at_least(0, words=["all"]),
         help="numbers of latent tokens to sweep; if not given 0, powers of two up to half "
         "the answer, and all; MDM, SIDM, AR and fixed windows have one number only")
    flag("--steps", type=at_least(1), default=3600, help="training steps [%(default)s]")
    flag("--batch-size", type=at_least(1), default=64, help="puzzles in a step [%(default)s]")
    flag("--lr", type=at_least(0, float), default=5e-3, help="highest learning rate [%(default)s]")
    flag("--layers", type=at_least(1), default=3, help="transformer blocks [%(default)s]")
    flag("--heads", type=at_least(1), default=4, help="attention heads in a block [%(default)s]")
    flag("--width", type=at_least(1), default=64, help="width of the residual stream [%(default)s]")
    flag("--seeds", nargs="+", type=at_least(0), default=[0],
         help="everything once for each seed [0]")
    flag("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"],
         help="auto: the first of cuda, mps, cpu that is there [auto]")
    flag("--compile", action="store_true", help="train with torch.compile")
    flag("--jobs", type=at_least(0), default=0,
         help="models side by side; 0: three for two cores, or one on a GPU [0]")
    flag("--samples", type=at_least(1), default=1024,
         help="puzzles in each evaluation [%(default)s]")
    flag("--greedy", action="store_true", help="decode the most probable token, do not sample")
    flag("--watch", action="store_true",
         help="at the end solve one puzzle step by step and show what every token predicts")
    flag("--out", type=Path, help="folder for all output; if not given out/TASK-SIZE")
    flag("--resume", action="store_true", help="go on from the checkpoints in the output folder")
    flag("--checkpoint", metavar="FILE", help="train nothing, evaluate this checkpoint; its "
         "results replace those of the same model in the output folder")
    return parser


def prepare(args, parser, tasks, make_jobs):
    """Complete and check the flags before any work is done. Returns the task, and for every model
    to train its job: the flags, and the system, window and seed of this model."""
    if args.checkpoint:                                  # the model's settings are its checkpoint's
        saved = load(args.checkpoint)
        systems = next(a.choices for a in parser._actions if a.dest == "systems")
        vars(args).update(saved["settings"])
        if args.system not in systems:
            raise RunError(f"--checkpoint: {args.checkpoint} holds {args.system}; this script "
                           f"evaluates {', '.join(systems)}")
    if args.size not in (None, *tasks[args.task].sizes):
        raise RunError(f"--size: {args.task} comes in {', '.join(tasks[args.task].sizes)}, not "
                       f"{args.size}")
    args.size = args.size or tasks[args.task].default_size
    options = {name: getattr(args, name) for name in ("givens", "prompt") if getattr(args, name)}
    for name in options:
        if name not in getattr(tasks[args.task], "options", ()):
            raise RunError(f"--{name}: {args.task} has no such option")
    try:
        task = tasks[args.task](args.size, **options)
    except ValueError as error:
        raise RunError(str(error)) from None
    if args.width % args.heads:
        raise RunError(f"--width: {args.width} is not divisible by --heads {args.heads}")
    args.device = choose_device(args.device)
    most = task.seq_len - task.prompt_len - 1
    args.latents = args.latents or [0, *(2**i for i in range((most + 1).bit_length() - 1)), most]
    args.latents = sorted({most if k == "all" else k for k in args.latents})
    if args.latents[-1] > most:
        raise RunError(f"--latents: 0 to {most}, or all, not {args.latents[-1]}")
    jobs = [{}] if args.checkpoint else make_jobs(task, args)
    args.out = args.out or Path("out") / f"{args.task}-{args.size}"
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        if not os.access(args.out, os.W_OK):
            raise PermissionError(None, "no permission")
    except OSError as error:
        raise RunError(f"--out: cannot write to {args.out}: {error.strerror}") from None
    for record in read_results(args.out):
        for name in OF_THE_FOLDER:
            if record.get(name) != getattr(args, name):
                raise RunError(f"--out: {args.out} has results with {name} {record.get(name)}, not "
                               f"{getattr(args, name)}; choose another folder")
    jobs = [argparse.Namespace(**{**vars(args), **job})
            for i, job in enumerate(jobs) if job not in jobs[:i]]               # named twice
    there = [job_name(job) for job in jobs if (args.out / f"{job_name(job)}.pt").exists()]
    if there and not args.resume and not args.checkpoint:
        raise RunError(f"--out: {args.out} has checkpoints of {', '.join(there)}; go on from them "
                       f"with --resume, or choose another folder")
    return task, jobs


def start_worker(stop, lock, bars, threads):
    """Make a new process one of several: they share Ctrl-C, the terminal and the cores, and when
    the parent dies, they end: an orphan would write checkpoints beside a resumed run."""
    def follow_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    global STOP, BAR
    threading.Thread(target=follow_parent, daemon=True).start()
    STOP, BAR = stop, bars.get()
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # for Windows, where it is not inherited
    tqdm.set_lock(lock)
    torch.set_num_threads(threads)


def run(args, task, jobs, experiment):
    """Run experiment(task, job) for every job and add its records to results.json: some jobs side
    by side, each in a process of its own; under torchrun one by one, all processes together (they
    share the training; each evaluates by itself, and what the first one finds counts)."""
    if WORLD_SIZE > 1:
        torch.distributed.init_process_group()
        for job in jobs:
            records = experiment(task, job)
            if DDP_RANK == 0:
                add_results(args.out, records)
        torch.distributed.destroy_process_group()
        return
    width = min(len(jobs), args.jobs or side_by_side(args.device))
    bars = CONTEXT.SimpleQueue()
    for line in range(width):
        bars.put(line)
    worker = (STOP, CONTEXT.RLock(), bars, max(1, torch.get_num_threads() // width))
    pool = concurrent.futures.ProcessPoolExecutor(width, CONTEXT, start_worker, worker)
    try:
        # Workers inherit this (not on Windows): their parent alone hears Ctrl-C, and sets STOP.
        hear = signal.signal(signal.SIGINT, signal.SIG_IGN)
        futures = [pool.submit(experiment, task, job) for job in jobs]
        signal.signal(signal.SIGINT, hear)
        for future in concurrent.futures.as_completed(futures):
            add_results(args.out, future.result())
    except BaseException:                                  # the other trainings save and end, too
        STOP.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def add_results(folder, records):
    """Merge records into the folder's results.json, in place of those with the same names."""
    names = ("system", "window", "order", "candidates", "greedy", "n_latent", "seed")
    results = {tuple(str(r.get(name)) for name in names): r
               for r in [*read_results(folder), *records]}
    text = json.dumps([results[key] for key in sorted(results)], indent=1)
    write(folder / "results.json", lambda file: file.write_text(text))


def main(parser, tasks, make_jobs, experiment):
    """The main function of both scripts."""
    args, status = parser.parse_args(), 0
    try:
        task, jobs = prepare(args, parser, tasks, make_jobs)
        run(args, task, jobs, experiment)
    except KeyboardInterrupt:
        status = 130
    except RunError as error:
        parser.error(str(error))
    except concurrent.futures.BrokenExecutor:
        parser.error("a process was killed, perhaps for want of memory; --resume goes on, and "
                     "a smaller --jobs trains fewer at once")
    except torch._dynamo.exc.TorchDynamoException as error:
        parser.error(f"--compile: {str(error).splitlines()[0]}")
    if DDP_RANK == 0 and args.out:
        results = read_results(args.out)
        print(table(results))
        if results:
            draw(results, args.out / "latents.png")
    parser.exit(status, "Interrupted; --resume goes on from here.\n" if status else None)


def new_model(task, args):
    """A fresh model for the task, on its device."""
    config = Config(task.vocab_size, task.seq_len, args.layers, args.heads, args.width)
    model = Transformer(config, torch.Generator().manual_seed(args.seed))
    return model.to(args.device)


def puzzles(task, args, n, rng, split):
    """n puzzles of a split, on the device, at most 128 at a time."""
    for i in range(0, n, 128):
        if split == "test" and STOP.is_set():              # a training saves before it ends
            raise KeyboardInterrupt
        yield torch.from_numpy(task.batch(min(128, n - i), rng, split)).to(args.device)


def solve(task, args, n, split, decode):
    """Let decode(tokens, generator=...) -> filled, forward_tokens solve n puzzles of a split.
    Returns filled (n, T), which are right (n,), the forward tokens and the seconds of decoding."""
    rng = np.random.default_rng((args.seed, 2**32))        # steps use (seed, step < 2**32)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    batches, seconds = [], 0.0
    for tokens in puzzles(task, args, n, rng, split):
        started = time.time()
        filled, forward_tokens = decode(tokens, generator=generator)
        batches.append(filled.cpu().numpy())
        seconds += time.time() - started
    filled = np.concatenate(batches)
    return filled, task.correct(filled), forward_tokens, seconds


def held_out_mean(task, args, measure):
    """The mean of measure(tokens, rng), a number or a tensor, over --samples held-out puzzles."""
    rng = np.random.default_rng((args.seed, 2**32 + 1))
    batches = puzzles(task, args, args.samples, rng, "test")
    return sum(measure(tokens, rng) * len(tokens) for tokens in batches) / args.samples


def evaluate(task, args, model, n_latent, decode, nats, training, order=None, candidates=None):
    """Decode --samples test puzzles; returns one record for results.json. Two controls: of the
    valid boards generated, which share was `unseen` in training; and which share of the answers
    is right by `chance`, for the prompt of another puzzle."""
    filled, right, forward_tokens, seconds = solve(task, args, args.samples, "test", decode)
    accuracy = right.mean().item()
    if args.watch and DDP_RANK == 0:
        tqdm.write(watch(task, args, f"{job_name(args)}, latent tokens: {n_latent}", decode))
    unseen = chance = None
    if task.prompt_len:
        prompt, answer = np.split(filled, [task.prompt_len], axis=1)
        other = np.concatenate([np.roll(prompt, 1, axis=0), answer], axis=1)
        chance = task.correct(other).mean().item()
    elif right.any():              # near 10 %: it learnt the rules; near 0: it recites training
        unseen = task.held_out(filled[right]).mean().item()
    return {**settings(args), **training, "n_latent": n_latent, "order": order,
            "candidates": candidates, "greedy": args.greedy, "samples": args.samples,
            "accuracy": accuracy,
            "stderr": math.sqrt(accuracy * (1 - accuracy) / args.samples), "unseen": unseen,
            "chance": chance, "nats": nats, "nats_floor": task.floor_nats,
            "forward_tokens": forward_tokens, "ms_per_puzzle": 1000 * seconds / args.samples,
            "params": sum(w.numel() for w in model.parameters()),
            "device": args.device, "torch": torch.__version__}


def watch(task, args, title, decode):
    """Solve one test puzzle, and show as text what every token in every pass predicts."""
    terminal, frames = sys.stdout.isatty(), []

    def on_step(tokens, positions, logits, place):
        shown, sure = tokens[0].tolist(), {}
        for position, probabilities in zip(positions[0].tolist(), logits[0].softmax(-1)):
            if tokens[0, position] >= task.vocab_size:                          # still a mask
                shown[position] = probabilities.argmax().item()
                sure[position] = probabilities.amax().item()

        def mark(position, text):
            style, cell = 1, f" {text}     "                                    # known: bold
            if position == place:
                style, cell = 7, f"[{text}]    "                                # reversed
            elif position in sure:
                style, cell = 2, f" {text} {100 * sure[position]:3.0f}%"          # faint
            elif shown[position] >= task.vocab_size:
                style, cell = 0, " " * len(cell)
            return f"\033[{style}m{cell}\033[0m" if terminal else cell

        frames.append(f"step {len(frames) + 1}: {len(sure)} predicted but not decoded\n"
                      + task.show(shown, mark))

    right = solve(task, args, 1, "test", partial(decode, on_step=on_step))[1]
    verdict = "right" if right[0] else "wrong"
    legend = ("[x] is decoded in this step; x 83% is predicted, as sure as that, and not decoded; "
              "what is blank is not in this pass")
    return "\n\n".join([f"{title}\n{legend}", *frames, f"The answer is {verdict}."])


def read_results(folder):
    """The records of results.json in a folder, [] if there is none."""
    try:
        return [dict(record) for record in json.loads((folder / "results.json").read_text())]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError):
        raise RunError(f"--out: {folder}/results.json is not a list of results") from None


def summary(results):
    """One row for each system and number of latent tokens: the means over seeds, and the standard
    error of the accuracy (over seeds if there are several, else that of the sample)."""
    groups = {}
    for r in results:
        system = {"mtp": "AR+MTP", "mtp-causal": "AR+MTP causal", "mtp-cuts": "AR+MTP causal cuts",
                  "control": "control",
                  "scdm-causal": "SCDM causal"}.get(r["system"], r["system"].upper())
        order = f"top-prob of {r.get('candidates')}" if r["order"] == "top-prob" else r["order"]
        name = " ".join(str(x) for x in (system, r["window"], order) if x) + " greedy" * r["greedy"]
        groups.setdefault((name, r["n_latent"]), []).append(r)
    rows = []
    means = ("accuracy", "stderr", "nats", "nats_floor", "forward_tokens", "ms_per_puzzle",
             "train_minutes", "unseen", "chance")                      # NaN where one is unknown
    for (name, n_latent), records in sorted(groups.items()):
        row = {key: np.array([r.get(key) for r in records], float).mean() for key in means}
        if len(records) > 1:
            row["stderr"] = np.std([r["accuracy"] for r in records], ddof=1) / len(records) ** 0.5
        rows.append({**records[0], **row, "name": name, "seeds": len(records)})
    return rows


def table(results):
    """The summary as text. Excess nats are those above the floor, where it is known."""
    lines = ["system                           latents   accuracy %     nats   excess"
             "   forward tokens   ms/puzzle   minutes   seeds   unseen %   chance %"]
    for r in summary(results):
        lines.append(f"{r['name']:<33}{r['n_latent']:>7}{100 * r['accuracy']:>8.1f} "
                     f"±{100 * r['stderr']:>3.1f}{r['nats']:>9.2f}"
                     f"{r['nats'] - r['nats_floor']:>9.2f}{r['forward_tokens']:>17.0f}"
                     f"{r['ms_per_puzzle']:>12.2f}{r['train_minutes']:>10.1f}{r['seeds']:>8}"
                     f"{100 * r['unseen']:>11.1f}{100 * r['chance']:>11.1f}")
    return "\n".join(lines).replace("nan", "  -")


def draw(results, path):
    """The figure: accuracy and excess nats over latent tokens, accuracy over forward tokens.
    Uniform order and greedy are left out, unless there is nothing else."""
    try:
        import matplotlib
    except ImportError:
        print("For a figure: pip install matplotlib, then the same command with --resume.")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, panels = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    shown = [r for r in results if r["order"] != "uniform" and not r["greedy"]] or results
    curves, ticks = {}, sorted({r["n_latent"] for r in shown})
    for row in summary(shown):
        curves.setdefault(row["name"], []).append(row)
    for name, rows in curves.items():
        marker = dict(marker="o") if len(rows) > 1 else dict(marker="*", markersize=12)
        style = dict(label=name, capsize=3, **marker)
        x, accuracy, error = ([r[key] for r in rows] for key in ("n_latent", "accuracy", "stderr"))
        panels[0].errorbar(x, accuracy, error, **style)
        excess = [row["nats"] - np.nan_to_num(row["nats_floor"]) for row in rows]
        panels[1].errorbar(x, excess, **style)
        panels[2].errorbar([row["forward_tokens"] for row in rows], accuracy, error, **style)
    for panel in panels[:2]:
        panel.set_xscale("symlog", linthresh=1)
        panel.set_xticks(ticks, ticks)
        panel.set_xticks([], minor=True)
        panel.set_xlabel("latent tokens")
    panels[0].set(ylabel="accuracy", ylim=(0, 1))
    panels[1].set(ylabel="nats for an answer, above the floor if it is known", ylim=(0, None))
    panels[2].set(xlabel="forward tokens for a puzzle", ylabel="accuracy", ylim=(0, 1))
    panels[0].legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)
    print(f"The figure is {path}")


if __name__ == "__main__":
    print("Who sees whom: a row is a query, a column a key. Rank 0 is clean, 1, 2, ... is masked;\n"
          "with causal context known tokens have ranks, too, in the order of becoming known; from\n"
          "left to right these are even, and a window's is odd, 1 above the last one that it sees.")
    for title, system, rank in (("AR", "ar", [2, 4, 6, 8]),
                                ("AR+MTP, window 3 of 4", "mtp", [0, 0, 1, 2, 3, -1]),
                                ("AR+MTP, causal prefix", "mtp-causal", [2, 4, 5, 5, 5, -1]),
                                ("AR+MTP, two cuts", "mtp-cuts", [2, 4, 6, 8, 3, 3, 7, -1]),
                                ("MDM", "mdm", [0, 3, 0, 1, 2, 4]),
                                ("SIDM", "sidm", [0, 3, 0, 1, 2, 4]),
                                ("SCDM", "scdm", [0, 3, 0, 1, 2, 4]),
                                ("SCDM, causal context", "scdm-causal", [2, 5, 1, 3, 4, 6])):
        print(f"\n{title:<24}rank " + " ".join("-" if r < 0 else str(r) for r in rank))
        for r, row in zip(rank, visibility(torch.tensor([rank]), KIND[system])[0]):
            if r >= 0:                                              # -1, shown as -, is absent
                print(f"{r:>28} " + " ".join("x" if seen else "." for seen in row))
