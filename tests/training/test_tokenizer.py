import pytest
from transformers import AutoTokenizer

import ssm_hf

# Every code point of the first two planes' starts, controls, and specials spelled out as text.
TRICKY = "".join(map(chr, range(0x800))) + "𝕏 é e\u0301 \ufffd\u200b\r\n <|endoftext|><|user|>"


@pytest.fixture
def tokenizer():
    return ssm_hf.byte_tokenizer()


def test_ids_are_the_utf8_bytes(tokenizer):
    ids = tokenizer(TRICKY, split_special_tokens=True)["input_ids"]
    assert ids == list(TRICKY.encode())


@pytest.mark.parametrize("split_special_tokens", [True, False])
def test_decoding_gives_the_text_back(tokenizer, split_special_tokens):
    ids = tokenizer(TRICKY, split_special_tokens=split_special_tokens)["input_ids"]
    assert tokenizer.decode(ids) == TRICKY


def test_special_tokens_follow_the_bytes(tokenizer):
    names = ["<|endoftext|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    assert tokenizer.convert_tokens_to_ids(names) == list(range(256, 262))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        256,
        256,
        257,
    )
    assert len(tokenizer) == 264


def test_saving_keeps_everything(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(TRICKY)["input_ids"] == tokenizer(TRICKY)["input_ids"]
    assert loaded.decode(loaded(TRICKY)["input_ids"]) == TRICKY
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    assert loaded.chat_template == tokenizer.chat_template
    assert len(loaded) == len(tokenizer)


def test_chat_template_marks_what_the_assistant_says(tokenizer):
    messages = [
        {"role": "system", "content": "be é"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "é 𝕏"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "ü"},
    ]
    encoded = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    spoken = [i for i, m in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(spoken) == "é 𝕏<|endoftext|>ü<|endoftext|>"
    assert tokenizer.apply_chat_template(
        messages[:2], tokenize=False, add_generation_prompt=True
    ) == ("<|endoftext|><|system|>be é<|end|><|user|>hi<|end|><|assistant|>")


def test_chat_template_refuses_an_unknown_role(tokenizer):
    with pytest.raises(Exception, match="role must be 'system', 'user' or 'assistant', got tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}])
