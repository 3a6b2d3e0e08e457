"""Teacher and student and what they are made of: backbones, Perceiver, prompts, tracker, predictors. Imports from `data` and below."""

# Written by hand; `lends` is of 00_core.
from esam3.core import lends

__all__, __getattr__ = lends(__name__, {
    "teacher": "Sam3 load_teacher",
    "student": "EfficientSam3 build_student",
    "perceiver": "SpatialPerceiver",
    "tracker": "track follow_video",
    "concept_video": "follow_concepts",
    "predictor": "ImagePredictor VideoPredictor"})
