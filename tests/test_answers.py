"""Answers as people and models write them: what is read, what is equal, and what is left alone."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caprese.data_gen import Prompt, load_prompts
from caprese.evaluation.accuracy import Marker, is_correct

RIGHT = [
    ("-7", "so it is −7."),
    ("\u22127", "-7"),
    ("４５", "45"),
    ("45", "答えは４５です"),
    ("45", "\u0664\u0665"),
    ("(3, -4)", "They meet at (3, −4)."),
    ("(3, -4)", r"$\left(3, -4\right)$"),
    ("(3,-4)", r"so \boxed{(3, -4)} it is"),
    (r"\left(\frac{3}{2}, 4\right)", "(1.5, 4)"),
    ("[3, 1, 2]", "Sorted: [3,1,2]"),
    ("[[1, 0], [0, 1]]", "<answer>[[1,0],[0,1]]</answer>"),
    (r"\{2, 3\}", "$\\{3, 2\\}$"),
    ("[0, 3)", r"$x \in [0, 3)$"),
    ("09:45", "The train leaves at 9:45."),
    ("21:45", "at 9:45 p.m."),
    ("00:15", "12:15 am"),
    ("4:3", "the ratio is 4:3"),
    ("2e4", "20,000"),
    ("20000", "about 2.0E4"),
    ("3e-9", r"$3 \times 10^{-9}$"),
    ("y = 8", "8"),
    ("8", "y=8"),
    ("8", "Therefore $y = 8$."),
    ("$y = 8$", r"\boxed{y = 8}"),
    ("12,345", r"\boxed{12{,}345}"),
    ("12345", r"$12\,345$"),
    ("12345", "12\u202f345"),
    ("$1,050.50", "1050.5"),
    ("72", "<answer>$72</answer>"),
    ("72", "<answer>72 dollars</answer>"),
    ("1050", "It costs $1,050."),
    ("40%", "40%"),
    ("40%", r"\boxed{40\%}"),
    ("40", "40%"),
    ("40%", "0.4"),
    ("5 3/4", "23/4"),
    ("5.75", "5¾"),
    ("5.75", "It takes 5 3/4."),
    ("23/4", r"$5\frac{3}{4}$"),
    (r"\dfrac34", r"\boxed{\tfrac{3}{4}}"),
    (r"9 \text{ cm}", r"\boxed{9}"),
    ("9", r"\boxed{9\text{ cm}^2}"),
    ("9", r"\boxed{\text{It is 9}}"),
    ("6", "2 · 3"),
    ("$x^2 - 3x$", r"\boxed{x^2 - 3x}"),
    ("41/108", "The answer is 41/108."),
    ("#### 7", "7"),
    ("+7", "It is +7"),
    (r"\sqrt{3}", r"\sqrt{3}"),
]
WRONG = [
    ("4", "They meet at (3, 4)."),
    ("4", "[3, 4]"),
    ("(3, 4)", "(4, 3)"),
    ("(3, 4)", "[3, 4]"),
    ("(3, 4)", "4"),
    ("45", "at 9:45"),
    ("9", "9:45"),
    ("9:45", "9:45 pm"),
    ("1", "1e3"),
    ("1/2", "3 1/2"),
    ("3e-9", "2e-9"),
    ("7", "−7"),
    ("2", r"\boxed{1, 2}"),
    ("3", r"$x \in (1, 3)$"),
    ("235", r"$1\,234$"),
    ("2", "so {1, 2}"),
]
LEFT_ALONE = [
    *("red", "A", "1 2\n3 4", "1 2 3 4", "100 200 300", "a=1, b=2", "Alice has 3 apples", "1, 2", "1,2", "(a, b)", ""),
    *(
        "['x', 'y']",
        "['1', '2']",
        "[5]",
        r"$\text{Alice}$",
        "2x+1",
        "1/0",
        "9^9^9",
        "no",
        "5 or 6",
        "f(x) = 5",
        "$$",
        "()",
    ),
    # nor waited for
    *("9" * 5000, "1/" + "9" * 5000, "{" * 5000, "((1," * 1000, "[" + "1," * 3000 + "1]", "5 = x " * 500),
]


@pytest.mark.parametrize(("gold", "said"), RIGHT)
def test_right(gold, said):
    assert is_correct(said, gold) is True
    assert is_correct(f"First 31, then (7, 8).\nSo the answer: <answer>{gold}</answer>\nNot 17:30.", gold) is True


@pytest.mark.parametrize(("gold", "said"), WRONG)
def test_wrong(gold, said):
    assert is_correct(said, gold) is False


@pytest.mark.parametrize("gold", LEFT_ALONE, ids=lambda gold: gold[:12])
def test_what_cannot_be_marked_is_not_wrong(gold):
    assert is_correct(gold, gold) is None and is_correct("3", gold) is None


@pytest.mark.parametrize(
    ("completion", "cut", "finished"),
    [
        (r"\boxed{\sqrt{\frac{1}{4}}} as", "1/2", "1/2"),
        (r"\boxed{ \{1, 2\} } as", "{1, 2}", "{1, 2}"),
        (r"\boxed{3} or \fbox{4}, 5", "4", "4"),
        (r"\boxed {3} 5", "3", "3"),
        (r"\boxed{\boxed{3}} 5", "3", "3"),
        (r"\boxed{3", None, None),
        ("<answer>3</answer> 5 <answer> 4 </answer> 6", "4", "4"),
        (r"<answer>so \boxed{3}</answer> \boxed{4}", "3", "3"),
        ("<answer>the sum, 3", None, "3"),
        ("<answer></answer> 3", None, "3"),
        ("<think>3</think>", None, None),
        (r"<think>\boxed{3} <answer>4</answer> 5", None, None),
        (r"so \boxed{3}</think>hence \boxed{4}", "4", "4"),
        ("<think>3</think>It is 4<think>5</think>", None, "4"),
        (r"<think>a</think>\boxed{4} <think>\boxed{5}", "4", "4"),
        (r"<think>a <think>\boxed{3}</think> b \boxed{5}</think> 4", None, "4"),
        ("2^{20000} ends in 6", None, "6"),
        ("It is 7^{8^{9}}", None, None),
        ("f(2, 3) = 5", None, "5"),
        ("The answer is 5 (not (1, 2))", None, "5"),
        ("It is (1, 2), or (3, 4)", None, "(3, 4)"),
        ("at 10:05, no: 9:30 PM", None, "21:30"),
    ],
)
def test_what_is_read(completion, cut, finished):
    mark = Marker(Prompt("", "12"))
    assert mark(completion, ended=False)[0] == cut and mark(completion)[0] == finished


def test_scorers_of_tasks_stay_where_the_form_counts():
    for task in ("rotate_matrix", "game_of_life", "number_sorting"):
        for prompt in load_prompts(f"gym:{task}", 3, 0):
            mark = Marker(prompt)
            assert mark.scorer is not None and mark(f"<answer>{prompt.answer}</answer>")[1]
    assert all(Marker(prompt).scorer is None for prompt in load_prompts("gym:chain_sum", 3, 0))


def spellings(value: Fraction) -> list[str]:
    """A number of at most three decimals, as it may be written."""
    digits = f"{float(value):.3f}"
    sign, size = ("-" if value < 0 else ""), abs(value)
    found = [
        digits,
        f"{float(value):,.3f}",
        f"$ {digits} $",
        f"x = {digits}",
        digits.replace("-", "−"),
        f"**{digits}**",
    ]
    found += [f"{value.numerator}/{value.denominator}", rf"{sign}\frac{{{size.numerator}}}{{{size.denominator}}}"]
    found += [f"{value * 1000}e-3", digits.translate({48 + i: 0xFF10 + i for i in range(10)}), f"{digits}."]
    whole, rest = divmod(size, 1)
    if whole and rest:
        found.append(f"{sign}{whole} {rest.numerator}/{rest.denominator}")
    return found


@settings(max_examples=80, deadline=None)
@given(st.integers(-(10**7), 10**7), st.integers(-(10**7), 10**7), st.data())
def test_equal_numbers_are_equal_however_they_are_written(a, b, data):
    values = Fraction(a, 1000), Fraction(b, 1000)
    one, two = (data.draw(st.sampled_from(spellings(value))) for value in values)
    again = data.draw(st.sampled_from(spellings(values[0])))
    form = data.draw(
        st.sampled_from(["<answer>{}</answer>", "So it is \\boxed{{{}}}", "Then 7. The answer is {}", "{}"])
    )
    mark = Marker(Prompt("", one))
    assert mark.able
    found, right = mark(form.format(again))
    assert right, (one, form.format(again), found)
    assert found == mark(f"<answer>{one}</answer>")[0]  # they vote together
    other, same = mark(form.format(two))
    assert same == (values[0] == values[1]) == (other == found)


PIECES = st.sampled_from(
    [
        *("0173-+*/^()[]{},.:=$%x!−１½² \n\\"),
        *("23", "1e3", "10:30", "(1,2)", "answer is ", "<answer>", "</answer>", "<think>", "</think>"),
        *(r"\frac", r"\sqrt", r"\boxed{", r"\text{", r"\left(", r"\right)", r"\,"),
    ]
)
WRITTEN = st.lists(PIECES, max_size=9).map("".join)


@settings(max_examples=200, deadline=None)
@given(WRITTEN, WRITTEN | st.text(max_size=30), st.booleans())
def test_nothing_that_is_written_breaks_it(gold, said, ended):
    mark = Marker(Prompt("", gold))
    found, right = mark(said, ended)
    assert found != "" and (found is not None or not right)
    if mark.able and "<" not in gold and "boxed" not in gold:
        assert mark(f"<answer>{gold}</answer>")[1] and ("=" in gold or mark(gold)[1])
        other = Marker(Prompt("", said))
        if other.able and "<" not in said and "boxed" not in said:
            assert mark(f"<answer>{said}</answer>")[1] == other(f"<answer>{gold}</answer>")[1]
