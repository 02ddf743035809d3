"""Tuning data from annotations: VCR, Flickr30k Entities, RefCOCO, MovieNet, and own photos and scenes."""

from idavlm.datasets.tuning.build import TuningSource, build_tuning_data
from idavlm.datasets.tuning.descriptions import Describer, DescriptionFile, DescriptionRequest
from idavlm.datasets.tuning.flickr30k import Flickr30kEntities, PublishedFlickr30k
from idavlm.datasets.tuning.folder import PhotoFolder
from idavlm.datasets.tuning.image_files import PartImages, changed_crop
from idavlm.datasets.tuning.movienet import MovieNet
from idavlm.datasets.tuning.movienet_published import PublishedMovieNet
from idavlm.datasets.tuning.records import Introduced, Reference, Scene, Turn, identity_record
from idavlm.datasets.tuning.refcoco import RefCOCO
from idavlm.datasets.tuning.splits import Splits, check_splits, film_key, read_held_out
from idavlm.datasets.tuning.vcr import VCR

__all__ = [
    "VCR",
    "Describer",
    "DescriptionFile",
    "DescriptionRequest",
    "Flickr30kEntities",
    "Introduced",
    "MovieNet",
    "PartImages",
    "PhotoFolder",
    "PublishedFlickr30k",
    "PublishedMovieNet",
    "RefCOCO",
    "Reference",
    "Scene",
    "Splits",
    "TuningSource",
    "Turn",
    "build_tuning_data",
    "changed_crop",
    "check_splits",
    "film_key",
    "identity_record",
    "read_held_out",
]
