"""Problems whose answers are exactly checkable, however many are wanted: most are arithmetic in several steps.

A problem is a chain of + - * on numbers of two and three digits, bracketed so that it is worked from left to right.
Its working has a line for each step, and in a line the columns from the right, each as carry (or borrow) and digit; a
product is two lines of one digit each and their sum. So a mistake anywhere goes on to the end.

Two kinds have long workings, whose lines are counted down; results are modulo 10,000. *fetching*: the problem has a
table of up to ten numbers, each with a digit, in any order; a line adds or subtracts the one that its value's second
digit names. *local*: each number is the sum of the two before it, and a line needs the line before it alone.

And *retrieval*, in words for any language model: keys with their values, and some of them asked for.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from caprese.errors import CapreseError

SPLITS = {"test": range(0, 1), "validation": range(1, 2), "distil": range(2, 6), "train": range(6, 16)}
"""A problem belongs to one split by the hash of its text, so that no seed makes them overlap."""
WIDTH = 4


@dataclass(frozen=True)
class Chain:
    question: str
    working: str
    answer: str
    steps: int


def _line(a: int, sign: str, b: int, wraps: bool = False) -> tuple[str, int]:
    """One line: operands, columns from the right as carry and digit, result, which may leave out what overflows."""
    columns, carry = [], 0
    result = {"+": a + b, "-": a - b, "*": a * b}[sign]
    if wraps:
        result %= 10**WIDTH
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


def make_fetching(steps: int, draw: random.Random) -> Chain:
    """So many sums and differences, at most 99, with the numbers of a table, which has those that are needed."""
    value = draw.randrange(10**WIDTH)
    table = [(draw.choice("+-"), b) for b in draw.sample(range(10, 1000), 10)]
    question, working, needed = f"({steps:02}){value:0{WIDTH}}", "", dict[str, None]()
    for left in range(steps, 0, -1):
        digit = value // 100 % 10
        sign, b = table[digit]
        entry = f"({digit}{sign}{b:0{WIDTH}})"
        needed[entry] = None
        line, value = _line(value, sign, b, wraps=True)
        working += f"({left:02}){entry}{line}"
    # in their order, models learn places and not to find what a line asks for
    question += "".join(draw.sample(list(needed), len(needed)))
    return Chain(question, f"{working}={value}", str(value), steps)


def make_local(steps: int, draw: random.Random) -> Chain:
    """A sequence of sums from two numbers on, so many of them, at most 99."""
    a, b = draw.randrange(10**WIDTH), draw.randrange(10**WIDTH)
    question, working = f"({steps:02}){a:0{WIDTH}}+{b:0{WIDTH}}", ""
    for left in range(steps, 0, -1):
        line, total = _line(a, "+", b, wraps=True)
        working += f"({left:02}){line}"
        a, b = b, total
    return Chain(question, f"{working}={b}", str(b), steps)


_ASKED = 4


def make_retrieval(pairs: int, draw: random.Random) -> Chain:
    """So many keys, made up of syllables, with numbers for values, and 4 of the keys asked for."""
    keys = set[str]()
    while len(keys) < pairs:
        keys.add("".join(draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(3)))
    known = dict(zip(draw.sample(sorted(keys), pairs), draw.sample(range(1000, 10**WIDTH), pairs), strict=True))
    asked = draw.sample(list(known), _ASKED)
    table = "".join(f"{key}: {value}\n" for key, value in known.items())
    question = f"{table}\nWrite the values of ({', '.join(asked)}) in the same way: in brackets, separated by commas."
    answer = f"({', '.join(str(known[key]) for key in asked)})"
    return Chain(question, answer, answer, pairs)


@dataclass(frozen=True)
class _Kind:
    make: Callable[[int, random.Random], Chain]
    steps: range


KINDS = {
    "chains": _Kind(make_chain, range(3, 7)),
    "fetching": _Kind(make_fetching, range(21, 41)),
    "local": _Kind(make_local, range(21, 41)),
    "retrieval": _Kind(make_retrieval, range(8, 33)),
}
"""How a kind's problems are made, and of how many steps."""


def line_is_right(line: str) -> bool:
    """Whether a line of working is what its operands make it, whatever its number is."""
    before = re.match(r"\(\d\d\)(?:\(\d([+-]\d{4})\))?", line)
    asked = before and before[1]
    line = line[before.end() :] if before else line
    head, _, _ = line.partition(":")
    if asked and not head.endswith(asked):
        return False
    for sign in "+-*":
        a, found, b = head.partition(sign)
        if found and a.isdecimal() and b.isdecimal() and len(a) == WIDTH and len(b) in (1, WIDTH):
            return line + "\n" == _line(int(a), sign, int(b), wraps=bool(before))[0]
    return False


def soundness(completion: str) -> float:
    """The fraction of the lines of a working that are right in themselves: a verifier that does not know the answer."""
    lines = [line for line in completion.split("\n") if line and not line.startswith("=")]
    return sum(map(line_is_right, lines)) / len(lines) if lines else 0.0


def split_of(question: str) -> str:
    """The split a problem belongs to."""
    share = hashlib.sha256(question.encode()).digest()[0] % 16
    return next(name for name, shares in SPLITS.items() if share in shares)


def chains(split: str, seed: int, steps: int | range | None = None, kind: str = "chains") -> Iterator[Chain]:
    """Problems of one kind and split without end, the same for the same seed.

    Args:
        steps: of every problem (of retrieval, pairs); of a range, or None for the kind's own, in equal parts.

    Raises:
        CapreseError: no such split, or steps out of range.
    """
    if split not in SPLITS:
        raise CapreseError(f"{kind} has no split {split!r}; it has {', '.join(SPLITS)}")
    if isinstance(steps, int):
        known = KINDS[kind].steps
        if steps not in known:
            raise CapreseError(f"{kind} has {known.start} to {known.stop - 1} steps, not {steps}")
        steps = range(steps, steps + 1)
    draw = random.Random(f"{split} {seed}")
    among, make = steps or KINDS[kind].steps, KINDS[kind].make
    while True:
        chain = make(draw.choice(among) if len(among) > 1 else among[0], draw)
        if split_of(chain.question) == split:
            yield chain
