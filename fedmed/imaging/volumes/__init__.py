"""Volumes with geometry: from DICOM series, enhanced multi-frame objects and NIfTI; resampling; targets."""

from fedmed.imaging.volumes.reading import read_mask_volume, read_volume

__all__ = ["read_mask_volume", "read_volume"]
