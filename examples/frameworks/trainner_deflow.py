"""traiNNer-redux with DeFlow pairs. Copy this file beside its train.py, and there say

    import trainner_deflow

    trainner_deflow.use("camera-noise", temperature=(0.5, 1.2))  # before train_pipeline(...)

with a training dataset of "type: SingleGtDataset". (traiNNer's options refuse keys that they do
not know, and it chooses between two models by itself, so this changes the model that it takes.)
"""

from traiNNer.models.sr_model import SRModel

from deflow_aug import DeFlowDegrader


def use(weights="camera-noise", temperature=(0.5, 1.2)):
    """Make the low-quality half of a training batch on the device, anew each time."""
    feed_pairs = SRModel.feed_data
    degrader = DeFlowDegrader.from_pretrained(weights)

    def feed_data(self, data):
        if self.is_train:  # it is False while the model validates
            degrader.to(self.device)
            lq, gt = degrader.feed(data["gt"], self.opt.scale, temperature)
            data = {**data, "lq": lq, "gt": gt}
        feed_pairs(self, data)

    SRModel.feed_data = feed_data
