"""Zebra: who lives in which house? Every attribute (colour, pet, ...) is a permutation over the
houses, and clues admit exactly one grid.

The prompt is a list of clues, four tokens each (a kind and up to three things), padded at its end;
the answer is the grid, attribute by attribute, house by house.

Puzzles are made for the grid in which house h holds the h-th thing of every attribute; afterwards
the things are renamed at random. Clues that are true of it are drawn (first a kind, then a clue)
and kept if they rule out a rival (one of the other grids, which are all enumerated) that the
clues before them admit; a later clue may make an earlier one redundant.

Source: the Zebra puzzle (Life International, 17 December 1962); kinds of clues as in Lin et al.,
"ZebraLogic" (2025), arXiv 2502.01100.
"""
import itertools

import numpy as np

from data.split import in_test

RULES = [      # what a clue says of its things, and when that is true: x, y, z are their houses
    ("{} and {} share a house", lambda x, y, z, last: x == y),
    ("{} and {} do not share a house", lambda x, y, z, last: x != y),
    ("{} is immediately left of {}", lambda x, y, z, last: x + 1 == y),
    ("{} is left of {}", lambda x, y, z, last: x < y),
    ("{} and {} are neighbours", lambda x, y, z, last: abs(x - y) == 1),
    ("{2} is between {0} and {1}", lambda x, y, z, last: (z - x) * (y - z) > 0),
    ("{} is at an end", lambda x, y, z, last: (x == 0) | (x == last)),
    ("{} is at {}", lambda x, y, z, last: x == y)]                    # its y is a house
SYMMETRIC = (0, 1, 4, 5)                       # x and y can be swapped: the smaller token is first
THINGS = [["red", "green", "blue", "white"], ["Dane", "Swede", "Brit", "Finn"],
          ["cat", "dog", "horse", "zebra"], ["tea", "milk", "juice", "water"]]
CLUES = {"3x3": 9, "3x4": 12, "4x3": 13, "4x4": 16}                 # places for clues in a prompt


class Zebra:
    """Find the grid that all clues admit. A size HxA is H houses with A attributes. Tokens: first
    the things, attribute by attribute, then the houses, the kinds of clues, and the padding."""

    name, sizes, default_size = "zebra", tuple(CLUES), "3x3"
    floor_nats = 0.0                                                    # there is one solution

    def __init__(self, size=default_size):
        self.houses, self.attributes = map(int, size.split("x"))
        self.clues, self.things = CLUES[size], self.houses * self.attributes
        self.first_kind = self.things + self.houses
        self.pad = self.first_kind + len(RULES)
        self.vocab_size = self.pad + 1
        self.prompt_len = 4 * self.clues
        self.seq_len = self.prompt_len + self.things

        solution = np.tile(np.arange(self.houses), self.attributes)       # the house of each thing
        orders = list(itertools.permutations(range(self.houses)))
        grids = np.array(list(itertools.product(orders, repeat=self.attributes)), dtype=np.int8)
        grids = grids.reshape(-1, self.things)
        home, homes = self._homes(solution[None]), self._homes(grids[(grids != solution).any(1)])
        true = np.array([clue for clue in self._all_clues() if self._rule(clue, home)[0]])
        self.table = np.concatenate([np.full((1, 4), self.pad), true])    # clue 0 is the padding
        everything = np.packbits(np.ones(homes.shape[1], dtype=bool))
        self.admits = np.stack([everything, *(np.packbits(self._rule(c, homes)) for c in true)])
        kinds = true[:, 0] - self.first_kind
        self.first = 1 + np.searchsorted(kinds, np.arange(len(RULES)))
        self.count = np.bincount(kinds)

    def _homes(self, houses):
        """The house of each thing, (n, things) -> the house of each token, (vocab_size, n)."""
        homes = np.zeros((self.vocab_size, len(houses)), dtype=np.int8)
        homes[:self.things] = houses.T
        homes[self.things:self.first_kind] = np.arange(self.houses)[:, None]
        return homes

    def _rule(self, clue, homes):
        """In which grids is a clue, four tokens, true? homes (vocab_size, n) -> bool (n,)."""
        kind, x, y, z = clue
        return RULES[kind - self.first_kind][1](homes[x], homes[y], homes[z], self.houses - 1)

    def _all_clues(self):
        """Every clue that there is, as four tokens, kind by kind."""
        pairs = list(itertools.combinations(range(self.things), 2))
        unlike = [(x, y) for x, y in pairs if x // self.houses != y // self.houses]
        ordered = list(itertools.permutations(range(self.things), 2))
        between = [(x, y, z) for x, y in pairs for z in range(self.things) if z not in (x, y)]
        alone = [(x,) for x in range(self.things)]
        at = list(itertools.product(range(self.things), range(self.things, self.first_kind)))
        for kind, of in enumerate([unlike, unlike, ordered, ordered, pairs, between, alone, at]):
            for things in of:
                yield (self.first_kind + kind, *things, *[self.pad] * (3 - len(things)))

    def batch(self, n, rng, split):
        """n puzzles with their solutions, int64 (n, seq_len)."""
        chosen = self._choose(n * 11 if split == "test" else n + n // 4, rng)
        chosen = chosen[in_test(np.sort(chosen, axis=1)) == (split == "test")][:n]
        names = rng.random((len(chosen), self.attributes, self.houses)).argsort(2)
        names += self.houses * np.arange(self.attributes)[:, None]
        answer = names.reshape(len(chosen), self.things)
        others = np.tile(np.arange(self.things, self.vocab_size), (len(chosen), 1))
        names = np.concatenate([answer, others], axis=1)                        # (n, vocab_size)
        clues = self.table[chosen].reshape(len(chosen), self.prompt_len)
        clues = np.take_along_axis(names, clues, axis=1).reshape(len(chosen), self.clues, 4)
        swap = np.isin(clues[..., 0] - self.first_kind, SYMMETRIC) & (clues[..., 1] > clues[..., 2])
        clues[swap] = clues[swap][:, [0, 2, 1, 3]]       # or their order would tell who is left
        puzzles = np.concatenate([clues.reshape(len(chosen), self.prompt_len), answer], axis=1)
        if len(puzzles) < n:
            puzzles = np.concatenate([puzzles, self.batch(n - len(puzzles), rng, split)])
        return puzzles

    def _choose(self, n, rng):
        """The clues of at most n puzzles, (n, places), as rows of the table."""
        chosen, used = np.zeros((n, self.clues), dtype=np.int64), np.zeros(n, dtype=np.int64)
        rivals = np.repeat(self.admits[:1], n, axis=0)                      # one bit for each rival
        while len(row := np.flatnonzero(rivals.any(1) & (used < self.clues))):
            kind = rng.integers(len(RULES), size=len(row))
            clue = self.first[kind] + (rng.random(len(row)) * self.count[kind]).astype(np.int64)
            left = rivals[row] & self.admits[clue]
            useful = (left != rivals[row]).any(1)                           # not yet implied
            rivals[row], chosen[row, used[row]] = left, np.where(useful, clue, 0)
            used[row] += useful
        return chosen[~rivals.any(1)]

    def correct(self, tokens):
        """Which rows of tokens, (n, seq_len), hold a grid that all their clues admit: bool (n,)."""
        n, row = len(tokens), np.arange(len(tokens))
        answer = tokens[:, self.prompt_len:].reshape(n, self.attributes, self.houses)
        things = np.arange(self.things).reshape(self.attributes, self.houses)
        right = (np.sort(answer, axis=2) == things).all((1, 2))
        homes = self._homes(answer.argsort(2).reshape(n, self.things))
        for kind, x, y, z in tokens[:, :self.prompt_len].reshape(n, -1, 4).transpose(1, 2, 0):
            for i, (_, rule) in enumerate(RULES):
                true = rule(homes[x, row], homes[y, row], homes[z, row], self.houses - 1)
                right &= (kind != self.first_kind + i) | true
        return right

    def show(self, tokens, mark=lambda place, text: text):
        """One row of tokens, (seq_len,), as a person would write it. Every token of the answer is
        shown as mark(place, text); what is no thing is a dot."""
        names = [name for those in THINGS[:self.attributes] for name in those[:self.houses]]
        names += [f"house {h + 1}" for h in range(self.houses)] + [""] * (len(RULES) + 1)
        lines = []
        for kind, *things in np.asarray(tokens[:self.prompt_len]).reshape(-1, 4):
            if kind < self.pad:
                text = RULES[kind - self.first_kind][0]
                lines.append(text.format(*(names[t] for t in things)))
        for start in range(self.prompt_len, self.seq_len, self.houses):
            lines.append("".join(
                mark(i, f"{names[tokens[i]] if 0 <= tokens[i] < self.things else '.':<8}")
                for i in range(start, start + self.houses)))
        return "\n".join(lines)
