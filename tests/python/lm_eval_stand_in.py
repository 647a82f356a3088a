"""Stand-ins for what libxlstm.lm_eval uses of lm-evaluation-harness (lm_eval 0.4), for tests where that is not installed: the
same names, arguments and order of calls, nothing else of it."""

import argparse
import dataclasses
import sys
import types

REGISTRY = {}


@dataclasses.dataclass
class Instance:
    request_type: str
    doc: dict
    arguments: tuple
    idx: int

    @property
    def args(self):
        return self.arguments if isinstance(self.arguments, tuple) else (self.arguments,)


class CacheHook:
    def add_partial(self, attr, req, res):
        pass


class TemplateLM:
    def __init__(self):
        self.cache_hook = CacheHook()

    def _encode_pair(self, context, continuation):
        kept = context.rstrip()
        whole = self.tok_encode(context + continuation)
        before = self.tok_encode(kept)
        return before, whole[len(before):]

    def loglikelihood(self, requests, disable_tqdm=False):
        encoded = []
        for request in requests:
            context, continuation = request.args
            ids = self._encode_pair(*request.args) if context else ([self.prefix_token_id], self.tok_encode(continuation))
            encoded.append((request.args, *ids))
        return self._loglikelihood_tokens(encoded, disable_tqdm=disable_tqdm)


def register_model(*names):
    def register(model):
        REGISTRY.update(dict.fromkeys(names, model))
        return model

    return register


def get_model(name):
    return REGISTRY[name]


def simple_parse_args_string(text):
    """"a=1,b=x" -> {"a": 1, "b": "x"}."""
    values = dict(pair.split("=", 1) for pair in text.split(",") if pair)
    known = {"true": True, "false": False, "none": None}
    return {key: known[value.lower()] if value.lower() in known else int(value) if value.isdigit() else value
            for key, value in values.items()}


def cli_evaluate():
    """Makes the model that the command names, as far as the harness's own command goes before it loads tasks."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", "-M", default="hf")
    parser.add_argument("--model_args", "-a", default="")
    parser.add_argument("--batch_size", "-b", default=1)
    parser.add_argument("--tasks", "-t")
    arguments = parser.parse_args(sys.argv[1:])
    model = get_model(arguments.model).create_from_arg_string(
        arguments.model_args, {"batch_size": arguments.batch_size, "max_batch_size": None, "device": None})
    print(f"{arguments.model} for {arguments.tasks}, {model.batch_size} side by side")


def modules():
    """name -> module, for sys.modules."""
    content = {
        "lm_eval": {},
        "lm_eval.__main__": {"cli_evaluate": cli_evaluate},
        "lm_eval.api": {},
        "lm_eval.api.instance": {"Instance": Instance},
        "lm_eval.api.model": {"TemplateLM": TemplateLM},
        "lm_eval.api.registry": {"register_model": register_model, "get_model": get_model},
        "lm_eval.utils": {"simple_parse_args_string": simple_parse_args_string},
    }
    made = {}
    for name, attributes in content.items():
        made[name] = types.ModuleType(name)
        made[name].__dict__.update(attributes)
    return made
