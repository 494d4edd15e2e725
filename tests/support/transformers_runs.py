"""Short trainings of tiny models under the Trainer of transformers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from moe_heads.callbacks import ExpertUtilizationCallback, SharpnessCallback
from tests.support.language_models import SIZES, VOCABULARY

# the configurations are dataclasses for mypy, but take the arguments of their models as well
hf: Any = transformers

Example = dict[str, Tensor]


def gpt2(**options: Any) -> Any:
    """GPT-2 with one layer. Its input and output embeddings are tied."""
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": VOCABULARY, "n_positions": 16}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2, **options))


def mixtral(num_experts: int = 4, **options: Any) -> Any:
    """Mixtral with one layer."""
    torch.manual_seed(0)
    sizes = {**SIZES, "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16}
    config = hf.MixtralConfig(**sizes, num_local_experts=num_experts, num_experts_per_tok=2, **options)
    return hf.MixtralForCausalLM(config)


def lines(number: int = 12, length: int = 9, start: int = 0) -> list[Example]:
    """Random tokens of 4 to ``length`` places, padded on the right."""
    found = []
    for seed in range(start, start + number):
        generator = torch.Generator().manual_seed(seed)
        known = int(torch.randint(4, length + 1, (1,), generator=generator))
        mask = (torch.arange(length) < known).long()
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator) * mask
        found.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return found


def trainer(
    model: Any, folder: Path, *callbacks: Any, cls: Any = transformers.Trainer, parts: Any = None, **arguments: Any
) -> Any:
    """A Trainer for three batches of four lines; ``parts`` are its arguments, and ``arguments`` the training's."""
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
    short = {"num_train_epochs": 1, "per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": 1e-3}
    args = hf.TrainingArguments(output_dir=str(folder), **{**quiet, **short, **arguments})
    return cls(model=model, args=args, callbacks=list(callbacks), **{"train_dataset": lines(), **(parts or {})})


def losses(run: Any) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def steps_of(run: Any, key: str) -> list[int]:
    return [entry["step"] for entry in run.state.log_history if key in entry]


QUICK: dict[str, Any] = {"num_eigenvalues": 1, "max_probes": 8, "trace_tolerance": 0.9, "density": False}

# parameters with few products
NORM = {"gpt2": "transformer.ln_f", "mixtral": "model.norm", "classifier": "head.router"}


def sharpness(**options: Any) -> SharpnessCallback:
    """Sharpness on two batches of four lines; by default of the last norm of GPT-2."""
    sizes = {"num_samples": 8, "batch_size": 4, "params": [NORM["gpt2"]]}
    return SharpnessCallback(**{"splits": ["train"], "on_error": "raise", **sizes, **QUICK, **options})


def utilization(**options: Any) -> ExpertUtilizationCallback:
    quick = {"num_permutations": 0, "num_examples": 0, "batch_size": 4, "warn": False}
    return ExpertUtilizationCallback(**{"splits": ["train"], "on_error": "raise", **quick, **options})


def sample(examples: Sequence[Example], number: int, size: int, seed: int = 0) -> list[Example]:
    """The batches that an analysis draws."""
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))[:number].tolist()
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    return [{key: torch.stack([examples[at][key] for at in batch]) for key in examples[0]} for batch in batches]
