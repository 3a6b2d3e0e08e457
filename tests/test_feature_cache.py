"""A cache of features that is killed, cut, damaged, full or somebody else's goes on, or says what is wrong; it never
hands over wrong ones."""
import os
import resource
import shutil
import signal
import subprocess
import sys
from functools import lru_cache, partial
from pathlib import Path

import pytest
import torch

from esam3.data.batches import load_recipe, open_dataset
from esam3.models.teacher import Sam3, load_teacher
from esam3.training.feature_cache import HEADER, FeatureCache, Replays, cache_settings, write_cache
from esam3.training import feature_cache, packing
from esam3.training.packing import record_type

SIZE = record_type(81, 192, "int8").itemsize  # the toy teacher's
FILES = ["000000.trunk", "000001.trunk", "000002.trunk"]


@lru_cache
def toy() -> Sam3: return load_teacher("toy")


@lru_cache
def images(count: int = 6, replays: int = 2) -> Replays:
    "A few images of the toy world, each in two augmentations: twelve items."
    reader = open_dataset("tiny", "train", "images")
    reader.names = reader.names[:count]
    return Replays(reader, 42, replays, load_recipe("tiny")["augment"])


def write(folder: Path, **options) -> dict:
    "Write what is missing in a cache of five records a file."
    return write_cache(folder, toy(), images(), batch=2, records=5, **options)


def opened(folder: Path) -> FeatureCache: return FeatureCache(folder, cache_settings(toy(), images(), records=5))


def content(folder: Path) -> dict[str, bytes]: return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A cache that nothing has happened to."
    folder = tmp_path_factory.mktemp("whole")
    assert write(folder)["written"] == 12
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    "A copy of it, for something to happen to."
    return Path(shutil.copytree(whole, tmp_path / "copy"))


# What happens to a writer happens in a process of its own, which forks once for each case.

KILLS = {"in the header": 100, "in the first record": HEADER + SIZE // 2, "in the second": HEADER + SIZE + 9,
         "before the marks": HEADER + 2 * SIZE, "in a mark": HEADER + 2 * SIZE + 2,
         "in the second file": 2 * HEADER + 6 * SIZE + SIZE // 3}


def killed_at(byte: int) -> None:
    "From now on, `kill -9` this process when it has written so many bytes."
    really, left = os.pwrite, [byte]
    def pwrite(file, data, offset):
        if len(data) > left[0]:
            really(file, data[:left[0]], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= len(data)
        return really(file, data, offset)
    os.pwrite = pwrite


def full_after(byte: int) -> None:
    "From now on no file of this process may grow beyond this, as on a full disk."
    resource.setrlimit(resource.RLIMIT_FSIZE, (byte, byte))


def in_forks(place: Path) -> None:
    "Write a cache for each case, and print how each fork ended."
    toy()
    cases = {name: partial(killed_at, byte) for name, byte in KILLS.items()} | {"full disk": partial(full_after,
        HEADER + 3 * SIZE + 1000)}
    for name, prepare in cases.items():
        pid = os.fork()
        if not pid:
            try: prepare(); write(place / name)
            except OSError as e: print(e, flush=True); os._exit(3)
            os._exit(0)
        print(name, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


@pytest.fixture(scope="module")
def struck(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    "The folder of the cases, and what was printed."
    place = tmp_path_factory.mktemp("struck")
    command = "import sys, pathlib, test_feature_cache; test_feature_cache.in_forks(pathlib.Path(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", command, place], cwd=Path(__file__).parent,
                          env={**os.environ, "OMP_NUM_THREADS": "1"},
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-3000:]
    return place, done.stdout


@pytest.mark.parametrize("name", KILLS)
def test_killed_writer_continues(struck, whole, name):
    place, printed = struck
    assert f"{name} -9\n" in printed
    left = [i for i in range(12) if opened(place / name).holds(i)]
    assert left == [i for i in left if opened(place / name).holds(i, verify=True)]
    assert len(left) == (5 if name == "in the second file" else 0)
    assert write(place / name)["written"] == 12 - len(left)
    assert content(place / name) == content(whole)


def test_full_disk(struck, whole):
    place, printed = struck
    folder = place / "full disk"
    said = next(line for line in printed.splitlines() if "cannot write" in line)
    assert str(folder
               / FILES[0]) in said and "make room" in said and len(said) < 400 + len(
                   str(folder)) and "full disk 3\n" in printed
    assert [i for i in range(12) if opened(folder).holds(i)] == [0,
        1], "of the batch of items 2 and 3 one fitted, but neither counts"
    assert write(folder)["written"] == 10 and content(folder) == content(whole)


def test_no_room_is_known_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 100_000))
    with pytest.raises(OSError, match="GB are free") as e: write(tmp_path / "new")
    assert str(tmp_path / "new") in str(e.value) and not (tmp_path / "new").exists()


CUTS = {0: 5, 1: 5, HEADER - 1: 5, HEADER: 5, HEADER + 1: 5,  # byte → records that are gone
        HEADER + SIZE - 16: 5, HEADER + SIZE - 8: 5, HEADER + SIZE - 4: 5, HEADER + SIZE - 1: 5, HEADER + SIZE: 4,
        HEADER + SIZE + 1: 4, HEADER + 3 * SIZE + SIZE // 2: 2, HEADER + 5 * SIZE - 1: 1}


@pytest.mark.parametrize("byte", CUTS)
def test_cut_file_is_completed(copy, whole, byte):
    os.truncate(copy / FILES[1], byte)
    assert [i for i in range(12) if not opened(copy).holds(i)] == list(range(10 - CUTS[byte], 10))
    with pytest.raises(LookupError, match="image 3 in replay 1: call write_cache again"): opened(copy).read([9])
    done = write(copy)
    assert (done["written"], done["there"]) == (CUTS[byte], 12 - CUTS[byte]) and content(copy) == content(whole)


def flip(path: Path, byte: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("part", ["codes", "centre", "scale", "place", "exact", "item", "crc", "done"])
def test_flipped_bit_is_found_and_mended(copy, whole, part):
    record = record_type(81, 192, "int8")
    flip(copy / FILES[1], HEADER + SIZE + record.fields[part][1] + 3)  # in item 6
    with pytest.raises((ValueError, LookupError), match="image 0 in replay 1.*call write_cache") as e:
        opened(copy).read([6])
    assert str(copy / FILES[1]) in str(e.value)
    torch.testing.assert_close(opened(copy).read([5, 7]).unpack(), opened(whole).read([5, 7]).unpack(), rtol=0, atol=0)
    if part in ("item", "done"): assert isinstance(e.value, LookupError)
    else:
        assert "checksum" in str(e.value) and "verify=True" in str(e.value)
        assert write(copy)["written"] == 0, "without verify only marks are looked at"
    assert write(copy, verify=True)["written"] == 1 and content(copy) == content(whole)


def test_flipped_bit_in_a_header(copy, whole):
    flip(copy / FILES[1], 20)
    with pytest.raises(ValueError, match="header is damaged; delete this file") as e: write(copy)
    assert str(copy / FILES[1]) in str(e.value)
    (copy / FILES[1]).unlink()
    assert write(copy)["written"] == 5 and content(copy) == content(whole)


OTHER = [{"dtype": "fp16"}, {"image_size": 1008}, {"tokens": 5184}, {"seed": 7}, {"augment": None}, {"names": "x"},
         {"teacher": "x"}]


@pytest.mark.parametrize("change", OTHER, ids=lambda c: next(iter(c)))
def test_reader_refuses_other_features(whole, change):
    with pytest.raises(ValueError, match="other settings") as e:
        FeatureCache(whole, cache_settings(toy(), images(), records=5) | change)
    (key, value), said = next(iter(change.items())), str(e.value)
    assert f"{key}: " in said and f"{value!r} now" in said and said.count(" now") == 1 and str(whole) in said


def test_writer_refuses_another_teacher(copy, whole):
    other = load_teacher("toy")
    other.detector_model.vision_encoder.backbone.layers[0].mlp.fc1.weight[0, 0] += 1e-4
    with pytest.raises(ValueError, match="teacher: '[0-9a-f]{16}' there, '[0-9a-f]{16}' now"):
        write_cache(copy, other, images(), records=5)
    assert content(copy) == content(whole)


def test_writer_refuses_another_preprocessing(copy, monkeypatch):
    monkeypatch.setattr(feature_cache, "teacher_pixels", lambda images,
                        size: (torch.zeros(len(images), 3, size, size) - 0.449) / 0.226)
    with pytest.raises(ValueError, match="preprocessing: .*'black': .* there"): write(copy)


def test_other_data_and_dtype(copy):
    with pytest.raises(ValueError, match="images: 6 there, 5 now"): write_cache(copy, toy(), images(5), records=5)
    with pytest.raises(ValueError, match="dtype: 'int8' there, 'fp16' now"): write(copy, dtype="fp16")
    with pytest.raises(ValueError, match="int4.*int8"): write(copy, dtype="int4")


def test_ranks_write_their_own_files(whole, tmp_path):
    assert write(tmp_path, rank=0, world=2)["written"] == 7
    assert set(content(tmp_path)) == {FILES[0], FILES[2]}
    first = {n: (tmp_path / n).stat().st_mtime_ns for n in content(tmp_path)}
    with pytest.raises(LookupError): opened(tmp_path).read([5])
    assert write(tmp_path, rank=1, world=2)["written"] == 5
    assert {n: (tmp_path / n).stat().st_mtime_ns for n in first} == first and content(tmp_path) == content(whole)
    assert len(opened(tmp_path).read(range(12)).codes) == 12
    assert write(tmp_path)["there"] == 12, "one process finds what two have written"


def test_more_replays_are_added(whole, tmp_path):
    write_cache(tmp_path, toy(), images(replays=1), batch=2, records=5)
    assert write(tmp_path)["there"] == 6
    assert ([opened(tmp_path).holds(i, verify=True) for i in range(12)] == [True] * 12
            and content(tmp_path).keys() == content(whole).keys())


def test_decoding_in_other_processes_is_the_same(whole, tmp_path):
    write(tmp_path, workers=1)
    assert content(tmp_path) == content(whole)


def test_error_in_the_background_is_raised_by_read(copy):
    flip(copy / FILES[0], HEADER + 50)
    cache = opened(copy)
    cache.prefetch([0]); cache.prefetch([1])
    assert len(cache.read([1]).codes) == 1 and cache.waited > 0
    with pytest.raises(ValueError, match="checksum"): cache.read([0])


def test_nothing_is_pickled(whole):
    for module in (feature_cache, packing): assert "pickle" not in Path(module.__file__).read_text()
    for name, data in content(whole).items():
        assert data.startswith(b'{"format": 2, ') and (len(data) - HEADER) % SIZE == 0, name
