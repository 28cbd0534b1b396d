"""From a hospital's archive to a training set: pull from the PACS, de-identify, set apart what needs a person's eye.

* From the archive to the disk: `search` for what a `query` names in an `archive` that speaks `dicomweb` or `dimse`;
  `pull` of what it finds, `one_series` at a time, with a `journal` of what is done.
* De-identification: `deidentify` lets stay what is `allowed`; `pixels` for what hides beside them; `pseudonyms`, and
  `same_keys` that made a folder's.
* What a person must look at: `keep` puts an object among the images or in `quarantine`, `judging` its pixels in a
  process of its own; `burned_in` text, by `tesseract` too where that is installed; `set_apart` for what is decided.
* The manifest: `importing` of archives of all `kinds` with a table of `labels`; `tables` as hospitals export them,
  `persons` in them, `opt_out` of who withdrew.
* Its check: `check`, by a `survey` of each image; `seen` so far, `near_duplicates`, `findings` in words.
* Before it joins: a data `card`, and the `feasibility` of several.
"""
