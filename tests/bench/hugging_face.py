"""transformers' model with our weights, to be measured beside ours."""

from importlib.util import find_spec
from tempfile import TemporaryDirectory

import torch

from model import Transformer


def transformers_twin(model: Transformer):
    """A module of transformers, float32, on our device; None, and a line, where it is not installed."""
    if not find_spec("transformers"):
        print("transformers is not installed: pip install transformers compares with it")
        return None
    from transformers import AutoModelForCausalLM, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return other.to(model.lm_head.weight.device)
