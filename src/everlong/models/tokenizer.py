"""The byte tokenizer: ids 0-255 are the byte values themselves, then bos, eos and pad."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BOS_TOKEN_ID, EOS_TOKEN_ID, PAD_TOKEN_ID = 256, 257, 258
_SPECIAL = {"<|bos|>": BOS_TOKEN_ID, "<|eos|>": EOS_TOKEN_ID, "<|pad|>": PAD_TOKEN_ID}


def byte_symbols() -> list[str]:
    """The printable character that stands for each byte in byte-level tokenizers, by byte value."""
    themselves = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in themselves else next(others)) for byte in range(256)]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer without vocabulary files; nothing is downloaded.

    Encoding puts bos in front of every text, so that its first byte is predicted too
    (`add_special_tokens=False` leaves it out), and pads on the left, as generation needs. Decoding
    gives back any valid UTF-8 exactly. The names of the special tokens are plain bytes in a text.
    """
    symbols = byte_symbols()
    vocab = {symbol: byte for byte, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in _SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=list(_SPECIAL.items())
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
        model_input_names=["input_ids", "attention_mask"],
    )
