"""Programs for lengths that are padded to one: rows behind the length are kept out of the rest."""
