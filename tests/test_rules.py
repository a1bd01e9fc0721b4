import optax
import pytest

from optim_zoo import rules

PARAMS = {
    "encoder": {"layer_0": {"kernel": 1.0, "bias": 2.0}, "LayerNorm": {"scale": 3.0}},
    "head": {"kernel": 4.0},
}


def test_matching_is_a_search_in_the_whole_path() -> None:
    assert rules.matches(["bias"], "layer_0/bias")
    assert rules.matches(["^head/"], "head/kernel")
    assert not rules.matches(["^kernel"], "head/kernel")
    assert not rules.matches([], "head/kernel")


def test_mask_is_true_where_a_pattern_matches() -> None:
    assert rules.mask(["LayerNorm", "bias$"], PARAMS) == {
        "encoder": {"layer_0": {"kernel": False, "bias": True}, "LayerNorm": {"scale": True}},
        "head": {"kernel": False},
    }


def test_the_first_rule_wins() -> None:
    assigned = rules.assign("x", [("head", 1), ("kernel", 2), (".*", 3)], PARAMS)
    assert assigned["head"]["kernel"] == 1
    assert assigned["encoder"]["layer_0"] == {"kernel": 2, "bias": 3}


def test_a_value_may_be_a_tuple() -> None:
    assert rules.assign("x", [("a", (1, 2))], {"a": 0, "b": 0}, default=()) == {
        "a": (1, 2),
        "b": (),
    }


def test_every_uncovered_leaf_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"x: no rule covers .*layer_0/bias, .*kernel, head/kernel"
    ):
        rules.assign("x", [("LayerNorm", 1)], PARAMS)


def test_a_string_is_not_a_list_of_patterns() -> None:
    with pytest.raises(TypeError, match=r"got the string 'bias': write \['bias'\]"):
        rules.check_patterns("exclude", "bias")
    for patterns in (None, [1], {"a"}):
        with pytest.raises(TypeError, match="exclude must be a list of path patterns"):
            rules.check_patterns("exclude", patterns)  # type: ignore[arg-type]


def test_an_invalid_regular_expression_raises() -> None:
    with pytest.raises(ValueError, match=r"exclude: '\(' is not a regular expression"):
        rules.check_patterns("exclude", ["("])
    with pytest.raises(ValueError, match=r"layers: '\*' is not a regular expression"):
        rules.check_rules("layers", [("*", 1)])


def test_rules_must_be_pairs() -> None:
    rules.check_rules("layers", [["a", 1], ("b", 2)])  # type: ignore[list-item]
    for wrong in ("ab", [("a",)], [("a", 1, 2)], {"a": 1}, ["ab"]):
        with pytest.raises(TypeError, match="layers must be a list of pairs"):
            rules.check_rules("layers", wrong)  # type: ignore[arg-type]


def test_unmatched_patterns_list_the_nearest_paths_first() -> None:
    with pytest.raises(ValueError, match="matches no leaf") as caught:
        rules.check_matches("exclude", ["layernorm", "kernel", "bais"], PARAMS)
    layernorm, bais = str(caught.value).split("; exclude: ")
    assert "'layernorm' matches no leaf; the nearest paths are encoder/LayerNorm/scale" in layernorm
    assert "'bais' matches no leaf; the nearest paths are encoder/layer_0/bias" in bais


def test_optional_patterns_need_not_match() -> None:
    rules.check_matches("exclude", rules.optional("LayerNorm", "absent"), {"a": 1.0})


def test_a_partial_tree_is_not_checked_for_matches() -> None:
    rules.check_matches("exclude", ["absent"], {"a": optax.MaskedNode(), "b": 1.0})
    rules.check_matches("exclude", ["absent"], {})
