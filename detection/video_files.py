"""Frames of video files, and a video of drawn frames. PyAV, which reads and writes them, is optional."""

import importlib.util
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from foundation.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

EXTENSIONS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg")
CODEC, PIXELS = "libx264", "yuv420p"  # which every player takes; widths and heights are even


def is_video(path: Path) -> bool:
    """Whether a file is a video, by its name."""
    return path.suffix.lower() in EXTENSIONS


class VideoReader:
    """A video file, opened.

    Args:
        path: of the file.

    Attributes:
        rate: frames a second, on average.
        length: number of frames that the file says it has; None where it does not say.

    Raises:
        UserError: PyAV is not installed, or the file is not a video.
    """

    def __init__(self, path: Path) -> None:
        if importlib.util.find_spec("av") is None:
            raise UserError(f"{path} is a video, which PyAV reads: pip install av; or name a folder of its frames")
        import av

        self._path = path
        try:
            self._container = av.open(str(path))
        except (av.FFmpegError, OSError, ValueError, IndexError) as error:
            raise UserError(f"{path} cannot be read as a video: {error}") from error
        if not self._container.streams.video:
            raise UserError(f"{path} cannot be read as a video: it has no pictures")
        stream = self._container.streams.video[0]
        stream.thread_type = "AUTO"
        self._stream = stream
        self.rate = Fraction(stream.average_rate or stream.guessed_rate or 25)
        self.length: int | None = stream.frames or None

    def frames(self) -> "Iterator[tuple[float, Image.Image]]":
        """Seconds from the beginning, and the frame, upright, RGB.

        Raises:
            UserError: the file is damaged; frames before the damage have been given.
        """
        import av
        from PIL import Image

        number = 0
        try:
            for frame in self._container.decode(self._stream):
                pixels = frame.to_ndarray(format="rgb24")
                turns = round(getattr(frame, "rotation", 0) / 90)  # counterclockwise, as telephones note it
                time = frame.time if frame.time is not None else number / float(self.rate)
                yield time, Image.fromarray(np.ascontiguousarray(np.rot90(pixels, turns)))
                number += 1
        except av.FFmpegError as error:
            raise UserError(f"{self._path} is damaged after frame {number}: {error}") from error
        finally:
            self._container.close()


class VideoWriter:
    """Writes pictures of one size as a video.

    Args:
        path: of the file, which ends in `.mp4`.
        rate: frames a second.
    """

    def __init__(self, path: Path, rate: Fraction) -> None:
        self._path, self._rate = path, rate.limit_denominator(65535)  # as large as libx264 takes
        self._container: Any = None
        self._stream: Any = None

    def write(self, picture: "Image.Image") -> None:
        """Append a picture; an odd width or height loses its last column or row.

        Raises:
            UserError: the file cannot be written.
        """
        import av

        width, height = picture.width // 2 * 2, picture.height // 2 * 2
        try:
            if self._container is None:
                self._container = av.open(str(self._path), "w")
                self._stream = self._container.add_stream(CODEC, rate=self._rate)
                self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, PIXELS
            pixels = np.ascontiguousarray(np.asarray(picture)[:height, :width])
            self._container.mux(self._stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        except (av.FFmpegError, OSError) as error:
            raise UserError(f"{self._path} cannot be written: {error}") from error

    def close(self) -> None:
        """Write what is left.

        Raises:
            UserError: the file cannot be written.
        """
        if self._container is None:
            return
        import av

        try:
            self._container.mux(self._stream.encode())
            self._container.close()
        except (av.FFmpegError, OSError) as error:
            raise UserError(f"{self._path} cannot be written: {error}") from error
