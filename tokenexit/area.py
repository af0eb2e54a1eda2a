"""The area of an image that a grid of patches covers, where it is not the image: a ViT may cut edges off, or pad."""

from dataclasses import dataclass

from tokenexit._plain import is_whole
from tokenexit.errors import require

__all__ = ["Area"]


@dataclass(frozen=True)
class Area:
    """The area of an image that a grid of patches covers. Both begin in the same corner, at the top left.

    It is smaller than the image where a network leaves out the pixels beyond the last whole patch, and larger where it
    pads the image to whole patches.

    Attributes:
        covered: Height and width of the area, in pixels of the image.
        image: Height and width of the image.

    Raises:
        TokenExitError: If one of them is no pair of whole numbers from 1 up.
    """

    covered: tuple[int, int]
    image: tuple[int, int]

    def __post_init__(self) -> None:
        for name, pair in (("covered", self.covered), ("image", self.image)):
            fits = isinstance(pair, tuple) and len(pair) == 2 and all(is_whole(side, least=1) for side in pair)
            require(fits, name, "be a height and a width from 1 up, in pixels", pair)

    def per_patch(self, grid: tuple[int, int], size: tuple[int, int], /) -> tuple[float, float]:
        """Height and width of a patch in pixels, where the whole image is shown at another size.

        Args:
            grid: Height and width of the grid.
            size: Height and width at which the image is shown, in pixels.

        Returns:
            Pixels of that size; as a rule no whole number.
        """
        height, width = (
            covered * shown / (cells * side)
            for covered, shown, cells, side in zip(self.covered, size, grid, self.image, strict=True)
        )
        return height, width
