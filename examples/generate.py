"""Every common way to generate, with a model that has just learnt one sentence; 6 seconds on a CPU.

Run: python examples/generate.py
"""

import torch

import ssm_hf

SENTENCE = "A recurrent model reads a text once and keeps a state of fixed size. "


def train(tokenizer) -> ssm_hf.Mamba2ForCausalLM:
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 32}
    tokens = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = ssm_hf.Mamba2Config(
        vocab_size=len(tokenizer), state_size=32, n_groups=1, eos_token_id=None, **shape, **tokens
    )
    model = ssm_hf.Mamba2ForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameter_groups(weight_decay=0.0), lr=1e-2)
    batch = tokenizer(2 * SENTENCE, return_tensors="pt")
    for _ in range(60):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def main() -> None:
    torch.manual_seed(0)
    tokenizer = ssm_hf.byte_tokenizer()
    model = train(tokenizer)

    prompt = tokenizer("A recurrent", return_tensors="pt")
    greedy = model.generate(**prompt, max_new_tokens=40, do_sample=False)
    print("greedy: ", tokenizer.decode(greedy[0]))
    sampled = model.generate(**prompt, max_new_tokens=40, do_sample=True, temperature=0.7)
    print("sampled:", tokenizer.decode(sampled[0]))

    prompts = ["A recurrent model", "keeps"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    for row in model.generate(**batch, max_new_tokens=20, num_beams=2):
        print("batch:  ", tokenizer.decode(row, skip_special_tokens=True))

    # A cache of one's own: read a prompt once, then continue it any number of times.
    cache = ssm_hf.RecurrentCache(model.config)
    model(**prompt, past_key_values=cache)
    snapshot = cache.snapshot()
    for more in (" model", " state"):
        cache.restore(snapshot)
        whole = tokenizer("A recurrent" + more, return_tensors="pt")
        out = model.generate(**whole, past_key_values=cache, max_new_tokens=10, do_sample=False)
        print(f"{cache.nbytes:,} bytes of state:", tokenizer.decode(out[0]))

    looked_up = model.generate(**prompt, max_new_tokens=40, prompt_lookup_num_tokens=5)
    print("speculative decoding gives the greedy text:", looked_up.tolist() == greedy.tolist())


if __name__ == "__main__":
    main()
