"""From a hospital's archive to a training set: pull from the PACS, de-identify, set apart what needs a person's eye."""
