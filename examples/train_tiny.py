"""Train a tiny Mamba-2 on one Python file, in plain PyTorch; about 20 seconds on a CPU.

Each row packs two pieces of the file; position_ids that restart keep them apart.
Run: python examples/train_tiny.py [steps]
"""

import json.decoder
import sys
from pathlib import Path

import torch

import ssm_hf


def main(steps: int) -> None:
    torch.manual_seed(0)
    tokenizer = ssm_hf.byte_tokenizer()
    text = Path(json.decoder.__file__).read_text(encoding="utf-8")
    tokens = torch.tensor(tokenizer(text)["input_ids"])

    config = ssm_hf.Mamba2Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        num_hidden_layers=2,
        num_heads=6,
        head_dim=32,
        state_size=32,
        n_groups=1,
        chunk_size=64,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = ssm_hf.Mamba2ForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameter_groups(weight_decay=0.1), lr=5e-3)
    print(f"{model.num_parameters():,} parameters, {len(tokens):,} tokens of text")

    length = 128
    position_ids = torch.arange(length).repeat(8, 2)  # two pieces in each row
    for step in range(1, steps + 1):
        starts = torch.randint(len(tokens) - length, (16,))
        pieces = torch.stack([tokens[start : start + length] for start in starts])
        input_ids = pieces.reshape(8, 2 * length)
        loss = model(input_ids, position_ids=position_ids, labels=input_ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step == 1 or step % 20 == 0:
            print(f"step {step:4d}  loss {loss.item():.3f} nats per byte")

    prompt = tokenizer("def ", return_tensors="pt")
    written = model.eval().generate(**prompt, max_new_tokens=80, do_sample=False)
    print(tokenizer.decode(written[0]))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
