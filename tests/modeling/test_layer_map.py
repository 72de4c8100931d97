import pytest

from oprd_tune.errors import ConfigError
from oprd_tune.modeling.layer_map import check_widths, pair_layers, proportional_layer, resolve_layers
from oprd_tune.types import LayerPair


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [("all", [1, 2, 3, 4, 5]), ("last", [5]), ("even", [2, 4]), ("odd", [1, 3, 5]), ([5, 2], [2, 5])],
)
def test_layers_count_from_one(layers, chosen):
    assert resolve_layers(layers, 5) == chosen


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("first", "allowed are all, last, even, odd or a list"),
        ([], "selects none"),
        ([1, 1], "may stand there once"),
        ([0, 6], r"has \[0, 6\]; the student's layers count from 1 to 5"),
    ],
)
def test_wrong_layers_are_explained(layers, message):
    with pytest.raises(ConfigError, match=message):
        resolve_layers(layers, 5)


def test_even_of_one_layer_selects_none():
    with pytest.raises(ConfigError, match="selects none of the student's 1 layers"):
        resolve_layers("even", 1)


def test_equal_depths_pair_by_number():
    assert pair_layers([1, 3], None, student_depth=3, teacher_depth=3) == [LayerPair(1, 1), LayerPair(3, 3)]


def test_given_pairs_apply_and_layers_select_among_them():
    pairs = [[3, 5], [1, 2]]
    assert pair_layers("all", pairs, student_depth=3, teacher_depth=5) == [LayerPair(1, 2), LayerPair(3, 5)]
    assert pair_layers("last", pairs, student_depth=3, teacher_depth=5) == [LayerPair(3, 5)]
    with pytest.raises(ConfigError, match=r"layers \[2\] have no partner"):
        pair_layers([2, 3], pairs, student_depth=3, teacher_depth=5)
    with pytest.raises(ConfigError, match="'even' have no partner"):
        pair_layers("even", pairs, student_depth=3, teacher_depth=5)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (None, r"student has 3 layers and the teacher 5: give `layer_pairs`.*\[3, 5\].*bridge"),
        ([[1]], r"\[1\]; each entry is \[student, teacher\]"),
        ([[1, 6]], "to 3 for the student and to 5 for the teacher"),
        ([[0, 1]], "blocks count from 1"),
        ([[1, 1], [1, 2]], "layer 1 twice"),
        ([[3, 4]], "after the final norm"),
        ([[2, 5]], "after the final norm"),
    ],
)
def test_wrong_pairs_are_explained(pairs, message):
    with pytest.raises(ConfigError, match=message):
        pair_layers("all", pairs, student_depth=3, teacher_depth=5)


def test_other_widths_need_a_bridge():
    check_widths(8, 8)
    with pytest.raises(ConfigError, match="1536 wide and the teacher 3584.*bridge"):
        check_widths(1536, 3584)


@pytest.mark.parametrize("depth", [1, 2, 5, 28])
def test_in_proportion_equal_depths_pair_by_number(depth):
    assert [proportional_layer(layer, depth, depth) for layer in range(1, depth + 1)] == list(range(1, depth + 1))


def test_in_proportion_a_single_block_meets_the_teachers_last():
    assert [proportional_layer(1, 1, depth) for depth in (1, 2, 9)] == [1, 2, 9]


@pytest.mark.parametrize(
    ("student_depth", "teacher_depth", "expected"),
    [
        (28, 36, {1: 1, 2: 2, 3: 4, 10: 13, 14: 18, 15: 19, 20: 26, 27: 35, 28: 36}),
        (4, 6, {1: 1, 2: 3, 3: 4, 4: 6}),
        (36, 28, {1: 1, 2: 2, 18: 14, 19: 15, 35: 27, 36: 28}),
    ],
)
def test_in_proportion_layers_are_where_eq_11_puts_them(student_depth, teacher_depth, expected):
    assert {layer: proportional_layer(layer, student_depth, teacher_depth) for layer in expected} == expected


def test_halves_are_rounded_to_even():
    # (ℓ − 1) / 2 · 3 is 1.5 at ℓ = 2, and / 2 · 5 is 2.5: both become 2.
    assert proportional_layer(2, 3, 4) == 3
    assert proportional_layer(2, 3, 6) == 3


@pytest.mark.parametrize("student_depth", range(2, 40, 3))
@pytest.mark.parametrize("teacher_depth", [2, 7, 28, 61])
def test_in_proportion_ends_meet_ends_and_nothing_crosses(student_depth, teacher_depth):
    found = [proportional_layer(layer, student_depth, teacher_depth) for layer in range(1, student_depth + 1)]
    assert (found[0], found[-1]) == (1, teacher_depth)
    assert found == sorted(found)


def test_over_a_bridge_layers_pair_in_proportion_unless_pairs_are_given():
    depths = {"student_depth": 3, "teacher_depth": 5, "bridged": True}
    assert pair_layers("all", None, **depths) == [LayerPair(1, 1), LayerPair(2, 3), LayerPair(3, 5)]
    assert pair_layers([2], None, **depths) == [LayerPair(2, 3)]
    assert pair_layers("all", [[2, 4], [1, 4]], **depths) == [LayerPair(1, 4), LayerPair(2, 4)]
    with pytest.raises(ConfigError, match="after the final norm"):
        pair_layers("all", [[2, 5]], **depths)
