"""Random changes of training images, of pictures and of volumes, drawn apart from being applied.

`sample` draws numbers from a generator, one set for each image of a batch; `apply` is a function of images, masks and
those numbers. So the same seed gives the same images, a mask moves exactly as its image does, and a test can apply
numbers of its own. The generator is the training's own and never that of privacy noise.
"""

from fedmed.imaging.augment.apply import apply
from fedmed.imaging.augment.parameters import NAMES, Parameters, sample

__all__ = ["NAMES", "Parameters", "apply", "sample"]
