"""Render a small set of fruit-like pictures, for a machine that has no pictures at all.

A newcomer's first run needs something honest to work on, and noise would not do: features and PCA
only mean something when pictures of one variety resemble each other and differ from the rest.
So a variety is a table of solids, and a picture is one seeded throw of shape, hue and light, laid
out as in Fruits-360: one object on white, filling the frame, seen from slowly changing angles.
"""

import cmath
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.polynomial import chebyshev
from numpy.typing import NDArray
from PIL import Image, ImageColor

Array: TypeAlias = NDArray[np.float32]
Plane: TypeAlias = NDArray[np.complex64]
Mask: TypeAlias = NDArray[np.bool_]
Window: TypeAlias = tuple[slice, slice]


@dataclass(frozen=True)
class Grain:
    """Noise that mixes a second colour into a skin.

    The grid of `rows` by `columns` is stretched over the whole skin: one row makes streaks from
    pole to pole, a fine grid makes pores. A high `power` keeps only the peaks, which are freckles.
    """

    rows: int
    columns: int
    colour: str
    strength: float
    power: float = 1.0


@dataclass(frozen=True)
class Part:
    """One solid, drawn at every point of `at`, over the parts before it.

    Points are complex numbers, x to the right and y upwards; a fruit reaches about 1 from 0.
    """

    colours: tuple[str, ...]  # from top to bottom or, on a cut face, from heart to rim
    width: float = 1.0  # half of it, as for the height
    height: float = 1.0
    at: tuple[complex, ...] = (0j,)
    jitter: float = 0.0  # standard deviation of the points
    radii: tuple[float, ...] = (1.0,)  # half an outline: top, equal angles, bottom; then mirrored
    turn: float = 0.0  # radians, anticlockwise
    outward: bool = False  # turned away from 0, as seeds are
    bend: float = 0.0  # how far both ends are raised
    crest: float = math.inf  # everything above this height is cut off
    cut: bool = False  # a flat face instead of a round body
    soft: float = 0.0  # if not 0, a stain of this opacity on what is already there
    gloss: float = 0.0
    grains: tuple[Grain, ...] = ()


def _ring(count: int, radius: float) -> tuple[complex, ...]:
    return tuple(cmath.rect(radius, math.tau * k / count) for k in range(count))


def _rows(*rows: tuple[float, float, int]) -> tuple[complex, ...]:
    """Points in rows of (height, half width, count), closer at the ends as on a round body."""
    return tuple(
        complex(half * math.sin(math.pi * ((k + 0.5) / count - 0.5)), height)
        for height, half, count in rows
        for k in range(count)
    )


APPLE = (0.80, 0.99, 1.04, 1.02, 0.98, 0.96, 0.90)
WOOD = ("#7a5634", "#4a321e")
STALK = ("#6a7a2c", "#59702a")

# fmt: off
VARIETIES: dict[str, tuple[Part, ...]] = {
    "Apple Green": (
        Part(("#b9cf57", "#9cc23c", "#8dbb35", "#a5c545"), 0.98, 0.95, radii=APPLE, gloss=0.5,
             grains=(Grain(3, 5, "#d5dc74", 0.5), Grain(45, 70, "#e6efb0", 0.8, 9))),
        Part(("#5c6b1c",), 0.34, 0.13, (0.70j,), soft=0.8),
        Part(WOOD, 0.045, 0.24, (0.02 + 0.90j,), turn=-0.2),
    ),
    "Apple Red": (
        Part(("#c9a24a", "#b8302c", "#a3141f", "#9a1120", "#b03a30"), 1.0, 0.93, radii=APPLE,
             gloss=0.6, grains=(Grain(2, 40, "#e3a24e", 0.7, 3), Grain(3, 5, "#c9202a", 0.6))),
        Part(("#4f2a12",), 0.36, 0.13, (0.69j,), soft=0.8),
        Part(WOOD, 0.05, 0.22, (-0.03 + 0.86j,), turn=0.2),
    ),
    "Banana": (
        Part(WOOD, 0.17, 0.06, (0.99 + 0.5j,), turn=1.2),
        Part(("#f8e572", "#f2d02f", "#ecc21f", "#d9a41c"), 1.15, 0.27, (0.08 - 0.4j,), turn=0.3,
             radii=(1.0, 1.03, 1.05, 1.0, 1.05, 1.03, 1.0), bend=0.66, gloss=0.15,
             grains=(Grain(4, 8, "#f9ea8a", 0.4), Grain(30, 40, "#5b3a12", 0.9, 16))),
        Part(("#4a3216",), 0.05, 0.05, (-1.18 - 0.13j,)),
    ),
    "Cherry Pair": (
        Part(STALK, 0.03, 0.72, (-0.2 + 0.35j,), turn=-0.35),
        Part(STALK, 0.03, 0.72, (0.225 + 0.33j,), turn=0.25),
        Part(WOOD, 0.08, 0.05, (0.047 + 1.03j,)),
        Part(("#5a0a18", "#a81228", "#94102a", "#7a0c20"), 0.5, 0.48, (-0.5 - 0.45j, 0.52 - 0.5j),
             radii=(0.88, 1.02, 1.02, 1.0, 1.0, 1.0, 0.97), gloss=0.8, jitter=0.03),
    ),
    "Grape Blue": (
        Part(WOOD, 0.05, 0.3, (1j,)),
        Part(("#54407f", "#3b2a66", "#2e1d4e"), 0.27, 0.28, gloss=0.35, jitter=0.04,
             at=_rows((0.72, 0.62, 4), (0.45, 0.75, 5), (0.15, 0.62, 4), (-0.15, 0.52, 3),
                      (-0.45, 0.28, 2), (-0.75, 0.0, 1)),
             grains=(Grain(4, 6, "#8d86b8", 0.6),)),
    ),
    "Kiwi Cut": (
        Part(("#efe9c0", "#eee7b5", "#b5cc5a", "#8fb83a", "#86b336", "#7aa92f", "#8db544",
              "#6d4f2c"), height=0.92, cut=True, grains=(Grain(1, 70, "#c5d873", 0.5),)),
        Part(("#1d1a12",), 0.05, 0.022, _ring(30, 0.42), jitter=0.03, outward=True, gloss=0.3),
    ),
    "Lemon": (
        Part(("#efd83e", "#f5df3a", "#f3d92f", "#e6cc30"), 0.74, 0.92, turn=1.0, gloss=0.35,
             radii=(1.16, 0.98, 0.97, 1.0, 0.97, 0.98, 1.14),
             grains=(Grain(50, 80, "#c9a81c", 0.35, 2),)),
    ),
    "Orange": (
        Part(("#f09a2a", "#f28c1c", "#ee8216", "#e67a14"), gloss=0.3,
             grains=(Grain(3, 4, "#f7a436", 0.5), Grain(60, 90, "#c25f0a", 0.5, 2))),
        Part(("#a85a10",), 0.2, 0.14, (0.1 + 0.6j,), soft=0.7),
        Part(("#7d8a3a", "#5f6d28"), 0.09, 0.06, (0.1 + 0.6j,),
             radii=(1.0, 0.6, 1.0, 0.6, 1.0, 0.6)),
    ),
    "Pear": (
        Part(WOOD, 0.045, 0.25, (0.02 + 1.08j,), turn=-0.2),
        Part(("#b3b044", "#c6c452", "#bcc24c", "#b4bd45", "#c9c257"), 0.82, 1.1, (-0.12j,),
             radii=(1.0, 0.72, 0.66, 0.82, 0.98, 0.98, 0.9), gloss=0.3,
             grains=(Grain(60, 90, "#7d6a2a", 0.6, 7),)),
        Part(("#a8482a",), 0.5, 0.65, (0.38 - 0.45j,), jitter=0.12, soft=0.4),
    ),
    "Plum": (
        Part(("#5a2a58", "#6a2a5e", "#521f4c"), 0.85, 1.0, gloss=0.3,
             grains=(Grain(3, 5, "#8a6a9c", 0.7),)),
        Part(("#1f0a22",), 0.95, 0.07, (0.34j,), turn=-math.pi / 2, bend=0.2, soft=0.6),
        Part(("#241022",), 0.22, 0.09, (0.1 + 0.86j,), soft=0.8),
        Part(WOOD, 0.04, 0.16, (0.1 + 0.98j,), turn=-0.2),
    ),
    "Strawberry": (
        Part(("#d8503c", "#cf1f2a", "#c4121f", "#b70f1c"), 0.88, gloss=0.5,
             radii=(0.82, 0.98, 1.06, 0.98, 0.88, 0.88, 0.98)),
        Part(("#e9c46a",), 0.025, 0.04, jitter=0.02,
             at=_rows((0.5, 0.7, 6), (0.28, 0.78, 7), (0.06, 0.76, 6), (-0.16, 0.68, 7),
                      (-0.38, 0.56, 6), (-0.6, 0.4, 4), (-0.8, 0.22, 2))),
        Part(("#5f9a35", "#4a8428", "#3c7322"), 0.6, 0.35, (0.72j,),
             radii=(1.0, 0.35, 1.0, 0.35, 1.0, 0.35, 1.0)),
    ),
    "Watermelon Cut": (
        Part((*("#e8454e",) * 7, "#ea6a66", "#f3e9cf", "#7fae52", "#2f6b2f"), crest=0.1, cut=True,
             grains=(Grain(30, 50, "#f27a78", 0.5),)),
        Part(("#22160f",), 0.055, 0.03, jitter=0.03, outward=True, gloss=0.3,
             at=_rows((-0.15, 0.6, 6), (-0.38, 0.5, 4), (-0.6, 0.3, 2))),
    ),
}
# fmt: on

OVERSAMPLING = 4
REACH = 1.35  # from the centre of the canvas to its sides: what a turned banana needs
MARGIN = 1.04  # side of the frame over the longer side of the object
SKIN_ROWS, SKIN_COLUMNS = 128, 256
AMBIENT, DIFFUSE, GLINT = 0.47, 0.63, 200.0


def render_sample(
    folder: Path, per_variety: int = 20, size: int = 100, seed: int = 360
) -> list[Path]:
    """Write `folder/<variety>/<n>_<size>.jpg` for every variety of `VARIETIES`.

    A picture depends on `seed`, its variety, its number and `size` alone: these give the same
    bytes with the same versions of numpy and Pillow, whatever else is rendered. (A processor with
    other vector instructions may round a pixel in 100,000 to the next level.)

    Parameters
    ----------
    folder : Path
        Where to write; created if absent.
    per_variety : int
        Pictures of each variety, numbered from 0.
    size : int
        Side of the square pictures, in pixels.
    seed : int
        Any integer from 0.

    Returns
    -------
    list of Path
        The pictures, RGB JPEG on white, by variety and number.

    Raises
    ------
    FileExistsError
        If `folder` is not empty: a sample mixed with other pictures would be no sample.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     print(render_sample(Path(folder), per_variety=1)[0].relative_to(folder))
    Apple Green/0_100.jpg
    """
    if folder.exists() and (found := sum(1 for _ in folder.iterdir())):
        raise FileExistsError(
            f"expected {folder} to be absent or empty, found {found} entries in it; "
            "remove it or choose another folder"
        )
    paths = []
    for variety in VARIETIES:
        (folder / variety).mkdir(parents=True)
        for index in range(per_variety):
            path = folder / variety / f"{index}_{size}.jpg"
            _save(_picture(variety, index, size, seed), path)
            paths.append(path)
    return paths


def _picture(variety: str, index: int, size: int, seed: int) -> Image.Image:
    rng = np.random.default_rng([seed, zlib.crc32(variety.encode()), index])
    canvas, view = _Canvas(size * OVERSAMPLING), _view(index, rng)
    for part in VARIETIES[variety]:
        _draw(part, view, canvas, rng)
    return canvas.framed(size)


def _save(picture: Image.Image, path: Path) -> None:
    # A crash leaves at most a .partial, which nobody takes for a picture.
    partial = path.with_suffix(".partial")
    picture.save(partial, format="JPEG", quality=92)
    partial.replace(path)


@dataclass(frozen=True)
class _View:
    """What all the parts of one picture share."""

    turn: complex  # of length 1
    widening: float
    light: complex  # where it comes from, in the plane of the picture
    light_front: float  # and from the side of the spectator
    tint: Array  # RGB factors, about 1


def _view(index: int, rng: np.random.Generator) -> _View:
    light = rng.normal((-0.45, 0.55, 0.75), 0.1)
    light /= np.linalg.norm(light)
    return _View(
        turn=cmath.rect(1, 0.5 * math.sin(index / 3) + rng.normal(0, 0.06)),
        widening=rng.normal(1, 0.03),
        light=complex(light[0], light[1]),
        light_front=float(light[2]),
        tint=(rng.normal(1, 0.04) * rng.normal(1, 0.04, 3)).astype(np.float32),
    )


class _Canvas:
    """A white square of `side` pixels; `plane` holds the point of each pixel."""

    def __init__(self, side: int) -> None:
        self.pixels: Array = np.full((side, side, 3), 255, np.float32)
        self.covered: Mask = np.zeros((side, side), np.bool_)
        axis = np.linspace(-REACH, REACH, side, dtype=np.float32)
        self.plane: Plane = axis - 1j * axis[:, None]

    def window(self, centre: complex, reach: float) -> Window:
        """Rows and columns that hold everything within `reach` of `centre`."""
        scale = len(self.plane) / (2 * REACH)
        row, column, span = REACH - centre.imag, REACH + centre.real, reach + 2 / scale
        edges = [max(0, int(scale * e)) for m in (row, column) for e in (m - span, m + span)]
        return slice(*edges[:2]), slice(*edges[2:])

    def lay(self, window: Window, inside: Mask, colour: Array) -> None:
        self.pixels[window][inside] = colour
        self.covered[window] |= inside

    def stain(self, window: Window, inside: Mask, colour: Array, opacity: Array) -> None:
        under = self.pixels[window]
        mix = (opacity * self.covered[window][inside])[:, None]
        under[inside] += mix * (colour - under[inside])

    def framed(self, size: int) -> Image.Image:
        """Crop to what was laid, and centre it in a white square of `size` pixels."""
        rows, columns = (np.flatnonzero(self.covered.any(axis)) for axis in (1, 0))
        laid = self.pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        height, width = laid.shape[:2]
        side = round(MARGIN * max(height, width))
        frame = Image.new("RGB", (side, side), "white")
        picture = Image.fromarray(np.clip(laid, 0, 255).astype(np.uint8))
        frame.paste(picture, ((side - width) // 2, (side - height) // 2))
        return frame.resize((size, size), Image.Resampling.LANCZOS)


def _draw(part: Part, view: _View, canvas: _Canvas, rng: np.random.Generator) -> None:
    skin, outline = _skin(part, view.tint, rng), _outline(part.radii, rng)
    reach = 1.1 * max(part.radii) * max(part.width, part.height) + part.bend
    for point in part.at:
        at = point + part.jitter * complex(*rng.normal(0, 1, 2))
        turn = view.turn * cmath.rect(1, part.turn + part.outward * cmath.phase(at))
        centre = view.turn * complex(at.real * view.widening, at.imag)
        window = canvas.window(centre, reach)
        local = (canvas.plane[window] - centre) * turn.conjugate()
        inside, normal = _solid(part, view.widening, outline, local)
        colour = _lit(part, skin, normal, turn, view)
        if part.soft:
            canvas.stain(window, inside, colour, part.soft * (1 - _squared(normal)))
        else:
            canvas.lay(window, inside, colour)


def _skin(part: Part, tint: Array, rng: np.random.Generator) -> Array:
    """Colours by row, from top (or heart) to bottom (or rim), and by column, around."""
    stops = np.array([ImageColor.getrgb(colour) for colour in part.colours], np.float32)
    at = np.linspace(0, len(stops) - 1, SKIN_ROWS)
    ramp = np.stack([np.interp(at, range(len(stops)), channel) for channel in stops.T], axis=-1)
    skin = ramp.astype(np.float32)[:, None]
    for grain in part.grains:
        grid = rng.random((grain.rows, grain.columns), np.float32)
        closed = Image.fromarray(np.hstack((grid, grid[:, :1])))  # no seam where it meets itself
        noise = closed.resize(
            (SKIN_COLUMNS, SKIN_ROWS),
            Image.Resampling.BICUBIC,
            box=(0.5, 0, grain.columns + 0.5, grain.rows),
        )
        mix = grain.strength * np.clip(np.asarray(noise)[..., None], 0, 1) ** grain.power
        skin = skin + mix * (np.array(ImageColor.getrgb(grain.colour), np.float32) - skin)
    return skin * tint


def _outline(radii: tuple[float, ...], rng: np.random.Generator) -> Array:
    """Chebyshev coefficients of the radius over the cosine of the angle from the top.

    A mirrored outline is a cosine series of that angle, so no angle is needed for any pixel.
    """
    cosines = np.cos(np.linspace(0, math.pi, len(radii)))
    shaken = np.array(radii) * rng.normal(1, 0.012, len(radii))
    return chebyshev.chebfit(cosines, shaken, len(radii) - 1).astype(np.float32)


def _solid(part: Part, widening: float, outline: Array, local: Plane) -> tuple[Mask, Plane]:
    """Which pixels belong to the part, and the surface normals there, in its own plane."""
    across: Array = local.real / (part.width * widening)
    bent: Array = local.imag - part.bend * across**2
    along: Array = bent / part.height
    length = np.sqrt(across**2 + along**2 + np.float32(1e-12))
    radius = chebyshev.chebval(along / length, outline)
    inside = (length < radius) & (along < part.crest)
    return inside, (across[inside] + 1j * along[inside]) / radius[inside]


def _lit(part: Part, skin: Array, normal: Plane, turn: complex, view: _View) -> Array:
    edge = _squared(normal)
    front = np.sqrt(np.maximum(0, 1 - edge))  # rounding may lift an edge above 1
    if part.cut:
        row, angle = np.sqrt(edge), np.arctan2(normal.imag, normal.real)
    else:
        row, angle = (1 - normal.imag) / 2, np.arctan2(normal.real, front)
    columns = skin.shape[1]
    spot = (row * (SKIN_ROWS - 1)).astype(np.intp) * columns
    spot += ((angle / math.tau + 0.5) * (columns - 1)).astype(np.intp)
    colour = skin.reshape(-1, 3).take(spot, axis=0)
    facing = (normal * (turn * view.light.conjugate())).real + front * view.light_front
    shade = 1 if part.cut or part.soft else AMBIENT + DIFFUSE * np.clip(facing, 0, 1)[:, None]
    glint = part.gloss * GLINT * np.clip(10 * facing - 9, 0, 1)[:, None] ** 2
    lit: Array = colour * shade + glint
    return lit


def _squared(normal: Plane) -> Array:
    return normal.real**2 + normal.imag**2
