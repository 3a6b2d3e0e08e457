"Phrases as people write them, concepts given twice, and what following them keeps in memory."
import json
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import esam3.models.concept_video
import esam3.models.teacher
from esam3.core import Part
from esam3.data.batches import load_recipe, open_dataset
from esam3.data.samples import Phrase, Reported, RunMasks, boxes_of
from esam3.models.concept_video import ConceptSession, Exemplar, distinct, follow_concepts
from esam3.models.student import build_student
from esam3.models.teacher import Features, Sam3, load_teacher
from esam3.schedules import Stage3Schedule
from esam3.training.concepts import Confusables, PhraseEmbeddings, QuerySampling, sample_queries, token_bags
from esam3.training.stage3 import MixedSteps

LONG = "a red star beside a blue disk " * 5
KIND = "phrase over the token limit"


@pytest.fixture(scope="module")
def teacher() -> Sam3: return load_teacher()


@pytest.fixture(scope="module")
def clip():
    "A clip of the toy world with phrases."
    return open_dataset(load_recipe("tiny"), "held_out", "concept_clips").read(0, start=0, most=8)


@pytest.fixture(scope="module")
def seen(teacher) -> Features:
    with torch.no_grad(): return teacher.encode(torch.zeros(1, 3, teacher.image_size, teacher.image_size))


@pytest.fixture(autouse=True)
def reported(monkeypatch: pytest.MonkeyPatch) -> Reported:
    "As in a new process."
    monkeypatch.setattr(esam3.models.teacher, "PHRASES", Reported())
    return esam3.models.teacher.PHRASES


def rows(n: int) -> torch.Tensor: return torch.zeros(n, dtype=torch.long)


@pytest.mark.parametrize("phrase", [LONG, "x " * 5000, "красная звезда " * 20, "🌟 " * 40, "红 " * 31])
def test_long_phrase_is_cut_and_said(phrase, teacher, reported):
    with pytest.warns(UserWarning, match=f"{KIND}: .*…': \\d+ tokens, of which 32 are read"):
        words = teacher.concepts([phrase, "red star"], rows(2))
    assert words.attention_mask.sum(1).tolist() == [32, 4] and reported.counts == {KIND: 1}


def test_said_once_and_counted(teacher, reported):
    "The first is a warning; others are counted, each once."
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for phrases in ([LONG], [LONG, "b " + LONG], ["c " + LONG, "red star", None]):
            teacher.concepts(phrases, rows(len(phrases)))
    assert len(said) == 1 and reported.counts == {KIND: 3}
    assert str(reported).startswith(f"3 × {KIND}, for instance 'a red star")
    assert [kind for kind, _ in teacher.cut_phrases([LONG, LONG, "red star", None])] == [KIND] * 2


@pytest.mark.parametrize(("words", "cut"), [(30, 0), (31, 1)])
def test_limit_counts_the_two_marks(words, cut, teacher):
    assert len(teacher.cut_phrases(["star " * words])) == cut


def test_limit_is_the_text_encoders(teacher, monkeypatch):
    "Of its configuration, and a student's is its teacher's."
    torch.manual_seed(0)
    student = build_student("es-ev-s", teacher)
    assert student.most_tokens == teacher.most_tokens == 32
    for model in (teacher, student):
        monkeypatch.setattr(model.config.detector_config.text_config, "max_position_embeddings", 8)
        monkeypatch.setattr(esam3.models.teacher, "PHRASES", Reported())
        with pytest.warns(UserWarning, match="of which 8 are read"):
            assert model.concepts(["a red star and a blue disk"], rows(1)).input_ids.shape == (1, 8)
        assert not model.cut_phrases(["a red star"])


@pytest.mark.parametrize("phrase", ["", " ", "\n\t", "\u3000"])
def test_empty_phrase_is_refused(phrase, teacher, clip):
    "It would be asked as 'visual', as an exemplar without words is."
    box = np.array([[20.0, 20, 60, 60]])
    asked = [lambda: teacher.concepts(["red star", phrase], rows(2)), lambda: PhraseEmbeddings(teacher)([phrase]),
             lambda: teacher.cut_phrases([phrase]),
             lambda: follow_concepts(teacher, clip.frames[:1], ["red star", phrase]),
             lambda: follow_concepts(teacher, clip.frames[:1], [Exemplar(0, box, phrase=phrase)])]
    for call in asked:
        with pytest.raises(ValueError, match="is no phrase: give words, or None to ask with exemplars alone"): call()
    nothing, visual = (teacher.concepts([p], rows(1)).input_ids.tolist() for p in (None, "visual"))
    assert nothing == visual


@pytest.mark.parametrize("phrase", ["красная звезда", "עיגול אדום", "نجمة حمراء", "红色的星", "赤い星", "🌟",
                                    "👩‍👩‍👧‍👦",
                                    "e\u0301toile", "ÉTOILE", "İ", "\u200b", "\x00", "red\nstar", "\ud83d",
                                    "red star\ud83d",
                                    "x" * 10_000, "...", "<bos>", "'; --"])
@torch.no_grad()
def test_any_text_is_asked(phrase, teacher, seen):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = teacher.detect(seen, teacher.concepts([phrase, "red star"], rows(2)))
    assert found.scores().isfinite().all() and token_bags(teacher,
                                                          [esam3.models.teacher.wording(phrase)]).isfinite().all()


def test_training_passes_over_empty_phrases():
    "An image whose only phrase is empty is not asked; beside others it changes nothing."
    words = [Phrase("red star", (0,)), Phrase("blue disk", (), "easy")]
    batch = SimpleNamespace(boxes=torch.tensor([[0.0, 0, 9, 9]]), image_index=torch.tensor([0]))
    images = lambda *phrases: SimpleNamespace(phrases=[*phrases], **vars(batch))
    kin = Confusables(["red star", "blue disk", ""])
    asked = lambda *phrases: sample_queries(images(*phrases), [np.random.default_rng(0) for _ in phrases],
                                            QuerySampling(each=20), kin)
    assert asked([Phrase("", (0,)), *words, Phrase(" ", ())]).phrases == asked(words).phrases
    assert asked([Phrase("", (0,))]).phrases == [] and set(asked([Phrase(" ", ())], words).image_index.tolist()) == {1}


def test_a_run_counts_cut_phrases(teacher, tmp_path, monkeypatch):
    "As notes on the batch, from which the tally of a run makes `counts` of its report."
    phrases = ["red star", LONG, None, LONG]
    monkeypatch.setattr("esam3.training.stage3.sample_queries", lambda batch,
                        *rest: replace(sample_queries(batch, *rest), phrases=phrases))
    schedule = Stage3Schedule(steps=4, batch_size=2, lr=1e-4, clip_every=1, alternate=False)
    sides = teacher.image_size, 128
    recipe = load_recipe("tiny")
    recipe["splits"]["train"]["concept_clips"] = recipe["splits"]["held_out"]["concept_clips"]
    source, asked = MixedSteps(recipe, schedule, sides, 0, QuerySampling(), teacher), 0
    for step in range(2):
        batch = source[Part(step)]
        images = (batch.images is not None) + (batch.clip_frames is not None)
        assert [kind for kind, _ in batch.notes].count(KIND) == 2 * images
        asked += images
    assert asked == 3, "images twice, and a frame of a clip with phrases"


def test_concepts_given_twice_are_followed_once(teacher, clip):
    "`asked` is the first of those that ask the same; others keep their places."
    text = [p.text for p in clip.phrases if p.instances][-1]
    frames, other = clip.frames[:3], next(p.text for p in clip.phrases if not p.instances)
    alone = follow_concepts(teacher, frames, [text])
    found = follow_concepts(teacher, frames, [other, other, text.upper(), text, f" {text}  "])
    assert {f.query for f in alone} == {0} and {(f.query, f.concept) for f in found} == {(2, text.upper())}
    assert [np.asarray(f.masks).sum() for f in found] == [np.asarray(f.masks).sum() for f in alone]


def test_exemplars_are_told_apart_to_the_last_digit(teacher, clip, monkeypatch):
    "Boxes that are written alike were one exemplar."
    k = next(p.instances[0] for p in clip.phrases if p.instances)
    box = boxes_of(clip.masks[k, 0][None])
    same = [Exemplar(0, box), Exemplar(0, box + 0.2), Exemplar(0, box.tolist()),
            Exemplar(0, box, phrase="star"), Exemplar(1, box), Exemplar(0, box, [0])]
    assert len({*map(str, same[:3])}) == 1 and distinct(same) == [0, 1, 3, 4, 5]
    session = ConceptSession(teacher, clip.frames[:2], same)
    assert session.number == [0, 1, 3, 4, 5] and session.exemplars[1] is same[1]
    monkeypatch.setattr(teacher, "new_det_thresh", 0.3)
    assert {f.query for f in follow_concepts(teacher, clip.frames[:2], same[:3])} == {0, 1}


@pytest.mark.parametrize("frame", [-1, 2, 100])
def test_exemplar_on_no_frame_is_refused(frame, teacher, clip):
    with pytest.raises(ValueError, match=f"is on frame {frame} of a clip of 2"):
        follow_concepts(teacher, clip.frames[:2], [Exemplar(frame, np.array([[2.0, 2, 9, 9]]))])


def test_masks_are_never_dense(teacher, clip, monkeypatch):
    "A masklet's masks are run lengths from the first frame on, and read like [T, H, W]."
    monkeypatch.setattr(RunMasks, "_dense", lambda *_: pytest.fail("a whole masklet was decoded"))
    frames = clip.frames[:4]
    found = follow_concepts(teacher, frames, [p.text for p in clip.phrases])
    monkeypatch.undo()
    for masks in (f.masks for f in found):
        whole = np.asarray(masks)
        assert whole.shape == masks.shape == (4, *frames[0].shape[:2]) and whole.dtype == bool and len(masks) == 4
        assert all(np.array_equal(a, b) for a, b in zip(masks, whole))
        assert np.array_equal(masks.any((1, 2)), whole.any((1, 2)))
        assert [masks.rle(t) is not None for t in range(4)] == whole.any((1, 2)).tolist() and masks.any() == whole.any()
        json.dumps([masks.rle(t) for t in range(4)])
    assert found


def test_what_no_frame_reads_is_forgotten(teacher, clip, monkeypatch):
    "The answers are those of a session that keeps all, and what is kept does not grow with the clip."
    config = teacher.tracker_model.config
    for name, value in {"max_object_pointers_in_encoder": 3, "num_maskmem": 2, "max_cond_frame_num": 1}.items():
        monkeypatch.setattr(config, name, value)
    for name, value in {"recondition_every_nth_frame": 2, "high_conf_thresh": 0.0, "high_iou_thresh": 0.0}.items():
        monkeypatch.setattr(teacher, name, value)  # which makes prompted frames
    sessions, frames, phrases = [], clip.frames, [p.text for p in clip.phrases if p.instances]
    kept = lambda *given: sessions.append(ConceptSession(*given)) or sessions[-1]
    monkeypatch.setattr(esam3.models.concept_video, "ConceptSession", kept)
    found = follow_concepts(teacher, frames, phrases)
    monkeypatch.setattr(esam3.models.concept_video, "forget", lambda *_: None)
    whole = follow_concepts(teacher, frames, phrases)
    assert [f.id for f in found] == [f.id for f in whole]
    assert all(np.array_equal(a.masks, b.masks) for a, b in zip(found, whole))
    per_object = lambda session: session.output_dict_per_obj.values()
    maps = lambda parts: sum("maskmem_features" in o for part in parts.values() for o in part.values())
    few, all_ = (max(map(maps, per_object(s))) for s in sessions)
    assert few <= 4 and all_ >= 7, "of eight frames"
    assert max(len(parts["non_cond_frame_outputs"]) for parts in per_object(sessions[0])) <= 3


def test_pixels_are_made_frame_by_frame(teacher, clip):
    "The session of a clip holds images as they came, not T × 3 × S × S floats."
    frames = clip.frames[:3]
    session = ConceptSession(teacher, frames, ["red star"])
    assert session.processed_frames is None and session.num_frames == 3
    assert torch.equal(session.get_frame(2), esam3.models.concept_video.teacher_pixels(frames, teacher.image_size)[2])
