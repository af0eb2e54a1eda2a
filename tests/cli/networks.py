"""What the commands are given in their tests: small networks, some of which are not what they should be."""

import torch
from torch import nn

import tokenexit_torch as tet
from tests.torch import models
from tokenexit import schedule
from tokenexit_cli import Network

PLAN = schedule.neighbours(radius={2: 1, 4: 0}, threshold=0.3)
SHOWN = {"size": (32, 48), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}
COLOURS = ((0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255), (250, 200, 100))


def head(classes: int = models.CLASSES) -> nn.Module:
    torch.manual_seed(2)
    made = nn.Linear(32, classes)
    with torch.no_grad():
        made.weight.mul_(12)
    return made


def decoder() -> nn.Module:
    torch.manual_seed(3)
    return nn.Conv2d(32, 3, 1)


def wrapped() -> Network:
    return Network(models.wrapped(models.plain_host, PLAN, after=(2, 4)), **SHOWN)


def other() -> Network:
    model = models.wrapped(models.plain_host, PLAN, after=(2, 4))
    with torch.no_grad():
        next(model.exit_heads.parameters()).add_(1)
    return Network(model, **SHOWN)


def coloured() -> Network:
    names = ("sky", "road", "tree", "car", "pole")
    return Network(wrapped().model, **SHOWN, palette=COLOURS, classes=names)


class Summing(nn.Module):
    def __init__(self):
        super().__init__()
        self.last = decoder()

    def forward(self, maps):
        return self.last(sum(maps))


def bare() -> Network:
    return Network(models.plain_host(), head=head(), **SHOWN)


def decoding() -> Network:
    return Network(models.plain_host(), decoder=Summing(), taps=(3, 6), **SHOWN)


def merging() -> Network:
    return Network(tet.wrap(models.plain_host(), schedule.merged(alike={1: 0.9}), decoder=decoder()), **SHOWN)


def many() -> Network:
    return Network(tet.wrap(models.plain_host(), schedule.dense(after=(2,)), head=head(300)), **SHOWN)


def cut(picture):
    """Some pictures are shown in another size than others."""
    size = (48, 32) if picture.width > 50 else (32, 32)
    small = torch.tensor(list(picture.resize(size).tobytes())).reshape(size[1], size[0], 3)
    return small.permute(2, 0, 1) / 255


def prepared() -> Network:
    return Network(wrapped().model, preprocess=cut)


def badly_prepared() -> Network:
    return Network(wrapped().model, preprocess=lambda picture: torch.zeros(1, 32, 32))


def drawn_anew() -> Network:
    network = wrapped()
    with torch.no_grad():
        next(network.model.exit_heads.parameters()).copy_(
            torch.rand(1, generator=torch.Generator().manual_seed(ANEW[0]))
        )
    ANEW[0] += 1
    return network


ANEW = [0]


def mistitled() -> Network:
    return Network(wrapped().model, **SHOWN, classes=("sky", "road"))


def gated() -> Network:
    return Network(tet.wrap_gates(models.plain_host(), schedule.svit(after=(3,))), **SHOWN)


def headed_twice() -> Network:
    return Network(wrapped().model, head=head(), **SHOWN)


class Named(nn.Module):
    def forward(self, maps):
        return {"map": maps}


def undecided() -> Network:
    return Network(tet.wrap(models.plain_host(), schedule.merged(alike={1: 0.9}), decoder=Named()), **SHOWN)
