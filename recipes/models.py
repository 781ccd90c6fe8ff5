"""The paper's models (Appendix E)."""

import math

import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Four heads that share query, key and value: what reads from the residual stream is the *encoder*, what writes
    back the *decoder*. There is no residual connection around it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.encoder = nn.Linear(width, width, bias=False)
        self.decoder = nn.Linear(width, width, bias=False)
        bound = (heads / width) ** 0.5  # each head is its own linear map, from width / heads
        nn.init.uniform_(self.decoder.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) to what the last token reads, (B, width): only that one's prediction is used."""
        heads = self.encoder(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(heads[:, :, -1:], heads, heads)
        result: Tensor = self.decoder(mixed.flatten(1))
        return result


class ModuloTransformer(nn.Module):
    """The modulo-113 Transformer of E.2: tokens (B, 4) to log-probabilities (B, 115). 89,024 parameters."""

    def __init__(self, tokens: int = 115, width: int = 64, heads: int = 4, hidden: int = 512) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.attention = Attention(width, heads)
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.decoder = nn.Linear(width, tokens, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.attention(self.embedding(tokens) * math.sqrt(self.embedding.embedding_dim))
        x = x + F.relu(self.linear2(F.relu(self.linear1(x))))
        return F.log_softmax(self.decoder(x), dim=-1)
