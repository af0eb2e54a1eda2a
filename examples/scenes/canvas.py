"""What a scene is painted on: a camera, a light, and a canvas that remembers which surface every pixel shows.

Painting goes from far to near and only ever writes surface numbers. Colour, label and texture are looked up from the
numbers afterwards, once for the whole picture (`shade.py`), so that what is hidden costs nothing.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image, ImageDraw

CLASSES = ("sky", "road", "building", "tree", "car", "person", "pole")
SKY, ROAD, BUILDING, TREE, CAR, PERSON, POLE = range(len(CLASSES))

NEAR = 1.2  # metres: nothing closer to the camera is painted
NUMBERS = 10  # material-specific numbers that a surface can carry

Colour = Float[np.ndarray, " 3"]


class Material(enum.IntEnum):
    """How a surface gets its texture."""

    PLAIN = 0
    SKY = 1
    GROUND = 2
    SIDE = 3  # a facade along the street: the plane x = numbers[0]
    FRONT = 4  # a facade across the street: the plane z = numbers[0]
    CROWN = 5


@dataclass(frozen=True)
class Camera:
    """A pinhole camera that looks along +z; x points right, y up, the ground is y = 0, lengths are in metres.

    Attributes:
        height: Rows of the picture.
        width: Columns of the picture.
        focal: Focal length in pixels.
        centre: The vanishing point's column.
        horizon: The vanishing point's row.
        eye: Height of the camera above the ground.
    """

    height: int
    width: int
    focal: float
    centre: float
    horizon: float
    eye: float

    def project(self, points: Float[np.ndarray, "points 3"]) -> Float[np.ndarray, "points 2"]:
        """The pixel (column, row) of each world point; what is nearer than `NEAR` is moved there."""
        scale = self.focal / np.maximum(points[:, 2], NEAR)
        return np.stack((self.centre + points[:, 0] * scale, self.horizon + (self.eye - points[:, 1]) * scale), axis=1)


@dataclass(frozen=True)
class Light:
    """The light of one scene; colours are RGB in 0..1.

    Attributes:
        ambient: What reaches every surface.
        sun: What reaches a surface that faces the sun, on top.
        towards_sun: Unit vector.
        zenith: The sky overhead.
        skyline: The sky, and the haze, at the horizon.
        haze: Share of the haze gained per metre.
        evening: 0 by day, 1 when the lamps are on.
        clouds: Share of the sky that is covered.
    """

    ambient: Colour
    sun: Colour
    towards_sun: Float[np.ndarray, " 3"]
    zenith: Colour
    skyline: Colour
    haze: float
    evening: float
    clouds: float

    @property
    def sunny(self) -> bool:
        """Whether things throw shadows."""
        return float(self.sun[0]) > 0.1

    def on(self, normal: Sequence[float] | np.ndarray) -> Colour:
        """The light on a surface with this unit normal; the sky lights what looks up more than what looks down."""
        facing = max(0.0, sum(n * s for n, s in zip(normal, self.towards_sun, strict=True)))
        return self.ambient * (0.85 + 0.15 * normal[1]) + self.sun * facing


@dataclass
class Canvas:
    """Surface numbers, shadows on the ground and leaf relief, all of the picture's size.

    Attributes:
        camera: Where the picture is taken from.
        light: What lights it.
        relief: Brightness of the foliage at each pixel; read only where a crown is seen.
        surfaces: One row per surface: category, material, red, green, blue, depth, thing, then `NUMBERS` numbers.
        things: Cars and people painted so far; a surface's thing is 0 for everything else.
    """

    camera: Camera
    light: Light
    surfaces: list[tuple[float, ...]] = field(default_factory=list)
    things: int = 0

    def __post_init__(self) -> None:
        size = (self.camera.width, self.camera.height)
        self._seen = Image.new("I", size)
        self._shadow = Image.new("L", size)
        self._pen = ImageDraw.Draw(self._seen)
        self._shadow_pen = ImageDraw.Draw(self._shadow)
        self.relief = np.ones((self.camera.height, self.camera.width), np.float32)

    def surface(
        self,
        category: int,
        colour: Sequence[float] | Colour,
        depth: float,
        *,
        material: Material = Material.PLAIN,
        numbers: tuple[float, ...] = (),
        thing: int = 0,
    ) -> int:
        """Registers a surface, in its lit colour, and returns its number."""
        padding = (0.0,) * (NUMBERS - len(numbers))
        self.surfaces.append((category, material, *colour, depth, thing, *numbers, *padding))
        return len(self.surfaces) - 1

    def polygon(self, corners: Float[np.ndarray, "corners 2"], surface: int) -> None:
        """Paints a polygon given in pixels."""
        self._pen.polygon(corners.ravel().tolist(), fill=surface)

    def ellipse(self, column: float, row: float, radius: tuple[float, float], surface: int) -> None:
        """Paints an axis-aligned ellipse given in pixels; radius is (horizontal, vertical)."""
        self._pen.ellipse((column - radius[0], row - radius[1], column + radius[0], row + radius[1]), fill=surface)

    def stamp(self, mask: Bool[np.ndarray, "rows columns"], column: int, row: int, surface: int) -> None:
        """Paints the true pixels of a mask whose upper left corner is at (column, row)."""
        self._seen.paste(surface, (column, row), Image.fromarray(mask))

    def shade_ground(self, points: Float[np.ndarray, "points 3"], strength: float) -> None:
        """Darkens the polygon that `points` throw on the ground, straight down if strength is 1, else along the sun."""
        slant = 0.0 if strength == 1.0 else 1.0 / self.light.towards_sun[1]
        fallen = points - points[:, 1:2] * slant * self.light.towards_sun
        fallen[:, 1] = 0.0
        self._shadow_pen.polygon(self.camera.project(fallen).ravel().tolist(), fill=int(255 * strength))

    def seen(self) -> Int[np.ndarray, "height width"]:
        """The number of the surface that each pixel shows."""
        return np.asarray(self._seen)

    def shadow(self) -> Float[np.ndarray, "height width"]:
        """How much of the light the ground at each pixel lacks, in 0..1."""
        return np.asarray(self._shadow, np.float32) / 255

    def table(self) -> Float[np.ndarray, "surfaces columns"]:
        """All surfaces as one array."""
        return np.array(self.surfaces, np.float32)
