"""What must always hold. Every reference here is naive: loops, enumeration, brute force."""
import argparse
import ast
import itertools
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import latent
import train_ar
import train_diffusion
from data import TASKS
from data.countdown import Countdown
from data.sudoku import Sudoku, fill
from data.zebra import Zebra

torch.set_num_threads(1)
HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def not_stopped():
    """An earlier run in this process may have set STOP."""
    latent.STOP.clear()


def small_model(vocab_size=4, seq_len=12, seed=0):
    """A transformer with random weights everywhere, so that every path through it matters."""
    model = latent.Transformer(latent.Config(vocab_size, seq_len, 2, 2, 16))
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.4, generator=generator)
    return model.eval()


class Spy(nn.Module):
    """Records every call of the model that it wraps."""

    def __init__(self, model):
        super().__init__()
        self.model, self.mask, self.calls = model, model.mask, []

    def forward(self, tokens, positions, visible, *cache):
        logits = self.model(tokens, positions, visible, *cache)
        self.calls.append((tokens, positions.expand(tokens.shape), visible, logits))
        return logits


class Oracle(nn.Module):
    """Knows all solutions: its logits are the true distribution of every token, given the clean
    tokens. With `shifted` it reads what AR reads: slot i holds token i - 1."""

    def __init__(self, solutions, vocab_size, shifted=False):
        super().__init__()
        self.solutions, self.mask, self.shifted = solutions, vocab_size, shifted

    def forward(self, tokens, positions, visible, cache=None, n_known=0):
        positions, n_new = positions.expand(tokens.shape), tokens.shape[1]
        if cache is not None:
            tokens = torch.cat([cache.get("tokens", tokens[:, :0]), tokens], dim=1)
            positions = torch.cat([cache.get("positions", positions[:, :0]), positions], dim=1)
            cache.update(tokens=tokens[:, :n_known], positions=positions[:, :n_known])
        logits = torch.full((*tokens.shape, self.mask), -1e9)
        for b, (row, places) in enumerate(zip(tokens, positions)):
            if self.shifted:
                prefixes = [self.solutions[(self.solutions[:, :i] == row[1:i + 1]).all(1)]
                            for i in range(len(row))]
            else:
                clean = row != self.mask
                match = (self.solutions[:, places[clean]] == row[clean]).all(1)
                prefixes = [self.solutions[match]] * len(row)
            for i, place in enumerate(places):
                share = torch.bincount(prefixes[i][:, place], minlength=self.mask).float()
                logits[b, i] = (share / share.sum()).clamp(min=1e-30).log()
        return logits[:, -n_new:]


def all_boards(side):
    boards = fill(side)
    renamed = [np.array(names)[boards] for names in itertools.permutations(range(side))]
    return torch.from_numpy(np.concatenate(renamed)).long()


# who sees whom ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["joint", "independent", "semicausal", "causal"])
def test_visibility_is_the_table(kind):
    ranks = [[0, 3, 0, 1, 2, 4], [0, 0, 1, 2, 3, -1], [1, 2, 3, 4, 5, 6], [0, 0, 0, -1, -1, 1],
             [2, 4, 5, 5, 5, -1], [2, 4, 6, 3, 3, 5]]
    visible = latent.visibility(torch.tensor(ranks), kind)
    for b, rank in enumerate(ranks):
        for q, k in itertools.product(range(6), range(6)):
            if q == k:
                expected = True
            elif rank[k] < 0:
                expected = False
            elif kind == "causal":
                expected = 0 < rank[k] <= rank[q] and (rank[k] % 2 == 0 or rank[k] == rank[q])
            elif rank[k] == 0 or kind == "joint":
                expected = True
            else:
                expected = kind == "semicausal" and 0 < rank[k] < rank[q]
            assert visible[b, q, k] == expected, (kind, rank, q, k)


def test_attention_is_a_naive_softmax():
    model = small_model().double()
    block, heads = model.blocks[0], 2
    x = torch.randn(3, 6, 16, dtype=torch.float64)
    visible = latent.visibility(torch.tensor([[0, 3, 0, 1, 2, 4]] * 3), "semicausal")
    normed = block.attention_norm(x)
    q, k, v = (normed @ w.T for w in block.qkv.weight.split(16))
    y = torch.zeros_like(x)
    for b, i, h in itertools.product(range(3), range(6), range(heads)):
        part = slice(8 * h, 8 * h + 8)
        queries, keys = (x[b, :, part] / (x[b, :, part] ** 2).mean(1, keepdim=True).sqrt()
                         for x in (q, k))
        scores = {j: math.exp((block.gain[h, 0, 0] * queries[i] @ keys[j]).item() / math.sqrt(8))
                  for j in range(6) if visible[b, i, j]}
        y[b, i, part] = sum(s * v[b, j, part] for j, s in scores.items()) / sum(scores.values())
    x1 = x + y @ block.attention_out.weight.T
    hidden = block.mlp_norm(x1) @ block.mlp_in.weight.T
    expected = x1 + (hidden.clamp(min=0) ** 2) @ block.mlp_out.weight.T
    torch.testing.assert_close(block(x, visible[:, None])[0], expected)


@pytest.mark.parametrize("system", latent.KIND)
def test_who_cannot_influence_whom(system):
    """Change one token's embedding: bit-identical logits wherever the table says 'no', others
    elsewhere. One layer, since with two a clean token would carry what it saw."""
    model = latent.Transformer(latent.Config(4, 12, 1, 2, 16))
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.4)
    rank = {"ar": [2, 4, 6, 8, 10, 12], "mtp": [0, 0, 1, 2, 3, -1],
            "mtp-causal": [2, 4, 5, 5, 5, -1], "mtp-cuts": [2, 4, 6, 3, 3, 5],
            "scdm-causal": [2, 5, 1, 3, 4, 6]}.get(system, [0, 3, 0, 1, 2, 4])
    visible = latent.visibility(torch.tensor([rank]), latent.KIND[system])
    tokens, positions = torch.randint(4, (1, 6)), torch.arange(6)[None]
    before = model(tokens, positions, visible)
    for key in range(6):
        moved = positions.clone()
        moved[0, key] = 11
        changed = (model(tokens, moved, visible) != before).any(-1)[0]
        assert changed.tolist() == visible[0, :, key].tolist(), key


@pytest.mark.parametrize("kind", ["independent", "semicausal"])
def test_a_clean_token_never_depends_on_a_masked_one(kind):
    model = small_model()                                       # two layers: no path at all
    rank = torch.tensor([[0, 3, 0, 1, 2, 4]])
    tokens, positions = torch.tensor([[1, 4, 2, 4, 4, 4]]), torch.arange(6)[None]
    before = model(tokens, positions, latent.visibility(rank, kind))
    for key in range(6):
        if rank[0, key] > 0:
            moved = positions.clone()
            moved[0, key] = 11
            same = (model(tokens, moved, latent.visibility(rank, kind)) == before).all(-1)[0]
            earlier = (rank[0] < rank[0, key]) | (kind == "independent") & (rank[0] != rank[0, key])
            assert (same == earlier).all()


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION,
                                     SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION],
                         ids=lambda backend: backend.name)
@pytest.mark.parametrize("kind", ["joint", "independent", "semicausal", "causal"])
def test_every_attention_backend_is_a_naive_softmax(backend, kind):
    """Forward and backward, with rows that see only themselves; no NaN anywhere."""
    device = latent.choose_device("auto")
    rank = torch.tensor([[0, 3, 0, 1, 2, 4], [1, 2, 3, 4, 5, 6], [0, 0, 1, -1, -1, -1]])
    visible = latent.visibility(rank, kind)
    assert (visible.sum(-1) == 1).any() or kind == "joint"
    generator = torch.Generator().manual_seed(0)
    q, k, v, upstream = torch.randn(4, 3, 2, 6, 16, generator=generator).unbind()
    parts = [x.clone().to(device).requires_grad_() for x in (q, k, v)]
    try:
        with sdpa_kernel(backend):
            out = nn.functional.scaled_dot_product_attention(
                *parts, attn_mask=visible[:, None].to(device))
            out.backward(upstream.to(device))
    except RuntimeError as error:
        assert "No available kernel" in str(error) or "No viable backend" in str(error), error
        pytest.skip(f"{backend.name} is not available on {device} with boolean masks")
    naive = [x.double().requires_grad_() for x in (q, k, v)]
    scores = (naive[0] @ naive[1].transpose(2, 3) / 4).exp() * visible[:, None]
    expected = scores / scores.sum(-1, keepdim=True) @ naive[2]
    expected.backward(upstream.double())
    torch.testing.assert_close(out.cpu(), expected.float(), rtol=1e-4, atol=1e-5)
    for part, reference in zip(parts, naive):
        torch.testing.assert_close(part.grad.cpu(), reference.grad.float(), rtol=1e-4, atol=1e-5)


# training = decoding ----------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("n_latent", [0, 1, 3, 7])
def test_scdm_trains_what_it_decodes(n_latent, causal):
    """The logits of a candidate are those of its rank in a training pass over the full sequence in
    which exactly the same masked tokens come before it: with causal context cached = uncached."""
    model, prompt_len, T = small_model(), 3, 12
    spy = Spy(model)
    tokens = torch.randint(4, (5, T))
    latent.decode_any_order(spy, tokens, prompt_len, "semicausal", n_latent, 2, causal=causal)
    known = [[] for _ in range(5)]                      # places in the order of becoming known
    full = torch.full((5, T), model.mask)
    for inputs, positions, _, logits in spy.calls:
        c = min(2, (inputs == model.mask).sum(1)[0].item())
        for b in range(5):
            new = inputs[b] != model.mask
            known[b] = (known[b] if causal else []) + positions[b, new].tolist()
            full[b, positions[b, new]] = inputs[b, new]
            latents = positions[b, new.sum():inputs.shape[1] - c]
            first = len(known[b]) + 1 if causal else 1
            for i in range(inputs.shape[1] - c, inputs.shape[1]):
                rank = torch.full((1, T), -1)
                rank[0, known[b]] = torch.arange(1, first) if causal else 0
                rank[0, latents] = torch.arange(first, first + len(latents))
                rank[0, positions[b, i]] = first + len(latents)
                rest = (rank[0] < 0).nonzero()[:, 0]
                rank[0, rest] = first + 1 + len(latents) + torch.arange(len(rest))
                trained = model(full[b:b + 1], torch.arange(T)[None],
                                latent.visibility(rank, "semicausal"))
                torch.testing.assert_close(logits[b, i], trained[0, positions[b, i]])


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("window", [1, 3, 9])
def test_multi_token_trains_what_it_decodes(window, causal):
    model, prompt_len, T = small_model(), 3, 12
    spy = Spy(model)
    out, _ = latent.decode_left_to_right(spy, torch.randint(4, (5, T)), prompt_len, window,
                                         causal=causal)
    for cut, (_, positions, _, logits) in zip(range(prompt_len, T), spy.calls):
        rank, masked = latent.window_rank(T, torch.full((5, 1), cut), window, causal)
        inputs = torch.where(masked, model.mask, out)
        trained = model(inputs, torch.arange(T)[None],
                        latent.visibility(rank, "causal" if causal else "joint"))
        torch.testing.assert_close(logits[positions == cut], trained[:, cut])


def test_ar_trains_what_it_decodes():
    model, T = small_model(), 12
    spy = Spy(model)
    out, _ = latent.decode_left_to_right(spy, torch.randint(4, (5, T)), 3, 0)
    inputs, rank, _ = latent.next_token(out, 3, model.mask)
    trained = model(inputs, torch.arange(T)[None], latent.visibility(rank, "causal"))
    for cut, (_, positions, _, logits) in zip(range(3, T), spy.calls):
        torch.testing.assert_close(logits[positions == cut], trained[:, cut])


@pytest.mark.parametrize("prompt_len", [0, 3])
def test_causal_ranks(prompt_len):
    """All ranks are there once, the prompt's first, the masked tokens' last, in any order else."""
    rng, m = np.random.default_rng(0), torch.tensor([[1], [3], [6], [6]]).repeat(500, 1)
    rank, masked = latent.random_rank(2000, prompt_len + 6, prompt_len, m, rng, causal=True)
    everyone = torch.arange(1, prompt_len + 7)
    assert (rank.sort(1).values == everyone).all() and masked.sum(1).equal(m[:, 0])
    assert (rank[:, :prompt_len] == everyone[:prompt_len]).all()
    assert masked.equal(rank > prompt_len + 6 - m)
    assert len(set(map(tuple, rank.tolist()))) > 600          # of 6! = 720 orders
    rank, masked = latent.window_rank(6, torch.tensor([[2], [5]]), 2, causal=True)
    assert rank.tolist() == [[2, 4, 5, 5, -1, -1], [2, 4, 6, 8, 10, 11]]
    assert masked.tolist() == [[False] * 2 + [True] * 2 + [False] * 2, [False] * 5 + [True]]


# objectives and nats ----------------------------------------------------------------------------


def any_order_nats(model, tokens, prompt_len, kind, causal=False):
    """The mean over all orders of the negative log-likelihood of one sequence, (1, T)."""
    answer, totals = range(prompt_len, tokens.shape[1]), []
    for order in itertools.permutations(answer):
        total = 0.0
        for step, place in enumerate(order):
            inputs, rank = tokens.clone(), torch.zeros_like(tokens)
            if causal:
                rank[0, [*range(prompt_len), *order]] = 1 + torch.arange(tokens.shape[1])
            for r, hidden in enumerate(order[step:], start=1):
                inputs[0, hidden] = model.mask
                rank[0, hidden] = r + causal * (prompt_len + step)
            positions = torch.arange(tokens.shape[1])[None]
            logits = model(inputs, positions, latent.visibility(rank, kind))
            total -= logits[0, place].log_softmax(-1)[tokens[0, place]].item()
        totals.append(total)
    return np.mean(totals)


@pytest.mark.parametrize("kind", ["joint", "independent"])
def test_diffusion_objective_is_the_any_order_likelihood(kind):
    """Weighted by A / m, the cross-entropies of what `diffusion` masks are an unbiased estimate of
    it; and so are the nats read from the table."""
    model, tokens, prompt_len, A = small_model(), torch.tensor([[1, 0, 3, 2, 2]]), 1, 4
    expected = any_order_nats(model, tokens, prompt_len, kind)
    many, rng = tokens.expand(40_000, -1), np.random.default_rng(0)
    with torch.no_grad():
        inputs, rank, weight = latent.diffusion(many, prompt_len, model.mask, rng)
        ce = latent.cross_entropy(model, many, inputs, rank, kind)
        table = latent.diffusion_table(model, many[:10_000], prompt_len, kind, rng)
    hidden = (rank > 0).float()
    m = hidden.sum(1)
    elbo = (hidden * ce).sum(1) * A / m
    assert (inputs == model.mask).equal(rank > 0) and (rank[:, :prompt_len] == 0).all()
    assert [(m == x).float().mean().item() for x in range(1, A + 1)] == pytest.approx([0.25] * A)
    torch.testing.assert_close(weight, hidden / hidden.sum())
    assert abs(elbo.mean() - expected) < 4 * elbo.std() / 200
    assert latent.diffusion_nats(table, kind, 0) == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
def test_scdm_without_latents_is_the_any_order_likelihood_of_sidm(causal):
    model, tokens = small_model(), torch.tensor([[1, 0, 3, 2, 2]])
    expected = any_order_nats(model, tokens, 1, "semicausal" if causal else "independent", causal)
    table = latent.diffusion_table(model, tokens.expand(20_000, -1), 1, "semicausal",
                                   np.random.default_rng(0), causal)
    assert latent.diffusion_nats(table, "semicausal", 0) == pytest.approx(expected, abs=0.05)
    assert latent.diffusion_nats(table, "semicausal", 3) == pytest.approx(
        table.diagonal().sum().item())     # all latents: the last rank has seen all the others


def test_next_token_loss_by_hand():
    model, tokens, prompt_len = small_model(), torch.randint(4, (3, 6)), 2
    inputs, rank, weight = latent.next_token(tokens, prompt_len, model.mask)
    loss = (weight * latent.cross_entropy(model, tokens, inputs, rank, "causal")).sum()
    losses = []
    for row, i in itertools.product(tokens, range(prompt_len, 6)):
        prefix = torch.cat([torch.tensor([model.mask]), row[:i]])[None]
        causal = torch.ones(i + 1, i + 1, dtype=torch.bool).tril()[None]
        logits = model(prefix, torch.arange(i + 1)[None], causal)[0, -1]
        losses.append(-logits.log_softmax(-1)[row[i]])
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    assert latent.next_token_nats(model, tokens, prompt_len) == pytest.approx(
        torch.stack(losses).sum().item() / 3)


@pytest.mark.parametrize("loss_on_window", [True, False])
def test_multi_token_loss_by_hand(loss_on_window):
    model, tokens, prompt_len, window = small_model(), torch.randint(4, (4, 6)), 2, 3
    rng = np.random.default_rng(0)
    inputs, rank, weight = latent.multi_token(tokens, prompt_len, model.mask, rng, window,
                                              loss_on_window)
    loss = (weight * latent.cross_entropy(model, tokens, inputs, rank, "joint")).sum()
    losses = []
    for row, cut in zip(tokens, (rank > 0).int().argmax(1).tolist()):
        present = row[:cut + window].clone()                  # what is absent is really not there
        present[cut:] = model.mask
        everything = torch.ones(1, len(present), len(present), dtype=torch.bool)
        logits = model(present[None], torch.arange(len(present))[None], everything)[0]
        for i in range(cut, len(present) if loss_on_window else cut + 1):
            losses.append(-logits[i].log_softmax(-1)[row[i]])
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    cuts = {(latent.multi_token(tokens, 2, 4, rng, 1)[1] > 0).int().argmax(1)[0].item()
            for _ in range(50)}
    assert cuts == {2}                       # stratified: four rows, four cuts, the first row first


@pytest.mark.parametrize("window", [1, 2, 4, 9])
def test_multi_token_cuts_loss_by_hand(window):
    """In a pass that many windows share every one is as in a pass of its own."""
    model, tokens, prompt_len, T = small_model(), torch.randint(4, (4, 12)), 3, 12
    inputs, rank, weight, positions = latent.multi_token_cuts(
        tokens, prompt_len, model.mask, np.random.default_rng(0), window)
    loss = (weight * latent.cross_entropy(model, tokens, inputs, rank, "causal", positions)).sum()
    first = positions[:, T::window]                            # of every window, i.e. the cuts
    assert first.shape == (4, 9 // window)
    losses = []
    for row, cut in ((row, cut) for row, cuts in zip(tokens, first.tolist()) for cut in cuts):
        present = row[:cut + window].clone()
        present[cut:] = model.mask
        visible = torch.ones(len(present), len(present), dtype=torch.bool).tril()
        visible[cut:, cut:] = True
        logits = model(present[None], torch.arange(len(present))[None], visible[None])[0]
        losses += [-logits[i].log_softmax(-1)[row[i]] for i in range(cut, len(present))]
    torch.testing.assert_close(loss, torch.stack(losses).mean())


@pytest.mark.parametrize("window", [2, 3, 5])
def test_cuts_are_distinct_and_uniform(window):
    rng, counts = np.random.default_rng(0), np.zeros(12)
    tokens = torch.zeros(3, 12, dtype=torch.int64)     # few rows: the offset matters
    for _ in range(2000):
        positions = latent.multi_token_cuts(tokens, 2, 4, rng, window)[3]
        cuts = positions[:, 12::window]
        assert (cuts.diff() > 0).all()
        counts += np.bincount(cuts.flatten(), minlength=12)
    assert counts[:2].tolist() == [0, 0]
    np.testing.assert_allclose(counts[2:], counts.sum() / 10, rtol=0.05)


def test_a_uniform_oracle_has_the_floor_as_its_nats():
    boards = all_boards(4)
    floor = Sudoku("4").floor_nats
    some = boards[torch.randperm(288, generator=torch.Generator().manual_seed(0))[:24]]
    ar, others = Oracle(boards, 4, shifted=True), Oracle(boards, 4)
    assert floor == pytest.approx(math.log(288))
    assert latent.next_token_nats(ar, some, 0) == pytest.approx(floor, abs=1e-4)
    assert latent.multi_token_nats(others, some, 0, 3) == pytest.approx(floor, abs=1e-4)
    table = latent.diffusion_table(others, some.repeat(4, 1), 0, "joint", np.random.default_rng(0))
    assert latent.diffusion_nats(table, "joint", 15) == pytest.approx(floor, abs=0.25)


# decoders ---------------------------------------------------------------------------------------


def test_forward_tokens_are_as_promised():
    model, boards = small_model(6, 36), torch.zeros(2, 36, dtype=torch.long)

    def spent(*flags):
        return latent.decode_any_order(model, boards, 0, *flags)[1]

    assert spent("joint", 35, 1) == spent("joint", 35, 8) == 36 * 36 == 1296
    assert spent("independent", 0, 1) == sum(36 - m + 1 for m in range(1, 37)) == 666
    assert spent("independent", 0, 8) == sum(36 - m + min(8, m) for m in range(1, 37)) == 890
    assert spent("semicausal", 4, 1) == sum(36 - m + 1 + min(4, m - 1) for m in range(1, 37))
    assert latent.decode_left_to_right(model, boards, 0, 0)[1] == 36        # AR has a cache
    assert latent.decode_left_to_right(model, boards, 0, 5)[1] == sum(
        min(36, c + 5) for c in range(36))

    def spent_causally(k, c):
        return latent.decode_any_order(model, boards, 0, "semicausal", k, c, causal=True)[1]

    assert spent_causally(0, 1) == 1 + 35 * 2 == 71
    assert spent_causally(4, 8) == sum((m < 36) + min(12, m) for m in range(1, 37))
    assert latent.decode_left_to_right(model, boards, 0, 5, causal=True)[1] == sum(
        (c > 0) + min(5, 36 - c) for c in range(36))


@pytest.mark.parametrize("kind,n_latent", [("joint", 8), ("independent", 0), ("semicausal", 3)])
@pytest.mark.parametrize("candidates", [1, 2, 8])
def test_any_order_decoding_step_by_step(kind, n_latent, candidates):
    model, prompt_len, T = small_model(), 3, 12
    spy, tokens = Spy(model), torch.randint(4, (5, T))
    out, spent = latent.decode_any_order(spy, tokens, prompt_len, kind, n_latent, candidates)
    assert (out[:, :prompt_len] == tokens[:, :prompt_len]).all() and (out < 4).all()
    assert spent == sum(call[0].shape[1] for call in spy.calls) and len(spy.calls) == T - prompt_len
    known = [set(range(prompt_len)) for _ in range(5)]
    for m, (inputs, positions, _, logits) in zip(range(T - prompt_len, 0, -1), spy.calls):
        c, k = min(candidates, m), min(n_latent, m - min(candidates, m))
        for b in range(5):
            clean = positions[b][inputs[b] != 4].tolist()
            masked = positions[b][inputs[b] == 4].tolist()
            assert len(clean) == T - m and len(masked) == c + k == len(set(masked))
            assert known[b] <= set(clean) and not set(clean) & set(masked)
            assert all(out[b, p] == t for p, t in zip(positions[b], inputs[b]) if t != 4)
            known[b] = set(clean)
    best = spy.calls[0][3][:, -min(candidates, T - prompt_len):].softmax(-1).amax(-1).argmax(1)
    first = spy.calls[0][1][:, -min(candidates, T - prompt_len):].gather(1, best[:, None])[:, 0]
    second_clean = spy.calls[1][1][:, prompt_len]             # the surest candidate was decoded
    assert first.equal(second_clean)


def test_greedy_is_argmax_and_sampling_follows_the_distribution():
    logits = torch.tensor([[0.0, math.log(3.0)]]).expand(20_000, -1)
    drawn = latent.sample(logits, False, torch.Generator().manual_seed(0)).float().mean().item()
    assert drawn == pytest.approx(0.75, abs=4 * math.sqrt(0.75 * 0.25 / 20_000))
    assert (latent.sample(logits, True, None) == 1).all()


@pytest.mark.parametrize("name", ["sudoku", "sudoku-puzzle"])
def test_an_oracle_solves_every_puzzle_with_every_decoder(name):
    task = TASKS[name]("4")
    tokens = torch.from_numpy(task.batch(6, np.random.default_rng(0), "test"))
    solutions = all_boards(4)
    if name == "sudoku-puzzle":                     # every given is a clean token of its solution
        solutions = torch.cat([solutions, solutions], dim=1)

    class Puzzle(Oracle):                           # blanks of the prompt say nothing
        def forward(self, tokens, positions, visible, *cache):
            blanks = tokens.masked_fill((tokens == 4) & (positions < task.prompt_len), -1)
            if self.shifted:
                return super().forward(tokens, positions, visible, *cache)
            return super().forward(torch.where(blanks < 0, 4, tokens), positions, visible, *cache)

    oracle = Puzzle(solutions, 4)
    blank = torch.cat([tokens[:, :task.prompt_len], torch.zeros(6, 16, dtype=torch.long)], dim=1)
    for window, causal in itertools.product((1, 3, 16), (False, True)):
        out, _ = latent.decode_left_to_right(oracle, blank, task.prompt_len, window, causal=causal)
        assert task.correct(out.numpy()).all()
    for kind, n_latent, candidates, causal in [
            ("joint", 15, 8, False), ("independent", 0, 1, False), ("semicausal", 4, 8, False),
            ("semicausal", 4, 8, True)]:
        out, _ = latent.decode_any_order(oracle, blank, task.prompt_len, kind, n_latent, candidates,
                                         causal=causal)
        assert task.correct(out.numpy()).all()
    if name == "sudoku":
        out, _ = latent.decode_left_to_right(Oracle(solutions, 4, shifted=True), blank, 0, 0)
        assert task.correct(out.numpy()).all()


# data -------------------------------------------------------------------------------------------


def naive_valid(board, side):
    high, wide = {4: (2, 2), 6: (2, 3), 9: (3, 3)}[side]
    grid = np.asarray(board).reshape(side, side)
    groups = [*grid, *grid.T, *(grid[r:r + high, c:c + wide].ravel() for r in range(0, side, high)
                                for c in range(0, side, wide))]
    return all(sorted(group) == list(range(side)) for group in groups)


def naive_solutions(puzzle, side, limit=2):
    """Backtracking, cell with the fewest digits first: at most `limit` solutions."""
    high, wide = {4: (2, 2), 6: (2, 3), 9: (3, 3)}[side]
    options = {}
    for cell in (i for i, digit in enumerate(puzzle) if digit == side):
        r, c = divmod(cell, side)
        seen = {puzzle[i] for i in range(side * side) if i // side == r or i % side == c
                or (i // side // high, i % side // wide) == (r // high, c // wide)}
        options[cell] = [digit for digit in range(side) if digit not in seen]
    if not options:
        return [list(puzzle)]
    cell, found = min(options, key=lambda i: len(options[i])), []
    for digit in options[cell]:
        found += naive_solutions([*puzzle[:cell], digit, *puzzle[cell + 1:]], side, limit)
        if len(found) >= limit:
            break
    return found


def test_all_boards_are_counted():
    assert len(fill(4)) * math.factorial(4) == 288 == len(np.unique(all_boards(4), axis=0))
    assert len(fill(6)) * math.factorial(6) == 28_200_960
    assert len(np.unique(fill(6), axis=0)) == len(fill(6))
    brute = [b for b in itertools.product(itertools.permutations(range(4)), repeat=4)
             if naive_valid(b, 4)]
    assert len(brute) == 288


@pytest.mark.parametrize("side", [4, 6, 9])
def test_boards_and_their_checker(side):
    task, rng = Sudoku(str(side)), np.random.default_rng(0)
    for split in ("train", "test"):
        boards = task.batch(100, rng, split)
        assert boards.dtype == np.int64 and boards.shape == (100, side**2)
        assert all(naive_valid(board, side) for board in boards) and task.correct(boards).all()
        assert (task.held_out(boards) == (split == "test")).all()
    for cell, digit in itertools.product(range(side**2), range(side)):
        broken = boards[:1].copy()
        broken[0, cell] = digit
        assert task.correct(broken)[0] == (digit == boards[0, cell])
    renamed = rng.permutation(side)[boards]
    assert task.held_out(renamed).all()
    assert (task.batch(9, np.random.default_rng(5), "train")
            == task.batch(9, np.random.default_rng(5), "train")).all()


def test_uniform_boards_and_a_tenth_held_out():
    task = Sudoku("4")
    boards = np.concatenate([task.batch(20_000, np.random.default_rng(0), "train"),
                             task.batch(20_000, np.random.default_rng(0), "test")])
    _, counts = np.unique(boards, axis=0, return_counts=True)
    assert len(counts) == 288 and set(np.round(np.sort(counts)[[0, -1]] / [75.8, 833.3])) == {1}
    pool = Sudoku("6").pool
    assert 0.08 < len(pool["test"]) / (len(pool["test"]) + len(pool["train"])) < 0.12


@pytest.mark.parametrize("side", [4, 6, 9])
def test_puzzles_have_one_solution(side):
    task, rng = TASKS["sudoku-puzzle"](str(side)), np.random.default_rng(0)
    cells = side**2
    for split in ("train", "test"):
        batch = task.batch(20, rng, split)
        puzzles, boards = batch[:, :cells], batch[:, cells:]
        assert (task.held_out(batch) == (split == "test")).all() and task.correct(batch).all()
        givens = (puzzles < side).sum(1)
        assert task.givens[0] <= givens.min() and givens.max() <= task.givens[1]
        for puzzle, board in zip(puzzles.tolist(), boards.tolist()):
            assert naive_solutions(puzzle, side) == [board]
    other = batch.copy()
    other[:, cells:] = Sudoku(str(side)).batch(20, rng, "train")         # valid, of another puzzle
    assert not task.correct(other).any()


def test_givens_as_a_list_are_the_grid():
    grid, listed = TASKS["sudoku-puzzle"]("6"), TASKS["sudoku-puzzle"]("6", prompt="list")
    a, b = (task.batch(50, np.random.default_rng(0), "train") for task in (grid, listed))
    assert (a[:, 36:] == b[:, 36:]).all() and b.shape == (50, listed.seq_len)
    for puzzle, prompt in zip(a[:, :36], b[:, :36].reshape(50, 18, 2)):
        pairs = [(7 + cell, digit) for cell, digit in enumerate(puzzle) if digit < 6]
        assert [tuple(pair) for pair in prompt] == pairs + [(6, 6)] * (18 - len(pairs))
    assert listed.correct(b).all()
    swapped = np.concatenate([b[:, :36], np.array([1, 0, 2, 3, 4, 5])[b[:, 36:]]], axis=1)
    assert not listed.correct(swapped).any()                 # a valid board, but not of this puzzle
    swapped[:, :36] = 6                                                    # now nothing is given
    assert listed.correct(swapped).all()


def naive_derivation(numbers, target, steps):
    """Is it one? Plain Python, fractions as they come."""
    left = list(numbers)
    for a, sign, b, r in steps:
        if a not in left or sign not in (101, 102, 103, 104):
            return False
        left.remove(a)
        if b not in left or (sign == 104 and b == 0):
            return False
        left.remove(b)
        if [a + b, a - b, a * b, a / b if b else None][sign - 101] != r or not 0 <= r <= 100:
            return False
        left.append(r)
    return left == [target]


def naive_targets(numbers):
    """All targets that can be reached, by trying everything."""
    if len(numbers) == 1:
        return set(numbers)
    found = set()
    for i, j in itertools.permutations(range(len(numbers)), 2):
        a, b = numbers[i], numbers[j]
        rest = [x for k, x in enumerate(numbers) if k not in (i, j)]
        for r in (a + b, a - b, a * b, a // b if b and a % b == 0 else -1):
            if 0 <= r <= 100:
                found |= naive_targets([*rest, r])
    return found


@pytest.mark.parametrize("n", [3, 4, 5])
def test_countdown_and_its_checker(n):
    task, rng = Countdown(str(n)), np.random.default_rng(n)
    problems = {}
    for split in ("train", "test"):
        batch = task.batch(300, rng, split)
        assert batch.shape == (300, 5 * n - 3) and batch.dtype == np.int64
        assert batch[:, :n].min() >= 1 and batch[:, :n].max() <= 13 and task.correct(batch).all()
        for row in batch[:{3: 100, 4: 30, 5: 2}[n]].tolist():
            assert row[n] in naive_targets(row[:n])
        problems[split] = {(*sorted(row[:n]), row[n]) for row in batch.tolist()}
    assert not problems["train"] & problems["test"]
    verdicts = {True: 0, False: 0}
    for row in batch.tolist():
        for place, token in itertools.product(range(n + 1, len(row)), [*rng.integers(0, 105, 4)]):
            changed = [*row[:place], int(token), *row[place + 1:]]
            steps = [changed[i:i + 4] for i in range(n + 1, len(row), 4)]
            expected = naive_derivation(changed[:n], changed[n], steps)
            assert task.correct(np.array([changed]))[0] == expected, changed
            verdicts[expected] += 1
    assert min(verdicts.values()) > 0
    other = np.array([[8, 8, 1, 16, 8, 101, 8, 16, 16, 104, 1, 16],           # another way, right
                      [8, 8, 1, 16, 8, 103, 1, 8, 8, 101, 8, 16],
                      [8, 8, 1, 16, 8, 101, 8, 16, 16, 101, 0, 16],           # 0 is not there
                      [8, 8, 1, 16, 8, 101, 8, 16, 8, 101, 8, 16],            # 8 is used twice
                      [8, 8, 1, 15, 8, 101, 8, 16, 16, 104, 1, 16]])          # not the target
    assert Countdown("3").correct(other).tolist() == [True, True, False, False, False]


def naive_zebra(task, prompt):
    """All grids that the clues of a prompt admit, each as a tuple of things, by brute force."""
    H = task.houses

    def admits(clue, house):
        rule, x, y, z = clue
        at = {**house, **{task.things + h: h for h in range(H)}}
        if rule == 6:
            return at[x] < at[z] < at[y] or at[y] < at[z] < at[x]
        if rule == 7:
            return at[x] in (0, H - 1)
        return [None, at[x] == at[y], at[x] != at[y], at[y] - at[x] == 1, at[y] > at[x],
                at[y] - at[x] in (1, -1), None, None, at[x] == at[y]][rule]

    clues = [task.clues[token - task.things].tolist() for token in prompt if token != task.things]
    orders = [itertools.permutations(range(a * H, a * H + H)) for a in range(task.attributes)]
    found = []
    for grid in itertools.product(*orders):
        house = {thing: h for row in grid for h, thing in enumerate(row)}
        if all(admits(clue, house) for clue in clues):
            found.append(sum(grid, ()))
    return found, clues


@pytest.mark.parametrize("size", ["3x3", "3x4"])
def test_zebra_has_one_solution_and_no_clue_was_implied(size):
    task, prompts = Zebra(size), {}
    for split in ("train", "test"):
        batch = task.batch(40 if size == "3x3" else 3, np.random.default_rng(0), split)
        assert task.correct(batch).all()
        prompts[split] = {tuple(row[:task.prompt_len]) for row in batch.tolist()}
        for row in batch.tolist():
            prompt, answer = row[:task.prompt_len], row[task.prompt_len:]
            found, clues = naive_zebra(task, prompt)
            assert found == [tuple(answer)]
            counts = [len(naive_zebra(task, prompt[:i])[0]) for i in range(len(clues) + 1)]
            assert all(after < before for before, after in itertools.pairwise(counts))
            for rule, x, y, _ in clues:
                assert rule not in (1, 2, 5, 6) or x < y                         # tells nothing
    assert not prompts["train"] & prompts["test"]


def test_zebra_checker_is_brute_force():
    task = Zebra("3x3")
    batch = task.batch(30, np.random.default_rng(1), "train")
    grids = [sum(g, ()) for g in itertools.product(
        *(itertools.permutations(range(3 * a, 3 * a + 3)) for a in range(3)))]
    for row in batch:
        prompt = row[:task.prompt_len].copy()
        prompt[3:] = task.things                        # with three clues several grids are right
        tokens = np.array([[*prompt, *grid] for grid in grids])
        expected = set(naive_zebra(task, prompt)[0])
        assert {grid for grid, right in zip(grids, task.correct(tokens)) if right} == expected
        broken = np.repeat(row[None], 9 * task.vocab_size, axis=0)
        for i, (place, token) in enumerate(itertools.product(range(9), range(task.vocab_size))):
            broken[i, task.prompt_len + place] = token
        assert (task.correct(broken) == (broken == row).all(1)).all()


@pytest.mark.parametrize("name,options", [*((name, {}) for name in TASKS),
                                          ("sudoku-puzzle", {"prompt": "list"})])
def test_batches_of_any_size(name, options):
    task, rng = TASKS[name](**options), np.random.default_rng(0)
    for n in [1] * 50 + [2, 3, 5, 65]:
        for split in ("train", "test"):
            assert task.correct(task.batch(n, rng, split)).tolist() == [True] * n


def test_puzzles_are_shown():
    assert "9 × 7 = 63" in Countdown("3").show([12, 9, 7, 75, 9, 103, 7, 63, 63, 101, 12, 75])
    task = Zebra("3x3")
    row = task.batch(1, np.random.default_rng(0), "train")[0]
    grid = [line.split() for line in task.show(row).splitlines()[-3:]]
    assert sorted(grid[0]) == ["blue", "green", "red"] and all(len(set(line)) == 3 for line in grid)


def test_watch_shows_every_pass():
    """What is decoded, latent and absent in each step is what the decoder was told to do."""
    model, args = small_model(4, 16), argparse.Namespace(device="cpu", seed=0)

    def decode(tokens, **more):
        return latent.decode_any_order(model, tokens, 0, "semicausal", 3, candidates=1, **more)

    frames = latent.watch(Sudoku("4"), args, "title", decode).split("\n\n")[1:-1]
    assert len(frames) == 16 and "\033" not in "".join(frames)
    for step, frame in enumerate(frames):
        assert frame.count("[") == 1 and frame.count("%") == min(3, 15 - step)
        assert sum(c.isdigit() for c in frame.split("\n", 1)[1].replace("%", "")) >= step + 1


# scripts ----------------------------------------------------------------------------------------

TINY = ["--size", "4", "--steps", "12", "--samples", "32", "--width", "16", "--layers", "1",
        "--latents", "0", "2", "all"]
TIMINGS = ("ms_per_puzzle", "train_minutes")


BAD_INPUT = [
    ("train_ar.py", "--task chess", "--task"), ("train_ar.py", "--size 5", "4, 6, 9"),
    ("train_ar.py", "--systems mdm", "--systems"), ("train_diffusion.py", "--systems ar", "mdm"),
    ("train_ar.py", "--windows 0", "--windows"), ("train_ar.py", "--windows 37", "1 to 36"),
    ("train_ar.py", "--windows wide", "--windows"), ("train_ar.py", "--latents 36", "0 to 35"),
    ("train_diffusion.py", "--latents -1", "--latents"),
    ("train_ar.py", "--latents x", "--latents"),
    ("train_ar.py", "--heads 3", "--width"), ("train_ar.py", "--steps 0", "--steps"),
    ("train_ar.py", "--lr nan", "--lr"), ("train_ar.py", "--lr -1", "--lr"),
    ("train_ar.py", "--givens 3 4", "--givens"), ("train_ar.py", "--device tpu", "--device"),
    ("train_ar.py", "--task sudoku-puzzle --givens 9 8", "--givens"),
    ("train_diffusion.py", "--candidates 0", "--candidates"),
    ("train_diffusion.py", "--order left", "--order"),
    ("train_ar.py", "--order uniform", "--order"),
    ("train_ar.py", "--checkpoint missing.pt", "missing.pt"),
    ("train_ar.py", "--checkpoint foreign.pt", "foreign.pt"),
    ("train_ar.py", "--checkpoint scdm-s0.pt", "scdm"),
    ("train_diffusion.py", "--size 4 --resume --out . --systems scdm", "steps"),
    ("train_diffusion.py", "--size 4 --steps 2 --out . --systems scdm", "--resume"),
    ("train_ar.py", "--out foreign.pt", "--out"), ("train_ar.py", "--out other", "results"),
    ("train_ar.py", "--out broken", "results.json"),
    ("train_ar.py", "--out list", "results.json"), ("train_ar.py", "--out foreign.pt/x", "--out"),
    ("train_ar.py", "--task zebra --size 5x5", "3x3, 3x4"),
    ("train_ar.py", "--task countdown --size 6", "3, 4, 5"),
    ("train_ar.py", "--task countdown --prompt list", "--prompt"),
    ("train_ar.py", "--task sudoku-puzzle --prompt picture", "--prompt"),
    ("train_ar.py", "--task sudoku-puzzle --givens 0 0", "--givens"),
    ("train_ar.py", "--task sudoku-puzzle --givens 1", "--givens"),
    ("train_ar.py", "--task sudoku-puzzle --size 4 --givens 4 17", "--givens"),
    ("train_ar.py", "--task sudoku-puzzle --givens 0 4", "too few"),
    ("train_ar.py", "--task sudoku-puzzle --givens 12 12", "too few"),
    ("train_ar.py", "--steps 1.5", "--steps"), ("train_ar.py", "--steps", "--steps"),
    ("train_ar.py", "--batch-size 0", "--batch-size"), ("train_ar.py", "--samples 0", "--samples"),
    ("train_ar.py", "--lr inf", "--lr"), ("train_ar.py", "--layers 0", "--layers"),
    ("train_ar.py", "--heads 0", "--heads"), ("train_ar.py", "--width x", "--width"),
    ("train_ar.py", "--seeds -1", "--seeds"), ("train_ar.py", "--seeds", "--seeds"),
    ("train_ar.py", "--jobs -1", "--jobs"), ("train_ar.py", "--sets 3", "--sets"),
    ("train_ar.py", "--checkpoint .", "not a checkpoint"),
    ("train_ar.py", "--checkpoint truncated.pt", "truncated.pt"),
    ("train_ar.py", "--checkpoint code.pt", "code.pt"),
    ("train_ar.py", "--checkpoint tensor.pt", "tensor.pt"),
    ("train_diffusion.py", "--checkpoint cut.pt", "cut.pt"),
    ("train_diffusion.py", "--size 4 --width 16 --steps 2 --resume --systems scdm --out .",
     "width"),
    ("train_diffusion.py", "--checkpoint scdm-s0.pt --latents 16", "0 to 15"),
    ("train_diffusion.py", "--checkpoint scdm-s0.pt --out other", "other"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a checkpoint, a foreign file, and two foreign results."""
    folder = tmp_path_factory.mktemp("bad")
    flags = ["--systems", "scdm", *TINY, "--steps", 2, "--width", 64, "--layers", 3]
    assert script("train_diffusion.py", *flags, "--out", folder)[0] == 0
    (folder / "results.json").unlink()
    (folder / "foreign.pt").write_bytes(b"PK not a checkpoint")
    (folder / "truncated.pt").write_bytes((folder / "scdm-s0.pt").read_bytes()[:5000])
    saved = latent.load(folder / "scdm-s0.pt")
    torch.save({**saved, "model": Path("a class")}, folder / "code.pt")
    torch.save(torch.zeros(3), folder / "tensor.pt")
    torch.save({**saved, "model": {"token.weight": torch.zeros(3)}}, folder / "cut.pt")
    for name, text in ("other", '[{"task": "chess"}]'), ("broken", '{"accuracy"'), ("list", "3"):
        (folder / name).mkdir()
        (folder / name / "results.json").write_text(text)
    return folder


@pytest.mark.parametrize("name,flags,message", BAD_INPUT, ids=[flags for _, flags, _ in BAD_INPUT])
def test_bad_input_gets_one_line(folder, monkeypatch, capsys, name, flags, message):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [name, *flags.split()])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    script_module = {"train_ar.py": train_ar, "train_diffusion.py": train_diffusion}[name]
    with pytest.raises(SystemExit) as stop:
        latent.main(script_module.flags(), TASKS, script_module.jobs, script_module.experiment)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1 and message in err, err
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def script(name, *flags, wait=True, launcher=()):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(HERE / name), *map(str, flags)]
    process = subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, start_new_session=True)
    if not wait:
        return process
    try:
        out, err = process.communicate(timeout=100)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)             # with all that it started
        raise
    return process.returncode, out, err


def results(folder):
    records = json.loads((folder / "results.json").read_text())
    return [{k: v for k, v in record.items() if k not in TIMINGS} for record in records]


@pytest.mark.parametrize("name,flags,n", [
    ("train_diffusion.py", ["--systems", "mdm", "sidm", "scdm", "scdm-causal", "--seeds", 0, 1],
     2 * (1 + 1 + 3 + 3)),
    ("train_ar.py", ["--systems", "ar", "mtp", "mtp-causal", "mtp-cuts", "control",
                     "--windows", "random", 3], 1 + 4 * (3 + 1))])
def test_scripts_run_end_to_end_and_repeat_themselves(tmp_path, name, flags, n):
    for folder in ("a", "b"):
        status, out, err = script(name, *TINY, *flags, "--out", tmp_path / folder)
        assert status == 0 and "accuracy" in out, err
    assert len(results(tmp_path / "a")) == n
    assert results(tmp_path / "a") == results(tmp_path / "b")
    status, _, err = script(name, *TINY, *flags, "--out", tmp_path / "a", "--resume")
    assert status == 0 and results(tmp_path / "a") == results(tmp_path / "b"), err


def test_a_killed_run_resumes_exactly(tmp_path):
    flags = [*TINY, "--systems", "scdm", "--steps", 400]
    assert script("train_diffusion.py", *flags, "--out", tmp_path / "whole")[0] == 0
    process = script("train_diffusion.py", *flags, "--out", tmp_path / "cut", wait=False)
    path = tmp_path / "cut" / "scdm-s0.pt"
    while not path.exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(np.random.default_rng().random() / 2)                      # at any of its next steps
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)            # the pipes close when its workers have ended, too
    assert 0 < latent.load(path)["step"] < 400
    assert script("train_diffusion.py", *flags, "--out", tmp_path / "cut", "--resume")[0] == 0
    whole, cut = (latent.load(tmp_path / x / "scdm-s0.pt")["model"] for x in ("whole", "cut"))
    assert all(whole[name].equal(cut[name]) for name in whole)
    assert results(tmp_path / "whole") == results(tmp_path / "cut")


def test_ctrl_c_saves_and_ends(tmp_path):
    """A terminal sends Ctrl-C to all processes: one line, and no model after this one is begun."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    flags = [*TINY, "--steps", 10**6, "--systems", "mdm", "--seeds", 0, 1, 2, "--jobs", 1]
    process = script("train_diffusion.py", *flags, "--out", tmp_path, wait=False)
    while "it/s" not in process.stderr.read(100):                               # the progress bar
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err and "--resume" in err, err
    assert [path.name for path in tmp_path.glob("*.pt")] == ["mdm-s0.pt"]
    assert 0 < latent.load(tmp_path / "mdm-s0.pt")["step"] < 10**6


def dies(task, args):
    os._exit(1)


def test_a_killed_worker_gets_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_diffusion.py", *TINY, "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        latent.main(train_diffusion.flags(), TASKS, train_diffusion.jobs, dies)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and "--resume" in err, err


def arguments(*flags):
    """The arguments of train_diffusion.py for MDM with a tiny task, checked, and that task."""
    parser = train_diffusion.flags()
    args = parser.parse_args([*TINY, *map(str, flags)])
    task, jobs = latent.prepare(args, parser, TASKS, train_diffusion.jobs)
    return jobs[0], task


def train_once(args, task, spoil=lambda step: 1.0):
    """Train MDM without a script, its weights multiplied by spoil(step)."""
    model, steps = latent.new_model(task, args), itertools.count()

    def objective(tokens, rng):
        inputs, rank, weight = latent.diffusion(tokens, 0, model.mask, rng)
        return inputs, rank, weight * spoil(next(steps))

    def decode(tokens, generator):
        return latent.decode_any_order(model, tokens, 0, "joint", 15, generator=generator)

    latent.train(task, args, model, objective, decode)


def test_controls_of_an_evaluation(tmp_path):
    """Test puzzles with their solutions are right, unseen, and right by chance only where the rules
    happen to admit the solution for another prompt."""
    args, task = arguments("--task", "sudoku-puzzle", "--out", tmp_path, "--samples", 2000)
    model, rng = latent.new_model(task, args), np.random.default_rng(5)

    def evaluate(task, split):
        solved = []

        def decode(tokens, generator):
            solved.append(torch.from_numpy(task.batch(len(tokens), rng, split)))
            return solved[-1], 1
        return latent.evaluate(task, args, model, 0, decode, 0.0, {}), torch.cat(solved)

    record, puzzles = evaluate(task, "test")
    by_chance = sum(all(given in (4, cell) for given, cell in zip(one[:16], other[16:]))
                    for one, other in zip(puzzles.roll(1, 0).tolist(), puzzles.tolist()))
    assert record["accuracy"] == 1 and record["unseen"] is None
    assert 0 < by_chance < 100 and record["chance"] == by_chance / 2000
    for split, unseen in ("test", 1), ("train", 0):
        record, _ = evaluate(Sudoku("4"), split)
        assert (record["accuracy"], record["unseen"], record["chance"]) == (1, unseen, None)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    args, task = arguments("--out", tmp_path)
    with pytest.raises(latent.RunError) as stop:
        train_once(args, task, lambda step: math.nan if step == 5 else 1.0)
    for text in ("loss nan", "step 5", "learning rate 0.0003", f"good checkpoint is {tmp_path}"):
        assert text in str(stop.value)
    saved = latent.load(tmp_path / "mdm-s0.pt")
    assert saved["step"] == 5
    assert all(weight.isfinite().all() for weight in saved["model"].values())


def test_the_best_checkpoint_is_kept(tmp_path, monkeypatch):
    args, task = arguments("--out", tmp_path)
    accuracies = iter([0, 3, 2, 5, 1, 5, 4, 0, 0, 0, 2, 1])              # of 64 puzzles
    monkeypatch.setattr(latent, "solve",
                        lambda *_: (None, np.arange(64) < next(accuracies), None, None))
    train_once(args, task)
    probes = latent.load(tmp_path / "mdm-s0.pt")["probes"]
    assert [step for step, _ in probes] == list(range(1, 13)) and probes[3] == [4, 5 / 64]
    assert latent.load(tmp_path / "mdm-s0.best.pt")["step"] == 6


@pytest.mark.parametrize("trouble", ["full disk", "torn file", "vanished folder"])
def test_what_was_saved_stays(tmp_path, monkeypatch, trouble):
    folder = tmp_path / "out"
    args, task = arguments("--out", folder)
    train_once(args, task)
    before = (folder / "mdm-s0.pt").read_bytes()

    def save(content, file):
        if trouble == "torn file":
            Path(file).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    if trouble == "vanished folder":
        folder.rename(tmp_path / "elsewhere")
    else:
        monkeypatch.setattr(torch, "save", save)
    with pytest.raises(latent.RunError, match="--out: cannot write") as stop:
        train_once(args, task)
    assert "\n" not in str(stop.value)
    folder = tmp_path / "elsewhere" if trouble == "vanished folder" else folder
    assert (folder / "mdm-s0.pt").read_bytes() == before
    assert latent.load(folder / "mdm-s0.pt")["step"] == args.steps


def test_two_processes_are_one(tmp_path):
    """Data-parallel training ends with the weights of one process with the same total batch, and
    one of the two writes and prints."""
    flags = [*TINY, "--systems", "scdm", "--seeds", "0", "--steps", "20"]
    assert script("train_diffusion.py", *flags, "--out", tmp_path / "one")[0] == 0
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    status, out, err = script("train_diffusion.py", *flags, "--out", tmp_path / "two",
                              launcher=torchrun)
    assert status == 0 and out.count("system ") == 1, err
    one, two = (latent.load(tmp_path / x / "scdm-s0.pt")["model"] for x in ("one", "two"))
    for name in one:                           # Muon computes in bf16, so the last digits differ
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-3)
    assert len(results(tmp_path / "two")) == 3


def test_one_place_names_devices():
    names, allowed = {"cuda", "mps", "cpu"}, {"choose_device", "autocast", "side_by_side", "load"}
    for path in (HERE / "latent.py", *HERE.glob("train_*.py"), *HERE.glob("data/*.py")):
        for node in ast.parse(path.read_text()).body:
            if getattr(node, "name", None) in allowed:
                continue
            found = {x.value for x in ast.walk(node) if isinstance(x, ast.Constant)
                     and isinstance(x.value, str)}
            found |= {x.attr for x in ast.walk(node) if isinstance(x, ast.Attribute)} - {"cpu"}
            if getattr(node, "name", None) != "common_flags":               # the flag's choices
                assert not found & names, (path, node.lineno)
            assert not {"float64", "double", "bfloat16", "half"} & found or "data" in str(path)


def test_checkpoints_refuse_code(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)
    torch.save({"model": Attack()}, tmp_path / "bad.pt")
    with pytest.raises(latent.RunError):
        latent.load(tmp_path / "bad.pt")
    assert not (tmp_path / "attacked").exists()


# long: python -m pytest test_latent.py -m long -------------------------------------------------


@pytest.mark.long
def test_memory_is_flat(tmp_path):
    args, task = arguments("--out", tmp_path, "--steps", 5000)
    peaks = []

    def peak(step):
        if step in (500, 4999):
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return 1.0

    train_once(args, task, peak)
    print(f"\npeak memory in KiB after 500 steps {peaks[0]}, after 5,000 {peaks[1]}")
    assert peaks[1] < 1.05 * peaks[0]


@pytest.mark.long
@pytest.mark.parametrize("name,size", [(name, size) for name, task in TASKS.items()
                                       for size in task.sizes])
def test_long_haul_of_every_generator(name, size):
    task, rng = TASKS[name](size), np.random.default_rng(1)
    total = 1_000_000 if name == "sudoku" else 100_000
    started = time.time()
    for _ in range(total // 10_000):
        batch = task.batch(10_000, rng, "train")
        assert batch.shape == (10_000, task.seq_len) and task.correct(batch).all()
        assert batch.min() >= 0 and batch.max() < task.vocab_size
    seconds = time.time() - started
    print(f"\n{name} {size}: {total:,} generated and checked in {seconds:.0f} s")


# bench: python -m pytest test_latent.py -m bench -s --------------------------------------------


def rate(act, seconds=2.0):
    """How often act() runs in a second, after a warm-up."""
    act()
    started, times = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        act()
        times += 1
    return times / (time.perf_counter() - started)


class PlainGPT(nn.Module):
    """What one would write with torch's own modules; the yardstick for a training step."""

    def __init__(self, vocab_size, seq_len, layers, heads, width):
        super().__init__()
        self.token, self.position = nn.Embedding(vocab_size, width), nn.Embedding(seq_len, width)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0, "gelu", batch_first=True,
                                           norm_first=True, bias=False)
        self.blocks = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width),
                                            enable_nested_tensor=False)
        self.output = nn.Linear(width, vocab_size, bias=False)

    def loss(self, tokens):
        causal = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1] - 1)
        x = self.token(tokens[:, :-1]) + self.position.weight[:-1]
        logits = self.output(self.blocks(x, causal, is_causal=True))
        return nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:])


@pytest.mark.bench
@pytest.mark.parametrize("side,layers,heads,width", [("4", 3, 4, 64), ("6", 3, 4, 64),
                                                     ("9", 3, 4, 64), ("9", 6, 8, 256)])
def test_bench(side, layers, heads, width):
    """Steps per second, the share of the machine's matmul rate in float32 (counting 6 x parameters
    of the blocks x tokens), and for small models milliseconds and forward tokens per puzzle
    (uniform order, 512 puzzles at once; 64 at side 9)."""
    task, A, B = Sudoku(side), int(side) ** 2, 64
    empty = torch.zeros(64 if side == "9" else 512, A, dtype=torch.long)
    large = torch.randn(1024, 1024)
    peak = max(rate(lambda: large @ large, 0.5) for _ in range(3)) * 2 * 1024**3
    print(f"\nside {side}, {layers} blocks x width {width}, batch {B}, one thread, matmul "
          f"{peak / 1e9:.0f} GFLOP/s")
    print("system            steps/s  share %   tokens  ms/puzzle  us/token")

    def share(steps, n_tokens=A):
        return 100 * 6 * layers * 12 * width**2 * B * n_tokens * steps / peak

    rng = np.random.default_rng(0)

    def steps_per_second(loss, model, opts):
        def step():
            loss(torch.from_numpy(task.batch(B, rng, "train"))).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for opt in opts:
                opt.step()
                opt.zero_grad()
        return rate(step)

    gpt = PlainGPT(task.vocab_size, A, layers, heads, width)
    steps = steps_per_second(gpt.loss, gpt, [torch.optim.AdamW(gpt.parameters())])
    print(f"{'torch modules':<16}{steps:9.2f}{share(steps):9.0f}")
    for system, sweep in [("ar", [0]), ("mtp", [A - 1]), ("mtp-causal", [A - 1]), ("mtp-cuts", []),
                          ("mdm", [A - 1]), ("sidm", [0]), ("scdm", [0, 8, A - 1]),
                          ("scdm-causal", [0, 8, A - 1])]:
        kind, causal = latent.KIND[system], system in latent.CACHEABLE
        left_to_right = system in ("ar", "mtp", "mtp-causal")
        model = latent.Transformer(latent.Config(task.vocab_size, A, layers, heads, width))

        def loss(tokens):
            if system == "ar":
                batch = latent.next_token(tokens, 0, model.mask)
            elif system == "mtp-cuts":           # A windows of one token after the A known tokens
                batch = latent.multi_token_cuts(tokens, 0, model.mask, rng, 1)
            elif left_to_right:
                batch = latent.multi_token(tokens, 0, model.mask, rng, A, causal=causal)
            else:
                batch = latent.diffusion(tokens, 0, model.mask, rng, causal)
            inputs, rank, weight, *positions = batch
            ce = latent.cross_entropy(model, tokens, inputs, rank, kind, *positions)
            return (weight * ce).sum()

        steps = steps_per_second(loss, model, latent.optimizers(model, 1e-3))
        n_tokens = 2 * A if system == "mtp-cuts" else A
        print(f"{system:<16}{steps:9.2f}{share(steps, n_tokens):9.0f}")
        for k in sweep if width == 64 else []:
            def decode():
                if left_to_right:
                    window = 0 if system == "ar" else k + 1
                    return latent.decode_left_to_right(model, empty, 0, window, causal=causal)[1]
                return latent.decode_any_order(model, empty, 0, kind, k, 1, causal=causal)[1]

            tokens, puzzles = decode(), len(empty) * rate(decode)
            print(f"{k:>10} latents {tokens:24}{1000 / puzzles:11.2f}"
                  f"{1e6 / puzzles / tokens:10.2f}")
