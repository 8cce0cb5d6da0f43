"""The networks of the paper and, under one `create_model`, those of torchvision and timm."""

from models.factory import create_model, list_models
from models.pretrained import load_weights

__all__ = ["create_model", "list_models", "load_weights"]
