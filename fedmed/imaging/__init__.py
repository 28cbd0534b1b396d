"""From a manifest and its image files to tensors; and phantom hospitals to try it on.

* Way in: `dataset` is a site's images and targets, from its `manifest`; `separators` of the file, `split` of the
  patients.
* One image: `reading` of any file, by `dicom`, `raster` or `volumes`; `plain_errors` says why not.
* One row: `items` and `items_3d` make the arrays that a `recipe` asks for; `resize` to a fixed size.
* Many rows: `decoding` of a manifest, `ordered` side by side, `isolation` and `decode_child` in processes of their
  own.
* Kept: `cache` on the disk or `memory`, read as `stored`; `augment` changes what is trained on.
* Beside it: `fingerprints` of what pictures show, `scanners` that made them, `phantoms` that nobody is in.
"""
