"""Two models on the same prompts: any image, the step of the training loop, concepts, and what is wrong with them."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from elsewhere import elsewhere
from PIL import Image

from esam3.data.batches import load_recipe, open_dataset
from esam3.data.samples import BadSample
from esam3.disagreement import (
    Instance, Pair, as_prompts, disagreement, draw_places, load, open_images, open_pair, read_places, sample_at, save,
    write_places)
from esam3.evaluation import load_model
from esam3.evaluation.mask_metrics import region_similarity
from esam3.models.prompts import POSITIVE, chances
from esam3.models.student import build_student
from esam3.models.teacher import load_teacher
from esam3.show.disagreement import ConceptDisagreement, _together
from esam3.show.views import Cancelled, Work
from esam3.training.stage1 import prompt_losses, stage1_schedule


@pytest.fixture(scope="module")
def pair() -> Pair:
    "The toy teacher, and a student of another make whose encoder is untrained."
    teacher = load_teacher("toy").eval()
    torch.manual_seed(0)
    return Pair(teacher, build_student("es-ev-s", teacher).eval())


@pytest.fixture(scope="module")
def sample():
    return sample_at(open_images("tiny"), 3)


@pytest.mark.parametrize("words", ["+64,48", "[3,4,50,60]", "[3,4,50,60] +20,30 -40.5,50"])
def test_prompts_in_words_and_back(words):
    assert write_places(read_places(words)) == words
    assert as_prompts(read_places(words)).multimask == (words == "+64,48"), "one positive point is ambiguous"


@pytest.mark.parametrize("words, line", [("", "no prompt"), ("+900,3", "outside"), ("[9,9,9,20]", "no inside"),
                                         ("64,48", "is no prompt"), ("[1,2,3]", "is no prompt")])
def test_wrong_prompts_are_refused(pair, sample, words, line):
    with pytest.raises(ValueError, match=line): pair.compare(sample, read_places(words))


@pytest.mark.parametrize("size", [(37, 211), (211, 37), (96, 96)])
def test_own_images_upright_and_of_any_size(pair, tmp_path, size):
    "The image of a file that EXIF turns is the turned one, and masks are of its own pixels."
    pixels = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    turned = Image.Exif()
    turned[274] = 6  # a quarter to the right
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=turned)
    record = disagreement(*pair.models, tmp_path / "a.png", "+5,6")
    assert record.sample.image.shape == (size[1], size[0], 3)
    assert all(m.shape == (size[1], size[0]) for m in record.masks)
    assert (sample_at(open_images(tmp_path / "a.png"), 0).image == record.sample.image).all(), "as the readers read it"


def test_paths_that_hold_no_image(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"): open_images(tmp_path / "none.jpg")
    (tmp_path / "a.txt").write_text("no image")
    with pytest.raises(BadSample, match="a.txt"): open_images(tmp_path / "a.txt")
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(BadSample, match="b.png"): sample_at(open_images(tmp_path / "b.png"), 0)
    with pytest.raises(BadSample, match="there are 0…"): sample_at(open_images("tiny"), 10**6)
    with pytest.raises(ValueError, match="two of them"): open_pair("toy")


def test_errors_are_the_difference_of_the_masks(pair, sample):
    record = pair.compare(sample, draw_places(sample, 0, 0.2))
    first, second = record.masks
    assert (record.missed == (first & ~second)).all() and (record.extra == (second & ~first)).all()
    assert record.iou == region_similarity(first, second) and 0 <= record.iou <= 1
    assert region_similarity(first & False, second & False) == 1.0, "two empty masks agree"


@pytest.mark.parametrize("coin", [0.2, 0.7], ids=["box", "point"])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_step_has_the_losses_of_stage_1(pair, sample, coin, seed):
    "On a batch of the same instance with the same chances, both rounds together."
    schedule = replace(stage1_schedule(load_recipe("tiny")), refinements=1)
    seed = next(s for s in range(100 * seed, 10**6) if (chances([s], [1], 2)[0, 0] < 0.5) == (coin < 0.5))
    drawn = chances([seed], [1], 2)[0]
    places = draw_places(sample, 0, float(drawn[0]))
    taken = pair.step(sample, places, schedule, float(drawn[1]))
    teacher, student = pair.see(sample)
    with torch.no_grad():
        wanted = prompt_losses(*pair.models, teacher.features, student.features,
                               replace(_together(pair, sample, 0), seeds=[seed]), schedule)
    assert taken.losses.keys() == wanted.keys()
    for k, v in taken.losses.items(): assert sum(v) == pytest.approx(float(wanted[k]), rel=1e-4, abs=1e-6), k


def test_a_step_needs_a_teacher_and_a_student(pair, sample):
    alike, schedule = Pair(pair.models[1], pair.models[1]), stage1_schedule(load_recipe("tiny"))
    with pytest.raises(ValueError, match="teacher and a student"):
        alike.step(sample, [(64.0, 48.0, POSITIVE)], schedule)


def test_a_step_without_annotation_has_no_truth(pair, sample):
    bare = replace(sample, masks=sample.masks[:0], phrases=[])
    taken = pair.step(bare, [(64.0, 48.0, POSITIVE)], stage1_schedule(load_recipe("tiny")))
    assert taken.losses.keys() == {"distill"}


def found(*columns: int, score: float = 0.9) -> list[Instance]:
    "Squares of 10 px that begin at some columns."
    masks = [np.zeros((20, 60), bool) for _ in columns]
    for mask, x in zip(masks, columns): mask[:10, x:x + 10] = True
    return [Instance(score, m, np.array([x, 0, x + 10, 10])) for m, x in zip(masks, columns)]


def test_instances_are_matched_by_hand(sample):
    "Of three and three one is the same, one is shifted by less than a third, one is elsewhere."
    concept = ConceptDisagreement(sample, "square", [], ("teacher", "student"),
                                  (found(0, 20, 40), found(20, 2, 50)), (1.0, 1.0))
    assert concept.matched() == ([(0, 1), (1, 0)], [2], [2])
    assert concept.matched((0.95, 0.5)) == ([], [], [0, 1, 2]), "a threshold leaves the first model's out"


def test_a_concept_that_nobody_knows(pair, sample):
    with pytest.raises(ValueError, match="knows no word"): pair.concept(sample, "giraffe")
    with pytest.raises(ValueError, match="no concept"): pair.concept(sample, " ")


def test_the_last_images_are_kept(sample):
    pair = Pair(*(load_teacher("toy").eval() for _ in range(2)), keep=2)
    images = [sample_at(open_images("tiny"), k) for k in range(3)]
    for each in images: pair.see(each)
    assert [pair.knows(i) for i in images] == [False, True, True]


def test_a_ranking_is_kept_and_sorted(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("ESAM3_CACHE", str(tmp_path))
    reader = open_dataset("tiny", "held_out", "images")
    worst = pair.rank(reader, 3)
    assert [r.iou for r in worst] == sorted(r.iou for r in worst) and {r.item for r in worst} <= {0, 1, 2}
    monkeypatch.setattr(Pair, "ranked_image", lambda *_: pytest.fail("ranked again"))
    assert pair.rank(reader, 3) == worst


def test_saved_prompts_are_loaded_again(pair, sample, tmp_path):
    record = pair.compare(sample, read_places("[3,4,50,60] +20,30"))
    png, words = save(record, tmp_path / "seen.any")
    assert Image.open(png).size[0] > 500 and load(words)["prompts"] == "[3,4,50,60] +20,30"
    words.write_text("{")
    with pytest.raises(BadSample, match="no saved prompts"): load(words)


def test_work_is_cancelled_before_the_next_layer(pair, sample):
    "And what was there stays."
    ended, fresh = [], Pair(*pair.models)
    work = Work()

    def slowly() -> None:
        while True: fresh.models[0].encode(torch.zeros(1, 3, 144, 144))

    work.start(slowly, ended.append, ended.append)
    assert work.busy
    work.cancel()
    assert isinstance(ended[0], Cancelled) and not work.busy and not fresh.knows(sample)


def test_the_same_on_a_second_device(sample):
    "Masks, a step and what is found, by a phrase and by an exemplar: nothing is left on the CPU."
    models = lambda: (load_teacher("toy").eval(), load_model("toy-student"))
    schedule, places = stage1_schedule(load_recipe("tiny")), draw_places(sample, 0, 0.7)
    words, box = sample.phrases[0].text, tuple(sample.boxes[0].tolist())

    def figures(pair: Pair) -> list[float]:
        taken, found = pair.step(sample, places, schedule), pair.concept(sample, words, [box])
        scores = [i.score for of in (*found.found, *pair.concept(sample, words).found) for i in of]
        return [taken.before.iou, taken.after.iou, *sum(taken.losses.values(), ()), *found.presence, *scores]

    wanted = figures(Pair(*models()))
    with elsewhere() as device:
        pair = Pair(*(m.to(device) for m in models()))
        assert figures(pair) == pytest.approx(wanted, abs=1e-4)
        bare = replace(sample, masks=sample.masks[:0], phrases=[])
        assert pair.ranked_image(bare, 0), "the teacher finds instances there"


def test_two_students_have_nobody_to_find_instances(pair, sample):
    alike, bare = Pair(pair.models[1], pair.models[1]), replace(sample, masks=sample.masks[:0], phrases=[])
    with pytest.raises(ValueError, match="choose a teacher"): alike.ranked_image(bare, 0)
