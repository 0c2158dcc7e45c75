"""A line of text in the ECG's place, "A4C view, EF 55, heart rate 72" (ECHOPulse section 3.2, Table 2).

    python -m sources.phantom --views=A4C,A2C --out=datasets/views
    python train_generator.py --condition=text --data=datasets/views --out=OUT

A T5 encoder by transformers: a trained one, left as it is (--text_encoder=google/byt5-small, or a folder), or
a small ByT5 that learns along. Its letters are bytes: it needs no vocabulary file.
"""
from dataclasses import dataclass

import torch
from torch import nn

from common.flags import UserError


@dataclass
class TextConfig:
    pretrained: str = ""        # a T5 that transformers knows, or a folder of one; empty = a new small one
    dim: int = 128              # width of what comes out
    depth: int = 3              # layers of a new one
    heads: int = 4              # its attention heads


def byte_tokens(texts, device=None):
    """ByT5's tokens of B texts: each byte + 3, then 1 (the end), then 0 where there is nothing: (B, M)."""
    rows = [torch.tensor([b + 3 for b in text.encode()] + [1]) for text in texts]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)


class TextEncoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        try:
            import transformers
        except ImportError:
            raise UserError("text needs the package transformers: pip install transformers") from None
        c = self.config = config
        if c.pretrained:
            try:
                self.t5 = transformers.T5EncoderModel.from_pretrained(c.pretrained, dropout_rate=0.0)
                self.t5.requires_grad_(False)
                self.tokens = transformers.AutoTokenizer.from_pretrained(c.pretrained)
            except (OSError, ValueError) as error:
                raise UserError(f"--text_encoder={c.pretrained}: {str(error).splitlines()[0]}") from None
        else:
            self.t5 = transformers.T5EncoderModel(transformers.T5Config(
                vocab_size=384, d_model=c.dim, d_kv=c.dim // c.heads, d_ff=4 * c.dim, num_layers=c.depth,
                num_heads=c.heads, feed_forward_proj="gated-gelu", dropout_rate=0.0))
        self.out = nn.Linear(self.t5.config.d_model, c.dim)

    def forward(self, texts):
        """B texts -> (B, M, dim), and where there is none (B, M)."""
        device = self.out.weight.device
        if self.config.pretrained:
            index = self.tokens(list(texts), padding=True, return_tensors="pt").input_ids.to(device)
        else:
            index = byte_tokens(texts, device)
        return self.out(self.t5(index, attention_mask=(index != 0).long()).last_hidden_state), index == 0
