"""Object detection: Mask R-CNN on ViTDet's simple feature pyramid over a plain ViT."""
