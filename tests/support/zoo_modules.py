"""The modules of the zoo: demos and common ways to train, in the few lines that people write."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.demos import LightningTransformer
from lightning.pytorch.demos.lstm import LightningLSTM, SimpleLSTM
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import IterableDataset
from torchmetrics.classification import MulticlassAccuracy

NUM_CLASSES = 4


class Wrapped(LightningModule):
    """The few lines that make a network a LightningModule."""

    def __init__(self, net: nn.Module, loss: Callable[[Any, Any], Tensor] = F.cross_entropy) -> None:
        super().__init__()
        self.net, self.loss = net, loss

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class Measured(Wrapped):
    """Logs, and keeps a metric of the epoch."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.accuracy = MulticlassAccuracy(NUM_CLASSES)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        self.accuracy(logits, batch[1])
        self.log("accuracy", self.accuracy)
        return self.loss(logits, batch[1])


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(5, 8, num_layers=2, dropout=0.1, batch_first=True), nn.Linear(8, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x)[0][:, -1])


class VariationalAutoencoder(Wrapped):
    """Its training step draws random numbers."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(5, 4))
        self.decoder = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 5))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        mean, log_variance = self(batch[0]).chunk(2, dim=1)
        decoded = self.decoder(mean + torch.randn_like(mean) * (log_variance / 2).exp())
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).mean() / 2
        return F.mse_loss(decoded, batch[0]) + divergence


class GAN(LightningModule):
    """Two optimizers, used by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 5))
        # its weight is a plain attribute, computed afresh in every forward pass
        hidden = nn.utils.spectral_norm(nn.Linear(5, 8))
        self.discriminator = nn.Sequential(hidden, nn.LeakyReLU(0.2), nn.Linear(8, 1))

    def forward(self, noise: Tensor) -> Tensor:
        return self.generator(noise)

    def generator_loss(self, batch: Any) -> Tensor:
        return F.softplus(-self.discriminator(self(torch.randn(len(batch[0]), 3)))).mean()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        generating, discriminating = self.optimizers()
        for optimizer in (generating, discriminating):
            self.toggle_optimizer(optimizer)
            fake = self.generator_loss(batch)
            real = F.softplus(-self.discriminator(batch[0])).mean()
            optimizer.zero_grad()
            self.manual_backward(fake if optimizer is generating else real - fake)
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(part.parameters(), lr=0.01) for part in (self.generator, self.discriminator)]


class OfflineTransformer(LightningTransformer):
    def prepare_data(self) -> None:
        """Nothing to download."""


class OfflineLSTM(LightningLSTM):
    def __init__(self) -> None:
        super().__init__(vocab_size=20)
        self.model = SimpleLSTM(vocab_size=20, ninp=8, nhid=8, nlayers=2)

    def prepare_data(self) -> None:
        """Nothing to download."""

    def from_rest(self, batch: Any) -> Any:
        return self.model(batch[0], self.model.init_hidden(len(batch[0])))

    def loss_from_rest(self, batch: Any) -> Tensor:
        self.hidden = None
        return self.training_step(batch, 0)


class LanguageClassifier(LightningModule):
    """A classifier of the transformers library, which computes its loss itself."""

    def __init__(self) -> None:
        super().__init__()
        # takes seconds, and only this module pays for it
        from transformers import BertConfig, BertForSequenceClassification

        labels: dict[str, Any] = {"num_labels": NUM_CLASSES}  # not in the signature
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        self.net = BertForSequenceClassification(BertConfig(vocab_size=20, **labels, **sizes))

    def forward(self, **batch: Tensor) -> Any:
        return self.net(**batch)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.001)


@dataclass
class Pair:
    """A batch."""

    x: Tensor
    y: Tensor


class OfPairs(Wrapped):
    def training_step(self, batch: Pair, batch_idx: int) -> Tensor:
        return self.loss(self(batch.x), batch.y)


class Stream(IterableDataset[Any]):
    def __init__(self, samples: Tensor) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[Any]:
        return iter(self.samples)
