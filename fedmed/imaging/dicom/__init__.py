"""One DICOM object as pixels: header checks, decoding, grey and colour pipelines (DICOM PS3.3, PS3.4 N.2)."""
