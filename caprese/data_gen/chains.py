"""Arithmetic in several steps, written out: problems whose answers are exactly checkable, however many are wanted.

A problem is a chain of + - * on numbers of two and three digits, bracketed so that it is worked from left to right.
Its working has a line for each step, and in a line the columns from the right, each as carry (or borrow) and digit; a
product is two lines of one digit each and their sum. So a mistake anywhere goes on to the end.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

from caprese.errors import CapreseError

SPLITS = {"test": range(0, 1), "validation": range(1, 2), "distil": range(2, 6), "train": range(6, 16)}
"""A problem belongs to one split by the hash of its text, so that no seed makes them overlap."""
STEPS = range(3, 7)
WIDTH = 4


@dataclass(frozen=True)
class Chain:
    question: str
    working: str
    answer: str
    steps: int


def _line(a: int, sign: str, b: int) -> tuple[str, int]:
    """One line: operands, columns from the right as carry and digit, result."""
    columns, carry = [], 0
    result = {"+": a + b, "-": a - b, "*": a * b}[sign]
    for place in range(WIDTH):
        x, y = a // 10**place % 10, b // 10**place % 10
        if sign == "*":
            y = b
        column = {"+": x + y + carry, "-": x - y - carry, "*": x * y + carry}[sign]
        carry = -(column // 10) if sign == "-" else column // 10
        columns.append(f"{carry}{column % 10}")
    second = f"{b}" if sign == "*" else f"{b:0{WIDTH}}"
    return f"{a:0{WIDTH}}{sign}{second}:{''.join(columns)}>{result:0{WIDTH}}\n", result


def _step(a: int, sign: str, b: int) -> tuple[str, int]:
    if sign != "*":
        return _line(a, sign, b)
    ones, first = _line(a, "*", b % 10)
    tens, second = _line(a, "*", b // 10)
    total, result = _line(first, "+", 10 * second)
    return ones + tens + total, result


def make_chain(steps: int, draw: random.Random) -> Chain:
    """A problem of so many steps, its working and its answer; all intermediate results from 0 to 9999, at most one
    product."""
    while True:
        value = draw.randint(10, 999)
        question, working = str(value), ""
        product = False
        for _ in range(steps):
            sign = draw.choice("+-*" if not product and value <= 400 else "+-")
            b = draw.randint(11, 99) if sign == "*" else draw.randint(10, 999)
            after = {"+": value + b, "-": value - b, "*": value * b}[sign]
            tens = value * (b // 10) if sign == "*" else 0
            if not 0 <= after < 10**WIDTH or 10 * tens >= 10**WIDTH:
                break
            product = product or sign == "*"
            line, value = _step(value, sign, b)
            question = f"({question}){sign}{b}" if not question.isdigit() else f"{question}{sign}{b}"
            working += line
        else:
            return Chain(question, f"{working}={value}", str(value), steps)


def line_is_right(line: str) -> bool:
    """Whether a line of working is what its operands make it."""
    head, _, _ = line.partition(":")
    for sign in "+-*":
        a, found, b = head.partition(sign)
        if found and a.isdecimal() and b.isdecimal() and len(a) == WIDTH and len(b) in (1, WIDTH):
            return line + "\n" == _line(int(a), sign, int(b))[0]
    return False


def soundness(completion: str) -> float:
    """The fraction of the lines of a working that are right in themselves: a verifier that does not know the answer."""
    lines = [line for line in completion.split("\n") if line and not line.startswith("=")]
    return sum(map(line_is_right, lines)) / len(lines) if lines else 0.0


def split_of(question: str) -> str:
    """The split a problem belongs to."""
    share = hashlib.sha256(question.encode()).digest()[0] % 16
    return next(name for name, shares in SPLITS.items() if share in shares)


def chains(split: str, seed: int, steps: int | None = None) -> Iterator[Chain]:
    """Problems of one split without end, the same for the same seed; of 3 to 6 steps in equal parts, or of `steps`.

    Raises:
        CapreseError: no such split, or steps out of range.
    """
    if split not in SPLITS:
        raise CapreseError(f"chains has no split {split!r}; it has {', '.join(SPLITS)}")
    if steps is not None and steps not in STEPS:
        raise CapreseError(f"chains has {STEPS.start} to {STEPS.stop - 1} steps, not {steps}")
    draw = random.Random(f"{split} {seed}")
    while True:
        chain = make_chain(steps or draw.choice(STEPS), draw)
        if split_of(chain.question) == split:
            yield chain
