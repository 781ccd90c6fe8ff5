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


class CNN(nn.Module):
    """The four-layer CNN of E.1: images (B, channels, side, side) to log-probabilities (B, classes)."""

    def __init__(self, side: int = 28, channels: int = 1, classes: int = 10, width: int = 16, hidden: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.linear1 = nn.Linear(2 * width * (side // 4) ** 2, hidden)
        self.linear2 = nn.Linear(hidden, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(F.max_pool2d(self.conv1(images), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        x = F.relu(self.linear1(x.flatten(1)))
        return F.log_softmax(self.linear2(x), dim=-1)


class SmoothCNN(CNN):
    """The same layers with GELU and average pooling, so that training is a smoother function of what it is given."""

    def forward(self, images: Tensor) -> Tensor:
        x = F.gelu(2 * F.avg_pool2d(self.conv1(images), 2))  # twice, for averages are smaller than maxima
        x = F.gelu(2 * F.avg_pool2d(self.conv2(x), 2))
        x = F.gelu(self.linear1(x.flatten(1)))
        return F.log_softmax(self.linear2(x), dim=-1)


class Residual(nn.Module):
    """`x` plus two convolutions of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.conv2(F.relu(self.conv1(x))))


class ResNet9(nn.Module):
    """ResNet-9 of E.1, without normalisation: images (B, channels, 32, 32) to log-probabilities (B, classes)."""

    def __init__(self, channels: int = 3, classes: int = 2, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, 2 * width, 5, stride=2, padding=2, bias=False)
        self.block1 = Residual(2 * width)
        self.conv3 = nn.Conv2d(2 * width, 4 * width, 3, padding=1, bias=False)
        self.block2 = Residual(4 * width)
        self.conv4 = nn.Conv2d(4 * width, 2 * width, 3, bias=False)
        self.linear = nn.Linear(2 * width, classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(images))))
        x = F.relu(self.conv3(self.block1(x)))
        x = F.relu(self.conv4(self.block2(F.max_pool2d(x, 2))))
        return F.log_softmax(self.linear(x.amax((2, 3))), dim=-1)
