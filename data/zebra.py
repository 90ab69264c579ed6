"""Zebra: who lives in which house? Every attribute (colour, pet, ...) is a permutation over the
houses, and clues admit exactly one grid.

The prompt is a list of clues, padded at its end; the answer is the grid, attribute by attribute,
house by house. Every clue that there is has a token of its own, since small models learn little in
minutes where a clue is four tokens (its rule and its things).

Puzzles are made for the grid in which house h holds the h-th thing of every attribute; afterwards
the things are renamed at random. Clues that are true of it are drawn (first a rule, then a clue)
and kept if they rule out a rival (one of the other grids, which are all enumerated) that the
clues before them admit; a later clue may make an earlier one redundant.

Source: the Zebra puzzle (Life International, 17 December 1962); kinds of clues as in Lin et al.,
"ZebraLogic" (2025), arXiv 2502.01100.
"""
import itertools

import numpy as np

from data.split import in_test

RULES = [      # what a clue says, and when that is true, if its things live in x, y, z of 0..last
    ("", lambda x, y, z, last: x == x),                               # the padding says nothing
    ("{} and {} share a house", lambda x, y, z, last: x == y),
    ("{} and {} do not share a house", lambda x, y, z, last: x != y),
    ("{} is immediately left of {}", lambda x, y, z, last: x + 1 == y),
    ("{} is left of {}", lambda x, y, z, last: x < y),
    ("{} and {} are neighbours", lambda x, y, z, last: abs(x - y) == 1),
    ("{2} is between {0} and {1}", lambda x, y, z, last: (z - x) * (y - z) > 0),
    ("{} is at an end", lambda x, y, z, last: (x == 0) | (x == last)),
    ("{} is at {}", lambda x, y, z, last: x == y)]                    # its y is a house
THINGS = [["red", "green", "blue", "white"], ["Dane", "Swede", "Brit", "Finn"],
          ["cat", "dog", "horse", "zebra"], ["tea", "milk", "juice", "water"]]
CLUES = {"3x2": 7, "3x3": 9, "3x4": 12, "4x3": 13, "4x4": 16}      # places for clues in a prompt


class Zebra:
    """Find the grid that all clues admit. A size HxA is H houses with A attributes. Tokens: first
    the things, attribute by attribute, then the padding and the clues."""

    name, sizes, default_size, steps = "zebra", tuple(CLUES), "3x3", 4600
    floor_nats = 0.0                                                    # there is one solution

    def __init__(self, size=default_size):
        self.houses, self.attributes = map(int, size.split("x"))
        self.prompt_len, self.things = CLUES[size], self.houses * self.attributes
        self.seq_len = self.prompt_len + self.things
        self.nothing = self.things + self.houses            # names: the things, the houses, nothing
        self.clues = np.array(list(self._all_clues()))              # (clues, 4): a rule and x, y, z
        self.vocab_size = self.things + len(self.clues)
        self.number = np.zeros((len(RULES), *[self.nothing + 1] * 3), dtype=np.int64)
        rule, x, y, z = self.clues.T
        self.number[rule, y, x, z] = np.arange(len(self.clues))     # x and y in either order; where
        self.number[rule, x, y, z] = np.arange(len(self.clues))     # both are clues, each its own

        solution = np.tile(np.arange(self.houses), self.attributes)       # the house of each thing
        orders = list(itertools.permutations(range(self.houses)))
        grids = np.array(list(itertools.product(orders, repeat=self.attributes)), dtype=np.int8)
        grids = grids.reshape(-1, self.things)
        home, homes = self._homes(solution[None]), self._homes(grids[(grids != solution).any(1)])
        self.true = np.array([i for i, clue in enumerate(self.clues) if self._rule(clue, home)[0]])
        admits = np.stack([np.packbits(self._rule(clue, homes)) for clue in self.clues[self.true]])
        self.admits = np.pad(admits, ((0, 0), (0, -admits.shape[1] % 8))).view(np.uint64)
        rules = self.clues[self.true, 0]
        self.first, self.count = np.searchsorted(rules, np.arange(len(RULES))), np.bincount(rules)

    def _homes(self, houses):
        """The house of each thing, (n, things) -> of each thing, house and nothing, (names, n)."""
        homes = np.zeros((self.nothing + 1, len(houses)), dtype=np.int8)
        homes[:self.things] = houses.T
        homes[self.things:self.nothing] = np.arange(self.houses)[:, None]
        return homes

    def _rule(self, clue, homes):
        """In which grids is a clue true? homes (names, n) -> bool (n,)."""
        rule, x, y, z = clue
        return RULES[rule][1](homes[x], homes[y], homes[z], self.houses - 1)

    def _all_clues(self):
        """Every clue that there is, rule by rule; the padding first, which says nothing."""
        pairs = list(itertools.combinations(range(self.things), 2))
        unlike = [(x, y) for x, y in pairs if x // self.houses != y // self.houses]
        ordered = list(itertools.permutations(range(self.things), 2))
        between = [(x, y, z) for x, y in pairs for z in range(self.things) if z not in (x, y)]
        alone = [(x,) for x in range(self.things)]
        at = list(itertools.product(range(self.things), range(self.things, self.nothing)))
        of_rule = [[()], unlike, unlike, ordered, ordered, pairs, between, alone, at]  # as in RULES
        for rule, choices in enumerate(of_rule):
            for things in choices:
                yield (rule, *things, *[self.nothing] * (3 - len(things)))

    def batch(self, n, rng, split):
        """n puzzles with their solutions, int64 (n, seq_len)."""
        chosen = self._choose(n * 11 if split == "test" else n + n // 4, rng)
        chosen = chosen[in_test(np.sort(chosen, axis=1)) == (split == "test")][:n]
        answer = rng.random((len(chosen), self.attributes, self.houses)).argsort(2)
        answer += self.houses * np.arange(self.attributes)[:, None]
        answer = answer.reshape(len(chosen), self.things)
        names = np.tile(np.arange(self.nothing + 1), (len(chosen), 1))               # (n, names)
        names[:, :self.things] = answer
        rule, x, y, z = self.clues[self.true[chosen]].transpose(2, 0, 1)     # each (n, prompt_len)
        x, y, z = (np.take_along_axis(names, w, axis=1) for w in (x, y, z))
        puzzles = np.concatenate([self.things + self.number[rule, x, y, z], answer], axis=1)
        if len(puzzles) < n:
            puzzles = np.concatenate([puzzles, self.batch(n - len(puzzles), rng, split)])
        return puzzles

    def _choose(self, n, rng):
        """The clues of at most n puzzles, (n, prompt_len), as indices into self.true."""
        chosen = np.zeros((n, self.prompt_len), dtype=np.int64)
        used = np.zeros(n, dtype=np.int64)
        rivals = np.repeat(self.admits[:1], n, axis=0)                      # one bit for each rival
        while len(row := np.flatnonzero(rivals.any(1) & (used < self.prompt_len))):
            rule = rng.integers(1, len(RULES), size=len(row))
            clue = self.first[rule] + (rng.random(len(row)) * self.count[rule]).astype(np.int64)
            before = rivals[row]
            left = before & self.admits[clue]
            useful = (left != before).any(1)                                # not yet implied
            rivals[row], chosen[row, used[row]] = left, np.where(useful, clue, 0)
            used[row] += useful
        return chosen[~rivals.any(1)]

    def correct(self, tokens):
        """Which rows of tokens, (n, seq_len), hold a grid that all their clues admit: bool (n,)."""
        n = len(tokens)
        answer = tokens[:, self.prompt_len:].reshape(n, self.attributes, self.houses)
        things = np.arange(self.things).reshape(self.attributes, self.houses)
        right = (np.sort(answer, axis=2) == things).all((1, 2))
        homes = self._homes(answer.argsort(2).reshape(n, self.things))
        rule, *names = self.clues[tokens[:, :self.prompt_len] - self.things].transpose(2, 0, 1)
        x, y, z = (homes[name, np.arange(n)[:, None]] for name in names)      # each (n, prompt_len)
        for i, (_, is_true) in enumerate(RULES):
            right &= ((rule != i) | is_true(x, y, z, self.houses - 1)).all(1)
        return right

    def show(self, tokens, mark=lambda place, text: text):
        """One row of tokens, (seq_len,), as a person would write it. Every token of the answer is
        shown as mark(place, text); what is no thing is a dot."""
        names = [name for those in THINGS[:self.attributes] for name in those[:self.houses]]
        names += [*(f"house {h + 1}" for h in range(self.houses)), ""]
        lines = []
        for rule, *things in self.clues[np.asarray(tokens[:self.prompt_len]) - self.things]:
            if rule > 0:
                lines.append(RULES[rule][0].format(*(names[t] for t in things)))
        for start in range(self.prompt_len, self.seq_len, self.houses):
            lines.append("".join(
                mark(i, f"{names[tokens[i]] if 0 <= tokens[i] < self.things else '.':<8}")
                for i in range(start, start + self.houses)))
        return "\n".join(lines)
