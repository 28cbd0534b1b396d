"""Volumes with geometry: from DICOM series, enhanced multi-frame objects and NIfTI; resampling; targets."""
