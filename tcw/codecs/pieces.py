"""Work on many arrays at once: pieces that do not depend on each other, done by whichever core is free."""

from collections.abc import Callable, Sequence

from tcw.codecs.compiled import spread, threads

Piece = Callable[[], None]  # must not call `spread` itself


def run(pieces: Sequence[Piece]) -> None:
    """Do all pieces, on all cores; when this returns or raises, none is running. Raises what a piece raised."""
    left, errors = iter(pieces), list[Exception]()

    def work(first: int, last: int) -> None:
        for piece in left:  # threads share the iterator: each takes the next piece when it is done with one
            try:
                piece()
            except Exception as error:  # raised below, after the other threads
                errors.append(error)
                return

    spread(work, min(threads(), len(pieces)))
    if errors:
        raise errors[0]
