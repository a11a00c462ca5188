"""Text: files and downloads (files.py), corpora as token files (corpus.py), batches (loader.py), tokenizer.py."""
