"""Videos as images of `iddc predict`: a stand-in for ffmpeg, and the real one where it is."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from shutil import which
from typing import Any

import numpy as np
import pytest
from PIL import Image

from iddc import video
from iddc.cli import main
from iddc.errors import DataError, SetupError
from iddc.segmenter import Segmenter

K = 3
FRAMES = [np.full((20 + 2 * index, 28, 3), 40 * index, np.uint8) for index in range(5)]
"""They differ in size, so that each is read by what it says of itself."""
STAND_IN = """#!{python}
import os, sys
open({log!r}, "a").write(" ".join(sys.argv[1:]) + "\\n")
sys.stdout.buffer.write(open({stream!r}, "rb").read())
sys.stdout.flush()
os.close(1)
sys.stderr.write("one thing\\nthe last thing\\n")
sys.exit({code})
"""


def ppm(frame: np.ndarray) -> bytes:
    return b"P6\n%d %d\n255\n" % frame.shape[1::-1] + frame.tobytes()


def ffmpeg(folder: Path, stream: bytes, code: int = 0) -> Path:
    """Put a program named ffmpeg into `folder` that gives this stream; returns its log."""
    folder.mkdir(exist_ok=True)
    (folder / "stream").write_bytes(stream)
    script = folder / "ffmpeg"
    names = {"log": str(folder / "log"), "stream": str(folder / "stream")}
    script.write_text(STAND_IN.format(python=sys.executable, code=code, **names))
    script.chmod(0o755)
    return folder / "log"


@pytest.fixture
def clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that the stand-in pretends to read."""
    ffmpeg(tmp_path / "bin", b"".join(map(ppm, FRAMES)))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    path = tmp_path / "-a clip.MP4"
    path.write_bytes(b"video")
    return path


def predict(model: Path, clip: Path, out: Path, *options: str) -> int:
    argv = ["predict", str(model), str(clip), "--out", str(out), "--device", "cpu"]
    return main([*argv, *options])


def tree(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_each_frame_comes_as_it_is(clip: Path) -> None:
    found = [np.asarray(frame) for frame in video.frames(clip)]
    assert len(found) == len(FRAMES)
    assert all(np.array_equal(*pair) for pair in zip(found, FRAMES, strict=True))


def test_the_name_of_a_video_is_no_option_and_no_address_and_nothing_is_fetched(
    clip: Path, tmp_path: Path
) -> None:
    list(video.frames(clip))
    said = (tmp_path / "bin" / "log").read_text()
    assert f"-i file:{clip} " in said
    assert "-protocol_whitelist file -format_whitelist mov," in said


def test_a_reader_that_stops_early_ends_ffmpeg(tmp_path: Path, clip: Path) -> None:
    endless = (
        f"#!/bin/sh\necho $$ > {tmp_path}/pid\nprintf 'P6\\n1 1\\n255\\nabc'\nexec /bin/sleep 99\n"
    )
    (tmp_path / "bin" / "ffmpeg").write_text(endless)
    reader = video.frames(clip)
    assert next(reader).size == (1, 1)
    reader.close()  # type: ignore[attr-defined]
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.parametrize(
    ("stream", "code", "words"),
    [
        (b"", 1, "cannot read .*: the last thing"),
        (b"", 0, "cannot read"),
        (ppm(FRAMES[0]), 1, "beyond 1 frames: the last thing"),
        (ppm(FRAMES[0])[:-1], 0, "in the middle of a frame"),
        (b"P5\n1 1\n255\nabc", 0, "no frame of"),
        (b"P6\n100000 100000\n255\nabc", 0, "no frame of"),
    ],
)
def test_a_damaged_video_is_one_sentence(
    stream: bytes, code: int, words: str, clip: Path, tmp_path: Path
) -> None:
    ffmpeg(tmp_path / "bin", stream, code)
    with pytest.raises(DataError, match=words):
        list(video.frames(clip))


def test_without_ffmpeg_a_video_is_exit_4_and_one_sentence(
    model: Path,
    clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(SetupError, match=r"Install ffmpeg"):
        next(video.frames(clip))
    assert predict(model, clip, tmp_path / "out") == 4
    assert "no ffmpeg on PATH" in capsys.readouterr().err


def test_masks_of_frames_have_names_in_order_and_the_size_of_their_frames(
    model: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert predict(model, clip, out, "--formats", "png", "coco") == 0
    masks = sorted((out / "png" / "-a clip").iterdir())
    assert [mask.name for mask in masks] == [f"frame_00000{index}.png" for index in range(5)]
    for mask, frame in zip(masks, FRAMES, strict=True):
        expected = Segmenter.load(model, "cpu").predict(frame).classes
        np.testing.assert_array_equal(np.asarray(Image.open(mask)), expected)
    assert (out / "classes.txt").read_text().splitlines() == [f"cluster {k}" for k in range(K)]
    assert '"-a clip/frame_000003.png"' in (out / "coco.json").read_text()
    assert "masks of 5 frames in" in capsys.readouterr().out


def test_a_second_time_only_what_is_missing_is_predicted(
    model: Path,
    clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, calls = tmp_path / "out", list[Any]()
    assert predict(model, clip, out) == 0
    before = tree(out)
    (out / "png" / "-a clip" / "frame_000002.png").unlink()
    honest = Segmenter.predict_items

    def counted(self: Segmenter, *args: Any, **options: Any) -> Iterator[Any]:
        for result in honest(self, *args, **options):
            calls.append(result)
            yield result

    monkeypatch.setattr(Segmenter, "predict_items", counted)
    capsys.readouterr()
    assert predict(model, clip, out) == 0
    assert len(calls) == 1
    assert tree(out) == before
    assert "5 frames, 4 of them there already, in" in capsys.readouterr().out


def test_shards_together_give_what_one_gives(
    model: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    formats = ("--formats", "png", "coco")
    assert predict(model, clip, tmp_path / "one", *formats) == 0
    assert predict(model, clip, tmp_path / "two", *formats, "--shard", "2/2") == 0
    assert "3 frames are missing" in capsys.readouterr().out
    assert predict(model, clip, tmp_path / "two", *formats, "--shard", "1/2") == 0
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_a_limit_takes_the_first_frames(model: Path, clip: Path, tmp_path: Path) -> None:
    assert predict(model, clip, tmp_path / "out", "--limit", "2") == 0
    assert len([*(tmp_path / "out" / "png").rglob("*.png")]) == 2


def test_a_long_video_says_how_far_it_is(
    model: Path,
    clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("iddc.progress.INTERVAL", 0)
    assert predict(model, clip, tmp_path / "out") == 0
    assert "frame 3" in capsys.readouterr().err


def test_a_video_that_ffmpeg_complains_of_may_lack_frames_and_it_is_said(
    model: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(model, clip, tmp_path / "out") == 0
    assert "clip.MP4 may lack frames, ffmpeg says: the last thing" in capsys.readouterr().err


def test_a_video_named_as_the_folder_above_writes_into_its_own(
    model: Path, clip: Path, tmp_path: Path
) -> None:
    odd = clip.rename(tmp_path / "...mp4")
    assert predict(model, odd, tmp_path / "out", "--limit", "1") == 0
    assert [path.name for path in (tmp_path / "out" / "png").iterdir()] == ["frame_000000.png"]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to see the group")
def test_ctrl_c_does_not_reach_ffmpeg_which_would_end_as_if_the_video_were_damaged(
    clip: Path, tmp_path: Path
) -> None:
    script = "#!/bin/sh\nread -r _ _ _ _ group _ < /proc/$$/stat\necho $group >&2\nexit 1\n"
    (tmp_path / "bin" / "ffmpeg").write_text(script)
    with pytest.raises(DataError) as caught:
        list(video.frames(clip))
    assert str(caught.value).split()[-1] != f"{os.getpgrp()}."


needs_ffmpeg = pytest.mark.skipif(which("ffmpeg") is None, reason="ffmpeg is not installed")


def encoded(path: Path, *options: str) -> Path:
    """A clip of five frames of 64 x 48, or of other `options`."""
    size = options or ("-s", "64x48")
    raw = np.random.default_rng(0).integers(0, 256, (5, 48, 64, 3), np.uint8).tobytes()
    given = "-v error -nostdin -f rawvideo -pix_fmt rgb24 -s 64x48 -r 5 -i pipe:0"
    command = ["ffmpeg", *given.split(), "-c:v", "mpeg4", *size, f"file:{path}"]
    subprocess.run(command, input=raw, check=True)
    return path


LISTS = {
    "ffconcat": "ffconcat version 1.0\nfile {name}\n",
    "m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{path}\n#EXT-X-ENDLIST\n",
    "m3u8 of an address": "#EXTM3U\n#EXTINF:9,\nhttp://127.0.0.1:{port}/a.ts\n#EXT-X-ENDLIST\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
    "m=video {port} RTP/AVP 96\na=rtpmap:96 H264/90000\n",
}


@needs_ffmpeg
@pytest.mark.parametrize("kind", LISTS)
@pytest.mark.parametrize("suffix", [".mp4", ".ts"])
def test_a_video_that_is_a_list_opens_no_other_file_and_no_address(
    kind: str, suffix: str, tmp_path: Path
) -> None:
    other = encoded(tmp_path / "other.ts")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        port = listening.getsockname()[1]
        path = tmp_path / f"list{suffix}"
        path.write_text(LISTS[kind].format(name=other.name, path=other, port=port))
        with pytest.raises(DataError, match="ffmpeg cannot read"):
            list(video.frames(path))
        with pytest.raises(BlockingIOError):
            listening.accept()


@needs_ffmpeg
@pytest.mark.parametrize(
    "name", ["-i.mp4", "%03d.mkv", "concat:a|b.avi", "http:a.mov", "pipe:0.mpg", "a b\n$(x).m4v"]
)
def test_the_name_of_a_video_is_a_name_for_ffmpeg(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    encoded(Path(name), "-s", "64x48", "-r", "25")
    assert {frame.size for frame in video.frames(Path(name))} == {(64, 48)}


@needs_ffmpeg
@pytest.mark.parametrize("data", [b"", b"text", bytes(10_000), b"\0\0\0\x08ftypisom" * 9])
def test_what_is_no_video_is_a_data_error(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(data)
    with pytest.raises(DataError, match="ffmpeg cannot read"):
        list(video.frames(tmp_path / "a.mp4"))


@needs_ffmpeg
def test_a_frame_that_is_too_large_is_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = encoded(tmp_path / "a.mkv")
    monkeypatch.setattr(video, "MAX_FRAME", 64 * 48 - 1)
    with pytest.raises(DataError, match="ffmpeg cannot read"):
        list(video.frames(path))


@needs_ffmpeg
def test_the_frames_of_a_stream_that_changes_its_size_have_that_of_the_first(
    tmp_path: Path,
) -> None:
    parts = [encoded(tmp_path / f"{side}.ts", "-s", f"{side}x{side}") for side in (32, 64)]
    path = tmp_path / "both.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    sizes = [frame.size for frame in video.frames(path)]
    assert len(sizes) > 5
    assert {*sizes} == {(32, 32)}


@needs_ffmpeg
def test_the_real_ffmpeg_gives_every_frame_in_order(tmp_path: Path) -> None:
    levels = np.arange(12, dtype=np.uint8) * 20
    raw = b"".join(np.full((16, 24, 3), level, np.uint8).tobytes() for level in levels)
    path = tmp_path / "a clip.mkv"
    given = "-v error -f rawvideo -pix_fmt rgb24 -s 24x16 -r 5 -i - -c:v ffv1 -pix_fmt bgr0"
    subprocess.run(["ffmpeg", *given.split(), str(path)], input=raw, check=True)
    found = [np.asarray(frame) for frame in video.frames(path)]
    assert [frame.shape for frame in found] == [(16, 24, 3)] * 12
    assert [int(frame.mean()) for frame in found] == levels.tolist()
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match="ffmpeg cannot read"):
        list(video.frames(path))
