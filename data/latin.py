"""Latin squares: every row and every column holds every digit once. The shortest puzzle here, and
the one to copy for a puzzle of your own.

Exactly uniform over all 161,280 squares of side 5 and 812,851,200 of side 6: the squares whose
first row and first column are 0 1 2 ... are enumerated (56 and 9,408), one is drawn, its other
rows are shuffled, and its digits renamed at random. Every square comes out of one such draw.
"""
import itertools
import math

import numpy as np

from data.split import board_in_test


def reduced(side):
    """All squares whose first row and column are 0 1 2 ..., (n, side, side): a search row by row,
    in all partial squares at once."""
    rows = np.array(list(itertools.permutations(range(side))))
    squares = rows[:1, None]                                                  # (n, rows, side)
    for first in range(1, side):
        new = rows[rows[:, 0] == first]
        clash = (squares[:, None] == new[:, None]).any((2, 3))                # (n, new rows)
        square, row = (~clash).nonzero()
        squares = np.concatenate([squares[square], new[row, None]], axis=1)
    return squares


class Latin:
    """Generate a Latin square from nothing: no prompt, an answer of side * side digits."""

    name, prompt_len = "latin", 0
    sizes, default_size, steps = ("5", "6"), "5", 1500

    def __init__(self, size=default_size):
        self.side = self.vocab_size = int(size)
        self.seq_len = self.side**2
        cell = np.arange(self.seq_len).reshape(self.side, self.side)
        self.units = np.concatenate([cell, cell.T])           # the cells of all rows and columns
        self.squares = reduced(self.side)
        self.floor_nats = math.log(len(self.squares) * math.factorial(self.side)
                                   * math.factorial(self.side - 1))

    def batch(self, n, rng, split):
        """n squares of a split, int64 (n, side * side), drawn with the numpy generator `rng`."""
        n_drawn = n * 12 if split == "test" else n + n // 4
        squares = self.squares[rng.integers(len(self.squares), size=n_drawn)]
        rows = np.pad(1 + rng.random((n_drawn, self.side - 1)).argsort(1), ((0, 0), (1, 0)))
        squares = np.take_along_axis(squares, rows[:, :, None], axis=1).reshape(n_drawn, -1)
        squares = np.take_along_axis(rng.random((n_drawn, self.side)).argsort(1), squares, axis=1)
        squares = squares[self.held_out(squares) == (split == "test")][:n]
        if len(squares) < n:
            squares = np.concatenate([squares, self.batch(n - len(squares), rng, split)])
        return squares

    def held_out(self, tokens):
        """Which of these valid squares are not in the training split: bool (n,)."""
        return board_in_test(tokens, self.side)

    def correct(self, tokens):
        """Which rows of tokens, (n, seq_len), are Latin squares: bool (n,)."""
        return (np.sort(tokens[:, self.units], axis=2) == np.arange(self.side)).all((1, 2))

    def show(self, tokens, mark=lambda place, text: text):
        """One row of tokens, (seq_len,), as a square for a terminal. Every token is shown as
        mark(place, text); what is no digit is a dot."""
        text = [mark(i, str(t + 1) if 0 <= t < self.side else ".") for i, t in enumerate(tokens)]
        return "\n".join(" ".join(text[i:i + self.side]) for i in range(0, len(text), self.side))
