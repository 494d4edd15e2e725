"""Monitor the experts of a small Mixtral while it learns to write Python: no adapter, no change to the model.

python examples/monitor_language_model.py

Two minutes on two cores. Needs transformers. The data is the source of Python's own argparse, line by line.
"""

import argparse
import inspect

import torch
from lightning import pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import MixtralConfig, MixtralForCausalLM

from moe_heads.callbacks import ExpertUtilizationCallback

Batch = dict[str, Tensor]

MAX_BYTES = 48
NUM_BYTES = 128


class LanguageModel(pl.LightningModule):
    """A Mixtral over bytes."""

    def __init__(self, num_layers: int = 4, num_experts: int = 8) -> None:
        super().__init__()
        config = MixtralConfig(
            vocab_size=NUM_BYTES,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=num_experts,
            num_experts_per_tok=2,
            max_position_embeddings=MAX_BYTES,
            output_router_logits=True,  # adds the balance loss to the loss
            router_aux_loss_coef=0.02,
            bos_token_id=None,
            eos_token_id=None,
        )
        self.model = MixtralForCausalLM(config)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss, which includes the balance loss."""
        return self.model(**batch).loss  # type: ignore[no-any-return]

    def forward(self, **batch: Tensor) -> Tensor:
        """Return the logits of the next byte."""
        return self.model(**batch).logits  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def lines_of_code() -> list[Tensor]:
    """Return the lines of argparse as bytes."""
    lines = [line[:MAX_BYTES] for line in inspect.getsource(argparse).splitlines() if line.strip()]
    return [torch.tensor([min(ord(letter), NUM_BYTES - 1) for letter in line]) for line in lines]


def padded(lines: list[Tensor]) -> Batch:
    """Pad lines to a batch. The attention mask tells the callback which bytes are padding."""
    mask = pad_sequence([torch.ones_like(line) for line in lines], batch_first=True)
    ids = pad_sequence(lines, batch_first=True)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def main(max_epochs: int = 4, num_lines: int | None = None) -> ExpertUtilizationCallback:
    """Train, and print which experts were used."""
    pl.seed_everything(0)
    lines = lines_of_code()[:num_lines]
    callback = ExpertUtilizationCallback(splits=["train"], every_n_train_steps=20)
    trainer = pl.Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        logger=TensorBoardLogger("runs", name="language_model", default_hp_metric=False),
        callbacks=[callback],
        enable_model_summary=False,
        log_every_n_steps=20,
    )
    # a list of samples is a dataset
    loader: DataLoader[Tensor] = DataLoader(lines, batch_size=32, shuffle=True, collate_fn=padded)  # type: ignore[arg-type]
    trainer.fit(LanguageModel(), loader)
    print(callback.results["train"].summary())
    return callback


if __name__ == "__main__":
    main()
