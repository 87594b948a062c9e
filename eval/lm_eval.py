"""lm-evaluation-harness' own command line, with our models and our adapter known to it.

    python -m eval.lm_eval --model ssm_hf --model_args pretrained=DIR,dtype=bfloat16 \\
        --tasks lambada_openai,wikitext --batch_size auto --output_path runs/harness

`--model ssm_hf` is the adapter of eval/harness.py, for any causal model; its `--model_args` are
pretrained, dtype, max_length, window, bos and samples (a folder: a stopped run goes on). The
harness' own `--model hf` loads our classes too. Under `accelerate launch -m eval.lm_eval ...` the
requests are shared by the processes, and the first one reports.
"""

import lm_eval.__main__

import eval.harness  # noqa: F401 (registers the adapter)
import ssm_hf


def main() -> None:
    """Run the harness on the arguments of this process."""
    ssm_hf.register(override=True)
    lm_eval.__main__.cli_evaluate()


if __name__ == "__main__":
    main()
