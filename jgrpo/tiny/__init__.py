"""The quick start's base model, problems and process reward model (`base/`), a base and problems of
longer sums (`long/`), and the recipes that made them."""
