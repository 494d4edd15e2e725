"""Lightning components of a classifier: module, backbones and data modules."""

from moe_heads.lightning_modules.backbones import CifarResNet, DigitsCNN, ResNet18Cifar, build_backbone
from moe_heads.lightning_modules.cifar10 import CIFAR10DataModule
from moe_heads.lightning_modules.classifier import MoEClassifier
from moe_heads.lightning_modules.data import ImageDataModule
from moe_heads.lightning_modules.digits import DigitsDataModule
from moe_heads.lightning_modules.fast_cnn import FastCNN
from moe_heads.lightning_modules.feature_extractors import FeatureExtractor, TimmBackbone, TorchvisionBackbone
from moe_heads.lightning_modules.image_folder import ImageFolderDataModule
from moe_heads.lightning_modules.images import CropBorder, ImageFiles, ImageTransform, LabeledImages
from moe_heads.lightning_modules.precision import fastest_precision
from moe_heads.lightning_modules.random_states import RandomStates
from moe_heads.lightning_modules.schedules import Schedule

__all__ = [
    "CIFAR10DataModule",
    "CifarResNet",
    "CropBorder",
    "DigitsCNN",
    "DigitsDataModule",
    "FastCNN",
    "FeatureExtractor",
    "ImageDataModule",
    "ImageFiles",
    "ImageFolderDataModule",
    "ImageTransform",
    "LabeledImages",
    "MoEClassifier",
    "RandomStates",
    "ResNet18Cifar",
    "Schedule",
    "TimmBackbone",
    "TorchvisionBackbone",
    "build_backbone",
    "fastest_precision",
]
