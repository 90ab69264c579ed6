"""Sudoku: every row, column and box holds every digit once. Sides 4 (boxes 2x2), 6 (2x3) and 9
(3x3). Boards are generated from nothing; puzzle.py makes puzzles of them.

Sides 4 and 6 are exactly uniform over all 288 and 28,200,960 boards: the boards with first row
0 1 2 ... are enumerated, one is drawn, and its digits are renamed at random. Side 9 is not
exactly uniform: it starts from the 3,044 boards that survive a random pruning of the same search
to 20,000 partial boards a cell, and applies the symmetries of the grid to them: at most e^35.85
boards, where there are e^50.25. Its floor_nats is therefore no bound; it is what a model has that
knows the rules perfectly and nothing of how boards were drawn.
"""
import math

import numpy as np

from data.split import board_in_test

BOX = {4: (2, 2), 6: (2, 3), 9: (3, 3)}                                     # rows, columns of a box
BOARDS = {4: 288, 6: 28_200_960, 9: 6_670_903_752_021_072_936_960}    # Felgenhauer & Jarvis (2006)


def units(side):
    """The 3 * side rows, columns and boxes, each as its `side` cell indices: (3 * side, side)."""
    cell = np.arange(side * side).reshape(side, side)
    high, wide = BOX[side]
    boxes = cell.reshape(side // high, high, side // wide, wide).swapaxes(1, 2)
    return np.concatenate([cell, cell.T, boxes.reshape(side, side)])


def fill(side, keep=None, rng=None):
    """All boards with first row 0 1 2 ..., (n, side * side): a breadth-first search that fills one
    cell in all partial boards at once. With `keep`, a random `keep` of them survive each cell."""
    boards = np.arange(side, dtype=np.int8)[None]
    for cell in range(side, side * side):
        seen = np.unique(units(side)[(units(side) == cell).any(1)])
        used = boards[:, seen[seen < cell], None] == np.arange(side, dtype=np.int8)
        parent, digit = (~used.any(1)).nonzero()
        if keep and len(parent) > keep:
            chosen = rng.choice(len(parent), keep, replace=False)
            parent, digit = parent[chosen], digit[chosen]
        boards = np.concatenate([boards[parent], digit[:, None].astype(np.int8)], axis=1)
    return boards


class Sudoku:
    """Generate a valid board from nothing: no prompt, an answer of side * side digits."""

    name, prompt_len = "sudoku", 0
    sizes, default_size, steps = ("4", "6", "9"), "6", 4600

    def __init__(self, size=default_size):
        self.side = int(size)
        self.vocab_size = self.side
        self.seq_len = self.side**2
        self.floor_nats = math.log(BOARDS[self.side])
        self.units = units(self.side)
        boards = fill(self.side, 20_000 if self.side == 9 else None, np.random.default_rng(0))
        test = board_in_test(boards, self.side)
        self.pool = {"train": boards[~test], "test": boards[test]}
        if self.side == 9:                      # the symmetries move boards from split to split
            self.pool = {"train": boards, "test": boards}

    def batch(self, n, rng, split):
        """n boards of a split, int64 (n, side * side), drawn with the numpy generator `rng`."""
        boards = self.pool[split][rng.integers(len(self.pool[split]), size=n)]
        if self.side == 9:
            boards = self._symmetry(boards, rng)
            boards = boards[board_in_test(boards, 9) == (split == "test")]
            if len(boards) < n:
                boards = np.concatenate([boards, self.batch(n - len(boards), rng, split)])
        names = rng.random((n, self.side)).argsort(1)
        return np.take_along_axis(names, boards.astype(np.int64), axis=1)

    def _symmetry(self, boards, rng):
        """Twice: shuffle the bands, the rows in each band, transpose. Then transpose, or do not."""
        n = len(boards)
        for _ in range(2):
            bands, inside = rng.random((n, 3, 1)).argsort(1), rng.random((n, 3, 3)).argsort(2)
            rows = (3 * bands + inside).reshape(n, 9, 1)
            boards = np.take_along_axis(boards.reshape(n, 9, 9), rows, axis=1).swapaxes(1, 2)
        flip = rng.random((n, 1, 1)) < 0.5
        return np.where(flip, boards.swapaxes(1, 2), boards).reshape(n, 81)

    def correct(self, tokens):
        """Which rows of tokens, (n, seq_len), are right by the rules alone: bool (n,)."""
        return (np.sort(tokens[:, self.units], axis=2) == np.arange(self.side)).all((1, 2))

    def held_out(self, tokens):
        """Which of these valid boards are not in the training split: bool (n,)."""
        return board_in_test(tokens, self.side)

    def show(self, tokens, mark=lambda place, text: text):
        """One row of tokens, (seq_len,), as a board for a terminal. Every token is shown as
        mark(place, text); what is no digit is a dot."""
        (high, wide), lines = BOX[self.side], []
        text = [mark(i, str(t + 1) if 0 <= t < self.side else ".") for i, t in enumerate(tokens)]
        for r in range(self.side):
            row = text[r * self.side:(r + 1) * self.side]
            lines.append(" | ".join(" ".join(row[c:c + wide]) for c in range(0, self.side, wide)))
            if (r + 1) % high == 0 and r + 1 < self.side:
                lines.append("-" * len(lines[-1]))
        return "\n".join(lines)
