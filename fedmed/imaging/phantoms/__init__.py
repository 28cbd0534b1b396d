"""Phantom hospitals: made-up chest radiographs, written as real DICOM by made-up X-ray units."""
