"""A small VGG16 of the same form, for the tests: torchvision's class with fewer channels and smaller dense layers.

Importing it is enough; sitecustomize.py does so in scripts that run as separate processes. Features stay
(512, 7, 7) and the last layer Linear(4096, 1000), so that every result has its shape; the file of 553 MB becomes one
of 25 MB.
"""
import contextlib

from torch import nn
from torchvision.models import vgg

CHANNELS = [8, 8, "M", 16, 16, "M", 16, 16, 16, "M", 32, 32, 32, "M", 32, 32, 512, "M"]
REAL = (list(vgg.cfgs["D"]), vgg.VGG.__init__)


def small_init(self, features, num_classes=1000, **_):
    nn.Module.__init__(self)
    self.features = features
    self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
    self.classifier = nn.Sequential(
        nn.Linear(25088, 64), nn.ReLU(inplace=True), nn.Dropout(),
        nn.Linear(64, 4096), nn.ReLU(inplace=True), nn.Dropout(),
        nn.Linear(4096, num_classes))
    for layer in self.features:
        if isinstance(layer, nn.Conv2d):  # as torchvision does, so that what comes out is neither 0 nor huge
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


def use(channels, init):
    """Make torchvision build VGG16 with these channels and this initializer from now on."""
    vgg.cfgs["D"][:] = channels
    vgg.VGG.__init__ = init


@contextlib.contextmanager
def real():
    """The real VGG16 for a while."""
    use(*REAL)
    try:
        yield
    finally:
        use(CHANNELS, small_init)


use(CHANNELS, small_init)
