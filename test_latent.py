"""What must always hold. Every reference here is naive: loops, enumeration, brute force."""
import json
import math
import os
import re
import runpy
import subprocess
import sys
from collections import Counter, namedtuple
from functools import cache, partial
from itertools import permutations, product
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from numpy.random import default_rng
from pytest import approx, raises
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import latent
import train_ar
import train_diffusion
from data import TASKS
from data.zebra import RULES
from latent import POLICIES, SYSTEMS, Recipe, RunError, Transformer, build, visibility

torch.set_num_threads(1)
HERE = Path(__file__).parent
every = pytest.mark.parametrize
patch = partial(mock.patch.object, latent)
every_system = every("system", SYSTEMS.values(), ids=SYSTEMS)
every_policy = every("policy", POLICIES)

PUZZLE = TASKS["sudoku-puzzle"]("4-list")
TINY = Recipe("scdm", None, 0, PUZZLE.name, "4-list", 32, lr=0.003, layers=1, heads=4, width=16)


def small_model(vocab_size=4, seq_len=12, layers=2):
    """A transformer with random weights everywhere, so that every path through it matters."""
    model = Transformer(vocab_size, seq_len, layers, 2, 16)
    for i, weight in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(i)
        torch.nn.init.normal_(weight, std=0.4, generator=generator)
    return model


def random_tokens(*shape):
    return torch.randint(4, shape, generator=torch.Generator().manual_seed(0))


def decode(*how, **more):
    """What `latent.decode` returns, and all steps that it shows."""
    steps = []
    decoded = latent.decode(*how, **more, on_step=lambda *step: steps.append(step))
    return decoded, steps


def uniform(counts, kinds):
    """Are counts as even as draws from equally likely kinds, within five sigmas of chi-square?"""
    expected = sum(counts.values()) / kinds
    statistic = sum((n - expected) ** 2 / expected for n in counts.values())
    return len(counts) == kinds and statistic <= kinds - 1 + 5 * math.sqrt(2 * (kinds - 1))


def spy(name, *effects):
    """A function of latent.py that notes its calls. An effect is what a call raises, or DEFAULT."""
    return patch(name, wraps=getattr(latent, name), side_effect=effects or None)


# who sees whom ----------------------------------------------------------------------------------
@every("line", [
    "ar           x... xx.. xxx. xxxx",
    "mtp          xxxx xxxx xxxx xxxx",
    "mtp-causal   x... xx.. xxxx xxxx",
    "control      xxxx xxxx xxxx xxxx",
    "mdm          xxxx xxxx xxxx xxxx",
    "sidm         xx.. xx.. xxx. xx.x",
    "scdm         xx.. xx.. xxx. xxxx",
    "scdm-causal  x... xx.. xxx. xxxx"])
def test_the_systems_are_those_of_the_paper(line):
    """A row for each query: two known tokens, then two masked ones."""
    name, *picture = line.split()
    system = SYSTEMS[name]
    turn = torch.arange(4)[None]
    masked = (turn >= 2) & (not system.shifted)
    visible = visibility(system, turn, masked)[0]
    assert ["".join("x" if seen else "." for seen in row) for row in visible] == picture
    assert system.shifted == (name == "ar")
    assert system.next_only == (name == "control")


def sees(system, query, key):
    """May a query attend to another token, the key? A token is (its turn, whether it is masked)."""
    turn, masked = query
    key_turn, key_masked = key
    if key_turn < 0:
        return False
    if not key_masked:
        return masked or key_turn < turn or not system.causal
    if system.sees == "joint":
        return masked or not system.causal
    return masked and system.sees == "semicausal" and key_turn < turn


def table(system, tokens):
    """Who sees whom: a list for each query."""
    places = range(len(tokens))
    return [[q == k or sees(system, tokens[q], tokens[k]) for k in places] for q in places]


def hidden_rows(system):
    """Rows of seven tokens, some of them hidden: what the model reads, turn, masked."""
    tokens = random_tokens(1, 7)
    for cut, window in product(range(7), (1, 3, 7)):
        yield latent.hide(system, tokens, 2, 4, cut, window, default_rng(cut))
    if not system.shifted:
        shared = torch.tensor([[0, 1, 2, 5, 5, 3, 4]])          # two candidates of a decoding step
        yield tokens, shared, shared >= 3


@every_system
@every("layers", [1, 2])
def test_visibility_is_the_table_and_says_who_has_no_influence(system, layers):
    """Move a token: where no path of as many steps as layers leads, logits are bit-identical."""
    model = small_model(layers=layers)
    places = torch.arange(7)[None]
    for inputs, turn, masked in hidden_rows(system):
        tokens = list(zip(turn[0].tolist(), masked[0].tolist()))
        visible = visibility(system, turn, masked)
        assert visible[0].tolist() == table(system, tokens)
        path = torch.matrix_power(visible[0].float(), layers) > 0
        before = model(inputs, places, visible)[0]
        for moved in range(7):
            elsewhere = torch.where(places == moved, 11, places)
            after = model(inputs, elsewhere, visible)[0]
            assert path[:, moved].equal((after != before).any(1))


def test_latent_py_prints_who_sees_whom(capsys):
    runpy.run_path(str(HERE / "latent.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert all(f"\n{name} " in out for name in SYSTEMS)


# the transformer --------------------------------------------------------------------------------
def test_the_transformer_is_a_naive_one():
    """In float64; a token that sees only itself gets no NaN."""
    model = small_model().double()
    tokens = torch.arange(5)[None]
    positions = 2 * tokens + 1
    visible = torch.ones(5, 5).tril() > 0
    x = model.token.weight[tokens[0]] + model.position.weight[positions[0]]
    for block in model.blocks:
        qkv = block.attention_norm(x) @ block.qkv.weight.T
        heads = []
        for q, k, v in zip(*(part.split(8, dim=1) for part in qkv.split(16, dim=1))):
            shares = (q @ k.T / math.sqrt(8)).exp() * visible
            heads.append(shares / shares.sum(1, keepdim=True) @ v)
        x = x + torch.cat(heads, dim=1) @ block.attention_out.weight.T
        hidden = (block.mlp_norm(x) @ block.mlp_in.weight.T).clamp(min=0)
        x = x + hidden**2 @ block.mlp_out.weight.T
    expected = model.norm(x) @ model.output.weight.T
    assert_close(model(tokens, positions, visible[None])[0], expected)


def test_initial_weights():
    model = Transformer(50, 60, 2, 2, 64)
    for name, weight in model.named_parameters():
        if name.endswith("_out.weight"):
            assert not weight.any()
        elif "norm" in name:
            assert (weight == name.endswith("weight")).all()
        else:
            std = 0.2 if name in ("token.weight", "position.weight") else 0.5 / math.sqrt(64)
            assert weight.std().item() == approx(std, rel=0.1)
    same, other = (Transformer(50, 60, 2, 2, 64, seed) for seed in (0, 1))
    assert same.token.weight.equal(model.token.weight)
    assert not other.token.weight.equal(model.token.weight)


def test_a_model_is_that_of_its_recipe():
    with patch("Transformer") as made:
        build(TINY._replace(layers=3, heads=8, width=32, seed=5), PUZZLE)
    told = made.call_args
    assert [*told.args, *told.kwargs.values()] == [69, 24, 3, 8, 32, 5]


# the objective ----------------------------------------------------------------------------------
def naive_logits(model, system, row, known, masked):
    """The logits (len(masked), V) of masked tokens when those at the places `known` are known, in
    this order, and no others are there. Of a shifted system: those of the next token."""
    places = [*known, *masked]
    inputs = [*row[known].tolist(), *[4] * len(masked)]
    if system.shifted:
        places = [*known, len(known)]
        inputs = [4, *row[known].tolist()]
    tokens = [(turn, turn >= len(known)) for turn in range(len(places))]
    read = [inputs], [places], [table(system, tokens)]
    logits = model(*map(torch.tensor, read))
    return logits[0, len(known):]


def draw(system, tokens, prompt_len, window, rng, model=small_model()):
    """The loss of one draw of the objective, turn and masked; rng may be a seed."""
    rng = default_rng(rng)
    *hidden, weight = latent.objective(system, tokens, prompt_len, model.mask, window, rng)
    ce = latent.cross_entropy(model, system, tokens, *hidden)
    return (weight * ce).sum(), *hidden[1:]


@every_system
@every("window", [1, 3, None])
@every("prompt_len", [0, 3])
def test_the_loss_by_hand(system, window, prompt_len):
    """Row by row, with nothing there but the known tokens and the window."""
    tokens = random_tokens(8, 12)
    loss, turn, masked = draw(system, tokens, prompt_len, window, 0)
    losses = []
    for b, row in enumerate(tokens):
        absent = (turn[b] < 0).sum()
        order = turn[b].argsort()[absent:].tolist()
        assert order[:prompt_len] == list(range(prompt_len))
        assert system.order == "random" or order == sorted(order)
        cuts = range(prompt_len, 12)
        if not system.shifted:
            cut = len(order) - masked[b].sum().item()
            assert cut in cuts
            assert len(order) == min(12, cut + (window or 12))
            cuts = [cut]
        for cut in cuts:
            logits = naive_logits(small_model(), system, row, order[:cut], order[cut:])
            counted = 1 if system.next_only else len(logits)
            for place, logit in list(zip(order[cut:], logits))[:counted]:
                losses.append(-logit.log_softmax(-1)[row[place]])
    assert_close(loss, torch.stack(losses).mean())


def test_cuts_and_random_windows_are_uniform():
    tokens = torch.zeros(1, 5, dtype=torch.long)
    with spy("hide") as hide:
        for seed in range(600):
            draw(SYSTEMS["mtp"], tokens, 2, "random", seed)
    drawn = [(call.args[4].item(), call.args[5]) for call in hide.call_args_list]
    assert uniform(Counter(drawn), 3 * 3)


def test_orders_are_uniform_and_cuts_spread_over_the_rows():
    tokens = torch.zeros(6, 5, dtype=torch.long)
    orders = Counter()
    for seed in range(600):
        _, turn, masked = draw(SYSTEMS["scdm"], tokens, 2, None, seed)
        orders.update(map(tuple, turn[:, 2:].tolist()))
        assert Counter(masked.sum(1).tolist()) == {1: 2, 2: 2, 3: 2}
    assert uniform(orders, 6)


# the decoder ------------------------------------------------------------------------------------
@every_system
@every_policy
@every("prompt_len,n_latent", [(0, 0), (2, 2), (2, 11)])
@every("teacher_forcing", [False, True])
def test_decoding_is_training(system, policy, prompt_len, n_latent, teacher_forcing):
    """With a cache or without, what is decoded has the logits that a naive pass gives it, as in
    training. And `nats` is minus the log-probability of all tokens that are put in."""
    tokens = random_tokens(3, 8)
    model = small_model()
    decoded, steps = decode(model, system, tokens, prompt_len, n_latent, policy, 3,
                            teacher_forcing=teacher_forcing)
    assert decoded.tokens.equal(tokens) == teacher_forcing
    for b, row in enumerate(decoded.tokens):
        known = list(range(prompt_len))
        nats = 0
        for _, positions, _, c, places in steps:
            place = places[b].item()
            masked = positions[b].tolist()
            if system.order == "random":            # it sees latent tokens, and others if joint
                masked.remove(place)
                masked = [*masked[c - 1:], place, *masked[:c - 1]]
            logits = naive_logits(model, system, row, known, masked)
            nats -= logits[masked.index(place)].log_softmax(-1)[row[place]]
            known.append(place)
        assert_close(decoded.nats[b], nats)


@every_system
def test_the_probabilities_of_all_answers_sum_to_one(system):
    """With every unknown place as a candidate, the order follows from the answer."""
    answers = torch.cartesian_prod(*[torch.arange(4)] * 3)
    decoded = latent.decode(small_model(), system, answers, 0, 1, teacher_forcing=True)
    assert decoded.nats.neg().exp().sum().item() == approx(1, abs=1e-4)


@every("line", [
    "ar           0  1    36   0",
    "mtp          4  1   800   4",
    "mtp-causal   4  1   205   4",
    "sidm         0  8   890   0",
    "sidm         3  1   768   0",
    "scdm        28  8  1296  28",
    "scdm-causal 28  8   701  28",
    "mdm         35  8  1296  35"])
def test_forward_tokens_and_latents_of_a_board(line):
    """Decoded with so many latent tokens and candidates."""
    name, *numbers = line.split()
    n_latent, candidates, *expected = map(int, numbers)
    board = torch.zeros(1, 36, dtype=torch.long)
    model = small_model(6, 36)
    decoded = latent.decode(model, SYSTEMS[name], board, 0, n_latent, "margin", candidates)
    assert [decoded.forward_tokens, decoded.latents] == expected


@every_system
@every_policy
@every("prompt_len,candidates,n_latent", [(3, 1, 0), (3, 1, 4), (0, 3, 4), (0, 100, 11)])
def test_each_step_decodes_what_the_policy_likes_best(
        system, policy, prompt_len, candidates, n_latent):
    tokens = random_tokens(5, 12)
    decoded, steps = decode(small_model(), system, tokens, prompt_len, n_latent, policy, candidates)
    before = torch.where(torch.arange(12) < prompt_len, tokens, 4)
    for n, (now, positions, logits, c, places) in enumerate(steps, start=prompt_len):
        assert (before.gather(1, positions) == 4).all()
        scores = POLICIES[policy](logits[:, :c].softmax(-1))
        assert scores[positions[:, :c] == places].equal(scores.amax(1))
        assert system.order == "random" or (places == n).all()
        assert now.scatter(1, places, 4).equal(before)
        before = now
    assert before.equal(decoded.tokens)
    assert before.max() < 4


@every_system
def test_decoding_follows_its_generator(system):
    found = []
    for seed in (0, 0, 1):
        how = {"generator": torch.Generator().manual_seed(seed)}
        decoded = latent.decode(small_model(), system, random_tokens(5, 12), 3, 4, **how)
        found.append(decoded.tokens.tolist())
    assert found[0] == found[1] != found[2]


def fixed(*table):
    """A model that predicts the same, a table (T, V) of probabilities, whatever it reads."""
    def model(tokens, positions, *_):
        return torch.tensor(table).log()[positions.expand(tokens.shape)]
    model.mask = len(table[0])
    return model


def orders(policy, candidates, n_latent=0):
    """How often the four places of an answer are decoded in which order; each place is followed by
    the latent ones of its step."""
    model = fixed([0.5, 0.49, 0.01], [0.45, 0.3, 0.25], [0.6, 0.3, 0.1], [0.9, 0.05, 0.05])
    tokens = torch.zeros(12_000, 4, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    _, steps = decode(model, SYSTEMS["scdm"], tokens, 0, n_latent, policy, candidates,
                      generator=generator)
    shown = []
    for _, positions, _, c, place in steps:
        shown += [place, positions[:, c:]]
    return Counter(map(tuple, torch.cat(shown, dim=1).tolist()))


def test_the_order_is_the_policy():
    assert list(orders("top-prob", 4)) == [(3, 2, 0, 1)]
    assert list(orders("margin", 4)) == [(3, 2, 1, 0)]


@every("policy,candidates", [("random", 1), ("random", 3), ("random", 4), ("top-prob", 1)])
def test_the_order_is_uniform_without_a_choice(policy, candidates):
    assert uniform(orders(policy, candidates), 24)


def test_latent_tokens_are_drawn_anew_at_every_step():
    assert uniform(orders("random", 1, 1), 4 * 3 * 3 * 2 * 2)


@every_system
@every("temperature", [0, 0.5, 1, 2])
def test_sampling_follows_the_distribution(system, temperature):
    table = [0.3, 0.5, 0.2], [0.6, 0.1, 0.3], [0.1, 0.2, 0.7]
    tokens = torch.zeros(20_000, 3, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    decoded = latent.decode(fixed(*table), system, tokens, 0, 1, candidates=2,
                            temperature=temperature, generator=generator)
    logits = torch.tensor(table).log() / max(temperature, 0.001)
    for place, expected in enumerate(logits.softmax(-1)):
        found = decoded.tokens[:, place].bincount(minlength=3) / 20_000
        assert_close(found, expected, rtol=0, atol=0.014)                             # 4 sigmas


@every_system
@every_policy
def test_everything_stays_on_its_device(system, policy):
    """Torch's meta device has no numbers, but refuses tensors of other devices beside its own."""
    model = small_model().to("meta")
    tokens = torch.zeros(6, 5, dtype=torch.long, device="meta")
    for x in draw(system, tokens, 2, 3, 0, model):
        assert x.is_meta
    with mock.patch.object(torch.Tensor, "item", lambda self: 0):
        decoded = latent.decode(model, system, tokens, 2, 3, policy, teacher_forcing=True)
    assert decoded.nats.is_meta


# data -------------------------------------------------------------------------------------------
task_of = cache(lambda name, size: TASKS[name](size))
def of_all_sizes(*names):
    return every("name,size", [(name, size) for name in names for size in TASKS[name].sizes])


every_task = of_all_sizes(*TASKS)
every_puzzle = of_all_sizes("latin-puzzle", "sudoku-puzzle")


@cache
def batch_of(name, size, split):
    n = 9 if size == "4x4" else 300                                         # a big Zebra is slow
    return task_of(name, size).batch(n, default_rng(0), split)


@cache
def naive_units(task):
    """The cells of each row, column and box; in a Latin square a column is one, too."""
    side = task.side
    boxes = {4: (2, 2), 6: (2, 3), 9: (3, 3)}
    high, wide = boxes[side] if "sudoku" in task.name else (side, 1)
    cells = np.arange(side**2).reshape(side, side)
    units = [*cells, *cells.T]
    for row, column in product(range(0, side, high), range(0, side, wide)):
        units.append(cells[row:row + high, column:column + wide].ravel())
    return [unit.tolist() for unit in units]


def naive_solutions(task, puzzle):
    """At most two, by backtracking from the cell with the fewest digits."""
    options = {}
    for cell, digit in enumerate(puzzle):
        if digit == task.side:
            units = [unit for unit in naive_units(task) if cell in unit]
            seen = {puzzle[i] for unit in units for i in unit}
            options[cell] = set(range(task.side)) - seen
    if not options:
        return [puzzle]
    cell = min(options, key=lambda cell: len(options[cell]))
    found = []
    for digit in options[cell]:
        if len(found) < 2:
            found += naive_solutions(task, [*puzzle[:cell], digit, *puzzle[cell + 1:]])
    return found


def naive_puzzle(task, prompt):
    """The grid of a puzzle, `side` where nothing is given, from a grid or from a list."""
    side = task.side
    if not task.listed:
        return prompt
    puzzle = [side] * side**2
    givens = [token for token in prompt if token != side]
    assert prompt == sorted(set(givens)) + [side] * (len(prompt) - len(givens))
    for token in givens:
        cell, digit = divmod(token - side - 1, side)
        puzzle[cell] = digit
    return puzzle


def naive_board(task, prompt, answer):
    for unit in naive_units(task):
        if {answer[cell] for cell in unit} != set(range(task.side)):
            return False
    puzzle = naive_puzzle(task, prompt) if prompt else answer
    return all(given in (task.side, digit) for given, digit in zip(puzzle, answer))


def naive_derivation(task, prompt, answer):
    """Plain Python, fractions as they come."""
    *left, target = prompt
    for a, sign, b, r in np.reshape(answer, (-1, 4)).tolist():
        if a not in left or sign not in range(101, 105):
            return False
        left.remove(a)
        if b not in left or (sign == 104 and b == 0):
            return False
        left.remove(b)
        exact = [a + b, a - b, a * b, a / b if b else None][sign - 101]
        if exact != r or not 0 <= r <= 100:
            return False
        left.append(r)
    return left == [target]


def naive_grid(task, prompt, answer):
    houses, things = task.houses, task.things
    for start in range(0, things, houses):
        if sorted(answer[start:start + houses]) != [*range(start, start + houses)]:
            return False
    at = {thing: i % houses for i, thing in enumerate(answer)}
    at |= {things + house: house for house in range(houses)}
    for token in prompt:
        rule, *names = task.clues[token - things]
        x, y, z = (at.get(name, 0) for name in names)
        truths = [True, x == y, x != y, y - x == 1, x < y, y - x in (-1, 1),
                  x < z < y or y < z < x, x in (0, houses - 1), x == y]
        if not truths[rule]:
            return False
    return True


NAIVE = {"countdown": naive_derivation, "zebra": naive_grid}               # or naive_board


def wrong_steps(answer):
    """Derivations in which one step is another, right or wrong."""
    for i in range(0, len(answer), 4):
        a, _, b, _ = answer[i:i + 4]
        for x, y in permutations((a, b)):
            for sign, r in enumerate((x + y, abs(x - y), x * y, x // max(y, 1)), start=101):
                yield np.r_[answer[:i], x, sign, y, r % 105, answer[i + 4:]]


def wrong_answers(task, answer, other, rng):
    """Answers that are wrong in every way; some are right."""
    found = [answer, other]
    for i, j in rng.integers(len(answer), size=(200, 2)):
        changed, swapped = answer.copy(), answer.copy()
        changed[i] = rng.integers(task.vocab_size)
        swapped[[i, j]] = answer[[j, i]]
        found += [changed, swapped]
    if task.name == "countdown":
        found += wrong_steps(answer)
    if hasattr(task, "side"):
        grid = answer.reshape(task.side, task.side)
        boxes = np.roll(grid, 1, axis=0), np.roll(grid, 1, axis=1)        # rows, columns are right
        found += [board.ravel() for board in (*boxes, grid.T, grid + 1, grid - 1, 0 * grid)]
    return found


@every_task
def test_the_checker_is_brute_force(name, size):
    task = task_of(name, size)
    naive = NAIVE.get(name, naive_board)
    rng = default_rng(0)
    batch = batch_of(name, size, "test")[:30 if name == "countdown" else 4]
    verdicts = []
    for row, other in zip(batch, batch[1:]):
        prompt, answer = row[:task.prompt_len], row[task.prompt_len:]
        answers = wrong_answers(task, answer, other[task.prompt_len:], rng)
        expected = [naive(task, prompt.tolist(), wrong.tolist()) for wrong in answers]
        rows = np.array([[*prompt, *wrong] for wrong in answers])
        assert task.correct(rows).tolist() == expected
        verdicts += expected
    assert set(verdicts) == {True, False}


@every_task
@every("split", ["train", "test"])
def test_batches_are_right_and_follow_their_generator(name, size, split):
    task = task_of(name, size)
    for n in (1, 2, 3):
        batch, again = (task.batch(n, default_rng(n), split) for _ in range(2))
        assert batch.shape == (n, task.seq_len)
        assert (batch == again).all()
    batch = batch_of(name, size, split)
    assert batch.dtype == np.int64
    assert batch.min() >= 0 and batch.max() < task.vocab_size
    assert task.correct(batch).all()


@every_task
def test_no_puzzle_is_in_both_splits(name, size):
    task = task_of(name, size)
    train, test = (batch_of(name, size, split) for split in ("train", "test"))
    if hasattr(task, "held_out"):
        assert task.held_out(test).all()
        assert not task.held_out(train).any()
    else:
        seen, others = (set(map(tuple, batch[:, :task.prompt_len])) for batch in (train, test))
        assert not seen & others


@every("split,held_out", [("train", True), ("test", False)])
@every("name", ["countdown", "zebra"])
def test_every_puzzle_goes_through_the_split(name, split, held_out):
    """If all puzzles are held out, or none, one looks for others without end."""
    task = task_of(name, TASKS[name].sizes[0])
    with mock.patch(f"data.{name}.in_test", lambda keys: np.full(len(keys), held_out)):
        with raises(RecursionError):
            task.batch(1, default_rng(0), split)


@every_task
def test_show_marks_every_token_of_the_answer(name, size):
    task = task_of(name, size)
    row = batch_of(name, size, "test")[0].tolist()
    marked = []
    task.show(row, lambda place, text: marked.append(place) or text)
    assert sorted(marked) == list(range(task.prompt_len, task.seq_len))


@every_puzzle
def test_puzzles_have_one_solution(name, size):
    task = task_of(name, size)
    for row in batch_of(name, size, "train")[:10].tolist():
        puzzle = naive_puzzle(task, row[:task.prompt_len])
        assert naive_solutions(task, puzzle) == [row[task.prompt_len:]]


@every_puzzle
def test_any_cell_can_be_given_and_with_any_digit(name, size):
    task = task_of(name, size)
    batch = task.batch(2000, default_rng(0), "train")[:, :task.prompt_len]
    puzzles = np.array([naive_puzzle(task, row) for row in batch.tolist()])
    for cell in puzzles.T:
        assert set(cell) == set(range(task.side + 1))
    givens = (puzzles < task.side).sum(1)
    fewest, most = task.givens[task.side]
    assert fewest <= givens.min() < givens.max() == most


@every_puzzle
def test_a_puzzle_is_read_as_it_is_shown(name, size):
    task = task_of(name, size)
    row = batch_of(name, size, "test")[0].tolist()
    prompt, answer = row[:task.prompt_len], row[task.prompt_len:]
    shown = re.sub(r"[^\d.]", "", task.show(row))
    assert shown[task.cells:] == "".join(str(digit + 1) for digit in answer)
    assert task.read(shown[:task.cells]).tolist() == [prompt + [0] * task.cells]


@every("text", ["", "." * 24, "6" + "." * 24, "12345" * 5])
def test_what_is_no_puzzle_is_not_read(text):
    with raises(ValueError):
        task_of("latin-puzzle", "5-list").read(text)


@every("size,n", [("3x2", 20), ("3x3", 20), ("3x4", 3), ("4x3", 1)])
@mock.patch("data.zebra.in_test", lambda clues: (np.diff(clues) < 0).any(1))     # they are sorted
def test_zebra_has_one_solution_and_no_clue_was_implied(size, n):
    task = task_of("zebra", size)
    houses, things = task.houses, task.things
    attributes = [permutations(range(i, i + houses)) for i in range(0, things, houses)]
    grids = [sum(grid, ()) for grid in product(*attributes)]
    for row in task.batch(n, default_rng(0), "train").tolist():
        left = grids
        for clue in row[:task.prompt_len]:                      # fewer and fewer grids are left
            before = left
            left = [grid for grid in before if naive_grid(task, [clue], grid)]
            assert len(left) < len(before) or clue == things
        assert left == [tuple(row[task.prompt_len:])]


def test_every_number_and_every_sign_is_drawn():
    batch = batch_of("countdown", "4", "train")
    assert set(batch[:, :4].flat) == set(range(1, 14))
    assert set(batch[:, 6::4].flat) == set(range(101, 105))


def test_every_rule_and_every_house_of_a_thing_is_drawn():
    task = task_of("zebra", "3x3")
    clues, answers = np.split(batch_of("zebra", "3x3", "train"), [task.prompt_len], axis=1)
    assert set(task.clues[clues - task.things, 0].flat) == set(range(len(RULES)))
    assert all(len(set(house)) == 3 for house in answers.T)


@every("line", [
    "sudoku         4       288",
    "sudoku         6       28_200_960",
    "sudoku         9       6_670_903_752_021_072_936_960",
    "latin          5       161_280",
    "latin          6       812_851_200",
    "latin-puzzle   5-list  1",
    "zebra          3x2     1"])
def test_the_floor_is_the_entropy_of_the_answer(line):
    name, size, answers = line.split()
    assert task_of(name, size).floor_nats == math.log(int(answers))


@every("name,size,kinds", [("sudoku", "4", 288 // 24), ("latin", "5", 161_280 // 120)])
def test_boards_are_uniform_and_in_one_split(name, size, kinds):
    """Up to the names of digits. About a tenth is held out."""
    task = task_of(name, size)
    numbers = []
    for split in ("train", "test"):
        boards = task.batch(10_000, default_rng(0), split)
        renamed = np.take_along_axis(boards[:, :task.side].argsort(1), boards, axis=1)
        counts = Counter(map(tuple, renamed))
        numbers.append(len(counts))
        assert uniform(counts, len(counts))
    assert sum(numbers) == kinds
    assert 0.07 < numbers[1] / kinds < 0.2


def test_the_symmetries_of_side_9_move_a_cell_anywhere():
    cells = np.tile(np.arange(81), (20_000, 1))
    moved = task_of("sudoku", "9")._symmetry(cells, default_rng(0))
    in_a_row = moved[:, 0] // 9 == moved[:, 1] // 9                     # else it is transposed
    assert uniform(Counter(zip(moved[:, 0], in_a_row)), 81 * 2)


# the scripts ------------------------------------------------------------------------------------
FLAGS = ("--task sudoku-puzzle --size 4-list --steps 20 --samples 32 --batch-size 32 --width 16 "
         "--layers 1 --device cpu")


def run(line, folder, flags=FLAGS, draw=mock.Mock()):
    """Run a script in this process; without a figure, which takes longer than all the rest."""
    script, *more = line.split()
    argv = [f"{script}.py", *flags.split(), "--out", str(folder), *more]
    script = sys.modules[script]
    with mock.patch.object(sys, "argv", argv), patch("draw", draw):
        latent.main(script.flags(), TASKS, script.models)


def records(folder):
    paths = sorted(folder.glob("*-s*.jsonl"))
    return [json.loads(line) for path in paths for line in path.open()]


def models(line, task):
    """The models of a script, each with its decodings: candidates, latent tokens, policy."""
    script, *flags = line.split()
    script = sys.modules[script]
    settings = dict(list(TINY._asdict().items())[3:])
    found = []
    for recipe, decodings in script.models(task, script.flags().parse_args(flags), settings):
        ways = [" ".join(str(value) for _, value in sorted(way.items())) for way in decodings]
        found.append(f"{recipe.name}: " + ", ".join(ways))
    return found


@every("line,expected", [
    ("train_ar", ["ar-s0: 0", "mtp-random-s0: 0, 2, 8, 15"]),
    ("train_ar --systems ar mtp-causal --windows 3 all --latents 5",
     ["ar-s0: 0", "mtp-causal-3-s0: 2", "mtp-causal-16-s0: 15"]),
    ("train_ar --systems control --windows random 99 all --latents 99 3 all --seeds 0 1",
     ["control-random-s0: 3, 15", "control-16-s0: 15",
      "control-random-s1: 3, 15", "control-16-s1: 15"]),
    ("train_diffusion --latents 0 all",
     ["mdm-s0: 1 15 random, 8 15 top-prob", "sidm-s0: 1 0 random, 8 0 top-prob",
      "scdm-s0: 1 0 random, 1 15 random, 8 0 top-prob, 8 8 top-prob"]),
    ("train_diffusion --systems scdm-causal --orders margin --candidates 5 --latents 3 all",
     ["scdm-causal-s0: 5 3 margin, 5 11 margin"]),
    ("train_diffusion --systems sidm --orders top-prob --candidates 99 --seeds 7",
     ["sidm-s7: 16 0 top-prob"])])
def test_models_and_their_decodings(line, expected):
    """Of an answer of sixteen tokens."""
    assert models(line, PUZZLE) == expected


@every("answer,candidates", [(1, 1), (2, 1), (3, 1), (6, 3), (15, 7), (36, 8)])
def test_candidates_leave_latent_tokens_of_a_short_answer(answer, candidates):
    task = SimpleNamespace(prompt_len=2, seq_len=2 + answer)
    found = models("train_diffusion --systems scdm --orders top-prob --latents all", task)
    assert found == [f"scdm-s0: {candidates} {answer - candidates} top-prob"]


FOUND = {"latents": 1, "accuracy": 0.5, "nats": 2.25, "forward_tokens": 77}


def test_an_experiment_records_every_evaluation(tmp_path):
    line = ("train_ar --systems mtp --windows random --latents 0 2 --seeds 3 --batch-size 5 "
            "--lr 0.1 --layers 2 --heads 8 --width 32")
    recipe = Recipe("mtp", "random", 3, PUZZLE.name, "4-list", 5, 0.1, 2, 8, 32)
    expected = {**FOUND, "model": recipe._asdict(), "samples": 32, "step": 20, "device": "cpu"}
    with patch("evaluate", return_value=FOUND) as evaluate:
        run(line, tmp_path)
    for call, record in zip(evaluate.call_args_list, records(tmp_path), strict=True):
        assert call.args[1] == recipe
        assert call.args[4] == record["decoding"]
        assert PUZZLE.held_out(call.args[3].numpy()).sum() == 32
        assert record.items() >= expected.items()


def test_size_steps_and_folder_are_those_of_the_task():
    with patch("experiment") as called:
        run("train_ar --task zebra", "", flags="")
    *_, path, args = called.call_args.args
    assert f"{path.parent} {args.steps}" == "out/zebra-3x3 4600"


def test_what_is_measured():
    puzzles, told = PUZZLE.batch(32, default_rng(0), "test"), []

    def solve(model, system, tokens, prompt_len, generator, teacher_forcing=False, **how):
        assert prompt_len == 8
        told.append((generator.initial_seed(), how))
        filled = tokens.clone()
        filled[::4] = 0
        return latent.Decoded(filled, torch.arange(32.0) + 9 * teacher_forcing, 77, 5)
    for seed in (0, 1):
        recipe = TINY._replace(seed=seed)
        with patch("decode", solve):
            found = latent.evaluate(PUZZLE, recipe, build(recipe, PUZZLE), torch.tensor(puzzles),
                                    {"n_latent": 3})
        assert found == {"accuracy": 0.75, "nats": 15.5 + 9, "forward_tokens": 77, "latents": 5}
    assert told == [(seed, {"n_latent": 3}) for seed in (0, 0, 1, 1)]


def test_all_models_and_seeds_are_measured_on_the_same_puzzles(tmp_path):
    with patch("evaluate", return_value=FOUND) as evaluate:
        for line in ("train_ar --systems ar mtp", "train_diffusion --seeds 1 2"):
            run(line, tmp_path)
    puzzles = {str(call.args[3].tolist()) for call in evaluate.call_args_list}
    assert len(puzzles) == 1


# training ---------------------------------------------------------------------------------------
def train(path, recipe=TINY, steps=20, model=None):
    model = model or build(recipe, PUZZLE)
    return latent.train(PUZZLE, recipe, model, path, steps, False)


def test_every_step_of_every_seed_has_its_own_training_puzzles_and_orders(tmp_path):
    with spy("cross_entropy") as called:
        for seed in range(3):
            train(tmp_path / f"{seed}.pt", TINY._replace(seed=seed), 4)
    puzzles, orders = set(), set()
    for _, _, tokens, _, turn, _ in (call.args for call in called.call_args_list):
        assert not PUZZLE.held_out(tokens.numpy()).any()
        puzzles.add(str(tokens.tolist()))
        orders.add(str(turn.tolist()))
    assert len(puzzles) == len(orders) == 12


@every("name", SYSTEMS)
@every("window", [None, 3, "random"])
def test_what_is_trained_is_the_objective(tmp_path, name, window):
    rng = default_rng((0, 0))
    tokens = torch.from_numpy(PUZZLE.batch(32, rng, "train"))
    loss, *_ = draw(SYSTEMS[name], tokens, 8, window, rng, small_model(69, 24))
    recipe = TINY._replace(system=name, window=window)
    with mock.patch("latent.trange", side_effect=lambda *_, **__: bar):
        bar = mock.MagicMock(__iter__=lambda _: iter([0]))
        train(tmp_path / "x.pt", recipe, 1, small_model(69, 24))
    bar.set_postfix_str.assert_called_once_with(f"loss {loss.item():.3f}")


def test_the_learning_rate_warms_up_and_falls(tmp_path):
    rates = []
    optimizer = mock.Mock(param_groups=[{}], state_dict=dict)
    optimizer.step = lambda: rates.append(optimizer.param_groups[0]["lr"])
    with patch("optimizers", return_value=[optimizer]):
        train(tmp_path / "x.pt", TINY._replace(lr=2.0), 400)
    expected = [2 * min((i + 1) / 100, 1, 1 - 0.95 * (i - 200) / 200) for i in range(400)]
    assert rates == approx(expected)
    assert optimizer.zero_grad.call_count == 400


def test_gradients_are_clipped_to_one(tmp_path):
    model = small_model(69, 24)
    model.output.weight.data *= 100
    with patch("optimizers", return_value=[]):
        train(tmp_path / "x.pt", steps=1, model=model)
    gradients = [weight.grad.flatten() for weight in model.parameters()]
    assert torch.cat(gradients).norm().item() == approx(1, abs=0.001)


class Kernels(TorchDispatchMode):
    """Counts what a GPU has to be told: all operations but views."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if not operation.is_view and not re.search("profiler|view", operation.name()):
            self.counts[operation.name()] += 1
        return operation(*args, **(kwargs or {}))


def test_a_training_step_is_few_kernels_and_waits_for_none(tmp_path):
    counts = []
    for steps in (2, 3):
        with Kernels() as kernels:
            kernels.counts = Counter()
            train(tmp_path / f"{steps}.pt", steps=steps, model=small_model(69, 24, 3))
        counts.append(kernels.counts)
    step = counts[1] - counts[0]
    assert 100 < step.total() <= 300
    assert not re.search("_local_scalar_dense|nonzero|masked_select|index", " ".join(step))


def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest():
    model = small_model(layers=3)
    *muons, adamw = (opt.param_groups[0] for opt in latent.optimizers(model))
    matrices = [id(weight) for weight in model.blocks.parameters() if weight.dim() == 2]
    assert sorted(id(weight) for muon in muons for weight in muon["params"]) == sorted(matrices)
    rest = {id(weight) for weight in model.parameters()} - set(matrices)
    assert {id(weight) for weight in adamw["params"]} == rest
    assert (adamw["betas"], adamw["weight_decay"]) == ((0.9, 0.98), 0)


@every("shape", [(16, 48), (48, 16)])
def test_muon_is_that_of_torch(shape):
    """Which works in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = ([torch.zeros(shape) for _ in range(3)] for _ in range(2))
    opts = [latent.Muon(ours, {"lr": 0.01}),
            torch.optim.Muon(theirs, 0.01, weight_decay=0, adjust_lr_fn="match_rms_adamw")]
    for _ in range(5):
        for one, two in zip(ours, theirs):
            one.grad = two.grad = torch.randn(shape, generator=generator)
        for opt in opts:
            opt.step()
    for one, two in zip(ours, theirs):
        assert (one - two).norm() <= one.norm() / 50


# trouble ----------------------------------------------------------------------------------------
def fails(line, folder, status=2):
    with raises(SystemExit, match=str(status)):
        run(line, folder)


def contents(folder):
    return {path: path.read_bytes() for path in folder.glob("*-s*")}


def test_an_interrupted_training_resumes_exactly(tmp_path, capsys):
    line = "train_diffusion --systems scdm --steps 150"
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    with spy("objective", *[mock.DEFAULT] * 120, KeyboardInterrupt):
        fails(line, cut, status=130)
    assert "--resume" in capsys.readouterr().err
    before = torch.load(cut / "scdm-s0.pt")
    assert before["step"] == 100
    states = []
    for folder in (cut, whole):
        run(f"{line} --resume", folder)
        states.append(torch.load(folder / "scdm-s0.pt"))
        assert states[-1].pop("minutes") > 0
        del states[-1]["settings"]
    assert_close(*states, rtol=0, atol=0)
    assert records(cut)[0]["minutes"] > before["minutes"] > 0
    for one, two in zip(records(cut), records(whole), strict=True):
        del one["minutes"], two["minutes"]
        assert one == two


def test_weights_alone_can_be_evaluated_and_trained_on(tmp_path):
    line = "train_diffusion --systems sidm --orders random --resume"
    run(line, tmp_path)
    saved = torch.load(tmp_path / "sidm-s0.pt")
    torch.save({**saved, "optimizers": []}, tmp_path / "sidm-s0.pt")
    run(line, tmp_path)
    run(f"{line} --steps 21", tmp_path)
    assert [record["step"] for record in records(tmp_path)] == [20, 20, 21]


@every("error", [RunError("bad luck"), OSError("no space")])
def test_a_failure_ends_a_script_with_one_line(tmp_path, capsys, error):
    with spy("train", mock.DEFAULT, error):
        fails("train_diffusion --systems sidm --orders random --seeds 3 0 1", tmp_path)
    assert capsys.readouterr().err.endswith(f"error: sidm-s0: {error}\n")
    assert [record["model"]["seed"] for record in records(tmp_path)] == [3]


def test_a_loss_that_is_not_finite_ends_training(tmp_path):
    with raises(RunError, match="loss nan"):
        train(tmp_path / "x.pt", TINY._replace(lr=math.inf), 99)
    assert torch.load(tmp_path / "x.pt")["step"] == 0


def test_a_full_disk_leaves_what_was_saved(tmp_path):
    def fill_up(path, content):
        with path.open("ab") as file:
            file.write(content[:1000])
        raise OSError(28, "No space left on device")
    run("train_diffusion --systems sidm", tmp_path)
    before = contents(tmp_path)
    with mock.patch.object(Path, "write_bytes", fill_up):
        fails("train_diffusion --systems sidm --resume --steps 30", tmp_path)
    assert contents(tmp_path).items() >= before.items()


def test_what_can_not_be_read_again_fails_before_training(tmp_path):
    with spy("objective") as objective, raises(RunError):
        train(tmp_path / "x.pt", TINY._replace(lr=np.float64(0.003)))
    assert not objective.called


def test_a_new_setting_has_its_default_in_older_checkpoints(tmp_path):
    train(tmp_path / "x.pt", steps=1)
    fork = namedtuple("Recipe", [*TINY._fields, "a_new_one"], defaults=[0.0])
    with patch("Recipe", fork):
        latent.load(tmp_path / "x.pt", fork(*TINY), build(TINY, PUZZLE))


@every("path", sorted(HERE.glob("data/weights/**/*.pt")), ids=lambda path: path.stem)
def test_shipped_weights_load(path):
    recipe = Recipe(**torch.load(path)["settings"])
    latent.load(path, recipe, build(recipe, task_of(recipe.task, recipe.size)))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full disk to write to")
def test_scripts_side_by_side_in_one_folder(tmp_path):
    """They print no errors, and need not be able to."""
    processes = []
    for line in ("train_ar.py --systems ar 2>/dev/full", "train_diffusion.py --systems sidm"):
        command = f"{sys.executable} {HERE}/{line} {FLAGS} --out {tmp_path}"
        processes.append(subprocess.Popen(command, shell=True))
    assert [process.wait() for process in processes] == [0, 0]
    assert len(records(tmp_path)) == 3


BAD_INPUT = """train_ar --task chess
train_ar --size 5
train_ar --systems mdm
train_ar --orders top-prob
train_ar --windows 0
train_ar --seeds -1
train_ar --steps 0
train_ar --heads 3
train_ar --lr nan
train_ar --latents -1
train_ar --device tpu
train_ar --systems ar --out taken
train_ar --systems ar --watch 0
train_diffusion --candidates 0
train_diffusion --systems scdm --watch 1..2
train_diffusion --systems scdm --seeds 0
train_diffusion --systems scdm --resume --width 32 --seeds 0
train_diffusion --systems scdm --resume --lr 0.1 --seeds 0
train_diffusion --systems scdm --resume --seeds 1
train_diffusion --systems scdm --resume --seeds 2
train_diffusion --systems scdm --resume --seeds 3"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a checkpoint, and with files that are none, of the seeds 1 to 3."""
    folder = tmp_path_factory.mktemp("bad")
    run("train_diffusion --systems scdm --latents 0", folder)
    saved = torch.load(folder / "scdm-s0.pt")
    (folder / "taken").write_text("")
    (folder / "scdm-s1.pt").write_text("torn")
    torch.save({"weights": 1}, folder / "scdm-s2.pt")
    settings = {**saved["settings"], "seed": 3}
    torch.save({**saved, "settings": settings, "model": os.mkdir}, folder / "scdm-s3.pt")
    return folder


@every("line", BAD_INPUT.splitlines())
def test_bad_input_gets_one_line(folder, monkeypatch, capsys, line):
    before = contents(folder)
    monkeypatch.chdir(folder)
    fails(line, folder)
    err = capsys.readouterr().err
    *_, flag, value = line.split()
    assert err.count("\n") == 1
    assert flag in err or f"s{value}.pt" in err or f"'{value}'" in err
    assert contents(folder) == before


# watching, and the figure -----------------------------------------------------------------------
@pytest.fixture(scope="module", params=["4", "4-list"])
def puzzles(tmp_path_factory, request):
    """Flags of a puzzle, and a folder with a trained model."""
    folder = tmp_path_factory.mktemp("watch")
    flags = f"{FLAGS} --size {request.param} --orders random --latents 0 3"
    run("train_diffusion --systems scdm --steps 1", folder, flags)
    return flags, folder


@every("puzzle", ["7", "12..3........4.."])
def test_watch_shows_every_pass_and_records_nothing(puzzles, capsys, puzzle):
    flags, folder = puzzles
    before = contents(folder)
    shown = []
    for _ in range(2):
        with spy("decode") as decode:
            run(f"train_diffusion --systems scdm --watch {puzzle}", folder, flags)
        _, *parts = capsys.readouterr().out.split("\n\n")
        shown.append(parts)
    assert shown[0] == shown[1]
    assert contents(folder) == before
    passes = [part for part in parts if "!" in part]
    for k, step in product((0, 3), range(16)):
        marks = [passes[0].count(mark) for mark in "!?~"]
        assert marks == [1, 0, min(k, 15 - step)]
        del passes[0]
    assert not passes
    if puzzle == "7":
        board = decode.call_args.args[2][:, -16:]
        assert task_of("sudoku", "4").held_out(board.numpy()).all()
    else:
        assert re.sub(r"[^\d.]", "", parts[1]) == puzzle


def test_the_figure_has_the_latest_records_of_these_settings(tmp_path, monkeypatch):
    for step, (system, width, policy, n_latent, accuracy, nats) in enumerate([
            ("scdm", 16, "random", 1, 0.6, 2),                          # of a shorter training
            ("scdm", 16, "random", 4, 0.5, 9),
            ("scdm", 16, "random", 0, 0.2, 8),
            ("scdm", 16, "random", 0, 0.3, 7),
            ("scdm", 16, "top-prob", 0, 0.7, 6),
            ("mtp", 16, None, 2, 0.1, 5),
            ("mdm", 16, "margin", 0, 0.9, 1),                           # is in no panel
            ("sidm", 32, "random", 0, 0.9, 1)]):                        # has other settings
        recipe = TINY._replace(system=system, width=width)
        decoding = {"n_latent": n_latent} | ({"policy": policy} if policy else {})
        record = {"model": recipe._asdict(), "decoding": decoding, "latents": 1,
                  "accuracy": accuracy, "nats": nats, "step": min(step, 1)}
        with (tmp_path / f"{recipe.name}.jsonl").open("a") as file:
            print(json.dumps(record), file=file)
    panels = [mock.MagicMock() for _ in range(3)]
    matplotlib = mock.Mock()
    matplotlib.Figure().subplots.return_value = panels
    monkeypatch.setitem(sys.modules, "matplotlib.figure", matplotlib)
    latent.draw(tmp_path, TINY)
    plotted = []
    for panel in panels:
        calls = [call for call in panel.plot.call_args_list if call.args[0]]
        plotted.append({call.kwargs["label"]: list(zip(*call.args[:2])) for call in calls})
    assert plotted == [
        {"mtp-s0": [(2, 0.1)], "scdm-s0": [(0, 0.3), (4, 0.5)]},
        {"mtp-s0": [(2, 0.1)], "scdm-s0": [(0, 0.7)]},
        {"mtp-s0": [(2, 5)], "scdm-s0": [(0, 7), (4, 9)]}]


@every("missing", ["matplotlib.figure", "nothing"])
def test_trouble_with_the_figure_costs_only_the_figure(tmp_path, monkeypatch, capsys, missing):
    (tmp_path / "foreign.jsonl").write_text("[1, 2]")
    monkeypatch.setitem(sys.modules, missing, None)
    run("train_ar --systems ar", tmp_path, draw=latent.draw)
    assert "No figure" in capsys.readouterr().out
    assert len(records(tmp_path)) == 1


def test_the_figure_is_a_file(folder):
    pytest.importorskip("matplotlib")
    latent.draw(folder, TINY)
    assert (folder / "latents.png").exists()


# not in the default run: -m gpu -------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_training_on_a_gpu(tmp_path):
    """The same weights have the same loss; it falls, also in a run that was interrupted."""
    tokens = random_tokens(64, 12)
    for system in SYSTEMS.values():
        here, *_ = draw(system, tokens, 3, 4, 0)
        there, *_ = draw(system, tokens.cuda(), 3, 4, 0, small_model().cuda())
        assert there.item() == approx(here.item(), rel=1e-4)
    line = "train_diffusion --systems scdm --orders random --device cuda --steps 300 --samples 256"
    with spy("objective", *[mock.DEFAULT] * 270, KeyboardInterrupt):
        fails(line, tmp_path, status=130)
    run(f"{line} --resume", tmp_path)
    nats = [record["nats"] for record in records(tmp_path)]
    assert nats[-1] < 16 * math.log(4) - 0.5
