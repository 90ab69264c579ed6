"""Latent tokens: one transformer, and the question who sees whom.

A masked token that a model predicts but does not decode in this step is a *latent token*: a hidden
state that the decoded token can attend to. This file holds the whole method of "Reasoning with
Latent Tokens in Diffusion Language Models" (He, Welleck & Fried, arXiv 2602.03769), in the order
in which one would explain it on a whiteboard:

    1. systems, who sees whom   2. the transformer   3. the objective   4. the decoder

What follows trains (5), evaluates (6), and holds flags, main function and figure (7).
`python latent.py` prints who sees whom. train_diffusion.py and train_ar.py run experiments.
"""
import argparse
import io
import json
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import trange

# 1. systems -----------------------------------------------------------------------------------
# Every system fills in an answer, token by token. Two questions tell them apart. In which *order*
# do tokens become known: from the left, or in a random order? And what does a masked token *see*
# of the other masked ones: all of them, none, or those before it in the order?
#
# A token's *turn*, 0, 1, 2, ..., is its place in the order: first the prompt, position by position,
# then the answer. At a *cut* all tokens of an earlier turn are known (the paper: clean), the next
# `window` ones are masked, and the rest is absent, with turn -1.


class System(NamedTuple):
    order: str                 # "left" or "random"
    sees: str                  # what a masked token sees of other masked ones; if joint, known
                               # tokens see it, too
    causal: bool = False       # a known token sees only earlier ones, so decoding can cache it
    shifted: bool = False      # from the left, nothing masked: slot i reads token i - 1, predicts i
    next_only: bool = False    # the loss counts the next token alone: a control


SYSTEMS = {
    "ar": System("left", "joint", causal=True, shifted=True),
    "mtp": System("left", "joint"),                                     # AR+MTP
    "mtp-causal": System("left", "joint", causal=True),
    "control": System("left", "joint", next_only=True),
    "mdm": System("random", "joint"),
    "sidm": System("random", "independent"),
    "scdm": System("random", "semicausal"),
    "scdm-causal": System("random", "semicausal", causal=True),
}

# Shapes are given in these letters:
#     B rows (puzzles)   T positions of a row   A positions of its answer   V tokens   C width
#     S positions whose keys and values are cached


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
    """Attention and MLP, each behind a norm and added to the residual stream."""

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
        """x (B, T, C) -> what the block makes of it, (B, T, C), and its keys and values, each
        (B, heads, S + T, C / heads), behind those of `past`."""
        B, T, C = x.shape
        qkv = self.qkv(self.attention_norm(x))                      # (B, T, 3 * C)
        qkv = qkv.view(B, T, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                        # (B, heads, T, C / heads)
        if past is not None:
            k = torch.cat([past[0], k], dim=2)                      # (B, heads, S + T, C / heads)
            v = torch.cat([past[1], v], dim=2)

        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        y = y.transpose(1, 2).reshape(B, T, C)
        x = x + self.attention_out(y)

        h = F.relu(self.mlp_in(self.mlp_norm(x)))                   # (B, T, 4 * C)
        x = x + self.mlp_out(h * h)         # ReLU squared: as good as GELU here, and cheaper
        return x, (k, v)


class Transformer(nn.Module):
    """A pre-norm GPT with learned absolute positions and an untied output layer. Of its
    vocab_size + 1 input tokens the last is the mask, which can not be predicted."""

    def __init__(self, vocab_size, seq_len, layers, heads, width, seed=0):
        super().__init__()
        self.mask = vocab_size
        self.token = nn.Embedding(vocab_size + 1, width)
        self.position = nn.Embedding(seq_len, width)
        self.blocks = nn.ModuleList(Block(heads, width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, vocab_size, bias=False)
        self.initialize(torch.Generator().manual_seed(seed))

    def initialize(self, generator):
        """Every block starts as the identity, since what it adds to the stream starts at zero: at
        small widths this matters more than the optimizer. The other standard deviations follow
        from the number of inputs of a matrix, or were found by trying."""
        for name, weight in self.named_parameters():
            if name.endswith("_out.weight"):                        # of attention and MLP
                nn.init.zeros_(weight)
            elif name in ("token.weight", "position.weight"):
                nn.init.normal_(weight, std=0.2, generator=generator)
            elif weight.dim() == 2:
                fan_in = weight.shape[1]
                nn.init.normal_(weight, std=0.5 * fan_in ** -0.5, generator=generator)

    def forward(self, tokens, positions, visible, cache=None, n_keep=0):
        """tokens (B, T), positions (B, T) or (1, T), visible (B, T, T) or (1, T, T) bool ->
        logits (B, T, V). Positions are explicit: trimmed or reordered, a token keeps the position
        that it has in the full sequence.

        A decoder may pass a `cache`, at first {}: keys and values of S tokens of earlier passes, to
        go before those of this one; visible is (B or 1, T, S + T), of all S + T the first n_keep
        are kept."""
        x = self.token(tokens) + self.position(positions)           # (B, T, C)
        visible = visible[:, None]                                  # the same for all heads
        for i, block in enumerate(self.blocks):
            past = cache.get(i) if cache else None
            x, (k, v) = block(x, visible, past)
            if n_keep:
                cache[i] = k[:, :, :n_keep], v[:, :, :n_keep]
        return self.output(self.norm(x))                            # (B, T, V)


# 3. the objective -----------------------------------------------------------------------------
# tokens is (B, T), the prompt first. rng is numpy's, so that training draws the same on every
# device.


def hide(system, tokens, prompt_len, mask, cut, window, rng):
    """cut: a number or (B, 1). Tokens of an earlier turn stay known, the next `window` are masked,
    the rest is absent; AR knows all. Returns what the model reads, turn, masked, each (B, T)."""
    B, T = tokens.shape
    turn = torch.arange(T, device=tokens.device).repeat(B, 1)
    if system.order == "random":
        shuffled = rng.random((B, T - prompt_len)).argsort(1)               # 0 .. A - 1
        turn[:, prompt_len:] = prompt_len + torch.from_numpy(shuffled)
    if system.shifted:
        return F.pad(tokens, (1, -1), value=mask), turn, torch.zeros_like(turn, dtype=torch.bool)

    known = turn < cut
    turn = torch.where(turn < cut + window, turn, -1)                       # the rest is absent
    return torch.where(known, tokens, mask), turn, turn >= cut


def objective(system, tokens, prompt_len, mask, window, rng):
    """Draw a cut for every row, uniformly from the A turns of the answer: AR+MTP's random prefix,
    or in random order masked diffusion's random number of masks. The window is a number, "random"
    (drawn for the whole batch, uniformly from 1 to A), or None: all. Returns inputs, turn, masked,
    and the weight of each token's cross-entropy in the loss, each (B, T).

    The weights make a plain mean over masked tokens. For a model that can fit everything it has
    the same minimiser as diffusion's ELBO, which weights each row's sum by A over its number of
    masks; and it has less variance."""
    B, T = tokens.shape
    A = T - prompt_len
    if window == "random":
        window = rng.integers(1, A, endpoint=True)

    # One random offset, then evenly spread over the rows: every batch covers the cuts evenly.
    spread = (np.arange(B)[:, None] + rng.random()) * A / B
    cut = prompt_len + torch.from_numpy(spread.astype(np.int64)).to(tokens.device)      # (B, 1)
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


# 4. the decoder -------------------------------------------------------------------------------
# Which candidate is decoded next: the one with the highest score, from the probabilities
# (B, candidates, V). Places are shuffled, so the first one is a random one.
POLICIES = {
    "random": lambda p: torch.zeros_like(p[..., 0]),
    "top-prob": lambda p: p.amax(-1),                       # its best token is the most probable
    "margin": lambda p: -p.topk(2).values.diff()[..., 0],   # best less second (2502.06768)
}


class Decoded(NamedTuple):
    tokens: torch.Tensor       # (B, T), the answers filled in
    nats: torch.Tensor         # (B,), minus the log-probability of all decoded tokens
    forward_tokens: int        # positions through the transformer for one puzzle, over all steps
    latents: int               # the most masked tokens that a candidate saw beside itself


@torch.no_grad()
def decode(model, system, tokens, prompt_len, n_latent, policy="top-prob", candidates=8,
           temperature=1.0, teacher_forcing=False, generator=None, on_step=None):
    """Fill in the answers of tokens, (B, T), one token a step. In random order some masked
    positions, drawn anew at every step, are *candidates* for the policy to choose from (from the
    left there is but one, the next), n_latent more (or all that are left) are latent, and the rest
    does not go through the model.

    With teacher forcing each token is put in as it stands in `tokens`, instead of drawn: `nats` of
    the result is then the negative log-likelihood of these answers, for every order, pattern and
    number of latent tokens, since it comes from the very process that decodes. (The choice of a
    place is not counted, so it is exact from the left, else an upper bound, by Jensen's
    inequality.) At temperature 1 the share of right answers is at least exp(-(nats - floor)), where
    the floor, the lowest possible value, is the entropy of the answer.

    on_step(tokens, positions, logits, c, place) may watch the masked tokens of each pass: first
    the c candidates, then the latent ones. In `tokens` the one at `place` is decoded already."""
    B, T = tokens.shape
    device = tokens.device
    order = torch.arange(T, device=device).repeat(B, 1)         # the first n are known
    answers = tokens
    tokens = torch.where(order < prompt_len, tokens, model.mask)
    nats = forward_tokens = latents = cached = 0
    cache = {}
    for n in range(prompt_len, T):
        c = min(candidates, T - n) if system.order == "random" else 1
        k = min(n_latent, T - n - c)

        # Through the model go n known tokens, c candidates, k latent tokens, each with its position
        # in the puzzle: the order in which they are listed means nothing to the model.
        turn = torch.arange(n + c + k, device=device)[None]
        if system.order == "random":
            shuffled = torch.rand(B, T - n, generator=generator, device=device).argsort(1)
            order[:, n:] = order[:, n:].gather(1, shuffled)
            turn[:, n:n + c] = n + k        # latent tokens have the next turns, candidates share
            turn[:, n + c:] -= c            # the one after: they see latent tokens, not each other
        masked = (turn >= n) & (not system.shifted)
        positions = order[:, :n + c + k]
        inputs = F.pad(tokens, (1, -1), value=model.mask) if system.shifted else tokens
        inputs = inputs.gather(1, positions)
        visible = visibility(system, turn, masked)
        seen = visible[:, n:n + c, n:].sum(-1)      # how many unknown tokens a candidate sees,
        latents = max(latents, seen.max().item() - 1)                       # itself not counted

        # But not what is cached. (AR's slot n reads token n - 1, which is known, so keep it, too.)
        n_keep = n + system.shifted if system.causal else 0
        logits = model(inputs[:, cached:], positions[:, cached:], visible[:, cached:], cache,
                       n_keep)
        logits = logits[:, n - cached:]                                     # (B, c + k, V)
        forward_tokens += n + c + k - cached
        cached = n_keep

        # The policy chooses a candidate, the Gumbel-max trick draws its token. (Temperature 0 takes
        # the most probable one.)
        best = POLICIES[policy](logits[:, :c].softmax(-1)).argmax(1, keepdim=True)      # (B, 1)
        logit = logits.take_along_dim(best[..., None], 1)[:, 0]                         # (B, V)
        gumbel = -torch.empty_like(logit).exponential_(generator=generator).clamp(1e-30).log()
        token = (logit + temperature * gumbel).argmax(-1)                               # (B,)
        place = order.gather(1, n + best)                                               # (B, 1)
        if teacher_forcing:
            token = answers.gather(1, place)[:, 0]
        nats += F.cross_entropy(logit, token, reduction="none")
        tokens = tokens.scatter(1, place, token[:, None])
        if on_step is not None:
            on_step(tokens, positions[:, n:], logits, c, place)

        order = order.scatter(1, n + best, order[:, n:n + 1])               # they change places
        order[:, n:n + 1] = place
    return Decoded(tokens, nats, forward_tokens, latents)


# 5. training ----------------------------------------------------------------------------------
class Recipe(NamedTuple):
    """What makes a model what it is. It names the model's files, stands in its checkpoint and its
    records, and is compared when training goes on. A new setting needs a default: that of older
    checkpoints."""
    system: str
    window: int | str | None   # of the objective; None but for AR+MTP
    seed: int
    task: str
    size: str
    batch_size: int
    lr: float
    layers: int
    heads: int
    width: int

    @property
    def name(self):
        window = "" if self.window is None else f"-{self.window}"
        return f"{self.system}{window}-s{self.seed}"


def build(recipe, task):
    """The untrained model of a recipe."""
    return Transformer(task.vocab_size, task.seq_len, recipe.layers, recipe.heads, recipe.width,
                       recipe.seed)


class RunError(Exception):
    """A mistake or failure that one line explains; the scripts then exit with status 2."""


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., kellerjordan.github.io/posts/muon): a step along the orthogonal matrix
    nearest to the momentum. As torch.optim.Muon in single precision, but all matrices, of one
    shape, at once, (n, rows, columns): a third of the kernels, which small models wait for."""

    @torch.no_grad()
    def step(self):
        [group] = self.param_groups
        matrices = group["params"]
        gradient = torch.stack([w.grad for w in matrices])
        momentum = self.state[matrices[0]].setdefault("momentum", torch.zeros_like(gradient))
        momentum.lerp_(gradient, 0.05)
        x = gradient.lerp(momentum, 0.95)                       # Nesterov's
        tall = x.shape[1] > x.shape[2]
        x = x.mT if tall else x
        x = F.normalize(x, dim=(1, 2), eps=1e-7)
        for _ in range(5):          # Newton-Schulz: takes all singular values near 1
            gram = x @ x.mT
            gram = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
            x = torch.baddbmm(x, gram, x, beta=3.4445)
        x = x.mT if tall else x
        length = 0.2 * max(x.shape[1:]) ** 0.5                  # as long as AdamW's steps
        torch._foreach_add_(matrices, (length * x).unbind(), alpha=-group["lr"])


def optimizers(model):
    """Muon for the matrices of the blocks, one for each kind; AdamW for the rest (alone it is
    worse). `train` sets the learning rate at every step."""
    opts = []
    for name, weight in model.blocks[0].named_parameters():
        if weight.dim() == 2:
            opts.append(Muon([block.get_parameter(name) for block in model.blocks], {}))
    rest = [w for name, w in model.named_parameters() if "blocks" not in name or w.dim() < 2]
    opts.append(torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0, fused=True))
    return opts


def train(task, recipe, model, path, steps, resume):
    """Train a model and keep its checkpoint, `path`, up to date; with `resume` go on from it.
    Returns the step and the minutes that it took."""
    system = SYSTEMS[recipe.system]
    opts = optimizers(model)
    if not path.exists():
        # What can not be written, or not be read again, shows before it costs any training.
        save(path, recipe, model, opts, {"step": 0, "minutes": 0.0})
    elif not resume:
        raise RunError(f"--out: {path} is there; go on with --resume, or choose another folder")
    state = load(path, recipe, model)
    for opt, opt_state in zip(opts, state.pop("optimizers")):
        opt.load_state_dict(opt_state)

    start = time.monotonic() - 60 * state["minutes"]
    bar = trange(state["step"], steps, desc=recipe.name, disable=None)      # not shown in a log
    for step in bar:
        done = step + 1

        # Seed and step alone say what is drawn: a resumed run goes on exactly.
        rng = np.random.default_rng((recipe.seed, step))
        tokens = torch.from_numpy(task.batch(recipe.batch_size, rng, "train"))
        tokens = tokens.to(model.output.weight.device)
        inputs, turn, masked, weight = objective(system, tokens, task.prompt_len, model.mask,
                                                 recipe.window, rng)
        loss = (weight * cross_entropy(model, system, tokens, inputs, turn, masked)).sum()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)

        # A short warm-up, then constant, in the second half linear to 5 %.
        lr = recipe.lr * min(1, done / 100, 0.05 + 1.9 * (1 - step / steps))
        for opt in opts:
            opt.param_groups[0]["lr"] = lr
            opt.step()
            opt.zero_grad()

        if done % 100 == 0 or done == steps:
            if not (loss + norm).isfinite():
                raise RunError(f"{path}: loss {loss:.3g}, gradient {norm:.3g} at step {done}")
            bar.set_postfix_str(f"loss {loss.item():.3f}")
            state["step"] = done
            state["minutes"] = (time.monotonic() - start) / 60
            save(path, recipe, model, opts, state)
    return state


def save(path, recipe, model, opts, state):
    """Write a checkpoint, whole or not at all."""
    state = {**state, "settings": recipe._asdict(), "model": model.state_dict(),
             "optimizers": [opt.state_dict() for opt in opts]}
    content = io.BytesIO()              # torch itself hides why a file can not be written
    torch.save(state, content)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(content.getvalue())
    temporary.replace(path)


def load(path, recipe, model):
    """Read a checkpoint, without running code that it may hold, and put its weights into the
    model. Returns all else that it holds."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = Recipe(**state.pop("settings"))
    except Exception as error:
        raise RunError(f"{path}: no checkpoint that can be read ({type(error).__name__})") from None
    if found != recipe:
        raise RunError(f"{path} is another model: {found}")
    model.load_state_dict(state.pop("model"))
    return state


# 6. evaluation --------------------------------------------------------------------------------
def evaluate(task, recipe, model, tokens, decoding):
    """Decode test puzzles, tokens (B, T). `decoding` is what `decode` is told. Returns a dict of
    measurements:

        latents         most latent tokens that a decoded token had
        accuracy        the share of right answers
        nats            the negative log-likelihood of an answer, in the order of decoding
        forward_tokens  the cost: how many tokens went through the model for a puzzle
    """
    generator = torch.Generator(tokens.device).manual_seed(recipe.seed)
    solve = partial(decode, model, SYSTEMS[recipe.system], tokens, task.prompt_len,
                    generator=generator, **decoding)

    solved = solve()
    right = task.correct(solved.tokens.cpu().numpy())
    nats = solve(teacher_forcing=True).nats
    return {"latents": solved.latents, "accuracy": right.mean(), "nats": nats.mean().item(),
            "forward_tokens": solved.forward_tokens}


def experiment(task, recipe, decodings, path, args):
    """Train one model and evaluate it in every way of decoding: each is a line of NAME.jsonl, with
    all that says how it was made. The figure follows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    model = build(recipe, task).to(args.device)
    state = train(task, recipe, model, path, args.steps, args.resume)

    # The same puzzles for all models, drawn with a seed that no training step has.
    puzzles = task.batch(args.samples, np.random.default_rng((0, 2**32)), "test")
    tokens = torch.from_numpy(puzzles).to(args.device)
    for decoding in decodings:
        found = evaluate(task, recipe, model, tokens, decoding)
        record = {"model": recipe._asdict(), "decoding": decoding, **found, **state,
                  "samples": args.samples, "floor_nats": task.floor_nats, "device": args.device,
                  "threads": torch.get_num_threads(), "torch": torch.__version__}

        # Lines are only added: no measurement is lost, and the last of a kind counts.
        with path.with_suffix(".jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(f"{recipe.name:<14} {decoding.get('policy', 'left'):<9} {found['latents']:>2} latent "
              f"tokens {found['accuracy']:7.1%} right {found['nats']:6.2f} nats "
              f"{found['forward_tokens']:>5} forward tokens", flush=True)

    # A foreign file in the folder, or no matplotlib, costs only the figure.
    try:
        draw(path.parent, recipe)
    except Exception as error:
        print(f"No figure: {error}")


def watch(task, recipe, decodings, path, puzzle):
    """Show every pass of a trained model that solves one puzzle, a given one or that of a seed, in
    every way of decoding."""
    model = build(recipe, task)
    load(path, recipe, model)
    try:
        if len(puzzle) < 10:
            tokens = task.batch(1, np.random.default_rng((int(puzzle), 2**32)), "test")
        else:
            tokens = task.read(puzzle)
    except (AttributeError, ValueError) as error:
        raise RunError(f"--watch: {puzzle} is no puzzle of {task.name}: {error}") from None

    def show(tokens, positions, logits, c, place):
        guesses = tokens.scatter(1, positions, logits.argmax(-1))
        shown = torch.where(tokens == model.mask, guesses, tokens)

        marks = dict(zip(positions[0].tolist(), "?" * c + "~" * task.seq_len))
        marks[place.item()] = "!"
        print(task.show(shown[0].tolist(), lambda i, text: f"{text}{marks.get(i, ' ')} "), "\n")

    print("x! is decoded, x? a candidate, x~ a latent token, . not in this pass\n")
    for decoding in decodings:
        print(f"{recipe.name}, {decoding}\n")
        torch.manual_seed(0)                        # so that it can be seen again
        solved = decode(model, SYSTEMS[recipe.system], torch.from_numpy(tokens), task.prompt_len,
                        on_step=show, **decoding)
        print("right\n" if task.correct(solved.tokens.numpy()) else "wrong\n")


# 7. around it, shared by both scripts ----------------------------------------------------------
def at_least(least, kind=int, words=()):
    """An argparse type: a number from `least` on, or one of some words."""
    def number(text):
        if text in words:
            return text
        value = kind(text)
        if not least <= value < 1e9:
            raise ValueError
        return value
    return number


def common_flags(description, tasks, order, default_systems):
    """The flags that both scripts have, [defaults] in brackets; each script adds its own."""
    parser = argparse.ArgumentParser(description=description, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument

    systems = [name for name, system in SYSTEMS.items() if system.order == order]
    sizes = "; ".join(f"{t.name} {' '.join(t.sizes)} [{t.default_size}]" for t in tasks.values())
    flag("--task", default=next(iter(tasks)), choices=tasks, help="the puzzle [%(default)s]")
    flag("--size", help=f"its size: {sizes}")
    flag("--systems", nargs="+", default=default_systems, choices=systems,
         help=f"what to train [{' '.join(default_systems)}]")
    flag("--seeds", nargs="+", type=at_least(0), default=[0], help="everything once for each [0]")
    flag("--steps", type=at_least(1), help="training steps [what the task needs]")

    for name, default, text in [
            ("batch-size", 64, "puzzles in a step"),
            ("layers", 3, "transformer blocks"),
            ("heads", 4, "attention heads in a block"),
            ("width", 64, "width of the residual stream"),
            ("samples", 256, "test puzzles in each evaluation")]:
        flag(f"--{name}", type=at_least(1), default=default, help=f"{text} [%(default)s]")

    flag("--lr", type=at_least(0, float), default=3e-3, help="highest learning rate [%(default)s]")
    flag("--latents", nargs="+", type=at_least(0, words=["all"]), default=[0, 2, 8, "all"],
         help="numbers of latent tokens to decode with [0 2 8 all]; more than there are is all, "
         "some systems have but one")
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    flag("--device", default=str(device), help="cuda, mps or cpu [%(default)s]")
    flag("--out", help="folder for all output [out/TASK-SIZE]")
    flag("--resume", action="store_true", help="go on from the checkpoints there; what is trained "
         "already is only evaluated")
    flag("--watch", nargs="?", const="0", metavar="SEED or PUZZLE", help="only show how trained "
         "models solve the puzzle of a seed [0], or your own, row by row as 1..3...")
    return parser


def sweep(latents, most):
    """The numbers of latent tokens to decode with, of which there are at most `most`."""
    return sorted({most if k == "all" else min(k, most) for k in latents})


def main(parser, tasks, models):
    """The main function of both scripts. models(task, args, settings) yields for every model its
    recipe, which has the settings, and its decodings: a list of what `decode` is told."""
    # The defaults of --size and --steps depend on --task.
    task = tasks[parser.parse_args().task]
    parser.set_defaults(size=task.default_size, steps=task.steps)
    args = parser.parse_args()

    # A mistake shows before any work is done.
    if args.size not in task.sizes:
        parser.error(f"--size: {args.task} comes in {', '.join(task.sizes)}")
    if args.width % args.heads:
        parser.error(f"--width: {args.width} is not divisible by --heads {args.heads}")
    try:
        torch.ones(1, device=args.device).item()
    except Exception:
        parser.error(f"--device: {args.device} does not work here, try --device cpu")

    # Both scripts side by side share the cores: more threads than cores would be far slower.
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    task = task(args.size)
    folder = Path(args.out or f"out/{args.task}-{args.size}")

    settings = {name: getattr(args, name) for name in Recipe._fields[3:]}
    try:
        for recipe, decodings in models(task, args, settings):
            path = folder / f"{recipe.name}.pt"
            if args.watch is None:
                experiment(task, recipe, decodings, path, args)
            else:
                watch(task, recipe, decodings, path, args.watch)
    except KeyboardInterrupt:
        parser.exit(130, "\nInterrupted; the same command with --resume goes on.\n")
    except (RunError, OSError) as error:
        parser.error(f"{recipe.name}: {error}")


def draw(folder, recipe):
    """Draw latents.png: the latest measurements of all models in a folder that have the task and
    the settings of this one."""
    from matplotlib.figure import Figure                    # nothing else needs it
    figure = Figure(figsize=(13, 4), layout="constrained")
    panels = [("random", "accuracy"), ("top-prob", "accuracy"), ("random", "nats")]
    models = {}
    for path in sorted(folder.glob("*.jsonl")):
        models[path.stem] = [json.loads(line) for line in path.open()]
    for panel, (order, y) in zip(figure.subplots(1, 3), panels):
        for name, records in models.items():
            model = Recipe(**records[0]["model"])
            if model[3:] != recipe[3:]:
                continue

            # From the left there is but one order, which every panel shows.
            points = {r["decoding"]["n_latent"]: r[y] for r in records
                      if r["step"] == records[-1]["step"]
                      and r["decoding"].get("policy", order) == order}
            x = sorted(points)
            color = f"C{list(SYSTEMS).index(model.system)}"         # each system has its own
            panel.plot(x, [points[k] for k in x], "o-", color=color, label=name)

        if y == "accuracy":
            panel.set_ylim(0, 1.02)
        panel.set_xscale("symlog", base=2)
        panel.set(xlabel="latent tokens", ylabel=y,
                  title=f"{recipe.task} {recipe.size}, {order} order")
    figure.legend(*panel.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.savefig(folder / "latents.png", dpi=150)
    print(f"The figure is {folder / 'latents.png'}")


if __name__ == "__main__":
    print("Who sees whom? Rows are queries, columns keys, both by their turn, [masked] or known.")
    turn = torch.arange(6)[None]
    for name, system in SYSTEMS.items():
        masked = (turn >= 2) & (not system.shifted)
        titles = [f"[{i}]" if masked[0, i] else f" {i} " for i in range(6)]
        print(f"\n{name:<14}", *titles, sep="")
        for title, row in zip(titles, visibility(system, turn, masked)[0]):
            print(f"{title:>14}", *(" x " if seen else " . " for seen in row), sep="")
