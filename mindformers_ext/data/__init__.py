"""Importing this package makes MindFormers read Megatron data with our loader."""

from mindformers_ext.data.megatron_dataloader import BlendedMegatronDatasetDataLoader

__all__ = ["BlendedMegatronDatasetDataLoader"]
