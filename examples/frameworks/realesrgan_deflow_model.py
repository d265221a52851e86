"""Real-ESRGAN with DeFlow pairs in place of its two-stage pipeline.

Copy this file to realesrgan/models/, and in the options say

    model_type: DeFlowRealESRGANModel
    deflow: { weights: camera-noise, temperature: [0.5, 1.2] }  # may be left out

Everything else stays, RealESRGANDataset too (its blur kernels are not used).
"""

from basicsr.utils.registry import MODEL_REGISTRY
from realesrgan.models.realesrgan_model import RealESRGANModel

from deflow_aug import DeFlowDegrader


@MODEL_REGISTRY.register()
class DeFlowRealESRGANModel(RealESRGANModel):
    """Makes the low-quality half of a training batch on the device, anew each time."""

    def __init__(self, opt):
        opt["high_order_degradation"] = False  # its own pipeline, in feed_data
        super().__init__(opt)
        settings = opt.get("deflow", {})
        weights = settings.get("weights", "camera-noise")
        self.degrader = DeFlowDegrader.from_pretrained(weights, device=self.device)
        self.temperature = settings.get("temperature", (0.5, 1.2))

    def feed_data(self, data):
        if self.is_train:  # it is False while the model validates
            side = self.opt["gt_size"]  # the dataset's crops are larger, and random already
            clean = data["gt"][..., :side, :side]
            lq, gt = self.degrader.feed(clean, self.opt["scale"], self.temperature)
            data = {"lq": lq, "gt": gt}
        super().feed_data(data)
