"""Trained models in EleutherAI's lm-evaluation-harness, as its model "xlstm". Needs pip install "lm_eval>=0.4".

    python -m libxlstm.lm_eval --model_args pretrained=runs/demo,dtype=bfloat16 --tasks lambada_openai,piqa --batch_size 16

is the harness's own command, with all its options, after this module has made the model known to it; in Python
`import libxlstm.lm_eval` does that. Keys of --model_args: those of XlstmLM.__init__. What it computes, and how: scoring.py.
"""

import contextlib
import sys
import warnings

import torch

import libxlstm
from libxlstm.scoring import Judge, ScoringError
from libxlstm.task_requests import generation_groups, named_arguments, scoring_pairs

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import simple_parse_args_string
    from tqdm import tqdm
except ImportError as error:
    missing = f'lm-evaluation-harness is not there ({error}); install it with: pip install "lm_eval>=0.4"'
    if __name__ == "__main__":
        sys.exit(f"error: {missing}")
    raise ImportError(missing) from error


@register_model("xlstm")
class XlstmLM(TemplateLM):
    """A run or checkpoint folder of libxlstm.

    pretrained    the folder
    tokenizer     another tokenizer than the checkpoint's: "bytes", tokenizer.json or a folder
    dtype         float32; bfloat16: autocast, the weights stay float32; bfloat16_weights, int8_weights: they are rounded, too
    device        cpu, cuda, cuda:1, ...; a GPU where there is one unless given, and the CPU where there is none
    batch_size    sequences side by side; "auto" is 16. The command's own default, --batch_size 1, is slow
    max_length    inputs of one sequence, 0: no limit; the context of the training unless given
    max_gen_toks  where a task does not say how much to generate
    verify        check the checkpoint against its checksums
    """

    def __init__(self, pretrained, tokenizer=None, dtype="float32", device=None, batch_size=16, max_batch_size=None,
                 max_length=None, max_gen_toks=256, verify=True):
        super().__init__()
        del max_batch_size  # the harness hands it on; only "auto" would search up to it
        if str(device).startswith("cuda") and not torch.cuda.is_available():  # the command's own default is cuda:0
            warnings.warn(f"device {device}: torch sees no GPU, the CPU is used", stacklevel=2)
            device = "cpu"
        batch_size = 16 if str(batch_size).startswith("auto") else int(batch_size)
        self.judge = Judge.load(pretrained, tokenizer, verify, device=device or "auto", dtype=dtype, batch_size=batch_size,
                                max_length=max_length)
        self.max_gen_toks, self.batch_size, self.max_length = max_gen_toks, batch_size, self.judge.max_length
        self._device = self.judge.device

    @classmethod
    def create_from_arg_string(cls, arg_string, additional_config=None):
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict, additional_config=None):
        """What --model_args says stands above the harness's options and their defaults."""
        return cls(**{**{key: value for key, value in (additional_config or {}).items() if value is not None}, **arg_dict})

    @property
    def device(self):
        return self._device

    @property
    def eot_token_id(self):
        return self.judge.tokenizer.eos_id

    @property
    def prefix_token_id(self):
        return self.judge.tokenizer.start_id

    @property
    def tokenizer_name(self):
        return self.judge.tokenizer.spec

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        return self.judge.tokenizer.encode(string)

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs):
        with self._progress(requests, "loglikelihood", disable_tqdm, lambda request: request[0]) as done:
            pairs = scoring_pairs(requests, self.prefix_token_id)
            return self.judge.score([(self.judge.tokenizer.as_prompt(context), rest) for context, rest in pairs], done)

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        with self._progress(requests, "loglikelihood_rolling", disable_tqdm, lambda request: request.args) as done:
            return self.judge.score_rolling([self.tok_encode(request.args[0]) for request in requests], done)

    def generate_until(self, requests, disable_tqdm=False):
        groups = generation_groups([request.args for request in requests], self.max_gen_toks)
        texts = [None] * len(requests)
        with self._progress(requests, "generate_until", disable_tqdm, lambda request: request.args) as done:
            for options, indices in groups.items():
                prompts = [self.judge.tokenizer.encode_prompt(requests[index].args[0]) for index in indices]

                def keep(place, text, indices=indices):
                    texts[indices[place]] = text
                    done(indices[place], text)

                self.judge.generate(prompts, **dict(options), on_result=keep)
        return texts

    @contextlib.contextmanager
    def _progress(self, requests, name, quiet, key):
        """A progress bar; each result goes into the harness's cache (--use_cache) as it comes."""
        with tqdm(total=len(requests), desc=name, disable=quiet) as bar:

            def done(index, result):
                self.cache_hook.add_partial(name, key(requests[index]), result)
                bar.update()

            yield done


def main():
    from lm_eval.__main__ import cli_evaluate

    sys.argv[1:] = named_arguments(sys.argv[1:])
    try:
        cli_evaluate()
    except (ScoringError, libxlstm.Error) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    return 0


if __name__ == "__main__":
    sys.exit(main())
