"""The tasks. A new puzzle is one new file, its import here, and its name in TASKS.

A task, Task(size), has

    name, sizes (strings), default_size, steps (of training, until systems can be compared)
    vocab_size, seq_len, prompt_len (0: no prompt)
    floor_nats          the entropy of the answer given the prompt, None where it is unknown
    batch(n, rng, split)    int64 (n, seq_len), the prompt first; split is "train" or "test"
    correct(tokens)     bool (n,), by the rules alone
    show(tokens, mark)  str; each token of the answer as mark(place, text)

and where it can: held_out(tokens), bool (n,), which boards are not of the training split;
read(text), int64 (1, seq_len), a puzzle of one's own.

split.py says which puzzles are held out: boards by themselves, a puzzle by its solution if that is
the only one, else by its prompt, so that no answer to a test puzzle is trained on. The tests
compare `correct` with a naive checker, which a new puzzle needs, too: naive_correct.
"""
from data.countdown import Countdown
from data.latin import Latin
from data.puzzle import LatinPuzzle, SudokuPuzzle
from data.sudoku import Sudoku
from data.zebra import Zebra

TASKS = {task.name: task for task in (LatinPuzzle, Sudoku, Latin, SudokuPuzzle, Countdown, Zebra)}
