"""Hosts: what a wrapped vision transformer offers, for every model that is known."""

from tokenexit_torch.hosts.decoding import DecodingHost
from tokenexit_torch.hosts.eomt_dpt import TransformersDPT, TransformersEoMT
from tokenexit_torch.hosts.protocol import Embedded, Host
from tokenexit_torch.hosts.registry import decoding_host_of, host_of
from tokenexit_torch.hosts.timm import TimmEva, TimmViT
from tokenexit_torch.hosts.torchvision import TorchvisionViT
from tokenexit_torch.hosts.transformers import TransformersViT

__all__ = [
    "DecodingHost",
    "Embedded",
    "Host",
    "TimmEva",
    "TimmViT",
    "TorchvisionViT",
    "TransformersDPT",
    "TransformersEoMT",
    "TransformersViT",
    "decoding_host_of",
    "host_of",
]
