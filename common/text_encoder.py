"""A line of text in place of the ECG (ECHOPulse section 3.2, Table 2): used by generator.py.

    python -m sources.phantom --views=A4C,A2C --out=datasets/views
    python train_generator.py --condition=text --data=datasets/views --out=OUT

A line is such as "A4C view, EF 55, heart rate 72". It goes through a T5 encoder of the package
transformers: either a trained one, whose weights stay as they are (--text_encoder=google/byt5-small
or a folder), or a small new ByT5 that is trained with the generator. ByT5's letters are bytes, so
it needs no vocabulary file.
"""
from dataclasses import dataclass

import torch
from torch import nn

from common.flags import UserError

BYT5_VOCABULARY = 384       # 3 special tokens, 256 bytes, the rest unused


@dataclass
class TextConfig:
    """Settings of a TextEncoder."""
    pretrained: str = ""        # a T5 that transformers knows, or a folder; empty = a small new one
    dim: int = 128              # width of the output
    depth: int = 3              # layers of a new one
    heads: int = 4              # its attention heads


def byte_tokens(texts, device=None):
    """ByT5's tokens of B texts, (B, M): each byte + 3, then 1 (the end), then 0 (padding)."""
    rows = []
    for text in texts:
        tokens = [byte + 3 for byte in text.encode()]
        rows.append(torch.tensor(tokens + [1]))
    return nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)


class TextEncoder(nn.Module):
    """B texts -> their embeddings (B, M, dim), by a T5 encoder and a linear layer."""

    def __init__(self, config):
        super().__init__()
        try:
            import transformers
        except ImportError:
            message = "text needs the package transformers: pip install transformers"
            raise UserError(message) from None
        self.config = config
        if config.pretrained:
            self.load_pretrained(transformers)
        else:
            settings = transformers.T5Config(
                vocab_size=BYT5_VOCABULARY,
                d_model=config.dim,
                d_kv=config.dim // config.heads,
                d_ff=4 * config.dim,
                num_layers=config.depth,
                num_heads=config.heads,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
            )
            self.t5 = transformers.T5EncoderModel(settings)
        self.out = nn.Linear(self.t5.config.d_model, config.dim)

    def load_pretrained(self, transformers):
        """The T5 encoder and the tokenizer named by the config; the encoder is not trained."""
        name = self.config.pretrained
        try:
            self.t5 = transformers.T5EncoderModel.from_pretrained(name, dropout_rate=0.0)
            self.t5.requires_grad_(False)
            self.tokens = transformers.AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"--text_encoder={name}: {reason}") from None

    def forward(self, texts):
        """B texts -> embeddings (B, M, dim) and padding (B, M), True where a text has no token."""
        device = self.out.weight.device
        if self.config.pretrained:
            tokenized = self.tokens(list(texts), padding=True, return_tensors="pt")
            index = tokenized.input_ids.to(device)                                         # B M
        else:
            index = byte_tokens(texts, device)                                             # B M
        # 0 is the padding of every T5
        padding = index == 0
        hidden = self.t5(index, attention_mask=(~padding).long()).last_hidden_state
        return self.out(hidden), padding                                                   # B M dim
