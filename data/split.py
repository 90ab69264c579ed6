"""Which puzzles are never trained on."""
import numpy as np


def in_test(keys):
    """keys (n, length) integers, what identifies a puzzle -> bool (n,): does it belong to the test
    split? About one in ten does, by a hash, so that no list of puzzles need be stored."""
    weights = np.random.default_rng(0).integers(2**63, size=keys.shape[1], dtype=np.uint64)
    return (keys.astype(np.uint64) @ weights >> np.uint64(32)) % np.uint64(10) == 0


def board_in_test(boards, side):
    """The same for boards of digits, (n, side * side): by a hash of the board with its first row
    renamed to 0 1 2 ..., so that renaming digits changes nothing."""
    return in_test(np.take_along_axis(boards[:, :side].argsort(1), boards.astype(np.int64), axis=1))
