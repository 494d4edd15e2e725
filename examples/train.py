"""Train any head on any data from a YAML file with LightningCLI.

    python examples/train.py fit --config examples/configs/sparse_moe.yaml
    python examples/train.py fit --config examples/configs/soft_moe.yaml --trainer.max_epochs 5

Needs the extra `cli`: pip install "moe-heads[cli]".
"""

from lightning.pytorch.cli import ArgsType, LightningCLI

from moe_heads.lightning_modules import ImageDataModule, MoEClassifier


def main(args: ArgsType = None) -> LightningCLI:
    """Run the command line, or ``args`` in its place."""
    return LightningCLI(
        MoEClassifier, ImageDataModule, subclass_mode_data=True, save_config_kwargs={"overwrite": True}, args=args
    )


if __name__ == "__main__":
    main()
