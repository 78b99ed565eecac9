"""The quick start's base model, problems and process reward model (`base/`), a base and problems of
longer sums (`long/`), problems for a real language model (`counting/`), and the recipes of all."""
