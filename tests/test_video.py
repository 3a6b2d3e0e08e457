"Frame n of a video is frame n, in whatever codec, cut and order; what cannot be decoded is refused by name."
import itertools
import json
import wave
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from scipy import ndimage

from esam3.core import cache_dir
from esam3.data import samples
from esam3.data.samples import BadSample, Video, video_index

HEIGHT, WIDTH, FRAMES = 96, 160, 70
QUIET = "pools=1:frame-threads=1:log-level=none"
GROUND = ndimage.uniform_filter(np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH + 3 * FRAMES, 3)),
                                (7, 7, 0)).astype(np.uint8)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESAM3_CACHE", str(tmp_path / "cache"))


def image(n: int) -> np.ndarray:
    "A moving texture, with the number of the frame as bars along the top, lowest bit first."
    p = GROUND[:, 3 * n:3 * n + WIDTH].copy()
    for bit in range(7): p[:16, 20 * bit:20 * bit + 20] = 235 if n >> bit & 1 else 16
    return p


def number(frame: np.ndarray, bits: int = 7) -> int:
    "The number that the bars of a frame say."
    return sum(int(frame[4:12, 20 * bit + 4:20 * bit + 16].mean() > 128) << bit for bit in range(bits))


def write(path: Path, codec: str, gap: int = 0, pts: Callable[[int], int] = int, base: Fraction = Fraction(1, 24),
          pixels: str = "yuv420p",
          turn: int = 0, bframes: int | None = None, **options: str) -> Path:
    "Encode the images: a keyframe at least every `gap` frames, frame n at tick `pts(n)`."
    if codec not in av.codecs_available: pytest.skip(f"this PyAV has no {codec}")
    with av.open(str(path), "w") as box:
        stream = box.add_stream(codec, rate=24, options={"threads": "1",
                                                         **{k.replace("_", "-"): v for k, v in options.items()}})
        stream.height, stream.width, stream.pix_fmt, stream.codec_context.time_base = HEIGHT, WIDTH, pixels, base
        if gap: stream.codec_context.gop_size = gap
        if bframes is not None: stream.codec_context.max_b_frames = bframes
        if turn: stream.set_display_rotation(turn)
        for n in range(FRAMES):
            frame = av.VideoFrame.from_ndarray(image(n), format="rgb24")
            frame.pts, frame.time_base = pts(n), base
            box.mux(stream.encode(frame.reformat(format=pixels)))
        box.mux(stream.encode())
    return path


def copied(source: Path, to: Path, begin: int = 0, end: int = 1000, late: int = 0, **options: str) -> Path:
    "The packets begin … end − 1 of a video in another file, without decoding."
    with av.open(str(source)) as old, av.open(str(to), "w", options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in itertools.islice(old.demux(video=0), begin, end):
            if packet.dts is None: continue
            packet.pts, packet.dts, packet.stream = packet.pts + late, packet.dts + late, stream
            new.mux(packet)
    return to


def trimmed(source: Path, to: Path) -> Path:
    "A video whose edit list shows the first two thirds of it, as a phone's editor leaves it."
    data = bytearray(source.read_bytes())
    # after the name, the version and the count: the duration, then where in the media it begins
    at = data.index(b"elst") + 12
    data[at:at + 4] = (int.from_bytes(data[at:at + 4], "big") * 2 // 3).to_bytes(4, "big")
    to.write_bytes(data)
    return to


OPEN = "keyint=16:min-keyint=16:scenecut=0:bframes=3:open-gop=1"
WRITTEN: dict[str, Callable[[Path], Path]] = {  # what is encoded
    "clean.mp4": lambda p: write(p, "libx264", x264_params="keyint=24:scenecut=0"),
    "single_group.mp4": lambda p: write(p, "libx264"),
    "open_group.mp4": lambda p: write(p, "libx264", x264_params=OPEN),
    "hevc.mp4": lambda p: write(p, "libx265", x265_params=f"keyint=20:min-keyint=20:{QUIET}"),
    "hevc_closed.mp4": lambda p: write(p, "libx265", x265_params=f"keyint=20:no-open-gop=1:{QUIET}"),
    "refresh.mp4": lambda p: write(p, "libx264", x264_params="keyint=24:intra-refresh=1:bframes=0"),
    "mpeg4.mp4": lambda p: write(p, "mpeg4", gap=12, bframes=2),
    "mpeg4.avi": lambda p: write(p, "mpeg4", gap=12, bframes=2),
    "uneven.mp4": lambda p: write(p, "libx264", pts=lambda n: 40 * n + n % 3 * 7, base=Fraction(1, 1000),
                                  x264_params="keyint=24"),
    "negative.mp4": lambda p: write(p, "libx264", pts=lambda n: n - 10, x264_params="keyint=24"),
    "av1.mp4": lambda p: write(p, "libsvtav1", gap=24, preset="12", svtav1_params="lp=1"),
    "vp9.webm": lambda p: write(p, "libvpx-vp9", gap=20, deadline="realtime", cpu_used="8"),
    "open_group.mkv": lambda p: write(p, "libx264", x264_params=OPEN),
    "open_group.ts": lambda p: write(p, "libx264", x264_params=OPEN),
    "mpeg2.mpg": lambda p: write(p, "mpeg2video", gap=12, bframes=2),
    "pictures.avi": lambda p: write(p, "mjpeg", pixels="yuvj420p"),
}
COPIED: dict[str, Callable[[Path, Path], Path]] = {  # what is copied of that, without decoding
    "cut_clean.mp4": lambda at, p: copied(at / "clean.mp4", p, 10),
    "cut_open_group.mp4": lambda at, p: copied(at / "open_group.mp4", p, 10),
    "cut_hevc.mp4": lambda at, p: copied(at / "hevc.mp4", p, 10),
    "cut_refresh.mp4": lambda at, p: copied(at / "refresh.mp4", p, 10),
    "cut_mpeg4.mp4": lambda at, p: copied(at / "mpeg4.mp4", p, 10),
    "cut_vp9.webm": lambda at, p: copied(at / "vp9.webm", p, 10),
    "trimmed.mp4": lambda at, p: trimmed(at / "clean.mp4", p),
    "cut_clean.ts": lambda at, p: copied(at / "clean.mp4", p, 10),
    "cut_at_key.mp4": lambda at, p: copied(at / "open_group.mp4", p, 14),
    "late.mp4": lambda at, p: copied(at / "clean.mp4", p, late=6000),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("videos")


@pytest.fixture
def made(folder: Path) -> Callable[[str], Path]:
    "A function: the video of a name, written when first asked for."
    def get(name: str) -> Path:
        path = folder / name
        if path.exists(): return path
        if name in WRITTEN: return WRITTEN[name](path)
        for source in ("clean.mp4", "open_group.mp4", "hevc.mp4", "refresh.mp4", "mpeg4.mp4", "vp9.webm"): get(source)
        return COPIED[name](folder, path)
    return get


def straight(path: Path) -> Iterator[np.ndarray]:
    "Every frame of a decode from the start; packets before the first frame may fail, as in a cut."
    with av.open(str(path)) as box:
        stream, begun = box.streams.video[0], False
        stream.codec_context.thread_count = 1
        for packet in box.demux(stream):
            try: frames = packet.decode()
            except av.FFmpegError:
                if begun: raise
                continue
            for frame in frames:
                begun = True
                yield frame.to_ndarray(format="rgb24")


def draws(total: int, times: int = 20) -> Iterator[list[int]]:
    "Frame numbers in all orders: drawn at random, one by one from the end, and all."
    rng = np.random.default_rng(0)
    yield from (rng.integers(0, total, rng.integers(1, 6)).tolist() for _ in range(times))
    yield from ([n] for n in range(total - 1, -1, -7))
    yield list(range(total))


@pytest.mark.parametrize("name", [*WRITTEN, *COPIED])
def test_a_frame_is_the_same_whatever_else_is_asked_for(made, name):
    path = made(name)
    truth, seen = list(straight(path)), {}
    numbers, video = [number(f) for f in truth], Video(path)
    assert numbers == list(range(numbers[0], numbers[0] + len(truth))) and len(video) == len(truth) >= 35
    for k, wanted in enumerate(draws(len(truth))):
        frames = (video if k % 2 else Video(path)).frames(wanted)
        assert frames.shape == (len(wanted), HEIGHT, WIDTH, 3) and frames.dtype == np.uint8
        assert [number(f) for f in frames] == [numbers[n] for n in wanted], wanted
        for n, frame in zip(wanted, frames):
            assert (seen.setdefault(n, frame) == frame).all() and np.abs(frame.astype(int) - truth[n]).mean() < 1, (n,
                wanted)


def test_only_clean_streams_are_skimmed(made):
    clean = {name for name in [*WRITTEN, *COPIED] if video_index(made(name)).clean}
    assert clean == {"clean.mp4", "single_group.mp4"}


def test_what_nobody_refers_to_is_passed_over(made, monkeypatch):
    "One frame of the middle: from its keyframe on, without the images that no other needs."
    index, whole, seen = video_index(made("clean.mp4")), samples._shown, []
    monkeypatch.setattr(samples, "_shown", lambda *a: (seen.append(n) or (n, f) for n, f in whole(*a)))
    n = next(n for n in range(40, 70) if n not in index.spare)
    assert number(Video(made("clean.mp4")).frames([n])[0]) == n
    assert seen == [k for k in range(index.key(n)[-1], n + 1)
                    if k not in index.spare] and len(seen) < n + 1 - index.key(n)[-1]


@pytest.mark.parametrize("name, first", [("hevc.mp4", [20, 40, 60]), ("open_group.mp4", [16, 32, 48, 64]),
                                         ("open_group.ts", [16, 32, 48, 64]), ("mpeg2.mpg", [12, 36, 48, 60]),
                                         ("mpeg4.mp4", [12, 24, 36, 48, 60]), ("refresh.mp4", [])])
def test_reading_starts_at_keyframes_that_were_seen_to_be_safe(made, name, first, monkeypatch):
    index = video_index(made(name))
    assert [n for *_, n in index.safe] == first, "a keyframe of an intra-refresh stream is no place to start"
    video, decoded, whole = Video(made(name)), [], samples._decoded
    monkeypatch.setattr(samples, "_decoded", lambda *a: (decoded.append(f.pts) or f for f in whole(*a)))
    video.frames([69])
    assert (len(decoded) < 25) == bool(first), "the last group alone, but where there is none to start from"


def test_a_clean_stream_in_other_hands_looks_the_same(made):
    path, wanted = made("clean.mp4"), [3, 40, 69]
    skimmed = Video(path).frames(wanted)
    video_index(path, trusting=False)
    assert not Video(path).index.clean and (Video(path).frames(wanted) == skimmed).all()


def test_clean_streams_are_read_as_decord_reads_them(made):
    "Another reader, its own way of seeking: the same pixels."
    decord = pytest.importorskip("decord")
    for name in ("clean.mp4", "single_group.mp4"):
        for wanted in draws(70, 5):
            assert (Video(made(name)).frames(wanted) == decord.VideoReader(str(made(
                name)), num_threads=1).get_batch(wanted).asnumpy()).all()


@pytest.mark.parametrize("turn", [90, 180, 270])
def test_images_are_upright_in_every_codec(tmp_path, turn):
    clean = Video(write(tmp_path / "clean.mp4", "libx264", turn=turn))
    hevc = Video(write(tmp_path / "hevc.mp4", "libx265", turn=turn, x265_params=QUIET))
    assert clean.index.clean and not hevc.index.clean
    assert np.abs(clean.frames([5, 30]).astype(int) - hevc.frames([5, 30])).mean() < 8


def spans(path: Path) -> list[tuple[int, int]]:
    "Where the packets of a video lie in its file: (offset, bytes), in the order they are decoded."
    with av.open(str(path)) as box: return [(p.pos, p.size) for p in box.demux(video=0) if p.size]


@pytest.mark.parametrize("last, part", [(30, 0.5), (45, 0.9), (45, 0), (57, 0), (58, 0.5)])
@pytest.mark.parametrize("name", ["clean.mp4", "open_group.mp4", "hevc.mp4", "mpeg4.mp4"])
def test_a_file_cut_short_ends_early_and_is_never_padded(made, tmp_path, name, last, part):
    path = copied(made(name), tmp_path / f"short_{name}", movflags="faststart")
    at, size = spans(path)[last]
    path.write_bytes(path.read_bytes()[:at + int(part * size)])
    video = Video(path)
    assert last - 4 < len(video) <= last
    for wanted in ([len(video) - 1], list(range(len(video))), [len(video) // 2, 0]):
        assert [number(f) for f in video.frames(wanted)] == wanted
    with pytest.raises(BadSample, match=rf"short_{name}: frame 69 asked for, {len(video)} there"): video.frames([0, 69])


@pytest.mark.parametrize("name", ["open_group.mkv", "open_group.ts", "mpeg4.avi"])
def test_a_file_that_promises_no_length_is_what_can_be_decoded(made, tmp_path, name):
    path, data = tmp_path / name, made(name).read_bytes()
    path.write_bytes(data[:int(0.8 * len(data))])
    truth = list(straight(path))
    for wanted in draws(len(truth), 8):
        assert (Video(path).frames(wanted) == np.stack([truth[n] for n in wanted])).all()
    with pytest.raises(BadSample, match="frame 69 asked for"): Video(path).frames([69])


@pytest.mark.parametrize("name, codec", [("clean.mp4", "H.264"), ("hevc.mp4", "HEVC"), ("mpeg4.mp4", "MPEG-4"),
                                         ("av1.mp4", "AV1")])
def test_frames_that_cannot_be_decoded_are_refused_by_name(made, tmp_path, name, codec):
    data, path = bytearray(made(name).read_bytes()), tmp_path / f"hole_{name}"
    for at, size in spans(made(name))[34:40]: data[at:at + size] = bytes(size)
    path.write_bytes(data)
    video = Video(path)
    assert len(video) == FRAMES and [number(f) for f in video.frames([25, 3])] == [25, 3]
    for wanted in ([36], [3, 36], list(range(FRAMES))):
        with pytest.raises(BadSample, match=rf"hole_{name}: damaged, frame 3\d of 70 cannot be decoded \({codec}\)"):
            Video(path).frames(wanted)


def test_damage_inside_a_clean_looking_packet(made, tmp_path):
    data, path = bytearray(made("clean.mp4").read_bytes()), tmp_path / "inside.mp4"
    for at, size in spans(made("clean.mp4"))[30:36]: data[at + 10:at + size] = b"\xff" * (size - 10)
    path.write_bytes(data)
    assert number(Video(path).frames([10])[0]) == 10
    with pytest.raises(BadSample, match=r"inside.mp4: damaged, frame \d\d of 70 cannot be decoded \(H.264\)"):
        Video(path).frames([10, 34])
    assert number(Video(path).frames([10])[0]) == 10


def test_what_there_is_no_decoder_for_is_called_by_its_name(made, tmp_path):
    (tmp_path / "new.mp4").write_bytes(made("clean.mp4").read_bytes().replace(b"avc1", b"xyz1"))
    with pytest.raises(BadSample, match="new.mp4: XYZ1 video, for which there is no decoder here; convert it"):
        Video(tmp_path / "new.mp4")


def test_sound_alone_is_no_video(tmp_path):
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", "")); sound.writeframes(bytes(16000))
    with pytest.raises(BadSample, match="sound.wav: not a readable video .it has no images"):
        Video(tmp_path / "sound.wav")


def test_the_index_is_kept_and_made_again(made, tmp_path, monkeypatch):
    path, frames = tmp_path / "v.mp4", lambda: [number(f) for f in Video(path).frames([50, 7])]
    path.write_bytes(made("hevc.mp4").read_bytes())
    assert frames() == [50, 7]
    entry, = (cache_dir() / "videos").iterdir()
    whole = entry.read_text()
    with monkeypatch.context() as m:
        m.setattr(samples, "_decoded_once", lambda path: pytest.fail("decoded again"))
        assert frames() == [50, 7]
    changed = json.loads(whole); changed["index"]["safe"][0][-1] += 1
    for damage in ("", whole[:-20], "[]", "\0" * 50, json.dumps(changed)):
        entry.write_text(damage)
        assert frames() == [50, 7] and entry.read_text() == whole
    path.write_bytes(made("cut_hevc.mp4").read_bytes())
    assert len(Video(path)) == 50, "another file of the same name"


def test_files_from_elsewhere(real_files):
    "x265's defaults (six bars), and AV1 of another writer."
    path = real_files / "faults/03_seek/hevc_default.mp4"
    truth = [number(f, 6) for f in straight(path)]
    for wanted in draws(len(truth)):
        assert [number(f, 6) for f in Video(path).frames(wanted)] == [truth[n] for n in wanted]
    path = real_files / "faults/15_av1/av1.mp4"
    truth = list(straight(path))
    for wanted in draws(len(truth)): assert (Video(path).frames(wanted) == np.stack([truth[n] for n in wanted])).all()


def test_a_width_that_decoders_pad(tmp_path):
    "104 px: rows of a decoded frame do not lie one after the other."
    with av.open(str(tmp_path / "a.mp4"), "w") as box:
        stream = box.add_stream("libx264", rate=24, options={"threads": "1"})
        stream.width, stream.height, stream.pix_fmt = 104, 72, "yuv420p"
        for t in range(5): box.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((72, 104, 3), 40 * t, np.uint8))))
        box.mux(stream.encode())
    assert video_index(tmp_path / "a.mp4", trusting=False).whole == 5
