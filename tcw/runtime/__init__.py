"""Models that run: load.py gives one, quantizer.py is the hook in transformers, packed.py keeps weights compressed."""
