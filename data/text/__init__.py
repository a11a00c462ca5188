"""Text: files and downloads (files.py), corpora as token files (corpus.py) and what they depend on
(origin.py), batches (loader.py), tokenizer.py and its trainer (bpe.py)."""
