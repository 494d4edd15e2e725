"""Networks of the oracle on tokens and sequences, by name: makers for a number of outputs, and their inputs."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from moe_heads import SoftMoE, SparseMoE

__all__ = ["SEQUENCE_NETWORKS"]

Maker = Callable[[int], nn.Module]


class _Recurrent(nn.Module):
    """The last state of a recurrent layer, classified; ``time_first`` turns the batch before the layer."""

    def __init__(self, layer: nn.RNNBase, features: int, outputs: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(features, outputs)

    def forward(self, x: Tensor) -> Tensor:
        if self.layer.batch_first:
            return self.head(self.layer(x)[0][:, -1])
        return self.head(self.layer(x.transpose(0, 1))[0][-1])


def _recurrent(kind: type[nn.RNNBase], hidden: int, both: bool = False, **options: object) -> Maker:
    features = 2 * hidden if both else hidden
    return lambda c: _Recurrent(kind(3, hidden, bidirectional=both, **options), features, c)


class _Embedded(nn.Module):
    """The mean of the tokens' vectors."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.table, self.hidden, self.head = nn.Embedding(8, 6), nn.Linear(6, 6), nn.Linear(6, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.table(x).mean(1))))


class _Bag(nn.Module):
    """A bag of tokens, of which one is padding."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 7, padding_idx=0)
        self.head = nn.Sequential(nn.Linear(7, 7), nn.GELU(), nn.Linear(7, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x).sum(1) / 3)


class _TiedTokens(nn.Module):
    """Vectors of the tokens that are the output layer as well; C of its 8 classes are looked at."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.table, self.hidden = nn.Embedding(8, 6), nn.Linear(6, 6)
        self.readout = nn.Linear(6, 8, bias=False)
        self.readout.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(torch.tanh(self.hidden(self.table(x).mean(1))))[:, : self.outputs]


class _Attention(nn.Module):
    """One head of causal attention, written out."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(4, 4, bias=False) for _ in range(3))
        self.head = nn.Linear(4, outputs)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).transpose(1, 2) / 2
        scores = scores.masked_fill(torch.ones(3, 3, dtype=torch.bool).triu(1), -torch.inf)
        return self.head(torch.tanh(scores.softmax(-1) @ self.value(x)).mean(1))


class _MultiHead(nn.Module):
    """torch's attention of two heads, with and without padding."""

    def __init__(self, outputs: int, need_weights: bool) -> None:
        super().__init__()
        self.need_weights = need_weights
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, outputs)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        attended, _ = self.attention(x, x, x, key_padding_mask=mask, need_weights=self.need_weights)
        return self.head(attended[:, 0])


class _Encoder(nn.Module):
    """torch's transformer layer; padding does not count."""

    def __init__(self, outputs: int, **options: object) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=6, batch_first=True, **options)
        self.head = nn.Linear(4, outputs)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.layer(x, src_key_padding_mask=mask)
        if mask is None:
            return self.head(x.mean(1))
        valid = ~mask[..., None]
        return self.head((x * valid).sum(1) / valid.sum(1))


class _Mixer(nn.Module):
    """Layers over the steps and over the features in turn."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.steps, self.features, self.norm = nn.Linear(3, 3), nn.Linear(4, 4), nn.LayerNorm(4)
        self.head = nn.Linear(4, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.steps(self.norm(x).transpose(1, 2)).transpose(1, 2).tanh()
        return self.head((x + torch.nn.functional.gelu(self.features(self.norm(x)))).mean(1))


SEQUENCE_NETWORKS: Mapping[str, tuple[Maker, str]] = {
    "LSTM, batch first": (_recurrent(nn.LSTM, 4, batch_first=True), "steps"),
    "LSTM, time first": (_recurrent(nn.LSTM, 3), "steps"),
    "GRU, batch first": (_recurrent(nn.GRU, 5, batch_first=True), "steps"),
    "GRU, two layers": (_recurrent(nn.GRU, 3, num_layers=2, dropout=0.2), "steps"),
    "RNN": (_recurrent(nn.RNN, 7, batch_first=True), "steps"),
    "RNN, both ways": (_recurrent(nn.RNN, 4, both=True, nonlinearity="relu"), "steps"),
    "embedding and mean": (_Embedded, "tokens"),
    "bag of tokens": (_Bag, "tokens"),
    "tied tokens": (_TiedTokens, "tokens"),
    "attention": (_Attention, "wide steps"),
    "multi-head attention": (lambda c: _MultiHead(c, need_weights=True), "wide steps"),
    "multi-head attention, masked": (lambda c: _MultiHead(c, need_weights=False), "masked steps"),
    "transformer layer": (lambda c: _Encoder(c, activation="gelu", norm_first=True), "wide steps"),
    "transformer layer, masked": (_Encoder, "masked steps"),
    "mixer": (_Mixer, "wide steps"),
    "sparse head on tokens": (lambda c: SparseMoE(4, c, num_experts=3, expert_width=3, k=2), "wide steps"),
    "soft head on tokens": (lambda c: SoftMoE(4, c, num_experts=3, expert_width=4), "wide steps"),
}
