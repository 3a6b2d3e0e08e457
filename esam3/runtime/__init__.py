"""An exported student on numpy and onnxruntime alone: images, prompts, concepts and video. Imports from no other floor."""

# Written by hand.
from .exported import Exported
from .image import ImagePredictor
from .video import VideoPredictor

__all__ = ["Exported", "ImagePredictor", "VideoPredictor"]
