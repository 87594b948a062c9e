"""Sample continuations of prompts."""

from typing import Any

import torch
from tqdm import tqdm
from transformers import set_seed

from eval.model import LoadedModel
from eval.options import GenerateOptions


def generate_samples(
    loaded: LoadedModel, options: GenerateOptions, seed: int
) -> list[dict[str, Any]]:
    """Continue each prompt through the model's own `generate`.

    Prompts run one at a time, each from the same seed, so a sample does not depend on the others.

    Args:
        loaded: the model; its prefix token is put before each prompt.
        options: see `GenerateOptions`.
        seed: of the random draws.

    Returns:
        One {"prompt", "text", "tokens"} per prompt; `text` is the continuation alone, `tokens` its
        length.

    Raises:
        ValueError: an empty prompt without a prefix token.
    """
    sampling: dict[str, Any] = {"do_sample": options.do_sample}
    if options.do_sample:
        sampling |= {
            "temperature": options.temperature,
            "top_k": options.top_k,
            "top_p": options.top_p,
        }
    tokenizer = loaded.tokenizer
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    samples = []
    for prompt in tqdm(options.prompts, desc="generate", unit="prompt"):
        ids = torch.tensor([loaded.encode(prompt)], dtype=torch.long, device=loaded.model.device)
        if ids.shape[1] == 0:
            raise ValueError('generate.prompts: an empty prompt needs a prefix other than "none"')
        set_seed(seed)
        output = loaded.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=options.max_new_tokens,
            pad_token_id=pad,
            **sampling,
        )
        new = output[0, ids.shape[1] :]
        text = tokenizer.decode(new, skip_special_tokens=True)
        samples.append({"prompt": prompt, "text": text, "tokens": len(new)})
    return samples
