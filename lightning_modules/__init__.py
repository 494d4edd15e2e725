"""The Lightning side of a classifier: module, backbones and data."""

from moe_heads.lightning_modules.backbones import CifarResNet, DigitsCNN, ResNet18Cifar, build_backbone
from moe_heads.lightning_modules.cifar10 import CIFAR10DataModule
from moe_heads.lightning_modules.classifier import MoEClassifier
from moe_heads.lightning_modules.data import ImageDataModule
from moe_heads.lightning_modules.digits import DigitsDataModule
from moe_heads.lightning_modules.feature_extractors import FeatureExtractor, TimmBackbone, TorchvisionBackbone
from moe_heads.lightning_modules.image_folder import ImageFolderDataModule
from moe_heads.lightning_modules.images import ImageFiles, ImageTransform, LabelledImages

__all__ = [
    "CIFAR10DataModule",
    "CifarResNet",
    "DigitsCNN",
    "DigitsDataModule",
    "FeatureExtractor",
    "ImageDataModule",
    "ImageFiles",
    "ImageFolderDataModule",
    "ImageTransform",
    "LabelledImages",
    "MoEClassifier",
    "ResNet18Cifar",
    "TimmBackbone",
    "TorchvisionBackbone",
    "build_backbone",
]
