r"""Answers in words: what says the same is equal however it is typeset, and nothing else is."""

import pytest

from openrlhf_apo.rewards.grading import grade
from openrlhf_apo.rewards.text_answers import equal_as_text

EQUAL = [
    # times
    (r"4:30 \text{ p.m.}", r"\text{4:30 p.m.}"),
    (r"4:30 \text{ p.m.}", r"4:30\,\mathrm{p.m.}"),
    (r"4:30 \text{ p.m.}", r"4\!:\!30~\text{PM}"),
    (r"4:30 \text{ p.m.}", "4:30 p.m."),
    (r"4:30 \text{ p.m.}", "4:30"),
    (r"3:00 \text{ PM}", r"\text{3 p.m.}"),
    (r"\text{10 a.m.}", r"10:00\ \textbf{AM}"),
    ("3:00", "3:00"),
    # units
    (r"\text{10 cm}", r"10 \text{ cm}"),
    (r"\text{10 cm}", r"10\;\mathrm{cm}"),
    (r"2400 \mbox{ cm}^2", r"\text{2400 cm}^2"),
    (r"2400 \mbox{ cm}^2", r"2400\,\mathrm{cm^2}"),
    (r"36\text{ inches}^2", r"36 \textrm{ inches}^2"),
    (r"90\text{ square" + "\n" + "units}", r"\text{90 square units}"),
    (r"5\text{ m}^2\text{ of grass}", "5"),
    (r"40\text{ min}", r"40\text{ minutes}"),
    (r"7\text{ hours}.", r"\text{7 hours}"),
    (r"2\text{ hours }30\text{ minutes}", r"\text{2 hours 30 minutes}"),
    (r"2\text{ hours }30\text{ minutes}", r"2\text{ hours and }30\text{ minutes}"),
    (r"10\text{ red and }5\text{ blue}", r"\text{10 red and 5 blue}"),
    (r"2,500\text{ red and }5\text{ blue}", r"2500\text{ red, }5\text{ blue}"),
    # money and percentages
    (r"80\text{ cents}", r"\text{80 cents}"),
    (r"\$32,\!348", r"\text{\$32,348}"),
    (r"\$5.50", r"\text{\$}5.50"),
    (r"15\%", r"\text{15\%}"),
    (r"15\%", r"15\text{ percent}"),
    # names and words
    (r"\text{Saturday}", "saturday"),
    (r"\text{Saturday}", r"\mathrm{Saturday}"),
    (r"\text{June 20}", r"\text{june~20}"),
    (r"\text{June 20}", r"\text{June}\ 20"),
    (r"\text{June 20}", r"\text{June 20.}"),
    (r"\text{Mrs. Smith}", "Mrs. Smith"),
    ("Mrs. Smith", "mrs smith"),
    (r"\text{even}", r"\textit{Even.}"),
    (r"\text{even}", r"\textbf{\text{even}}"),
    (r"\text{two lines}", r"Two\ lines"),
    (r"\text{no solution}", r"\text{No}~\text{solution}"),
    (r"\text{Softball, Kickball, Picnic}", r"\text{Softball}, \text{Kickball}, \text{Picnic}"),
    (r"\text{B, C}", "B, C"),
    (r"\text{A and B}", r"\text{A}\text{ and }\text{B}"),
    (r"\text{CBAD}", "CBAD"),
    # multiple choice
    (r"\text{(B)}", r"\textbf{(B)}"),
    (r"\textbf{(B)}", "B"),
    (r"\textbf{(B)}\ 12", r"\textbf{(B) }12"),
    (r"\textbf{(B)}\ \frac{1}{2}", r"\textbf{(B) \frac{1}{2}}"),
    # sets and intervals
    (r"-2 \text{ or } -12", r"-12\text{ or }-2"),
    (r"2\text{ or }12\text{ cm}", r"12\text{ or }2\text{ cm}"),
    (r"(-\infty, 2)\text{ or }(3,\infty)", r"(-\infty,2)~\textrm{or}~(3,\infty)"),
    (r"x<2\text{ or }x>3", r"x < 2 \mbox{ or } x > 3"),
]

DIFFERENT = [
    # times
    (r"4:30 \text{ p.m.}", r"4:30 \text{ a.m.}"),
    (r"4:30 \text{ p.m.}", r"\text{4:30 a.m.}"),
    (r"4:30 \text{ p.m.}", "4:30 AM"),
    (r"4:30 \text{ p.m.}", r"5:30 \text{ p.m.}"),
    (r"4:30 \text{ p.m.}", r"2:15 \text{ p.m.}"),  # 4/30 is 2/15
    (r"4:30 \text{ p.m.}", "2:15"),
    (r"4:30 \text{ p.m.}", r"4:3 0\text{ p.m.}"),
    (r"12:30\text{ p.m.}", r"1 2:30\text{ p.m.}"),
    (r"3\text{ p.m.}", r"3:30\text{ p.m.}"),
    # units
    (r"\text{10 cm}", r"\text{100 m}"),
    (r"\text{10 cm}", r"\text{10 m}"),
    (r"\text{10 cm}", r"\text{1 0 cm}"),
    (r"10\text{ cm}", r"1 0\text{ cm}"),
    (r"\text{0.5 cm}", r"\text{0 .5 cm}"),
    (r"\text{.5 cm}", r"\text{5 cm}"),
    (r"a.5\text{ cm}", r"a5\text{ cm}"),
    (r"36\text{ inches}^2", r"63\text{ inches}^2"),
    (r"2^{10}\text{ ways}", r"210\text{ ways}"),
    (r"2^\text{10}\text{ ways}", r"2^10\text{ ways}"),
    (r"23/4\text{ cups}", r"2 3/4\text{ cups}"),
    (r"0.\overline{3}\text{ cm}", r"0\overline{3}\text{ cm}"),
    (r"2\text{ hours }30\text{ minutes}", r"2\text{ hours }45\text{ minutes}"),
    (r"2\text{ hours }30\text{ minutes}", r"\text{3 hours 20 minutes}"),
    (r"\text{1 hour 23 minutes}", r"\text{12 hours 3 minutes}"),
    (r"10\text{ red and }5\text{ blue}", r"10\text{ red and }6\text{ blue}"),
    # money and percentages
    (r"80\text{ cents}", r"\text{8 cents}"),
    (r"15\%", r"\text{51\%}"),
    (r"\$5.50", r"\text{\$55.0}"),
    # names and words
    (r"\text{Saturday}", r"\text{Sunday}"),
    (r"\text{June 20}", r"\text{June 2 0}"),
    (r"\text{June 20}", r"\text{June 2}"),
    (r"\text{Room 12 3}", r"\text{Room 1 23}"),
    (r"\text{even}", r"\text{neve}"),
    (r"\text{no}", r"\text{on}"),
    (r"\text{two lines}", r"\text{two line}"),
    (r"\text{no solution}", r"\text{one solution}"),
    (r"\text{Softball, Kickball, Picnic}", r"\text{Kickball, Softball, Picnic}"),
    (r"\text{CBAD}", r"\text{ABCD}"),
    # multiple choice
    (r"\text{A}", r"\text{B}"),
    (r"\textbf{(B)}", r"\textbf{(C)}"),
    (r"\textbf{(B)}\ 12", r"\textbf{(B) }21"),
    (r"\text{A}", r"\text{A, B}"),
    # sets and intervals
    (r"(-\infty, 2)\text{ or }(3,\infty)", r"(-\infty, 2)\text{ or }(4,\infty)"),
    (r"-2 \text{ or } -12", r"\text{2 or 12}"),
    ("12", "1 2"),
    (r"2\text{ cm or }3\text{ cm}", r"3\text{ cm}"),
]


def score(answer, gold):
    return grade(rf"\boxed{{{answer}}}", gold, "strict")


@pytest.mark.parametrize(("one", "other"), EQUAL)
def test_equal(one, other):
    assert score(one, other) == 1.0
    assert score(other, one) == 1.0


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_different(one, other):
    assert score(one, other) == 0.0
    assert score(other, one) == 0.0


@pytest.mark.parametrize("answer", sorted({answer for pair in EQUAL + DIFFERENT for answer in pair}))
def test_every_answer_equals_itself(answer):
    assert score(answer, answer) == 1.0


@pytest.mark.parametrize("answer", ["", ".", r"\text{}", r"\text{ }"])
def test_empty_text_is_no_answer(answer):
    assert score(answer, r"\text{no solution}") == 0.0


def test_part_of_an_answer_in_several_parts_is_not_paid():
    assert score("2", r"2\text{ hours }30\text{ minutes}") == 0.0
    assert score(r"2\text{ cm}", r"2\text{ cm or }3\text{ cm}") == 0.0


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("x", "X"),
        (r"x\pi", r"X\pi"),
        ("1 2", "12"),
        ("100", "100"),
        (r"\Delta \text{ABC}", r"\delta \text{ABC}"),
        (r"\frac{1}{2}", "0.5"),
        (r"\text{}", r"\text{.}"),
    ],
)
def test_what_is_left_to_math_verify(one, other):
    assert equal_as_text(one, other) is None
