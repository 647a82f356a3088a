"""libxlstm.task_requests: what lm-evaluation-harness asks, in the words of Judge. The harness is not needed for it."""

import pytest

from libxlstm.scoring import ScoringError
from libxlstm.task_requests import generation_groups, generation_options, named_arguments, scoring_pairs

GREEDY = {"until": (), "max_tokens": 256, "temperature": 0.0, "top_k": 0, "top_p": 1.0}


def test_generation_options():
    assert generation_options({}) == GREEDY == generation_options({"do_sample": False, "temperature": 0.7})
    assert generation_options({"until": "\n", "max_new_tokens": 3}, 9) == {**GREEDY, "until": ("\n",), "max_tokens": 3}
    assert generation_options({"until": ["a", "b"], "num_beams": 1}, 9) == {**GREEDY, "until": ("a", "b"), "max_tokens": 9}
    sampled = generation_options({"do_sample": True, "top_p": 0.9, "top_k": 5})
    assert sampled == {**GREEDY, "temperature": 1.0, "top_p": 0.9, "top_k": 5}
    assert generation_options({"do_sample": True, "temperature": None})["temperature"] == 1.0
    assert generation_options({"temperature": 0.7})["temperature"] == 0.7
    with pytest.raises(ScoringError, match="beam search"):
        generation_options({"num_beams": 4})
    with pytest.raises(ScoringError, match="unknown colour"):
        generation_options({"colour": 1})


@pytest.mark.parametrize("zero", [0, 0.0, "0"])
def test_temperature_zero_is_greedy_even_where_sampling_is_asked_for(zero):
    assert generation_options({"do_sample": True, "temperature": zero}) == GREEDY


def test_requests_with_the_same_arguments_are_generated_together():
    same = {"until": ["."], "max_gen_toks": 4}
    groups = generation_groups([("a", same), ("b", {}), ("c", {"max_tokens": 4, "until": "."}), ("d", {"max_tokens": 5})], 9)
    assert [(dict(options), indices) for options, indices in groups.items()] == [
        ({**GREEDY, "until": (".",), "max_tokens": 4}, [0, 2]), ({**GREEDY, "max_tokens": 9}, [1]),
        ({**GREEDY, "max_tokens": 5}, [3])]
    assert same == {"until": ["."], "max_gen_toks": 4}


def test_a_context_without_a_token_is_the_prefix():
    assert scoring_pairs([(("  ", "a"), [], [3, 4]), (("b", "a"), [5], [4])], 10) == [([10], [3, 4]), ([5], [4])]


@pytest.mark.parametrize("arguments", [["--model", "hf"], ["--model=hf"], ["-M", "hf"], ["-Mhf"], ["-m", "hf"]])
def test_the_command_names_this_model_unless_another_is_named(arguments):
    given = ["--tasks", "piqa", "--model_args", "pretrained=x"]
    assert named_arguments(given) == [*given, "--model", "xlstm"] and named_arguments(["run", *given])[-1] == "xlstm"
    assert named_arguments([*given, *arguments]) == [*given, *arguments]
    assert named_arguments([*arguments, *given]) == [*arguments, *given]
    for others in ([], ["ls", "tasks"], ["validate", "--tasks", "piqa"], ["-h"], ["--help"]):
        assert named_arguments(others) == others
