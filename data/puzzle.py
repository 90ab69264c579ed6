"""Puzzles: complete a board of which some cells are given, so that exactly one solution is left.

Every puzzle can be solved with two deductions alone, a cell with one digit left and a digit with
one cell left in its row, column or box, which proves that its solution is the only one.

The answer is the whole board. The prompt is the list of the givens in the order of the cells, one
token for each, which says cell and digit, padded with blanks; or (the other form, see `sizes`) the
board with blanks. Blanks of a board are one place for each unknown digit, where a model can keep
what a latent token would hold; a list leaves no such places.
"""
import numpy as np

from data.latin import Latin
from data.sudoku import Sudoku


class Puzzle:
    """What both puzzles share. A size is the side of the board, with "-list" behind it if givens
    are listed. Tokens: digits 0 .. side - 1, the blank, then side + 1 + cell * side + digit."""

    floor_nats = 0.0                                                    # there is one solution
    spare = 0.0                 # so many more are drawn, since some will need too many givens

    def __init__(self, size=None):
        side, _, form = (size or self.default_size).partition("-")
        self.board = self.boards(side)
        self.side = self.blank = self.board.side
        self.cells, self.listed = self.side**2, form == "list"
        self.fewest, self.most = self.givens[self.side]
        self.prompt_len = self.most if self.listed else self.cells
        self.seq_len = self.prompt_len + self.cells
        self.vocab_size = self.side + 1 + self.listed * self.cells * self.side
        units = self.board.units
        self.units_of = np.array([(units == cell).any(1).nonzero()[0]
                                  for cell in range(self.cells)])       # (cells, units of a cell)

    def batch(self, n, rng, split):
        """n puzzles with their solutions, int64 (n, seq_len), drawn with numpy's `rng`."""
        boards = self.board.batch(n + int(self.spare * n), rng, split)
        order = rng.random(boards.shape).argsort(1)            # cells are given in this order
        wanted = rng.integers(self.fewest, self.most, len(boards), endpoint=True)
        given = self._solvable(boards, order, wanted)
        few = given.sum(1) <= self.most
        puzzles = np.concatenate([self._prompt(boards, given), boards], axis=1)[few][:n]
        if len(puzzles) < n:
            puzzles = np.concatenate([puzzles, self.batch(n - len(puzzles), rng, split)])
        return puzzles

    def _prompt(self, boards, given):
        """The prompts, (n, prompt_len), that show the given cells, bool (n, cells), of boards."""
        if not self.listed:
            return np.where(given, boards, self.blank)
        cell = np.argsort(~given, axis=1, kind="stable")[:, :self.most]         # givens first
        token = self.side + 1 + cell * self.side + np.take_along_axis(boards, cell, axis=1)
        return np.where(np.take_along_axis(given, cell, axis=1), token, self.blank)

    def _solvable(self, boards, order, wanted):
        """Which cells to give, bool (n, cells): the first `wanted` of `order`, and wherever the two
        deductions get stuck the next cell that is still open. A set of digits is a number with one
        bit for each."""
        turn = order.argsort(1)
        given = turn < wanted[:, None]
        solution = 1 << boards
        possible = np.where(given, solution, 2**self.side - 1)
        while True:
            decided = possible & (possible - 1) == 0                                  # one bit
            if decided.all():
                return given

            # First deduction: a digit that a unit has placed is possible nowhere else in it.
            placed = np.where(decided, possible, 0)
            placed = np.bitwise_or.reduce(placed[:, self.board.units], axis=2)      # (n, units)
            taken = np.bitwise_or.reduce(placed[:, self.units_of], axis=2)          # (n, cells)
            left = np.where(decided, possible, possible & ~taken)

            # Second deduction: a digit that is possible in one cell of a unit goes there.
            once = twice = 0
            for cell in self.board.units.T:                     # the first of each unit, ...
                twice |= once & left[:, cell]
                once |= left[:, cell]
            only_here = np.bitwise_or.reduce((once & ~twice)[:, self.units_of], axis=2) & left
            left = np.where(only_here > 0, only_here, left)

            stuck = (left == possible).all(1) & ~decided.all(1)
            cell = np.where(decided, self.cells, turn)[stuck].argmin(1)
            given[stuck, cell] = True
            left[stuck, cell] = solution[stuck, cell]
            possible = left

    def _grid(self, tokens):
        """The puzzles of tokens, (n, seq_len), as boards with blanks, (n, cells)."""
        if not self.listed:
            return tokens[:, :self.prompt_len]
        grid = np.full((len(tokens), self.cells + 1), self.blank)      # the padding's cell is last
        cell, digit = np.divmod(tokens[:, :self.prompt_len] - self.side - 1, self.side)
        np.put_along_axis(grid, cell, digit, axis=1)          # a blank is cell -1, digit side - 1
        return grid[:, :-1]

    def correct(self, tokens):
        """Which rows of tokens, (n, seq_len), keep the rules and their givens: bool (n,)."""
        puzzle, board = self._grid(tokens), tokens[:, self.prompt_len:]
        return self.board.correct(board) & ((puzzle == self.blank) | (puzzle == board)).all(1)

    def held_out(self, tokens):
        """Whose solutions are not in the training split: bool (n,)."""
        return self.board.held_out(tokens[:, self.prompt_len:])

    def read(self, text):
        """A puzzle of one's own, cell by cell, "1..3.": tokens (1, seq_len), its answer all 0."""
        digits = np.array([int(x) if x.isdecimal() else 0 for x in text]) - 1
        given = digits >= 0
        if len(text) != self.cells or digits.max() >= self.side:
            raise ValueError(f"it has {self.cells} cells, row by row, 1 to {self.side} or a dot")
        if given.sum() > self.prompt_len:
            raise ValueError(f"at most {self.prompt_len} givens")
        prompt = self._prompt(digits[None], given[None])
        return np.concatenate([prompt, np.zeros((1, self.cells), dtype=int)], axis=1)

    def show(self, tokens, mark=lambda place, text: text):
        """The puzzle, and below it the answer; its tokens are shown as mark(place, text)."""
        puzzle = self.board.show(self._grid(np.array([tokens]))[0])
        answer = self.board.show(tokens[self.prompt_len:],
                                 lambda place, text: mark(place + self.prompt_len, text))
        return f"{puzzle}\n\n{answer}"


class LatinPuzzle(Puzzle):
    """Complete a Latin square."""

    name, boards, givens, spare = "latin-puzzle", Latin, {5: (6, 11)}, 0.5
    sizes, default_size, steps = ("5", "5-list"), "5-list", 1500


class SudokuPuzzle(Puzzle):
    """Complete a Sudoku board."""

    name, boards = "sudoku-puzzle", Sudoku
    givens = {4: (4, 8), 6: (10, 18), 9: (28, 40)}                  # fewest and most in a puzzle
    sizes, default_size = ("4", "6", "9", "4-list", "6-list", "9-list"), "6-list"
    steps = 4600
