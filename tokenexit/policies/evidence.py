"""Evidence of exit policies: scores of the tokens that run, where they are, and what has settled around them."""

from dataclasses import KW_ONLY, dataclass
from typing import Literal, cast

from jaxtyping import Bool, Float, Int

from tokenexit import scores
from tokenexit._array import Array, array_namespace, is_array
from tokenexit._lazy import lazy
from tokenexit.errors import TokenExitError, require
from tokenexit.merging import Merged

__all__ = ["DIRECTIONS", "Evidence"]

DIRECTIONS = {name: score.direction for name, score in scores.SCORES.items()} | {"gate": "below", "error": "below"}
"""For every score by its name, on which side of a threshold a token is easy: `above` or `below`."""


_ARRAYS = (
    "logits", "class_scores", "gate", "error", "image", "position", "valid", "protected", "previous", "settled_label",
    "settled_score", "settled_error",
)  # fmt: skip


@dataclass(frozen=True)
class Evidence:
    """Evidence of a policy: scores and positions of the tokens at an exit point, in one row.

    A pass gives all patches of all images, image after image, and `valid` marks those that run: what a policy does then
    has shapes that do not depend on the data, and compiles. A row of the tokens that run alone does as well.

    Attributes:
        logits: Class scores before softmax, from the head at this exit; of at least two classes.
        class_scores: Instead of logits, scores of every class that are not a softmax's, the greatest of which is the
            confidence: those of an ATM head (`scores.mask_scores`).
        gate: Learned probability that the token is kept; with it alone, there need be no class scores.
        error: Error that a translator foretells for itself (`heads.Translator`), relative to each channel's variance;
            with it alone, there need be no class scores.
        image: Image of every token; left out, all tokens are of one image.
        images: How many images the batch has; needed with `image`, and 1 without it.
        grid: Height and width of the patch grid; needed by `NeighboursAgree`, `ErrorBelow` and `Budget`.
        position: Place of every token in the grid, row by row; needed by `NeighboursAgree` and `ErrorBelow`.
        valid: Which entries hold a token that runs; given, every image has the same number of entries.
        layout: How the entries lie. `grid`: they are all places of the grid, image after image, and what does not run
            has the class scores that it left with, NaN if it was never read. `row`: any others, in any order.
        merged: For the layout `grid`, which tokens have merged (`tokenexit.merging`), if any have: entries that run are
            their owners, and tokens that belong to an owner have its class scores.
        protected: Tokens that no policy lets leave, excluded from every neighbourhood: cls, registers, queries.
        exit: Which of the exit points this is, from 0; a model fills it in.
        previous: Class that the earlier exit heads predicted for these tokens, first exit first.
        settled_label: For the layout `row`, predicted class of the tokens that have left, at their place in the grid;
            -1 for the others.
        settled_score: The confidence that they left with.
        settled_error: For the layout `row`, the error that was foretold of the tokens that have left, at their place in
            the grid; NaN for the others.
    """

    logits: Float[Array, "tokens classes"] | None = None
    _: KW_ONLY
    class_scores: Float[Array, "tokens classes"] | None = None
    gate: Float[Array, "tokens"] | None = None
    error: Float[Array, "tokens"] | None = None
    image: Int[Array, "tokens"] | None = None
    images: int | None = None
    grid: tuple[int, int] | None = None
    position: Int[Array, "tokens"] | None = None
    valid: Bool[Array, "tokens"] | None = None
    layout: Literal["row", "grid"] = "row"
    merged: Merged | None = None
    protected: Bool[Array, "tokens"] | None = None
    exit: int | None = None
    previous: Int[Array, "exits tokens"] | None = None
    settled_label: Int[Array, "images positions"] | None = None
    settled_score: Float[Array, "images positions"] | None = None
    settled_error: Float[Array, "images positions"] | None = None

    def __post_init__(self) -> None:
        """Check the shapes.

        Raises:
            TokenExitError: If there is nothing to look at, both kinds of class scores are given, a field is no array or
                does not fit the tokens, the settled fields do not fit the grid, or `layout` is unknown or does not fit
                either.
        """
        for name in _ARRAYS:
            value = getattr(self, name)
            require(value is None or is_array(value), name, "be an array, as `numpy.asarray` makes one", value)
        require(
            self.logits is None or self.class_scores is None, "class_scores", "be given instead of `logits`", "both"
        )
        require(self.any_scores is not None, "logits", "be given, or `class_scores`, `gate` or `error`", "nothing")
        _require_classes(self.logits, "logits", 2, f"two classes ({scores.ONE})")
        _require_classes(self.class_scores, "class_scores", 1, "one class")
        tokens, images = self.tokens, self.images or 1
        row = f"have one entry for each of the {tokens} tokens"
        for name in ("gate", "error", "image", "position", "valid", "protected"):
            _require_shape(getattr(self, name), name, (tokens,), row)
        require(self.image is None or self.images is not None, "images", "be given with `image`", self.images)
        seen = None if self.previous is None else self.previous.shape[0]
        _require_shape(self.previous, "previous", (seen, tokens), f"have shape (exits, tokens) for {tokens} tokens")
        each = f"have as many entries for each of {self.images} images"
        require(self.valid is None or tokens % images == 0, "valid", each, f"{tokens} entries")
        require(self.image is not None or images == 1, "image", "be given for several images", "none")
        both = (self.settled_label is None) == (self.settled_score is None)
        require(both, "settled_score", "be given exactly if `settled_label` is", "one without the other")
        places = None if self.grid is None else self.grid[0] * self.grid[1]
        rule = f"have shape (images, positions) for images={self.images} and grid={self.grid}"
        for name in ("settled_label", "settled_score", "settled_error"):
            _require_shape(getattr(self, name), name, (self.images, places), rule)
        require(self.layout in ("row", "grid"), "layout", "be `row` or `grid`", repr(self.layout))
        require(self.merged is None or self.layout == "grid", "merged", "be given in the layout `grid` alone", "`row`")
        if self.layout == "grid":
            rule = f"be `row` for {tokens} entries, images={self.images} and grid={self.grid}"
            require(self.images is not None and tokens == self.images * (places or 0), "layout", rule, "`grid`")
            for name in ("settled_label", "settled_error"):
                require(getattr(self, name) is None, name, "be left out in the layout `grid`", "some")

    @property
    def any_scores(self) -> Array | None:
        """Logits, class scores, gate or error: the first of them that is given."""
        given = (self.logits, self.class_scores, self.gate, self.error)
        return next((one for one in given if one is not None), None)

    @property
    def has_classes(self) -> bool:
        """Whether there are class scores."""
        return self.logits is not None or self.class_scores is not None

    @property
    def tokens(self) -> int:
        """Count of tokens, or entries, of the row."""
        return cast(Array, self.any_scores).shape[0]

    @property
    def classes(self) -> int:
        """Class count.

        Raises:
            TokenExitError: If there are no class scores.
        """
        return self._table.shape[1]

    @property
    def _table(self) -> Array:
        table = self.logits if self.class_scores is None else self.class_scores
        if table is None:
            given = " and ".join(name for name in ("gate", "error") if getattr(self, name) is not None)
            raise TokenExitError(f"`evidence` must have logits or class_scores for this policy, got {given} alone")
        return table

    @lazy
    def label(self) -> Int[Array, "tokens"]:
        """Predicted class of every token.

        Raises:
            TokenExitError: If there are no class scores.
        """
        xp = array_namespace(self._table)
        return xp.argmax(self._table, axis=-1)

    @lazy
    def confidence(self) -> Float[Array, "tokens"]:
        """Confidence of every token: `scores.confidence` of the logits, or the greatest of its class scores.

        Raises:
            TokenExitError: If there are no class scores.
        """
        if self.class_scores is None:
            return scores.confidence(self._table)
        xp = array_namespace(self.class_scores)
        return xp.max(xp.astype(self.class_scores, xp.float32), axis=-1)

    @lazy
    def entropy(self) -> Float[Array, "tokens"]:
        """Normalised entropy of every token (`scores.entropy`).

        Raises:
            TokenExitError: If there are no logits: scores that are not normalised have no entropy.
        """
        return scores.entropy(self._logits("entropy"))

    @lazy
    def margin(self) -> Float[Array, "tokens"]:
        """Margin of every token (`scores.margin`).

        Raises:
            TokenExitError: If there are no logits.
        """
        return scores.margin(self._logits("margin"))

    def _logits(self, score: str) -> Array:
        if self.logits is None:
            raise TokenExitError(f"`evidence` must have logits for the {score}, got none")
        return self.logits

    @lazy
    def eligible(self) -> Bool[Array, "tokens"]:
        """Mask of tokens eligible to exit: valid and not protected."""
        able = self.valid
        if able is None:
            xp = array_namespace(self.any_scores)
            able = xp.ones_like(cast(Array, self.any_scores), dtype=xp.bool)
            able = able if able.ndim == 1 else able[:, 0]
        return able if self.protected is None else able & ~self.protected

    @lazy
    def known(self) -> Bool[Array, "tokens"]:
        """Mask of tokens for which what is given of confidence, gate and error is not NaN."""
        xp = array_namespace(self.any_scores)
        given = [self.confidence] if self.has_classes else []
        given += [one for one in (self.gate, self.error) if one is not None]
        first, *others = (~xp.isnan(one) for one in given)
        for one in others:
            first = first & one
        return first

    def score(self, name: str, /) -> Float[Array, "tokens"]:
        """A score of every token, by its name.

        Args:
            name: One of `DIRECTIONS`: `confidence`, `entropy`, `margin`, `gate` or `error`.

        Raises:
            TokenExitError: If the evidence does not have what the score is computed from.
        """
        known = {"confidence": lambda: self.confidence, "entropy": lambda: self.entropy, "margin": lambda: self.margin}
        if name in ("gate", "error"):
            return self._given(name)
        return known[name]() if name in known else scores.SCORES[name].of(self._logits(name))

    def hardness(self, score: str, /) -> Float[Array, "tokens"]:
        """Hardness of every token by one of the scores: the harder, the greater; NaN is the hardest of all.

        Args:
            score: One of `DIRECTIONS`: `confidence`, `entropy`, `margin`, `gate` or `error`.

        Raises:
            TokenExitError: If the evidence does not have what the score is computed from.
        """
        value = self.score(score)
        value = -value if DIRECTIONS[score] == "above" else value
        xp = array_namespace(value)
        return xp.where(xp.isnan(value), xp.inf, value)

    def _given(self, name: str) -> Array:
        found: Array | None = getattr(self, name)
        if found is None:
            raise TokenExitError(f"`evidence` must have {name} for a policy that looks at it, got none")
        xp = array_namespace(found)
        return xp.astype(found, xp.float32)


def _require_classes(table: Array | None, name: str, least: int, many: str) -> None:
    fits = table is None or (table.ndim == 2 and table.shape[1] >= least)
    got = f"shape {None if table is None else tuple(table.shape)}"
    require(fits, name, f"have shape (tokens, classes) with at least {many}", got)


def _require_shape(values: Array | None, name: str, shape: tuple[int | None, ...], rule: str) -> None:
    if values is not None:
        require(tuple(values.shape) == shape, name, rule, f"shape {tuple(values.shape)}")
