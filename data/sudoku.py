"""Sudoku: every row, column and box holds every digit once.

Two tasks share the rules. `sudoku` generates a valid board from nothing; `sudoku-puzzle`
completes a puzzle that has exactly one solution. Sides 4 (boxes 2x2), 6 (2x3) and 9 (3x3).

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
GIVENS = {4: (4, 8), 6: (10, 18), 9: (28, 40)}                  # fewest and most in a puzzle


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
    sizes, default_size = ("4", "6", "9"), "6"

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
            if len(boards) < n:                 # not self.batch: SudokuPuzzle has its own
                boards = np.concatenate([boards, Sudoku.batch(self, n - len(boards), rng, split)])
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
        board = tokens[:, -self.side**2:]
        return (np.sort(board[:, self.units], axis=2) == np.arange(self.side)).all((1, 2))

    def held_out(self, tokens):
        """Which of these valid boards are not in the training split: bool (n,)."""
        return board_in_test(tokens[:, -self.side**2:], self.side)

    def show(self, tokens, mark=lambda place, text: text):
        """A row of tokens that ends with a grid, for a terminal. Every token of the grid is
        shown as mark(place, text); what is no digit is a dot."""
        (high, wide), lines = BOX[self.side], []
        text = [mark(i, str(tokens[i] + 1) if 0 <= tokens[i] < self.side else ".")
                for i in range(len(tokens) - self.side**2, len(tokens))]
        for r in range(self.side):
            row = text[r * self.side:(r + 1) * self.side]
            lines.append(" | ".join(" ".join(row[c:c + wide]) for c in range(0, self.side, wide)))
            if (r + 1) % high == 0 and r + 1 < self.side:
                lines.append("-" * len(lines[-1]))
        return "\n".join(lines)


class SudokuPuzzle(Sudoku):
    """Complete a puzzle that has exactly one solution. The answer is the whole grid; the prompt is
    the grid with blanks (token `side`), or the list of the givens in the order of the cells, padded
    with blanks: one token, side + 1 + cell * side + digit, says the cell and its digit. Every
    puzzle can be solved with two deductions alone, a cell with one digit left and a digit with one
    cell left in its row, column or box, which proves that its solution is the only one."""

    name = "sudoku-puzzle"
    sizes, default_size = ("4", "6", "9", "4-list", "6-list", "9-list"), "6"

    def __init__(self, size=default_size):
        side, _, prompt = size.partition("-")
        super().__init__(side)
        cells, self.blank = self.side**2, self.side
        self.givens, self.prompt = GIVENS[self.side], prompt or "grid"
        self.vocab_size = self.side + 1 + (cells * self.side if prompt == "list" else 0)
        self.prompt_len = self.givens[1] if prompt == "list" else cells
        self.seq_len = self.prompt_len + cells
        self.floor_nats = 0.0
        cell_in_unit = (np.arange(self.side**2)[:, None, None] == self.units).any(2)
        self.member = cell_in_unit.astype(np.float32)                        # (cells, 3 * side)
        self.peer = self.member @ self.member.T > 0
        np.fill_diagonal(self.peer, False)

    def batch(self, n, rng, split):
        """n puzzles with their solutions, int64 (n, seq_len)."""
        boards = Sudoku.batch(self, n, rng, split)
        order = rng.random(boards.shape).argsort(1)            # cells are given in this order
        given = self._solvable(boards, order, rng.integers(*self.givens, n, endpoint=True))
        few = given.sum(1) <= self.givens[1]
        given, boards = given[few], boards[few]
        if self.prompt == "grid":
            prompt = np.where(given, boards, self.blank)
        else:
            cell = np.argsort(~given, axis=1, kind="stable")[:, :self.prompt_len]  # givens first
            prompt = self.side + 1 + cell * self.side + np.take_along_axis(boards, cell, 1)
            prompt[~np.take_along_axis(given, cell, 1)] = self.blank
        puzzles = np.concatenate([prompt, boards], axis=1)
        if len(puzzles) < n:
            puzzles = np.concatenate([puzzles, self.batch(n - len(puzzles), rng, split)])
        return puzzles

    def _solvable(self, boards, order, wanted):
        """Which cells to give, bool (n, cells): the first `wanted` of `order`, and wherever the two
        deductions get stuck the next cell that is still open."""
        turn = order.argsort(1)
        given = turn < wanted[:, None]
        solution = boards[:, :, None] == np.arange(self.side)             # (n, cells, digits)
        possible = solution | ~given[:, :, None]
        while True:
            decided = possible.sum(2) == 1
            if decided.all():
                return given
            taken = self.peer.astype(np.float32) @ (possible & decided[:, :, None]) > 0
            left = possible & ~taken                          # first deduction; now the second
            only_place = self.member.T @ left.astype(np.float32) == 1   # (n, 3 * side, digits)
            found = left & (self.member @ only_place.astype(np.float32) > 0)
            left = np.where(found.any(2, keepdims=True), found, left)
            stuck = (left == possible).all((1, 2)) & ~decided.all(1)
            cell = np.where(decided, self.side**2, turn)[stuck].argmin(1)
            given[stuck, cell] = True
            left[stuck, cell] = solution[stuck, cell]
            possible = left

    def grid(self, tokens):
        """The puzzles of tokens, (n, seq_len), as grids with blanks, (n, cells)."""
        if self.prompt == "grid":
            return tokens[:, :self.prompt_len]
        grid = np.full((len(tokens), self.side**2 + 1), self.blank)    # the padding's cell is last
        cell, digit = np.divmod(tokens[:, :self.prompt_len] - self.side - 1, self.side)
        np.put_along_axis(grid, cell, digit, axis=1)          # a blank is cell -1, digit side - 1
        return grid[:, :-1]

    def correct(self, tokens):
        puzzle, board = self.grid(tokens), tokens[:, self.prompt_len:]
        return super().correct(tokens) & ((puzzle == self.blank) | (puzzle == board)).all(1)

    def show(self, tokens, mark=lambda place, text: text):
        """The puzzle, and below it the answer."""
        puzzle = super().show(self.grid(np.array([tokens]))[0])
        return f"{puzzle}\n\n{super().show(tokens, mark)}"
