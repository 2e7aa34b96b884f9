from dataclasses import replace

import torch

from ldae.pretraining.images import sample_images
from ldae.settings import DataSettings


def test_pictures_are_of_the_evaluation_images(data):
    """Of those that ``eval_source`` names, otherwise of the evaluation split of the images."""
    settings = DataSettings(source=str(data), img_size=8)
    device = torch.device("cpu")
    split = sample_images(settings, device, 4)
    named = replace(settings, source="digits", in_chans=3, eval_source=str(data))
    assert torch.equal(sample_images(named, device, 4), split)
    assert not torch.equal(sample_images(replace(named, eval_source=""), device, 4), split)
