"""Countdown: reach a target from N numbers, using every number exactly once.

The prompt is N numbers (1..13, in descending order) and the target; the answer is N - 1 steps
`a op b = r`, each of which takes two numbers away and puts its result in their place. The last
result is the target. All numbers are whole, from 0 to 100, and divisions are exact. Game of 24 is
the case of four numbers and target 24.

Source: the numbers round of the television game "Countdown" (Channel 4, 1982), as a test of
reasoning in Gandhi et al., "Stream of Search" (2024), arXiv 2404.03683.
"""
import numpy as np

from data.split import in_test

LARGEST = 100                              # tokens 0..100 are the numbers, 101..104 the operations
SIGNS = "+-×÷"


def results(a, b):
    """a + b, a - b, a × b and a ÷ b along a new last axis; -1 where there is no result from 0 to
    100. Integers of any shape."""
    exact = (b > 0) & (a % np.maximum(b, 1) == 0)
    r = np.stack([a + b, a - b, a * b, np.where(exact, a // np.maximum(b, 1), -1)], axis=-1)
    return np.where((r >= 0) & (r <= LARGEST), r, -1)


class Countdown:
    """Find a derivation of the target. Any that is valid is right."""

    name, sizes, default_size, steps = "countdown", ("3", "4", "5"), "3", 4600
    vocab_size = LARGEST + 1 + len(SIGNS)
    floor_nats = None                                           # many derivations are right

    def __init__(self, size=default_size):
        self.numbers = int(size)
        self.prompt_len = self.numbers + 1
        self.seq_len = self.prompt_len + 4 * (self.numbers - 1)

    def batch(self, n, rng, split):
        """n problems, each with one derivation: int64 (n, seq_len)."""
        drawn = self._play(n * (12 if split == "test" else 2), rng)
        drawn = drawn[in_test(drawn[:, :self.prompt_len]) == (split == "test")][:n]
        if len(drawn) < n:
            drawn = np.concatenate([drawn, self.batch(n - len(drawn), rng, split)])
        return drawn

    def _play(self, n, rng):
        """Play the game forward: at every step one of all possible moves, larger number first."""
        left = -np.sort(-rng.integers(1, 14, (n, self.numbers)), axis=1)
        start, steps, row = left, [], np.arange(n)
        for _ in range(self.numbers - 1):
            i, j = np.triu_indices(left.shape[1], 1)
            a, b = np.maximum(left[:, i], left[:, j]), np.minimum(left[:, i], left[:, j])
            r = results(a, b).reshape(n, -1)                                # (n, pairs * 4)
            move = (rng.random(r.shape) * (r >= 0)).argmax(1)
            pair, r = move // 4, r[row, move]
            steps.append([a[row, pair], LARGEST + 1 + move % 4, b[row, pair], r])
            used = np.zeros(left.shape, dtype=bool)
            used[row, i[pair]] = used[row, j[pair]] = True
            left = np.concatenate([left[~used].reshape(n, -1), r[:, None]], axis=1)
        return np.concatenate([start, left, np.stack(sum(steps, []), axis=1)], axis=1)

    def correct(self, tokens):
        """Which rows of tokens, (n, seq_len), derive their target by the rules: bool (n,)."""
        n, row = len(tokens), np.arange(len(tokens))
        left = np.zeros((n, self.vocab_size), dtype=np.int64)             # how often each is there
        np.add.at(left, (row[:, None], tokens[:, :self.numbers]), 1)
        right = np.ones(n, dtype=bool)
        for a, sign, b, r in tokens[:, self.prompt_len:].reshape(n, -1, 4).transpose(1, 2, 0):
            for number in (a, b):
                left[row, number] -= 1
                right &= left[row, number] >= 0                 # there, and only as often as it is
            known = (sign > LARGEST) & (sign < self.vocab_size)
            expected = results(a, b)[row, np.where(known, sign - LARGEST - 1, 0)]
            right &= known & (r == expected) & (r >= 0)
            left[row, r] += 1
        return right & (r == tokens[:, self.numbers])

    def show(self, tokens, mark=lambda place, text: text):
        """One row of tokens, (seq_len,), as a person would write it. Every token of the answer is
        shown as mark(place, text); what is no token of the game is a dot."""
        texts = [*map(str, range(LARGEST + 1)), *SIGNS]
        text = [texts[t] if 0 <= t < len(texts) else "." for t in tokens]
        lines = [f"{' '.join(text[:self.numbers])} -> {text[self.numbers]}"]
        for i in range(self.prompt_len, self.seq_len, 4):
            a, sign, b, r = (mark(place, text[place]) for place in range(i, i + 4))
            lines.append(f"{a} {sign} {b} = {r}")
        return "\n".join(lines)
