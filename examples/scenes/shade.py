"""Turns a painted canvas into a photograph: textures, shadows, haze, exposure, lens and sensor.

Colours are planar here, (3, ...), because NumPy is several times faster along long rows than along three channels.
"""

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageFilter

from examples.scenes.canvas import Camera, Canvas, Colour, Light, Material
from examples.scenes.street import UP, Layout, noise

GRAIN = 256  # side of the square of white noise that textures are looked up from

Plane = Float[np.ndarray, "height width"]
Picture = Float[np.ndarray, "3 height width"]


def shade(canvas: Canvas, layout: Layout, generator: np.random.Generator) -> UInt8[np.ndarray, "height width 3"]:
    """The picture that the canvas stands for."""
    table, seen = canvas.table().T.copy(), canvas.seen()
    material = np.take(table[1].astype(np.int8), seen)
    colour = np.stack([np.take(channel, seen) for channel in table[2:5]])
    depth = np.take(table[5], seen)
    grain = generator.random(GRAIN * GRAIN, np.float32) - 0.5
    horizon = int(np.clip(np.ceil(canvas.camera.horizon), 0, canvas.camera.height))

    sky = _sky(canvas.camera, canvas.light, horizon, generator)
    np.copyto(colour[:, :horizon], sky, where=material[:horizon] == Material.SKY)
    ground, distance = _ground(canvas, layout, grain, horizon, generator)
    paved = material[horizon:] == Material.GROUND
    np.copyto(colour[:, horizon:], ground, where=paved)
    np.copyto(depth[horizon:], distance, where=paved)
    _facades(colour, depth, seen, material, table, canvas, grain)
    np.multiply(colour, canvas.relief.clip(0.25), out=colour, where=material == Material.CROWN)
    skyline = _channels(canvas.light.skyline)
    colour = (colour - skyline) * np.exp(-canvas.light.haze * depth) + skyline
    return _develop(colour, generator)


def _sky(
    camera: Camera, light: Light, rows: int, generator: np.random.Generator
) -> Float[np.ndarray, "3 rows columns"]:
    """A gradient from skyline to zenith, the sun's glow, and clouds that flatten towards the horizon."""
    row = np.arange(rows, dtype=np.float32)[:, None]
    column = np.arange(camera.width, dtype=np.float32)[None, :]
    height = ((camera.horizon - row) / (0.75 * camera.focal)).clip(0, 1) ** 0.6
    size, seed = (camera.width, rows), int(generator.integers(3, 6))
    cover = noise(generator, size, (seed, seed + 1)) + 0.5 * noise(generator, size, (3 * seed, 4 * seed))
    cover += 0.25 * noise(generator, size, (9 * seed, 14 * seed))
    cover = ((cover + 0.9 * light.clouds - 0.45) * 3).clip(0, 1) * (0.3 + 0.55 * height)
    white = _channels((light.ambient * 0.75 + light.sun * 0.35 + 0.3 * light.skyline).clip(0, 1))
    sky = _mix(light.skyline, light.zenith, height)
    sky = sky + cover * (white - sky)
    x, y, z = light.towards_sun
    if z > 0.1 and light.sunny:
        away = (column - camera.centre - camera.focal * x / z) ** 2 + (row - camera.horizon + camera.focal * y / z) ** 2
        sky += _channels(light.sun) * (0.8 / (1 + away / (0.06 * camera.focal) ** 2)).astype(np.float32)
    return sky


def _ground(
    canvas: Canvas,
    layout: Layout,
    grain: Float[np.ndarray, " grain"],
    horizon: int,
    generator: np.random.Generator,
) -> tuple[Float[np.ndarray, "3 rows columns"], Float[np.ndarray, "rows 1"]]:
    """Asphalt with its markings, kerbs and paving, lit and in shadow; and each row's distance in metres."""
    camera, light = canvas.camera, canvas.light
    rows = np.arange(horizon, camera.height, dtype=np.float32)[:, None] + 0.5
    z = camera.focal * camera.eye / (rows - camera.horizon).clip(0.3)
    pixel = z / camera.focal
    x = (np.arange(camera.width, dtype=np.float32)[None, :] + 0.5 - camera.centre) * pixel - layout.middle
    out = np.abs(x)
    inside = out < layout.half
    worn = noise(generator, (camera.width, len(rows)), (6, 10))
    rough = _lookup(grain, x * 55, z * 20) * (0.014 / pixel).clip(0.15, 1)

    asphalt = generator.uniform(0.25, 0.46) * (1 + 0.4 * rough + 0.25 * worn)
    lane = 2 * layout.half / layout.lanes
    across = (x + layout.half) / lane
    dashed = _fraction(z * generator.uniform(0.1, 0.16) + generator.random()) < generator.uniform(0.3, 0.6)
    marks = _cover(0.07 - np.abs(across - np.rint(across)) * lane, pixel) * dashed * (out < layout.half - 0.5)
    if generator.random() < 0.6:
        marks = np.maximum(marks, _cover(0.06 - np.abs(out - layout.half + 0.25), pixel))
    zebra = (np.abs(z - layout.crossing - 1.5) < 1.5) * (out < layout.half - 0.2) * (_fraction(x * 1.1) < 0.5)
    marks = np.maximum(marks, zebra) * (0.85 + 0.4 * rough + 0.3 * worn)
    road = asphalt + (0.78 - asphalt) * marks * generator.uniform(0.6, 1.0)

    slab = generator.uniform(0.4, 1.2)
    seam = _cover(0.02 - np.abs(x / slab - np.rint(x / slab)) * slab, pixel)
    seam = np.maximum(seam, np.abs(_fraction(z / slab) - 0.5) > 0.47) * (0.05 / pixel).clip(0, 1)
    paving = generator.uniform(0.38, 0.62) * (1 + 0.25 * rough + 0.25 * worn) * (1 - 0.25 * seam)
    paving += (out < layout.half + 0.2) * np.float32(0.12)
    grey = np.where(inside, road, paving)
    warm = ~inside * np.float32(generator.uniform(0.0, 0.14))
    dark = canvas.shadow()[horizon:]
    lit = _mix(light.on(UP), 0.75 * light.ambient, dark) * (1 - (dark > 0.9) * np.float32(0.6))
    return (grey + warm * _channels(np.array((0.7, 0.1, -0.5)))) * lit, z


def _facades(
    colour: Picture,
    depth: Plane,
    seen: Int[np.ndarray, "height width"],
    material: Int[np.ndarray, "height width"],
    table: Float[np.ndarray, "columns surfaces"],
    canvas: Canvas,
    grain: Float[np.ndarray, " grain"],
) -> None:
    """Gives every wall its bricks, windows and shop fronts, in place; depth becomes exact on the way."""
    camera, light = canvas.camera, canvas.light
    at = np.flatnonzero((material == Material.SIDE) | (material == Material.FRONT))
    row, column = np.divmod(at.astype(np.int32), camera.width)
    number = seen.ravel()[at]
    plane, start, top, storey, spacing, wide, high, shop, seed, brick = np.take(table[7:], number, axis=1)
    side = material.ravel()[at] == Material.SIDE
    slope = (column.astype(np.float32) + np.float32(0.5 - camera.centre)) / np.float32(camera.focal)
    slope += (np.abs(slope) < 1e-3) * np.float32(2e-3)
    z = np.where(side, (plane / slope).clip(0.5, 300), plane)
    along = np.where(side, z, slope * plane) - start
    pixel = z / np.float32(camera.focal)
    up = np.float32(camera.eye) + (np.float32(camera.horizon) - row.astype(np.float32)) * pixel
    stretch = np.where(side, pixel * z / np.abs(plane).clip(0.5), pixel)  # metres along the wall per pixel

    glazed = (shop > 0) & (up < 3.0)
    for values, of_shop in ((spacing, 4.0), (wide, 3.4), (storey, 3.0), (high, 2.2)):
        values[glazed] = of_shop
    cell, floor = np.floor(along / spacing), np.floor(up / storey)
    beside = np.abs(along - (cell + 0.5) * spacing) - wide / 2
    above = np.abs(up - (floor + 0.5) * storey) - high / 2
    fits = (floor + 1) * storey < top + 0.7
    window = _cover(-beside, stretch) * _cover(-above, pixel) * fits
    frame = _cover(0.12 - beside, stretch) * _cover(0.12 - above, pixel) * fits - window

    coarse = _lookup(grain, along * 4 + seed, up * 8) * (0.2 / stretch).clip(0, 1)
    ledge = ((up > top + 0.3) | (np.abs(up - storey) < 0.15)) * np.float32(0.12)
    soot = (up < 0.6) * np.float32(0.12)
    flat = colour.reshape(3, -1)
    wall = np.take(flat, at, axis=1) * (1 + 2 * brick * coarse + ledge - soot)
    wall += frame * np.float32(0.25) * (wall.clip(0.3) - 0.15)
    which = _lookup(grain, cell * 7 + seed, floor * 13 + seed) + 0.5
    pane = _mix(0.10 * light.ambient + 0.02, 0.85 * light.skyline, which * which * (0.5 + up / 24).clip(0, 1))
    lamp = ((which > 1 - 0.5 * light.evening) | (glazed & (light.evening > 0))) * (0.6 + 0.5 * which)
    pane = np.maximum(pane, lamp * _channels(np.array((1.0, 0.82, 0.5))).reshape(3, 1))
    flat[:, at] = wall + window * (pane - wall)
    depth.reshape(-1)[at] = z


def _lookup(grain: Float[np.ndarray, " grain"], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The grain at whole-numbered places of an endlessly repeated square."""
    column, row = x.astype(np.int32) & (GRAIN - 1), y.astype(np.int32) & (GRAIN - 1)
    return np.take(grain, row * GRAIN + column)


def _cover(inside: np.ndarray, pixel: np.ndarray) -> np.ndarray:
    """The share of a pixel, `pixel` metres wide, that is covered when its middle is `inside` metres past the edge."""
    return (inside / pixel + 0.5).clip(0, 1)


def _fraction(x: np.ndarray) -> np.ndarray:
    return x - np.floor(x)


def _channels(colour: Colour) -> Float[np.ndarray, "3 1 1"]:
    return colour.astype(np.float32).reshape(3, 1, 1)


def _mix(first: Colour, second: Colour, share: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "3 *shape"]:
    """`first` where share is 0, `second` where it is 1."""
    start, end = (colour.astype(np.float32).reshape(3, *(1 for _ in share.shape)) for colour in (first, second))
    return start + share * (end - start)


def _develop(colour: Picture, generator: np.random.Generator) -> UInt8[np.ndarray, "height width 3"]:
    """Exposure, white balance and vignette; then the lens's blur and the sensor's noise."""
    _, height, width = colour.shape
    gain = generator.uniform(0.8, 1.3) * generator.normal(1.0, 0.03, 3)
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None] ** 2
    x = np.linspace(-1, 1, width, dtype=np.float32)[None, :] ** 2
    exposed = colour * (1 - generator.uniform(0.0, 0.2) * (x + y)) * _channels(255 * gain)
    pixels = np.stack(tuple(exposed.clip(0, 255).astype(np.uint8)), axis=2)
    softened = Image.fromarray(pixels).filter(ImageFilter.BoxBlur(float(generator.choice((0.3, 0.4, 0.6)))))
    speckle = np.rint(generator.standard_normal((height, width), np.float32) * generator.uniform(1.0, 6.0))
    speckle = speckle.astype(np.int16)
    noisy = np.asarray(softened, np.int16) + np.stack((speckle, speckle[::-1], speckle[:, ::-1]), axis=2)
    return noisy.clip(0, 255).astype(np.uint8)
