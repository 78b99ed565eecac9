"""The quick start's base model, problems and process reward model (`base/`), and the recipes that
made them from nothing."""
