"""The counts and sizes of the dataset. `VERSION` changes whenever the rendered pixels or annotations do."""

from dataclasses import dataclass, replace

VERSION = "3"
COUNTS = ("unlabeled", "objects_train", "objects_val", "scenes_train", "scenes_val")


@dataclass(frozen=True)
class Recipe:
    """Counts and sizes of a rendering; the default is the dataset that the project's numbers refer to."""

    unlabeled: int = 6000
    objects_train: int = 200  # per class
    objects_val: int = 75  # per class
    scenes_train: int = 600
    scenes_val: int = 200
    object_side: int = 96  # pixels, of the square pictures in `unlabeled` and `objects`
    scene_sides: tuple[int, int] = (160, 192)  # pixels, the range of a scene's width and height
    scene_objects: int = 4  # the most in one scene

    def __post_init__(self) -> None:
        if self.scene_sides[0] < 48:
            raise ValueError(f"scene_sides is {self.scene_sides}: below 48 pixels, objects are too small for polygons")

    def scaled(self, fraction: float) -> "Recipe":
        """The same recipe with this fraction of the pictures, at least one of each part and class."""
        return replace(self, **{name: max(1, round(getattr(self, name) * fraction)) for name in COUNTS})


DEFAULT_RECIPE = Recipe()
