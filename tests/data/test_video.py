"""Frames of a video file are evenly spaced and in order."""

import io
from pathlib import Path

import numpy as np
import pytest
from made import film
from PIL import Image

from mmtrain.data import video
from mmtrain.errors import ContentError, MissingError

pytest.importorskip("av", reason="the extra `video` is not installed")


def test_frames_are_evenly_spaced_from_first_to_last(tmp_path: Path) -> None:
    film(tmp_path / "clip.mp4", 25)
    frames = [Image.open(io.BytesIO(blob)) for blob in video.read_frames(tmp_path / "clip.mp4", 5)]
    greys = [float(np.asarray(frame, np.float64).mean()) for frame in frames]
    assert greys == pytest.approx([0, 48, 96, 144, 192], abs=6)
    assert all(frame.format == "JPEG" and frame.size == (64, 48) for frame in frames)


def test_large_frames_are_made_smaller(tmp_path: Path) -> None:
    film(tmp_path / "clip.mp4", 3)
    blobs = video.read_frames(tmp_path / "clip.mp4", 8, longest_side=32)
    assert [Image.open(io.BytesIO(blob)).size for blob in blobs] == [(32, 24)] * 3


def test_what_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingError, match=r"clip\.mp4 is not there"):
        video.read_frames(tmp_path / "clip.mp4", 4)
    (tmp_path / "clip.mp4").write_bytes(b"no video" * 100)
    with pytest.raises(ContentError, match="cannot be decoded as video"):
        video.read_frames(tmp_path / "clip.mp4", 4)
    film(tmp_path / "whole.mp4", 3)
    (tmp_path / "clip.mp4").write_text("ffconcat version 1.0\nfile whole.mp4\n")
    with pytest.raises(ContentError, match="cannot be decoded as video"):  # of other files
        video.read_frames(tmp_path / "clip.mp4", 4)
    monkeypatch.setattr(video, "MAX_PIXELS", 100)
    with pytest.raises(ContentError, match="frames of 64 x 48, more than"):
        video.read_frames(tmp_path / "whole.mp4", 4)
    monkeypatch.setattr(video, "av", None)
    with pytest.raises(MissingError, match=r"pip install 'mmtrain\[video\]'"):
        video.read_frames(tmp_path / "clip.mp4", 4)


def test_a_clip_that_ends_early_has_the_frames_that_came_or_is_refused(tmp_path: Path) -> None:
    film(tmp_path / "clip.avi", 25)
    content = (tmp_path / "clip.avi").read_bytes()
    for length in range(0, len(content), len(content) // 12):
        (tmp_path / "cut.avi").write_bytes(content[:length])
        try:
            frames = video.read_frames(tmp_path / "cut.avi", 5)
        except ContentError:
            continue
        assert 1 <= len(frames) <= 5
    assert len(frames) == 5  # of the longest


def test_what_a_header_says_of_the_number_of_frames_is_not_believed(tmp_path: Path) -> None:
    film(tmp_path / "clip.avi", 25)
    content = (tmp_path / "clip.avi").read_bytes()
    place = content.index(b"avih") + 8 + 16  # dwTotalFrames
    assert content[place : place + 4] == (25).to_bytes(4, "little")
    for claimed in (0, 3, 1 << 31):
        (tmp_path / "lie.avi").write_bytes(
            content[:place] + claimed.to_bytes(4, "little") + content[place + 4 :]
        )
        frames = video.read_frames(tmp_path / "lie.avi", 5)
        assert frames == video.read_frames(tmp_path / "clip.avi", 5)


def test_a_clip_without_a_frame_and_one_with_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    film(tmp_path / "clip.avi", 9)
    content = (tmp_path / "clip.avi").read_bytes()
    (tmp_path / "none.avi").write_bytes(content[: content.index(b"movi") + 4])
    with pytest.raises(ContentError, match=r"none\.avi holds no frame"):
        video.read_frames(tmp_path / "none.avi", 5)
    monkeypatch.setattr(video, "MAX_FRAMES", 8)
    with pytest.raises(ContentError, match="more than 8 frames"):
        video.read_frames(tmp_path / "clip.avi", 5)
