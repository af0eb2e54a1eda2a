"""Lays out a street and paints its things, far to near: the houses, then everything that stands between them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Float
from PIL import Image

from examples.scenes.canvas import (
    BUILDING,
    CAR,
    NEAR,
    PERSON,
    POLE,
    ROAD,
    SKY,
    TREE,
    Camera,
    Canvas,
    Colour,
    Light,
    Material,
)

SUN_SHADOW = 0.8
LEFT, RIGHT, BACK, UP = (1.0, 0.0, 0.0), (-1.0, 0.0, 0.0), (0.0, 0.0, -1.0), (0.0, 1.0, 0.0)

WALLS = np.array([
    (0.72, 0.66, 0.56), (0.60, 0.35, 0.27), (0.78, 0.75, 0.70), (0.52, 0.50, 0.49), (0.80, 0.70, 0.50),
    (0.66, 0.55, 0.48), (0.48, 0.30, 0.26), (0.62, 0.66, 0.70), (0.74, 0.60, 0.55), (0.58, 0.62, 0.55),
])  # fmt: skip
ROOFS = np.array([(0.45, 0.22, 0.17), (0.30, 0.30, 0.33), (0.36, 0.28, 0.24)])
LEAVES = np.array([
    (0.20, 0.34, 0.12), (0.28, 0.40, 0.14), (0.16, 0.28, 0.14), (0.34, 0.40, 0.16), (0.52, 0.36, 0.12),
    (0.50, 0.24, 0.12),
])  # fmt: skip
PAINTS = np.array([
    (0.75, 0.76, 0.77), (0.48, 0.49, 0.51), (0.36, 0.37, 0.39), (0.10, 0.10, 0.11), (0.86, 0.86, 0.85),
    (0.55, 0.10, 0.10), (0.14, 0.24, 0.45), (0.30, 0.36, 0.30), (0.70, 0.55, 0.20), (0.45, 0.45, 0.44),
])  # fmt: skip
TYRE = np.array((0.03, 0.03, 0.035))
WHEEL = 0.34 * np.array([(math.cos(a), math.sin(a)) for a in np.linspace(0, 2 * math.pi, 12, endpoint=False)])  # metres
SKINS = np.array([(0.80, 0.60, 0.48), (0.58, 0.40, 0.30), (0.36, 0.24, 0.18)])

# Outlines of cars from the rear's foot over the roof to the front's foot, as shares of length and height; then which
# of the segments are glass, the side window's outline, and (length, width, height) in metres.
_SALOON = (
    ((0, 0.18), (0.00, 0.58), (0.03, 0.66), (0.15, 0.69), (0.28, 0.97), (0.56, 1.0), (0.73, 0.68), (0.96, 0.56),
     (1.0, 0.46), (1.0, 0.18)),
    (3, 5),
    ((0.22, 0.70), (0.31, 0.92), (0.55, 0.94), (0.67, 0.70)),
    (4.5, 1.8, 1.45),
)  # fmt: skip
_HATCHBACK = (
    ((0, 0.18), (0.00, 0.62), (0.07, 0.94), (0.15, 1.0), (0.56, 1.0), (0.76, 0.66), (0.97, 0.56), (1.0, 0.45),
     (1.0, 0.18)),
    (1, 4),
    ((0.10, 0.66), (0.15, 0.92), (0.54, 0.93), (0.68, 0.68)),
    (4.0, 1.75, 1.5),
)  # fmt: skip
_VAN = (
    ((0, 0.14), (0.00, 0.55), (0.02, 0.92), (0.05, 1.0), (0.72, 1.0), (0.88, 0.58), (0.98, 0.48), (1.0, 0.14)),
    (1, 4),
    ((0.66, 0.60), (0.66, 0.90), (0.74, 0.90), (0.82, 0.60)),
    (5.2, 2.0, 2.2),
)  # fmt: skip
CARS = (_SALOON, _HATCHBACK, _SALOON, (*_HATCHBACK[:3], (4.6, 1.9, 1.75)), _VAN)


@dataclass(frozen=True)
class Layout:
    """The street's plan; x is measured from the camera, in metres.

    Attributes:
        middle: The middle of the road.
        half: Half the road's width.
        lanes: Lanes on the road.
        pavement: Width of each pavement, up to the houses.
        crossing: Distance of the zebra crossing; beyond sight if there is none.
        built: Share of the roadside that is built up.
        green: Trees per 10 m of pavement.
        parked: Share of the kerb taken by parked cars.
    """

    middle: float
    half: float
    lanes: int
    pavement: float
    crossing: float
    built: float
    green: float
    parked: float


def any_camera(generator: np.random.Generator, size: tuple[int, int]) -> Camera:
    """Somewhere between a child's and a van driver's eyes, looking roughly along the street."""
    height, width = size
    return Camera(
        height=height,
        width=width,
        focal=width * generator.uniform(0.6, 1.15),
        centre=width * generator.uniform(0.25, 0.75),
        horizon=height * generator.uniform(0.38, 0.6),
        eye=generator.uniform(1.2, 2.4),
    )


def any_light(generator: np.random.Generator) -> Light:
    """A clear day, a grey one, the hour before sunset, or dusk."""
    mood = generator.choice(4, p=(0.42, 0.25, 0.21, 0.12))
    zenith = np.array([(0.24, 0.44, 0.78), (0.60, 0.63, 0.68), (0.36, 0.46, 0.70), (0.13, 0.16, 0.32)])[mood]
    skyline = np.array([(0.74, 0.84, 0.94), (0.80, 0.81, 0.83), (0.98, 0.78, 0.55), (0.62, 0.45, 0.45)])[mood]
    sun = np.array([(0.92, 0.86, 0.76), (0.05, 0.05, 0.05), (0.95, 0.62, 0.34), (0.0, 0.0, 0.0)])[mood]
    ambient = np.array([(0.40, 0.45, 0.53), (0.76, 0.77, 0.79), (0.48, 0.45, 0.50), (0.46, 0.45, 0.54)])[mood]
    lowest, highest = ((0.5, 1.1), (0.8, 1.2), (0.16, 0.4), (0.3, 0.4))[mood]
    fewest, most = ((0.0, 0.7), (0.9, 0.9), (0.1, 0.8), (0.0, 0.6))[mood]
    elevation, azimuth = generator.uniform(lowest, highest), generator.uniform(-math.pi, math.pi)
    level = math.cos(elevation)
    tint = generator.normal(1.0, 0.05, (4, 3))
    return Light(
        ambient=ambient * tint[0],
        sun=sun * tint[1] * generator.uniform(0.75, 1.1),
        towards_sun=np.array((level * math.sin(azimuth), math.sin(elevation), level * math.cos(azimuth))),
        zenith=zenith * tint[2],
        skyline=skyline * tint[3],
        haze=float(generator.choice((0.001, 0.003, 0.008), p=(0.4, 0.4, 0.2))),
        evening=float(mood == 3),
        clouds=generator.uniform(fewest, most),
    )


def any_layout(generator: np.random.Generator) -> Layout:
    """A town street, a suburb or an avenue; the camera is somewhere on the road or at its edge."""
    lanes = int(generator.integers(2, 5))
    half = lanes * generator.uniform(2.9, 3.5) / 2
    built, green = ((0.95, 0.25), (0.6, 0.7), (0.25, 1.0))[generator.choice(3, p=(0.5, 0.3, 0.2))]
    return Layout(
        middle=generator.uniform(-1.0, 1.0) * (half + 0.5),
        half=half,
        lanes=lanes,
        pavement=generator.uniform(2.5, 6.5),
        crossing=generator.uniform(6.0, 30.0) if generator.random() < 0.35 else math.inf,
        built=built,
        green=green * generator.uniform(0.3, 1.2),
        parked=generator.uniform(0.0, 0.6),
    )


def paint(canvas: Canvas, layout: Layout, generator: np.random.Generator) -> None:
    """Paints one street."""
    _backdrop(canvas, layout, generator)
    for side in (-1, 1):
        _row(canvas, layout, side, generator)
    for _, thing in sorted(_things(canvas, layout, generator), key=lambda entry: -entry[0]):
        thing()


# Houses ---------------------------------------------------------------------------------------------------------------


def _backdrop(canvas: Canvas, layout: Layout, generator: np.random.Generator) -> None:
    """Sky and ground, then what closes the view at the street's end: far houses and trees."""
    camera = canvas.camera
    canvas.surface(SKY, (0.0, 0.0, 0.0), 0.0, material=Material.SKY)
    ground = canvas.surface(ROAD, (0.0, 0.0, 0.0), 0.0, material=Material.GROUND)
    below = (camera.height - camera.horizon) / 2 + 1
    canvas.polygon(_box(camera.width / 2, camera.horizon + below, camera.width, below), ground)
    end = generator.uniform(50.0, 170.0)
    reach = 0.7 * end * camera.width / camera.focal
    middle = end * (camera.width / 2 - camera.centre) / camera.focal
    for x in np.sort(generator.uniform(middle - reach, middle + reach, int(4 + 14 * layout.built))):
        far = end + generator.uniform(0.0, 30.0)
        wall = _wall(generator)
        _front(canvas, (x, x + generator.uniform(8.0, 24.0)), far, generator.uniform(5.0, 22.0), wall, generator)
    for x in generator.uniform(middle - reach, middle + reach, int(4 + 6 * layout.green)):
        _tree(canvas, x, end - 2.0, generator)


def _row(canvas: Canvas, layout: Layout, side: int, generator: np.random.Generator) -> None:
    """The houses on one side (-1 left, 1 right), with gaps that show hedges and trees."""
    line = layout.middle + side * (layout.half + layout.pavement)
    style = generator.uniform(4.0, 18.0)
    edges = NEAR + np.concatenate(([0.0], np.cumsum(generator.uniform(6.0, 22.0, 9))))
    for near, far in zip(edges[-2::-1], edges[:0:-1], strict=True):
        setback = line + side * generator.choice((0.0, 0.0, generator.uniform(0.0, 4.0)))
        if generator.random() < layout.built:
            _house(canvas, setback, side, (near, far), style * generator.uniform(0.6, 1.5), generator)
        else:
            for z in np.sort(generator.uniform(near + 3, far + 3, 2))[::-1]:
                _tree(canvas, line + side * generator.uniform(0.5, 9.0), z, generator)


def _house(
    canvas: Canvas, x: float, side: int, span: tuple[float, float], height: float, generator: np.random.Generator
) -> None:
    """A block along the street from span[0] to span[1]: its end wall, its facade, sometimes a pitched roof."""
    near, far = span
    wall, deep = _wall(generator), side * generator.uniform(7.0, 12.0)
    roof = ROOFS[generator.integers(len(ROOFS))] * generator.uniform(0.8, 1.2)
    pitched = generator.random() < (0.6 if height < 11 else 0.15)
    ridge = height + generator.uniform(2.0, 4.0)
    if pitched:
        gable = [(x, height, near), (x + deep / 2, ridge, near), (x + deep, height, near)]
        slope = [(x, height, near), (x + deep / 2, ridge, near), (x + deep / 2, ridge, far), (x, height, far)]
        normal = np.array((-side * (ridge - height), abs(deep) / 2, 0.0))
        lit = canvas.light.on(normal / np.linalg.norm(normal))
        _paint_polygon(canvas, slope, canvas.surface(BUILDING, roof * lit, (near + far) / 2))
        _paint_polygon(canvas, gable, canvas.surface(BUILDING, wall * canvas.light.on(BACK), near))
    _front(canvas, (min(x, x + deep), max(x, x + deep)), near, height, wall, generator)
    facade = canvas.surface(
        BUILDING,
        wall * canvas.light.on(LEFT if side < 0 else RIGHT),
        (near + far) / 2,
        material=Material.SIDE,
        numbers=(x, *_openings(height, near, generator)),
    )
    corners = np.array([(x, 0.0, near), (x, height, near), (x, height, far), (x, 0.0, far)])
    canvas.polygon(canvas.camera.project(corners), facade)
    if canvas.light.sunny:
        end = np.array([(x, 0.0, near), (x, height, near), (x + deep, height, near), (x + deep, 0.0, near)])
        canvas.shade_ground(corners, SUN_SHADOW)
        canvas.shade_ground(end, SUN_SHADOW)


def _front(
    canvas: Canvas, span: tuple[float, float], z: float, height: float, wall: Colour, generator: np.random.Generator
) -> None:
    """A wall across the view, from span[0] to span[1]."""
    left, right = span
    facade = canvas.surface(
        BUILDING,
        wall * canvas.light.on(BACK),
        z,
        material=Material.FRONT,
        numbers=(z, *_openings(height, left, generator)),
    )
    _paint_polygon(canvas, [(left, 0, z), (left, height, z), (right, height, z), (right, 0, z)], facade)


def _wall(generator: np.random.Generator) -> Colour:
    return np.clip(WALLS[generator.integers(len(WALLS))] * generator.normal(1.0, 0.06, 3), 0.1, 0.9)


def _openings(height: float, start: float, generator: np.random.Generator) -> tuple[float, ...]:
    """A facade's windows: start, top, storey height, spacing, width, height, shop front, seed, brick, frame."""
    spacing = generator.uniform(1.8, 4.0)
    office = generator.random() < 0.2
    return (
        start,
        height - 0.7,
        generator.uniform(2.8, 3.6),
        spacing,
        spacing * (0.85 if office else generator.uniform(0.3, 0.55)),
        1.9 if office else generator.uniform(1.2, 1.8),
        float(height > 7 and generator.random() < 0.6),
        generator.uniform(0.0, 200.0),
        generator.uniform(0.03, 0.16),
    )


# Trees, poles, people -------------------------------------------------------------------------------------------------


def _tree(canvas: Canvas, x: float, z: float, generator: np.random.Generator) -> None:
    """A trunk under a ragged crown: round, or pointed like a fir."""
    camera, light = canvas.camera, canvas.light
    pointed = generator.random() < 0.15
    radius = generator.uniform(1.3, 3.2)
    bole = 0.6 if pointed else generator.uniform(1.6, 3.2)
    tall = radius * (generator.uniform(1.8, 2.6) if pointed else generator.uniform(0.8, 1.3))
    scale = camera.focal / z
    column, foot = camera.centre + x * scale, camera.horizon + camera.eye * scale
    thick = max(0.5, generator.uniform(0.1, 0.22) * scale)
    bark = canvas.surface(TREE, np.array((0.30, 0.24, 0.19)) * light.on(BACK), z)
    top = foot - (bole + tall) * scale
    trunk = column + thick * np.array((-1.0, -0.6, 0.6, 1.0))
    canvas.polygon(np.stack((trunk, (foot, top, top, foot)), axis=1), bark)
    leaves = LEAVES[generator.choice(len(LEAVES), p=(0.3, 0.25, 0.2, 0.15, 0.06, 0.04))]
    leaves = leaves * generator.normal(1.0, 0.08, 3)
    crown = canvas.surface(TREE, leaves * (light.ambient + 0.8 * light.sun), z, material=Material.CROWN)
    _crown(canvas, (column, top), (radius * scale, tall * scale), pointed, crown, generator)
    angle = np.linspace(0.0, 2 * np.pi, 10, endpoint=False)
    round_ = np.stack((x + radius * np.cos(angle), np.full(10, bole + tall), z + radius * np.sin(angle)), axis=1)
    if light.sunny:
        canvas.shade_ground(round_, SUN_SHADOW)


def _crown(
    canvas: Canvas,
    centre: tuple[float, float],
    radius: tuple[float, float],
    pointed: bool,
    surface: int,
    generator: np.random.Generator,
) -> None:
    """Stamps a crown whose edge, holes and relief come from two scales of noise."""
    camera, sun = canvas.camera, canvas.light.towards_sun
    left, right = (int(np.clip(centre[0] + s * 1.3 * radius[0], 0, camera.width)) for s in (-1, 1))
    top, bottom = (int(np.clip(centre[1] + s * 1.3 * radius[1], 0, camera.height)) for s in (-1, 1))
    if right <= left or bottom <= top:
        return
    across = ((np.arange(left, right, dtype=np.float32) - centre[0]) / radius[0])[None, :]
    down = ((np.arange(top, bottom, dtype=np.float32) - centre[1]) / radius[1])[:, None]
    box = (right - left, bottom - top)
    lumps = noise(generator, box, (6, 6))
    leaves = noise(generator, box, (box[0] // 3 + 2, box[1] // 3 + 2))
    reach = np.abs(across) * 2 / (down + 1.05).clip(0.05) if pointed else across**2
    inside = reach + down**2 + 0.9 * lumps + 0.9 * leaves < 1.0
    canvas.stamp(inside, left, top, surface)
    lit = 0.95 + 0.9 * leaves + 0.7 * lumps + 0.3 * (sun[0] * across - (0.6 + 0.4 * sun[1]) * down)
    np.copyto(canvas.relief[top:bottom, left:right], lit.astype(np.float32), where=inside)


def noise(
    generator: np.random.Generator, size: tuple[int, int], cells: tuple[int, int]
) -> Float[np.ndarray, "rows columns"]:
    """Smooth noise in about -0.5..0.5, `size` (columns, rows) pixels large, with `cells` (columns, rows) bumps."""
    bumps = generator.random((cells[1], cells[0]), np.float32) - 0.5
    return np.asarray(Image.fromarray(bumps).resize(size, Image.Resampling.BICUBIC))


def _pole(canvas: Canvas, x: float, z: float, side: int, generator: np.random.Generator) -> None:
    """A lamp post, a traffic light or a sign; side is the side of the road it stands on."""
    camera, light = canvas.camera, canvas.light
    scale = camera.focal / z
    column, foot = camera.centre + x * scale, camera.horizon + camera.eye * scale
    kind = generator.choice(("lamp", "sign", "signal", "post"), p=(0.4, 0.3, 0.15, 0.15))
    tall = {"lamp": 7.0, "sign": 2.8, "signal": 3.4, "post": 8.0}[kind] * generator.uniform(0.8, 1.2)
    metal = np.array((0.34, 0.36, 0.36)) * generator.uniform(0.4, 1.6)
    shaft = canvas.surface(POLE, metal * light.on(BACK), z)
    half = max(0.45, generator.uniform(0.05, 0.1) * scale)
    head = foot - tall * scale
    canvas.polygon(_box(column, (foot + head) / 2, half, (foot - head) / 2), shaft)
    if kind == "lamp":
        reach = -side * generator.uniform(0.8, 2.0) * scale
        canvas.polygon(_box(column + reach / 2, head, abs(reach) / 2, max(0.4, 0.05 * scale)), shaft)
        glow = (1.3, 1.15, 0.8) if light.evening else metal * light.on(UP) * 1.3
        lamp = canvas.surface(POLE, glow, z)
        canvas.polygon(_box(column + reach, head + 0.08 * scale, 0.35 * scale, max(0.6, 0.1 * scale)), lamp)
    if kind == "sign":
        paint_ = np.array([(0.75, 0.12, 0.12), (0.15, 0.3, 0.65), (0.85, 0.85, 0.85), (0.8, 0.65, 0.1)])
        board = canvas.surface(POLE, paint_[generator.integers(4)] * light.on(BACK), z)
        face = canvas.surface(POLE, np.array((0.85, 0.85, 0.85)) * light.on(BACK), z)
        canvas.ellipse(column, head, (0.36 * scale, 0.36 * scale), board)
        canvas.ellipse(column, head, (0.2 * scale, 0.1 * scale), face)
    if kind == "signal":
        case = canvas.surface(POLE, np.array((0.12, 0.13, 0.13)) * light.on(BACK), z)
        canvas.polygon(_box(column, head, 0.18 * scale, 0.5 * scale), case)
        which = int(generator.integers(-1, 2))
        lit = canvas.surface(POLE, ((1.0, 0.15, 0.1), (1.0, 0.7, 0.1), (0.2, 0.9, 0.5))[which + 1], z)
        canvas.ellipse(column, head + 0.3 * which * scale, (0.11 * scale, 0.11 * scale), lit)
    if light.sunny:
        foot_ = np.array([(x - 0.08, 0.0, z), (x + 0.08, 0.0, z), (x + 0.08, tall, z), (x - 0.08, tall, z)])
        canvas.shade_ground(foot_, SUN_SHADOW)


def _person(canvas: Canvas, x: float, z: float, generator: np.random.Generator) -> None:
    """Someone who stands or walks: legs, coat, arms, head, hair."""
    camera, light = canvas.camera, canvas.light
    tall = generator.normal(1.7, 0.1) * generator.choice((1.0, 0.68), p=(0.88, 0.12))
    unit = tall * camera.focal / z / 100  # one hundredth of the person, in pixels
    column, foot = camera.centre + x * camera.focal / z, camera.horizon + camera.eye * camera.focal / z
    canvas.things += 1
    part = partial(canvas.surface, PERSON, depth=z, thing=canvas.things)
    trousers, coat = generator.uniform(0.06, 0.4, 3), generator.uniform(0.08, 0.75, 3) ** 1.3
    lit, dim = light.on(BACK), light.on(BACK) * 0.75
    skin = SKINS[generator.integers(len(SKINS))]
    stride, broad, swing = generator.uniform(0, 13), generator.uniform(11, 15), generator.uniform(-5, 9)

    def limb(points: list[tuple[float, float]], colour: Colour) -> None:
        canvas.polygon(np.array([(column + u * unit, foot - v * unit) for u, v in points]), part(colour))

    limb([(-7, 48), (1, 48), (2 - stride, 0), (-5 - stride, 0)], trousers * dim)
    limb([(-1, 48), (8, 48), (6 + stride, 0), (-1 + stride, 0)], trousers * lit)
    limb([(-broad + 2, 82), (-broad - swing, 46), (-broad - swing + 4, 45), (-broad + 8, 80)], coat * dim)
    limb([(broad - 2, 82), (broad + swing, 46), (broad + swing - 4, 45), (broad - 8, 80)], coat * dim)
    limb([(-broad + 1, 83), (0, 86), (0, 44), (-broad + 4, 44)], coat * dim)
    limb([(0, 86), (broad - 1, 83), (broad - 4, 44), (0, 44)], coat * lit)
    canvas.ellipse(column, foot - 93.5 * unit, (5.5 * unit, 7 * unit), part(generator.uniform(0.05, 0.4) * skin * lit))
    canvas.ellipse(column + unit, foot - 91.5 * unit, (4.5 * unit, 5.5 * unit), part(skin * lit))
    shape = np.array([(x - 0.25, 0.0, z), (x + 0.25, 0.0, z), (x + 0.2, tall, z), (x - 0.2, tall, z)])
    if light.sunny:
        canvas.shade_ground(shape, SUN_SHADOW)


# Cars -----------------------------------------------------------------------------------------------------------------


def _car(canvas: Canvas, x: float, z: float, yaw: float, generator: np.random.Generator) -> None:
    """A car whose middle is at (x, z) and whose front points along +z, turned by `yaw` radians towards +x.

    It is its outline extruded to its width; faces that look away from the camera are left out.
    """
    light = canvas.light
    outline, glazed, window, (length, width, height) = CARS[generator.integers(len(CARS))]
    paint_ = np.clip(PAINTS[generator.integers(len(PAINTS))] * generator.normal(1.0, 0.05, 3), 0.05, 0.95)
    canvas.things += 1
    part = partial(canvas.surface, CAR, depth=z, thing=canvas.things)
    ahead = np.array((math.sin(yaw), 0.0, math.cos(yaw)))
    right = np.array((math.cos(yaw), 0.0, -math.sin(yaw)))
    glass = 0.06 + generator.uniform(0.1, 0.45) * light.skyline * light.on(UP)

    def place(points: Float[np.ndarray, "points 2"], across: float) -> Float[np.ndarray, "points 2"]:
        """Pixels of points (share of length, share of height) on the right (+1) or left (-1) flank."""
        narrow = 1 - 0.5 * (points[:, 1:] - 0.6).clip(0, 0.4)
        offset = (points[:, :1] - 0.5) * length * ahead + across * narrow * width / 2 * right
        offset[:, 1] = points[:, 1] * height
        return canvas.camera.project(offset + middle)

    middle = np.array((x, 0.0, z))
    _car_shadow(canvas, middle, 0.5 * length * ahead, 0.5 * width * right, 0.9 * height)
    profile, low = np.array(outline), outline[0][1] + 0.05
    wheels = [np.array((axle, 0.34 / height)) + WHEEL / (length, height) for axle in (0.19, 0.81)]
    flanks = {across: place(np.concatenate((profile, window, *wheels)), across) for across in (-1, 1)}
    ends = np.array([(0.0, 0.02), (0.0, low), (1.0, low), (1.0, 0.02)])
    left, right_ = place(ends, -0.96), place(ends, 0.96)
    tyre = part(TYRE)
    for end in (slice(0, 2), slice(2, 4)):
        canvas.polygon(np.concatenate((left[end], right_[end][::-1])), tyre)
    for i in range(len(profile) - 1):
        quad = np.concatenate((flanks[-1][i : i + 2], flanks[1][i : i + 2][::-1]))
        if not _faces_us(quad):
            continue
        along, up = (profile[i + 1] - profile[i]) * (length, height)
        lit = light.on((np.array((0.0, along, 0.0)) - up * ahead) / math.hypot(along, up))
        canvas.polygon(quad, part(paint_ * lit * generator.uniform(0.92, 1.05)))
        if i in glazed:
            canvas.polygon(_within(quad, (0.08, 0.92), (0.06, 0.94)), part(glass))
        if i == 0:
            _face(canvas, quad, (0.62, 0.05, 0.04), part)
        if i == len(profile) - 2:
            _face(canvas, quad[[1, 0, 3, 2]], (0.9, 0.9, 0.85), part)
    for across, flank in flanks.items():
        if across * float(right @ (middle + 0.5 * across * width * right)) >= 0:
            continue  # it looks away from the camera, which is at the origin
        body, pane, rear, front = np.split(flank, np.cumsum((len(profile), len(window), len(WHEEL))))
        lit = light.on(across * right)
        canvas.polygon(body, part(paint_ * lit))
        canvas.polygon(pane, part(glass * 0.8))
        rim = part(np.array((0.4, 0.4, 0.42)) * lit)
        for wheel in (rear, front):
            canvas.polygon(wheel, tyre)
            canvas.polygon(0.6 * wheel + 0.4 * wheel.mean(axis=0), rim)


def _car_shadow(
    canvas: Canvas,
    middle: Float[np.ndarray, " 3"],
    ahead: Float[np.ndarray, " 3"],
    right: Float[np.ndarray, " 3"],
    height: float,
) -> None:
    """What the box around a car throws on the ground, and the dark below it; ahead and right are half its size."""
    base = middle + np.array((-ahead - right, ahead - right, ahead + right, right - ahead))
    if canvas.light.sunny:
        roof = base + np.array((0.0, height, 0.0))
        for i in range(4):
            canvas.shade_ground(np.array((base[i - 1], base[i], roof[i], roof[i - 1])), SUN_SHADOW)
    canvas.shade_ground(middle + 1.08 * (base - middle), 1.0)


def _face(canvas: Canvas, quad: np.ndarray, lamp: tuple[float, float, float], part: Callable[..., int]) -> None:
    """Lamps, plate and bumper on a car's front or rear; quad runs up the left edge and down the right one."""
    lit = canvas.light.on(BACK)
    canvas.polygon(_within(quad, (0.0, 1.0), (0.0, 0.3)), part(np.array((0.12, 0.12, 0.13)) * lit))
    lamps = part(np.array(lamp) * (1.3 if canvas.light.evening else lit))
    for span in ((0.03, 0.22), (0.78, 0.97)):
        canvas.polygon(_within(quad, span, (0.6, 0.88)), lamps)
    canvas.polygon(_within(quad, (0.36, 0.64), (0.36, 0.56)), part(np.array((0.85, 0.85, 0.8)) * lit))


def _within(
    quad: Float[np.ndarray, "4 2"], across: tuple[float, float], up: tuple[float, float]
) -> Float[np.ndarray, "4 2"]:
    """The part of a quad (left foot, left top, right top, right foot) between shares of its width and height."""
    u = np.array((across[0], across[0], across[1], across[1]))[:, None]
    v = np.array((up[0], up[1], up[1], up[0]))[:, None]
    return (1 - u) * ((1 - v) * quad[0] + v * quad[1]) + u * ((1 - v) * quad[3] + v * quad[2])


def _faces_us(quad: Float[np.ndarray, "4 2"]) -> bool:
    """Whether a quad's corners run clockwise as seen: the cross product of its diagonals."""
    (x0, y0), (x1, y1), (x2, y2), (x3, y3) = quad.tolist()
    return (x2 - x0) * (y3 - y1) > (y2 - y0) * (x3 - x1)


def _box(column: float, row: float, half_width: float, half_height: float) -> Float[np.ndarray, "4 2"]:
    signs = np.array([(-1, -1), (-1, 1), (1, 1), (1, -1)])
    return signs * (half_width, half_height) + (column, row)


def _paint_polygon(canvas: Canvas, corners: list[tuple[float, float, float]], surface: int) -> None:
    canvas.polygon(canvas.camera.project(np.array(corners, float)), surface)


# The plan -------------------------------------------------------------------------------------------------------------


def _things(canvas: Canvas, layout: Layout, generator: np.random.Generator) -> list[tuple[float, Callable[[], None]]]:
    """Everything that stands on road and pavement, as (distance, how to paint it)."""
    things: list[tuple[float, Callable[[], None]]] = []

    def add(what: Callable[..., None], x: float, z: float, *more: object) -> None:
        if abs(canvas.camera.focal * x / z) < 1.3 * canvas.camera.width:
            things.append((z, partial(what, canvas, x, z, *more, generator)))

    kerb, lane = layout.half, 2 * layout.half / layout.lanes
    for side in (-1, 1):
        for z in np.arange(generator.uniform(4, 10), 90, generator.uniform(18, 35)):
            add(_pole, layout.middle + side * (kerb + 0.5), z, side)
        for z in generator.uniform(5, 60, generator.poisson(1.0)):
            add(_pole, layout.middle + side * (kerb + generator.uniform(0.3, 1.5)), z, side)
        for z in generator.uniform(5, 80, generator.poisson(4 * layout.green)):
            add(_tree, layout.middle + side * (kerb + generator.uniform(0.9, layout.pavement - 0.5)), z)
        for z in np.arange(generator.uniform(5, 9), 70, 6.0):
            if generator.random() < layout.parked:
                add(_car, layout.middle + side * (kerb - 1.0), z + generator.uniform(-0.4, 0.4), math.pi * (side < 0))
        for z in generator.uniform(4.5, 40, generator.poisson(4.0)):
            add(_person, layout.middle + side * (kerb + generator.uniform(0.4, layout.pavement - 0.4)), z)
    for z in generator.uniform(7, 80, generator.poisson(2.5)):
        at = int(generator.integers(layout.lanes))
        oncoming = at < layout.lanes / 2
        wobble = generator.normal(0.0, 0.03)
        add(_car, layout.middle - kerb + lane * (at + 0.5), z, math.pi * oncoming + wobble)
    if generator.random() < 0.2:
        add(_car, layout.middle + generator.uniform(-kerb, kerb), generator.uniform(10, 30), generator.uniform(0, 6.3))
    walkers = generator.poisson(1.5) if math.isfinite(layout.crossing) else generator.poisson(0.3)
    for _ in range(walkers):
        z = layout.crossing + 1.5 if math.isfinite(layout.crossing) else generator.uniform(8, 40)
        add(_person, layout.middle + generator.uniform(-kerb, kerb), z + generator.uniform(-1, 1))
    return things
