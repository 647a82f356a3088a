"""Full-size language models of scripts/reproduce: widths, blocks, heads and learning rates of the paper's table 7, and the rest
of its recipe (appendix B). Parameter counts: test_experiments.py; synthetic tasks: test_synthetic_experiments.py."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from sweep import description  # noqa: E402

WIDTHS = {"m125": 768, "m350": 1024, "m760": 1536, "m1300": 2048, "m2700": 2560}
# Blocks and heads; None: the paper has no heads there.
SHAPES = {"xlstm_1_0": {"m125": (24, 4), "m350": (48, 4), "m760": (48, 4), "m1300": (48, 4), "m2700": (64, 4)},
          "llama": {"m125": (12, 12), "m350": (24, 16), "m760": (24, 16), "m1300": (24, 16), "m2700": (32, 32)},
          "mamba": {"m125": (24, None), "m350": (48, None), "m760": (48, None), "m1300": (48, None), "m2700": (64, None)},
          "rwkv4": {"m125": (12, None), "m350": (24, None), "m760": (24, None), "m1300": (24, None), "m2700": (32, None)}}
SHAPES["xlstm_7_1"] = SHAPES["xlstm_1_0"]
# Peak learning rates at 15 and at 300 B tokens.
RATES = {"slimpajama15b": {
    "xlstm_1_0": {"m125": 3e-3, "m760": 9e-4, "m1300": 9e-4, "m2700": 8e-4},
    "xlstm_7_1": {"m125": 3e-3, "m760": 9e-4, "m1300": 9e-4, "m2700": 8e-4},
    "llama": {"m125": 3e-3, "m350": 1.5e-3, "m760": 1.25e-3, "m1300": 1e-3, "m2700": 8e-4},
    "mamba": {"m125": 3e-3, "m350": 1.5e-3, "m760": 1.25e-3, "m1300": 1e-3, "m2700": 8e-4},
    "rwkv4": {"m125": 3e-3, "m760": 2e-3, "m1300": 1e-3, "m2700": 8e-4}}, "scaling300b": {
    "xlstm_1_0": {"m125": 1.5e-3, "m350": 7.5e-4, "m760": 6.25e-4, "m1300": 5e-4},
    "xlstm_7_1": {"m125": 1.5e-3, "m350": 7.5e-4, "m760": 6.25e-4, "m1300": 5e-4},
    "llama": {"m125": 3e-3, "m350": 1.5e-3, "m760": 1.25e-3, "m1300": 1e-3},
    "mamba": {"m125": 3e-3, "m350": 1.5e-3, "m760": 1.25e-3, "m1300": 1e-3},
    "rwkv4": {"m125": 6e-4, "m350": 4e-4, "m760": 2.5e-4, "m1300": 2e-4}}}
ABLATIONS = ["ablation_architecture", "ablation_block", "ablation_gating"]


def settings(experiment, mini=False):
    """{(case, model): settings} of the only run of each, in the miniature of the first seed."""
    found = description.load(ROOT / "scripts" / "reproduce", experiment, mini)
    jobs = [job for job in found.jobs(elsewhere=True) if job.seed == found.seeds[0]]
    assert len({(job.case, job.model) for job in jobs}) == len(jobs) and (mini or found.seeds == [0])
    return {(job.case, job.model): found.settings(job) for job in jobs}


def check_recipe(own, rate, steps, batch, warmup=750, context=2048):
    optim, train = own["optim"], own["train"]
    assert optim == {"schedule": "cosine", "warmup_steps": warmup, "learning_rate": rate, "min_lr": pytest.approx(rate / 10),
                     "beta1": 0.9, "beta2": 0.95, "eps": 1e-5, "weight_decay": 0.1}
    assert (train["max_steps"], train["global_batch_size"], train["dtype"]) == (steps, batch, "bfloat16")
    assert own["data"]["seq_len"] == context and own["model"]["vocab_size"] == 50304


@pytest.mark.parametrize("experiment", RATES)
def test_sizes_are_those_of_table_7(experiment):
    found = settings(experiment)
    for model, rates in RATES[experiment].items():
        assert {case for case, name in found if name == model} - {"table_1"} == set(rates)
        for case, rate in rates.items():
            own = found[case, model]
            blocks, heads = SHAPES[model][case]
            assert (own["model"]["embedding_dim"], own["model"]["num_blocks"]) == (WIDTHS[case], blocks), (case, model)
            assert heads is None or own["model"]["num_heads"] == heads, (case, model)
            at_300_b = (300_000, 512) if case == "m1300" else (600_000, 256)
            check_recipe(own, rate, *((30_000, 256) if experiment == "slimpajama15b" else at_300_b))


def test_table_1_has_one_learning_rate():
    rows = {model: own for (case, model), own in settings("slimpajama15b").items() if case == "table_1"}
    assert len(rows) == 15  # fourteen of the paper and linear attention
    for model, own in rows.items():
        assert own["model"]["embedding_dim"] == 1024
        check_recipe(own, 1e-3, 30_000, 256)
        if model in SHAPES:
            assert own["model"]["num_blocks"] == SHAPES[model]["m350"][0]


@pytest.mark.parametrize("experiment", ABLATIONS)
def test_ablations_have_the_recipe_of_table_1(experiment):
    for own in settings(experiment).values():
        check_recipe(own, 1e-3, 30_000, 256)


def test_longer_contexts_are_asked_of_the_largest_models_of_300_b_tokens():
    large, longer = settings("scaling300b"), settings("length_extrapolation")
    for model in SHAPES:
        ours, theirs = (own[key, model] for own, key in ((longer, "all"), (large, "m1300")))
        assert ours == theirs


@pytest.mark.parametrize("experiment", [*RATES, *ABLATIONS, "length_extrapolation"])
def test_every_size_is_judged_by_the_same_text(experiment):
    """eval.batches counts batches of a step, whose size differs."""
    for mini in (False, True):
        judged = {own["eval"]["batches"] * own["train"]["global_batch_size"] for own in settings(experiment, mini).values()}
        assert judged == {4096} if not mini else len(judged) == 1


@pytest.mark.parametrize("experiment", description.experiment_ids(ROOT / "scripts" / "reproduce"))
def test_gradients_are_clipped_as_the_paper_says(experiment):
    """Those that flow back through the sLSTM's recurrent weights at 10. A clip of the norm of all it does not name: there is
    the default one, which the README of the experiments tells."""
    full = description.load(ROOT / "scripts" / "reproduce", experiment)
    for job in full.jobs(elsewhere=True) if full.trains else ():
        own = full.settings(job)
        assert "grad_clip" not in own["train"], job.name
        assert own["model"].get("slstm", {}).get("recurrent_clip") == (10 if own["model"].get("slstm_at") else None), job.name


def test_rare_tokens():
    for own in settings("rare_tokens").values():
        check_recipe(own, 1e-3, 50_000, 256, warmup=4000, context=512)
        assert (own["model"]["embedding_dim"], own["model"]["num_blocks"]) == (768, 12)
