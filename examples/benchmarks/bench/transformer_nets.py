"""A small ViT and a small GPT-2, briefly trained, for the benchmarks of the sharpness.

Shapes: N samples, T tokens, V words of the vocabulary.
"""

import pydoc_data.topics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification

from bench.cifar_nets import Images

__all__ = ["TRANSFORMERS", "text_batches", "trained_transformer"]

TRANSFORMERS = ("vit", "gpt2")

_VOCABULARY, _TOKENS = 256, 64

# The peers have no second derivative of fused attention.
_ATTENTION = "eager"


class ImageLogits(nn.Module):
    """A ViT of 4 layers of 96 on patches of 4x4 pixels, as a function of the images alone."""

    def __init__(self, num_classes: int, size: int) -> None:
        super().__init__()
        sizes: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 4}
        sizes |= {"num_attention_heads": 4, "image_size": size, "patch_size": 4, "num_labels": num_classes}
        sizes |= {"hidden_dropout_prob": 0.0, "attn_implementation": _ATTENTION}
        self.model = ViTForImageClassification(ViTConfig(**sizes))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, (N, classes)."""
        logits: Tensor = self.model(pixel_values=x).logits
        return logits


class NextByte(nn.Module):
    """A GPT-2 of 3 layers of 64 on bytes, as a function of the tokens alone."""

    def __init__(self) -> None:
        super().__init__()
        sizes: dict[str, Any] = {"vocab_size": _VOCABULARY, "n_positions": _TOKENS, "n_embd": 64, "n_layer": 3}
        sizes |= {"n_head": 4, "attn_implementation": _ATTENTION}
        config = GPT2Config(**sizes, bos_token_id=None, eos_token_id=None, use_cache=False)
        self.model = GPT2LMHeadModel(config)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of each token that has a next one, (N, V, T - 1)."""
        logits: Tensor = self.model(input_ids=tokens).logits
        return logits[:, :-1].transpose(1, 2)


def text_batches(num_samples: int, size: int) -> list[tuple[Tensor, Tensor]]:
    """Return the first pieces of Python's own help texts in batches of tokens (N, T) and next tokens (N, T - 1)."""
    x = _text()[: num_samples * _TOKENS].view(num_samples, _TOKENS)
    return [(piece, piece[:, 1:]) for piece in x.split(size)]


def trained_transformer(
    net: str, images: Images, *, steps: int, seed: int, batch: int = 32, cache: Path | None = None
) -> nn.Module:
    """Return a transformer trained by AdamW with a linear schedule to zero, in evaluation mode.

    Args:
        net: One of `TRANSFORMERS`.
        images: Training images of the ViT.
        steps: Training steps.
        seed: Seed of the weights and of the training.
        batch: Samples in a training step.
        cache: File of trained weights, read before and written after the training.
    """
    torch.manual_seed(seed)
    model = ImageLogits(images.num_classes, images.raw.shape[-1]) if net == "vit" else NextByte()
    key = f"{net} steps={steps} seed={seed} images={len(images.raw)} batch={batch}"
    weights: dict[str, dict[str, Tensor]] = torch.load(cache) if cache is not None and cache.exists() else {}
    if key in weights:
        model.load_state_dict(weights[key])
    else:
        _train(model, net, images, steps, batch)
        if cache is not None:
            torch.save(weights | {key: model.state_dict()}, cache)
    return model.eval()


def _train(model: nn.Module, net: str, images: Images, steps: int, batch: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=max(steps, 1))
    text = _text()
    model.train()
    for _ in range(steps):
        if net == "vit":
            x, y = images.chosen(torch.randint(len(images.raw), (batch,)))
        else:
            starts = torch.randint(len(text) - _TOKENS, (batch, 1))
            x = text[starts + torch.arange(_TOKENS)]
            y = x[:, 1:]
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        schedule.step()


def _text() -> Tensor:
    """Return the bytes of the help texts, in a fixed order."""
    topics = pydoc_data.topics.topics
    return torch.tensor(list("".join(topics[name] for name in sorted(topics)).encode()), dtype=torch.int64)
