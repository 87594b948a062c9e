"""The built-in byte-level tokenizer: no vocabulary file, no download, any UTF-8 text."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
# In id order from 256. The reserved two fill the vocabulary to a multiple of 8, so that every id
# a model of that vocabulary size can emit has a name.
SPECIAL_TOKENS = (
    END_OF_TEXT,
    PAD,
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|end|>",
    "<|reserved_0|>",
    "<|reserved_1|>",
)

# The assistant's turn closes with the end-of-text token, so generate() stops there without being
# told; {% generation %} marks the tokens that finetuning takes the loss of.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
  {%- if message['role'] == 'assistant' -%}
    {{- '<|assistant|>' -}}
    {%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}
  {%- elif message['role'] in ['user', 'system'] -%}
    {{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}
  {%- else -%}
    {{- raise_exception("role must be 'system', 'user' or 'assistant', got " + message['role']) -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def _byte_symbols() -> list[str]:
    """The printable character that `tokenizers`' ByteLevel step writes for each byte 0..255.

    Bytes that are printable Latin-1 characters stand for themselves; the others are numbered
    upwards from 256 in byte order (Radford et al. 2019, GPT-2).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    shifted = iter(range(256, 512))
    return [chr(byte if byte in printable else next(shifted)) for byte in range(256)]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Build the byte-level tokenizer: 264 ids, the first 256 being the byte values.

    Ids 256.. are the special tokens `<|endoftext|>` (bos and eos), `<|pad|>`, `<|user|>`,
    `<|assistant|>`, `<|system|>`, `<|end|>` and two reserved ones. Text is encoded as its UTF-8
    bytes, nothing is added or normalised, and decoding gives the text back. The chat template
    marks assistant tokens, so `apply_chat_template(..., return_assistant_tokens_mask=True)` works.

    Returns:
        A `PreTrainedTokenizerFast`; `save_pretrained` and `AutoTokenizer.from_pretrained` keep it.
    """
    vocab = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    # Splitting into words changes no id where there are no merges; it bounds the work per word.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(  # pyright: ignore[reportAttributeAccessIssue]
        add_prefix_space=False, use_regex=True
    )
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        extra_special_tokens=list(SPECIAL_TOKENS[2:]),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
