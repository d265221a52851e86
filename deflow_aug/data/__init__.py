"""Training data: crops of folders of images, in batches, decoded beside the training."""
