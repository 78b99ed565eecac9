"""From a data set to prompts: rows are read and split, problems are rendered by a template, the
tokenizer makes them token ids."""

from jgrpo.prompts.problems import Problem, load_problems, read_row
from jgrpo.prompts.tokenizer import load_tokenizer, stop_token_ids

__all__ = ["Problem", "load_problems", "load_tokenizer", "read_row", "stop_token_ids"]
