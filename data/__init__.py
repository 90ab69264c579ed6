"""The tasks. A new puzzle is one new file, its import here, and its name in TASKS.

A task, Task(size), has: name, sizes (strings), default_size, vocab_size, seq_len, prompt_len (0: no
prompt), floor_nats (entropy of the answer given the prompt, None where unknown), batch(n, rng,
split) -> int64 (n, seq_len), the prompt first, correct(tokens) -> bool (n,), show(tokens, mark) ->
str. Without a prompt it also has held_out(tokens) -> bool (n,). in_test of split.py tells which
puzzles are held out.
"""
from data.countdown import Countdown
from data.latin import Latin
from data.sudoku import Sudoku, SudokuPuzzle
from data.zebra import Zebra

TASKS = {task.name: task for task in (Sudoku, SudokuPuzzle, Latin, Countdown, Zebra)}
