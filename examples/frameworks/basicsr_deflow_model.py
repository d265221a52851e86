"""BasicSR with DeFlow pairs. Copy this file to basicsr/models/, and in the options say

    model_type: DeFlowSRModel
    deflow: { weights: camera-noise, temperature: [0.5, 1.2] }  # may be left out
    datasets:
      train: { type: CleanImageDataset, dataroot_gt: photos, gt_size: 128, ... }

The validation set stays a PairedImageDataset.
"""

from basicsr.models.sr_model import SRModel
from basicsr.utils.registry import DATASET_REGISTRY, MODEL_REGISTRY

from deflow_aug import CleanCrops, DeFlowDegrader


@DATASET_REGISTRY.register()
class CleanImageDataset(CleanCrops):
    """Random crops of a folder of clean images: {"gt", "gt_path", "index"}."""

    def __init__(self, opt):
        # BasicSR calls set_epoch of its sampler alone: with a seed, all passes would be the same.
        super().__init__(opt["dataroot_gt"], opt["gt_size"], scale=opt["scale"], seed=None)


@MODEL_REGISTRY.register()
class DeFlowSRModel(SRModel):
    """Makes the low-quality half of a training batch on the device, anew each time."""

    def __init__(self, opt):
        super().__init__(opt)
        settings = opt.get("deflow", {})
        weights = settings.get("weights", "camera-noise")
        self.degrader = DeFlowDegrader.from_pretrained(weights, device=self.device)
        self.temperature = settings.get("temperature", (0.5, 1.2))

    def feed_data(self, data):
        if self.is_train:
            lq, gt = self.degrader.feed(data["gt"], self.opt["scale"], self.temperature)
            data = {**data, "lq": lq, "gt": gt}
        super().feed_data(data)

    def nondist_validation(self, *args):
        self.is_train = False  # validation pairs are taken as they are
        super().nondist_validation(*args)
        self.is_train = True
