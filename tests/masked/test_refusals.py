"""Contradictory plans: each refused by name, before anything large is made of it."""

from __future__ import annotations

import copy
import json
import tracemalloc
from typing import Any

import msgspec
import pytest

from crypten_espn.errors import PlanError
from crypten_espn.masked.checks import MAX_TEXT, VERSION
from crypten_espn.masked.linear import (
    Add,
    Concat,
    Conv,
    Flatten,
    Mix,
    Move,
    Pad,
    Pool,
    Read,
)
from crypten_espn.masked.moving import Box
from crypten_espn.masked.plan import Plan
from crypten_espn.masked.products import Factors
from crypten_espn.masked.steps import (
    Activation,
    Group,
    Guard,
    Input,
    Linear,
    Output,
    Product,
    Step,
)

READ = {"type": "read", "source": 0}
CONV = {"type": "conv", "x": READ, "weight": 0, "filters": 4, "kernel": [3, 3],
        "pads": [1, 1, 1, 1]}  # fmt: skip
STEP: dict[str, Any] = {
    "root": CONV,
    "ring": 32,
    "frac_bits": 20,
    "activation": {
        "type": "polynomial",
        "linear": {"shift": 2, "coefficient": [5]},
        "groups": [{"shift": 9, "coeffs": [[0, 0, 7]]}],
        "constant": [-3],
        "drop": 32,
        "frac_bits": 10,
    },
}
HEAD = {"type": "conv", "x": {"type": "flatten", "x": {"type": "read", "source": 1}},
        "weight": 1, "filters": 3}  # fmt: skip
PLAN: dict[str, Any] = {
    "version": VERSION,
    "input": {"shape": [2, 8, 8], "ring": 32, "frac_bits": 12, "bound": 8.0},
    "steps": [STEP],
    "output": {"root": HEAD, "ring": 32, "frac_bits": 24, "noise_bits": 4},
}


def read(data):
    return Plan.from_json(json.dumps(data))


def changed(path, value, base=PLAN):
    """The plan with one place set; a path is written as a.0.b."""
    data = copy.deepcopy(base)
    *way, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    place = data
    for key in way:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return data


def guard(channels, **changes):
    ones, zeros = [1.0] * channels, [0.0] * channels
    bounds = {"depth": zeros, "height": ones, "energy": ones, "roughness": ones}
    return bounds | {"mean": zeros, "std": ones} | changes


def node(kind, x=READ, **fields):
    return {"type": kind, "x": x, **fields}


def deep(levels):
    root = READ
    for _ in range(levels):
        root = node("pad", root, pads=[0, 0, 0, 0])
    return root


def moving(*boxes, parts=(READ,)):
    """A move of the first source to 4x4x4."""
    return {"type": "move", "parts": list(parts), "shape": [4, 4, 4],
            "boxes": list(boxes)}  # fmt: skip


def mixing(rows, columns):
    return node("mix", rows=rows, columns=columns)


def repeated(step, count):
    """A plan of `count` steps, each reading the one before."""
    steps = []
    for number in range(count):
        new = copy.deepcopy(step)
        new["root"] = {"type": "read", "source": number}
        steps.append(new)
    return changed("output.root", READ, changed("steps", steps))


BIG = {**PLAN["input"], "shape": [1, 8192, 8192]}
ROOT, ACT, OUT = "steps.0.root", "steps.0.activation", "output"
ANY = "not a plan of this version"


REFUSALS = [
    # Fields and types.
    ("unknown field", "color", "red", "unknown field"),
    ("unknown field of a layer", f"{ROOT}.shape", [4, 8, 8], "unknown field"),
    ("names", f"{ACT}.name", "act0", "unknown field"),
    ("missing field", "output", ..., "missing required field"),
    ("missing shift", f"{ACT}.linear.shift", ..., "missing required field"),
    ("missing multiplicand", f"{ROOT}.x", ..., "missing required field"),
    ("missing type", f"{ROOT}.type", ..., "missing required field"),
    ("unknown operation", f"{ROOT}.type", "relu", "Invalid value 'relu'"),
    ("wrong type", "steps", {}, "Expected `array`"),
    ("text for a number", f"{ACT}.drop", "32", "Expected `int`"),
    ("bool for int", f"{ACT}.drop", True, "Expected `int`"),
    ("bool for a source", f"{ROOT}.x.source", False, "Expected `int`"),
    ("float for int", f"{ROOT}.filters", 4.5, "Expected `int`"),
    ("null for a number", "steps.0.ring", None, "Expected `int`"),
    ("null for an activation", ACT, None, "Expected `object`"),
    ("text for the bound", "input.bound", "8", "Expected `float`"),
    ("pads of three", f"{ROOT}.pads", [1, 1, 1], "length 4"),
    ("a kernel of one", f"{ROOT}.kernel", [3], "length 2"),
    ("other version", "version", 2, "version 2"),
    ("future version", "version", VERSION + 1, f"version {VERSION + 1}"),
    # Numbers.
    ("negative drop", f"{ACT}.drop", -1, ">= 8"),
    ("negative shift", f"{ACT}.groups.0.shift", -1, ">= 0"),
    ("negative source", f"{ROOT}.x.source", -1, ">= 0"),
    ("negative weight", f"{ROOT}.weight", -1, ">= 0"),
    ("negative filters", f"{ROOT}.filters", -4, ">= 1"),
    ("no filters", f"{ROOT}.filters", 0, ">= 1"),
    ("negative stride", f"{ROOT}.stride", [-1, 1], ">= 1"),
    ("no stride", f"{ROOT}.stride", [0, 1], ">= 1"),
    ("negative dilation", f"{ROOT}.dilation", [1, -1], ">= 1"),
    ("negative pads", f"{ROOT}.pads", [-1, 1, 1, 1], ">= 0"),
    ("no groups", f"{ROOT}.groups", 0, ">= 1"),
    ("negative multiplier", f"{ROOT}.x.multiplier", -1, ">= 1"),
    ("huge stride", f"{ROOT}.stride", [1 << 36, 1], "<= 65536"),
    ("huge kernel", f"{ROOT}.kernel", [1 << 30, 1], "<= 65536"),
    ("huge dilation", f"{ROOT}.dilation", [1 << 40, 1], "<= 65536"),
    ("huge pads", f"{ROOT}.pads", [1 << 20, 0, 0, 0], "<= 4096"),
    ("huge filters", f"{ROOT}.filters", 1 << 30, "<= 16777216"),
    ("a number beyond 64 bits", f"{ACT}.constant", [1 << 70], ANY),
    ("huge coefficient", f"{ACT}.linear.coefficient", [1 << 63], "<= 92233720"),
    ("a kernel wider than its input", f"{ROOT}.kernel", [11, 11], "does not fit"),
    ("a dilation wider than its input", f"{ROOT}.dilation", [5, 1], "does not fit"),
    ("an empty input", "input.shape", [2, 0, 8], ">= 1"),
    ("an input of two dimensions", "input.shape", [8, 8], "images reads 8x8"),
    ("an input of four dimensions", "input.shape", [1, 1, 8, 8], ANY),
    # Rings and scales.
    ("wide ring", "steps.0.ring", 64, "<= 56"),
    ("ring wider than its source's", "steps.0.ring", 40, "step 0: a ring of 40 bits"),
    ("output wider than its source", "output.ring", 33, "the output: a ring of 33"),
    ("a multiplier beyond the ring", f"{ROOT}.x.multiplier", 1 << 32, "multiplier"),
    ("shift beyond the ring", f"{ACT}.groups.0.shift", 30, "drops 30 of 32 bits"),
    ("huge shift", f"{ACT}.groups.0.shift", 63, "<= 62"),
    ("linear shift above its mask's", f"{ACT}.linear.shift", 10, "drops 10 bits"),
    ("a group's constant", f"{ACT}.groups.0.coeffs", [[1, 0, 7]], "stands apart"),
    ("a group of degree 1", f"{ACT}.groups.0.coeffs", [[0, 7]], "length >= 3"),
    ("a group of degree 17", f"{ACT}.groups.0.coeffs", [[0] * 18], "length <= 17"),
    ("too many groups", f"{ACT}.groups", [{"shift": 9, "coeffs": [[0, 0, 1]]}] * 9,
     "length <= 8"),
    ("a polynomial without a power", ACT,
     {**STEP["activation"], "linear": None, "groups": []}, "without a power"),
    # Channels.
    ("a number for a channel's", f"{ACT}.constant", 3, "Expected `array`"),
    ("a row for all rows", f"{ACT}.groups.0.coeffs", [0, 0, 7], "Expected `array`"),
    ("no constant", f"{ACT}.constant", [], "length >= 1"),
    ("no linear coefficient", f"{ACT}.linear.coefficient", [], "length >= 1"),
    ("no row", f"{ACT}.groups.0.coeffs", [], "length >= 1"),
    ("constants of 3 channels", f"{ACT}.constant", [1, 2, 3],
     "step 0: coefficients of 3 channels for a result of 4"),
    ("coefficients of 5 channels", f"{ACT}.linear.coefficient", [1] * 5,
     "coefficients of 5 channels for a result of 4"),
    ("rows of 8 channels", f"{ACT}.groups.0.coeffs", [[0, 0, 7]] * 8,
     "coefficients of 8 channels for a result of 4"),
    ("rows of all elements", f"{ACT}.groups.0.coeffs", [[0, 0, 7]] * 256,
     "coefficients of 256 channels"),
    ("rows of different degrees", f"{ACT}.groups.0.coeffs",
     [[0, 0, 7], [0, 0, 7, 1], [0, 0, 7], [0, 0, 7]], "different degrees in a group"),
    ("a channel's constant in a group", f"{ACT}.groups.0.coeffs",
     [[0, 0, 7]] * 3 + [[1, 0, 7]], "stands apart"),
    ("huge drop", f"{ACT}.drop", 45, "<= 44"),
    ("value beyond its ring", f"{ACT}.frac_bits", 40, "72 fractional bits"),
    ("noise wider than the ring", "output.noise_bits", 30, "noise"),
    ("huge noise", "output.noise_bits", 64, "<= 62"),
    ("a bound beyond the ring", "input.bound", 2.0**19, "does not fit 32 bits"),
    ("a huge bound", "input.bound", 1e300, ANY),
    ("no bound", "input.bound", 0.0, "> 0"),
    ("a negative bound", "input.bound", -8.0, "> 0"),
    # The input's guard.
    ("a guard that is none", "input.guard", 3, "Expected `object | null`"),
    ("a guard of one channel", "input.guard", guard(1), "guard is of 1 channels"),
    ("a guard of none", "input.guard", guard(0), "length >= 1"),
    ("a guard of too many", "input.guard", guard((1 << 12) + 1), "length <= 4096"),
    ("no power of two", "input.guard", guard(2, energy=[1.0, 3.0]), "bound of 3.0"),
    ("a huge power", "input.guard", guard(2, energy=[1.0, 2.0**41]), "2**40"),
    ("a negative power", "input.guard", guard(2, depth=[-1.0, 1.0]), "bound of -1.0"),
    ("a negative zero", "input.guard", guard(2, depth=[-0.0, 1.0]), "bound of -0.0"),
    ("bounds that differ", "input.guard", guard(2, energy=[1.0]), "[1, 2] channels"),
    ("text for bounds", "input.guard", guard(2, energy=["1", "1"]), "Expected `float`"),
    ("no deviation", "input.guard", guard(2, std=[1.0, 0.0]), "deviation"),
    ("a huge mean", "input.guard", guard(2, mean=[0.0, 1e300]), "mean"),
    ("more in a guard", "input.guard", guard(2, name="x"), "unknown field"),
    ("less in a guard", "input.guard", {"depth": [0.0, 0.0]}, "missing required field"),
    # Structure.
    ("a later source", f"{ROOT}.x.source", 1, "reads source 1, a later one"),
    ("a source that is not there", "output.root.x.x.source", 2, "source 2"),
    ("a weight below a weight", f"{ROOT}.x", {**CONV, "weight": 0},
     "a weight reads another"),
    ("a weight deep below a weight", f"{ROOT}.x",
     {"type": "add", "terms": [READ, node("pad", CONV, pads=[0] * 4)]},
     "a weight reads another"),
    ("weights out of order", f"{ROOT}.weight", 1, "out of order"),
    ("one weight twice", "output.root.weight", 0, "out of order"),
    ("an addition of different shapes", ROOT,
     {"type": "add", "terms": [CONV, READ]}, "different shapes, 8x8x4 and 8x8x2"),
    ("an addition of one", ROOT, {"type": "add", "terms": [READ]}, "length >= 2"),
    ("a concatenation of sizes", ROOT,
     {"type": "concat", "parts": [READ, node("pad", pads=[1, 0, 0, 0])]},
     "concatenation of shapes 8x8x2 and 9x8x2"),
    ("an empty concatenation", ROOT, {"type": "concat", "parts": []}, "length >= 1"),
    ("a concatenation of ranks", ROOT,
     {"type": "concat", "parts": [READ, node("flatten")]}, "concatenation"),
    ("a flat pool", ROOT, node("pool", node("flatten"), kernel=[1, 1], stride=[1, 1]),
     "operation on images reads 128"),
    ("a flat pad", ROOT, node("pad", node("flatten"), pads=[1, 1, 1, 1]),
     "operation on images"),
    ("a linear layer with a kernel", "output.root.kernel", [1, 3], "linear layer has"),
    ("a linear layer with groups", "output.root.groups", 3, "groups"),
    ("a linear layer with pads", "output.root.pads", [0, 0, 0, 1], "linear layer has"),
    ("groups that do not divide", f"{ROOT}.groups", 3, "cannot have 3 groups"),
    ("a move of no value", ROOT, moving([0, 0, 0, []], parts=[]), "length >= 1"),
    ("a move of nothing", ROOT, {**moving(), "boxes": []}, "length >= 1"),
    ("a move of a value that is not there", ROOT, moving([1, 0, 0, []]),
     "reads value 1 of 1"),
    ("a move from beyond its value", ROOT, moving([0, 120, 0, [[9, 1, 1]]]),
     "reads elements 120 to 128 of 128"),
    ("a move from before its value", ROOT, moving([0, 6, 0, [[4, 1, 3], [3, -4, 1]]]),
     "reads elements -2 to 9"),
    ("a move to beyond its result", ROOT, moving([0, 0, 1, [[2, 1, 63]]]),
     "writes element 64 of 64"),
    ("a move to one place twice", ROOT, moving([0, 0, 0, [[3, 1, 2], [2, 8, 4]]]),
     "two elements into one place"),
    ("a move that stands still", ROOT, moving([0, 0, 0, [[3, 1, 0]]]), ">= 1"),
    ("a huge step", ROOT, moving([0, 0, 0, [[2, 1 << 40, 1]]]), "<= 67108864"),
    ("a move to a huge value", ROOT, {**moving([0, 0, 0, []]), "shape": [1 << 26] * 3},
     "elements"),
    ("a move that repeats too much", None,
     changed(ROOT, {"type": "move", "parts": [READ], "shape": [1 << 26],
                    "boxes": [[0, 0, 0, [[1 << 26, 0, 1]]]] * 4096}, PLAN),
     "words from the dealer"),
    ("weighted sums beyond the rows", ROOT, mixing([[7, [1, 1]]], [[0, [1]]]),
     "reads element 8 of 8"),
    ("weighted sums beyond the columns", ROOT, mixing([[0, [1]]], [[8, [1]]]),
     "reads element 8 of 8"),
    ("weighted sums of nothing", ROOT, mixing([[0, []]], [[0, [1]]]), "length >= 1"),
    ("no weighted sums", ROOT, mixing([], [[0, [1]]]), "length >= 1"),
    ("a huge weight of a sum", ROOT, mixing([[0, [1 << 17]]], [[0, [1]]]), "<= 65536"),
    ("weighted sums of a row", ROOT,
     {**mixing([[0, [1]]], [[0, [1]]]), "x": node("flatten")}, "operation on images"),
    ("deep nesting", ROOT, deep(101), "operations 102 deep"),
    # Sizes.
    ("a huge input", "input.shape", [1 << 12, 1 << 12, 1 << 12], "elements"),
    ("many weights", f"{ROOT}", {**CONV, "kernel": [1, 1], "filters": 1 << 24,
     "pads": [0, 0, 0, 0]}, "elements"),
    ("pads that add up", ROOT, node("pad", pads=[4096, 4096, 4096, 4096]), "elements"),
    ("a pool that adds up too much", None,
     changed(ROOT, node("pool", kernel=[4096, 4096], stride=[1, 1]),
             changed("input", BIG)), "multiplications and additions"),
    ("reads that add up too much", None,
     changed(ROOT, {"type": "add", "terms": [READ] * 9}, changed("input", BIG)),
     "elements"),
    ("coefficients that add up", None,
     changed(f"{ACT}.groups", [{"shift": 9, "coeffs": [[0] * 17]},
                               *[{"shift": 9, "coeffs": [[0, 0, 1]]}] * 7],
             changed(f"{ACT}.constant", [7] * (1 << 15),
                     changed(ROOT, READ, changed("input.shape", [1 << 15])))),
     "coefficients so far; a plan may have 4,194,304"),
    ("windows that leave a rest", f"{ACT}.pool", [2, 3], "do not cover 8x8x4"),
    ("a window larger than the image", f"{ACT}.pool", [16, 8], "do not cover 8x8x4"),
    ("windows of one value", f"{ACT}.pool", [1, 1], "2 to 4,096 are summed"),
    ("windows of too many values", None,
     changed(f"{ACT}.pool", [128, 64],
             changed(ROOT, READ, changed("input.shape", [2, 128, 64]))),
     "windows of 8,192 values"),
    ("windows of a row", None,
     changed(f"{ACT}.pool", [2, 1], changed(ROOT, READ, changed("input.shape", [8]))),
     "windows of 2x1 do not cover 8"),
    ("windows of nothing", f"{ACT}.pool", [0, 8], ">= 1"),
    ("a window of three sides", f"{ACT}.pool", [2, 2, 2], "length 2"),
    ("values from the dealer that add up", None,
     changed(ROOT, READ, changed("input", BIG)), "words from the dealer"),
]  # fmt: skip


def test_the_plan_that_is_changed_is_accepted():
    plan = read(PLAN)
    assert plan.output_shape == (3,) and len(plan.steps) == 1


@pytest.mark.parametrize(
    "path, value, reason",
    [case[1:] for case in REFUSALS],
    ids=[case[0] for case in REFUSALS],
)
def test_a_contradictory_plan_is_refused_by_name(path, value, reason):
    data = value if path is None else changed(path, value)
    text = json.dumps(data)
    tracemalloc.start()
    try:
        with pytest.raises(PlanError) as refused:
            Plan.from_json(text)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert reason in str(refused.value)
    with pytest.raises(PlanError):
        Plan.from_json(text.encode())


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "null", "7", "{}", '"plan"', "{", "nonsense", "[" * 100_000,
        '{"a":' * 100_000, "\ud800", b"\xff\xfe", b"\x00" * 100, "1e999999",
        json.dumps(PLAN) + "x",
        json.dumps(PLAN).replace("8.0", "NaN"),
        json.dumps(PLAN).replace("8.0", "Infinity"),
        json.dumps(PLAN).replace("8.0", "1e999"),
        json.dumps(PLAN).replace("8.0", "-0.0"),
    ],
    ids=range(19),
)  # fmt: skip
def test_what_is_no_plan_at_all_is_refused(text):
    with pytest.raises(PlanError):
        Plan.from_json(text)


def test_a_plan_nested_beyond_pythons_own_limit_is_refused():
    pad = '{"type":"pad","pads":[0,0,0,0],"x":'
    for levels in (101, 250, 500, 900, 3_000, 50_000):
        root = pad * levels + json.dumps(READ) + "}" * levels
        text = json.dumps(changed(ROOT, "ROOT")).replace('"ROOT"', root)
        with pytest.raises(PlanError):
            Plan.from_json(text)


def test_huge_texts_are_refused_unread():
    text = "[" + " " * MAX_TEXT
    with pytest.raises(PlanError, match="16,777,217 bytes"):
        Plan.from_json(text)


def test_many_steps_are_refused_and_a_thousand_are_taken():
    step = {**STEP, "root": READ}
    small = changed("input.shape", [3])
    steps = repeated(step, 1000)
    assert len(read({**steps, "input": small["input"]}).steps) == 1000
    text = json.dumps({**small, "steps": ["STEP"]})
    many = text.replace('"STEP"', ",".join([json.dumps(step)] * 5_000))
    with pytest.raises(PlanError, match="length <= 4096"):
        Plan.from_json(many)
    million = text.replace('"STEP"', ",".join(["{}"] * 1_000_000))
    with pytest.raises(PlanError):
        Plan.from_json(million)


def test_more_operations_than_allowed_are_refused():
    many = {"type": "add", "terms": [READ] * 1024}
    root = {"type": "add", "terms": [many] * 65}
    data = changed("input.shape", [3], changed(ROOT, root))
    with pytest.raises(PlanError, match="more than 65,536 operations"):
        read(data)


def test_plans_made_in_code_are_checked_like_received_ones():
    """Not only a text can contradict itself."""
    plan = read(PLAN)
    replace = msgspec.structs.replace
    with pytest.raises(PlanError, match="version"):
        replace(plan, version=1)
    with pytest.raises(PlanError, match="noise"):
        replace(plan, output=replace(plan.output, noise_bits=31))
    with pytest.raises(PlanError, match="different shapes"):
        replace(plan, steps=(replace(plan.steps[0], root=Add((Read(0), CODE))),))


PAIR = (2.0, 0.5)
CODE = Conv(Read(0), 0, 4, (3, 3), pads=(1, 1, 1, 1))


def test_every_operation_survives_a_plans_text():
    rows = tuple((0, 0, k) for k in range(6))
    act = Activation(
        32, 10, linear=Linear(2, (5,)), groups=(Group(9, rows),), constant=(3,)
    )
    gate = Factors(Read(1), Pool(Read(1), (4, 4), (1, 1)))
    pool = Pool(Pad(Read(0, 3), (1, 1, 0, 0)), (3, 3), (2, 2), (0, 0, 0, 0))
    mix = Mix(Read(0), ((0, (1, 2)), (6, (-3, 1))) * 2, ((1, (2,)),) * 4)
    boxes = (Box(0, 0, 0, ((16, 2, 6), (2, 1, 1))), Box(0, 31, 2, ((32, -1, 3),)))
    move = Move((mix,), (4, 4, 6), boxes)
    wide = Concat((pool, Conv(Read(0), 0, 4, (2, 2), (2, 2))))
    root = Add((wide, move))
    plan = Plan(
        VERSION,
        Input((2, 8, 8), 32, 12, 8.0, Guard(PAIR, PAIR, PAIR, PAIR, PAIR, PAIR)),
        (Step(root, 32, 20, act), Step(gate, 32, 24, Product(32, 11, dropped=(9, 8)))),
        Output(Flatten(Add((Read(2), Read(1, 2)))), 32, 20, 0),
    )
    again = Plan.from_json(plan.to_json())
    assert again == plan and again.digest == plan.digest
    assert again.shapes[1] == (4, 4, 6) and again.logits_shape == (4 * 4 * 6,)
