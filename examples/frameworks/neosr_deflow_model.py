"""neosr with DeFlow pairs. Copy this file to neosr/models/, and in the options say

    model_type = "deflow"
    [deflow]  # may be left out
    weights = "camera-noise"
    temperature = [0.5, 1.2]
    [datasets.train]
    type = "clean"
    dataroot_gt = "photos"

The validation set stays "paired" or "single". neosr's own augmentations come after, as ever.
"""

from neosr.models.image import image
from neosr.utils.registry import DATASET_REGISTRY, MODEL_REGISTRY

from deflow_aug import CleanCrops, DeFlowDegrader


@DATASET_REGISTRY.register()
class clean(CleanCrops):
    """Random crops of a folder of clean images: {"gt", "gt_path", "index"}."""

    def __init__(self, opt):
        scale = opt["scale"]
        # neosr calls set_epoch of its sampler alone: with a seed, all passes would be the same.
        super().__init__(opt["dataroot_gt"], opt["patch_size"] * scale, scale=scale, seed=None)
        self.opt = opt


@MODEL_REGISTRY.register()
class deflow(image):
    """Makes the low-quality half of a training batch on the device, anew each time."""

    def __init__(self, opt):
        super().__init__(opt)
        settings = opt.get("deflow", {})
        weights = settings.get("weights", "camera-noise")
        self.degrader = DeFlowDegrader.from_pretrained(weights, device=self.device)
        self.temperature = settings.get("temperature", (0.5, 1.2))

    def feed_data(self, data):
        if self.is_train:  # it is False while the model validates
            lq, gt = self.degrader.feed(data["gt"], self.opt["scale"], self.temperature)
            data = {**data, "lq": lq, "gt": gt}
        super().feed_data(data)
