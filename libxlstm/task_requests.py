"""What lm-evaluation-harness asks of a model, as Judge takes it: without the harness, which lm_eval.py needs."""

from libxlstm.scoring import EXIT_CONFIG, ScoringError

__all__ = ["generation_groups", "generation_options", "named_arguments", "scoring_pairs"]

# What a task may ask of generate_until, besides these: until, do_sample, temperature, top_k, top_p.
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


def generation_options(wanted, max_gen_toks=256):
    """Judge.generate's arguments from a task's generation_kwargs. What would change the text and is not known is an error."""
    wanted = dict(wanted)
    lengths = [value for value in [wanted.pop(name, None) for name in _LENGTHS] if value is not None]
    until = wanted.pop("until", None) or []
    given = wanted.pop("temperature", None)
    temperature = float(given or 0)
    sample = wanted.pop("do_sample", None)
    if sample and given is None:
        temperature = 1.0
    options = {
        "until": (until,) if isinstance(until, str) else tuple(until),
        "max_tokens": int(lengths[0]) if lengths else max_gen_toks,
        "temperature": 0.0 if sample is False else temperature,
        "top_k": int(wanted.pop("top_k", None) or 0),
        "top_p": float(wanted.pop("top_p", None) or 1),
    }
    if wanted.pop("num_beams", 1) != 1:
        raise ScoringError(EXIT_CONFIG, "generation_kwargs: beam search is not there, expected num_beams 1")
    if wanted:
        raise ScoringError(EXIT_CONFIG, f"generation_kwargs: unknown {', '.join(sorted(wanted))}")
    return options


def generation_groups(requests, max_gen_toks=256):
    """{arguments of Judge.generate: indices of the requests, (context, generation_kwargs), that share them}."""
    groups = {}
    for index, (_, wanted) in enumerate(requests):
        options = generation_options(wanted, max_gen_toks)
        groups.setdefault(tuple(options.items()), []).append(index)
    return groups


def scoring_pairs(requests, prefix):
    """(context, continuation) of the harness's requests ((texts), context, continuation). It moves the spaces at a context's
    end into the continuation; where nothing is left, the token stands that it gives to an empty context."""
    return [(context or [prefix], continuation) for _, context, continuation in requests]


def named_arguments(arguments):
    """The command's arguments, with this model where they ask for none."""
    # The short form is -M, in older versions of the harness -m.
    named = any(argument.startswith(("--model=", "-M", "-m")) or argument == "--model" for argument in arguments)
    if not arguments or arguments[0] in ("ls", "validate", "-h", "--help") or named:
        return arguments
    return [*arguments, "--model", "xlstm"]
