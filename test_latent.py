"""What must always hold. Every reference here is naive: loops, enumeration, brute force."""
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import latent
import train_ar
import train_diffusion
from data import TASKS
from data.sudoku import Sudoku, fill
from latent import SYSTEMS

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)         # a background job ignores Ctrl-C
HERE = Path(__file__).parent
every_system = pytest.mark.parametrize("name", SYSTEMS)
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])


def small_model(vocab_size=4, seq_len=12, layers=2):
    """A transformer with random weights everywhere, so that every path through it matters; its
    `calls` are all that it read and gave: tokens, positions, ..., logits."""
    model, generator = latent.Transformer(vocab_size, seq_len, layers, 2, 16), torch.Generator()
    for i, weight in enumerate(model.parameters()):
        torch.nn.init.normal_(weight, std=0.4, generator=generator.manual_seed(i))
    model.calls = []
    model.register_forward_hook(lambda _, read, logits: model.calls.append((*read, logits)))
    return model


def random_tokens(*shape):
    return torch.randint(4, shape, generator=torch.Generator().manual_seed(0))


def uniform(counts, kinds):
    """Are counts as even as draws from equally likely kinds, within five sigmas of chi-square?"""
    expected = sum(counts.values()) / kinds
    statistic = sum((n - expected) ** 2 / expected for n in counts.values())
    return len(counts) == kinds and statistic < kinds - 1 + 5 * math.sqrt(2 * (kinds - 1))


# who sees whom ----------------------------------------------------------------------------------
def sees(name, query, key):
    """The table of the paper, system by system. A token is (its turn, whether it is masked)."""
    (turn, masked), (key_turn, key_masked) = query, key
    if key_turn < 0:
        return False
    if name in ("mtp", "control", "mdm"):
        return True
    if name == "mtp-causal" and key_masked:
        return masked
    if name == "sidm":
        return not key_masked
    if name == "scdm":
        return not key_masked or masked and key_turn < turn
    return key_turn < turn


def test_the_transformer_is_a_naive_one():
    """Loops over tokens and heads, in float64; a token that sees only itself gets no NaN."""
    model, T = small_model().double(), 5
    tokens, positions = torch.tensor([[1, 4, 2, 0, 4]]), torch.tensor([[3, 0, 11, 2, 7]])
    visible = latent.visibility(SYSTEMS["scdm-causal"], torch.tensor([[0, 4, 1, 2, 3]]), tokens > 3)
    x = [model.token.weight[t] + model.position.weight[p] for t, p in zip(tokens[0], positions[0])]
    for block in model.blocks:
        qkv = [block.qkv.weight @ block.attention_norm(row) for row in x]
        for i in range(T):
            y = []
            for head in range(2):
                q, k, v = (slice(start + 8 * head, start + 8 * head + 8) for start in (0, 16, 32))
                scores = {j: math.exp((qkv[i][q] @ qkv[j][k]).item() / math.sqrt(8))
                          for j in range(T) if visible[0, i, j]}
                y.append(sum(s * qkv[j][v] for j, s in scores.items()) / sum(scores.values()))
            x[i] = x[i] + block.attention_out.weight @ torch.cat(y)
            hidden = (block.mlp_in.weight @ block.mlp_norm(x[i])).clamp(min=0)
            x[i] = x[i] + block.mlp_out.weight @ hidden**2
    expected = torch.stack([model.output.weight @ model.norm(row) for row in x])
    torch.testing.assert_close(model(tokens, positions, visible)[0], expected)


@every_system
@pytest.mark.parametrize("layers", [1, 2])
def test_visibility_is_the_table_and_says_who_cannot_influence_whom(name, layers):
    """Move one token: logits are bit-identical wherever the table says 'no', and others elsewhere;
    in two layers a path may have two steps, but none leads from a masked token to a clean one."""
    model, system, order = small_model(layers=layers), SYSTEMS[name], torch.arange(7)[None]
    row, rng = random_tokens(1, 7), np.random.default_rng(0)
    cases = [latent.hide(system, row, 2, model.mask, cut, window, rng)
             for cut, window in itertools.product(range(7), (1, 3, 7))]
    if name != "ar":                                 # in decoding, candidates may share a turn
        cases.append((row, torch.tensor([[0, 1, 2, 5, 5, 3, 4]]), torch.arange(7)[None] >= 3))
    for inputs, turn, masked in cases:
        visible = latent.visibility(system, turn, masked)
        turn, masked = turn[0].tolist(), masked[0].tolist()
        present, tokens = [i for i in range(7) if turn[i] >= 0], list(zip(turn, masked))
        assert visible[0, present].tolist() == [[q == k or sees(name, tokens[q], tokens[k])
                                                 for k in range(7)] for q in present]
        before = model(inputs, order, visible)[0]
        for key in range(7):
            after = model(inputs, torch.where(order == key, 11, order), visible)[0]
            direct = {q for q in present if q == key or sees(name, tokens[q], tokens[key])}
            reached = direct if layers == 1 else direct | {
                q for q in present if any(sees(name, tokens[q], tokens[via]) for via in direct)}
            assert reached == {q for q in present if not after[q].equal(before[q])}, (turn, key)
            if masked[key] and (system.causal or system.sees != "joint"):
                assert all(masked[q] for q in reached)


# training = decoding ----------------------------------------------------------------------------
@every_device
@pytest.mark.parametrize("prompt_len,n_latent", [(0, 0), (0, 11), (3, 0), (3, 1), (3, 4)])
@every_system
def test_training_is_decoding(name, prompt_len, n_latent, device):
    """The logits of a candidate are those of its turn in a training pass over the whole sequence in
    which exactly the same masked tokens come before it; and with a cache as without."""
    system, model, T, steps = SYSTEMS[name], small_model().to(device), 12, []
    out, _ = latent.decode(model, system, random_tokens(3, T).to(device), prompt_len, n_latent,
                           candidates=2, on_step=lambda *step: steps.append(step[1:]))
    known = [list(range(prompt_len)) for _ in range(3)]                   # in order, for each row
    for n, (positions, logits, c, decoded) in enumerate(steps, start=prompt_len):
        for b, i in itertools.product(range(3), range(c)):
            row, place = out[b:b + 1], positions[b, i].item()
            if system.order == "left":
                hidden = latent.hide(system, row, prompt_len, 4, n, n_latent + 1, None)
            else:
                order = [*known[b], *positions[b, c:].tolist(), place]          # latents, candidate
                order += [p for p in positions[b, :c].tolist() if p != place]
                if system.sees != "joint":                    # joint ones see all that there are
                    order += [p for p in range(T) if p not in order]
                turn = torch.full((1, T), -1, device=device)
                turn[0, order] = torch.arange(len(order), device=device)
                hidden = torch.where((0 <= turn) & (turn < n), row, 4), turn, turn >= n
            latent.cross_entropy(model, system, row, *hidden)
            torch.testing.assert_close(logits[b, i], model.calls[-1][-1][0, place])
        known = [row + place for row, place in zip(known, decoded.tolist())]


@pytest.mark.parametrize("name,k,candidates,cost", [
    ("ar", 0, 1, 36), ("mtp", 4, 1, 800), ("control", 35, 1, 1296), ("mtp-causal", 4, 1, 205),
    ("sidm", 0, 1, 666), ("sidm", 0, 8, 890), ("scdm", 28, 8, 1296), ("mdm", 35, 8, 1296)])
def test_forward_tokens_are_those_of_readme(name, k, candidates, cost):
    board = torch.zeros(1, 36, dtype=torch.long)
    _, spent = latent.decode(small_model(6, 36), SYSTEMS[name], board, 0, k, candidates=candidates)
    assert spent == cost


# the objective and nats -------------------------------------------------------------------------
def naive_logits(model, name, row, clean, masked):
    """The logits (len(masked), V) of masked tokens when those at the places `clean` are known, in
    this order, and no others are there; in AR those of the next token."""
    places, inputs = [*clean, *masked], [*row[clean].tolist(), *[model.mask] * len(masked)]
    if name == "ar":
        places, inputs = [*clean, len(clean)], [model.mask, *row[clean].tolist()]
    tokens = [(turn, turn >= len(clean)) for turn in range(len(places))]
    visible = [[q == k or sees(name, q, k) for k in tokens] for q in tokens]
    logits = model(torch.tensor([inputs]), torch.tensor([places]), torch.tensor([visible]))
    return logits[0, len(clean):]


def draw(name, tokens, prompt_len, window, seed=0, model=small_model()):
    """One draw of the objective: the loss, inputs, turn, masked and weight."""
    system, rng = SYSTEMS[name], np.random.default_rng(seed)
    *hidden, weight = latent.objective(system, tokens, prompt_len, model.mask, window, rng)
    assert all(x.is_contiguous() for x in (*hidden, weight))            # or it can not be pinned
    loss = (weight * latent.cross_entropy(model, system, tokens, *hidden)).sum()
    return loss, *hidden, weight


@every_system
@pytest.mark.parametrize("window", [1, 3, 12])
@pytest.mark.parametrize("prompt_len", [0, 3])
def test_the_loss_by_hand(name, window, prompt_len):
    """Row by row, with nothing there but the clean tokens and the window."""
    tokens, losses, left = random_tokens(8, 12), [], SYSTEMS[name].order == "left"
    window = window if left else None
    loss, inputs, turn, masked, _ = draw(name, tokens, prompt_len, window)
    for b, row in enumerate(tokens):
        order = turn[b].argsort()[(turn[b] < 0).sum():].tolist()               # of those present
        cuts = range(prompt_len, 12)
        if name == "ar":
            assert not masked.any() and len(order) == 12
        else:
            cuts = [masked[b][order].int().argmax().item()]
            assert cuts[0] >= prompt_len and len(order) == min(12, cuts[0] + (window or 12))
            assert masked[b][order].tolist() == [n >= cuts[0] for n in range(len(order))]
            assert inputs[b].equal(torch.where(masked[b] | (turn[b] < 0), 4, row))
        assert turn[b][order].tolist() == list(range(len(order)))
        assert order[:prompt_len] == list(range(prompt_len))
        assert not left or order == sorted(order)
        for cut in cuts:
            logits = naive_logits(small_model(), name, row, order[:cut], order[cut:])
            for place, logit in list(zip(order[cut:], logits))[:1 if name == "control" else None]:
                losses.append(-logit.log_softmax(-1)[row[place]])
    torch.testing.assert_close(loss, torch.stack(losses).mean())


def test_cuts_and_orders_are_uniform():
    tokens, cuts, orders = torch.zeros(6, 5, dtype=torch.long), Counter(), Counter()
    for seed in range(600):
        _, _, turn, masked, _ = draw("scdm", tokens, 2, 5, seed)
        assert Counter(masked.sum(1).tolist()) == {1: 2, 2: 2, 3: 2}  # spread over the six rows
        orders.update(map(tuple, turn[:, 2:].tolist()))
        cuts[draw("mtp", tokens[:1], 2, 2, seed)[3].int().argmax().item()] += 1
    assert uniform(cuts, 3) and uniform(orders, 6)


# Instead of random numbers: an offset of 0, and all orders, again and again.
ALL_ORDERS = SimpleNamespace(random=lambda shape=None: 0.0 if shape is None else np.resize(
    list(itertools.permutations(range(shape[1]))), shape))


def naive_nats(model, name, row, prompt_len, k):
    """The mean over all orders of the summed cross-entropies of what is decoded: from the left the
    first of the window, else the one behind k latent tokens."""
    left, prompt, T = SYSTEMS[name].order == "left", list(range(prompt_len)), len(row)
    orders, totals = itertools.permutations(range(prompt_len, T)), []
    for order in [prompt + list(order) for order in orders][:1 if left else None]:
        totals.append(0.0)
        for n in range(prompt_len, T):
            masked, i = order[n:n + k + 1], 0 if left else -1
            logits = naive_logits(model, name, row, order[:n], masked)[i]
            totals[-1] -= logits.log_softmax(-1)[row[masked[i]]].item()
    return np.mean(totals)


@every_system
@pytest.mark.parametrize("prompt_len", [0, 2])
def test_nats_are_those_of_all_orders(name, prompt_len):
    """For MDM and SIDM `nats` is the ELBO: the mean over the masked, summed over their number."""
    model, A, system = small_model(), 4, SYSTEMS[name]
    rows = random_tokens(2, prompt_len + A)
    tokens = rows.repeat_interleave(24, 0)
    sweep = {"sidm": [0], "mdm": [A - 1], "ar": [0]}.get(name, [0, 1, 2, A - 1])
    expected = [np.mean([naive_nats(model, name, r, prompt_len, k) for r in rows]) for k in sweep]
    for step in (1, -1):
        measured = latent.nats(model, system, tokens, prompt_len, sweep[::step], ALL_ORDERS)
        assert measured.tolist() == pytest.approx(expected[::step], rel=1e-5)
    assert len({round(x, 3) for x in expected}) == len(sweep)            # every k has its own
    for k in {"mdm": [0, 2], "sidm": [1, A - 1]}.get(name, []):
        assert latent.nats(model, system, tokens, prompt_len, [k], ALL_ORDERS).isnan().all()


# the decoder ------------------------------------------------------------------------------------
@every_system
@pytest.mark.parametrize("policy", latent.POLICIES)
@pytest.mark.parametrize("prompt_len,candidates,n_latent",
                         [(3, 1, 0), (3, 1, 4), (0, 3, 4), (0, 100, 11)])
def test_decoding_step_by_step(name, policy, prompt_len, candidates, n_latent):
    model, system, T, steps = small_model(), SYSTEMS[name], 12, []
    tokens, answer = random_tokens(5, T), torch.arange(T) >= prompt_len

    def decode(tokens, seed, on_step=None):
        return latent.decode(model, system, tokens, prompt_len, n_latent, policy, candidates,
                             generator=torch.Generator().manual_seed(seed), on_step=on_step)
    out, spent = decode(tokens, 0, lambda *step: steps.append(step))
    assert spent == sum(inputs.shape[1] for inputs, *_ in model.calls)
    assert len(steps) == len(model.calls) == T - prompt_len and steps[-1][0].equal(out)
    before = torch.where(answer, 4, tokens)
    for n, (now, positions, logits, c, decoded) in enumerate(steps, start=prompt_len):
        assert c == (min(candidates, T - n) if system.order == "random" else 1)
        assert positions.shape[1] == c + min(n_latent, T - n - c)
        cached = n - 1 + system.shifted if system.causal and n > prompt_len else 0
        read = model.calls[n - prompt_len][1]                                        # positions
        assert read.shape[1] == n - cached + positions.shape[1]
        assert read[:, -positions.shape[1]:].equal(positions)
        for b in range(5):
            masked, place = positions[b].tolist(), decoded[b, 0].item()
            assert len(set(masked)) == len(masked) and (before[b, masked] == 4).all()
            assert system.order == "random" or masked == list(range(n, n + len(masked)))
            p = logits[b, :c].softmax(-1).sort().values
            scores = {"top-prob": p[:, -1], "margin": p[:, -1] - p[:, -2],
                      "uniform": -torch.arange(c)}[policy].tolist()
            assert scores[masked.index(place)] == max(scores)
            assert (now[b] != before[b]).nonzero().tolist() == [[place]] and now[b, place] < 4
        before = now
    assert decode(tokens, 0)[0].equal(out) and not decode(tokens, 1)[0].equal(out)
    assert decode(torch.where(answer, 0, tokens), 0)[0].equal(out)         # no answer leaks into it


def fixed(*table):
    """A model that predicts the same, a table (T, V) of probabilities, whatever it reads."""
    def model(tokens, positions, visible, cache=None, n_keep=0):
        return torch.tensor(table, device=tokens.device).log()[positions.expand(tokens.shape)]
    model.mask = len(table[0])
    return model


def orders(policy, candidates, n_latent=0, B=24 * 500):
    """How often the four places of an answer are decoded in which order (and beside which latent
    token in the first step)."""
    model = fixed([0.5, 0.49, 0.01], [0.45, 0.3, 0.25], [0.6, 0.3, 0.1], [0.9, 0.05, 0.05])
    steps, generator = [], torch.Generator().manual_seed(0)
    latent.decode(model, SYSTEMS["scdm"], torch.zeros(B, 4, dtype=torch.long), 0, n_latent, policy,
                  candidates, generator=generator, on_step=lambda _, masked, logits, c, decoded:
                  steps.append(torch.cat([decoded, masked[:, c:]], dim=1)))
    return Counter(map(tuple, torch.cat(steps[:4 - n_latent], dim=1).tolist()))


def test_the_order_is_the_policy():
    assert list(orders("top-prob", 4)) == [(3, 2, 0, 1)]
    assert list(orders("margin", 4)) == [(3, 2, 1, 0)]
    for policy, candidates in ("uniform", 1), ("uniform", 3), ("uniform", 4), ("top-prob", 1):
        assert uniform(orders(policy, candidates), 24)
    two = orders("top-prob", 2)
    share = sum(n for order, n in two.items() if order[0] == 3) / two.total()
    assert share == pytest.approx(0.5, abs=0.03) and not uniform(two, 24)       # 3 of 6 pairs
    counts = Counter((a, x, b) for (a, x, b, *_), n in orders("uniform", 1, 1).items()
                     for _ in range(n))
    assert uniform(counts, 4 * 3 * 3)                               # latents are drawn anew


@every_device
@every_system
@pytest.mark.parametrize("temperature", [0, 0.5, 1, 2])
def test_sampling_follows_the_distribution(name, temperature, device):
    table, n = [[0.3, 0.5, 0.2], [0.6, 0.1, 0.3], [0.1, 0.2, 0.7]], 20_000
    tokens = torch.zeros(n, 3, dtype=torch.long, device=device)
    out, _ = latent.decode(fixed(*table), SYSTEMS[name], tokens, 0, 1, temperature=temperature,
                           candidates=2, generator=torch.Generator(device).manual_seed(0))
    for place, p in enumerate(table):
        weights = [x ** (1 / temperature) if temperature else x == max(p) for x in p]
        for token, weight in enumerate(weights):
            share, found = weight / sum(weights), (out[:, place] == token).float().mean()
            assert abs(found - share) <= 4 * math.sqrt(share * (1 - share) / n)


@every_system
def test_everything_stays_on_its_device(name, monkeypatch):
    """Torch's meta device has no numbers, but refuses tensors of other devices beside its own."""
    monkeypatch.setattr(torch.Tensor, "item", lambda self: 0.0)
    model, system = small_model().to("meta"), SYSTEMS[name]
    tokens = torch.zeros(6, 5, dtype=torch.long, device="meta")
    assert {x.device.type for x in draw(name, tokens, 2, 3, model=model)} == {"meta"}
    latent.nats(model, system, tokens, 2, [2], np.random.default_rng(0))
    for policy, heat in itertools.product(latent.POLICIES, (0, 1)):
        assert latent.decode(model, system, tokens, 2, 3, policy, temperature=heat)[0].is_meta
    assert 'map_location="cpu"' in (HERE / "latent.py").read_text()       # of a GPU's checkpoints


# data -------------------------------------------------------------------------------------------
BOX = {4: (2, 2), 5: (5, 1), 6: (2, 3), 9: (3, 3)}             # of side 5 are the Latin squares
every_task = pytest.mark.parametrize("name,size", [
    (name, size) for name, task in TASKS.items() for size in task.sizes if name + size != "latin6"])


def naive_valid(board, side):
    """Do all rows, columns and boxes hold every digit once?"""
    (high, wide), grid = BOX[side], np.reshape(board, (side, side))
    boxes = [grid[r:r + high, c:c + wide].ravel() for r in range(0, side, high)
             for c in range(0, side, wide)]
    return all(sorted(group) == list(range(side)) for group in [*grid, *grid.T, *boxes])


def naive_solutions(puzzle, side, limit=2):
    """Backtracking, cell with the fewest digits first: at most `limit` solutions."""
    (high, wide), options, found = BOX[side], {}, []
    for cell in (i for i, digit in enumerate(puzzle) if digit == side):
        r, c = divmod(cell, side)
        seen = {puzzle[i] for i in range(side * side) if i // side == r or i % side == c
                or (i // side // high, i % side // wide) == (r // high, c // wide)}
        options[cell] = [digit for digit in range(side) if digit not in seen]
    if not options:
        return [list(puzzle)]
    cell = min(options, key=lambda i: len(options[i]))
    for digit in options[cell]:
        if len(found) < limit:
            found += naive_solutions([*puzzle[:cell], digit, *puzzle[cell + 1:]], side, limit)
    return found


def naive_puzzle(task, prompt):
    """The grid of a Sudoku puzzle, with `side` for blanks, from a grid or from a list of givens."""
    if task.prompt != "list":
        return prompt
    tokens = sorted(token for token in prompt if token != task.side)
    given = dict(divmod(token - task.side - 1, task.side) for token in tokens)
    assert prompt == tokens + [task.side] * (len(prompt) - len(given))      # no cell stands twice
    return [given.get(cell, task.side) for cell in range(task.side**2)]


def naive_derivation(task, prompt, answer):
    """Plain Python, fractions as they come."""
    *left, target = prompt
    for a, sign, b, r in np.reshape(answer, (-1, 4)).tolist():
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


def naive_zebra(task, prompt, answer):
    H = task.houses
    at = {thing: i % H for i, thing in enumerate(answer)} | {task.things + h: h for h in range(H)}

    def admits(rule, x, y, z):
        if rule == 6:
            return at[x] < at[z] < at[y] or at[y] < at[z] < at[x]
        if rule == 7:
            return at[x] in (0, H - 1)
        return [None, at[x] == at[y], at[x] != at[y], at[y] - at[x] == 1, at[y] > at[x],
                at[y] - at[x] in (1, -1), None, None, at[x] == at[y]][rule]
    return all(sorted(answer[i:i + H]) == list(range(i, i + H)) for i in range(0, task.things, H)
               ) and all(admits(*task.clues[t - task.things]) for t in prompt if t != task.things)


def naive_correct(task, row):
    prompt, answer = row[:task.prompt_len], row[task.prompt_len:]
    if task.name in ("zebra", "countdown"):
        naive = {"zebra": naive_zebra, "countdown": naive_derivation}[task.name]
        return naive(task, prompt, answer)
    puzzle = naive_puzzle(task, prompt) if prompt else answer
    return naive_valid(answer, task.side) and all(
        given in (task.side, digit) for given, digit in zip(puzzle, answer))


def wrong_boards(board, side, rng):
    """Boards with wrong cells of every kind, from a valid one; some are right again."""
    (high, wide), grid = BOX[side], board.reshape(side, side)
    cyclic = (np.arange(side) + np.arange(side)[:, None]) % side                   # a Latin square
    found = [cyclic, np.arange(side) + 0 * grid, grid + 1, grid - 1, 0 * grid]
    for _ in range(40):
        band, stack = high * rng.integers(side // high), wide * rng.integers(side // wide)
        r, c, any_two = (rng.permutation(n)[:2] for n in (high, wide, side))
        rows, columns, swapped = (grid.copy() for _ in range(3))
        box = slice(band, band + high), slice(stack, stack + wide)
        rows[band + r, box[1]] = grid[band + r[::-1], box[1]]         # columns and boxes stay good
        columns[box[0], stack + c] = grid[box[0], stack + c[::-1]]
        swapped[any_two] = grid[any_two[::-1]]                         # rows and columns stay good
        found += [rows, columns, swapped, swapped.T, (grid + 1) % side]
    return [b.flatten() for b in found]


def wrong_answers(task, row, other, rng):
    """Answers that are wrong in every way; some are right."""
    answer, found = row[task.prompt_len:], [row[task.prompt_len:], other[task.prompt_len:]]
    for i, j in rng.integers(len(answer), size=(100, 2)):
        changed, swapped, mixed = answer.copy(), answer.copy(), answer.copy()
        changed[i] = rng.integers(task.vocab_size)
        swapped[[i, j]] = answer[[j, i]]
        mixed[min(i, j):max(i, j)] = rng.permutation(answer[min(i, j):max(i, j)])
        found += [changed, swapped, mixed]
    if task.name == "countdown":
        for i in range(0, len(answer), 4):
            a, _, b, _ = answer[i:i + 4]
            for sign, r in zip((101, 102, 103, 104), (a + b, a - b, a * b, a // max(b, 1))):
                found += [np.r_[answer[:i], step, answer[i + 4:]] for step in (
                    [a, sign, b, r], [b, sign, a, r]) if 0 <= r < 105]
    elif task.name != "zebra":
        found += wrong_boards(answer, task.side, rng)
    return found


@every_task
def test_batches_and_the_checker(name, size):
    """Batches of any size, all of them right; and no puzzle is in both splits."""
    task, rng, seen = TASKS[name](size), np.random.default_rng(0), {}
    for split in ("train", "test"):
        for n in [1, 2, 3, 300 if size != "4x4" else 9]:
            batch, again = (task.batch(n, np.random.default_rng(n), split) for _ in range(2))
            assert (batch == again).all() and batch.dtype == np.int64
            assert task.correct(batch).tolist() == [True] * n and batch.shape == (n, task.seq_len)
            assert batch.min() >= 0 and batch.max() < task.vocab_size
        assert not hasattr(task, "held_out") or (task.held_out(batch) == (split == "test")).all()
        rows = batch.tolist()
        boards = [row[-task.side**2:] for row in rows] if hasattr(task, "side") else []
        seen[split] = {tuple(board[:task.side].index(digit) for digit in board) for board in boards
                       } or {tuple(row[:task.prompt_len]) for row in rows}
    assert not seen["train"] & seen["test"] and seen["test"]
    for row, other in list(zip(batch, batch[1:]))[:{"countdown": 50}.get(name, 3)]:
        rows = [[*row[:task.prompt_len], *a] for a in wrong_answers(task, row, other, rng)]
        expected = [naive_correct(task, list(map(int, row))) for row in rows]
        assert task.correct(np.array(rows)).tolist() == expected and set(expected) == {True, False}
    marked = []
    task.show(batch[0].tolist(), lambda place, text: marked.append(place) or text)
    assert sorted(marked) == [*range(task.prompt_len, task.seq_len)]


@pytest.mark.parametrize("split,held_out", [("train", True), ("test", False)])
@pytest.mark.parametrize("name", ["countdown", "zebra"])
def test_every_puzzle_goes_through_the_split(name, split, held_out):
    """If all puzzles are held out, or none, one looks for others without end."""
    with mock.patch(f"data.{name}.in_test", lambda keys: np.full(len(keys), held_out)):
        with pytest.raises(RecursionError):
            TASKS[name](TASKS[name].sizes[0]).batch(1, np.random.default_rng(0), split)


@pytest.mark.parametrize("size", TASKS["sudoku-puzzle"].sizes)
def test_puzzles_have_one_solution(size):
    task, side = TASKS["sudoku-puzzle"](size), int(size[0])
    assert task.floor_nats == 0
    for row in task.batch(40, np.random.default_rng(0), "train").tolist():
        puzzle, board = naive_puzzle(task, row[:task.prompt_len]), row[task.prompt_len:]
        shown = [int(x) - 1 if x != "." else side for x in re.findall(r"[\d.]", task.show(row))]
        assert naive_solutions(puzzle, side) == [board] and shown == puzzle + board
        assert puzzle.count(side) in {4: range(8, 13), 6: range(18, 27), 9: range(41, 54)}[side]


@pytest.mark.parametrize("size,n", [("3x2", 20), ("3x3", 20), ("3x4", 3), ("4x3", 1)])
@mock.patch("data.zebra.in_test", lambda clues: (np.diff(clues) < 0).any(1))     # they are sorted
def test_zebra_has_one_solution_and_no_clue_was_implied(size, n):
    task = TASKS["zebra"](size)
    H, things = task.houses, task.things
    orders = [list(itertools.permutations(range(i, i + H))) for i in range(0, things, H)]
    for row in task.batch(n, np.random.default_rng(0), "train").tolist():
        grids = [sum(grid, ()) for grid in itertools.product(*orders)]
        for used, clue in enumerate(row[:task.prompt_len], start=1):      # fewer and fewer are left
            left = [grid for grid in grids if naive_zebra(task, [clue], grid)]
            few = row[:used] + [things] * (task.prompt_len - used)
            right = task.correct(np.array([[*few, *grid] for grid in grids]))
            assert right.sum() == len(left) and (len(left) < len(grids) or clue == things)
            grids = left
        assert grids == [tuple(row[task.prompt_len:])]


def test_boards_are_uniform_and_a_tenth_is_held_out():
    rng = np.random.default_rng(0)
    assert len(np.unique(fill(6), axis=0)) == len(fill(6)) == 28_200_960 // 720 == 39_168
    for task, kinds, names in (Sudoku("4"), 288, 1), (TASKS["latin"]("5"), 161_280, 120):
        assert task.floor_nats == pytest.approx(math.log(kinds))
        boards = [task.batch(10_000, rng, split) for split in ("train", "test")]
        if names > 1:                                                       # up to the names
            boards = [np.take_along_axis(b[:, :5].argsort(1), b, axis=1) for b in boards]
        train, test = (Counter(map(tuple, b.tolist())) for b in boards)
        assert len(train) + len(test) == kinds // names and 0.07 < len(test) / len(train) < 0.14
        assert uniform(train, len(train)) and uniform(test, len(test))
    nine = Sudoku("9").batch(4000, rng, "train")          # from a pool of 3,044, up to the names
    assert len({tuple(np.argsort(board[:9])[board]) for board in nine}) > 3900


# the experiments of the scripts -----------------------------------------------------------------
TINY = "--size 4 --steps 20 --samples 32 --width 16 --layers 1 --jobs 1 --device cpu".split()


def run(script, *flags, experiment=None):
    """Run a script in this process."""
    with mock.patch.object(sys, "argv", [f"{script.__name__}.py", *map(str, flags)]):
        latent.main(script.flags(), TASKS, script.jobs, experiment or script.experiment)


def records(folder):
    """All records in a folder, but for times."""
    return [{k: v for k, v in r.items() if k not in ("ms_per_puzzle", "train_minutes")}
            for path in sorted(folder.glob("*.json"))
            for r in json.loads(path.read_text())["records"].values()]


@pytest.mark.parametrize("system,flags,windows,sweep,temperature,policy,candidates", [
    ("ar", "", [None], [0], 1, None, None),
    ("mtp", "--latents 0 2 99 all --steps 200", range(1, 17), [0, 2, 15], 1, None, None),
    ("mtp-causal", "--windows 3 --temperature 0", [3], [2], 0, None, None),
    ("control", "--windows all", [16], [15], 1, None, None),
    ("mdm", "", [None], [15], 1, "top-prob", 8),
    ("sidm", "--order margin --candidates 99 --compile", [None], [0], 1, "margin", 16),
    ("scdm", "--order uniform", [None], [0, 1, 2, 4, 8, 15], 1, "uniform", 1),
    ("scdm-causal", "--latents 3 all --candidates 5 --temperature 0.5", [None], [3, 11], 0.5,
     "top-prob", 5)])
def test_an_experiment(tmp_path, monkeypatch, system, flags, windows, sweep, temperature, policy,
                       candidates):
    """Training puzzles are never the same, held-out ones are measured; and what is recorded was
    measured in the way that was asked for."""
    task, hide, drawn, measured, solved = TASKS["sudoku-puzzle"]("4"), latent.hide, [], [], []

    def draws(the_system, tokens, prompt_len, mask, cut, window, rng):
        assert the_system is SYSTEMS[system] and prompt_len == 16
        drawn.append((tokens, window))
        return hide(the_system, tokens, prompt_len, mask, cut, window, rng)

    def nats(model, the_system, tokens, prompt_len, n_latents, rng):
        measured.append((tokens, n_latents))
        assert the_system is SYSTEMS[system] and prompt_len == 16
        return tokens[:, 0].float().mean() + torch.tensor(n_latents)

    def decode(model, the_system, tokens, n_latent, generator=None, **how):
        solved.append((tokens, n_latent, how))
        assert the_system is SYSTEMS[system]
        filled = tokens.clone()
        filled[::3, -1] = 4                                              # wrong
        return filled, 100 + n_latent
    monkeypatch.setattr(torch, "compile", lambda function: function)
    for name, fake in {"hide": draws, "nats": nats, "decode": decode}.items():
        monkeypatch.setattr(latent, name, fake)
    run(train_diffusion if policy else train_ar, *TINY, "--task", "sudoku-puzzle", "--samples", 600,
        "--systems", system, "--out", tmp_path, *flags.split())
    for calls, held_out in (drawn, False), (measured, True), (solved, True):
        assert all((task.held_out(call[0].numpy()) == held_out).all() for call in calls)
    assert len(torch.cat([tokens for tokens, _ in drawn]).unique(dim=0)) > 0.98 * 64 * len(drawn)
    seen = {window for _, window in drawn}
    assert min(seen) >= 16 if windows[0] is None else seen == set(windows)
    assert measured[0][1] == sweep
    how = {"prompt_len": 16, "temperature": temperature}
    how |= {"policy": policy, "candidates": candidates} if policy else {}
    assert all(call[2] == how for call in solved) and len(records(tmp_path)) == len(sweep)
    mean = torch.cat([tokens for tokens, _ in measured])[:, 0].float().mean().item()
    for k, record in zip(sweep, records(tmp_path)):
        right = [i % 128 % 3 != 0 for i in range(600)]                      # 128 at once
        expected = {"system": system, "n_latent": k, "order": policy, "candidates": candidates,
                    "temperature": temperature, "forward_tokens": 100 + k, "step": len(drawn),
                    "accuracy": sum(right) / 600, "unseen": None,
                    "window": "random" if len(windows) > 1 else windows[0]}
        assert {name: record[name] for name in expected} == expected
        assert record["nats"] == pytest.approx(mean + k)


def test_unseen_is_a_share_of_the_valid_boards(tmp_path, monkeypatch):
    task, rng = Sudoku("4"), np.random.default_rng(1)
    boards = [task.batch(5, rng, "test"), task.batch(15, rng, "train"), np.zeros((12, 16), int)]
    monkeypatch.setattr(latent, "decode", lambda *_, **how: (torch.tensor(np.vstack(boards)), 7))
    run(train_diffusion, *TINY, "--systems", "sidm", "--out", tmp_path)
    assert [(r["accuracy"], r["unseen"]) for r in records(tmp_path)] == [(20 / 32, 5 / 20)]


def test_the_table_is_of_this_run_and_its_errors_are_over_seeds(tmp_path):
    args = train_ar.flags().parse_args([*TINY, "--systems", "mtp", "--out", str(tmp_path)])
    same = {**{name: getattr(args, name, 0) for name in latent.SETTINGS}, "system": "mtp",
            "order": None, "samples": 50, "n_latent": 1, "temperature": 1, "candidates": None,
            "step": 9, **dict.fromkeys(latent.MEANS.split(), 5.0), "accuracy": 0.0, "nats": 7.0}
    more = [{"accuracy": 0.2}, {"accuracy": 0.3, "seed": 1},
            {"accuracy": 0.7, "seed": 2, "nats": 10}, {"n_latent": 2}, {"n_latent": 2}, {"lr": 1.0},
            {"step": 40}, {"samples": 51}, {"temperature": 0}, {"window": 4}, {"order": "uniform"}]
    for i, more in enumerate(more):
        (tmp_path / f"{i}.json").write_text(json.dumps({"records": {"": {**same, **more}}}))
    rows = {(row["seeds"], row["n_latent"]): row for row in latent.summary(args)}
    assert len(latent.summary(args)) == 7 and set(rows) == {(3, 1), (1, 1), (1, 2)}
    assert [rows[3, 1][name] for name in ("accuracy", "nats", "excess", "error")] == pytest.approx(
        [0.4, 8, 3, math.sqrt((0.2**2 + 0.1**2 + 0.3**2) / 2 / 3)])
    assert rows[1, 2]["error"] == pytest.approx(0.5 / 51)   # Wilson: p = 0 within sqrt(p(1-p) / 50)


def test_the_learning_rate_warms_up_and_falls(tmp_path, monkeypatch):
    rates = []
    recorder = mock.Mock(param_groups=[{}], state_dict=dict)
    recorder.step = lambda: rates.append(recorder.param_groups[0]["lr"])
    monkeypatch.setattr(latent, "optimizers", lambda model, lr: [recorder])
    run(train_ar, *TINY, "--systems", "ar", "--steps", 400, "--lr", 2, "--out", tmp_path)
    expected = [2 * min((i + 1) / 100, 1, 1 - 0.95 * (i - 200) / 200) for i in range(400)]
    assert rates == pytest.approx(expected)


class Kernels(TorchDispatchMode):
    """Counts what a GPU has to be told: all operations but views."""
    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += not (operation.is_view or re.match(".*(profiler|view)", operation.name()))
        return operation(*args, **(kwargs or {}))


def test_a_training_step_is_few_kernels(tmp_path):
    counts, model = [], small_model(6, 36, 3)
    for steps in (2, 3):
        with Kernels() as kernels:
            run(train_ar, *f"--systems mtp --device cpu --steps {steps} --out".split(),
                tmp_path / str(steps), experiment=lambda task, job: latent.train(task, job, model))
        counts.append(kernels.count)
    assert 100 < counts[1] - counts[0] <= 300


@every_system
def test_what_is_trained_is_the_objective(name, tmp_path, monkeypatch):
    """One step without an optimizer; each seed has weights and puzzles of its own."""
    script, seen = train_ar if SYSTEMS[name].order == "left" else train_diffusion, []

    def evaluate(task, args, model, state, *_):
        tokens, *hidden, weight = latent.batch(task, args, model.mask, 0)
        ce = latent.cross_entropy(model, SYSTEMS[name], tokens, *hidden)
        assert state["history"] == [[1, pytest.approx((weight * ce).sum().item())]]
        seen.append((tokens, model.token.weight))
    monkeypatch.setattr(latent, "optimizers", lambda model, lr: [])
    monkeypatch.setattr(latent, "evaluate", evaluate)
    run(script, *TINY, "--steps", 1, "--systems", name, "--seeds", 0, 1, "--out", tmp_path)
    assert not any(one.equal(two) for one, two in zip(*seen))


def test_muon_is_that_of_torch():
    models, generator = [small_model(layers=3) for _ in range(3)], torch.Generator().manual_seed(0)
    matrices = [w for w in models[1].blocks.parameters() if w.dim() == 2]
    opts = latent.optimizers(models[0], 0.01)
    trained = [id(w) for opt in opts for w in opt.param_groups[0]["params"]]
    assert sorted(trained) == sorted(map(id, models[0].parameters()))              # each, once
    muons = [torch.optim.Muon(matrices, 0.01, weight_decay=0, adjust_lr_fn="match_rms_adamw"),
             *opts[:-1]]
    for _ in range(5):
        for one, two in zip(models[0].parameters(), models[1].parameters()):
            one.grad = two.grad = torch.randn(one.shape, generator=generator)
        for muon in muons:
            muon.step()
    for one, two, start in zip(*(model.blocks.parameters() for model in models)):
        assert (one - two).norm() <= (one - start).norm() / 50         # torch's works in bfloat16


# trouble ----------------------------------------------------------------------------------------
def start(folder, script, *flags):
    """A script as in a terminal that knows only ASCII; with a log, and a bad matplotlib backend."""
    env = {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii", "MPLBACKEND": "module://missing"}
    with open(folder / f"{script}.log", "w") as log:
        return subprocess.Popen(
            [sys.executable, HERE / f"{script}.py", *TINY, *map(str, flags), "--out", folder],
            stdout=log, stderr=log, start_new_session=True, env=os.environ | env)


def living(process):
    ps = subprocess.run(["ps", "-A", "-o", "pgid=", "-o", "stat="], capture_output=True, text=True)
    return len(re.findall(rf"^ *{process.pid} +[^Z]", ps.stdout, re.MULTILINE))        # no zombies


def wait_for(process, condition, seconds=60):
    for _ in range(50 * seconds):
        if condition():
            return
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    raise TimeoutError


@pytest.mark.skipif(os.name == "nt", reason="no process groups")
@pytest.mark.parametrize("sent,when", [("INT", "start"), ("INT", "training"), ("INT", "alone"),
                                       ("TERM", "alone"), ("KILL", "start")])
def test_processes_end_together(tmp_path, sent, when):
    """Ctrl-C in a terminal reaches all processes; a signal may also reach the first alone."""
    process = start(tmp_path, *"train_diffusion --systems mdm sidm --jobs 2 --steps 99999".split())
    log, number = tmp_path / "train_diffusion.log", getattr(signal, f"SIG{sent}")
    wait_for(process, lambda: living(process) > 3 if when == "start" else all(
        re.search(f"{name}-s0: .*it/s", log.read_text()) for name in ("mdm", "sidm")))
    (os.kill if sent == "KILL" or when == "alone" else os.killpg)(process.pid, number)
    assert process.wait(20) == (130 if sent == "INT" else -number)
    wait_for(process, lambda: not living(process), 20)
    assert (sent == "INT") == ("--resume" in log.read_text())
    assert "Traceback" not in log.read_text() or when == "start"    # Python's own, while it imports


def stops(step, sent):
    """A clock that runs fast, so that checkpoints are written, and a signal in this step."""
    steps = [latent.cross_entropy] * step + [lambda *_: os.kill(os.getpid(), sent)]
    return mock.patch.multiple(latent, cross_entropy=lambda *those: steps.pop(0)(*those),
                               time=SimpleNamespace(time=itertools.count(0, 9).__next__))


def ends_badly(task, args):
    """Seed 0 goes wrong: killed, or a loss that is not finite."""
    if args.seed == 0:
        args.lr = math.inf if args.temperature == 1 else args.lr
    with stops(150 if args.seed == args.temperature == 0 else 999, signal.SIGTERM):
        train_diffusion.experiment(task, args)


def test_a_killed_run_resumes_exactly(tmp_path, monkeypatch, capfd):
    """And another process may draw the batches ahead, as for a GPU."""
    flags, cut = "--seeds 0 1 --systems scdm --steps 200 --temperature 0".split(), tmp_path / "cut"
    with pytest.raises(SystemExit, match="2"):
        run(train_diffusion, *TINY, *flags, "--jobs", 2, "--out", cut, experiment=ends_badly)
    assert 0 < latent.load(cut / "scdm-s0.pt")["step"] <= 150
    ahead = {"num_workers": 1, "multiprocessing_context": "spawn"}
    for folder, how in (cut, {}), (tmp_path / "whole", ahead):
        monkeypatch.setattr(latent, "DataLoader", lambda *a, **b: DataLoader(*a, **b | how))
        run(train_diffusion, *TINY, *flags, "--out", folder, "--resume")
    assert len(re.findall(r"whole/scdm-s\d.pt is not there", capfd.readouterr().err)) == 2
    for path in cut.glob("*.pt"):
        one, two = latent.load(path), latent.load(tmp_path / "whole" / path.name)
        assert all(one["model"][name].equal(two["model"][name]) for name in one["model"])
        assert dict(two["history"]).items() <= dict(one["history"]).items()
        assert json.loads(path.with_suffix(".json").read_text())["history"] == one["history"]
        assert two["history"][0][1] > two["history"][-1][1] and two["history"][-1][0] == 200
    assert records(cut) == records(tmp_path / "whole") != []


def test_scripts_side_by_side_in_one_folder(tmp_path):
    processes = [start(tmp_path, "train_ar", "--systems", "ar", "mtp"),
                 start(tmp_path, "train_diffusion", "--systems", "sidm", "scdm", "--jobs", 2)]
    assert [process.wait(90) for process in processes] == [0, 0]
    assert {(path.stem, path.suffix) for path in tmp_path.glob("*-s0*")} == set(itertools.product(
        ("ar-s0", "mtp-random-s0", "sidm-s0", "scdm-s0"), (".pt", ".json")))
    assert len(re.findall("AR.*%", (tmp_path / "train_ar.log").read_text())) >= 6      # the table


@pytest.mark.parametrize("jobs,temperature", [(1, 1), (2, 1), (2, 0)])
def test_a_failure_does_not_stop_the_others(tmp_path, monkeypatch, capfd, jobs, temperature):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)                    # nor does this
    with pytest.raises(SystemExit, match="2"):
        run(train_diffusion, *TINY, "--systems", "sidm", "--seeds", 0, 1, 2, "--jobs", jobs,
            "--temperature", temperature, "--steps", 200, "--out", tmp_path, experiment=ends_badly)
    out, err = capfd.readouterr()
    assert "Traceback" not in err and "error" in err.splitlines()[-1]
    if temperature:
        assert {r["seed"] for r in records(tmp_path)} == {1, 2} and "forward tokens" in out
        assert {path.name for path in tmp_path.glob("*.pt")} == {"sidm-s1.pt", "sidm-s2.pt"}
        assert "No figure" in out and "sidm-s0.pt: loss nan" in err.splitlines()[-1]


def test_a_full_disk_leaves_what_was_saved(tmp_path, monkeypatch):
    flags = [*TINY, "--systems", "sidm", "--out", tmp_path]
    run(train_diffusion, *flags)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def fails(path, *content):
        path.open("ab").write(b"half of it")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_bytes", fails)
    with pytest.raises(SystemExit, match="2"):
        run(train_diffusion, *flags, "--resume", "--steps", 30)
    assert all(path.read_bytes() == content for path, content in before.items())


def test_no_evaluation_replaces_another(tmp_path, capsys):
    flags = [*TINY, "--systems", "scdm", "--latents", 0, "--out", tmp_path]
    run(train_diffusion, *flags)
    before = (path := tmp_path / "scdm-s0.pt").read_bytes()
    for more in ["--samples 8", "--order uniform", "--order margin", "--candidates 2",
                 "--temperature 0", "--latents 3", "--steps 25"]:
        old = records(tmp_path)
        how = ["--resume"] if "steps" in more else ["--checkpoint", path]
        for _ in range(2):                                            # the second adds nothing
            run(train_diffusion, *flags, *how, *more.split())
            assert records(tmp_path)[:-1] == old
        assert (path.read_bytes() == before) == ("steps" not in more)
    assert any(tmp_path.glob("*.png")) != ("No figure" in capsys.readouterr().out)


BAD_INPUT = [                              # a script, and flags; one flag or file has to be named
    "train_diffusion --out weights --size 4 --systems scdm --width 16 --layers 1 --resume",
    "train_diffusion --layers 3 --out ../bad0 --size 4 --systems scdm --resume",
    "train_diffusion --checkpoint weights/scdm-s0.pt --out ../bad0", "train_diffusion --latents -1",
    "train_diffusion --checkpoint misfit.pt", "train_diffusion --out ../bad0 --size 4",
    "train_diffusion --checkpoint code.pt", "train_ar --checkpoint missing.pt", "train_ar --lr inf",
    "train_ar --checkpoint scdm-s0.pt", "train_ar --checkpoint foreign.pt", "train_ar --device tpu",
    "train_diffusion --candidates 0", "train_ar --checkpoint torn.pt", "train_ar --order top-prob",
    "train_ar --systems mdm", "train_ar --out torn.pt", "train_ar --windows 37",
    "train_ar --windows 0", "train_ar --samples 1", "train_ar --seeds -1", "train_ar --heads 3",
    "train_ar --steps 0", "train_ar --lr nan", "train_ar --size 5"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a checkpoint, and files that are none."""
    folder = tmp_path_factory.mktemp("bad")
    run(train_diffusion, *TINY, "--systems", "scdm", "--steps", 2, "--out", folder)
    (saved := latent.load(folder / "scdm-s0.pt")).pop("optimizers")
    (folder / "torn.pt").write_bytes((folder / "scdm-s0.pt").read_bytes()[:5000])
    (folder / "weights").mkdir()
    for name, content in [("code", {**saved, "model": os.mkdir}), ("foreign", {"weights": 1}),
                          ("misfit", {**saved, "model": {"token.weight": torch.zeros(3)}}),
                          ("weights/scdm-s0", saved)]:
        torch.save(content, folder / f"{name}.pt")
    return folder


@pytest.mark.parametrize("line", BAD_INPUT)
def test_bad_input_gets_one_line(folder, monkeypatch, capsys, line):
    (script, *flags), before = line.split(), sorted(folder.iterdir())
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as stop:
        run(sys.modules[script], *flags)
    err = capsys.readouterr().err
    named = [flag for flag in flags if flag.startswith("--") or flag.endswith(".pt")]
    assert stop.value.code == 2 and any(flag.strip("-") in err for flag in named), err
    assert err.count("\n") == 1 and sorted(folder.iterdir()) == before
    with pytest.raises(SystemExit, match="0"):
        run(sys.modules[script], "-h")
    assert all(flag in out for out in [capsys.readouterr().out] for flag in ("--size", "--out"))


def test_watch_shows_every_pass_and_records_nothing(tmp_path, capsys):
    run(train_diffusion, *TINY, "--systems", "scdm", "--latents", 3, "--out", tmp_path,
        "--candidates", 1, "--watch")
    frames = [part for part in capsys.readouterr().out.split("\n\n") if "latent tokens\n" in part]
    assert len(frames) == 16 and not list(tmp_path.glob("*.json"))
    for step, frame in enumerate(frames):
        assert [frame.count(mark) for mark in "[~%"] == [1, k := min(3, 15 - step), 1 + k]
    run(train_ar, *TINY, *"--task countdown --systems ar --watch --out".split(), tmp_path / "c")
    assert "The answer is" in capsys.readouterr().out


# not in the default run: -m gpu, -m bench ---------------------------------------------------------
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=on_gpu)])
def test_training_on_a_gpu(tmp_path, device):
    """The same weights have the same loss; it falls; an interrupted run goes on all the same."""
    flags = [*TINY, "--systems", "scdm", "--device", device, "--steps", 60, "--out"]
    for name, half in itertools.product(SYSTEMS, (False, True)):
        tokens, model = random_tokens(64, 12), small_model().to(device)
        with torch.autocast(device, torch.bfloat16, enabled=half):
            loss = draw(name, tokens.to(device), 3, 4, model=model)[0].item()
        assert loss == pytest.approx(draw(name, tokens, 3, 4)[0].item(), rel=0.02 if half else 1e-4)
    run(train_diffusion, *flags, tmp_path / "whole")
    with pytest.raises(SystemExit, match="130"), stops(45, signal.SIGINT):
        run(train_diffusion, *flags, tmp_path / "cut")
    run(train_diffusion, *flags, tmp_path / "cut", "--resume")
    one, two = (dict(latent.load(tmp_path / x / "scdm-s0.pt")["history"]) for x in ("whole", "cut"))
    run(train_ar, *TINY, "--device", device, "--jobs", 2, "--out", tmp_path / "two at once")
    assert two[60] < two[min(two)] - 0.05
    assert [one[50], one[60]] == pytest.approx([two[50], two[60]], abs=0.02)


@pytest.mark.bench
def test_speed():                                     # prints a table, which -s shows
    subprocess.run([sys.executable, HERE / ".github/bench.py"], check=True)
