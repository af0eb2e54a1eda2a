"""The command line: `tokenexit COMMAND mine:build ...`, or `python -m tokenexit_cli`.

    from tokenexit_cli import Network

    def build():    # in mine.py
        return Network(vit, head=head, size=(512, 512), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

    tokenexit segment mine:build --images PHOTOS --out LABELS --exits EXITS

It stands on the PyTorch adapter, and imports it only when a command runs a network.
"""

from tokenexit_cli.network import Network

__all__ = ["Network"]
