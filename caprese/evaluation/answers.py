"""Answers as they are written, read as mathematics: numbers, expressions, tuples and lists, times and ratios.

math-verify reads expressions and compares them. What it takes for a part of itself is read here: the 2 in "(1, 2)", the
10 in "10:30", the 1 in "1e3" and "3 1/2"; so are signs and digits of other scripts.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
from math_verify import parse, verify

logging.getLogger("math_verify").setLevel(logging.ERROR)

# 9^9^9, 2**100000: sympy would write them out, and no timeout stops it
_TOWER = re.compile(
    r"[\d)}]\s*(?:\*\*|\^)(?:\s*[{(]*\s*\d{4,}|\s*[{(][^)}]*(?:\d{4,}|\*)|[\d(){}\s]*(?:\*\*|\^))"
    r"|(?<!\d)\d{5,}\s*!|!\s*[)}]*\s*!"
)
# no answer goes deeper, or on for longer in one expression (sympy takes seconds) or list
_DEPTH, _EXPRESSION, _LENGTH = 8, 300, 5000
_SIGNS = str.maketrans(
    {
        **{code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},  # full-width forms
        **dict.fromkeys(map(ord, "\u2212\u2010\u2011\ufe63"), "-"),
        **dict.fromkeys(map(ord, "×·⋅∙"), "*"),
        **dict.fromkeys(map(ord, "\u200b\u200c\u200d\u200e\u200f\u2060\ufeff"), None),
        **dict.fromkeys(map(ord, "\u3000\u2007"), " "),
        **dict.fromkeys(map(ord, "、，"), ","),
        ord("÷"): "/",
        ord("≈"): "=",
    }
)
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_NUMBER = r"\d+(?:,\d{3}(?!\d))*(?:\.\d*)?|\.\d+"
_PLAIN = re.compile(rf"([-+]?)\s*[$€£¥]?\s*([-+]?)\s*({_NUMBER})(?:\s*/\s*(\d+))?\s*[$€£¥]?\s*(%?)")
_TIME = re.compile(r"(?<![\w:.,/])(\d{1,3}(?::\d{1,3})+)(?![\w:/]|[.,]\d)(?:\s?([ap])\.?m\b\.?)?", re.IGNORECASE)
_CLOSE = {"(": ")", "[": "]", "{": "}"}
# a structure stands in a text as a number that no answer is
_MASK = 31_415_926_535_897_932_384_000_000


@dataclass(frozen=True)
class Answer:
    """One answer: an expression of sympy, or several in brackets or with colons between them."""

    kind: str
    """"" of one expression, else its brackets, ":" (a ratio) or ":00" (a time)."""
    parts: tuple[Any, ...]
    """What sympy reads, or answers again."""

    def __str__(self) -> str:
        """Equal numbers alike, however they are written."""
        words = [str(part) if isinstance(part, Answer) else _canonical(part) for part in self.parts]
        if self.kind[:1] == ":":
            return ":".join(word.zfill(len(self.kind) - 1) if at else word for at, word in enumerate(words))
        if self.kind == "{}":
            words.sort()
        return f"{self.kind[:1]}{', '.join(words)}{self.kind[1:]}"

    def equals(self, other: Answer) -> bool:
        """Whether they are the same, as mathematics; an order counts but in {}."""
        if self.kind != other.kind or len(self.parts) != len(other.parts):
            return False
        pairs = zip(*(sorted(a.parts, key=str) if a.kind == "{}" else a.parts for a in (self, other)), strict=True)
        return all(a.equals(b) if isinstance(a, Answer) else _equal(a, b) for a, b in pairs)


def read_whole(text: str, mine: bool = False) -> Answer | None:
    """A text that is an answer and nothing else; None if it is not one expression, or has words in it.

    Args:
        mine: whether letters stand for mathematics also where nothing says that the text is LaTeX.
    """
    return _whole(normalised(text), mine)


def read_last(text: str) -> Answer | None:
    """The answer that a text ends with, or says is its answer; None if there is none."""
    masked: list[Answer | None] = []

    def mask(answer: Answer | None) -> str:
        masked.append(answer)
        return f"  {_MASK + len(masked) - 1}  "

    text = normalised(text)
    if len(text) < 200 and "=" not in text and (whole := _whole(text, False)) is not None:
        return whole  # a text that is nothing but its answer
    if not re.search(r"\$|\\[(\[]", text):
        text = re.sub(r"\\(?:text|textbf|mathrm|mbox)\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"(?<=[^\x00-\x7f])(?=[-\d])", " ", text)  # where words have no spaces between them
    text = re.sub(r"(?<=[\d)])\.(?=\s|$)", "  ", text)  # a full stop is no decimal point
    text = re.sub(r"(?<![\w)\]}])(?<![\d)\]}]\s)\+(?=[.\d])", "", text)  # +7
    while tower := _TOWER.search(text):  # with all that it touches
        before, behind = text[: tower.start()].rstrip(), text[tower.end() :]
        start, word = max(before.rfind(space) for space in " \n\t") + 1, re.match(r"\S*", behind)
        text = text[:start] + mask(None) + behind[word.end() if word else 0 :]
    text = _TIME.sub(lambda found: mask(_time(found)), _without_lists(text, mask))
    found = _parse(text)
    if not found:
        return None
    value = _bare(found[0])
    if isinstance(value, sympy.Basic):
        hidden = [int(n) - _MASK for n in value.atoms(sympy.Integer) if _MASK <= abs(int(n)) < _MASK + len(masked)]
        if hidden:
            return masked[hidden[0]] if value.is_Integer and value > 0 else None
    return Answer("", (value,))


def boxed(text: str) -> list[str]:
    """What stands in each \\boxed{} of a text that is closed, braces in it and all."""
    found: list[tuple[int, str]] = []
    opened: list[int | None] = []  # of each open brace, where its box begins; None for one that is no box's
    for token in re.finditer(r"(\\f?box(?:ed)?\s*\{)|\\.|[{}]", text, re.DOTALL):
        if token[1] or token[0] == "{":
            opened.append(token.end() if token[1] else None)
        elif token[0] == "}" and opened and (begin := opened.pop()) is not None:
            found.append((begin, text[begin : token.start()]))
    return [inside for _, inside in sorted(found)]


def normalised(text: str) -> str:
    """Signs, digits and spaces of other scripts as ASCII has them; grouped, mixed and scientific numbers plain."""
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda m: "^{" + m[0].translate(_RAISED) + "}", text.translate(_SIGNS))
    text = "".join(_digit(c) for c in text) if not text.isascii() else text
    text = re.sub(r"(?<![\w)])[–—](?=\d)", "-", text)
    # 1{,}234  1\,234  1,\!234, and with spaces that do not break
    text = re.sub(r"(?<=\d)(?:\{,\}|,?\\[,!;: ]|[\u00a0\u2009\u202f'’])(?=\d{3}(?!\d))", ",", text)
    text = re.sub(
        r"(?<![\w.,^/])(\d{1,12}) (\d{1,4})/(\d{1,4})(?![\w/]|\.\d|\s*[*^])", _mixed, text.replace("\u00a0", " ")
    )
    return re.sub(r"(?<![\w.])(\d+(?:\.\d*)?|\.\d+)[eE]([-+]?\d{1,3})(?![\w.]*\w)", _scientific, text)


def _digit(character: str) -> str:
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    if unicodedata.decomposition(character).startswith("<fraction>"):  # ½
        return " " + unicodedata.normalize("NFKC", character).replace("\u2044", "/")
    return character


def _mixed(found: re.Match[str]) -> str:
    whole, top, bottom = map(int, found.groups())
    return f"{whole * bottom + top}/{bottom}" if top < bottom else found[0]


def _scientific(found: re.Match[str]) -> str:
    power = int(found[2])
    digits = sympy.Rational(found[1]) * sympy.Integer(10) ** power
    return str(digits) if digits.is_Integer else f"{found[1]}*10^({power})"


def _whole(text: str, mine: bool) -> Answer | None:
    text, latex = _undressed(text)
    if not re.search(r"[\w\\]", text) or _TOWER.search(text):
        return None
    if found := _TIME.fullmatch(text):
        return _time(found)
    if (parts := _list(text, 0)) is not None and parts[1] == len(text):
        return _of_parts(text.lstrip("\\")[0] + text[-1], parts[0], mine or latex)
    if (number := _number(text)) is not None:
        return Answer("", (number,))
    if len(text) > _EXPRESSION:
        return None
    # a row of a grid, a ratio, words; a bare list, of which only the last is read where nothing marks it as the answer
    if re.search(r"\d\s+\d|[:'\"]", text) or (re.search(r",|^\[", text) and not (mine or latex)):
        return None
    bare = re.sub(r"(?<=[\d})])\s*\\(?:text|textbf|mathrm|mbox)\s*\{[^{}]*\}(?:\^\{?\d\}?)?", "", text)  # units
    letters = re.sub(r"\\[a-zA-Z]+", " ", bare)
    if not (mine or latex or "\\" in text) and re.search(r"[^\W\d_]", letters):
        return None
    if re.search(r"[^\W\d_]{2,}", re.sub(r"\b(?:sin|cos|tan|log|ln|exp|sqrt|pi)\b", "", letters)) or "\\text" in bare:
        return None
    read = _parse(f"${bare}$")
    value = _bare(read[0]) if read else None
    if not isinstance(value, sympy.Basic | sympy.MatrixBase) or value.has(sympy.zoo, sympy.nan):
        return None
    return Answer("", (value,))


def _undressed(text: str) -> tuple[str, bool]:
    """(what is within dollars, a box, emphasis or a named variable's equation, whether LaTeX was said)."""
    latex, before = False, None
    while text != before:
        before = text
        text = re.sub(r"\\(?:left|right)(?![a-zA-Z])\s*", "", text.strip().strip("`").removeprefix("="))
        text = re.sub(r"(?<!\\)[.;,]$", "", re.sub(r"\\[,;!]$", "", text.strip())).strip()
        for pattern in (r"\$\$?([^$]+)\$\$?", r"\\\((.+)\\\)", r"\\\[(.+)\\\]"):
            if inner := re.fullmatch(pattern, text, re.DOTALL):
                text, latex = inner[1], True
        if inner := re.fullmatch(r"\*\*(.+)\*\*|__(.+)__", text, re.DOTALL):
            text = inner[1] or inner[2]
        if text.startswith("\\boxed") and text.endswith("}") and len(boxes := boxed(text)) == 1:
            text, latex = boxes[0], True
        named = r"(?:[a-zA-Z](?:_\{?\w+\}?)?)\s*(?:=|\\approx|\\in(?![a-z]))\s*"
        if (inner := re.match(named, text)) and not re.search("[=<>]", text[inner.end() :]):
            text = text[inner.end() :]
        if inner := re.fullmatch(r"([^=<>]+?)\s*=\s*[a-zA-Z]", text):
            text = inner[1]
    return text, latex


def _number(text: str) -> Any:
    """A plain number, fraction or percentage as sympy has it; None if the text is not just that."""
    found = _PLAIN.fullmatch(text.replace("\\%", "%").replace("\\$", "$"))
    if found is None or (found[1] and found[2]):
        return None
    digits = found[3].replace(",", "").rstrip(".").lstrip("0") or "0"
    if len(digits) + len(found[4] or "") > _EXPRESSION:
        return None
    value = sympy.Number(digits)
    if found[5] and not found[4]:
        value = _parse(f"{digits}%")[0]  # math-verify's own: 50 and 0.5 are equal to it
    elif found[4]:
        if not int(found[4]):
            return None
        value = sympy.Rational(digits) / int(found[4]) / (100 if found[5] else 1)
    return -value if "-" in found[1] + found[2] else value


def _parse(text: str) -> list[Any]:
    """[the last answer in a text as sympy reads it, as it is written]; empty if there is none."""
    # timeouts use signals, which only the main thread may; inputs are short
    return list(parse(text, parsing_timeout=None))


def _bare(value: Any) -> Any:
    """The right side of x = 5."""
    return value.rhs if isinstance(value, sympy.Eq) and value.lhs.is_Symbol else value


def _time(found: re.Match[str]) -> Answer:
    words = found[1].split(":")
    parts = [int(word) for word in words]
    if found[2]:
        parts[0] = parts[0] % 12 + 12 * (found[2] in "pP")
    return Answer(":00" if all(len(word) == 2 for word in words[1:]) else ":", tuple(map(sympy.Integer, parts)))


def _of_parts(kind: str, parts: list[str], mine: bool) -> Answer | None:
    read = [_whole(part, mine) for part in parts]
    known = [part for part in read if part is not None]
    if len(known) < len(read):
        return None
    return Answer(kind, tuple(part if part.kind else part.parts[0] for part in known))


def _list(text: str, start: int) -> tuple[list[str], int] | None:
    """(parts, end) of a bracket with commas in it that begins at `start`."""
    head = re.compile(r"[(\[]|\\?\{").match(text, start)
    if head is None:
        return None
    parts, depth, begin, at = [], 0, head.end(), head.end()
    while at < len(text):
        sign = text[at]
        if depth > _DEPTH or at - start > _LENGTH:
            return None
        if sign == "\\" and text[at + 1 : at + 2] not in ("{", "}"):
            at += 1
        elif sign in "([{":
            depth += 1
        elif sign in ")]}" and depth:
            depth -= 1
        elif sign in ")]}":
            if (sign == "}") != head[0].endswith("{"):
                return None
            parts.append(text[begin:at].removesuffix("\\"))
            return (parts, at + 1) if len(parts) > 1 else None
        elif sign == "," and not depth:
            parts.append(text[begin:at])
            begin = at + 1
        at += 1
    return None


def _without_lists(text: str, mask: Callable[[Answer | None], str]) -> str:
    """A text in which tuples, lists and sets of mathematics are masked."""
    out, done = [], 0
    for found in re.finditer(r"[(\[]|(?:(?<=[\s$=:])|^)\\?\{", text):
        if found.start() < done or not (parts := _list(text, found.start())):
            continue
        kind = found[0][-1] + text[parts[1] - 1]
        answer = _of_parts(kind, parts[0], True)
        if answer is not None:
            out += [text[done : found.start()].removesuffix("\\left"), mask(answer)]
            done = parts[1]
    return "".join([*out, text[done:]])


def _canonical(value: Any) -> str:
    """The same words for the same number."""
    try:
        if isinstance(value, sympy.Expr) and value.is_number:
            return str(sympy.nsimplify(value.doit(), rational=True))
    except Exception as error:  # sympy gives up in many ways, and so large numbers are not written out
        logging.getLogger(__name__).debug("no canonical form: %s", error)
    try:
        return str(value)
    except ValueError:
        return "a number too long to write"


def _equal(gold: Any, said: Any) -> bool:
    """As math-verify sees it, which rounds to six places: too few where numbers are small."""
    if not verify([gold], [said], timeout_seconds=None):
        return False
    if all(isinstance(each, sympy.Number) and each.is_finite for each in (gold, said)):
        return bool(abs(gold - said) <= 1e-5 * max(abs(gold), abs(said)))
    return True
