"""The embedded dataset: textured shapes on textured ground, rendered once to JPEGs and COCO json.

    unlabeled/*.jpg                          for pretraining
    objects/{train,val}/<class>/*.jpg        one object each, for probing
    scenes/{train,val}/*.jpg                 1 to 4 objects, for detection
    scenes/annotations/instances_{train,val}.json
    dataset.json                             version, seed, classes, counts

Classes differ only in their outlines: colours, textures, sizes and rotations are drawn from the same distributions for
every class. The background and the clutter on it have the same kinds of colours and textures.
"""

from shapes.cache import ensure_rendered
from shapes.outlines import CLASSES
from shapes.recipe import Recipe

__all__ = ["CLASSES", "Recipe", "ensure_rendered"]
