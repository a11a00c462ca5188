"""Everything around the model, in three rooms; each imports from those above it alone.

    io/      command lines, checkpoints, run folders, pictures
    tasks/   questions that a rule can judge, and what a set of answers is worth
    text/    the tokenizer, the corpora, and the batches that a model is trained on

Beside them lie presets/ (config.json of released models) and pictures/ (for README.md). Nothing here
imports kernels.py, model.py, sample.py, train.py or rl.py: these import from here.
"""
